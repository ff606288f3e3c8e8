"""Allocation: against every mix there is, on ties, in both directions; and at the size of a real model."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch

from qtool.quantize import allocation
from qtool.quantize.allocation import Choice, Offers


def offers_of(seed: int, matrices: int, types: int, coarse: bool) -> Offers:
    """Random ones, many beaten by others; ``coarse``: few different numbers, so that mixes tie."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for number in range(matrices):
        sizes = torch.randint(1, 9 if coarse else 4000, (types,), generator=generator).tolist()
        costs = torch.rand(types, generator=generator, dtype=torch.float64)
        told = (costs * 4).round().tolist() if coarse else costs.tolist()
        made[f"m{number}"] = [
            Choice(f"t{i}", size, cost) for i, (size, cost) in enumerate(zip(sizes, told, strict=True))
        ]
    return made


def every(offers: Offers) -> list[tuple[int, float]]:
    """(bytes, cost) of all mixes."""
    return [
        (sum(one.nbytes for one in mix), math.fsum(one.cost for one in mix))
        for mix in itertools.product(*offers.values())
    ]


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("coarse", [True, False])
def test_against_every_mix(seed: int, coarse: bool) -> None:
    offers = offers_of(seed, 6, 4, coarse)
    mixes = every(offers)
    sizes = sorted(nbytes for nbytes, _ in mixes)
    for limit in (sizes[0] - 1, sizes[0], sizes[len(sizes) // 3], sizes[len(sizes) // 2] + 1, sizes[-1], 10**9):
        fitting = [(cost, nbytes) for nbytes, cost in mixes if nbytes <= limit]
        found = allocation.cheapest(offers, limit)
        if not fitting:
            assert found is None
            continue
        assert found is not None
        assert list(found) == list(offers)
        assert all(choice in offers[name] for name, choice in found.items())
        cost, nbytes = min(fitting)
        assert allocation.cost_of(found) == pytest.approx(cost, abs=1e-9)
        assert allocation.size_of(found) <= limit
        if coarse:  # costs are whole numbers: a tie is one, and the smaller mix of a tie is taken
            assert allocation.size_of(found) == nbytes


@pytest.mark.parametrize("seed", range(15))
def test_smallest_against_every_mix(seed: int) -> None:
    offers = offers_of(seed, 6, 4, coarse=False)
    mixes = every(offers)
    costs = sorted(cost for _, cost in mixes)
    for most in (costs[0] / 2, costs[len(costs) // 4], costs[len(costs) // 2], costs[-1]):
        allowed = [nbytes for nbytes, cost in mixes if cost <= most * (1 - 1e-9)]
        found = allocation.smallest(offers, most)
        if not allowed:
            assert found is None or allocation.cost_of(found) <= most
            continue
        assert found is not None
        assert allocation.size_of(found) <= min(allowed)
        assert allocation.cost_of(found) <= most


def test_the_same_mix_whatever_the_order_of_choices() -> None:
    offers = offers_of(3, 8, 5, coarse=True)
    turned = {name: tuple(reversed(choices)) for name, choices in offers.items()}
    assert allocation.cheapest(offers, 30) == allocation.cheapest(turned, 30)


def test_fronts_and_joined_choices() -> None:
    a = [Choice("big", 9, 0.0), Choice("worse", 5, 3.0), Choice("small", 4, 2.0), Choice("twin", 4, 2.0)]
    assert [choice.type for choice in allocation.front(a)] == ["small", "big"]
    joined = allocation.together([a, [Choice("small", 1, 0.5), Choice("other", 1, 0.0), Choice("big", 2, 0.25)]])
    assert joined == (Choice("big", 11, 0.25), Choice("small", 5, 2.5))


def test_a_curve_of_mixes_that_none_beats() -> None:
    offers = offers_of(5, 5, 4, coarse=False)
    found = allocation.curve(offers)
    assert (found[0][0], found[-1][0]) == allocation.bounds(offers)
    for nbytes, cost in found:
        best = allocation.cheapest(offers, nbytes)
        assert best is not None
        assert allocation.cost_of(best) == pytest.approx(cost, rel=1e-6, abs=1e-9)


def test_costs_that_are_no_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="m1: a cost is no number"):
        allocation.cheapest({"m0": [Choice("a", 1, 1.0)], "m1": [Choice("a", 1, math.nan)]}, 5)


def test_a_model_of_340_matrices_in_seconds() -> None:
    """Sizes of an 8B and of odd shapes; the optimum lies within the step of one matrix of Lagrange's bound."""
    bits = {"Q2_K": 42, "Q3_K": 55, "IQ4_XS": 68, "Q4_K": 72, "Q5_K": 88, "Q6_K": 105, "Q8_0": 136}  # of 16 weights
    generator = torch.Generator().manual_seed(0)
    offers = {}
    for number in range(340):
        weights = (4096 * 4096, 1024 * 4096, 14336 * 4096, 4096 * 2816)[number % 4]
        scale = float(torch.rand(1, generator=generator)) ** 4 * weights
        offers[f"m{number}"] = [
            Choice(
                kind,
                weights // 128 * n,
                scale * 2.0 ** (-n / 8) * (1 + 0.1 * float(torch.rand(1, generator=generator))),
            )
            for kind, n in bits.items()
        ]
    total = sum(own[3].nbytes for own in offers.values())
    begun = time.monotonic()
    found = allocation.cheapest(offers, total)
    assert time.monotonic() - begun < 20
    assert found is not None
    assert 0.9999 * total < allocation.size_of(found) <= total
    below = max(point for point in allocation.curve(offers) if point[0] <= total)
    assert allocation.cost_of(found) <= below[1]
