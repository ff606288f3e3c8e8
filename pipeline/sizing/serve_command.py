"""What to type so that a planned setting is served: a command that works in the folder where `qtool plan` was typed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qtool import QtoolError
from qtool.convert.models.config_keys import window_limits
from qtool.convert.models.shape import decoder_of
from qtool.evaluate.engines.facts import Serving
from qtool.evaluate.engines.table import planned
from qtool.quantize.methods.method import Method
from qtool.sizing.fit import Offload, Setting, cache_to_ask
from qtool.sizing.formats import method_of
from qtool.sizing.headers import Headers


def serving_of(
    headers: Headers, setting: Setting, context: int, sequences: int, offload: Offload | None = None
) -> Serving:
    """What the engine's command is made of. An artifact or a source is named as it was typed, what is still to be made
    as `qtool run` would name it."""
    w, facts = setting.weights, setting.facts
    made = headers.quantized or w.family == "source"
    place = headers.place if made else f"{headers.name}-{w.format}"
    return Serving(
        place=place, revision=headers.revision if made else None, file=headers.gguf,
        default_file=f"{place}/{headers.name}-{w.format}.gguf", config=config_of(headers, setting), context=context,
        sequences=sequences, cards=setting.cards, cache_type=setting.kv_dtype, offload=offload.flag if offload else "",
        name=headers.name if made else place, prefill=facts.prefill_tokens(setting.card),
        processor=setting.card.processor, cache_bytes=cache_to_ask(setting, context, sequences),
        share=facts.memory_share,
    )  # fmt: skip


def command(headers: Headers, setting: Setting, context: int, sequences: int, offload: Offload | None) -> str:
    """What is typed to serve it, or to load it."""
    return setting.facts.typed(serving_of(headers, setting, context, sequences, offload))


def config_of(headers: Headers, setting: Setting) -> Mapping[str, Any]:
    """config.json of what is served: the model's own, or that of an output still to be made."""
    method = None if headers.quantized else method_of_weights(setting)
    if method is None:
        return headers.config
    stored = {} if method.stored_dtype is None else {"dtype": str(method.stored_dtype).removeprefix("torch.")}
    container = method.container.of_model(decoder_of(headers.config))
    return {**headers.config, **stored, "quantization_config": container.section}


def method_of_weights(setting: Setting) -> Method | None:
    """The recipe output that the weights stand for; None for the source's own."""
    return None if setting.weights.family == "source" else method_of(setting.weights.format)


def refusals(headers: Headers, setting: Setting) -> list[str]:
    """Why the engine does not load this at all; empty where it does."""
    return setting.facts.refuses_model(config_of(headers, setting))


def limits(headers: Headers, setting: Setting) -> list[str]:
    """What the engine's answers are right only up to."""
    if not setting.facts.gguf:
        return []
    with suppress(QtoolError):  # a file of another tool, of a model that qtool writes no GGUF of
        return window_limits(headers.config)
    return []


def notes(headers: Headers, setting: Setting) -> list[str]:
    """What engines need beside themselves to load this, or would take instead, and how far it is right."""
    if headers.gguf is not None:
        sentences = [engine.refuses_gguf for engine in planned().values()]
    else:
        config = config_of(headers, setting)
        sentences = [engine.needs_beside(config) for engine in planned().values()]
    sentences += limits(headers, setting)
    return [f"{setting.weights.format}: {text}" for text in sentences if text]
