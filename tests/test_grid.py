"""Uniform grids against a loop over plain Python numbers."""

from __future__ import annotations

import pytest
import torch

from qtool.quantize import grid
from qtool.quantize.grid import GridSpec


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_minmax_grid_against_a_slow_loop(bits: int, sym: bool) -> None:
    spec = GridSpec(bits, 32, sym, torch.float16)
    weight = torch.randn(6, 64)
    weight[0, :32] = weight[0, :32].abs() + 0.5  # a group that does not straddle zero
    fitted = grid.fit_minmax(weight, spec)
    codes = grid.quantize(weight, fitted, spec)
    levels = 2**bits - 1
    for row in range(6):
        for group in range(2):
            values = weight[row, 32 * group : 32 * (group + 1)].tolist()
            if sym:
                low, high = -max(map(abs, values)), max(map(abs, values))
            else:
                low, high = min(0.0, *values), max(0.0, *values)
            scale = float(torch.tensor((high - low) / levels).half())
            zero = (levels + 1) // 2 if sym else min(max(round(-low / scale), 0), levels)
            assert float(fitted.scale[row, group]) == pytest.approx(scale, rel=1e-3)
            assert int(fitted.zero[row, group]) == zero
            for place, value in enumerate(values):
                code = int(codes[row, 32 * group + place])
                assert 0 <= code <= levels
                exact = value / float(fitted.scale[row, group]) + zero
                assert abs(code - min(max(exact, 0), levels)) <= 0.5 + 1e-4


def test_symmetric_zero_is_eight() -> None:
    fitted = grid.fit_minmax(torch.randn(4, 64), GridSpec(4, 32, True, torch.float16))
    assert (fitted.zero == 8).all()


def test_a_zero_group_stays_zero_and_finite() -> None:
    spec = GridSpec(4, 32, False, torch.float16)
    assert torch.equal(grid.round_to_nearest(torch.zeros(2, 32), spec), torch.zeros(2, 32))
    tiny = grid.round_to_nearest(torch.full((2, 32), 1e-9), spec)
    assert tiny.isfinite().all()


def test_diagonal_blocks() -> None:
    gram = torch.randn(96, 96)
    blocks = grid.diagonal_blocks(gram, 32)
    for index in range(3):
        assert torch.equal(blocks[index], gram[32 * index : 32 * (index + 1), 32 * index : 32 * (index + 1)])


def test_clipping_never_loses_and_equals_a_brute_force_search() -> None:
    spec = GridSpec(4, 32, False, torch.float16)
    weight = torch.randn(8, 64) ** 3
    x = torch.randn(500, 64) * torch.rand(64)
    blocks = grid.diagonal_blocks(x.t() @ x, 32)

    def loss(fitted: grid.Grid) -> torch.Tensor:
        error = grid.dequantize(grid.quantize(weight, fitted, spec), fitted, spec) - weight
        parts = [(x[:, 32 * g : 32 * (g + 1)] @ error[:, 32 * g : 32 * (g + 1)].t()).square().sum(0) for g in range(2)]
        return torch.stack(parts, 1)

    every = torch.stack(
        [loss(grid.fit_minmax(weight, spec, 1.0 - grid.CLIP_STEP * step)) for step in range(grid.CLIP_STEPS)]
    )
    found = loss(grid.fit_clipped(weight, blocks, spec))
    assert (found <= every.amin(0) * 1.0001).all()
    assert (found < loss(grid.fit_minmax(weight, spec)) * 0.999).any()
