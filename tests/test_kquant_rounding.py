"""llama.cpp's block types by descent: against ggml's own search, exhaustive settings, and the bytes of a block."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qtool.convert.formats.gguf.ggml import BLOCKS, GgmlBlocks
from qtool.convert.formats.gguf.ggml_fields import Fields, dequantize, pack, unpack
from qtool.quantize.methods import ggml, kquant_rounding, kquants
from qtool.quantize.methods.kquant_blocks import KINDS, ChosenBlocks, of_blocks
from qtool.quantize.methods.kquant_rounding import begin, descend, quantize
from qtool.quantize.rounding import factorize

DAMP = 0.05


@pytest.fixture(autouse=True)
def ggml_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain twin, whose bytes are ggml's (test_kquants.py): these tests need no package, where there is a twin."""
    monkeypatch.setattr(kquant_rounding, "quantize_ggml", search)


def search(weight: Tensor, type_name: str, importance: Tensor | None = None) -> GgmlBlocks:
    if type_name in kquants.TYPES:
        return kquants.quantize(weight, type_name, importance)
    pytest.importorskip("xllamacpp")
    return ggml.quantize_ggml(weight, type_name, importance)


def correlated(columns: int, tokens: int = 600) -> Tensor:
    mix = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    x = torch.randn(tokens, columns) @ mix * torch.rand(columns).exp()
    return x.t() @ x / tokens


def damped(gram: Tensor) -> Tensor:
    return gram + torch.eye(len(gram)) * DAMP * gram.diagonal().mean()


def loss(weights: Tensor, target: Tensor, gram: Tensor) -> Tensor:
    """By row, in float64."""
    error = (weights - target).double()
    found: Tensor = ((error @ gram.double()) * error).sum(1)
    return found


@pytest.mark.parametrize("type_name", KINDS)
def test_each_stage_loses_less_than_the_one_before(type_name: str) -> None:
    """Row by row no sweep adds to the loss, d and dmin refitted or not; and all of them leave a good part of what
    ggml's own search loses."""
    gram, target = correlated(512), torch.randn(12, 512) * 0.02
    factor, metric = factorize(gram.clone(), DAMP), damped(gram)
    plain = loss(search(target, type_name, gram.diagonal()).dequantize(), target, metric)
    begun = begin(target, factor, type_name)
    last = loss(begun.weights(), target, metric)
    assert float(last.sum()) < 0.8 * float(plain.sum())
    for sweeps in (1, 2, 3):
        now = loss(descend(target, begun, metric, sweeps).weights(), target, metric)
        assert bool((now <= last * (1 + 1e-4)).all())
        last = now
    from_ggml = descend(target, of_blocks(search(target, type_name)), metric, 2)
    assert bool((loss(from_ggml.weights(), target, metric) < plain).all())


@pytest.mark.parametrize("type_name", KINDS)
def test_the_bytes_are_what_was_chosen(type_name: str) -> None:
    """What is propagated, recorded and compared is what a reader of the bytes computes, to the last bit."""
    gram, target = correlated(256), torch.randn(6, 256)
    begun = begin(target, factorize(gram.clone(), DAMP), type_name)
    chosen = descend(target, begun, damped(gram), 1)
    blocks = chosen.blocks(type_name)
    assert torch.equal(blocks.dequantize(), chosen.weights())
    assert blocks.data.shape == (6, 256 // BLOCKS[type_name][0] * BLOCKS[type_name][1])
    again = of_blocks(blocks)
    assert torch.equal(again.codes, chosen.codes)
    assert torch.equal(again.scale, chosen.scale)


@pytest.mark.parametrize("type_name", KINDS)
def test_a_stack_is_rounded_as_its_problems_alone(type_name: str) -> None:
    """Three problems, each under its own metric: float32 sums in another order may turn a near tie of a row, no more;
    the rows of one lie below the other's."""
    grams, target = torch.stack([correlated(512) * 4.0**number for number in range(3)]), torch.randn(3, 7, 512) * 0.02
    factor, metric = factorize(grams, DAMP), torch.stack([damped(gram) for gram in grams])
    found = quantize(target, factor, metric, type_name)
    assert found.shape == (21, 512)
    stacked = found.dequantize().view(3, 7, 512)
    for number in range(3):
        alone = quantize(target[number], factorize(grams[number], DAMP), metric[number], type_name).dequantize()
        assert float((stacked[number] == alone).float().mean()) > 0.8
        ours, theirs = (float(loss(one, target[number], metric[number]).sum()) for one in (stacked[number], alone))
        assert ours == pytest.approx(theirs, rel=5e-3)


def test_no_row_loses_more_than_ggmls() -> None:
    """Also where float16 holds the scales badly: rows as small and as large as it has them."""
    gram = correlated(256)
    target = torch.randn(8, 256) * torch.tensor([1e-9, 1e-7, 1e-6, 1e-4, 1, 1e3, 3e4, 0]).unsqueeze(1)
    for type_name in KINDS:
        found = quantize(target, factorize(gram.clone(), DAMP), damped(gram), type_name)
        plain = search(target, type_name, damped(gram).diagonal())
        assert bool(found.dequantize().isfinite().all())
        ours, theirs = (loss(one.dequantize(), target, damped(gram)) for one in (found, plain))
        assert bool((ours <= theirs * (1 + 1e-5)).all())


def test_a_sub_block_is_near_the_best_there_is() -> None:
    """Two columns count, 30 hardly at all: every scale, minimum and pair of codes of a Q4_K sub-block is tried, d and
    dmin as found. Few rows are better than the one that was found, and not by much."""
    gram = torch.eye(256) * 1e-6
    gram[0, 0] = gram[1, 1] = 1
    gram[0, 1] = gram[1, 0] = 0.9
    target = torch.randn(6, 256)
    chosen = descend(target, begin(target, factorize(gram.clone(), 1e-6), "Q4_K"), gram, 4)
    found = loss(chosen.weights()[:, :2], target[:, :2], gram[:2, :2])
    scales, minima = torch.arange(64.0), torch.arange(64.0)
    for row in range(6):
        step, offset = chosen.d[row, 0] * scales, chosen.dmin[row, 0] * minima
        best = torch.inf
        for first, second in itertools.product(range(16), repeat=2):
            e = torch.stack([code * step[:, None] - offset - target[row, i] for i, code in enumerate((first, second))])
            best = min(best, float((e[0] ** 2 + e[1] ** 2 + 1.8 * e[0] * e[1]).min()))
        assert float(found[row]) <= best + 1e-3 * float((target[row, :2] ** 2).sum())


def test_d_and_dmin_are_the_least_squares_ones() -> None:
    gram, target = correlated(256), torch.randn(5, 256)
    chosen = descend(target, begin(target, factorize(gram.clone(), DAMP), "Q4_K"), damped(gram), 3)
    steps, minima = (chosen.scale / chosen.d).round(), (chosen.shift / chosen.dmin).round()
    of_d = (chosen.codes.unflatten(1, (8, 32)) * steps.unsqueeze(-1)).flatten(1).double()
    of_dmin = -minima.repeat_interleave(32, 1).double()
    metric = damped(gram).double()
    for row in range(5):
        basis = torch.stack((of_d[row], of_dmin[row]))
        wished = torch.linalg.solve(basis @ metric @ basis.t(), basis @ metric @ target[row].double())
        assert float(chosen.d[row, 0]) == pytest.approx(float(wished[0]), rel=2e-3)
        assert float(chosen.dmin[row, 0]) == pytest.approx(float(wished[1]), rel=2e-3)


def test_inputs_that_are_all_zero() -> None:
    """Any rounding is as good: no division by the Gram matrix's zeros."""
    target, gram = torch.randn(4, 256), torch.eye(256)
    for type_name in ("Q4_K", "Q6_K"):
        chosen = quantize(target, factorize(torch.zeros(256, 256), DAMP), gram, type_name)
        assert float((chosen.dequantize() - target).norm() / target.norm()) < 0.1


def test_a_float_type_has_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    gram, target = correlated(32), torch.randn(3, 32)
    found = quantize(target, factorize(gram.clone(), DAMP), damped(gram), "F16")
    assert found.equals(GgmlBlocks(target.half().view(torch.uint8), "F16", (3, 32)))


def block(type_name: str) -> tuple[Fields, list[int]]:
    """Numbers of a block, and its bytes written out by hand from ggml-common.h's drawings."""
    half = [0x00, 0x3C, 0x00, 0x40]  # 1.0, 2.0
    one = torch.ones(1, 1)
    if type_name == "Q8_0":
        codes = torch.arange(-16.0, 16)[None]
        zero = torch.zeros(1)
        fields = Fields(torch.ones(1), zero, one, 0 * one, codes)
        return fields, [*half[:2], *(int(c) & 255 for c in codes[0])]
    if type_name in ("Q5_0", "Q5_1"):
        q = torch.arange(32)  # the fifth bit of element j is bit j of four bytes
        nibbles = [j & 15 | (j & 15) << 4 for j in range(16)]
        high = [0, 0, 255, 255]
        if type_name == "Q5_0":
            return Fields(torch.ones(1), torch.zeros(1), one, 0 * one, q[None] - 16.0), [*half[:2], *high, *nibbles]
        return Fields(torch.ones(1), torch.tensor([-2.0]), one, one, q[None] * 1.0), [*half, *high, *nibbles]
    if type_name == "Q6_K":
        codes = torch.full((1, 256), -32.0)
        codes[0, 0], codes[0, 33], codes[0, 66], codes[0, 99], codes[0, 128] = 31, 1, -15, -16, 31
        steps = torch.zeros(1, 16)
        steps[0, 0], steps[0, 15] = 127, -128
        low, high = [0] * 128, [0] * 64
        low[0], high[0] = 63 & 15, 63 >> 4  # element 0: 63
        low[33], high[1] = 33 & 15, 33 >> 4 << 2  # element 33: 33, its high bits beside element 1's
        low[2], high[2] = (17 & 15) << 4, 17 >> 4 << 4  # element 66: 17
        low[35], high[3] = (16 & 15) << 4, 16 >> 4 << 6  # element 99: 16
        low[64], high[32] = 63 & 15, 63 >> 4  # element 128 begins the second half
        scales = [127, *[0] * 14, 128]
        return Fields(torch.ones(1), torch.zeros(1), steps, torch.zeros(1, 16), codes), [
            *low,
            *high,
            *scales,
            *half[:2],
        ]
    if type_name in ("Q2_K", "Q3_K"):
        return block_of_two_bits(type_name)
    top = 15 if type_name == "Q4_K" else 31
    codes = torch.zeros(1, 256)
    codes[0, 0], codes[0, 33], codes[0, 255] = top, 3, top
    steps, minima = torch.tensor([[1.0, 2, 3, 63, 4, 5, 6, 62]]), torch.tensor([[9.0, 8, 7, 60, 6, 5, 4, 61]])
    scales = [1, 2, 3, 63 | 62 >> 4 << 6, 9, 8, 7, 60 | 61 >> 4 << 6, 4 | 6 << 4, 5 | 5 << 4, 6 | 4 << 4, 14 | 13 << 4]
    nibbles = [0] * 128
    nibbles[0], nibbles[1], nibbles[127] = 15, 3 << 4, 15 << 4
    fifth = [0] * 32
    fifth[0], fifth[31] = 1, 128
    between = fifth if type_name == "Q5_K" else []
    return Fields(torch.ones(1), torch.tensor([2.0]), steps, minima, codes), [*half, *scales, *between, *nibbles]


def block_of_two_bits(type_name: str) -> tuple[Fields, list[int]]:
    steps, low = torch.zeros(1, 16), [0] * 64
    low[0], low[1], low[32], low[3] = 3, 1 << 2, 3, 3 << 6  # elements 0, 33, 128 and 99
    if type_name == "Q2_K":
        low[2] = 2 << 4  # element 66
        codes, minima = torch.zeros(1, 256), torch.zeros(1, 16)
        codes[0, 0], codes[0, 33], codes[0, 66], codes[0, 99], codes[0, 128] = 3, 1, 2, 3, 3
        steps[0, 0], steps[0, 15], minima[0, 0], minima[0, 15] = 15, 2, 1, 14
        both = [15 | 1 << 4, *[0] * 14, 2 | 14 << 4]
        return Fields(torch.ones(1), torch.tensor([2.0]), steps, minima, codes), [*both, *low, 0x00, 0x3C, 0x00, 0x40]
    codes, high = torch.full((1, 256), -4.0), [0] * 32
    codes[0, 0], codes[0, 33], codes[0, 66], codes[0, 99], codes[0, 128] = 3, -3, 0, -1, 3
    high[0], high[2] = 1 | 1 << 4, 1 << 2  # the third bits of elements 0 and 128, and of 66
    steps -= 32
    steps[0, 0], steps[0, 15] = 31, -15
    scales = [15, *[0] * 6, 1 << 4, 3, 0, 0, 1 << 6]
    return Fields(torch.ones(1), torch.zeros(1), steps, torch.zeros(1, 16), codes), [*high, *low, *scales, 0x00, 0x3C]


@pytest.mark.parametrize("type_name", KINDS)
def test_blocks_are_these_bytes(type_name: str) -> None:
    fields, data = block(type_name)
    packed = pack(fields, type_name)
    assert packed.tolist() == [data]
    read = unpack(packed, type_name)
    for name in ("d", "dmin", "steps", "minima", "codes"):
        assert torch.equal(getattr(read, name), getattr(fields, name)), name
    weights = dequantize(fields)
    assert float(weights[0, 0]) == float(fields.d * fields.steps[0, 0] * fields.codes[0, 0]) - float(
        fields.dmin * fields.minima[0, 0]
    )


@pytest.mark.parametrize("type_name", KINDS)
def test_any_bytes_come_back(type_name: str) -> None:
    data = torch.randint(0, 256, (9, BLOCKS[type_name][1]), dtype=torch.uint8)
    for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q5_1": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}.get(
        type_name, (0,)
    ):
        data[:, at + 1] &= 0b10111011  # no exponent of all ones
    assert torch.equal(pack(unpack(data, type_name), type_name), data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels run on an accelerator only")
@pytest.mark.parametrize("type_name", KINDS)
def test_an_accelerator_finds_what_the_cpu_finds(type_name: str) -> None:
    """Of one problem, and of the same and another in a stack."""
    grams, target = torch.stack([correlated(768), correlated(768)]), torch.randn(2, 50, 768) * 0.02
    metric = torch.stack([damped(gram) for gram in grams])
    for problems in (0, slice(None)):
        losses = []
        for device in ("cpu", "cuda"):
            wanted, gram, own = (part[problems].to(device) for part in (target, grams, metric))
            found = quantize(wanted, factorize(gram, DAMP), own, type_name).dequantize()
            losses.append(float(loss(found.view_as(wanted).cpu(), target[problems], metric[problems]).sum()))
        assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_kinds_hold_what_the_types_hold() -> None:
    """Every block of ggml's is a setting that may be chosen, weights and all."""
    for type_name, kind in KINDS.items():
        blocks = search(torch.randn(4, 512), type_name, torch.rand(512))
        chosen = of_blocks(blocks)
        assert isinstance(chosen, ChosenBlocks)
        assert int(chosen.codes.min()) >= kind.low
        assert int(chosen.codes.max()) <= kind.low + kind.top
        assert torch.equal(chosen.weights(), blocks.dequantize())
        assert chosen.blocks(type_name).equals(blocks)
