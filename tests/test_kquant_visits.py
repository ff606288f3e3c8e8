"""A visit to a super-block: the accelerator's kernels against the plain code. They need an accelerator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.quantize.methods import kquants
from qtool.quantize.methods.kquant_blocks import KINDS, ChosenBlocks, of_blocks
from qtool.quantize.methods.kquant_columns import BlockColumns
from qtool.quantize.methods.kquant_refit import refit
from qtool.quantize.methods.kquant_visits import choose, revisit
from qtool.quantize.rounding import factorize, invert_upper

DEVICE = "cuda"
ROWS = 45  # a program and a half
CASES = [(name, 0, 256) for name in KINDS] + [("Q4_K", 2, 256), ("Q6_K", 2, 256), ("Q5_1", 2, 96), ("Q5_0", 0, 32)]

on_an_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels run on an accelerator only")


def begun(type_name: str, problems: int, columns: int) -> tuple[BlockColumns, Tensor, Tensor]:
    """(ggml's own blocks, the weights wanted ``[in, out]``, a Gram matrix), of so many problems if any."""
    generator = torch.Generator().manual_seed(columns + problems)
    shape = (problems,) if problems else ()
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(*shape, 3 * columns, columns, generator=generator) @ mix
    target = torch.randn(*shape, ROWS, columns, generator=generator) * 0.02
    plain = of_blocks(kquants.quantize(target.view(-1, columns), type_name))
    parts = [one if one.numel() == 0 else one.view(*shape, ROWS, -1) for one in plain.numbers]
    chosen = BlockColumns.of(ChosenBlocks(plain.kind, *parts))
    return chosen, target.mT.contiguous(), inputs.mT @ inputs / (3 * columns)


def moved(part: BlockColumns) -> BlockColumns:
    """A copy on the device."""
    return BlockColumns(part.kind, *(one.clone().to(DEVICE) for one in part.numbers))


def losses(part: BlockColumns, target: Tensor, gram: Tensor) -> Tensor:
    """By row, in float64."""
    error = part.weights().cpu().double() - target.double()
    found: Tensor = ((gram.double() @ error) * error).sum(-2)
    return found


def agree(plain: BlockColumns, kernel: BlockColumns) -> None:
    """Nearly all equal: a near tie may fall the other way, and moves what follows in its row."""
    for ours, theirs in zip(plain.numbers, kernel.numbers, strict=True):
        assert float((ours == theirs.cpu()).float().mean()) > 0.97


@on_an_accelerator
@pytest.mark.parametrize("case", CASES)
def test_the_first_visit_chooses_what_the_plain_code_chooses(case: tuple[str, int, int]) -> None:
    part, target, gram = begun(*case)
    upper = factorize(gram, 0.05).upper
    kernel, inverse = moved(part), invert_upper(upper)
    before = losses(part, target, gram).sum()
    choose(part, target, upper, inverse)
    choose(kernel, target.to(DEVICE), upper.to(DEVICE), inverse.to(DEVICE))
    agree(part, kernel)
    ours, theirs = losses(part, target, gram).sum(), losses(kernel, target, gram).sum()
    assert float(ours) < 0.9 * float(before)
    assert float(theirs) == pytest.approx(float(ours), rel=3e-3)


@on_an_accelerator
@pytest.mark.parametrize("case", CASES)
def test_a_later_visit_and_its_refit_do_what_the_plain_code_does(case: tuple[str, int, int]) -> None:
    part, target, gram = begun(*case)
    before = losses(part, target, gram)
    kernel = moved(part)
    slope = gram @ (part.weights() - target)
    turned, metric = slope.to(DEVICE, copy=True), gram.to(DEVICE)
    revisit(part, slope, gram)
    revisit(kernel, turned, metric)
    agree(part, kernel)
    found = losses(kernel, target, gram)
    assert bool((found <= before * (1 + 1e-5)).all())
    assert float(found.sum()) == pytest.approx(float(losses(part, target, gram).sum()), rel=3e-3)
    expected = gram @ (kernel.weights().cpu() - target)  # the gradient followed what changed
    assert float((turned.cpu() - expected).norm() / expected.norm()) < 1e-4
    if part.kind.steps is None:
        return
    refit(part, slope, gram)
    refit(kernel, turned, metric)
    assert bool((losses(kernel, target, gram) <= found * (1 + 1e-4)).all())
    assert float(losses(kernel, target, gram).sum()) == pytest.approx(float(losses(part, target, gram).sum()), rel=3e-3)
    assert torch.equal(kernel.d.cpu().half().float(), kernel.d.cpu())
    steps = (kernel.scale.cpu() / kernel.d.cpu()).round()
    assert torch.equal(steps * kernel.d.cpu(), kernel.scale.cpu())
