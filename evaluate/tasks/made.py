"""Problems that are made here: long files of code out of templates, so that no model has seen one.

A file is blocks, two blank lines apart. Needles (what the question asks for) lie at a depth that is told, look-alikes
anywhere, filler between them; its length is told in the model's own tokens. What is judged is the answer together with
the needles and look-alikes alone, which the sandbox runs in no time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtool import QtoolError
from qtool.evaluate.tasks.extract import completed, program_from_chat, program_from_completion
from qtool.evaluate.tasks.filler import filler_block
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.rows import Row

APART = "\n\n\n"
CHARACTERS = 3  # of a token, where no tokenizer tells
CHECKED = 60_000  # characters of a prompt whose known answers go through the harness first; longer ones are made alike
CHAT = (
    "This is a Python file.\n\n```python\n{context}\n```\n\nComplete this function, which stands below it. Answer with "
    "the whole function in one Python code block; what the file defines can be used.\n\n```python\n{question}```"
)
Count = Callable[[Sequence[str]], list[int]]


def by_characters(texts: Sequence[str]) -> list[int]:
    """Tokens of each, about."""
    return [-(-len(text) // CHARACTERS) for text in texts]


@dataclass(frozen=True)
class Making:
    """``lengths``: tokens of a prompt; ``depths``: how many, evenly from a file's beginning (0) to its end (1);
    ``look_alikes``: of each needle, in one half of the problems (the other half, the control, has none); ``each``:
    problems of one length, depth and half; ``count``: tokens of each text."""

    lengths: tuple[int, ...] = (2048, 8192)
    depths: int = 3
    look_alikes: int = 6
    each: int = 2
    seed: int = 0
    count: Count = by_characters

    @property
    def problems(self) -> int:
        """How many."""
        return len(self.lengths) * self.depths * self.each * (2 if self.look_alikes else 1)


@dataclass(frozen=True)
class Puzzle:
    """What a file hides. ``needles``: blocks, the first of which lies at the depth that is told; ``others``: blocks
    that look like them; ``question``: a function's head with its docstring; ``answer``: its body; ``test``: defines
    check(candidate); ``entry``: the function's name; ``usable``: whether the answer may call needles and look-alikes.
    """

    needles: tuple[str, ...]
    others: tuple[str, ...]
    question: str
    answer: str
    test: str
    entry: str = "solve"
    usable: bool = True


Lay = Callable[[random.Random, Puzzle, float, int, Making], list[str]]


def make_problems(
    name: str, making: Making, puzzle: Callable[[random.Random, int], Puzzle], lay: Lay | None = None
) -> list[Problem]:
    """A problem for each length, depth, half and number. ``puzzle(random, look-alikes)`` hides something;
    ``lay(random, puzzle, depth, tokens, making)``: the blocks of a file so long (None: `laid`). Raises QtoolError for
    a length that the puzzle alone fills."""
    found = []
    for level, length in enumerate(making.lengths, 1):
        for step in range(making.depths):
            depth = step / (making.depths - 1) if making.depths > 1 else 0.5
            for k in (making.look_alikes, 0) if making.look_alikes else (0,):
                for number in range(making.each):
                    told = f"{name}/{length}/{depth:.2f}/{k}/{number}"
                    drawn = random.Random(f"{making.seed}:{told}")
                    hidden = puzzle(drawn, k)
                    room = length - sum(making.count([hidden.question])) - 8
                    blocks = (lay or laid)(drawn, hidden, depth, room, making)
                    found.append(_problem(name, told, level, hidden, blocks))
    return found


def _problem(name: str, task_id: str, level: int, hidden: Puzzle, blocks: list[str]) -> Problem:
    context = APART.join(blocks)
    usable = (*hidden.needles, *hidden.others) if hidden.usable else ()
    return Problem(
        task_id=task_id, prompt=context + APART + hidden.question, entry_point=hidden.entry,
        canonical_solution=hidden.answer, test=hidden.test, level=level, format=name,
        instruction=CHAT.format(context=context, question=hidden.question), setup=APART.join(sorted(usable)),
    )  # fmt: skip


def laid(drawn: random.Random, hidden: Puzzle, depth: float, tokens: int, making: Making) -> list[str]:
    """Needles from ``depth`` on, evenly around the file; look-alikes anywhere."""
    fixed = [*hidden.needles, *hidden.others]
    filler = fill(drawn, tokens - _size(fixed, making), making)
    starts = [(depth + place / len(hidden.needles)) % 1.0 if place else depth for place in range(len(hidden.needles))]
    places = [*starts, *(drawn.random() for _ in hidden.others)]
    at = sorted(zip(places, range(len(fixed)), strict=True))
    blocks, begun = [], 0
    for place, which in at:
        end = round(place * len(filler))
        blocks += [*filler[begun:end], fixed[which]]
        begun = max(begun, end)
    return blocks + filler[begun:]


def fill(drawn: random.Random, tokens: int, making: Making) -> list[str]:
    """Blocks of filler that take so many tokens, or a little less. Raises QtoolError where none has room."""
    if tokens < 0:
        raise QtoolError(
            f"made: a length of {min(making.lengths)} tokens is too short for {making.look_alikes} look-alikes; take "
            "longer ones, or fewer of these."
        )
    blocks: list[str] = []
    while True:
        more = [filler_block(drawn) for _ in range(64)]
        for block, size in zip(more, making.count([block + APART for block in more]), strict=True):
            tokens -= size
            if tokens < 0:
                return blocks
            blocks.append(block)


def _size(blocks: Sequence[str], making: Making) -> int:
    return sum(making.count([block + APART for block in blocks]))


def question_of(problem: Problem) -> str:
    """The function that is asked for, at the prompt's end."""
    return problem.prompt.rpartition(APART)[2]


def finished(problem: Problem, text: str) -> bool:
    """Whether the function is over."""
    return completed(question_of(problem), text, problem.entry_point)


def from_text(problem: Problem, text: str) -> str:
    """What may be called, and the function with its end."""
    made = program_from_completion(question_of(problem), text, problem.entry_point)
    return problem.setup + APART + made


def from_reply(problem: Problem, text: str) -> str:
    """The same out of a chat model's reply."""
    return problem.setup + APART + program_from_chat(text, question_of(problem), problem.entry_point)


def checked(problem: Problem) -> bool:
    """Whether its known answers are put to the harness: those of long prompts would parse for minutes."""
    return len(problem.prompt) <= CHECKED


def no_rows(where: str, row: Row) -> None:
    """Raises QtoolError: these problems are in no file."""
    raise QtoolError(f"{where}: problems of this kind are made, and read from no file.")
