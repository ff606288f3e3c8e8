"""What a section of a recipe asks: the problems of its tasks, and windows of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.text.windows import token_windows
from qtool.evaluate.tasks import prompts
from qtool.evaluate.tasks.loading import load_task, subset
from qtool.evaluate.tasks.made import Making
from qtool.evaluate.tasks.problems import Task
from qtool.evaluate.tasks.prompts import Style
from qtool.evaluate.tasks.solvable import solvable
from qtool.evaluate.tasks.table import made
from qtool.recipe.judging import EvaluateSection, TaskSection
from qtool.recipe.long import MadeSection

SHOWN = 24_000  # characters of a prompt that readers of the answers are shown
LONG = "the long text"
TEMPLATE = 256  # tokens that a chat template and the question may add to a made prompt


def tasks_of(section: EvaluateSection, config: Any = None, tokenizer: Any = None) -> dict[str, Task]:
    """Name of a task in the recipe -> its problems, those alone that can be solved here. Raises QtoolError as
    `require_lengths`."""
    require_lengths(section, config)
    found = {}
    for asked in section.tasks:
        task = load_task(
            asked.task, file=asked.file, revision=asked.revision, after=asked.after, before=asked.before,
            making=_making(asked, tokenizer),
        )  # fmt: skip
        found[asked.task] = solvable(subset(task, asked.limit), section.timeout, section.sandbox)
    return found


def prompts_of(task: Task, style: Style, tokenizer: Any, config: Any) -> list[str]:
    """What the model is asked, word for word; nothing where a server applies its own template (``tokenizer`` None)."""
    if tokenizer is None:
        return []
    return prompts.render_all(task.problems, style, tokenizer, getattr(config, "vocab_size", None))


def require_lengths(section: EvaluateSection, config: Any) -> None:
    """Raises QtoolError where made prompts, or windows of the held-out text, are longer than the model's context, by
    transformers' ``config``: before anything is made or read."""
    most, answer = getattr(config, "max_position_embeddings", None), section.max_new_tokens
    if most is None:
        return
    room = most - answer - TEMPLATE
    for asked in section.tasks:
        lengths = (asked.made or MadeSection()).lengths if asked.task in made() else ()
        if beyond := [length for length in lengths if length > room]:
            fits = f"`lengths:` up to {room} fit" if room >= 512 else "no length that is made fits"
            raise QtoolError(
                f"tasks: {asked.task}: a prompt of {beyond[0]:,} tokens, {TEMPLATE} for a chat template and an answer "
                f"of {answer} are more than the model's context, {most:,} (max_position_embeddings in config.json); "
                f"{fits}."
            )
    too_long = [length for length in section.text.lengths if length > most] if section.text else []
    if too_long:
        raise QtoolError(
            f"text: windows of {too_long[0]} tokens are longer than the model's context, {most} "
            "(max_position_embeddings in config.json)."
        )


def require_room(section: EvaluateSection, tokenizer: Any) -> None:
    """Raises QtoolError where the shortest prompt that is made has no room for what it hides."""
    for asked in section.tasks:
        if (making := _making(asked, tokenizer)) is not None:
            load_task(asked.task, making=replace(making, lengths=(min(making.lengths),)))


def kept_whole(
    section: EvaluateSection, asking: Mapping[str, Sequence[str]] | None = None, tokenizer: Any = None
) -> list[str]:
    """A sentence for each window that lets go of nothing in the long text, or in a task. ``asking``: the prompts of
    each task; without them (`--dry-run`) nothing is said of tasks that are not made here. Raises QtoolError for a
    window that lets go of nothing in all that is put under it, where the recipe alone tells."""
    windows = [one.condition for one in section.conditions if one.condition.recent]
    sizes = {LONG: section.long.length} if section.long is not None and windows else {}
    told = all(asked.task in made() for asked in section.tasks)
    for asked in section.tasks if windows else ():
        longest = _longest(asked, (asking or {}).get(asked.task, ()), tokenizer)
        sizes |= {asked.task: longest + section.max_new_tokens} if longest else {}
    said = []
    for window in windows:
        held = window.sink + window.recent
        whole = [f"{what} has {'' if what == LONG else 'at most '}{n:,}" for what, n in sizes.items() if n <= held]
        if told and len(whole) == len(sizes):
            raise QtoolError(
                f"conditions: {window.name} keeps {held:,} tokens and would let go of nothing: {', '.join(whole)}. "
                "Take a smaller `recent:` or longer texts."
            )
        if whole:
            said.append(f"conditions: {window.name} keeps {held:,} tokens: it costs nothing where {', '.join(whole)}")
    return said


def _longest(asked: TaskSection, asking: Sequence[str], tokenizer: Any) -> int:
    """Tokens of a task's longest prompt, at most; 0 where they are not known."""
    if asked.task in made():
        return max((asked.made or MadeSection()).lengths) + TEMPLATE
    if not asking or tokenizer is None:
        return 0
    return max(len(ids) for ids in tokenizer(list(asking), verbose=False).input_ids)


def _making(asked: TaskSection, tokenizer: Any) -> Making | None:
    if asked.task not in made():
        return None
    given = asked.made or MadeSection()

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
    """Length -> windows of the held-out text int64 ``[samples, length]``. Raises QtoolError as `require_lengths`."""
    require_lengths(section, config)
    text = section.text
    if text is None:
        return {}
    rows = getattr(config, "vocab_size", None)
    return {length: token_windows(text.source(length), tokenizer, rows) for length in text.lengths}
