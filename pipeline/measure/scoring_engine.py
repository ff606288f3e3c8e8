"""The engine that a recipe names, opened for one model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from qtool import QtoolError
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.engine import Model, Running, Use
from qtool.evaluate.engines.table import ENGINES
from qtool.evaluate.scorecard import Settings
from qtool.measure.subjects import Subject
from qtool.recipe.judging import EvaluateSection


def settings_of(section: EvaluateSection, device: torch.device, style: str) -> Settings:
    """What the scorecard says of the engine and its settings, known before a model is loaded. Engines that run a file
    as it is have the dtype `as stored`: source and artifact may differ in it, as they would in use."""
    engine = ENGINES[section.engine]
    first = next(iter(section.models.values()), None)
    version = engine.version(engine.facts, Model("", base_url=section.base_url or "", served=first))
    return Settings(
        engine=section.engine, version=version, dtype=engine.facts.dtype(device.type),
        device=engine.facts.place or device.type, prompt=style, max_new_tokens=section.max_new_tokens,
        temperature=section.temperature, top_p=section.top_p, seed=section.seed if section.temperature > 0 else None,
        noise="shared" if section.temperature > 0 and not engine.facts.place else "",
    )  # fmt: skip


def settings_for(settings: Settings, subject: Subject, trusted: bool) -> Settings:
    """``settings`` with the device and the dtype in which this model runs, where the engine takes each in its own.
    Raises QtoolError where the engine is not here or refuses the model."""
    used = ENGINES[settings.engine].used
    if used is None:
        return settings
    device, dtype = used(Model(subject.name, path=subject.path, trust_remote_code=trusted))
    return settings.model_copy(update={"device": device, "dtype": dtype})


def open_engine(
    section: EvaluateSection, subject: Subject, config: Any, tokenizer: Any, device: torch.device, trusted: bool,
    prompts: Sequence[str], condition: Condition = PLAIN,
) -> AbstractContextManager[Running]:  # fmt: skip
    """Load ``subject``; it is let go when the block ends. ``prompts`` tell how long a context must be. Raises
    QtoolError where this engine cannot run this model."""

    def context() -> int:
        lengths = (len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts)
        return max(lengths, default=0) + section.max_new_tokens

    engine = ENGINES[section.engine]
    model = Model(
        subject.name, path=subject.path, gguf=subject.gguf, stream=subject.stream, config=config, tokenizer=tokenizer,
        trust_remote_code=trusted, base_url=section.base_url or "",
        served=served_name(section, subject) if engine.facts.served else None,
    )  # fmt: skip
    return engine.open(model, Use(str(device), section.batch_size, context, condition=condition))


def served_name(section: EvaluateSection, subject: Subject) -> str | None:
    """The name under which the server has ``subject``; None: the only one it has."""
    if section.models and subject.name not in section.models:
        raise QtoolError(f"evaluate.models: names no served model for {subject.name!r}.")
    return section.models.get(subject.name)
