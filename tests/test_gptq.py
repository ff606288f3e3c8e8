"""GPTQ against a slow column-by-column reference in float64 that knows nothing of blocks."""

from __future__ import annotations

import pytest
import torch

from qtool.quantize import awq, gptq, grid
from qtool.quantize.grid import Grid, GridSpec


def correlated(columns: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator).exp()
    return x.t() @ x


def slow_gptq(weight: torch.Tensor, gram: torch.Tensor, damp: float, spec: GridSpec) -> tuple[torch.Tensor, Grid]:
    """Optimal brain surgeon, one column at a time: quantize, spread the error by H^-1, take the column out of H^-1.

    Written from the paper's equations (2) and (3) with explicit inverse updates; no Cholesky factor, no blocks.
    """
    w = weight.double().clone()
    h = gram.double()
    h = h + damp * h.diagonal().mean() * torch.eye(h.shape[0], dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    codes = torch.zeros_like(w)
    scales, zeros = [], []
    for column in range(w.shape[1]):
        if column % spec.group_size == 0:
            group = grid.fit_minmax(w[:, column : column + spec.group_size].float(), spec)
            scales.append(group.scale)
            zeros.append(group.zero)
        scale, zero = scales[-1][:, 0].double(), zeros[-1][:, 0].double()
        codes[:, column] = ((w[:, column] / scale).round() + zero).clamp(0, spec.levels)
        error = (w[:, column] - (codes[:, column] - zero) * scale) / inverse[column, column]
        w[:, column:] -= error.unsqueeze(1) * inverse[column, column:].unsqueeze(0)
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes.float(), Grid(torch.cat(scales, 1), torch.cat(zeros, 1))


def loss(codes: torch.Tensor, fitted: Grid, weight: torch.Tensor, gram: torch.Tensor, spec: GridSpec) -> float:
    error = grid.dequantize(codes, fitted, spec) - weight
    return float(awq.output_error(error.double(), gram.double()))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equals_the_slow_reference(sym: bool, group_size: int) -> None:
    """Updates that stop at the wrong column (a fault a peer shipped) change most codes after the first block."""
    spec = GridSpec(4, group_size, sym, torch.float16)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    gram = correlated(256)
    codes, fitted = slow_gptq(weight, gram, 0.05, spec)
    rounded = gptq.gptq(weight.clone(), gptq.factorize(gram, 0.05), spec, clip=False)
    assert (rounded.codes == codes).float().mean() >= 0.98
    reference = loss(codes, fitted, weight, gram, spec)
    assert loss(rounded.codes, rounded.grid, weight, gram, spec) == pytest.approx(reference, rel=0.003)


def test_identity_gram_gives_round_to_nearest() -> None:
    spec = GridSpec(4, 32, False, torch.float16)
    weight = torch.randn(16, 96)
    rounded = gptq.gptq(weight.clone(), gptq.factorize(torch.eye(96), 0.05), spec, clip=False)
    fitted = grid.fit_minmax(weight, spec)
    assert torch.equal(rounded.codes, grid.quantize(weight, fitted, spec))


@pytest.mark.parametrize("clip", [False, True])
def test_never_worse_than_round_to_nearest_on_correlated_inputs(clip: bool) -> None:
    spec = GridSpec(4, 32, False, torch.float16)
    for seed in range(5):
        weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
        gram = correlated(128, seed=seed)
        rounded = gptq.gptq(weight.clone(), gptq.factorize(gram, 0.05), spec, clip)
        fitted = grid.fit_minmax(weight, spec)
        plain = loss(grid.quantize(weight, fitted, spec), fitted, weight, gram, spec)
        assert loss(rounded.codes, rounded.grid, weight, gram, spec) < 0.9 * plain


def test_clipping_by_the_residual_metric_beats_minmax() -> None:
    spec = GridSpec(4, 64, False, torch.float16)
    weight = torch.randn(64, 256) ** 3
    gram = correlated(256)
    factor = gptq.factorize(gram, 0.05)
    losses = []
    for clip in (False, True):
        rounded = gptq.gptq(weight.clone(), factor, spec, clip)
        losses.append(loss(rounded.codes, rounded.grid, weight, gram, spec))
    assert losses[1] < losses[0]


def test_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    gram = correlated(64)
    factor = gptq.factorize(gram, 0.01)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(64)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(factor.upper.double().t() @ factor.upper.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-9)


def test_singular_gram_raises_the_damping_and_says_so() -> None:
    x = torch.randn(3, 64)  # rank 3
    gram = -1e-3 * torch.eye(64) + x.t() @ x
    factor = gptq.factorize(gram, 1e-6)
    assert factor.damp > 1e-6
    assert factor.upper.isfinite().all()


def test_dead_inputs_are_harmless() -> None:
    spec = GridSpec(4, 32, False, torch.float16)
    gram = correlated(64)
    gram[10], gram[:, 10] = 0, 0
    weight = torch.randn(16, 64)
    rounded = gptq.gptq(weight.clone(), gptq.factorize(gram, 0.01), spec)
    assert grid.dequantize(rounded.codes, rounded.grid, spec).isfinite().all()
    assert gptq.factorize(torch.zeros(64, 64), 0.01).upper.isfinite().all()


def test_a_gram_matrix_with_nan_is_refused() -> None:
    gram = correlated(64)
    gram[3, 3] = float("nan")
    with pytest.raises(ArithmeticError, match="NaN"):
        gptq.factorize(gram, 0.01)


def test_residual_metric_is_the_schur_complement() -> None:
    gram = correlated(96).double()
    inverse = torch.linalg.inv(gram)
    upper = torch.linalg.cholesky(inverse, upper=True)
    first, rest = slice(0, 32), slice(32, 96)
    schur = gram[first, first] - gram[first, rest] @ torch.linalg.inv(gram[rest, rest]) @ gram[rest, first]
    assert torch.allclose(gptq.residual_metric(upper[first, first].float()).double(), schur, rtol=1e-3)


def test_propagated_target_is_the_least_squares_answer() -> None:
    """alpha 1 and hardly any damping: the weights that reproduce W X from other inputs, as lstsq finds them."""
    x = torch.randn(500, 32)
    other = x + 0.3 * torch.randn(500, 32)
    weight = torch.randn(8, 32)
    gram, cross = other.t() @ other, x.t() @ other
    factor = gptq.factorize(gram, 1e-6)
    found = gptq.propagated_target(weight, weight @ (cross - gram), factor, 1.0)
    expected = torch.linalg.lstsq(other, x @ weight.t()).solution.t()
    assert torch.allclose(found, expected, atol=1e-3)
