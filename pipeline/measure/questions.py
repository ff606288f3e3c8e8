"""What a section of a recipe asks: the problems of its tasks, and windows of its text."""

from __future__ import annotations

from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.text.windows import token_windows
from qtool.evaluate.tasks.loading import load_task, subset
from qtool.evaluate.tasks.problems import Task
from qtool.evaluate.tasks.solvable import solvable
from qtool.recipe.judging import EvaluateSection


def tasks_of(section: EvaluateSection) -> dict[str, Task]:
    """Name of a task in the recipe -> its problems, those alone that can be solved here."""
    found = {}
    for asked in section.tasks:
        task = load_task(asked.task, file=asked.file, revision=asked.revision, after=asked.after, before=asked.before)
        found[asked.task] = solvable(subset(task, asked.limit), section.timeout, section.sandbox)
    return found


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
