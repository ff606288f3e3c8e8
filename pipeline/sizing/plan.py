"""`qtool plan`: every format on every card; the answer, what to change, the command to type, and the grid."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qtool import QtoolError
from qtool.convert.formats.table import in_safetensors, runs_in
from qtool.convert.models.config_keys import LIMIT
from qtool.evaluate.engines.facts import EngineFacts
from qtool.evaluate.engines.table import planned_engine
from qtool.sizing.accelerators import Accelerator
from qtool.sizing.fit import (
    GIB,
    HOST_BANDWIDTH,
    Estimate,
    Offload,
    Setting,
    estimate_of,
    fits,
    largest_context,
    most_sequences,
    offload_of,
    split_faults,
)
from qtool.sizing.formats import DEFAULT_FORMATS, Weights, artifact_weights, method_of, weights_of
from qtool.sizing.headers import Headers
from qtool.sizing.kv_cache import check_kv_dtype
from qtool.sizing.serve_command import command, notes, refusals
from qtool.sizing.sharing import Shared, check_prefix, shared_prefix

CONTEXTS = (2048, 8192, 32768, 65536, 131072)
SEQUENCES = (1, 2, 4, 8)
SMALLEST = "Q4_K_S"


@dataclass(frozen=True)
class Question:
    """What the user wants to know; empty tuples mean the defaults. ``shared_prefix``: tokens that every prompt begins
    with, 0 for none."""

    cards: Sequence[Accelerator]
    number: int = 1
    contexts: tuple[int, ...] = ()
    sequences: tuple[int, ...] = ()
    kv_dtypes: tuple[str, ...] = ()
    engine: str | None = None
    formats: tuple[str, ...] = ()
    host_bandwidth: float = HOST_BANDWIDTH
    shared_prefix: int = 0


@dataclass(frozen=True)
class Answer:
    """One format on one kind of card.

    ``cells``: an estimate for each context and number of sequences; ``smallest`` is the least of them. ``faults``: why
    the format cannot be served here at all. ``offload``: how the smallest cell is served where it does not fit.
    ``changes``: what would hold the longest context, ``least_changes``: what would hold the smallest cell; each is
    empty where that fits already. ``shared``: what the prompts' common beginning saves the most users asked about.
    """

    setting: Setting
    cells: tuple[Estimate, ...]
    faults: tuple[str, ...]
    context: int
    sequences: int
    offload: Offload | None
    changes: tuple[str, ...]
    least_changes: tuple[str, ...]
    command: str
    shared: Shared | None = None

    @property
    def smallest(self) -> Estimate:
        return min(self.cells, key=lambda cell: (cell.context, cell.sequences))

    @property
    def fits(self) -> bool:
        return not self.faults and self.smallest.fits


@dataclass(frozen=True)
class Plan:
    """Everything `qtool plan` says."""

    headers: Headers
    contexts: tuple[int, ...]
    sequences: tuple[int, ...]
    answers: tuple[Answer, ...]
    notes: tuple[str, ...]


def make_plan(headers: Headers, question: Question) -> Plan:
    """Raises QtoolError for a context that the model was not made for and for a choice that no format can follow."""
    geometry = headers.geometry
    said = [f"assumed: {text}" for text in headers.assumed]
    contexts = _contexts(headers, question.contexts, said)
    if question.shared_prefix:
        check_prefix(question.shared_prefix, geometry.max_context)
    sequences = question.sequences or SEQUENCES
    formats, refused = _weights(headers, question)
    said += refused
    if geometry.experts:
        said.append(_active(headers, formats))
    others = [*formats, *_smallest(headers, formats)]
    answers, served, fault = [], False, ""
    for card in question.cards:
        for weights in formats:
            engine = planned_engine(question.engine) if question.engine else _engine(weights)
            engine = engine.on(card)
            if not _runs(engine, weights):
                said.append(f"{weights.format}: {_unloadable(headers, engine)}")
                continue
            if refused_card := engine.refuses_card(card):
                said.append(f"{weights.format}: {refused_card}")
                continue
            for kv_dtype in question.kv_dtypes or (engine.cache_types[0].name,):
                try:
                    check_kv_dtype(geometry, engine, kv_dtype)
                except QtoolError as error:
                    fault = error.message
                    continue
                served = True
                setting = Setting(geometry, weights, engine, card, question.number, kv_dtype)
                said += notes(headers, setting)
                answers.append(_answer(headers, setting, others, contexts, sequences, question))
    if not served:
        raise QtoolError(fault or f"nothing to plan: {'; '.join(dict.fromkeys(said))}")
    return Plan(headers, contexts, sequences, tuple(answers), tuple(dict.fromkeys(said)))


def _contexts(headers: Headers, wanted: tuple[int, ...], notes: list[str]) -> tuple[int, ...]:
    most = headers.geometry.max_context
    beyond = [context for context in wanted if most and context > most]
    if beyond:
        raise QtoolError(
            f"--context {beyond[0]}: {headers.name} was made for {most:,} tokens (max_position_embeddings in "
            "config.json). Ask for no more, or plan from a config.json whose rope scaling and "
            "max_position_embeddings say more."
        )
    if wanted:
        return tuple(sorted(set(wanted)))
    kept = tuple(context for context in CONTEXTS if not most or context <= most)
    if len(kept) < len(CONTEXTS):
        notes.append(f"contexts end at {most:,} tokens, the model's max_position_embeddings")
    return kept or (int(most or CONTEXTS[0]),)


def _weights(headers: Headers, question: Question) -> tuple[list[Weights], list[str]]:
    if headers.quantized:
        if question.formats:
            raise QtoolError(f"--format: {headers.name} is quantized already; plan its source for other formats.")
        return [artifact_weights(headers)], []
    weights, notes = [], []
    for name in question.formats or DEFAULT_FORMATS:
        method_of(name)  # a misspelt one is an error, not a note
        try:
            weights.append(weights_of(headers, name))
            notes += [f"{name}: {limit}" for limit in weights[-1].notes if limit.startswith(LIMIT)]
        except QtoolError as error:
            notes.append(f"{name}: {error.message}")
    if not weights:
        raise QtoolError("; ".join(notes))
    return weights, notes


def _active(headers: Headers, formats: Sequence[Weights]) -> str:
    """What of a mixture of experts works on a token, against what must be held."""
    g = headers.geometry
    total = formats[0].parameters
    reads = ", ".join(f"{w.format} {(w.read(g.expert_share) + (w.head or w.embedding)) / 1e9:.2f} GB" for w in formats)
    shared = " and a shared one" if g.shared_width else ""
    return (
        f"a mixture of experts: {g.active} of {g.experts}{shared} work on a token, {(total - g.idle) / 1e9:.2f} of "
        f"{total / 1e9:.2f} billion weights. All are held; a token reads {reads}"
    )


def _smallest(headers: Headers, weights: Sequence[Weights]) -> list[Weights]:
    """The smallest format that qtool writes, to be advised even where nobody asked for it."""
    if headers.quantized or any(known.format == SMALLEST for known in weights):
        return []
    try:
        return [weights_of(headers, SMALLEST)]
    except QtoolError:
        return []


def _engine(weights: Weights) -> EngineFacts:
    """The engine that a format is planned for where none was asked for."""
    return planned_engine(runs_in(weights.family)[0].engine)


def _runs(engine: EngineFacts, weights: Weights) -> bool:
    return engine.gguf != in_safetensors(weights.family)


def _unloadable(headers: Headers, engine: EngineFacts) -> str:
    if engine.refuses_gguf and headers.gguf is not None:
        typed = shlex.join(["llama-server", "-m", str(headers.gguf)])
        return f"{engine.refuses_gguf}. llama.cpp runs it: {typed}"
    return f"{engine.name} does not load it"


def _answer(
    headers: Headers, setting: Setting, others: list[Weights], contexts: tuple[int, ...], sequences: tuple[int, ...],
    question: Question,
) -> Answer:  # fmt: skip
    refused = refusals(headers, setting)
    faults = [*refused, *split_faults(setting)]
    cells = tuple(estimate_of(setting, context, number) for context in contexts for number in sequences)
    least, fewest = min(contexts), min(sequences)
    holds = not faults and fits(setting, least, fewest)
    longest = 0 if faults else largest_context(setting, fewest)
    offload = None if holds or faults else offload_of(setting, least, fewest, question.host_bandwidth)
    largest = max(contexts)
    wanted = not faults and fits(setting, largest, fewest)
    changes = () if wanted or refused else _changes(setting, others, largest, fewest)
    least_changes = () if holds or faults else _changes(setting, others, least, fewest)
    served = min(largest, longest) if holds else least
    many = most_sequences(setting, served) if holds else fewest
    prefix = question.shared_prefix
    shared = shared_prefix(setting, prefix, max(sequences)) if prefix and not faults else None
    typed = "" if faults else command(headers, setting, served, max(1, min(many, max(sequences))), offload)
    return Answer(setting, cells, tuple(faults), longest, 0 if faults else most_sequences(setting, least), offload,
                  tuple(changes), tuple(least_changes), typed, shared)  # fmt: skip


def _changes(setting: Setting, others: list[Weights], context: int, sequences: int) -> list[str]:
    """What would hold ``context``: another cache type, another format, more cards; the mildest first, at most four."""
    changes = []
    for cache_type in () if split_faults(setting) else setting.facts.cache_types:
        changed = replace(setting, kv_dtype=cache_type.name)
        if changed.kv_dtype != setting.kv_dtype and fits(changed, context, sequences):
            changes.append(f"--kv-dtype {cache_type.name}")
            break
    for other in sorted(others, key=lambda w: -w.nbytes):
        if other.format == setting.weights.format:
            continue
        engine = _engine(other)
        changed = replace(setting, weights=other, facts=engine, kv_dtype=engine.cache_types[0].name)
        if not split_faults(changed) and fits(changed, context, sequences):
            changes.append(f"format {other.format} ({engine.name})")
            break
    for cards in (2, 4, 8):
        changed = replace(setting, cards=cards)
        if cards > setting.cards and not split_faults(changed) and fits(changed, context, sequences):
            changes.append(f"{cards} x {setting.card.key}")
            break
    return changes


def gib(nbytes: int) -> str:
    """``12.34``."""
    return f"{nbytes / GIB:.2f}"
