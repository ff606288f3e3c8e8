"""Which type each matrix gets, so that a file of a given size loses least; or the smallest file that loses no more than
is allowed.

A matrix (or several that share one type) has choices: bytes, and what it costs. One of each, the sum of bytes bounded,
the sum of costs least: the multiple-choice knapsack. It is solved exactly. Costs become integers first, so that sums do
not depend on their order and ties are ties. Then:

- a Lagrange multiplier gives a bound from below, and by its steps, taken as far as they fit, a solution to begin with
  (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979);
- matrix by matrix the sums that nothing else beats in both bytes and cost are kept (dynamic programming on the Pareto
  front), without those that the bound proves to end behind the solution at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

UNITS = 1 << 40  # into which about the largest sum of costs is cut: float64 holds sums of these, int64 too


@dataclass(frozen=True)
class Choice:
    """A type for a matrix: its bytes, and what it costs (nats a token that it adds to the model's KL)."""

    type: str
    nbytes: int
    cost: float


Offers = Mapping[str, Sequence[Choice]]
"""Matrix -> what it can be stored in."""
Mix = dict[str, Choice]
"""Matrix -> what it is stored in."""


def front(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Those that no other beats in bytes and cost, smallest first; of equal ones the first by name."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.nbytes, one.cost, one.type)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return tuple(kept)


def together(members: Sequence[Sequence[Choice]]) -> tuple[Choice, ...]:
    """Choices of matrices that must share one type: what all of them offer, added up."""
    first, *others = members
    found = []
    for choice in first:
        same = [next((one for one in other if one.type == choice.type), None) for other in others]
        chosen = [choice, *(one for one in same if one is not None)]
        if len(chosen) == len(members):
            nbytes = sum(one.nbytes for one in chosen)
            found.append(Choice(choice.type, nbytes, math.fsum(one.cost for one in chosen)))
    return tuple(found)


def bounds(offers: Offers) -> tuple[int, int]:
    """(bytes of the smallest mix, bytes beyond which nothing is gained)."""
    fronts = [front(choices) for choices in offers.values()]
    return sum(own[0].nbytes for own in fronts), sum(own[-1].nbytes for own in fronts)


def size_of(mix: Mapping[str, Choice]) -> int:
    """Bytes."""
    return sum(choice.nbytes for choice in mix.values())


def cost_of(mix: Mapping[str, Choice]) -> float:
    """Nats a token."""
    return math.fsum(choice.cost for choice in mix.values())


def cheapest(offers: Offers, nbytes: int) -> Mix | None:
    """The mix of at most ``nbytes`` that costs least, of several such the smallest; None where even the smallest is
    larger. Raises ValueError for a cost that is no number."""
    fronts, unit = _counted(offers)
    rows = [[(choice.nbytes, round(choice.cost / unit)) for choice in own] for own in fronts]
    return _picked(offers, fronts, _solve(rows, nbytes))


def smallest(offers: Offers, cost: float) -> Mix | None:
    """The smallest mix that costs at most ``cost``, of several such the one that costs least; None where even the
    costliest types lose more. Raises ValueError for a cost that is no number."""
    fronts, unit = _counted(offers)
    # every cost rounded up: what is found keeps the bound
    rows = [[(math.ceil(choice.cost / unit), choice.nbytes) for choice in own] for own in fronts]
    return _picked(offers, fronts, _solve(rows, math.floor(cost / unit)))


def curve(offers: Offers) -> list[tuple[int, float]]:
    """(bytes, cost) of the mixes that a Lagrange multiplier finds, from the smallest mix to the largest: the lower
    convex hull of all mixes."""
    fronts, unit = _counted(offers)
    rows = [[(choice.nbytes, round(choice.cost / unit)) for choice in own] for own in fronts]
    nbytes, cost = sum(own[0][0] for own in rows), sum(own[0][1] for own in rows)
    found = [(nbytes, cost * unit)]
    for step in _steps(rows):
        nbytes, cost = nbytes + step.weight, cost - step.gain
        found.append((nbytes, cost * unit))
    return found


Rows = list[list[tuple[int, int]]]  # of each matrix (weight, value), what is bounded and what is least; weights grow


@dataclass(frozen=True)
class _Step:
    """From one corner of a matrix's hull to the next: what it weighs, what the value falls by."""

    item: int
    to: int
    weight: int
    gain: int


def _counted(offers: Offers) -> tuple[list[tuple[Choice, ...]], float]:
    """(each matrix's front, the unit in which costs are whole numbers)."""
    wrong = [name for name, choices in offers.items() for one in choices if not 0 <= one.cost < math.inf]
    if wrong:
        raise ValueError(f"{wrong[0]}: a cost is no number")
    fronts = [front(choices) for choices in offers.values()]
    most = math.fsum(own[0].cost for own in fronts)
    return fronts, 2.0 ** math.frexp(most)[1] / UNITS  # a power of two: costs that tie still do


def _picked(offers: Offers, fronts: Sequence[Sequence[Choice]], places: list[int] | None) -> Mix | None:
    if places is None:
        return None
    return {name: own[place] for name, own, place in zip(offers, fronts, places, strict=True)}


def _solve(rows: Rows, limit: int) -> list[int] | None:
    """The place of each matrix's choice: the sum of weights at most ``limit``, that of values least."""
    order = [sorted(range(len(own)), key=lambda place, own=own: own[place]) for own in rows]  # type: ignore[misc]
    rows = [[own[place] for place in places] for own, places in zip(rows, order, strict=True)]
    if sum(own[0][0] for own in rows) > limit:
        return None
    value, price = _begun(rows, limit)
    tails = _tails(rows, price)
    return [places[place] for places, place in zip(order, _walked(rows, limit, value, price, tails), strict=True)]


def _steps(rows: Rows) -> list[_Step]:
    """All steps along the hulls, those that gain most for their weight first."""
    steps = [step for item, own in enumerate(rows) for step in _hull(item, own)]
    return sorted(steps, key=lambda step: (-Fraction(step.gain, step.weight), step.item, step.to))


def _hull(item: int, own: Sequence[tuple[int, int]]) -> list[_Step]:
    """The lower convex hull of one matrix's choices, as steps of falling gain for their weight."""
    corners = [0]
    for place in range(1, len(own)):
        if own[place][1] >= own[corners[-1]][1] or own[place][0] <= own[corners[-1]][0]:
            continue
        while len(corners) > 1:
            (w0, v0), (w1, v1), (w2, v2) = own[corners[-2]], own[corners[-1]], own[place]
            if (v0 - v1) * (w2 - w1) > (v1 - v2) * (w1 - w0):
                break
            corners.pop()
        corners.append(place)
    return [_Step(item, b, own[b][0] - own[a][0], own[a][1] - own[b][1]) for a, b in pairwise(corners)]


def _begun(rows: Rows, limit: int) -> tuple[int, float]:
    """(value of a mix that fits, the multiplier: what the value falls by for the last weight that fitted)."""
    weight, value = sum(own[0][0] for own in rows), sum(own[0][1] for own in rows)
    price, stopped = 0.0, set[int]()
    for step in _steps(rows):
        if step.item in stopped:
            continue
        if weight + step.weight > limit:
            stopped.add(step.item)
            price = price or step.gain / step.weight
            continue
        weight, value = weight + step.weight, value - step.gain
    return value, price


def _tails(rows: Rows, price: float) -> list[float]:
    """Of the matrices from each place on: the least that value and priced weight add up to."""
    least = [min(value + price * weight for weight, value in own) for own in rows]
    tails = [0.0]
    for one in reversed(least):
        tails.append(tails[-1] + one)
    return tails[::-1]


def _walked(rows: Rows, limit: int, value: int, price: float, tails: Sequence[float]) -> list[int]:
    """Dynamic programming. ``value``: of a mix that fits; sums that cannot end below it are dropped."""
    weights, values = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    back: list[tuple[Tensor, Tensor]] = []
    slack = 16.0 + 1e-9 * (abs(tails[0]) + price * limit)  # of float64 sums
    left = _least_weights(rows)
    for number, own in enumerate(rows):
        added = torch.tensor(own, dtype=torch.int64)
        all_weights, all_values = (
            (sums[None, :] + added[:, place, None]).flatten() for place, sums in enumerate((weights, values))
        )
        bound = all_values.double() + price * all_weights.double() + tails[number + 1] - price * limit
        keep = ((all_weights + left[number + 1] <= limit) & (bound <= value + slack)).nonzero().flatten()
        keep = keep[all_values[keep].argsort(stable=True)]
        keep = keep[all_weights[keep].argsort(stable=True)]
        kept = all_values[keep]
        falls = torch.ones(len(kept), dtype=torch.bool)
        falls[1:] = kept[1:] < kept.cummin(0).values[:-1]
        keep = keep[falls]
        back.append((keep % len(weights), keep // len(weights)))
        weights, values = all_weights[keep], all_values[keep]
    at, places = len(weights) - 1, []  # values fall along the front: the last is least
    for parents, choices in reversed(back):
        places.append(int(choices[at]))
        at = int(parents[at])
    return places[::-1]


def _least_weights(rows: Rows) -> list[int]:
    sums = [0]
    for own in reversed(rows):
        sums.append(sums[-1] + min(weight for weight, _ in own))
    return sums[::-1]
