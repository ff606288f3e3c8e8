"""Coordinate descent against exhaustive search, and what each of its steps promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.quantize import descent
from qtool.quantize import rounding as gptq
from qtool.quantize import scaling as awq
from qtool.quantize.chosen import Chosen, Group, Levels
from qtool.quantize.grid import GridSpec, stored

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
KINDS = {
    "range": Levels(15, 32, torch.float16),
    "signed": Levels(15, 32, torch.float16, sym=True),
    "mirrored": Levels(15, 32, torch.bfloat16, sym=True, signed=False),
    "eight bits": Levels(255, 32, torch.float16, sym=True),
    "table": Levels(15, 32, torch.float32, table=NF4),
}


def correlated(columns: int, tokens: int = 500) -> Tensor:
    mix = torch.eye(columns) + torch.randn(columns, columns) / columns**0.5
    x = torch.randn(tokens, columns) @ mix * torch.rand(columns).exp()
    return x.t() @ x


def loss(chosen: Chosen, target: Tensor, gram: Tensor) -> Tensor:
    """By row, in float64."""
    error = (chosen.weights() - target).double()
    return ((error @ gram.double()) * error).sum(1)


def damped(gram: Tensor, damp: float) -> Tensor:
    return gram + torch.eye(len(gram)) * damp * gram.diagonal().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_each_stage_loses_less_than_the_one_before(kind: str) -> None:
    """Row by row: no sweep adds to a row's loss; in all, the sweeps take off a good part of what one pass leaves."""
    levels, gram, target = KINDS[kind], correlated(96), torch.randn(24, 96)
    factor = gptq.factorize(gram.clone(), 0.01)
    metric = damped(gram, 0.01)
    begun = descent.begin(target, factor, levels)
    first = loss(begun, target, metric)
    last = first
    for sweeps in (1, 2, 3):
        now = loss(descent.descend(target, begun, metric, levels, sweeps), target, metric)
        assert bool((now <= last * (1 + 1e-5)).all())
        last = now
    assert float(last.sum()) < 0.97 * float(first.sum())
    codes_only = descent.descend(target, begun, metric, levels, 2, scales=False)
    assert torch.equal(codes_only.scale, begun.scale)
    assert bool((loss(codes_only, target, metric) <= first * (1 + 1e-5)).all())


@pytest.mark.parametrize("sym", [True, False])
def test_it_loses_less_than_gptq_with_the_same_grids(sym: bool) -> None:
    spec = GridSpec(4, 32, sym, torch.float16)
    gram, target = correlated(128), torch.randn(64, 128)
    factor, metric = gptq.factorize(gram.clone(), 0.01), damped(gram, 0.01)
    plain = gptq.gptq(target.clone(), factor, spec)
    levels = Levels.of_grid(spec, signed=False)
    zeros = plain.grid.zero.repeat_interleave(32, 1)
    rounded = Chosen(plain.codes - zeros, plain.grid.scale, plain.grid.zero)
    before = float(loss(rounded, target, metric).sum())
    assert float(awq.output_error(rounded.weights() - target, metric)) == pytest.approx(before, rel=1e-3)
    assert float(loss(descent.descend(target, rounded, metric, levels), target, metric).sum()) < 0.95 * before
    begun = descent.begin(target, factor, Levels.of_grid(spec))
    assert float(loss(begun, target, metric).sum()) < 0.95 * before


@pytest.mark.parametrize("kind", ["range", "signed", "table"])
def test_codes_are_a_local_optimum_near_the_exhaustive_one(kind: str) -> None:
    """Four columns, 16 levels each: all 65536 settings of a row tried with the scale that was found. No single code can
    be changed for the better, and most rows are the best there is."""
    levels = Levels(15, 4, torch.float32, KINDS[kind].sym, table=KINDS[kind].table)
    gram, target = correlated(4, 40), torch.randn(12, 4)
    chosen = descent.descend(target, descent.begin(target, gptq.factorize(gram.clone(), 0.01), levels), gram, levels, 8)
    found = loss(chosen, target, gram)
    best_hits = 0
    for row in range(12):
        zero, scale = chosen.zero[row, 0], chosen.scale[row, 0]
        table = torch.tensor(NF4) if levels.table else torch.arange(16) - zero
        every = torch.tensor(list(itertools.product(table.tolist(), repeat=4)))
        error = (every * scale - target[row]).double()
        losses = ((error @ gram.double()) * error).sum(1)
        best_hits += bool(found[row] <= losses.min() * (1 + 1e-4))
        single = (every != chosen.levels[row]).sum(1) == 1
        assert float(losses[single].min()) >= float(found[row]) * (1 - 1e-4)
    assert best_hits >= 9


def test_scale_is_the_least_squares_one() -> None:
    levels, gram = Levels(15, 8, torch.float32, sym=True), correlated(8)
    target = torch.randn(5, 8)
    chosen = descent.begin(target, gptq.factorize(gram.clone(), 0.01), levels)
    better = descent.descend(target, chosen, gram, levels, 6)
    for row in range(5):
        q = better.levels[row].double()
        wished = (q @ gram.double() @ target[row].double()) / (q @ gram.double() @ q)
        assert float(better.scale[row, 0]) == pytest.approx(float(wished), rel=2e-3)


def test_signed_scales_use_the_whole_range() -> None:
    """-1, -.5, 1.75 … : the longer side gets -8, by a negative scale where it is the positive one."""
    row = torch.tensor([[1.75, 0.5, -1.0, 0.25, 0.1, -0.2, 0.3, 0.4] * 4])
    levels = Levels(15, 32, torch.float32, sym=True)
    chosen = descent.begin(row, gptq.factorize(torch.eye(32), 0.01), levels)
    assert float(chosen.scale[0, 0]) < 0
    assert float(chosen.levels.min()) == -8.0
    assert 0 <= int(chosen.codes().min()) <= int(chosen.codes().max()) <= 15
    positive = descent.begin(row, gptq.factorize(torch.eye(32), 0.01), Levels(15, 32, torch.float32, True, False))
    assert float(positive.scale[0, 0]) > 0


def test_scales_are_as_stored() -> None:
    for kind in ("range", "signed", "mirrored"):
        levels = KINDS[kind]
        gram = correlated(64)
        target = torch.randn(8, 64) * 1e-3
        begun = descent.begin(target, gptq.factorize(gram.clone(), 0.1), levels)
        for chosen in (begun, descent.descend(target, begun, gram, levels)):
            assert torch.equal(stored(chosen.scale.abs(), levels.dtype), chosen.scale.abs())
            assert bool(chosen.weights().isfinite().all())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_weights(value: float) -> None:
    for levels in KINDS.values():
        target = torch.full((3, 64), value)
        gram = correlated(64)
        chosen = descent.descend(
            target, descent.begin(target, gptq.factorize(gram.clone(), 0.1), levels), damped(gram, 0.1), levels
        )
        assert torch.allclose(chosen.weights(), target, atol=2e-3, rtol=2e-3)


def test_a_target_of_one_row_stays_as_it_is() -> None:
    """Its transpose is the same memory."""
    gram, target = correlated(64), torch.randn(1, 64)
    before = target.clone()
    descent.begin(target, gptq.factorize(gram, 0.05), KINDS["range"])
    assert torch.equal(target, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on an accelerator only")
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_finds_what_the_plain_code_finds(kind: str, size: int) -> None:
    plain = KINDS[kind]
    levels = Levels(plain.top, size, plain.dtype, plain.sym, plain.signed, plain.table)
    metric, aim, other = damped(correlated(size), 0.05), torch.randn(size, 77), torch.randn(size, 77)
    group = descent.choose(aim, metric, levels)
    calls: list[tuple[Tensor, Callable[[str], Group]]] = [
        (aim, lambda device: descent.choose(aim.to(device), metric.to(device), levels)),
        (other, lambda device: descent.improve(*_on(device, -metric @ other, metric), levels, _moved(group, device))),
        (
            other,
            lambda device: descent.improve(*_on(device, -metric @ other, metric), levels, _moved(group, device), False),
        ),
    ]
    for goal, call in calls:
        losses = []
        for device in ("cpu", "cuda"):
            found = call(device)
            error = found.weights().cpu().double() - goal
            losses.append(float((error * (metric.double() @ error)).sum()))
            assert found.levels.shape == (size, 77)
            assert found.scale.shape == found.zero.shape == (1, 77)
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert torch.equal(found.scale.cpu(), group.scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on an accelerator only")
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_take_a_stack_as_its_problems_alone(kind: str) -> None:
    """Three problems of 77 rows, each under its own metric, in one launch: what three launches find."""
    plain = KINDS[kind]
    levels = Levels(plain.top, 64, plain.dtype, plain.sym, plain.signed, plain.table)
    metric = torch.stack([damped(correlated(64) * (1 + number), 0.05 * (1 + number)) for number in range(3)]).cuda()
    aim, linear = torch.randn(3, 64, 77).cuda(), torch.randn(3, 64, 77).cuda()
    stack = descent.choose(aim, metric, levels)
    better = descent.improve(linear, metric, levels, stack)
    for number in range(3):
        alone = descent.choose(aim[number], metric[number], levels)
        after = descent.improve(linear[number], metric[number], levels, alone)
        for found, expected in ((stack, alone), (better, after)):
            assert float((found.levels[number] == expected.levels).float().mean()) > 0.999
            torch.testing.assert_close(found.scale[number], expected.scale, rtol=1e-4, atol=1e-6)
            assert torch.equal(found.zero[number], expected.zero)


def _on(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def _moved(group: Group, device: str) -> Group:
    return Group(*_on(device, group.levels, group.scale, group.zero))


@pytest.mark.parametrize("table", [NF4, (-1.0, 0.0, 0.25, 0.3, 1.0), tuple(n / 7.5 - 1 for n in range(16))])
def test_a_look_up_finds_what_a_binary_search_finds(table: tuple[float, ...]) -> None:
    """Also at the middles between two levels and at the edges of the look-up's parts, and beyond the table."""
    levels = torch.tensor(table)
    middles = (levels[1:] + levels[:-1]) / 2
    parts = descent._parts(table, torch.device("cpu"))
    edges = torch.arange(len(parts.middle) + 1) / parts.number - parts.shift
    ratio = torch.cat(
        [torch.randn(100_000), middles, edges, levels, torch.tensor([-1e30, 1e30, -torch.inf, torch.inf])]
    )
    for _ in range(4):
        down, up = torch.tensor(-torch.inf), torch.tensor(torch.inf)
        ratio = torch.cat([ratio[:100_000], *(torch.nextafter(ratio[100_000:], to) for to in (down, up))])
    found = descent.nearest(
        ratio[None], torch.ones(1), torch.zeros(1), Levels(len(table) - 1, 32, torch.float32, table=table)
    )
    assert torch.equal(found[0], levels[torch.bucketize(ratio, middles)])
    nan = torch.full((1, 3), torch.nan)
    lost = descent.nearest(nan, torch.ones(1), torch.zeros(1), Levels(len(table) - 1, 32, torch.float32, table=table))
    assert bool(torch.isin(lost, levels).all())
