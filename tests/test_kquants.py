"""Our block search against ggml's C code, byte for byte, and against numbers that C's arithmetic cannot hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks
from qtool.convert.formats.gguf.ggml_fields import pack
from qtool.quantize.methods import ggml, kquants, low_bits

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels run on an accelerator only")
ROWS = torch.tensor([[0.0], [1.0], [-0.25], [3e4], [1e-6], [1e-20], [1e-30], [1e-42]])


def weights(kind: str, columns: int = 768) -> torch.Tensor:
    """A matrix of one character; the rows of ``scales`` are as large and as small as float32 has them."""
    normal = torch.randn(24, columns)
    heavy = torch.distributions.StudentT(torch.tensor(3.0)).sample((24, columns))
    blocks = (4 * torch.randn(24, columns // 32)).exp().repeat_interleave(32, 1)
    return {
        "normal": normal * 0.02, "bf16": (normal * 0.02).bfloat16(), "heavy": (heavy * 0.02).half(),
        "blocks": normal * blocks * 1e-3, "positive": normal.abs(), "negative": -normal.abs() - 0.5,
        "grid": (normal * 4).round() / 16, "sparse": torch.where(torch.rand(24, columns) > 0.98, normal, 0.0),
        "constant": ROWS.repeat(3, columns), "scales": normal * ROWS.repeat(3, 1),
    }[kind]  # fmt: skip


def importance(columns: int = 768) -> torch.Tensor:
    """Very uneven, one channel that never fired."""
    row = torch.rand(columns) ** 8
    row[100] = 0
    return row


KINDS = ("normal", "bf16", "heavy", "blocks", "positive", "negative", "grid", "sparse")


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("type_name", kquants.TYPES)
def test_the_bytes_are_ggmls(type_name: str, weighed: bool) -> None:
    """Not one block differs, whatever the weights are like."""
    pytest.importorskip("xllamacpp")
    row = importance() if weighed else None
    for kind in KINDS:
        weight = weights(kind)
        weight[5] = 0
        assert kquants.quantize(weight, type_name, row).equals(ggml.quantize_ggml(weight, type_name, row)), kind


@pytest.mark.parametrize("type_name", low_bits.TYPES)
def test_the_bytes_of_low_bits_are_ggmls(type_name: str) -> None:
    """At the ends of float32, too; and they are read as the gguf package reads them, and packed again."""
    pytest.importorskip("xllamacpp")
    gguf: Any = pytest.importorskip("gguf")
    row = importance()
    for kind in (*KINDS, "constant", "scales"):
        weight = weights(kind)
        weight[5] = 0
        ours, theirs = low_bits.quantize(weight, type_name, row), ggml.quantize_ggml(weight, type_name, row)
        assert ours.equals(theirs), kind
        values = gguf.quants.dequantize(ours.data.numpy(), gguf.GGMLQuantizationType[type_name])
        assert torch.equal(ours.dequantize(), torch.from_numpy(values)), kind
        assert torch.equal(pack(ours.fields(), type_name).view_as(ours.data), ours.data)


@pytest.mark.parametrize("type_name", low_bits.TYPES)
def test_no_row_makes_a_block_of_low_bits_infinite(type_name: str) -> None:
    extremes = torch.tensor([3e38, -3e38, 1e-45, 65504, -1e20, 1e10, 0, 1])
    weight = extremes.repeat(8, 32) * torch.tensor([1, -1, 1e-3, 1e-8, 1e-20, 1e-30, 1e-38, 0])[:, None]
    for row in (torch.rand(256), torch.zeros(256), torch.rand(256) * 1e30, torch.rand(256) * 1e-40):
        assert low_bits.quantize(weight, type_name, row).dequantize().isfinite().all()


@cuda
@pytest.mark.parametrize("type_name", low_bits.TYPES)
def test_kernels_give_the_bytes_of_low_bits(type_name: str) -> None:
    row = importance()
    for kind in (*KINDS, "constant", "scales"):
        weight = weights(kind)
        weight[5] = 0
        plain = low_bits.quantize(weight, type_name, row)
        kernel = ggml.quantize_ggml(weight.cuda(), type_name, row.cuda())
        assert kernel.data.is_cuda
        assert kernel.to(torch.device("cpu")).equals(plain), kind
        assert torch.equal(kernel.dequantize().cpu(), plain.dequantize())


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("type_name", kquants.TYPES)
@pytest.mark.parametrize("kind", ["constant", "scales"])
def test_no_worse_than_ggml_at_the_ends_of_float32(type_name: str, weighed: bool, kind: str) -> None:
    """A block is the same bytes or errs no more, and is finite; nearly all are the same."""
    pytest.importorskip("xllamacpp")
    weight, row = weights(kind), importance() if weighed else None
    ours, theirs = kquants.quantize(weight, type_name, row), ggml.quantize_ggml(weight, type_name, row)
    elements, size = BLOCKS[type_name]
    same = (ours.data.view(-1, size) == theirs.data.view(-1, size)).all(1)
    assert same.float().mean() >= 0.75
    errors = []
    for blocks in (ours, theirs):
        error = (blocks.dequantize().double() - weight).square() * (1 if row is None else row)
        errors.append(error.view(-1, elements).sum(1))
    assert errors[0].isfinite().all()
    assert (same | (errors[0] <= errors[1]) | errors[1].isnan()).all()


@pytest.mark.parametrize("type_name", kquants.TYPES)
def test_nothing_makes_a_block_infinite(type_name: str) -> None:
    extremes = torch.tensor([3e38, -3e38, 1e-45, 65504, -1e20, 1e10, 0, 1])
    weight = extremes.repeat(8, 32) * torch.tensor([1, -1, 1e-3, 1e-8, 1e-20, 1e-30, 1e-38, 0])[:, None]
    for row in (None, torch.rand(256), torch.zeros(256), torch.rand(256) * 1e30, torch.rand(256) * 1e-40):
        assert kquants.quantize(weight, type_name, row).dequantize().isfinite().all()


def test_a_channel_that_never_fired_costs_nothing() -> None:
    row = torch.zeros(256)
    row[:16] = 1
    weight = torch.randn(8, 256)
    error = (kquants.quantize(weight, "Q6_K", row).dequantize() - weight).square() * row
    assert error.sum() < 1e-3 * (weight.square() * row).sum()


@pytest.mark.parametrize("type_name", kquants.TYPES)
def test_decoding_is_the_gguf_packages(type_name: str) -> None:
    """Any bytes whose scales are finite, decoded bit for bit alike."""
    gguf: Any = pytest.importorskip("gguf")
    data = torch.randint(0, 256, (7, 3 * BLOCKS[type_name][1]), dtype=torch.uint8)
    blocks = data.view(7, 3, -1)
    for start in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q5_1": (0, 2), "Q6_K": (208,)}.get(type_name, (0,)):
        blocks[..., start + 1] &= 0b10111011  # no exponent of all ones
    values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[type_name])
    ours = GgmlBlocks(data, type_name, values.shape).dequantize()
    assert torch.equal(ours, torch.from_numpy(values))


def test_types_read_but_never_written() -> None:
    gguf: Any = pytest.importorskip("gguf")
    weight = torch.randn(3, 64)
    data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0)
    restored = GgmlBlocks(torch.from_numpy(data), "Q4_0", (3, 64)).dequantize()
    assert (restored - weight).norm() < 0.1 * weight.norm()


def test_columns_must_fill_blocks() -> None:
    with pytest.raises(ValueError, match="40 columns do not divide into Q6_K blocks of 256"):
        kquants.quantize(torch.zeros(2, 40), "Q6_K")


@pytest.mark.slow
def test_rows_may_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, row = weights("normal"), importance()
    for type_name in ("Q4_K", "Q5_1"):
        whole = kquants.quantize(weight, type_name, row)
        monkeypatch.setattr(kquants, "CHUNK_WEIGHTS", 1000)
        assert kquants.quantize(weight, type_name, row).equals(whole)


@pytest.mark.parametrize(("type_name", "limit"), [("Q4_K", 65504.0), ("F16", 65504.0), ("BF16", 3.38e38)])
def test_what_fits(type_name: str, limit: float) -> None:
    assert ggml.fits(torch.tensor([-limit, 1.0]), type_name)
    assert not ggml.fits(torch.tensor([-limit * 1.01, 1.0]), type_name)


@cuda
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("type_name", kquants.TYPES)
def test_kernels_give_the_twins_bytes(type_name: str, weighed: bool) -> None:
    row = importance() if weighed else None
    for kind in (*KINDS, "constant", "scales"):
        weight = weights(kind)
        weight[5] = 0
        plain = kquants.quantize(weight, type_name, row)
        kernel = ggml.quantize_ggml(weight.cuda(), type_name, None if row is None else row.cuda())
        assert kernel.data.is_cuda
        assert kernel.to(torch.device("cpu")).equals(plain), kind
        assert torch.equal(kernel.dequantize().cpu(), plain.dequantize())


@cuda
@pytest.mark.parametrize("type_name", kquants.TYPES)
def test_kernels_make_no_block_infinite(type_name: str) -> None:
    extremes = torch.tensor([3e38, -3e38, 1e-45, 65504, -1e20, 1e10, 0, 1])
    weight = extremes.repeat(8, 32) * torch.tensor([1, -1, 1e-3, 1e-8, 1e-20, 1e-30, 1e-38, 0])[:, None]
    for row in (None, torch.rand(256), torch.zeros(256), torch.rand(256) * 1e30, torch.rand(256) * 1e-40):
        blocks = kquants.quantize(weight.cuda(), type_name, None if row is None else row.cuda())
        assert blocks.dequantize().isfinite().all()


@cuda
def test_odd_numbers_of_blocks() -> None:
    """Rows that fill no whole program of threads."""
    for type_name in kquants.TYPES:
        weight = torch.randn(3, 256)
        assert (
            kquants.quantize(weight.cuda(), type_name)
            .to(torch.device("cpu"))
            .equals(kquants.quantize(weight, type_name))
        )


def test_layers_that_do_not_fit_are_named() -> None:
    from qtool.convert.formats.plan import LinearPlan
    from qtool.convert.models.feeds import Feed, Nothing, whole
    from qtool.quantize.methods.gguf import GgufMethod
    from qtool.quantize.methods.method import Inputs, Layer
    from qtool.quantize.stacks import Stack
    from qtool.quantize.statistics import InputStatistics

    matrices = (whole("self_attn.q_proj"), whole("mlp.down_proj"))
    tensors = {one.tensor: torch.full((2, 256), 7e4) for one in matrices}
    plans = {one.module: LinearPlan(one.module, 2, 256, 32, 288, "Q4_K") for one in matrices}
    layer = Layer(0, (), matrices, plans, tensors, {}, torch.device("cpu"))
    with pytest.raises(QtoolError, match=r"self_attn\.q_proj: does not fit Q4_K, which ends at 65504; set"):
        GgufMethod(method="gguf", rounding="ggml").quantize(layer, Inputs())
    stats, stack = InputStatistics(), Stack((matrices[1:],), (Feed(Nothing(), matrices[1:]),))
    stats.add(torch.randn(300, 256))
    stats.finish()
    with pytest.raises(QtoolError, match=r"mlp\.down_proj: does not fit Q4_K, which ends at 65504; set"):
        GgufMethod(method="gguf").begin(layer, Inputs()).round(stack, stats)


def test_descent_is_the_default_where_the_text_weighs_the_columns() -> None:
    from pydantic import ValidationError

    from qtool.quantize.methods.gguf import GgufMethod
    from qtool.quantize.methods.method import Needs

    def needs(**keys: Any) -> Needs:
        return GgufMethod.model_validate({"method": "gguf", **keys}).needs

    assert needs() is needs(type="Q6_K", rounding="descent") is Needs.OWN_STREAM
    assert needs(propagate_error=False) is Needs.GRAM
    assert needs(rounding="ggml") is Needs.CHANNELS
    for keys in ({"imatrix": False}, {"imatrix": "file.gguf"}, {"type": "Q8_0"}, {"type": "BF16"}):
        assert needs(**keys) is needs(**keys, rounding="ggml") is Needs.NOTHING
        with pytest.raises(ValidationError, match="descent needs `imatrix: true` and a type other than Q8_0, F32"):
            needs(**keys, rounding="descent")
