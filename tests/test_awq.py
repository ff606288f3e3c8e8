"""The closed-form search against real forwards, and folding against the unfolded layer."""

from __future__ import annotations

import pytest
import torch

from qtool.convert.models.feeds import Heads, Matrix, Norm
from qtool.convert.models.shape import decoder_of
from qtool.quantize import grid, scaling
from qtool.quantize.grid import GridSpec
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.on_grid import quantize_layer
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.scaling import Weighed
from qtool.quantize.statistics import InputStatistics

SPEC = GridSpec(4, 32, False, torch.float16)


def inputs(tokens: int = 400, columns: int = 128) -> torch.Tensor:
    """Correlated inputs with a few loud channels."""
    x = torch.randn(tokens, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    x[:, ::17] *= 12
    return x


def statistics(x: torch.Tensor, source: torch.Tensor | None = None) -> InputStatistics:
    stats = InputStatistics()
    stats.add(x, source)
    stats.finish()
    return stats


def test_closed_form_loss_is_the_forward_loss() -> None:
    x, weight = inputs().double(), torch.randn(64, 128).double()
    error = torch.randn(64, 128).double() * 0.01
    forward = (x @ (weight + error).t() - x @ weight.t()).square().sum()
    assert float(scaling.output_error(error, x.t() @ x)) == pytest.approx(float(forward), rel=1e-9)
    closed = scaling.output_error(error.float(), (x.t() @ x).float())
    assert float(closed) == pytest.approx(float(forward), rel=1e-5)


def test_search_equals_brute_force_over_all_candidates() -> None:
    """Every candidate run through a real forward in float64: the search must find one as good as the best."""
    x = inputs()
    weights = [torch.randn(256, 128), torch.randn(128, 128)]
    stacked = torch.cat(weights)
    found = scaling.search_scale([Weighed(stacked, x.t() @ x)], x.abs().mean(0), SPEC)
    assert found.scale is not None
    relative = scaling.mean_relative(stacked, SPEC.group_size)
    candidates = [torch.ones(128), *scaling.candidate_scales(x.abs().mean(0), relative)]

    def loss(scale: torch.Tensor) -> float:
        total = 0.0
        for weight in weights:
            quantized = grid.round_to_nearest(weight * scale, SPEC) / scale
            total += float((x.double() @ (quantized - weight).double().t()).square().sum())
        return total

    losses = [loss(scale) for scale in candidates]
    assert loss(found.scale) <= min(losses) * 1.02  # every fourth row ranks; the finalists are judged exactly
    assert found.loss < found.loss_unscaled


def test_no_scaling_when_nothing_beats_it() -> None:
    """Weights that already lie on the grid lose nothing unscaled."""
    weight = torch.randint(-7, 8, (64, 128)).float()
    weight[:, ::32], weight[:, 1::32] = 7.0, -8.0
    x = inputs()
    assert scaling.search_scale([Weighed(weight, x.t() @ x)], x.abs().mean(0), SPEC).scale is None


def test_scaled_gram_is_the_gram_of_scaled_inputs() -> None:
    x, scale = inputs(), torch.rand(128) + 0.5
    expected = (x / scale).t() @ (x / scale)
    assert torch.allclose(scaling.scale_gram(x.t() @ x, scale), expected, rtol=1e-4, atol=1e-2)


def test_repeated_heads_share_their_scales() -> None:
    tie = Heads(Matrix("v", "v.weight"), repeat=2, dim=32).ties(128, torch.device("cpu"))
    # columns 0-31 and 32-63 are two query heads fed by key/value head 0
    assert tie.tolist() == [*range(32), *range(32), *range(32, 64), *range(32, 64)]
    x = inputs()
    scale = scaling.search_scale([Weighed(torch.randn(64, 128), x.t() @ x)], x.abs().mean(0), SPEC, tie).scale
    assert scale is not None
    assert torch.equal(scale[:32], scale[32:64])
    assert torch.equal(scale[64:96], scale[96:])


def test_statistics_in_batches_equal_one_product() -> None:
    x, source = inputs(700, 500), inputs(700, 500)
    stats, alone = InputStatistics(), InputStatistics()
    for part, other in zip(x.split(300), source.split(300), strict=True):
        stats.add(part.unsqueeze(0), other.unsqueeze(0))
        alone.add(part.unsqueeze(0))
    stats.finish()
    assert stats.tokens == 700
    assert torch.allclose(stats.gram, x.t() @ x, rtol=1e-4, atol=1e-1)
    assert torch.allclose(stats.gram, stats.gram.t(), rtol=1e-5, atol=1e-2)
    assert stats.drift is not None
    assert torch.allclose(stats.drift, (source - x).t() @ x, rtol=1e-4, atol=1e-1)
    assert torch.allclose(alone.mean_abs, x.abs().mean(0), rtol=1e-5)
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert torch.equal(alone.absmax, stats.absmax)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_only", [False, True])
def test_counting_leaves_the_activations_alone(channels_only: bool, dtype: torch.dtype) -> None:
    """They go on through the layer afterwards; and both ways of counting give the same mean squares."""
    x = inputs(700, 96).to(dtype)
    before = x.clone()
    stats = InputStatistics(channels_only=channels_only)
    stats.add(x)
    assert torch.equal(x, before)
    assert torch.allclose(stats.mean_square, before.float().square().mean(0), rtol=1e-4)


def test_drift_through_the_weights_is_the_same() -> None:
    x, source, weight = inputs(700, 500), inputs(700, 500), torch.randn(96, 500)
    plain, through = InputStatistics(), InputStatistics(through=weight)
    for stats in (plain, through):
        for part, other in zip(x.split(300), source.split(300), strict=True):
            stats.add(part, other)
    expected = weight.double() @ (source.t().double() @ x.double() - x.t().double() @ x.double())
    for stats in (plain, through):
        assert float((stats.output_drift(weight) - expected).norm() / expected.norm()) < 1e-5
    assert through.drift is not None
    assert through.drift.shape == (96, 500)


@pytest.mark.skipif(not fast_bfloat16(), reason="this processor has no bfloat16 products")
def test_bfloat16_products_lose_nothing() -> None:
    """Gram matrices of bfloat16 values through bfloat16 products: as close to float64 as float32 products are."""
    x = inputs(2000, 256).bfloat16()
    stats = statistics(x)
    expected = x.double().t() @ x.double()
    assert float((stats.gram - expected).norm() / expected.norm()) < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
@pytest.mark.parametrize(("family", "offset"), [("Llama", 0.0), ("Gemma2", 1.0)])
def test_folding_leaves_the_function_alone(rounding: str, family: str, offset: float) -> None:
    """With the fold undone, the folded weights are the source's: only rounding changes the layer."""
    sizes = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64,
    }  # fmt: skip
    feeds = decoder_of(sizes | {"architectures": [f"{family}ForCausalLM"]}).feeds(0)
    rows = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    weights = {f"self_attn.{name}.weight": torch.randn(out, 128) * 0.1 for name, out in rows.items()}
    weights |= {f"self_attn.{name}.bias": torch.randn(out) for name, out in rows.items()}
    weights |= {
        "self_attn.o_proj.weight": torch.randn(128, 128) * 0.1,
        "mlp.gate_proj.weight": torch.randn(256, 128) * 0.1,
        "mlp.up_proj.weight": torch.randn(256, 128) * 0.1,
        "mlp.down_proj.weight": torch.randn(128, 256) * 0.1,
    }
    norms = {feed.producer.name: feed.name for feed in feeds if isinstance(feed.producer, Norm)}
    weights |= {f"{norm}.weight": torch.rand(128) + 0.5 - offset for norm in norms}
    stats = {feed.name: statistics(inputs(columns=256 if "down" in feed.name else 128)) for feed in feeds}
    method = AwqMethod(method="awq", group_size=32, rounding=rounding)
    output = quantize_layer(method, feeds, weights, stats)
    assert list(output.codes) == [matrix.module for feed in feeds for matrix in feed.consumers]
    for feed in feeds:
        for linear in (matrix.module for matrix in feed.consumers):
            columns, scaled = output.kept[f"{linear}.columns"], output.kept[f"{linear}.rows"].unsqueeze(1)
            restored = output.codes[linear].dequantize() / columns * scaled
            source = weights[f"{linear}.weight"]
            assert float((restored - source).norm() / source.norm()) == pytest.approx(
                output.records[linear]["frobenius"], rel=1e-4
            )
            assert output.records[linear]["error"] < output.records[linear]["rtn_error"]
    for norm, linear in norms.items():
        product = (output.tensors[f"{norm}.weight"] + offset) * output.kept[f"{linear}.columns"]
        assert torch.allclose(product, weights[f"{norm}.weight"] + offset, rtol=1e-6)
        assert not torch.equal(output.kept[f"{linear}.columns"], torch.ones(128))
    # what v_proj's rows and bias lost, o_proj's columns gained, head by head
    gained = output.kept["self_attn.o_proj.columns"]
    tie = feeds[1].producer.ties(128, torch.device("cpu"))
    assert torch.equal(output.kept["self_attn.v_proj.rows"][tie], gained)
    bias = output.tensors["self_attn.v_proj.bias"] * output.kept["self_attn.v_proj.rows"]
    assert torch.allclose(bias, weights["self_attn.v_proj.bias"], rtol=1e-5)
    assert torch.equal(output.tensors["self_attn.q_proj.bias"], weights["self_attn.q_proj.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_that_adds_one_loses_no_channel(dtype: torch.dtype) -> None:
    """1 + weight near 0 cannot be divided in two bytes: the weight, as stored, times what is left is the source's."""
    weight = torch.tensor([3.0, -0.5, -0.99609375, -1.0078125, -1.0, -2.5])  # all of them numbers of either dtype
    scale = torch.tensor([7.3, 0.3, 50.0, 50.0, 5.0, 1.7])
    stored, left = scaling.fold_norm(weight, scale, dtype, 1.0)
    assert torch.equal(stored, stored.to(dtype).float())
    assert torch.equal((1 + stored == 0), (1 + weight == 0))
    assert torch.allclose((1 + stored) * left, 1 + weight, rtol=1e-6)
    assert torch.allclose(left[[0, 1, 5]], scale[[0, 1, 5]], rtol=0.03)
