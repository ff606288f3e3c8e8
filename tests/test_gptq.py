"""GPTQ against a slow column-by-column reference in float64 that knows nothing of blocks."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from qtool.convert.formats.codes import UniformCodes
from qtool.convert.models.feeds import Feed, Nothing
from qtool.convert.models.feeds import whole as matrix_of
from qtool.quantize import grid, rounding, scaling
from qtool.quantize.grid import Grid, GridSpec
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.on_grid import quantize_layer
from qtool.quantize.statistics import InputStatistics


def correlated(columns: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator).exp()
    return x.t() @ x


def slow_gptq(
    weight: torch.Tensor, gram: torch.Tensor, damp: float, spec: GridSpec, order: list[int] | None = None
) -> tuple[torch.Tensor, Grid]:
    """Optimal brain surgeon, one column at a time: quantize, spread the error by H^-1, take the column out of H^-1.

    Written from the paper's equations (2) and (3) with explicit inverse updates; no Cholesky factor, no blocks. With
    ``order`` columns are taken in that order, on grids fitted before.
    """
    w = weight.double().clone()
    h = gram.double()
    h = h + damp * h.diagonal().mean() * torch.eye(h.shape[0], dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    codes = torch.zeros_like(w)
    groups = w.shape[1] // spec.group_size
    fitted: dict[int, Grid] = {}
    if order is not None:
        fitted = dict(enumerate(fit_groups(weight, spec)))
    for column in order or range(w.shape[1]):
        number = column // spec.group_size
        if number not in fitted:
            fitted[number] = fit_groups(w.float(), spec)[number]
        scale, zero = fitted[number].scale[:, 0].double(), fitted[number].zero[:, 0].double()
        codes[:, column] = ((w[:, column] / scale).round() + zero).clamp(0, spec.levels)
        error = (w[:, column] - (codes[:, column] - zero) * scale) / inverse[column, column]
        w -= error.unsqueeze(1) * inverse[column].unsqueeze(0)
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    parts = [fitted[number] for number in range(groups)]
    return codes.float(), Grid(torch.cat([p.scale for p in parts], 1), torch.cat([p.zero for p in parts], 1))


def fit_groups(weight: torch.Tensor, spec: GridSpec) -> list[Grid]:
    return [grid.fit_minmax(part, spec) for part in weight.split(spec.group_size, dim=1)]


def loss(codes: torch.Tensor, fitted: Grid, weight: torch.Tensor, gram: torch.Tensor, spec: GridSpec) -> float:
    error = grid.dequantize(codes, fitted, spec) - weight
    return float(scaling.output_error(error.double(), gram.double()))


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (4, 128), (4, -1), (8, 64), (8, -1)])
def test_equals_the_slow_reference(sym: bool, bits: int, group_size: int, order: bool) -> None:
    """Updates that stop at the wrong column (a fault a peer shipped) change most codes after the first block."""
    spec = GridSpec(bits, group_size, sym, torch.float16)
    whole = spec.for_columns(256)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    gram = correlated(256)
    ranks = rounding.activation_order(gram) if order else None
    codes, fitted = slow_gptq(weight, gram, 0.05, whole, None if ranks is None else ranks.tolist())
    rounded = rounding.gptq(weight.clone(), rounding.factorize(gram, 0.05, ranks), spec, clip=False)
    assert (rounded.codes == codes).float().mean() >= 0.98
    reference = loss(codes, fitted, weight, gram, whole)
    assert loss(rounded.codes, rounded.grid, weight, gram, whole) == pytest.approx(reference, rel=0.003)


@pytest.mark.parametrize("seed", range(5))
def test_exact_where_all_numbers_are_integers(seed: int) -> None:
    """H^-1 = UᵀU with integer U and ones on its diagonal; weights are quarters on a grid of ones: float32 is exact,
    so the codes must equal those of exact fractions."""
    generator = torch.Generator().manual_seed(seed)
    size, rows = 8, 6
    upper = torch.randint(-1, 2, (size, size), generator=generator).triu(1) + torch.eye(size, dtype=torch.int64)
    inverse = upper.t() @ upper
    gram = torch.linalg.inv(inverse.double()).round().float()
    assert torch.equal(gram @ inverse.float(), torch.eye(size))
    weight = torch.randint(-28, 29, (rows, size), generator=generator).float() / 4
    weight[:, 0], weight[:, 1] = -8, 7  # the range is 15 steps of 1, the zero 8
    spec = GridSpec(4, size, False, torch.float16)
    rounded = rounding.gptq(weight.clone(), rounding.factorize(gram, 0.0), spec, clip=False)
    assert rounded.grid.scale.unique().tolist() == [1.0]
    assert rounded.grid.zero.unique().tolist() == [8.0]
    for row in range(rows):
        assert rounded.codes[row].tolist() == exact_codes(weight[row].tolist(), inverse.tolist())


def exact_codes(weights: list[float], inverse: list[list[int]]) -> list[int]:
    w = [Fraction(value) for value in weights]
    h = [[Fraction(value) for value in row] for row in inverse]
    codes = []
    for i in range(len(w)):
        codes.append(min(max(round(w[i]) + 8, 0), 15))
        error = (w[i] - (codes[i] - 8)) / h[i][i]
        w = [w[j] - error * h[i][j] for j in range(len(w))]
        h = [[h[a][b] - h[a][i] * h[i][b] / h[i][i] for b in range(len(w))] for a in range(len(w))]
    return codes


def test_act_order_helps_where_inputs_differ_in_size() -> None:
    """Large inputs first: their errors are the ones that all other columns can still absorb."""
    spec = GridSpec(4, 64, True, torch.float16)
    gram = correlated(256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    losses = []
    for order in (None, rounding.activation_order(gram)):
        rounded = rounding.gptq(weight.clone(), rounding.factorize(gram, 0.05, order), spec, True, gram)
        losses.append(loss(rounded.codes, rounded.grid, weight, gram, spec))
    assert losses[1] < losses[0]


def test_propagated_target_does_not_depend_on_the_order() -> None:
    gram = correlated(64)
    weight, drift = torch.randn(8, 64), torch.randn(8, 64)
    plain = rounding.propagated_target(weight, drift, rounding.factorize(gram, 0.05), 0.5)
    ordered = rounding.propagated_target(
        weight, drift, rounding.factorize(gram, 0.05, rounding.activation_order(gram)), 0.5
    )
    assert torch.allclose(plain, ordered, atol=1e-5)


def test_identity_gram_gives_round_to_nearest() -> None:
    spec = GridSpec(4, 32, False, torch.float16)
    weight = torch.randn(16, 96)
    rounded = rounding.gptq(weight.clone(), rounding.factorize(torch.eye(96), 0.05), spec, clip=False)
    fitted = grid.fit_minmax(weight, spec)
    assert torch.equal(rounded.codes, grid.quantize(weight, fitted, spec))


@pytest.mark.parametrize("clip", [False, True])
def test_never_worse_than_round_to_nearest_on_correlated_inputs(clip: bool) -> None:
    spec = GridSpec(4, 32, False, torch.float16)
    for seed in range(5):
        weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
        gram = correlated(128, seed=seed)
        rounded = rounding.gptq(weight.clone(), rounding.factorize(gram, 0.05), spec, clip)
        fitted = grid.fit_minmax(weight, spec)
        plain = loss(grid.quantize(weight, fitted, spec), fitted, weight, gram, spec)
        assert loss(rounded.codes, rounded.grid, weight, gram, spec) < 0.9 * plain


def test_clipping_by_the_residual_metric_beats_minmax() -> None:
    spec = GridSpec(4, 64, False, torch.float16)
    weight = torch.randn(64, 256) ** 3
    gram = correlated(256)
    factor = rounding.factorize(gram, 0.05)
    losses = []
    for clip in (False, True):
        rounded = rounding.gptq(weight.clone(), factor, spec, clip)
        losses.append(loss(rounded.codes, rounded.grid, weight, gram, spec))
    assert losses[1] < losses[0]


def test_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    gram = correlated(64)
    factor = rounding.factorize(gram, 0.01)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(64)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(
        factor.upper.double().t() @ factor.upper.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-9
    )


def test_singular_gram_raises_the_damping_and_says_so() -> None:
    x = torch.randn(3, 64)  # rank 3
    gram = -1e-3 * torch.eye(64) + x.t() @ x
    factor = rounding.factorize(gram, 1e-6)
    assert factor.damp > 1e-6
    assert factor.upper.isfinite().all()


def test_dead_inputs_are_harmless() -> None:
    spec = GridSpec(4, 32, False, torch.float16)
    gram = correlated(64)
    gram[10], gram[:, 10] = 0, 0
    weight = torch.randn(16, 64)
    rounded = rounding.gptq(weight.clone(), rounding.factorize(gram, 0.01), spec)
    assert grid.dequantize(rounded.codes, rounded.grid, spec).isfinite().all()
    assert rounding.factorize(torch.zeros(64, 64), 0.01).upper.isfinite().all()


def test_a_gram_matrix_with_nan_is_refused() -> None:
    gram = correlated(64)
    gram[3, 3] = float("nan")
    with pytest.raises(ArithmeticError, match="NaN"):
        rounding.factorize(gram, 0.01)


def test_residual_metric_is_the_schur_complement() -> None:
    gram = correlated(96).double()
    inverse = torch.linalg.inv(gram)
    upper = torch.linalg.cholesky(inverse, upper=True)
    first, rest = slice(0, 32), slice(32, 96)
    schur = gram[first, first] - gram[first, rest] @ torch.linalg.inv(gram[rest, rest]) @ gram[rest, first]
    assert torch.allclose(rounding.residual_metric(upper[first, first].float()).double(), schur, rtol=1e-3)


def test_propagated_target_is_the_least_squares_answer() -> None:
    """alpha 1 and hardly any damping: the weights that reproduce W X from other inputs, as lstsq finds them."""
    x = torch.randn(500, 32)
    other = x + 0.3 * torch.randn(500, 32)
    weight = torch.randn(8, 32)
    gram, cross = other.t() @ other, x.t() @ other
    factor = rounding.factorize(gram, 1e-6)
    found = rounding.propagated_target(weight, weight @ (cross - gram), factor, 1.0)
    expected = torch.linalg.lstsq(other, x @ weight.t()).solution.t()
    assert torch.allclose(found, expected, atol=1e-3)


def one_feed(method: GptqMethod, weight: torch.Tensor, x: torch.Tensor) -> UniformCodes:
    feed, stats = Feed(Nothing(), (matrix_of("up"),)), InputStatistics()
    stats.add(x)
    stats.finish()
    codes = quantize_layer(method, [feed], {"up.weight": weight}, {"up": stats}).codes["up"]
    assert isinstance(codes, UniformCodes)
    return codes


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group_size", [64, -1])
def test_descent_can_be_left_out(sym: bool, group_size: int, order: bool) -> None:
    """Without it, GPTQ's own codes and scales bit for bit; with it, on whatever GPTQ began with, a smaller loss."""
    weight, x = torch.randn(48, 256), torch.randn(900, 256) @ (torch.eye(256) + torch.randn(256, 256) / 16)
    keys = {"method": "gptq", "group_size": group_size, "sym": sym, "desc_act": order}
    plain = one_feed(GptqMethod(**keys, signed=False, descent=False), weight, x)
    gram, spec = x.t() @ x, GridSpec(4, group_size, sym, torch.float16)
    factor = rounding.factorize(gram, 0.1, rounding.activation_order(gram) if order else None)
    expected = rounding.gptq(weight.clone(), factor, spec, True, gram)
    assert torch.equal(plain.codes, expected.codes.to(torch.uint8))
    assert torch.equal(plain.scale, expected.grid.scale.to(torch.float16))
    assert torch.equal(plain.zero, expected.grid.zero.to(torch.uint8))
    losses = []
    for codes in (plain, one_feed(GptqMethod(**keys), weight, x)):
        error = codes.dequantize().double() - weight
        losses.append(float(scaling.output_error(error, gram.double())))
        assert int(codes.codes.max()) <= 15
    assert losses[1] < 0.97 * losses[0]
