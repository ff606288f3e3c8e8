"""Which of a layer's matrices are worked on side by side, and which inputs are seen in one pass of the text.

Matrices that share an input are one problem: q, k and v; gate and up. The experts of a mixture are as many problems of
one shape, a stack: their weights are ``[E, out, in]``, their Gram matrices ``[E, in, in]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from qtool.convert.models.feeds import Feed, Matrix, Norm


@dataclass(frozen=True)
class Stack:
    """Problems of one shape: of matrices that every token meets one, of experts one each, in their order.

    problems: the matrices of each, which share its input; feeds: what they are part of, one for each problem or one for
    all (experts behind one norm, which share its scale).
    """

    problems: tuple[tuple[Matrix, ...], ...]
    feeds: tuple[Feed, ...]

    @property
    def name(self) -> str:
        """The first module: where the input of a plain stack is seen, and the key of the statistics."""
        return self.problems[0][0].module

    @property
    def consumers(self) -> tuple[Matrix, ...]:
        """All matrices."""
        return tuple(matrix for problem in self.problems for matrix in problem)

    @property
    def routed(self) -> bool:
        """Whether each problem is an expert, which meets the tokens alone that are sent to it."""
        return self.problems[0][0].expert is not None

    @property
    def gate(self) -> str:
        """As `Matrix.gate`, of all its matrices."""
        return self.problems[0][0].gate

    @property
    def inner(self) -> bool:
        """Whether an expert makes the input itself (of down), not the norm before the mixture (of gate and up)."""
        return self.routed and not isinstance(self.feeds[0].producer, Norm)

    def part(self, some: slice) -> Stack:
        """Some of its problems."""
        return Stack(self.problems[some], self.feeds[some] if len(self.feeds) > 1 else self.feeds)

    @property
    def adds(self) -> bool:
        """As `Feed.adds`."""
        return self.feeds[0].adds


@dataclass(frozen=True)
class Step:
    """Stacks whose inputs depend on none of each other's codes: they are seen in one pass, then rounded."""

    stacks: tuple[Stack, ...]


def steps_of(feeds: Sequence[Feed]) -> tuple[Step, ...]:
    """A layer's feeds in forward order, as steps: each a step of its own, but those behind the inputs of a mixture,
    which are its experts' and its shared expert's own, one together."""
    groups: list[list[Feed]] = []
    for feed in feeds:
        if not isinstance(feed.producer, Norm) and groups and groups[-1][0].routed and _within(groups[-1][0]):
            groups[-1].append(feed)
        else:
            groups.append([feed])
    return tuple(Step(tuple(_stacks(group))) for group in groups)


def stacks_of(feeds: Sequence[Feed]) -> tuple[Stack, ...]:
    """Those of all steps."""
    return tuple(stack for step in steps_of(feeds) for stack in step.stacks)


def _within(feed: Feed) -> bool:
    return not isinstance(feed.producer, Norm)


def _stacks(group: Sequence[Feed]) -> list[Stack]:
    """Experts first."""
    stacks = []
    routed = [feed for feed in group if feed.routed]
    if routed:
        experts = [matrix for feed in routed for matrix in feed.consumers if matrix.expert is not None]
        problems = tuple(tuple(own) for _, own in groupby(experts, lambda matrix: matrix.expert))
        stacks.append(Stack(problems, tuple(routed)))
    for feed in group:
        plain = tuple(matrix for matrix in feed.consumers if matrix.expert is None)
        if plain:
            stacks.append(Stack((plain,), (feed,)))
    return stacks
