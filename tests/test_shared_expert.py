"""A shared expert behind a gate, whose tokens count by it as routed ones by their router; GLM's router in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTURES, seen_statistics
from small_models import make_model
from test_routed import _target, mixture_calls
from test_walk import walk_of, whole_model
from torch import Tensor
from torch.nn import functional

from qtool.quantize import source_model
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.grid_work import GridWork
from qtool.quantize.routed import ExpertSettings
from qtool.quantize.stacks import Stack
from qtool.quantize.statistics import InputStatistics

AWQ = {"method": "awq", "group_size": 32}
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("shared") / "model", "Qwen2Moe", **MIXTURES["Qwen2Moe"])


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_model, "fast_bfloat16", lambda: False)


def shared_inputs(model: Any, index: int, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (its inputs ``[tokens, in]``, what the gate multiplies each token's output by), written out."""
    block = model.model.layers[index].mlp
    gate = 1 / (1 + torch.exp(-(hidden @ block.shared_expert_gate.weight[0].detach())))
    one = block.shared_expert
    gated, up = (functional.linear(hidden, part.weight.detach()) for part in (one.gate_proj, one.up_proj))
    return {SHARED[0]: (hidden, gate), SHARED[1]: (functional.silu(gated) * up, gate)}


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_each_token_counts_by_its_gate(exponent: int) -> None:
    """Gram matrix, drift, mean magnitude and what an error costs, token by token; the importance counts all alike."""
    through, divisor = torch.randn(5, 16), torch.rand(16) + 0.5
    stream, source = InputStatistics(through=through, exponent=exponent), InputStatistics(exponent=exponent)
    gram, drift, magnitude, squares = (torch.zeros(16, 16), torch.zeros(16, 16), torch.zeros(16), torch.zeros(16))
    mass = power = 0.0
    for _ in range(3):
        x, s, gate = torch.randn(4, 10, 16), torch.randn(4, 10, 16), torch.rand(4, 10)
        stream.add(x, s, divisor, gate=gate)
        source.add(x, gate=gate)
        for one, other, weight in zip(x.flatten(0, 1), s.flatten(0, 1), gate.flatten().tolist(), strict=True):
            counted = weight**exponent
            gram += counted * torch.outer(one, one)
            drift += counted * torch.outer(other / divisor - one, one)
            magnitude += counted * one.abs()
            squares += one.square()
            mass, power = mass + counted, power + weight**2
    for found in (stream, source):
        found.finish()
        torch.testing.assert_close(found.gram, gram, rtol=1e-4, atol=1e-3)
        assert found.counted == pytest.approx(power / mass, rel=1e-4)
    torch.testing.assert_close(stream.output_drift(through), through @ drift, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(source.mean_abs, magnitude / mass, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(source.mean_square, squares / 120, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stream.mean_square, gram.diagonal() / mass, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("float32")
def test_the_source_shows_a_shared_expert_what_its_gate_lets_through(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two batches, against the whole model."""
    seen = seen_statistics(monkeypatch)
    monkeypatch.setitem(source_model.BATCH_TOKENS, "cpu", 4 * 48)
    walk = walk_of(folder, [AwqMethod(**AWQ, rounding="rtn")])
    walk.experts = ExpertSettings(exponent=2)
    list(walk.run())
    model = whole_model(folder)
    for index, ((hidden, _, _),) in enumerate(mixture_calls(model)):
        for name, (x, gate) in shared_inputs(model, index, hidden).items():
            stats, weighed = seen[index][name], x * gate.unsqueeze(1)
            gram = weighed.t() @ weighed
            torch.testing.assert_close(stats.gram, gram, rtol=2e-3, atol=2e-3 * float(gram.abs().max()))
            assert stats.counted == pytest.approx(1.0)
            assert float((stats.gram - x.t() @ x).norm() / gram.norm()) > 0.3  # the gate is far from open


@pytest.mark.usefixtures("float32")
def test_a_stream_has_its_own_gate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the inputs, the norm and the folded gate that the rounded attention before it leaves."""
    seen: list[tuple[Stack, Any, Tensor | None]] = []
    original = GridWork.round

    def spy(work: GridWork, stack: Stack, stats: Any) -> None:
        seen.append((stack, copy.deepcopy(stats), work.divisor(stack)))
        original(work, stack, stats)

    monkeypatch.setattr(GridWork, "round", spy)
    monkeypatch.setitem(source_model.BATCH_TOKENS, "cpu", 4 * 48)
    walk = walk_of(folder, [AwqMethod(**AWQ)])
    walk.experts = ExpertSettings(exponent=1)
    made = next(iter(walk.run())).outputs["awq"]
    source = whole_model(folder)
    ((wanted, _, _),) = mixture_calls(source)[0]
    others = shared_inputs(source, 0, wanted)
    for stack, stats, divisor in [call for call in seen if call[0].name in SHARED]:
        state = made.dequantized(torch.float32, torch.float16, lambda _: True)
        for matrix in walk.decoder.matrices(0):
            if "mlp" in matrix.module and (stack.name == SHARED[0] or "down" in matrix.module):
                state[f"{matrix.module}.weight"] = _target(made, walk, 0, matrix)
        model = whole_model(folder)
        model.model.layers[0].load_state_dict(walk.decoder.in_memory(state))
        ((hidden, _, _),) = mixture_calls(model)[0]
        x, gate = shared_inputs(model, 0, hidden)[stack.name]
        counted = x * gate.unsqueeze(1)
        gram = counted.t() @ x
        torch.testing.assert_close(stats.gram, gram, rtol=1e-3, atol=1e-3 * float(gram.abs().max()))
        scale = torch.ones(1) if divisor is None else divisor
        drift = (others[stack.name][0] / scale - x).t() @ counted
        aim = torch.cat([_target(made, walk, 0, matrix) for matrix in stack.consumers])
        drift = aim @ drift if stats.through is not None else drift
        found = stats.output_drift(torch.empty(0)) if stats.through is not None else stats.drift
        torch.testing.assert_close(found, drift, rtol=1e-2, atol=1e-2 * float(drift.abs().max()) + 1e-2)
    assert {call[0].name for call in seen} >= set(SHARED)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_router_that_is_computed_in_float32_stays_so(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a walk in bfloat16, whatever its files hold: choice and weights are those of scores written out in float32
    from the very hidden states, in the source's stream and in an output's; the artifact keeps the dtype, and the
    stream meets what it holds."""
    from safetensors.torch import load_file, save_file
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

    folder = make_model(tmp_path / "model", "Glm4Moe", shard="90MB", **MIXTURES["Glm4Moe"])
    held = load_file(folder / "model.safetensors")
    routers = [name for name in held if name.endswith("mlp.gate.weight")]
    for name in routers:  # close scores, which 16 bits would exchange
        held[name] = (held[name].float()[:1] + 1e-3 * torch.randn(6, 128)).to(stored)
        held[name.replace("weight", "e_score_correction_bias")] = 1e-4 * torch.randn(6)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    seen: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Tensor]] = []
    original = Glm4MoeTopkRouter.forward

    def spy(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made: tuple[Tensor, Tensor, Tensor] = original(self, hidden)
        seen.append((hidden.flatten(0, 1).clone(), self.weight.clone(), made, self.e_score_correction_bias.clone()))
        return made

    monkeypatch.setattr(Glm4MoeTopkRouter, "forward", spy)
    monkeypatch.setattr(source_model, "fast_bfloat16", lambda: True)
    walk = walk_of(folder, [AwqMethod(**AWQ)])
    assert walk.source.dtype == torch.bfloat16
    results = list(walk.run())
    exchanged = 0
    for hidden, weight, (_, weights, index), bias in seen:
        assert (hidden.dtype, weight.dtype, weights.dtype) == (torch.bfloat16, stored, torch.float32)
        scores = [1 / (1 + torch.exp(-(hidden.double() @ one.double().t()))) for one in (weight, weight.bfloat16())]
        chosen, rounded = ((one + bias).topk(2).indices.sort(1).values for one in scores)
        assert torch.equal(index.sort(1).values, chosen)
        wanted = scores[0].gather(1, index)
        torch.testing.assert_close(weights.double(), 1.5 * wanted / wanted.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
        exchanged += int((chosen != rounded).sum())
    assert (exchanged > 0) is (stored == torch.float32)
    router = results[1].outputs["awq"].tensors["mlp.gate.weight"].to(stored)  # as the file has it
    assert any(torch.equal(weight, router) for _, weight, _, _ in seen)
    assert not torch.equal(router, walk.checkpoint.tensor("model.layers.1.mlp.gate.weight"))  # it took the scale
