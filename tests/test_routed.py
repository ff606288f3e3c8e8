"""Experts: how they are computed, their statistics and their stacks, each against a slow loop or the whole model."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTURES, seen_statistics
from small_models import make_model
from test_walk import TOKENS, hidden_before, walk_of, whole_model
from torch import Tensor
from torch.nn import functional

from qtool import QtoolError
from qtool.convert.models.feeds import Norm
from qtool.convert.models.shape import decoder_of
from qtool.quantize import descent, experts, grid, rounding, scaling, source_model
from qtool.quantize.capture import advance
from qtool.quantize.chosen import Levels
from qtool.quantize.collecting import mean_squares
from qtool.quantize.experts import Routed
from qtool.quantize.grid import GridSpec
from qtool.quantize.methods import gguf, kquant_rounding, kquants
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.grid_work import GridWork
from qtool.quantize.methods.method import LayerCodes, LayerWork, Method
from qtool.quantize.routed import ExpertSettings, RoutedStatistics
from qtool.quantize.scaling import Weighed
from qtool.quantize.stacks import Stack, stacks_of, steps_of
from qtool.quantize.statistics import InputStatistics

SPEC = GridSpec(4, 32, True, torch.float16)
AWQ = {"method": "awq", "group_size": 32}


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model"
    return make_model(path, request.param, **MIXTURES[request.param])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a shared expert."""
    return make_model(tmp_path_factory.mktemp("shared") / "model", "Qwen2Moe", **MIXTURES["Qwen2Moe"])


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_model, "fast_bfloat16", lambda: False)


def grams(problems: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(problems, 300, columns, generator=generator)
    x = x @ (torch.eye(columns) + torch.randn(problems, columns, columns, generator=generator) / columns**0.5)
    x[..., ::17] *= 8
    return x.mT @ x


def mixture_calls(model: Any) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """What each mixture of a model is called with on TOKENS: (hidden, index, weights), by layer."""
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    handles = []
    for layer in model.model.layers:
        calls: list[tuple[Tensor, Tensor, Tensor]] = []
        found.append(calls)
        if hasattr(layer.mlp, "experts"):
            handles.append(layer.mlp.experts.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args)))
    with torch.inference_mode():
        model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    return found


def inner(module: Any, expert: int, x: Tensor) -> Tensor:
    """act(gate) * up, written out."""
    gate, up = functional.linear(x, module.gate_up_proj[expert].detach()).chunk(2, -1)
    made: Tensor = functional.silu(gate) * up
    return made


def test_our_loop_gives_the_models_own_logits(folder: Path) -> None:
    model = whole_model(folder)
    with torch.inference_mode():
        expected = model(input_ids=TOKENS).logits
        experts.prepare(model)
        found = model(input_ids=TOKENS).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_slots_are_the_routers() -> None:
    index, weights = torch.tensor([[2, 0], [2, 1], [0, 2]]), torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]])
    call = Routed.of(torch.randn(3, 4), index, weights, 4)
    assert call.counts == (2, 1, 3, 0)
    assert call.tokens.tolist() == [0, 2, 1, 0, 1, 2]
    assert call.weights.tolist() == pytest.approx([0.1, 0.7, 0.4, 0.9, 0.6, 0.3])
    outputs = torch.randn(6, 5)
    expected = torch.zeros(3, 5)
    for slot, token in enumerate(call.tokens.tolist()):
        expected[token] += call.weights[slot] * outputs[slot]
    torch.testing.assert_close(call.total(outputs), expected)
    other = Routed.of(torch.randn(3, 4), torch.tensor([[0, 2], [3, 1], [0, 1]]), weights, 4)
    both, sent = other.agreement(call)  # of the first's tokens of expert 2, one of three goes there still
    assert both.tolist() == [2, 1, 1, 0]
    assert sent.tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_statistics_weigh_each_token_by_its_router(exponent: int) -> None:
    settings = ExpertSettings(exponent=exponent, blend=0)
    through = torch.randn(2, 5, 16)
    plain = RoutedStatistics(2, settings, drifting=True)
    stats = RoutedStatistics(2, settings, through=through, drifting=True)
    grams, drifts = torch.zeros(2, 16, 16), torch.zeros(2, 16, 16)
    divisor = torch.rand(16) + 0.5
    own_divisor = torch.rand(2, 16) + 0.5
    plain_drifts = torch.zeros(2, 16, 16)
    for _ in range(3):
        x, source, weights = torch.randn(40, 16), torch.randn(40, 16), torch.rand(40)
        plain.add(x, weights, (15, 25), source, own_divisor)
        stats.add(x, weights, (15, 25), source, divisor)
        for token in range(40):
            expert, counted = int(token >= 15), float(weights[token]) ** exponent
            grams[expert] += counted * torch.outer(x[token], x[token])
            drifts[expert] += counted * torch.outer(source[token] / divisor - x[token], x[token])
            plain_drifts[expert] += counted * torch.outer(source[token] / own_divisor[expert] - x[token], x[token])
    for found, expected in ((plain, plain_drifts), (stats, drifts)):
        found.finish(lambda _: torch.empty(0))
        assert found.counts == [45, 75]
        torch.testing.assert_close(found.gram, grams, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.output_drift(through), through @ expected, rtol=1e-3, atol=1e-2)
        assert bool((found.absmax > 2).all())


def test_rare_experts_are_blended_and_none_is_forgotten() -> None:
    stats = RoutedStatistics(3, ExpertSettings(exponent=2, blend=2.0))
    many, few, all_tokens = torch.randn(80, 16), torch.randn(8, 16), torch.randn(500, 16) * 3
    stats.add(torch.cat([many, few]), torch.tensor([1.0] * 80 + [0.5] * 8), (80, 8, 0))
    stats.finish(lambda _: all_tokens)
    typical = all_tokens.t() @ all_tokens / 500
    assert stats.shares == [0.0, 0.75, 1.0]
    torch.testing.assert_close(stats.gram[0], many.t() @ many, rtol=1e-4, atol=1e-3)
    mean = (80 + 2) / 88  # of what a token counts
    torch.testing.assert_close(stats.gram[1], 0.25 * 0.25 * few.t() @ few + 0.75 * 2 * typical, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stats.gram[2], mean * typical, rtol=1e-4, atol=1e-3)
    assert bool((stats.mean_abs > 0).all())
    assert [figures["tokens"] for figures in stats.figures()] == [80, 8, 0]
    assert [figures["blended"] for figures in stats.figures()] == [0, 0.75, 1]


def test_importance_of_an_expert_that_no_token_reached_is_that_of_all_tokens() -> None:
    stats = RoutedStatistics(2, ExpertSettings(), channels_only=True)
    few, all_tokens = torch.randn(3, 16), torch.randn(500, 16) * 3
    stats.add(few, torch.rand(3), (3, 0))
    stats.finish(lambda _: all_tokens)
    expected = torch.stack([few.square().mean(0), all_tokens.square().mean(0)])  # unweighted, and not blended
    torch.testing.assert_close(stats.mean_square, expected)


@pytest.mark.parametrize("kind", ["signed", "asymmetric", "table"])
def test_a_stack_is_rounded_as_its_problems_alone(kind: str) -> None:
    """Factors, descent, GPTQ and its target: in one stack as one after the other."""
    table = tuple((torch.arange(16) / 7.5 - 1).tolist())
    levels = {
        "signed": Levels(15, 32, torch.float16, True, True), "asymmetric": Levels(15, 32, torch.float16),
        "table": Levels(15, 32, torch.float32, table=table),
    }[kind]  # fmt: skip
    gram, weight, drift = grams(3, 64), torch.randn(3, 24, 64), torch.randn(3, 24, 64)
    factor = rounding.factorize(gram, 0.05)
    begun = descent.begin(weight, factor, levels)
    with rounding.damped(gram, factor):
        found = descent.descend(weight, begun, gram, levels)
        codes_only = descent.descend(weight, begun, gram, levels, 2, scales=False)
    goal = rounding.propagated_target(weight, drift, factor, 0.35)
    for number in range(3):
        one = rounding.factorize(gram[number], 0.05)
        assert torch.equal(one.upper, factor.upper[number])
        alone = descent.begin(weight[number], one, levels)
        metric = gram[number] + torch.eye(64) * float(one.damp) * gram[number].diagonal().mean()
        after = descent.descend(weight[number], alone, metric, levels)
        for stacked, single in ((begun, alone), (found, after)):
            assert float((stacked.levels[number] == single.levels).float().mean()) > 0.99
            assert float((stacked.weights()[number] - single.weights()).norm() / single.weights().norm()) < 0.02
        fixed = descent.descend(weight[number], alone, metric, levels, 2, scales=False)
        assert float((codes_only.levels[number] == fixed.levels).float().mean()) > 0.99
        expected = rounding.propagated_target(weight[number], drift[number], one, 0.35)
        torch.testing.assert_close(goal[number], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [False, True])
def test_gptq_of_a_stack(order: bool) -> None:
    gram, weight = grams(3, 64), torch.randn(3, 24, 64)
    orders = rounding.activation_order(gram) if order else None
    factor = rounding.factorize(gram, 0.05, orders)
    found = rounding.gptq(weight.clone(), factor, SPEC, gram=gram)
    goal = rounding.propagated_target(weight, weight, factor, 0.35)
    for number in range(3):
        own = rounding.activation_order(gram[number]) if order else None
        one = rounding.factorize(gram[number], 0.05, own)
        alone = rounding.gptq(weight[number].clone(), one, SPEC, gram=gram[number])
        assert torch.equal(found.codes[number], alone.codes)
        expected = rounding.propagated_target(weight[number], weight[number], one, 0.35)
        torch.testing.assert_close(goal[number], expected, rtol=1e-4, atol=1e-4)


def test_one_that_is_singular_raises_its_own_damping_alone() -> None:
    gram = grams(2, 32)
    flat = torch.ones(32, 32)
    flat[0, 0] -= 1e-3  # a negative eigenvalue
    factor = rounding.factorize(torch.stack([gram[0], flat]), 1e-7)
    assert float(factor.damp[0]) == 1e-7
    assert float(factor.damp[1]) > 1e-7


def test_grids_of_a_stack() -> None:
    gram, weight = grams(3, 64), torch.randn(3, 24, 64)
    blocks = grid.diagonal_blocks(gram, 32)
    clipped, nearest = grid.fit_clipped(weight, blocks, SPEC), grid.round_to_nearest(weight, SPEC)
    errors = scaling.output_error(nearest - weight, gram)
    for number in range(3):
        alone = grid.fit_clipped(weight[number], grid.diagonal_blocks(gram[number], 32), SPEC)
        assert torch.equal(clipped.scale[number], alone.scale)
        one = grid.round_to_nearest(weight[number], SPEC)
        assert torch.equal(nearest[number], one)
        torch.testing.assert_close(errors[number], scaling.output_error(one - weight[number], gram[number]))


def test_one_scale_loses_least_over_all_experts() -> None:
    """The loss of the common scale is the sum over the experts and whatever else the norm feeds."""
    gram, weight, other, whole = grams(3, 64), torch.randn(3, 64, 64), torch.randn(32, 64), grams(1, 64, 5)[0]
    mean = gram.diagonal(dim1=1, dim2=2).mean(0).sqrt()
    search = scaling.search_scale([Weighed(weight, gram), Weighed(other, whole)], mean, SPEC)
    assert search.scale is not None
    parts = [*zip(weight, gram, strict=True), (other, whole)]
    relative = torch.cat([scaling.mean_relative(w, 32).expand(len(w), -1) for w, _ in parts]).mean(0)

    def loss(scale: Tensor) -> float:
        errors = [(grid.round_to_nearest(w * scale, SPEC) / scale - w, g) for w, g in parts]
        return sum(float(scaling.output_error(error, g)) for error, g in errors)

    candidates = [torch.ones(64), *scaling.candidate_scales(mean, relative)]
    assert loss(search.scale) <= min(map(loss, candidates)) * 1.02
    energy = sum(float(scaling.output_error(w, g)) for w, g in parts)
    assert search.loss == pytest.approx(loss(search.scale) / energy, rel=1e-3)


def test_every_expert_has_its_own_scale_of_what_it_makes() -> None:
    gram, weight = grams(3, 64), torch.randn(3, 64, 64)
    weight[2] = torch.randint(-7, 8, (64, 64)).float()
    weight[2, :, ::32], weight[2, :, 1::32] = 7.0, -8.0
    mean = gram.diagonal(dim1=1, dim2=2).sqrt()
    spec = GridSpec(4, 32, False, torch.float16)
    found = scaling.search_own_scales(Weighed(weight, gram), mean, spec)
    assert found.shape == (3, 64)
    for number in range(3):
        alone = scaling.search_scale([Weighed(weight[number], gram[number])], mean[number], spec).scale
        expected = torch.ones(64) if alone is None else alone
        torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[2], torch.ones(64))  # it lies on its grid as it is


def test_steps_of_a_mixture(shared: Path) -> None:
    decoder = decoder_of(_config(shared))
    steps = steps_of(decoder.feeds(0))
    names = [[stack.name for stack in step.stacks] for step in steps]
    assert names == [
        ["self_attn.q_proj"], ["self_attn.o_proj"], ["mlp.experts.0.gate_proj", "mlp.shared_expert.gate_proj"],
        ["mlp.experts.0.down_proj", "mlp.shared_expert.down_proj"],
    ]  # fmt: skip
    gate_up, down = steps[2].stacks[0], steps[3].stacks[0]
    assert [len(stack.problems) for stack in (gate_up, down)] == [6, 6]
    assert (gate_up.inner, down.inner) == (False, True)
    assert [matrix.module for matrix in gate_up.problems[4]] == [
        "mlp.experts.4.gate_proj", "mlp.experts.4.up_proj"
    ]  # fmt: skip
    assert {m.module for stack in stacks_of(decoder.feeds(0)) for m in stack.consumers} == {
        m.module for m in decoder.matrices(0)
    }


def _config(folder: Path) -> dict[str, Any]:
    from qtool.convert.files.config_file import read_config

    return read_config(folder)


def test_every_consumer_of_a_norm_is_compensated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folded model before any rounding: the source's logits, and the same experts for every token."""
    states: list[dict[str, Tensor]] = []
    original = AwqMethod.begin

    def spy(method: AwqMethod, *given: Any) -> LayerWork:
        work = original(method, *given)
        states.append(work.state(torch.float32, torch.float32, lambda _: True))
        return work

    monkeypatch.setattr(AwqMethod, "begin", spy)
    walk = walk_of(folder, [AwqMethod(**AWQ, descent=False)])  # scales are searched before any rounding
    for _ in walk.run():
        pass
    source, model = whole_model(folder), whole_model(folder)
    scaled = 0
    for layer, state in zip(model.model.layers, states, strict=True):
        held = walk.decoder.in_memory(state)
        scaled += sum(not torch.equal(held[name], old) for name, old in layer.state_dict().items() if "gate" in name)
        layer.load_state_dict(held)
    assert scaled >= 2  # routers among them, or nothing was folded
    with torch.inference_mode():
        expected, found = source(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    for before, after in zip(mixture_calls(source), mixture_calls(model), strict=True):
        for (_, index, _), (_, other, _) in zip(before, after, strict=True):
            assert torch.equal(index.sort(1)[0], other.sort(1)[0])


def test_the_walk_sees_what_each_expert_is_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of the source's stream, in two batches, against the whole model."""
    seen = seen_statistics(monkeypatch)
    monkeypatch.setitem(source_model.BATCH_TOKENS, "cpu", 4 * 48)
    walk = walk_of(folder, [AwqMethod(**AWQ, rounding="rtn")])
    walk.experts = ExpertSettings(exponent=1, blend=0)
    results = list(walk.run())
    model = whole_model(folder)
    for number, calls in enumerate(mixture_calls(model)):
        if not calls:
            assert all(isinstance(stats, InputStatistics) for stats in seen[number].values())
            continue
        ((hidden, index, weights),) = calls
        stacks = [stack for stack in stacks_of(walk.decoder.feeds(number)) if stack.routed]
        for stack in stacks:
            stats = seen[number][stack.name]
            for expert in range(len(stack.problems)):
                tokens, slots = torch.where(index == expert)
                x = hidden[tokens]
                x = inner(model.model.layers[number].mlp.experts, expert, x) if stack.inner else x
                assert stats.counts[expert] == len(tokens)
                if not len(tokens):
                    continue
                gram = x.t() @ (x * weights[tokens, slots].unsqueeze(1))
                bound = 2e-3 * float(gram.abs().max())
                torch.testing.assert_close(stats.gram[expert], gram, rtol=2e-3, atol=bound)
                record = results[number].outputs["awq"].records[stack.problems[expert][0].module]
                assert record["tokens"] == len(tokens)


def test_streams_route_anew(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of an own stream: tokens as the router sends them that sees what was rounded before it; the drift is from
    what the source's experts would make of the source's inputs of the same tokens."""
    seen: list[tuple[Stack, Any, Tensor | None]] = []
    original = GridWork.round

    def spy(work: GridWork, stack: Stack, stats: Any) -> None:
        seen.append((stack, copy.deepcopy(stats), work.divisor(stack)))
        original(work, stack, stats)

    monkeypatch.setattr(GridWork, "round", spy)
    monkeypatch.setitem(source_model.BATCH_TOKENS, "cpu", 4 * 48)
    walk = walk_of(shared, [AwqMethod(**AWQ)])
    walk.experts = ExpertSettings(exponent=0, blend=0)
    results = list(walk.run())
    source = whole_model(shared)
    source_calls = mixture_calls(source)
    routed = [(number // 6, *call) for number, call in enumerate(seen) if call[0].routed]
    assert len(routed) == 4
    changed = 0
    for index, stack, stats, divisor in routed:
        model, left = whole_model(shared), [m.module for m in walk.decoder.matrices(index) if "mlp" in m.module]
        if stack.inner:
            left = [module for module in left if "down" in module]
        for before in range(index + 1):
            made = results[before].outputs["awq"]
            state = made.dequantized(torch.float32, torch.float16, lambda _: True)
            for module in left if before == index else ():
                matrix = next(m for m in walk.decoder.matrices(before) if m.module == module)
                tensor = walk.checkpoint.tensor(walk.decoder.at(before) + matrix.tensor).float()
                weight = matrix.of(tensor) * made.kept[f"{module}.columns"]
                state[f"{module}.weight"] = weight / made.kept[f"{module}.rows"].unsqueeze(1)
            model.model.layers[before].load_state_dict(walk.decoder.in_memory(state))
        ((hidden, chosen, router),) = mixture_calls(model)[index]
        behind = hidden_before(source, index, stack) - hidden_before(model, index, stack)
        ((wanted, source_chosen, _),) = source_calls[index]
        changed += int((chosen.sort(1)[0] != source_chosen.sort(1)[0]).sum())
        own, other = model.model.layers[index].mlp.experts, source.model.layers[index].mlp.experts
        for expert in range(6):
            tokens, slots = torch.where(chosen == expert)
            x, s = hidden[tokens], wanted[tokens]
            if stack.inner:
                x, s = inner(own, expert, x), inner(other, expert, s)
            assert stats.counts[expert] == len(tokens)
            gram = x.t() @ x
            torch.testing.assert_close(stats.gram[expert], gram, rtol=1e-3, atol=1e-3 * float(gram.abs().max()))
            scale = torch.ones(1) if divisor is None else divisor if divisor.ndim == 1 else divisor[expert]
            drift = (s / scale - x).t() @ x
            weights = torch.cat(
                [_target(results[index].outputs["awq"], walk, index, m) for m in stack.problems[expert]]
            )
            found = stats.output_drift(torch.empty(0)) if stats.through is not None else stats.drift
            drift = weights @ drift if stats.through is not None else drift
            if stack.inner:  # p_e δ_e over a token's experts sums to what its hidden state lacks
                share = router[tokens, slots] / router[tokens].square().sum(1)
                drift = drift + (behind[tokens] * share.unsqueeze(1)).t() @ x
            bound = 1e-2 * float(drift.abs().max()) + 1e-2
            torch.testing.assert_close(found[expert], drift, rtol=1e-2, atol=bound)
            kept = int(((chosen == expert).any(1) & (source_chosen == expert).any(1)).sum())
            record = results[index].outputs["awq"].records[stack.problems[expert][0].module]
            assert record["routing"] == pytest.approx(kept / int((source_chosen == expert).sum()), abs=1e-5)
    assert changed > 0  # or the routing of the source would have done as well


def _target(made: LayerCodes, walk: Any, index: int, matrix: Any) -> Tensor:
    tensor = walk.checkpoint.tensor(walk.decoder.at(index) + matrix.tensor).float()
    weight: Tensor = matrix.of(tensor) * made.kept[f"{matrix.module}.columns"]
    return weight / made.kept[f"{matrix.module}.rows"].unsqueeze(1)


@pytest.mark.slow
def test_an_expert_that_no_token_reaches_gets_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its router's row says 0 where at least two others of opposite pairs say more; every method quantizes it by what
    all tokens would be to it."""
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "model", "Mixtral", shard="9MB", **MIXTURES["Mixtral"])
    weights = load_file(folder / "model.safetensors")
    for name, router in weights.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            router[2], router[4], router[0] = -router[1], -router[3], 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for room in (gguf, kquant_rounding):
        monkeypatch.setattr(room, "quantize_ggml", kquants.quantize)  # needs no package
    methods: list[Method] = [
        AwqMethod(**AWQ), GptqMethod(method="gptq", group_size=32, descent=False, signed=False),
        AwqMethod(**AWQ, name="rtn", rounding="rtn"), GgufMethod(method="gguf"),
    ]  # fmt: skip
    for result in walk_of(folder, methods).run():
        for made in result.outputs.values():
            for part in ("w1", "w2", "w3"):
                record = made.records[f"block_sparse_moe.experts.0.{part}"]
                assert record["tokens"] == 0
                assert record["blended"] == 1
                assert 0 < record["error"] < 0.2
                assert record["error"] <= record["rtn_error"]


def test_importance_rows_of_experts(folder: Path) -> None:
    walk = walk_of(folder, [])
    seen: dict[str, Tensor] = {}
    walk.outputs = ()
    walk.weighing = True
    hidden, calls = walk.source.record(walk.calibration)
    first = walk.decoder.shape.sparse.index(True)
    for index in range(first + 1):
        module = walk.source.fill(index, walk.source.place(index, walk.source.read(index)))
        if index < first:
            advance(module, hidden, calls)
    stacks = stacks_of(walk.decoder.feeds(first))
    experts.prepare(walk.model)
    inputs = mean_squares("layer 0", stacks, walk._collect(module, stacks, hidden, calls, False))
    seen |= inputs.importance
    ((x, chosen, _),) = mixture_calls(whole_model(folder))[first]
    norm = next(feed for feed in walk.decoder.feeds(first) if feed.routed and isinstance(feed.producer, Norm))
    for matrix in norm.consumers:
        if matrix.expert is not None:
            own = x[torch.where(chosen == matrix.expert)[0]]
            if not len(own):
                continue
            torch.testing.assert_close(seen[matrix.module], own.square().mean(0), rtol=1e-3, atol=1e-4)
            assert inputs.figures[matrix.module]["tokens"] == len(own)


def test_more_text_is_drawn_for_the_mean_expert(folder: Path) -> None:
    shape = decoder_of(_config(folder)).shape
    settings = ExpertSettings(min_tokens=1000)
    number = settings.samples(shape, 20, 100)
    assert number * 100 * shape.active / shape.experts >= 1000 > (number - 1) * 100 * shape.active / shape.experts
    assert settings.samples(shape, 200, 100) == 200  # there is more than enough
    assert settings.samples(shape, 2, 100) == 16  # at most eight times what was asked for
    dense = decoder_of(_config(folder) | {"architectures": ["LlamaForCausalLM"]}).shape
    assert settings.samples(dense, 2, 100) == 2


def test_settings_are_keys_of_a_recipe_and_of_the_work(folder: Path, tmp_path: Path) -> None:
    """Another exponent makes other artifacts, where text weighs them; more windows are drawn before the work, and the
    artifact's manifest will say so."""
    from qtool.make.job import artifact_key
    from qtool.preparing import prepare_recipe
    from qtool.quantize.calibration import CalibrationSet
    from qtool.recipe.sections import checked_recipe

    def recipe(**settings: Any) -> Any:
        outputs = [AWQ, {"method": "gptq", "group_size": 32}]
        data = {"model": str(folder), "outputs": outputs, "experts": settings, "output_dir": str(tmp_path / "made"),
                "calibration": {"text": "qtool-code", "samples": 4, "length": 32}}  # fmt: skip
        return checked_recipe(data, "test")

    keys = []
    for settings in ({}, {"exponent": 1}, {"blend": 0.5}):
        job = prepare_recipe(recipe(**settings), "cpu")
        keys.append(artifact_key(job, job.outputs[0], CalibrationSet(TOKENS, "test")))
    assert len(set(keys)) == 3
    job = prepare_recipe(recipe(min_tokens=100), "cpu")
    shape = job.decoder.shape
    assert job.recipe.calibration.samples == -(-100 * shape.experts // (32 * shape.active))
    for wrong in ({"exponent": 3}, {"blend": -1}, {"weighting": 1}):
        with pytest.raises(QtoolError, match="experts"):
            recipe(**wrong)


@pytest.mark.slow
def test_streams_take_turns_at_experts(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three outputs with streams of their own hold one stream's statistics of experts at a time, and each has the codes
    that it has alone: the source, which waits for the last, moves on once."""
    monkeypatch.setitem(source_model.BATCH_TOKENS, "cpu", 4 * 48)
    monkeypatch.setattr(gguf, "quantize_ggml", kquants.quantize)  # needs no package
    held: set[int] = set()
    most = 0
    original = RoutedStatistics._open

    def opened(stats: RoutedStatistics, x: Tensor) -> None:
        nonlocal most
        original(stats, x)
        if stats.drifting:
            held.add(id(stats))
            weakref.finalize(stats, held.discard, id(stats))
            most = max(most, len(held))

    monkeypatch.setattr(RoutedStatistics, "_open", opened)
    methods: list[Method] = [
        AwqMethod(**AWQ), GptqMethod(method="gptq", group_size=32), GgufMethod(method="gguf", type="Q6_K")
    ]  # fmt: skip
    together = list(walk_of(shared, methods).run())
    assert most == 1
    for method in methods:
        for alone, among in zip(walk_of(shared, [method]).run(), together, strict=True):
            one, other = alone.outputs[method.name], among.outputs[method.name]
            assert one.records == other.records
            for module, codes in one.codes.items():
                assert torch.equal(codes.dequantize(), other.codes[module].dequantize()), module
