"""Families: what each says of its tensors against transformers' own class, and one that is added in one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import converted
from toy_family import STABLELM

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.folder import EXTRAS
from qtool.convert.models.feeds import Feed, Heads, Matrix, Norm, Nothing, Rows, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import decoder_of, tensor_shapes
from qtool.convert.models.table import FAMILIES, gguf_facts
from qtool.convert.skeleton import load_config
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines.torch_model import load_model
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.grid_work import GridWork
from qtool.quantize.methods.on_grid import quantize_layer
from qtool.quantize.stacks import stacks_of
from qtool.quantize.statistics import InputStatistics
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import read_headers

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "max_position_embeddings": 256,
}  # fmt: skip
OUTPUTS = [
    {"method": "awq", "name": "awq-g32", "group_size": 32, "dtype": "bfloat16"},
    {"method": "gptq", "name": "gptq-g32", "group_size": 32, "scaling": "awq", "dtype": "bfloat16"},
    {"method": "nf4"},
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_feeds_are_of_tensors_that_are_there(name: str) -> None:
    """Each matrix once, with its columns alike in one feed; each producer in its layer and with as many channels."""
    decoder = decoder_of(SIZES | {"architectures": [name]})
    tensors = decoder.tensors()
    for layer in range(decoder.shape.layers):
        at = decoder.at(layer)
        modules = [one.module for one in decoder.matrices(layer)]
        assert len(set(modules)) == len(modules)
        producers = [feed.producer for feed in decoder.feeds(layer)]
        assert len(set(producers)) == len(producers)  # the walk scales one feed of a producer
        for feed in decoder.feeds(layer):
            widths = {one.shape(tensors[at + one.tensor])[1] for one in feed.consumers}
            assert len(widths) == 1
            columns = widths.pop()
            match feed.producer:
                case Norm(norm):
                    tie = feed.producer.ties(columns, CPU)
                    assert tensors[f"{at}{norm}.weight"] == (columns if tie is None else int(tie.max()) + 1,)
                case Rows(made) | Heads(made):
                    rows = feed.producer.part(torch.empty(made.shape(tensors[at + made.tensor])[0])).shape[0]
                    tie = feed.producer.ties(columns, CPU)
                    assert rows == (columns if tie is None else int(tie.max()) + 1)
    mixture = decoder.family.mixture
    bias = mixture.score_bias if mixture and mixture.score_bias else "no bias of scores"
    within = {name: shape for name, shape in tensors.items() if name.startswith(decoder.prefix)}
    matrices = {name for name, shape in within.items() if len(shape) == 2 and not name.endswith(bias)}
    also = {decoder.at(layer) + name for layer in range(3) for feed in decoder.feeds(layer) for name in feed.also}
    assert set(decoder.held()) | also == matrices
    beside = decoder.family.unlike_layers
    assert not any(part in module for part in beside for module in decoder.held())
    assert not set(decoder.held()) & also


def test_a_looped_model_is_no_gguf() -> None:
    with pytest.raises(QtoolError, match=r"cannot be written as GGUF: llama\.cpp has no looped decoder"):
        gguf_facts({"architectures": ["IQuestLoopCoderForCausalLM"]})


@pytest.mark.parametrize(
    ("stored", "one", "expected"),
    [
        ((6, 4), whole("a"), lambda t: t),
        ((5, 6, 4), Matrix("a", "t", index=2), lambda t: t[2]),
        ((5, 6, 4), Matrix("a", "t", index=2, count=3), lambda t: t[2, :3]),  # gate of gate and up, a half each
        ((5, 6, 4), Matrix("a", "t", index=2, first=3, count=3), lambda t: t[2, 3:]),
        (
            (5, 4, 6),
            Matrix("a", "t", 1, transposed=True, first=1, step=2, count=3),
            lambda t: t[1].t()[1::2],
        ),  # gpt-oss
    ],
)
def test_a_matrix_is_a_view_of_its_tensor(stored: tuple[int, ...], one: Matrix, expected: Callable[..., Any]) -> None:
    tensor = torch.randn(stored)
    found = one.of(tensor)
    assert torch.equal(found, expected(tensor))
    assert one.shape(stored) == tuple(found.shape)
    found.zero_()
    assert not expected(tensor).any()


def test_a_scale_goes_to_whatever_else_its_norm_feeds() -> None:
    """A router beside the matrices, and a LayerNorm's bias: what each computes of the norm's output stays."""
    feed = Feed(Norm("norm"), (whole("up"),), also=("router.weight",))
    weights = {"norm.weight": torch.rand(64) + 0.5, "norm.bias": torch.randn(64), "up.weight": torch.randn(32, 64),
               "router.weight": torch.randn(4, 64)}  # fmt: skip
    x = torch.randn(500, 64)
    x[:, ::9] *= 12
    made = x * weights["norm.weight"] + weights["norm.bias"]
    stats = InputStatistics()
    stats.add(made)
    stats.finish()
    method = AwqMethod(method="awq", group_size=32, rounding="rtn", dtype="bfloat16")
    output = quantize_layer(method, [feed], weights, {feed.name: stats})
    scale = output.kept["up.columns"]
    assert not torch.equal(scale, torch.ones(64))
    folded = x * output.tensors["norm.weight"] + output.tensors["norm.bias"]
    torch.testing.assert_close(folded * scale, made, rtol=1e-4, atol=1e-4)
    routed = folded @ output.tensors["router.weight"].t()
    torch.testing.assert_close(routed, made @ weights["router.weight"].t(), rtol=1e-3, atol=1e-3)
    assert set(output.codes) == {"up"}


def test_heads_that_share_a_norm_share_its_scales() -> None:
    norm = Norm("norm", repeated=32)
    feed = Feed(norm, (whole("out"),))
    weights = {"norm.weight": torch.rand(32) + 0.5, "out.weight": torch.randn(64, 128)}
    x = torch.randn(500, 128)
    x[:, ::32] *= 12
    made = x * weights["norm.weight"].repeat(4)
    stats = InputStatistics()
    stats.add(made)
    stats.finish()
    method = AwqMethod(method="awq", group_size=32, dtype="bfloat16")
    work = GridWork(method, [feed], weights, {feed.name: stats})
    (stack,) = stacks_of([feed])
    scale = work.divisor(stack)
    assert scale is not None
    assert not torch.equal(scale, torch.ones(128))
    torch.testing.assert_close(work.target(stack), weights["out.weight"] * scale)
    folded = work.finish().tensors["norm.weight"]
    torch.testing.assert_close(x * folded.repeat(4) * scale, made, rtol=1e-4, atol=1e-4)


@pytest.fixture
def stablelm(monkeypatch: pytest.MonkeyPatch, model_maker: Callable[..., Path], tmp_path: Path) -> Path:
    monkeypatch.setitem(FAMILIES, STABLELM.name, STABLELM)
    return model_maker(tmp_path / "model", "StableLm", use_qkv_bias=True)


@pytest.mark.slow
def test_a_family_is_added_in_one_file(stablelm: Path, tmp_path: Path) -> None:
    """Planned, converted, verified against its source and loaded; and refused where it is not known how."""
    config = json.loads((stablelm / "config.json").read_text())
    source = Checkpoint.open(stablelm)
    assert {name: info.shape for name, info in source.tensors.items()} == tensor_shapes(config)
    headers = read_headers(str(stablelm))
    model = load_model(source.read(), load_config(stablelm), CPU)
    tokens = torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens).logits.log_softmax(-1)
    for name, path in converted(stablelm, OUTPUTS, tmp_path).items():
        artifact = Artifact.open(path)
        assert artifact.manifest is not None
        result = verify(path, stablelm)
        assert result.sound, [check for check in result.checks if check.status == "fail"]
        assert len(artifact.linears()) == 14
        assert weights_of(headers, name).nbytes == artifact.manifest.tensor_bytes
        found = load_model(artifact.read(), load_config(stablelm), CPU)(input_ids=tokens).logits.log_softmax(-1)
        assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.5, name
        if name != "nf4":
            scales = Checkpoint.open(path / EXTRAS)
            assert scales.tensor("model.layers.0.mlp.up_proj.columns").unique().numel() > 1
            assert scales.tensor("model.layers.0.mlp.gate_proj.rows").unique().tolist() == [1.0]
    with pytest.raises(QtoolError, match="StableLmForCausalLM cannot be written as GGUF yet"):
        converted(stablelm, [{"method": "gguf"}], tmp_path)


@pytest.mark.parametrize("second", [Norm("input_layernorm"), Rows(whole("self_attn.v_proj"))])
def test_two_feeds_of_one_producer_are_refused(
    stablelm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: Norm | Rows
) -> None:
    """Each would be scaled by itself, and the producer divided by the last scale alone: nothing is written."""

    def feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
        *rest, mlp, last = STABLELM.feeds(shape, layer)
        return (*rest, replace(mlp, producer=second), last)

    monkeypatch.setitem(FAMILIES, STABLELM.name, replace(STABLELM, feeds=feeds))
    with pytest.raises(QtoolError, match=r"StableLmForCausalLM: self_attn\.\w+ and mlp\.gate_proj are two feeds of"):
        converted(stablelm, OUTPUTS[:1], tmp_path)
    assert not any(path for path in tmp_path.rglob("*.safetensors") if stablelm not in path.parents)


def test_producers_that_nothing_passes_absorb_nothing() -> None:
    assert Nothing() == Nothing()
    assert Nothing().ties(4, CPU) is None


def test_the_page_shows_the_family_that_is_tested() -> None:
    folder = Path(__file__).parent
    page = (folder.parent / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    module = (folder / "toy_family.py").read_text(encoding="utf-8")
    assert module.strip() in page
