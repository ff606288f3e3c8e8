"""Evaluate the source and every artifact on the same problems and text; nothing is computed whose key exists."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from qtool.convert.files.durable import save, set_aside, sweep
from qtool.convert.models.shape import shape_of
from qtool.convert.models.table import prefix_of
from qtool.convert.skeleton import expected_shapes
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate import fidelity
from qtool.evaluate.answers import Asking, answer_task
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.engine import Decoding, Running, package_versions
from qtool.evaluate.engines.share import ALONE, Share
from qtool.evaluate.engines.table import ENGINES
from qtool.evaluate.engines.torch_model import in_model_names, load_model
from qtool.evaluate.journal import Journal
from qtool.evaluate.sandbox.execute import detect_sandbox
from qtool.evaluate.scorecard import FidelityScore, Scores, Settings, TaskScore
from qtool.evaluate.selfcheck import SelfCheck
from qtool.evaluate.tasks import prompts
from qtool.evaluate.tasks.problems import Task
from qtool.measure import stored
from qtool.measure.harness import self_checked
from qtool.measure.long_text import Along, require_possible
from qtool.measure.questions import kept_whole, prompts_of, shown, tasks_of, windows_of
from qtool.measure.scoring_engine import open_engine, served_name, settings_for, settings_of
from qtool.measure.stored import Score
from qtool.measure.subjects import Subject
from qtool.recipe.checking import digest_of
from qtool.recipe.judging import EvaluateSection
from qtool.runs import log
from qtool.runs.stages import stage


@dataclass
class Evaluation:
    """Shared by all subjects of a run: the model's config and tokenizer (None for a served model), tasks, windows and
    settings."""

    section: EvaluateSection
    model: Path | None
    config: Any
    device: torch.device
    runs: Path
    run: Path
    trust_remote_code: bool = False
    share: Share = ALONE  # this process's, of a long text
    used: dict[str, Settings] = field(default_factory=dict)  # subject's key -> how it is asked

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.model, self.trust_remote_code) if self.model else None
        self.style = prompts.choose_style(self.section.prompt, self.tokenizer)
        self.conditions = (PLAIN, *(asked.condition for asked in self.section.conditions))
        named = tasks_of(self.section, self.config, self.tokenizer)
        asked = {label: prompts_of(task, self.style, self.tokenizer, self.config) for label, task in named.items()}
        self.asked = {stored.label(n, c): (n, c) for c in self.conditions for n in named}  # label -> task, condition
        self.tasks = {label: named[name] for label, (name, _) in self.asked.items()}
        self.prompts = {label: asked[name] for label, (name, _) in self.asked.items()}
        self.windows = windows_of(self.section, self.config, self.tokenizer)
        self.settings = settings_of(self.section, self.device, self.style)
        for line in kept_whole(self.section, asked, self.tokenizer):
            log.say(line)
        self.along = self._along()
        decoding = Decoding(
            self.section.max_new_tokens, self.section.batch_size, self.section.temperature, self.section.top_p
        )
        self.asking = Asking(
            self.style, decoding, self.section.samples, self.section.seed, self.section.timeout, self.section.sandbox
        )
        if self.tasks:  # say so before any work if hostile code cannot be contained here
            self.sandbox = detect_sandbox() if self.section.sandbox == "auto" else "none"

    def questions(self) -> dict[str, dict[str, str]]:
        """Task -> problem -> its prompt, for readers of the answers."""
        return {label: {p.task_id: shown(p.prompt) for p in task.problems} for label, task in self.tasks.items()}

    def self_check(self, bar: Progress) -> dict[str, SelfCheck]:
        """Of every task; under a condition the problems are the same."""
        return {
            label: self_checked(task, self.asking, self.tokenizer, self.sandbox, self.runs, bar)
            for label, task in self.tasks.items()
            if self.asked[label][1] == PLAIN
        }

    def score(self, subjects: list[Subject], bar: Progress) -> Scores:
        """Scores of all subjects; the first is the source, whose distribution the others are compared with. Raises
        QtoolError (exit 3) where the harness fails its self-check."""
        wanted, scores = self.begin(subjects), Scores()
        for subject in subjects:
            self.add(scores, subject, subjects[0], wanted, bar)
        self.add_long(scores, subjects, bar)
        return scores

    def add_long(self, scores: Scores, subjects: list[Subject], bar: Progress) -> None:
        """All subjects along the long text, where one is asked for: by all ranks together, each with its share."""
        if self.along is not None:
            self.along.score(subjects, scores, partial(self._row, bar))

    def begin(self, subjects: list[Subject]) -> set[int]:
        """Tidy up after killed runs; the lengths of text at which a subject is still to be compared with the source."""
        for folder in (self.run / "scores", self.runs / "references"):
            sweep(folder)
        asked = ((subject, length) for subject in subjects for length in self.windows)
        return {length for subject, length in asked if self._fidelity(subject, subjects[0], length)[1] is None}

    def add(
        self, scores: Scores, subject: Subject, source: Subject, wanted: set[int], bar: Progress,
        compared: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        """One subject's scores, made as far as they are not known. ``wanted``: what `begin` said; ``compared``: called
        after the text, of which the source's distribution is then there, and before the tasks."""
        pending = {label: t for label, t in self.tasks.items() if not self._load_task(scores, subject, label)}
        texts = {n: known for n in self.windows if (known := self._load_fidelity(subject, source, n)) is not None}
        lengths = [length for length in self.windows if length not in texts]
        if subject is source:  # artifacts that are still to come need its distribution
            lost = {length for length in wanted if self._reference(source, length) is None}
            lengths = [length for length in self.windows if length in lengths or length in lost]
        if pending:
            for check in self.self_check(bar).values():
                check.require()
        measured: dict[int, fidelity.Divergence] = {}
        for condition in self.conditions:
            here = {label: task for label, task in pending.items() if self.asked[label][1] == condition}
            texts_here = lengths if condition == PLAIN else []
            with ExitStack() as stack:
                running = None
                if here or texts_here:
                    running = stack.enter_context(self._engine(subject, here, condition))
                for length in texts_here:
                    assert running is not None
                    with stage("fidelity", subject.name):
                        measured[length] = self._diverge(running, subject, source, length, bar)
                if compared is not None and condition == PLAIN:
                    compared()
                for label in here:
                    assert running is not None
                    with stage("tasks", f"{subject.name}: {label}"):
                        found_here = self._task(running, subject, label, bar)
                    scores.tasks.setdefault(subject.name, {})[label] = found_here
                del running
        for length, found in measured.items():
            layers = self._by_layer(subject, source, length, bar) if subject is not source else []
            texts[length] = self._save_fidelity(subject, source, length, found, layers)
        for length in self.windows:  # in the recipe's order, whichever an earlier run had: gates judge the first
            scores.add_fidelity(texts[length])

    def _along(self) -> Along | None:
        """The long text that is asked for. Raises QtoolError where it cannot be read, or the model takes no such."""
        if self.config is not None and (self.section.long or self.section.conditions):
            require_possible(self.section, shape_of(self.config.to_dict()))
        if self.config is None or self.section.long is None:
            return None
        return Along(
            self.section.long, self.conditions, self.config, self.tokenizer, self.device, self.runs, self.run,
            self.settings, self.trust_remote_code, self.share,
        )  # fmt: skip

    def _engine(self, subject: Subject, pending: dict[str, Task], condition: Condition) -> Any:
        asked = [prompt for label in pending for prompt in self.prompts[label]]
        return open_engine(
            self.section, subject, self.config, self.tokenizer, self.device, self.trust_remote_code, asked, condition
        )

    def _settings_for(self, subject: Subject, label: str) -> Settings:
        """Asked once for each model: vLLM is imported for it."""
        if subject.key not in self.used:
            self.used[subject.key] = settings_for(self.settings, subject, self.trust_remote_code)
        said = ENGINES[self.section.engine].facts.said(self.asked[label][1])
        return self.used[subject.key].model_copy(update={"condition": said})

    def _task_key(self, subject: Subject, label: str) -> str:
        served = [self.section.base_url, served_name(self.section, subject)] if self.section.base_url else []
        asked = [self.section.samples, self.section.timeout, self.sandbox, digest_of(self.prompts[label])]
        harness = package_versions("qtool-llm")
        settings = self._settings_for(subject, label).model_dump()
        return digest_of([subject.key, *served, self.tasks[label].digest, settings, *asked, harness])

    def _fidelity_key(self, subject: Subject, source: Subject, length: int) -> str:
        windows = digest_of(self.windows[length].tolist())
        engine = self.settings.model_dump(include={"engine", "version", "dtype", "device"})
        harness = package_versions("qtool-llm")
        return digest_of([subject.key, source.key, windows, engine, self._layered(length), harness])

    def _layered(self, length: int) -> bool:
        return bool(self.section.text and self.section.text.by_layer and length == self.section.text.lengths[0])

    def _known(self, kind: type[Score], name: str, key: str, fault: Callable[[Score], str]) -> Score | None:
        return stored.find(kind, self.run, self.runs, name, key, fault)

    def _load_task(self, scores: Scores, subject: Subject, label: str) -> bool:
        task, key = self.tasks[label], self._task_key(subject, label)
        name = f"{stored.file_name(task.name)}-{key[:16]}.json"
        score = self._known(TaskScore, name, key, lambda score: score.fault([p.task_id for p in task.problems]))
        if score is not None:
            scores.tasks.setdefault(subject.name, {})[label] = stored.keep(self.run, name, score, subject.name)
        return score is not None

    def _fidelity(self, subject: Subject, source: Subject, length: int) -> tuple[str, FidelityScore | None]:
        key = self._fidelity_key(subject, source, length)
        name = f"fidelity-{key[:16]}.json"
        return name, self._known(FidelityScore, name, key, lambda s: s.fault(len(self.windows[length])))

    def _load_fidelity(self, subject: Subject, source: Subject, length: int) -> FidelityScore | None:
        name, score = self._fidelity(subject, source, length)
        return stored.keep(self.run, name, score, subject.name) if score is not None else None

    def _reference_path(self, source: Subject, length: int) -> Path:
        return self.runs / "references" / self._fidelity_key(source, source, length)[:16]

    def _reference(self, source: Subject, length: int) -> fidelity.Reference | None:
        """The source's distributions; None where there are none, or where they are damaged: they are set aside."""
        path = self._reference_path(source, length)
        if not os.path.lexists(path):
            return None
        found = fidelity.Reference(path)
        fault = found.fault(self.windows[length]) if path.is_dir() else "not a folder"
        if fault:
            set_aside(path, fault)
        return None if fault else found

    def _diverge(
        self, running: Running, subject: Subject, source: Subject, length: int, bar: Progress
    ) -> fidelity.Divergence:
        """Compare with the source's distribution, which is made here when the subject is the source."""
        windows, path = self.windows[length], self._reference_path(source, length)
        running.prepare(windows)
        if subject is source and self._reference(source, length) is None:
            making = self._row(bar, f"{subject.name}: reference, {length} tokens", len(windows))
            fidelity.make_reference(running.logits, windows, path, making)
        step = self._row(bar, f"{subject.name}: fidelity, {length} tokens", len(windows))  # its clock starts here
        return fidelity.diverge(running.logits, windows, fidelity.Reference(path), step)

    def _row(self, bar: Progress, text: str, total: int) -> Callable[[], None]:
        row = bar.add_task(text, total=total)
        return lambda: bar.advance(row)

    def _by_layer(self, subject: Subject, source: Subject, length: int, bar: Progress) -> list[float]:
        """With the source's weights in memory, after the subject's are gone: one model at a time."""
        if not self._layered(length) or source.stream is None or subject.stream is None:
            return []
        prefix = prefix_of(self.config.to_dict())
        model = load_model(source.stream(""), self.config, self.device, self.trust_remote_code)
        step = self._row(bar, f"{subject.name}: layer by layer", self.config.num_hidden_layers)
        reference = fidelity.Reference(self._reference_path(source, length))
        stream = in_model_names(subject.stream(""), self.config, expected_shapes(model)[0])
        return fidelity.diverge_by_layer(model, prefix, stream, self.windows[length], reference, step)

    def _save_fidelity(
        self, subject: Subject, source: Subject, length: int, found: fidelity.Divergence, by_layer: list[float]
    ) -> FidelityScore:
        key, windows = self._fidelity_key(subject, source, length), self.windows[length]
        score = FidelityScore(
            key=key, subject=subject.name, digest=digest_of(windows.tolist()), settings=self.settings,
            tokens=windows.numel(), context=length, kl_by_layer=by_layer, **vars(found),
        )  # fmt: skip
        save(self.run / "scores" / f"fidelity-{key[:16]}.json", score)
        return score

    def _task(self, running: Running, subject: Subject, label: str, bar: Progress) -> TaskScore:
        started = time.monotonic()
        task, key = self.tasks[label], self._task_key(subject, label)
        name = f"{stored.file_name(task.name)}-{key[:16]}"
        journal = Journal.open(self.run / "scores" / f"{name}.jsonl")
        total = len(task.problems) * self.section.samples
        answering = bar.add_task(f"{subject.name}: answering {task.name}", total=total, completed=len(journal.texts))
        judging = bar.add_task(f"{subject.name}: running {task.name}", total=total, completed=len(journal.judged))

        def progress(answered: int, judged: int) -> None:
            bar.update(answering, completed=answered)
            bar.update(judging, completed=judged)

        found = answer_task(running, task, self.asking, self.tokenizer, journal, progress)
        several = self.section.samples > 1
        score = TaskScore(
            key=key, subject=subject.name, task=task.name, digest=task.digest,
            settings=self._settings_for(subject, label), sandbox=self.sandbox, source=task.source,
            left_out=task.left_out,
            in_process=sum(problem.run == "in_process" for problem in task.problems),
            seconds=round(time.monotonic() - started, 2), samples=self.section.samples,
            outcomes={problem: answers[0] for problem, answers in found.items()},
            more={problem: answers[1:] for problem, answers in found.items()} if several else {},
            groups={problem.task_id: problem.groups for problem in task.problems if problem.groups},
        )  # fmt: skip
        save(self.run / "scores" / f"{name}.json", score)
        journal.close()
        return score
