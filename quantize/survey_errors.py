"""What types lose of the matrices of layers, for a survey (survey.py): matrices that share an input are one problem,
and on an accelerator problems of one width are worked side by side, those of several layers, too.

A descent goes through the columns in turn, and some hundred rows keep a small part of an accelerator busy: its time is
that of the turns, whether one problem takes them or thirty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from qtool.convert.models.feeds import Matrix
from qtool.quantize.methods.method import Method
from qtool.quantize.precision import tensor_float32
from qtool.quantize.rounding import factorize

ROWS = 256  # of a matrix, evenly spaced, that are rounded to see what a type costs
DAMP = 0.1
LAYERS = 8  # whose problems lie side by side on an accelerator, at most
SHARE = 0.3  # of its memory, which their sums may take

Costs = dict[str, dict[str, float]]
"""Module -> type -> nats a token."""


@dataclass
class Member:
    """One matrix of a problem. ``some [rows, in]`` of its ``out`` rows, those numbered ``rows``; ``weighed [in, in]``:
    H and ``outputs [out]``: Σ_t g_to², of the ``tokens`` that tell what an error costs."""

    module: str
    types: tuple[str, ...]
    some: Tensor
    rows: Tensor
    weighed: Tensor
    outputs: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, module: str, types: Sequence[str], weight: Tensor, device: torch.device) -> Member:
        """No token met yet."""
        out, columns = weight.shape
        rows = spaced(out, ROWS)
        some = weight[rows].to(device)
        rows = rows.to(device)
        weighed, outputs = torch.zeros(columns, columns, device=device), torch.zeros(out, device=device)
        return cls(module, tuple(types), some, rows, weighed, outputs)

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """A window that tells costs: ``[tokens, in]``, ``[tokens, out]``."""
        x, squares = inputs.float(), gradient.float().square()
        with tensor_float32():
            self.weighed += (x * squares.sum(1, keepdim=True)).t() @ x
        self.outputs += squares.sum(0)
        self.tokens += len(x)

    def cost(self, error: Tensor) -> float:
        """Nats a token of ``error [rows, in]``, as a share of all."""
        share = self.outputs[self.rows] / self.outputs.sum().clamp_min(1e-30)
        with tensor_float32():
            lost = (share * ((error @ self.weighed) * error).sum(1)).sum()
        return max(0.0, float(lost)) * len(self.outputs) / len(self.rows) / (2 * self.tokens)


@dataclass
class Problem:
    """Matrices of one layer that share an input. ``gram``: of the windows that tell how to round, ``[in, in]``; of a
    method that does not compensate its diagonal ``[in]``."""

    gram: Tensor
    members: list[Member] = field(default_factory=list)

    def add(self, inputs: Tensor) -> None:
        """A window that tells how to round: ``[tokens, in]``."""
        x = inputs.float()
        self.gram += x.t() @ x if self.gram.ndim == 2 else x.square().sum(0)

    @property
    def alike(self) -> tuple[int, tuple[str, ...]]:
        """Problems in which this is equal can lie side by side."""
        return len(self.gram), self.members[0].types

    @property
    def rows(self) -> int:
        """Of all its members."""
        return sum(len(member.some) for member in self.members)


def problems_of(
    groups: Sequence[Sequence[Matrix]], weights: Callable[[Matrix], Tensor], at: str,
    types: Mapping[str, Sequence[str]], device: torch.device, compensates: bool = True,
) -> list[Problem]:  # fmt: skip
    """One for each group of matrices that share an input and may get the same types; ``at``: the layer's prefix;
    ``compensates``: as the method says."""
    found = []
    for group in groups:
        asked = [matrix for matrix in group if at + matrix.module in types]
        for own, members in groupby(asked, lambda matrix: tuple(types[at + matrix.module])):
            made = [Member.of(at + one.module, own, weights(one), device) for one in members]
            columns = made[0].some.shape[1]
            found.append(Problem(torch.zeros(columns, *[columns] * compensates, device=device), made))
    return found


def costs_of(problems: Sequence[Problem], method: Method, ready: Callable[[str], None]) -> Costs:
    """What each type of each member costs. On an accelerator problems of one kind together. ``ready``: called before a
    type is rounded to. The problems are used up."""
    found = Costs()
    alone = problems[0].gram.device.type == "cpu" if problems else True
    ordered = sorted(problems, key=lambda one: one.alike)
    for _, group in groupby(ordered, lambda one: one.alike):
        some = list(group)
        for part in [[one] for one in some] if alone else [some]:
            found |= _tried(part, method, ready)
    return found


def _tried(problems: Sequence[Problem], method: Method, ready: Callable[[str], None]) -> Costs:
    rows = max(problem.rows for problem in problems)
    weight = torch.stack([_padded(problem, rows) for problem in problems])
    gram = torch.stack([problem.gram for problem in problems])
    for number, problem in enumerate(problems):
        problem.gram = gram[number]  # the sum itself is let go
    if len(problems) == 1:
        weight, gram = weight[0], gram[0]
    factor = factorize(gram, DAMP) if method.compensates else None
    found: Costs = {member.module: {} for problem in problems for member in problem.members}
    for kind in problems[0].members[0].types:
        ready(kind)
        error = method.trial(weight, kind, gram, factor) - weight.float()
        for problem, own in zip(problems, error.view(-1, rows, len(problems[0].gram)), strict=True):
            parts = own[: problem.rows].split([len(member.some) for member in problem.members])
            for member, lost in zip(problem.members, parts, strict=True):
                found[member.module][kind] = member.cost(lost)
    return found


def _padded(problem: Problem, rows: int) -> Tensor:
    """Its members' rows below each other, and rows of zeros."""
    weight = torch.cat([member.some for member in problem.members])
    return torch.nn.functional.pad(weight, (0, 0, 0, rows - len(weight)))


def layers_at_once(device: torch.device, layer_bytes: int) -> int:
    """How many layers' problems are worked side by side. ``layer_bytes``: of one layer's sums. It depends on the card
    and not on what is free there: the order of sums is the same next time."""
    if device.type == "cpu":
        return 1
    total = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(LAYERS, int(SHARE * total / max(1, layer_bytes))))


def spaced(count: int, most: int) -> Tensor:
    """At most ``most`` whole numbers below ``count``, evenly."""
    return torch.arange(count) if count <= most else (torch.arange(most) * count) // most
