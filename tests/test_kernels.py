"""The accelerator's kernels against their plain twins. They need an accelerator; CI has none and skips this file."""

from __future__ import annotations

import pytest
import torch

from qtool.quantize import grid, rounding, scaling
from qtool.quantize.grid import GridSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels run on an accelerator only")
SPECS = [
    GridSpec(4, 128, False, torch.float16), GridSpec(4, 64, True, torch.float16),
    GridSpec(4, 32, False, torch.bfloat16), GridSpec(8, 128, True, torch.float16),
]  # fmt: skip


def correlated(columns: int, tokens: int = 4096) -> torch.Tensor:
    """A Gram matrix with correlated columns of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator).exp()
    return x.t() @ x


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("spec", [*SPECS, GridSpec(4, -1, True, torch.float16)])
def test_gptq_agrees_with_the_cpu(spec: GridSpec, order: bool) -> None:
    """Nearly every code equal, and the loss within 0.3 %: a tie decided the other way moves what follows it."""
    weight = torch.randn(200, 512, generator=torch.Generator().manual_seed(2))
    gram = correlated(512)
    ranks = rounding.activation_order(gram) if order else None
    results = []
    for device in ("cpu", "cuda"):
        factor = rounding.factorize(gram.to(device), 0.05, None if ranks is None else ranks.to(device))
        rounded = rounding.gptq(weight.clone().to(device), factor, spec, gram=gram.to(device))
        error = grid.dequantize(rounded.codes, rounded.grid, spec.for_columns(512)).cpu() - weight
        results.append((rounded.codes.cpu(), float(scaling.output_error(error, gram))))
    (codes, loss), (cuda_codes, cuda_loss) = results
    assert (codes == cuda_codes).float().mean() > 0.97
    assert abs(loss - cuda_loss) < 0.003 * loss


@pytest.mark.parametrize("spec", SPECS)
def test_scaled_error_agrees_with_the_cpu(spec: GridSpec) -> None:
    """Elementwise, up to codes on a tie."""
    weight = torch.randn(77, 256, generator=torch.Generator().manual_seed(3))
    scale = torch.rand(256, generator=torch.Generator().manual_seed(4)) + 0.5
    from qtool.quantize import kernels

    plain = grid.round_to_nearest(weight * scale, spec).div_(scale).sub_(weight)
    half = spec.dtype == torch.float16
    kernel = kernels.scaled_error(weight.cuda(), scale.cuda(), spec.group_size, spec.levels, spec.sym, half).cpu()
    assert (torch.isclose(plain, kernel, atol=1e-5).float().mean()) > 0.999


@pytest.mark.parametrize("spec", SPECS)
def test_clipping_finds_grids_as_good_as_the_cpus(spec: GridSpec) -> None:
    """Same search, so the total loss is the same to rounding."""
    weight = torch.randn(100, 256, generator=torch.Generator().manual_seed(5))
    blocks = grid.diagonal_blocks(correlated(256), spec.group_size)
    losses = []
    for device in ("cpu", "cuda"):
        fitted = grid.fit_clipped(weight.to(device), blocks.to(device), spec)
        error = grid.dequantize(grid.quantize(weight.to(device), fitted, spec), fitted, spec).cpu() - weight
        grouped = error.unflatten(1, (-1, spec.group_size)).transpose(0, 1)
        losses.append(float((torch.bmm(grouped, blocks) * grouped).sum()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_losses_are_float32s() -> None:
    """Losses of compensated solutions: three TF32 products agree with float64 as float32 does."""
    gram = correlated(1500)
    values, vectors = torch.linalg.eigh(gram.double())
    error = (torch.randn(64, 1500).double() / values.clamp_min(1.0).sqrt()) @ vectors.t()  # small where G is large
    expected = float(((error @ gram.double()) * error).sum())
    found = float(scaling.output_error(error.float().cuda(), gram.cuda()))
    assert found == pytest.approx(expected, rel=2e-4)


def test_errors_spread_as_in_float32() -> None:
    from qtool.quantize.precision import subtract_product

    total, left, right = torch.randn(300, 700), torch.randn(300, 128), torch.randn(128, 700)
    expected = total.double() - left.double() @ right.double()
    found = total.cuda()
    subtract_product(found, left.cuda(), right.cuda())
    assert float((found.cpu() - expected).norm() / expected.norm()) < 1e-6


def test_errors_of_scaled_experts() -> None:
    """A stack with a scale for all, and with one for each: as each alone."""
    from qtool.quantize.kernels import scaled_error

    weight, shared, own = torch.randn(3, 50, 256).cuda(), torch.rand(256).cuda() + 0.5, torch.rand(3, 256).cuda() + 0.5
    for factor in (shared, own):
        found = scaled_error(weight, factor, 64, 15, False, True)
        for number in range(3):
            one = factor if factor.ndim == 1 else factor[number]
            assert torch.equal(found[number], scaled_error(weight[number].contiguous(), one, 64, 15, False, True))


def test_grouped_products_are_each_experts_own() -> None:
    from qtool.quantize.experts import products

    matrices, inputs = torch.randn(4, 96, 64).cuda().bfloat16(), torch.randn(100, 64).cuda().bfloat16()
    found = products(matrices, inputs, (30, 0, 69, 1))
    expected = products(matrices.float(), inputs.float(), (30, 0, 69, 1))
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-1)
