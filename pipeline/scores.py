"""Evaluate the source and every artifact on the same problems and text; nothing is computed whose key exists."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.checkpoint import Checkpoint, TensorStream
from qtool.convert.text import load_tokenizer, token_windows
from qtool.evaluate import fidelity, llama_cpp, prompts
from qtool.evaluate.execute import Job as Program
from qtool.evaluate.execute import detect_sandbox, run_programs
from qtool.evaluate.generate import generate, load_model
from qtool.evaluate.scorecard import FidelityScore, ProblemOutcome, Settings, TaskScore, save
from qtool.evaluate.tasks import Task, load_task, subset
from qtool.recipe import EvaluateSection, digest_of


@dataclass
class Subject:
    """One model to judge: the source (``key`` its commit) or an artifact (``key`` its manifest's)."""

    name: str
    key: str
    stream: Callable[[], TensorStream]
    gguf: Path | None = None  # what the engine llama.cpp loads


@dataclass
class Scores:
    """Everything measured: subject name -> task name -> score, and subject name -> fidelity."""

    tasks: dict[str, dict[str, TaskScore]] = field(default_factory=dict)
    fidelity: dict[str, FidelityScore] = field(default_factory=dict)


@dataclass
class Evaluation:
    """Shared by all subjects of a run: the model's config and tokenizer, tasks, windows and settings."""

    section: EvaluateSection
    model: Path
    config: Any
    device: torch.device
    runs: Path
    run: Path
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.model, self.trust_remote_code)
        self.style = prompts.choose_style(self.section.prompt, self.tokenizer)
        self.tasks = {t.task: subset(load_task(t.task), t.limit) for t in self.section.tasks}
        self.windows = token_windows(self.section.text, self.tokenizer) if self.section.text else None
        self.settings = Settings(
            engine=self.section.engine,
            dtype="float32" if self.device.type == "cpu" else "bfloat16",
            device=self.device.type,
            prompt=self.style,
            max_new_tokens=self.section.max_new_tokens,
        )
        if self.tasks:  # say so before any work if hostile code cannot be contained here
            self.sandbox = detect_sandbox() if self.section.sandbox == "auto" else "none"

    def questions(self) -> dict[str, dict[str, str]]:
        """Task -> problem -> its prompt, for readers of the answers."""
        return {label: {p.task_id: p.prompt for p in task.problems} for label, task in self.tasks.items()}

    def score(self, subjects: list[Subject], bar: Progress) -> Scores:
        """Scores of all subjects; the first is the source, whose distribution the others are compared with."""
        scores = Scores()
        reference: fidelity.Reference | None = None
        for number, subject in enumerate(subjects):
            pending = {
                label: task for label, task in self.tasks.items() if not self._load(scores, subject, label, task)
            }
            wants_fidelity = self.windows is not None and self._load_fidelity(scores, subject) is None
            if self.windows is not None and number == 0:
                reference = self._load_reference(subject)
                wants_fidelity = wants_fidelity or reference is None
            if not pending and not wants_fidelity:
                continue
            model = self._model(subject)
            if model is not None and wants_fidelity and number == 0:
                reference = self._make_reference(model, subject, bar)
            if model is not None and wants_fidelity and reference is not None:
                scores.fidelity[subject.name] = self._fidelity(model, subject, reference, bar)
            for label, task in pending.items():
                scores.tasks.setdefault(subject.name, {})[label] = self._task(model, subject, task, bar)
            del model
        return scores

    def _model(self, subject: Subject) -> nn.Module | None:
        """The model in this process; None where an engine of its own loads the file."""
        if self.section.engine == "reference":
            return load_model(subject.stream(), self.config, self.device, self.trust_remote_code)
        if subject.gguf is None:
            raise QtoolError(f"{subject.name}: engine llama.cpp runs .gguf files only; use engine reference.")
        if self.windows is not None:
            raise QtoolError("perplexity and KL are measured by the reference engine; leave out `text:` or `engine:`.")
        return None

    def _task_key(self, subject: Subject, task: Task) -> str:
        return digest_of([subject.key, task.digest, self.settings.model_dump(), self.section.timeout, self.sandbox])

    def _fidelity_key(self, subject: Subject) -> str:
        return digest_of(
            [subject.key, self._text_digest(), self.settings.model_dump(include={"engine", "dtype", "device"})]
        )

    def _text_digest(self) -> str:
        assert self.windows is not None
        return digest_of(self.windows.tolist())

    def _find(self, name: str) -> Path | None:
        """A score of that name in this run or any earlier one."""
        return next(iter([*self.run.glob(f"scores/{name}"), *self.runs.glob(f"*/scores/{name}")]), None)

    def _load(self, scores: Scores, subject: Subject, label: str, task: Task) -> TaskScore | None:
        found = self._find(f"{_file_name(task)}-{self._task_key(subject, task)[:16]}.json")
        if found is None:
            return None
        score = TaskScore.model_validate_json(found.read_text(encoding="utf-8"))
        score = score.model_copy(update={"subject": subject.name})
        scores.tasks.setdefault(subject.name, {})[label] = score
        save(self.run / "scores" / found.name, score)
        return score

    def _load_fidelity(self, scores: Scores, subject: Subject) -> FidelityScore | None:
        found = self._find(f"fidelity-{self._fidelity_key(subject)[:16]}.json")
        if found is None:
            return None
        score = FidelityScore.model_validate_json(found.read_text(encoding="utf-8"))
        score = score.model_copy(update={"subject": subject.name})
        scores.fidelity[subject.name] = score
        save(self.run / "scores" / found.name, score)
        return score

    def _reference_path(self, subject: Subject) -> Path:
        return self.runs / "references" / f"{self._fidelity_key(subject)[:16]}.safetensors"

    def _load_reference(self, subject: Subject) -> fidelity.Reference | None:
        path = self._reference_path(subject)
        return fidelity.Reference.load(path) if path.exists() else None

    def _make_reference(self, model: nn.Module, subject: Subject, bar: Progress) -> fidelity.Reference:
        assert self.windows is not None
        row = bar.add_task(f"{subject.name}: reference", total=len(self.windows))
        reference = fidelity.reference(model, self.windows, lambda: bar.advance(row))
        path = self._reference_path(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        reference.save(partial)
        partial.rename(path)
        return reference

    def _fidelity(self, model: nn.Module, subject: Subject, source: fidelity.Reference, bar: Progress) -> FidelityScore:
        assert self.windows is not None
        row = bar.add_task(f"{subject.name}: fidelity", total=len(self.windows))
        found = fidelity.diverge(model, self.windows, source, lambda: bar.advance(row))
        key = self._fidelity_key(subject)
        score = FidelityScore(
            key=key, subject=subject.name, digest=self._text_digest(), settings=self.settings,
            tokens=self.windows.numel(), nll=found.nll, kl=found.kl, top1=found.top1,
            kl_p95=found.kl_p95, kl_p999=found.kl_p999,
        )  # fmt: skip
        save(self.run / "scores" / f"fidelity-{key[:16]}.json", score)
        return score

    def _task(self, model: nn.Module | None, subject: Subject, task: Task, bar: Progress) -> TaskScore:
        started = time.monotonic()
        texts = self._answers(model, subject, task, bar)
        programs = [
            Program(p.task_id, prompts.program(p, text, self.style), p.test, p.entry_point, setup=p.prompt)
            for p, text in zip(task.problems, texts, strict=True)
        ]
        row = bar.add_task(f"{subject.name}: running {task.name}", total=len(programs))
        outcomes = run_programs(
            programs,
            timeout=self.section.timeout,
            sandbox=self.section.sandbox,
            progress=lambda done: bar.update(row, completed=done),
        )
        key = self._task_key(subject, task)
        score = TaskScore(
            key=key, subject=subject.name, task=task.name, digest=task.digest, settings=self.settings,
            sandbox=self.sandbox, seconds=round(time.monotonic() - started, 2),
            outcomes={
                p.task_id: ProblemOutcome(outcome=o.outcome, detail=o.detail, completion=text)
                for p, o, text in zip(task.problems, outcomes, texts, strict=True)
            },
        )  # fmt: skip
        if any(o.outcome == "error" for o in outcomes):
            broken = next(o for o in outcomes if o.outcome == "error")
            raise QtoolError(f"{task.name}: the sandbox failed ({broken.detail}); no score was made.", exit_code=3)
        save(self.run / "scores" / f"{_file_name(task)}-{key[:16]}.json", score)
        return score

    def _answers(self, model: nn.Module | None, subject: Subject, task: Task, bar: Progress) -> list[str]:
        row = bar.add_task(f"{subject.name}: answering {task.name}", total=len(task.problems))
        texts = [""] * len(task.problems)

        def take(index: int, text: str) -> None:
            texts[index] = text
            bar.advance(row)

        asked = [prompts.render(problem, self.style, self.tokenizer) for problem in task.problems]
        options: dict[str, Any] = {
            "max_new_tokens": self.section.max_new_tokens,
            "batch_size": self.section.batch_size,
            "finished": lambda text: prompts.finished(text, self.style),
            "on_text": take,
        }
        if model is not None:
            generate(model, self.tokenizer, asked, **options)
        else:
            assert subject.gguf is not None
            ids = [self.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in asked]
            llama_cpp.generate(subject.gguf, ids, **options)
        return texts


def _file_name(task: Task) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", task.name).strip("_")


def source_subject(checkpoint: Checkpoint, commit: str) -> Subject:
    """The unquantized model."""
    return Subject("source", commit, checkpoint.read)


def artifact_subject(name: str, artifact: Artifact) -> Subject:
    """A finished artifact."""
    key = artifact.manifest.key if artifact.manifest else f"unsigned:{artifact.path.resolve()}"
    return Subject(name, key, artifact.read, artifact.gguf)
