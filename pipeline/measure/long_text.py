"""Source and artifacts along one long text, under every condition; nothing is computed whose key exists."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.durable import save, set_aside, whole_folder
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import shape_of
from qtool.convert.text.long_text import LongText, long_text
from qtool.evaluate import fidelity, positions
from qtool.evaluate.buckets import BLOCK, foretold
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.engine import package_versions
from qtool.evaluate.engines.layered import Sweep
from qtool.evaluate.engines.reference import FACTS
from qtool.evaluate.engines.share import ALONE, Share
from qtool.evaluate.engines.streamed import open_streamed
from qtool.evaluate.engines.sweep_memory import queries_of, require_memory
from qtool.evaluate.engines.torch_model import compute_dtype
from qtool.evaluate.scorecard import PositionScore, Scores, Settings
from qtool.measure import stored
from qtool.measure.subjects import Subject
from qtool.recipe.checking import digest_of
from qtool.recipe.judging import EvaluateSection
from qtool.recipe.long import LongSection
from qtool.runs.stages import stage
from qtool.sizing.conditions import cache_bytes, require_condition

Watch = Callable[[str, int], Callable[[], None]]  # a row of the progress bar: text, steps -> what each step calls


@dataclass
class Along:
    """What every model is put through. ``conditions``: `PLAIN` first; ``settings``: of the engine, without one."""

    section: LongSection
    conditions: tuple[Condition, ...]
    config: Any
    tokenizer: Any
    device: torch.device
    runs: Path
    run: Path
    settings: Settings
    trust_remote_code: bool = False
    share: Share = ALONE

    def __post_init__(self) -> None:
        """Raises QtoolError for all that cannot be done, before anything is."""
        self.shape: Geometry = shape_of(self.config.to_dict())
        width = compute_dtype(self.device).itemsize
        require_memory(self.shape, self.section.length, width, machine.free_memory(str(self.device)), self.share.number)
        self.text: LongText = text_of(self.section, self.config, self.tokenizer)

    def score(self, subjects: list[Subject], scores: Scores, watch: Watch) -> None:
        """Add every model under every condition to ``scores``; the first is the source. Of several ranks the first
        knows what is there already, and keeps what they find together."""
        source, first = subjects[0], self.share.rank == 0
        asked = [(subject, condition) for subject in subjects for condition in self.conditions]
        known = [self._known(subject, source, condition) if first else None for subject, condition in asked]
        if first and None in known and self._reference(source) is None:
            known[0] = None  # it has to be run again: the others are compared with it
        wanted = self.share.tell([score is None for score in known])[0]
        for (subject, condition), score, missing in zip(asked, known, wanted, strict=True):
            if missing:
                with stage("long text", f"{subject.name} {condition.name}".strip()):
                    score = self._measure(subject, source, condition, watch)
            if first and score is not None:
                scores.add_positions(stored.keep(self.run, _name(score.key), score, subject.name))

    def _measure(self, subject: Subject, source: Subject, condition: Condition, watch: Watch) -> PositionScore:
        if subject.stream is None:
            raise QtoolError(f"{subject.name}: has no weights here; leave out `long:`.")
        started = time.monotonic()
        key, tokens = self._key(subject, source, condition), self.text.tokens
        named = f"{subject.name} {condition.name}".strip()
        model = open_streamed(FACTS, subject.stream, self.config, self.device, self.trust_remote_code)
        work = self.run / "scores" / f"positions-{key[:16]}.states"
        each = watch(f"{named}: {len(tokens):,} tokens, layer by layer", self.shape.layers)
        sweep = Sweep(
            model, queries_of(self.shape, len(tokens)), work, condition, progress=each, share=self.share
        )  # fmt: skip
        states = sweep.states(tokens)
        logits = partial(_head, sweep, states)
        if subject is source and condition == PLAIN:
            self._make_reference(source, logits)
        step = watch(f"{named}: against the source", len(self.share.starts(len(tokens))))
        reference = fidelity.Reference(self._reference_path(source))
        found = positions.along(logits, tokens, reference, step, self.share)
        score = PositionScore(
            key=key, subject=subject.name, digest=self._digest, settings=self._settings(condition),
            length=len(tokens), block=BLOCK, cache_bytes=cache_bytes(self.shape, condition, len(tokens)),
            seconds=round(time.monotonic() - started, 2), **vars(found),
        )  # fmt: skip
        if self.share.rank == 0:
            save(self.run / "scores" / _name(key), score)
            sweep.close()
        return score

    @property
    def _digest(self) -> str:
        return digest_of(self.text.tokens.tolist())

    def _settings(self, condition: Condition) -> Settings:
        return self.settings.model_copy(update={"condition": FACTS.said(condition)})

    def _key(self, subject: Subject, source: Subject, condition: Condition) -> str:
        engine = self._settings(condition).model_dump(include={"engine", "version", "dtype", "device", "condition"})
        return digest_of([subject.key, source.key, self._digest, engine, package_versions("qtool-llm")])

    def _known(self, subject: Subject, source: Subject, condition: Condition) -> PositionScore | None:
        key = self._key(subject, source, condition)
        return stored.find(PositionScore, self.run, self.runs, _name(key), key)

    def _reference_path(self, source: Subject) -> Path:
        return self.runs / "references" / f"long-{self._key(source, source, PLAIN)[:16]}"

    def _make_reference(self, source: Subject, logits: fidelity.Logits) -> None:
        """Where it is not there. Each rank writes the chunks that it has; the first gives the whole its name."""
        path, tokens, first = self._reference_path(source), self.text.tokens, self.share.rank == 0
        if self.share.tell(first and self._reference(source) is not None)[0]:
            return
        with ExitStack() as stack:
            made = str(stack.enter_context(whole_folder(path))) if first else ""
            folder = Path(self.share.tell(made)[0])
            chunks = fidelity.logprobs(logits, tokens, self.share.starts(len(tokens)))
            with torch.inference_mode():
                fidelity.write_reference(chunks, 0, folder, len(tokens))
            self.share.tell(None)  # all have written theirs
        self.share.tell(None)  # it has its name

    def _reference(self, source: Subject) -> fidelity.Reference | None:
        """The source's distributions; None where there are none, or where they are damaged: they are set aside."""
        path = self._reference_path(source)
        if not os.path.lexists(path):
            return None
        found = fidelity.Reference(path)
        if fault := found.fault(self.text.tokens[None]) if path.is_dir() else "not a folder":
            set_aside(path, fault)
            return None
        return found


def text_of(section: LongSection, config: Any, tokenizer: Any) -> LongText:
    """The tokens that are asked for. Raises QtoolError where the text has fewer."""
    return long_text(section.source, tokenizer, getattr(config, "vocab_size", None), foretold)


def require_possible(asked: EvaluateSection, shape: Geometry) -> None:
    """Raises QtoolError for a long text, or a condition, that a model of this shape cannot be put under."""
    most, long = shape.max_context, asked.long
    for one in asked.conditions:
        require_condition(shape, one.condition)
        held = one.condition.held
        if held is not None and most is not None and held >= most:
            raise QtoolError(
                f"conditions: {one.condition.name} keeps all of the {most:,} tokens that the model was made for "
                "(max_position_embeddings in config.json), so it lets go of nothing; take a smaller `recent:`."
            )
    if long is not None and most is not None and long.length > most:
        raise QtoolError(
            f"long: {long.length:,} tokens are more than the {most:,} that the model was made for "
            f"(max_position_embeddings in config.json). Set `length: {foretold(most)}` or less."
        )
    if long is not None and shape.loops > 1:
        raise QtoolError("long: a looped model passes its layers more than once; leave out `long:`.")


def _name(key: str) -> str:
    return f"positions-{key[:16]}.json"


def _head(sweep: Sweep, states: torch.Tensor, _: torch.Tensor) -> Any:
    """The logits of the one text that was swept."""
    return sweep.logits(states)
