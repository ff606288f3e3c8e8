"""The streamed walk against the whole model: same inputs at every linear, for every architecture in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.shape import decoder_of
from qtool.convert.models.table import family_of
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.quantize import source_model as walked
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods import on_grid
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.grid_work import GridWork, OnGrid
from qtool.quantize.methods.method import LayerCodes, Method
from qtool.quantize.methods.nf4 import Nf4Method
from qtool.quantize.stacks import Stack
from qtool.quantize.statistics import InputStatistics
from qtool.quantize.walk import Column, Walk

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {"sliding_window": 24},
    "Qwen2": {"sliding_window": 24, "max_window_layers": 1, "use_sliding_window": True},
    "Qwen3": {}, "Ministral3": {}, "SeedOss": {}, "Granite": {"residual_multiplier": 0.5},
    "Gemma": {}, "Gemma2": {"sliding_window": 24, "attn_logit_softcapping": 5.0},
    "Gemma3": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
TOKENS = torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0))


def walk_of(folder: Path, methods: Sequence[Method]) -> Walk:
    model, checkpoint, config = build_skeleton(load_config(folder)), Checkpoint.open(folder), read_config(folder)
    decoder = decoder_of(config)
    shape = ModelShape(checkpoint.tensors, decoder, config)
    columns = [Column(method, method.container.plan(shape)) for method in methods]
    return Walk(model, decoder, checkpoint, CalibrationSet(TOKENS, "test"), columns, torch.device("cpu"))


def whole_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(model: Any) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, feed's name) -> its input ``[tokens, in]``, from one ordinary forward."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for name in INPUTS:

            def keep(_: Any, args: Any, key: tuple[int, str] = (index, name)) -> None:
                found[key] = args[0].flatten(0, 1)

            layer.get_submodule(name).register_forward_pre_hook(keep)
    with torch.inference_mode():
        model(input_ids=TOKENS)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, InputStatistics]]:
    """Statistics of each layer as the quantizer is given them (copied: it may use them up)."""
    calls: list[Mapping[str, InputStatistics]] = []
    original = on_grid.quantize_layer

    def spy(method: OnGrid, feeds: Any, weights: Any, statistics: Any, *rest: Any) -> LayerCodes:
        copies = {}
        for name, stats in statistics.items():
            copies[name] = InputStatistics(stats.tokens, stats.gram.clone(), None, stats.abs_sum, stats.absmax)
            copies[name].drift = None if stats.drift is None else stats.drift.clone()
            copies[name].through = stats.through
        calls.append(copies)
        return original(method, feeds, weights, statistics, *rest)

    monkeypatch.setattr(on_grid, "quantize_layer", spy)
    return calls


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without bfloat16 products, so that the walk's numbers are the float32 model's."""
    monkeypatch.setattr(walked, "fast_bfloat16", lambda: False)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_inputs_equal_the_whole_models(
    architecture: str,
    tmp_path: Path,
    seen: list[Mapping[str, InputStatistics]],
    monkeypatch: pytest.MonkeyPatch,
    model_maker: Callable[..., Path],
) -> None:
    monkeypatch.setitem(walked.BATCH_TOKENS, "cpu", 4 * 48)  # two batches, the last one smaller
    folder = model_maker(tmp_path / "model", architecture, **ARCHITECTURES[architecture])
    results = list(walk_of(folder, [AwqMethod(method="awq", group_size=32, rounding="rtn")]).run())
    assert [result.index for result in results] == [0, 1]
    expected = inputs_of(whole_model(folder))
    for (index, group), x in expected.items():
        stats = seen[index][group]
        assert stats.tokens == TOKENS.numel()
        assert torch.allclose(stats.gram, x.t() @ x, rtol=2e-3, atol=2e-3 * float((x.t() @ x).abs().max())), (
            index,
            group,
        )
        assert torch.allclose(stats.absmax, x.abs().amax(0), rtol=1e-3, atol=1e-4)


def test_processors_with_bfloat16_walk_in_it(
    tiny: Path, seen: list[Mapping[str, InputStatistics]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walked, "fast_bfloat16", lambda: True)
    list(walk_of(tiny, [AwqMethod(method="awq", group_size=32, rounding="rtn")]).run())
    for (index, group), x in inputs_of(whole_model(tiny)).items():
        expected = x.t() @ x
        assert float((seen[index][group].gram - expected).norm() / expected.norm()) < 0.02


@dataclass(frozen=True)
class Rounding:
    """What the work on a feed is given."""

    stack: Stack
    stats: InputStatistics
    divisor: torch.Tensor


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[Rounding]:
    """Those of every feed of every layer, in order (copied: they are used up)."""
    calls: list[Rounding] = []
    original = GridWork.round

    def spy(work: GridWork, stack: Stack, stats: InputStatistics) -> None:
        copy = InputStatistics(stats.tokens, stats.gram.clone(), stats.drift)
        divisor = work.divisor(stack)
        calls.append(Rounding(stack, copy, torch.ones(stats.gram.shape[0]) if divisor is None else divisor))
        original(work, stack, stats)

    monkeypatch.setattr(GridWork, "round", spy)
    return calls


def half_rounded(made: LayerCodes, source: Any, left: Sequence[str]) -> dict[str, torch.Tensor]:
    """A layer as stored, but with the folded weights, not rounded, of the modules ``left``."""
    state = made.dequantized(torch.float32, torch.float16, lambda _: True)
    for module in left:
        weight = source.get_submodule(module).weight.detach() * made.kept[f"{module}.columns"]
        state[f"{module}.weight"] = weight / made.kept[f"{module}.rows"].unsqueeze(1)
    return state


def hidden_before(model: Any, index: int, feed: Stack) -> torch.Tensor:
    """The hidden states that the output of ``feed`` is added to, ``[tokens, hidden]``."""
    found: list[torch.Tensor] = []
    layer = model.model.layers[index]
    at = layer if feed.name == "self_attn.o_proj" else layer.post_attention_layernorm
    handle = at.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.inference_mode():
        model(input_ids=TOKENS)
    handle.remove()
    return found[0]


@pytest.mark.usefixtures("float32")
def test_own_stream_sees_what_is_rounded_by_then(
    tiny: Path, roundings: list[Rounding], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each feed's statistics are of the inputs that the layers before, and the feeds before it in the layer, produce as
    stored; the drift is from the source's inputs by the folded scale, and where the output is added to the hidden
    states, from the source's hidden states too. Against whole models with those weights."""
    monkeypatch.setitem(walked.BATCH_TOKENS, "cpu", 4 * 48)
    results = list(walk_of(tiny, [AwqMethod(method="awq", group_size=32)]).run())
    source_model = whole_model(tiny)
    source = inputs_of(source_model)
    feeds = [call.stack for call in roundings[:4]]
    assert [call.stack.name for call in roundings] == [*INPUTS, *INPUTS]
    scaled = 0
    for number, call in enumerate(roundings):
        index, feed = number // 4, call.stack
        model = whole_model(tiny)
        for before in range(index + 1):
            left = [m.module for one in feeds[number % 4 :] for m in one.consumers] if before == index else []
            made = results[before].outputs["awq"]
            layer = model.model.layers[before]
            layer.load_state_dict(half_rounded(made, source_model.model.layers[before], left))
        x = inputs_of(model)[index, feed.name]
        gram = x.t() @ x
        assert torch.allclose(call.stats.gram, gram, rtol=1e-3, atol=1e-3 * float(gram.abs().max()))
        gap = source[index, feed.name] / call.divisor - x
        scaled += bool((call.divisor != 1).any())
        if feed.adds:
            weights = [model.model.layers[index].get_submodule(m.module).weight.detach() for m in feed.consumers]
            gap = gap @ torch.cat(weights).t()
            gap = gap + hidden_before(source_model, index, feed) - hidden_before(model, index, feed)
        drift = gap.t() @ x
        assert call.stats.drift is not None
        assert torch.allclose(call.stats.drift, drift, rtol=1e-2, atol=1e-2 * float(drift.abs().max()) + 1e-2)
        assert number == 0 or float(drift.abs().max()) > 0
        plain = source[index, feed.name] / call.divisor
        assert number == 0 or not torch.allclose(call.stats.gram, plain.t() @ plain, rtol=1e-3)
    assert scaled > 4  # or nothing was tested of the scales


def test_what_is_in_work_is_told(tiny: Path) -> None:
    """Each step of each layer once, in order; a layer begins at 0 and its steps are of one size."""
    told: list[tuple[int, float, str]] = []
    walk = walk_of(tiny, [AwqMethod(method="awq", group_size=32), Nf4Method(method="nf4", rounding="absmax")])
    walk.position.tell = lambda layer, share, what: told.append((layer, share, what))
    for _ in walk.run():
        pass
    assert sorted({layer for layer, _, _ in told}) == list(range(len(walk.layers)))
    first = [(share, what) for layer, share, what in told if layer == 0]
    steps = [what for _, what in first if not what.startswith("inputs of")]
    assert steps == [
        "awq: self_attn.q_proj",
        "awq: self_attn.o_proj",
        "awq: mlp.gate_proj",
        "awq: mlp.down_proj",
        "nf4",
    ]
    assert [share for share, what in first if what in steps] == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_hidden_states_that_fell_behind_join_the_target() -> None:
    """``behind`` is what the output should make up for beside its own inputs' drift."""
    weight, x, source, behind = torch.randn(8, 16), torch.randn(50, 16), torch.randn(50, 16), torch.randn(50, 8)
    stats = InputStatistics(through=weight)
    for part in (slice(0, 30), slice(30, 50)):
        stats.add(x[part], source[part], None, behind[part])
    expected = ((source - x) @ weight.t() + behind).t() @ x
    torch.testing.assert_close(stats.output_drift(weight), expected, rtol=1e-4, atol=1e-3)
    # least squares on it gives back weights that turn x into the source's sums
    aimed = weight + torch.linalg.solve(x.t() @ x, stats.output_drift(weight).t()).t()
    goal = torch.linalg.lstsq(x, source @ weight.t() + behind).solution.t()
    torch.testing.assert_close(aimed, goal, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_output_does_not_depend_on_its_neighbours(tiny: Path) -> None:
    """Several outputs in one walk: each the same, bit for bit, as alone."""
    methods: list[Method] = [
        Nf4Method(method="nf4"),
        Nf4Method(method="nf4", name="m", rounding="absmax"),
        Nf4Method(method="nf4", name="s", propagate_error=False),
        GptqMethod(method="gptq", name="g", group_size=32),
        AwqMethod(method="awq", name="a", group_size=32),
        AwqMethod(method="awq", name="b", group_size=64, propagate_error=False),
        GptqMethod(method="gptq", name="h", group_size=-1, bits=8, desc_act=True, propagate_error=False),
        AwqMethod(method="awq", name="c", group_size=32, rounding="rtn"),
    ]
    together = list(walk_of(tiny, methods).run())
    for method in methods:
        for alone, result in zip(walk_of(tiny, [method]).run(), together, strict=True):
            for linear, codes in alone.outputs[method.name].codes.items():
                assert result.outputs[method.name].codes[linear].equals(codes), (method.name, linear)


def test_largest_magnitudes_run_no_forward(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walked.SourceModel, "record", lambda *_: pytest.fail("a forward was run"))
    results = list(walk_of(tiny, [Nf4Method(method="nf4", rounding="absmax")]).run())
    assert [list(result.outputs) for result in results] == [["nf4"], ["nf4"]]


def test_no_layer_is_kept(tiny: Path) -> None:
    walk = walk_of(tiny, [AwqMethod(method="awq", group_size=32)])
    for _ in walk.run():
        pass
    assert all(parameter.is_meta for parameter in walk.model.parameters())


def test_nan_in_a_weight_stops_at_its_layer(tiny: Path) -> None:
    walk = walk_of(tiny, [AwqMethod(method="awq", group_size=32)])
    read = walk.checkpoint.tensor

    def broken(name: str) -> torch.Tensor:
        tensor = read(name)
        if name == "model.layers.1.mlp.up_proj.weight":
            tensor[3, 5] = float("nan")
        return tensor

    walk.checkpoint.tensor = broken  # type: ignore[method-assign]  # one reader, broken on purpose
    results = walk.run()
    next(results)
    with pytest.raises(QtoolError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        next(results)


@pytest.mark.parametrize(("factor", "expected"), [(1e6, "more than float16 holds"), (1e38, "NaN or Inf")])
def test_activations_that_do_not_fit(tiny: Path, factor: float, expected: str) -> None:
    walk = walk_of(tiny, [AwqMethod(method="awq", group_size=32)])
    read = walk.checkpoint.tensor

    def loud(name: str) -> torch.Tensor:
        scale = factor if name == "model.layers.0.post_attention_layernorm.weight" else 1.0
        return (read(name).float() * scale).to(torch.bfloat16)

    walk.checkpoint.tensor = loud  # type: ignore[method-assign]  # one reader, broken on purpose
    with pytest.raises(QtoolError, match=rf"model\.layers\.0.*{expected}"):
        next(walk.run())


def test_an_unknown_architecture_says_what_is_missing() -> None:
    with pytest.raises(QtoolError, match=r"FooForCausalLM is not known.*LlamaForCausalLM.*FAMILIES.*adding-a-family"):
        family_of({"architectures": ["FooForCausalLM"]})
