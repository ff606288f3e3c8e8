"""Who rounds an output together, and that a row's codes do not depend on which other rows are rounded beside it."""

from __future__ import annotations

import pytest
import torch

from qtool.quantize import crew, descent
from qtool.quantize.chosen import Chosen, Levels
from qtool.quantize.crew import SOLO, Crew, Pieces, crews_of
from qtool.quantize.methods import kquant_rounding
from qtool.quantize.ranks import Ranks
from qtool.quantize.rounding import factorize, propagated_target
from qtool.quantize.statistics import InputStatistics


def test_ranks_without_an_output_help_those_that_have_most_to_do() -> None:
    """Crews of one, two or four, so that all members have as many pieces; a rank with two outputs is not helped."""
    assert crews_of([8], [0], 1) == [(0,)]
    assert crews_of([8], [0], 2) == [(0, 1)]
    assert crews_of([8], [0], 3) == [(0, 1)]
    assert crews_of([8], [0], 8) == [(0, 1, 2, 3)]
    assert crews_of([6, 8], [1, 0], 4) == [(1, 3), (0, 2)]
    assert crews_of([6, 8, 6], [1, 0, 2], 4) == [(1,), (0, 3), (2,)]
    assert crews_of([8, 6, 6], [0, 1, 1], 2) == [(0,), (1,), (1,)]
    assert crews_of([8, 0], [0, 1], 2) == [(0, 1), (1,)]  # the second output takes no Gram matrices


def test_only_large_matrices_are_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Llama-3.1-8B all four inputs; nothing of SmolLM2, and no experts."""
    for out, columns in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        assert Pieces.of(SOLO, torch.empty(out, columns, device="meta")).number == 4
    assert Pieces.of(SOLO, torch.empty(3072, 576, device="meta")).number == 1
    assert Pieces.of(SOLO, torch.empty(8, 28672, 4096, device="meta")).number == 1
    assert Pieces.of(SOLO, torch.empty(4100, 14336, device="meta")).number == 1  # does not divide
    monkeypatch.setattr(crew, "LEAST", 1)
    assert Pieces.of(SOLO, torch.empty(256, 8, device="meta")).number == 4
    assert Pieces.of(SOLO, torch.empty(256, 8, device="meta"), divided=False).number == 1


def test_every_member_has_its_pieces() -> None:
    rows = torch.arange(24.0).view(8, 3)
    found = [Pieces(Crew(Ranks(rank, 3), (0, 2)), 4).take(rows) for rank in (0, 2)]
    assert torch.equal(torch.cat(found).flatten(0, 1), rows)
    assert [len(part) for part in found] == [2, 2]
    assert Pieces(SOLO, 4).take(rows).shape == (4, 2, 3)
    assert torch.equal(Pieces(SOLO, 4).whole(Pieces(SOLO, 4).take(rows)), rows)
    assert Pieces(SOLO, 1).take(rows) is rows


def test_shares_cover_what_is_to_be_done() -> None:
    """Also where it does not divide, and where there is less than there are members."""
    for size in (1, 2, 4):
        members = tuple(range(size))
        for number in (1, 3, 4, 5, 40):
            parts = [Crew(Ranks(rank, size), members).share(range(number)) for rank in members]
            assert [item for part in parts for item in part] == list(range(number))


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """(weights ``[64, 256]``, a Gram matrix of their inputs)."""
    torch.manual_seed(1)
    x = torch.randn(900, 256) @ (torch.eye(256) + 0.3 * torch.randn(256, 256))
    return torch.randn(64, 256) * 0.1, x.t() @ x


@pytest.mark.parametrize(
    "levels",
    [
        Levels(15, 32, torch.float16), Levels(15, 64, torch.float16, sym=True),
        Levels(15, 64, torch.float32, table=tuple(float(n) / 8 - 1 for n in range(16))),
    ],
)  # fmt: skip
def test_descent_of_some_pieces_is_that_of_all(problem: tuple[torch.Tensor, torch.Tensor], levels: Levels) -> None:
    """To the bit; and what a piece gets is what descent on its rows alone finds."""
    weight, gram = problem
    factor = factorize(gram, 0.05)
    drift = torch.randn_like(weight)

    def rounded(pieces: torch.Tensor, lost: torch.Tensor) -> Chosen:
        goal = propagated_target(pieces, lost, factor, 0.5)
        return descent.descend(goal, descent.begin(goal, factor, levels), gram, levels)

    four, lost = weight.unflatten(0, (4, -1)), drift.unflatten(0, (4, -1))
    all_of_them = rounded(four, lost)
    for some in (slice(0, 2), slice(1, 2), slice(3, 4)):
        part = rounded(four[some], lost[some])
        for name in ("levels", "scale", "zero"):
            assert torch.equal(getattr(part, name), getattr(all_of_them, name)[some])
    alone = rounded(four[2], lost[2])
    assert torch.equal(alone.weights(), all_of_them.weights()[2])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_0", "Q8_0"])
def test_blocks_of_some_pieces_are_those_of_all(problem: tuple[torch.Tensor, torch.Tensor], kind: str) -> None:
    weight, gram = problem
    factor = factorize(gram, 0.05)
    four = weight.unflatten(0, (4, -1))
    whole = kquant_rounding.quantize(four, factor, gram, kind).data.unflatten(0, (4, -1))
    for some in (slice(0, 2), slice(3, 4)):
        part = kquant_rounding.quantize(four[some], factor, gram, kind).data.unflatten(0, (-1, 16))
        assert torch.equal(part, whole[some])


def test_a_drift_of_pieces_is_that_of_their_rows() -> None:
    stats, through = InputStatistics(), InputStatistics(through=torch.randn(8, 16))
    x = torch.randn(32, 16)
    for one in (stats, through):
        one.add(x, x + torch.randn_like(x))
    weight, helper = torch.randn(8, 16), Pieces(Crew(Ranks(1, 2), (0, 1)), 4)
    assert torch.allclose(stats.output_drift(helper.take(weight), helper).flatten(0, 1), (weight @ stats.drift)[4:])
    assert torch.equal(through.output_drift(helper.take(weight), helper).flatten(0, 1), through.drift[4:])
