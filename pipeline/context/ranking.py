"""How much each piece says about a question: one function a method, each (question, repository) -> a score for each
piece, 0 where it has nothing to say. The same input gives the same scores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.context.history import changed_paths
from qtool.context.packages import required
from qtool.context.pieces import Piece

FUSED = 60  # of reciprocal ranks (Cormack, Clarke and Buettcher 2009)
COMMON = 5  # a name that more pieces define says little
BASE = 0.01  # of the walk's restarts, spread over all pieces
_WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*|[0-9]+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
Scores = list[float]


@dataclass(frozen=True)
class Repository:
    """A repository as the methods see it."""

    root: Path
    pieces: Sequence[Piece]

    @cached_property
    def words(self) -> list[list[str]]:
        """Of each piece, its path among them."""
        return [words(f"{piece.path}\n{piece.text}") for piece in self.pieces]

    @cached_property
    def index(self) -> Any:
        """BM25's, of the words."""
        ranker = required("bm25s").BM25()
        ranker.index(self.words, show_progress=False)
        return ranker

    @cached_property
    def graph(self) -> Any:
        """Who uses what: places of pieces, an arrow from one to each that defines a name it uses."""
        definers: dict[str, list[int]] = {}
        for i, piece in enumerate(self.pieces):
            for name in piece.names:
                definers.setdefault(name, []).append(i)
        weights: Counter[tuple[int, int]] = Counter()
        for i, piece in enumerate(self.pieces):
            for name, times in piece.uses.items():
                aims = definers.get(name, [])
                for aim in aims if len(aims) <= COMMON else ():
                    weights[i, aim] += times**0.5 / len(aims) if aim != i else 0
        graph = required("networkx").DiGraph()
        graph.add_nodes_from(range(len(self.pieces)))
        graph.add_weighted_edges_from((a, b, weight) for (a, b), weight in sorted(weights.items()) if weight)
        return graph

    @cached_property
    def changed(self) -> list[str]:
        """Paths, the one that was changed last first."""
        return changed_paths(self.root)


@dataclass(frozen=True)
class Method:
    """``outlined``: whether signatures stand for whole definitions; ``says``: what it ranks by."""

    score: Callable[[str, Repository], Scores]
    says: str
    outlined: bool = False


def words(text: str) -> list[str]:
    """Words and names in lower case, names of several words also taken apart."""
    found: list[str] = []
    for word in _WORD.findall(text):
        parts = _PART.findall(word)
        found += [part.lower() for part in parts]
        if len(parts) > 1:
            found.append(word.lower())
    return found


def lexical(question: str, repository: Repository) -> Scores:
    """BM25."""
    if not any(repository.words):
        return [0.0] * len(repository.pieces)
    known = [word for word in words(question) if word in repository.index.vocab_dict]
    return [float(one) for one in repository.index.get_scores(known)] if known else [0.0] * len(repository.pieces)


def keywords(question: str, repository: Repository) -> Scores:
    """Share of a piece's words that the question has: the plain density that reports propose."""
    asked = set(words(question))
    return [sum(word in asked for word in own) / len(own) if own else 0.0 for own in repository.words]


def recent(question: str, repository: Repository) -> Scores:
    """Files by their last commit, whatever the question. Raises QtoolError without a history."""
    if not repository.changed:
        raise QtoolError(f"{repository.root}: has no git history that can be read; take another --method.")
    places = {path: number for number, path in enumerate(repository.changed)}
    return [1 / (1 + places[piece.path]) if piece.path in places else 0.0 for piece in repository.pieces]


def referenced(question: str, repository: Repository) -> Scores:
    """PageRank over who uses what, from the pieces that the question's words lead to (the idea of aider's map)."""
    seeds = lexical(question, repository)
    total, number = sum(seeds), len(repository.pieces)
    start = {i: BASE / number + (seed / total if total else 0.0) for i, seed in enumerate(seeds)}
    required("scipy")  # networkx asks for it while it ranks
    ranks = required("networkx").pagerank(repository.graph, personalization=start, weight="weight")
    return [float(ranks[i]) for i in range(number)]


def mixed(question: str, repository: Repository) -> Scores:
    """Ranks of words, references and, at half their weight, changes: reciprocals added up."""
    total = [0.0] * len(repository.pieces)
    parts = [(lexical(question, repository), 1.0), (referenced(question, repository), 1.0)]
    if repository.changed:
        parts.append((recent(question, repository), 0.5))
    for scores, weight in parts:
        for place, i in enumerate(ordered(scores, repository.pieces), 1):
            total[i] += weight / (FUSED + place)
    return total


def ordered(scores: Scores, pieces: Sequence[Piece]) -> list[int]:
    """Places of the pieces that have a score, the best first; equals by path and line."""
    kept = [i for i, score in enumerate(scores) if score > 0]
    return sorted(kept, key=lambda i: (-scores[i], pieces[i].path, pieces[i].start))


METHODS = {
    "mixed": Method(mixed, "words, references and changes"),
    "lexical": Method(lexical, "words of the question (BM25)"),
    "outline": Method(referenced, "references, from the question's words on", outlined=True),
    "recent": Method(recent, "last commits"),
    "keywords": Method(keywords, "density of the question's words"),
}
