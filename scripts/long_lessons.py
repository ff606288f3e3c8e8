"""What scripts/train_long_model.py learns from: rows of tokens, drawn anew for each step, with the class of each token.

A row is one text: definitions among filler, then several questions about it with their answers (one text, many things
to find). Names that the evaluation's problems draw are left out. Texts are cut at line breaks, which the tokenizer
never merges with what stands around them, so that the tokens of the pieces are those of the whole.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qtool.evaluate.tasks import long_call, long_change, long_combine
from qtool.evaluate.tasks.depots import Depot, codes, depot
from qtool.evaluate.tasks.filler import filler_block
from qtool.evaluate.tasks.made import APART, Making, question_of
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.table import made

PAD, TEXT, COPY, ANSWER = 0, 1, 2, 3  # classes of tokens: their losses are averaged apart
PROBE_ROOM = 96  # tokens that an answer may take beyond the prompt of a probe
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# What is asked meanwhile, and what scripts/check_long_tasks.py asks: their names are in no lesson.
PROBES = Making(tuple(length - PROBE_ROOM for length in LENGTHS[1:]), depths=2, look_alikes=3, each=4)
CHECKS = Making((2048, 4096, 8192, 16000, 32000), depths=5, look_alikes=6, each=4)
Piece = tuple[str, int]  # text, class
Block = list[Piece]


@cache
def held_out_names() -> frozenset[str]:
    """Functions and constants of the problems of PROBES and CHECKS."""
    found: set[str] = set()
    for benchmark in made().values():
        for making in (PROBES, CHECKS):
            for problem in benchmark.make(replace(making, count=no_filler)) if benchmark.make else ():
                found |= set(re.findall(r"\b(?:charge|WEIGHT)_[0-9a-fA-F]{4}\b", problem.prompt))
    return frozenset(found)


def no_filler(texts: Sequence[str]) -> list[int]:
    """Tokens as if what is hidden took none and filler all: names do not depend on how much filler there is."""
    return [0 if re.search("charge|weight|number", text) else 10**9 for text in texts]


def _spread(drawn: random.Random, number: int) -> list[str]:
    """So many different codes, in families of look-alikes."""
    found: list[str] = []
    while len(found) < number:
        (base,) = codes(drawn, 1, but=found)
        found.append(base)
        more = min(drawn.choice((0, 1, 3, 6)), number - len(found))
        if more:
            found += codes(drawn, more, base, found)
    return found


def _find(drawn: random.Random, length: int) -> tuple[list[Block], Block]:
    """Charges and weights, and questions of `long-call` and `long-combine` about them."""
    taken = set(held_out_names())
    most = max(2, min(100, length // 140))
    charged = [depot(drawn, code, taken) for code in _spread(drawn, drawn.randint(max(1, most // 4), most))]
    weights: list[tuple[str, str]] = []
    blocks: list[Block] = [[(one.block + APART, TEXT)] for one in charged]
    for code in _spread(drawn, drawn.randint(1, max(1, most // 2))):
        while (name := f"WEIGHT_{drawn.randrange(16**4):04X}") in taken:
            pass
        taken.add(name)
        weights.append((code, name))
        blocks.append([(long_combine.weight_block(name, drawn.randrange(3, 90), code) + APART, TEXT)])
    tail: Block = []
    asked = drawn.sample(charged, min(len(charged), length // 160, 48))
    for one in asked:
        if drawn.random() < 0.5:
            question, answer = long_call.question(one.code), one.call
        else:
            code, name = drawn.choice(weights)
            question, answer = long_combine.question(one.code, code), f"{one.call} * {name}"
            if len(charged) > 1 and drawn.random() < 0.5:
                other = drawn.choice([depot for depot in charged if depot is not one])
                question = long_combine.question(one.code, code, other.code)
                answer += f" + {other.call}"
        tail += [(question, TEXT), (f"    return {answer}\n", ANSWER), (APART[:-1], TEXT)]
    return blocks, tail[:-1]


def _index(drawn: random.Random, length: int) -> tuple[list[Block], Block]:
    """The same definitions, and a list of them: the shortest text that asks for every one."""
    taken = set(held_out_names())
    most = max(2, min(140, length // 110))
    charged = [depot(drawn, code, taken) for code in _spread(drawn, drawn.randint(max(1, most // 3), most))]
    tail: Block = []
    for one in drawn.sample(charged, len(charged)):
        tail += [(f"# Depot {one.code}:\n", TEXT), (f"    return {one.call}\n", ANSWER)]
    return [[(one.block + APART, TEXT)] for one in charged], tail


def _versions(drawn: random.Random, depots: list[Depot], altered: int, told: bool) -> tuple[list[Block], ...]:
    """Blocks of the first and of the second version, of which so many were altered. ``told``: the second says behind
    each block whether it was."""
    first, second = [], []
    for number, one in enumerate(depots):
        before = after = one.block
        verdict = "# As before.\n"
        if number < altered:
            other, new = long_change.altered(drawn, one)
            after, verdict = other.block, f"# Changed: {one.name!r}, {new}\n"
        elif drawn.random() < 0.8:
            before, after = long_change.commented(drawn, before)
        first.append([(before + APART, TEXT)])
        second.append([(after + "\n", COPY), (verdict, ANSWER), (APART[2:], COPY)] if told else [(after + APART, COPY)])
    return first, second


def _change(drawn: random.Random, length: int, told: bool) -> tuple[list[Block], list[Block], Block]:
    """Two versions and the question of `long-change`; ``told``: several changes, each marked, and no question."""
    taken = set(held_out_names())
    most = max(1, min(40, length // 350))
    depots = [depot(drawn, code, taken) for code in _spread(drawn, drawn.randint(1, most))]
    first, second = _versions(drawn, depots, len(depots) // 2 if told else 1, told)
    if told:
        return first, second, []
    name, keep = depots[0].name, depots[0].block.splitlines()
    new = next(line for line, old in zip(second[0][0][0].splitlines(), keep, strict=False) if line != old)
    old = next(old for line, old in zip(second[0][0][0].splitlines(), keep, strict=False) if line != old)
    number = next(a for a, b in zip(re.findall(r"\d+", new), re.findall(r"\d+", old), strict=True) if a != b)
    answer = f"    return ({name!r}, {number})\n"
    return first, second, [(APART[2:] + long_change.QUESTION, TEXT), (answer, ANSWER)]


class Encoder:
    """Pieces into tokens and their classes."""

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer))

    def of(self, blocks: list[Block]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens uint16, classes uint8) of each block."""
        encoded = iter(self.tokenizer.encode_batch([text for block in blocks for text, _ in block]))
        found = []
        for block in blocks:
            parts = [next(encoded).ids for _ in block]
            classes = [np.full(len(ids), kind, np.uint8) for ids, (_, kind) in zip(parts, block, strict=True)]
            found.append((np.array([i for ids in parts for i in ids], np.uint16), np.concatenate(classes)))
        return found

    def filler(self, drawn: random.Random, room: int, kind: int = TEXT) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks that take at most ``room`` tokens."""
        while True:
            blocks: list[Block] = [[(filler_block(drawn) + APART, kind)] for _ in range(min(64, room // 60 + 1))]
            for ids, classes in self.of(blocks):
                room -= len(ids)
                if room < 0:
                    return
                yield ids, classes

    def found(self, drawn: random.Random, length: int, lesson: Callable[..., tuple[list[Block], Block]]) -> np.ndarray:
        """A row [2, length] of tokens and classes: definitions among filler, questions behind."""
        blocks, tail = lesson(drawn, length)
        fixed, (end,) = self.of(blocks), self.of([tail])
        room = length - 1 - sum(len(ids) for ids, _ in fixed) - len(end[0])
        if room < 0:
            return self.found(drawn, length, lesson)
        body = [*fixed, *self.filler(drawn, room)]
        drawn.shuffle(body)
        return _row([*body, end], length)

    def changed(self, drawn: random.Random, length: int, told: bool) -> np.ndarray:
        """A row of two versions; see `_change`."""
        first, second, tail = _change(drawn, length, told)
        marks: list[Block] = [[(long_change.SEPARATOR.format(name) + APART, TEXT)] for name in ("First", "Second")]
        before, after, heads = self.of(first), self.of(second), self.of(marks)
        end = self.of([tail])[0] if tail else (np.zeros(0, np.uint16), np.zeros(0, np.uint8))
        fixed = sum(len(ids) for ids, _ in (*before, *after, *heads)) + len(end[0])
        if fixed + 1 > length:
            return self.changed(drawn, length, told)
        filler = list(self.filler(drawn, (length - 1 - fixed) // 2))
        again = [(ids, np.full(len(ids), COPY, np.uint8)) for ids, _ in filler]
        order = drawn.sample(range(len(before) + len(filler)), len(before) + len(filler))
        one, two = [*before, *filler], [*after, *again]
        return _row([heads[0], *(one[i] for i in order), heads[1], *(two[i] for i in order), end], length)

    def library(self, drawn: random.Random, length: int) -> np.ndarray:
        """A row out of the standard library's modules, from some line on."""
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        while sum(len(ids) for ids, _ in parts) < length:
            lines = drawn.choice(library()).splitlines(keepends=True)
            text = "".join(lines[drawn.randrange(len(lines)) :])[: length * 4]
            parts += [*self.of([[(text, COPY)]]), (np.zeros(1, np.uint16), np.full(1, COPY, np.uint8))]
        joined = _row(parts, sum(len(ids) for ids, _ in parts) + 1)
        return joined[:, :length]

    def rows(self, seed: str, length: int, number: int) -> np.ndarray:
        """[number, 2, length] uint16: the rows of one step."""
        drawn = random.Random(seed)
        made_rows = []
        for _ in range(number):
            draw = drawn.random()
            if draw < 0.45:
                made_rows.append(self.found(drawn, length, _find))
            elif draw < 0.6:
                made_rows.append(self.found(drawn, length, _index))
            elif draw < 0.9:
                made_rows.append(self.changed(drawn, length, told=draw > 0.75))
            else:
                made_rows.append(self.library(drawn, length))
        return np.stack(made_rows)

    def probes(self, length: int, number: int) -> tuple[np.ndarray, list[str]]:
        """Rows [number, 2, length] of the evaluation's own problems, the known answer behind each, and their tasks."""
        making = replace(PROBES, lengths=(length - PROBE_ROOM,), count=self.count)
        problems: list[tuple[str, Problem]] = []
        for name, benchmark in made().items():
            problems += [(name, problem) for problem in (benchmark.make(making) if benchmark.make else ())]
        random.Random(0).shuffle(problems)
        chosen = [problems[i % len(problems)] for i in range(number)]
        rows = []
        for _, problem in chosen:
            head = problem.prompt.removesuffix(question_of(problem))
            pieces = [(head, TEXT), (question_of(problem), TEXT), (problem.canonical_solution, ANSWER)]
            rows.append(_row(self.of([pieces]), length))
        return np.stack(rows), [name for name, _ in chosen]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        return [len(one.ids) for one in self.tokenizer.encode_batch(list(texts))]


def _row(parts: list[tuple[np.ndarray, np.ndarray]], length: int) -> np.ndarray:
    """[2, length]: the parts, the token 0 that ends a text, and padding."""
    row = np.zeros((2, length), np.uint16)
    ids, classes = np.concatenate([ids for ids, _ in parts]), np.concatenate([kinds for _, kinds in parts])
    row[0, : len(ids)], row[1, : len(ids)] = ids, classes
    row[1, len(ids)] = TEXT
    return row


@cache
def library() -> tuple[str, ...]:
    """Modules of the standard library, tests left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    kept = [p for p in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")) if "site-packages" not in p.parts]
    kept = [path for path in kept if path.parts[-2] not in ("idlelib", "test", "lib2to3", "encodings")]
    texts = [path.read_text(encoding="utf-8", errors="ignore").replace("\r", "") for path in kept]
    return tuple(text for text in texts if 2_000 < len(text) < 400_000)


def sample_texts() -> Iterator[str]:
    """What the tokenizer is trained on: lessons and the standard library, half and half."""
    drawn = random.Random("tokenizer")
    for text in drawn.sample(library(), min(150, len(library()))):
        yield text[:20_000]
        blocks, tail = _find(drawn, 8192)
        yield "".join(text for block in [*blocks, tail] for text, _ in block)
        yield APART.join(filler_block(drawn) for _ in range(30))
        first, second, tail = _change(drawn, 4096, told=False)
        yield "".join(text for block in [*first, *second, tail] for text, _ in block)
