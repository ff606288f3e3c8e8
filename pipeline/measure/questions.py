"""What a section of a recipe asks: the problems of its tasks, and windows of its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.text.windows import token_windows
from qtool.evaluate.tasks.loading import load_task, subset
from qtool.evaluate.tasks.made import Making
from qtool.evaluate.tasks.problems import Task
from qtool.evaluate.tasks.solvable import solvable
from qtool.evaluate.tasks.table import made
from qtool.recipe.judging import EvaluateSection, TaskSection
from qtool.recipe.long import MadeSection

SHOWN = 24_000  # characters of a prompt that readers of the answers are shown
TEMPLATE = 256  # tokens that a chat template and the question may add to a made prompt


def tasks_of(section: EvaluateSection, config: Any = None, tokenizer: Any = None) -> dict[str, Task]:
    """Name of a task in the recipe -> its problems, those alone that can be solved here. Raises QtoolError where made
    ones are longer than the model's context, by transformers' ``config``."""
    found = {}
    for asked in section.tasks:
        task = load_task(
            asked.task, file=asked.file, revision=asked.revision, after=asked.after, before=asked.before,
            making=_making(asked, section.max_new_tokens, config, tokenizer),
        )  # fmt: skip
        found[asked.task] = solvable(subset(task, asked.limit), section.timeout, section.sandbox)
    return found


def _making(asked: TaskSection, answer: int, config: Any, tokenizer: Any) -> Making | None:
    if asked.task not in made():
        return None
    given = asked.made or MadeSection()
    most = getattr(config, "max_position_embeddings", None)
    room = None if most is None else most - answer - TEMPLATE
    beyond = [length for length in given.lengths if room is not None and length > room]
    if beyond and room is not None:
        fits = f"`lengths:` up to {room} fit" if room >= 512 else "no length that is made fits"
        raise QtoolError(
            f"tasks: {asked.task}: a prompt of {beyond[0]:,} tokens and an answer of {answer} are more than the "
            f"model's context, {most:,} (max_position_embeddings in config.json); {fits}."
        )

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids]

    counted = {} if tokenizer is None else {"count": count}
    return Making(given.lengths, given.depths, given.look_alikes, given.each, given.seed, **counted)


def shown(prompt: str) -> str:
    """A prompt as readers get it: of a long one beginning and end."""
    if len(prompt) <= SHOWN:
        return prompt
    half = SHOWN // 2
    return f"{prompt[:half]}\n\n[… {len(prompt) - SHOWN:,} characters …]\n\n{prompt[-half:]}"


def windows_of(section: EvaluateSection, config: Any, tokenizer: Any) -> dict[int, torch.Tensor]:
    """Length -> windows of the held-out text int64 ``[samples, length]``. Raises QtoolError where the model's context,
    by transformers' ``config``, is shorter."""
    text = section.text
    if text is None:
        return {}
    limit = getattr(config, "max_position_embeddings", None)
    too_long = [length for length in text.lengths if limit is not None and length > limit]
    if too_long:
        raise QtoolError(
            f"text: windows of {too_long[0]} tokens are longer than the model's context, {limit} "
            "(max_position_embeddings in config.json)."
        )
    rows = getattr(config, "vocab_size", None)
    return {length: token_windows(text.source(length), tokenizer, rows) for length in text.lengths}
