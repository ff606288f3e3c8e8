"""The best pieces that a budget of tokens holds, and the prompt that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from qtool import QtoolError
from qtool.context.files import read_tree
from qtool.context.pieces import ELIDED, Piece, cut
from qtool.context.ranking import METHODS, Repository, ordered

CHARACTERS = 3  # of a token, where no tokenizer tells
BATCH = 64  # pieces that are counted at once
MISSES = 256  # pieces in a row that find no room: the search ends
Count = Callable[[Sequence[str]], list[int]]  # of each text, with what the tokenizer puts around every one


def by_characters(texts: Sequence[str]) -> list[int]:
    """Tokens of each, about."""
    return [-(-len(text) // CHARACTERS) for text in texts]


@dataclass(frozen=True)
class Chosen:
    """A piece that is shown. ``rank``: 1 the best; ``shown``: its text, or its outline; ``tokens``: its own."""

    piece: Piece
    rank: int
    shown: str
    tokens: int


@dataclass(frozen=True)
class Selection:
    """``tokens``: of ``prompt``, at most ``budget``; ``whole``: of all pieces' texts; ``chosen``: in the prompt's
    order; ``files``, ``pieces``: how many there are; ``left_out``: reason -> files."""

    method: str
    budget: int
    prompt: str
    tokens: int
    whole: int
    chosen: tuple[Chosen, ...]
    files: int
    pieces: int
    left_out: dict[str, int]


def select(root: Path, question: str, method: str, budget: int, count: Count = by_characters) -> Selection:
    """Read, cut, ranked, chosen. Raises QtoolError where the question alone breaks the budget."""
    tree = read_tree(root)
    repository = Repository(root, cut(tree.files))
    order = ranked(repository, question, method)
    *costs, every = count([*(piece.text for piece in repository.pieces), ""])
    prompt, tokens, taken = choose(repository.pieces, order, question, METHODS[method].outlined, budget, count)
    return Selection(
        method=method, budget=budget, prompt=prompt, tokens=tokens,
        whole=sum(costs) - every * len(costs),
        chosen=tuple(sorted(taken, key=lambda one: (one.piece.path, one.piece.start))), files=len(tree.files),
        pieces=len(repository.pieces), left_out=tree.left_out,
    )  # fmt: skip


def ranked(repository: Repository, question: str, method: str) -> list[int]:
    """Places of pieces, the best first."""
    return ordered(METHODS[method].score(question, repository), repository.pieces)


def choose(
    pieces: Sequence[Piece], order: Sequence[int], question: str, outlined: bool, budget: int, count: Count
) -> tuple[str, int, list[Chosen]]:
    """(prompt, its tokens, what it holds): pieces in their order, as long as there is room; one that has none is passed
    over. ``outlined``: signatures alone."""
    alone, every = count([render([], question), ""])  # the prompt alone has the tokens that begin and end every text
    if alone > budget:
        raise QtoolError(f"--budget {budget}: the question alone takes {alone:,} tokens.")
    room, misses, taken = budget - alone, 0, list[Chosen]()
    paths: set[str] = set()
    for begin in range(0, len(order), BATCH):
        part = [pieces[i] for i in order[begin : begin + BATCH]]
        shown = [piece.outline if outlined else piece.text for piece in part]
        costs = count([f"{text}\n{ELIDED}\n" for text in shown])
        heads = count([_head(piece.path) for piece in part])
        for number, (piece, text, cost, head) in enumerate(zip(part, shown, costs, heads, strict=True)):
            cost -= every
            needed = cost + (0 if piece.path in paths else head - every)
            if text and needed <= room:
                taken.append(Chosen(piece, begin + number + 1, text, cost))
                room, misses = room - needed, 0
                paths.add(piece.path)
            else:
                misses += bool(text)
        if misses >= MISSES:
            break
    prompt = render(taken, question)
    while (tokens := count([prompt])[0]) > budget:  # what stands side by side may take more tokens than alone
        taken.pop()
        prompt = render(taken, question)
    return prompt, tokens, taken


def _head(path: str) -> str:
    return f"### {path}\n"


def render(chosen: Sequence[Chosen], question: str) -> str:
    """Files by path, lines in their order, an ellipsis where lines are left out between them; the question last."""
    parts: list[str] = []
    ordered_pieces = sorted(chosen, key=lambda one: (one.piece.path, one.piece.start))
    for path, group in groupby(ordered_pieces, key=lambda one: one.piece.path):
        parts.append(_head(path))
        end = 0
        for one in group:
            if one.piece.start > end + 1 and end:
                parts.append(f"{ELIDED}\n" if one.piece.start > end + 4 else "\n" * (one.piece.start - end - 1))
            parts.append(f"{one.shown}\n")
            end = one.piece.end
        parts.append("\n\n")
    return "".join(parts) + question.rstrip("\n") + "\n"
