"""What a run's scores come to: every statistic computed once, kept in `summary.json`, read by all that judge or show.

A Summary holds numbers, never sentences. It is a pure function of scores and sizes: where none is stored, or the
scores beside it are no longer those it was made from, it is computed anew. Speeds come from the ledger, which grows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from qtool import QtoolError
from qtool.convert.files.durable import save
from qtool.convert.files.proof import Proof
from qtool.convert.files.reading import read_bytes
from qtool.evaluate.rates import mean_rate, rate_difference
from qtool.evaluate.scorecard import FidelityScore, Scores, Settings, TaskScore, pass_at_k
from qtool.evaluate.statistics import Difference, Interval, bootstrap_mean, holm, recovery
from qtool.runs.along import AlongSummary, along_summary
from qtool.runs.measurements import Measurement

SUMMARY = "summary.json"
FORMAT = 2  # a change of what a statistic means raises it: stored ones are then computed anew
SHOWN_K = (10, 100)  # the k of pass@k, beside pass@1


@dataclass(frozen=True)
class Size:
    """``tensors`` and ``files``: bytes; ``files`` is None where nobody wrote the model (the source)."""

    tensors: int
    bits_per_weight: float
    files: int | None = None


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Loss(_Data):
    """A model against the source on the same problems. ``difference.p`` is the test's own p; ``p_holm`` is adjusted
    over the ``comparisons`` of the run: every model on every task. ``recovery``: None where the source solved nothing.
    """

    difference: Difference
    recovery: Interval | None
    p_holm: float
    comparisons: int


class TaskSummary(_Data):
    """One model on one task. ``solved``: problem -> how many of its ``samples`` answers were right. ``pass_at``: k ->
    the rate, a fraction. ``loss``: None for the source, and where it was not asked. The rest are caveats: problems that
    were not asked, programs that shared a process with their test, and the sandbox ("none": there was none)."""

    digest: str
    settings: Settings
    samples: int
    solved: dict[str, int]
    pass_at: dict[int, Interval]
    loss: Loss | None
    left_out: dict[str, str]
    in_process: int
    sandbox: str
    source: str

    @property
    def rate(self) -> Interval:
        """pass@1."""
        return self.pass_at[1]


class TextSummary(_Data):
    """One model on held-out text, in windows of one length. ``kls`` and ``nlls``: nats a token, one for each window;
    ``kl``: the mean with its bootstrap interval over windows, NaN where the model's output was no number;
    ``perplexity``: exp of the mean and of its interval. ``top1``: share of tokens that the source finds likeliest, too.
    """

    digest: str
    settings: Settings
    kls: list[float]
    nlls: list[float]
    kl: Interval
    perplexity: Interval
    top1: float
    kl_by_position: list[float]
    position_bin: int
    kl_by_layer: list[float]


class ModelSummary(_Data):
    """``texts``: by window length; gates judge the first. ``along``: one long text, by condition ("": none).
    ``measured``: memory and speed, the newest first; ``proofs``: of real servers."""

    size: Size | None = None
    tasks: dict[str, TaskSummary] = {}
    texts: dict[int, TextSummary] = {}
    along: dict[str, AlongSummary] = {}
    measured: list[Measurement] = []
    proofs: list[Proof] = []

    @property
    def text(self) -> TextSummary | None:
        """At the first window length."""
        return next(iter(self.texts.values()), None)


class Summary(_Data):
    """Everything measured. ``models``: "source" and each model that is compared with it, by name. ``comparisons``: how
    many paired tests p was adjusted over (Holm). ``evidence``: of the scores and sizes that it was computed from."""

    models: dict[str, ModelSummary]
    comparisons: int
    evidence: str

    @property
    def tasks(self) -> list[str]:
        """Every task that some model was asked."""
        return list(dict.fromkeys(task for model in self.models.values() for task in model.tasks))

    @property
    def measured(self) -> dict[str, list[Measurement]]:
        """Model -> its measurements, where there are any."""
        return {name: model.measured for name, model in self.models.items() if model.measured}

    @property
    def along(self) -> bool:
        """Whether a model was put through a long text."""
        return any(model.along for model in self.models.values())

    @property
    def proofs(self) -> dict[str, list[Proof]]:
        """Model -> its proofs, where there are any."""
        return {name: model.proofs for name, model in self.models.items() if model.proofs}

    def with_proofs(self, proofs: Mapping[str, Sequence[Proof]]) -> Summary:
        """With what the artifacts' manifests have by now."""
        models = {
            name: model.model_copy(update={"proofs": list(proofs[name])}) if name in proofs else model
            for name, model in self.models.items()
        }
        return self.model_copy(update={"models": models})

    def only(self, names: Sequence[str]) -> Summary:
        """The source and these models. Nothing is computed again: p stays adjusted over the whole run."""
        kept = {name: model for name, model in self.models.items() if name in ("source", *names)}
        return self.model_copy(update={"models": kept})

    def with_measured(self, measured: Mapping[str, Sequence[Measurement]]) -> Summary:
        """With what the ledger has by now; of a model that it does not know the stored measurements stay."""
        models = {
            name: model.model_copy(update={"measured": list(measured[name])}) if name in measured else model
            for name, model in self.models.items()
        }
        return self.model_copy(update={"models": models})


def summarise(
    scores: Scores, sizes: Mapping[str, Size] | None = None, measured: Mapping[str, Sequence[Measurement]] | None = None
) -> Summary:
    """Every statistic of these scores. Raises QtoolError where a model was asked other problems than the source."""
    sizes, measured = sizes or {}, measured or {}
    losses = _losses(scores)
    models = {}
    for name in dict.fromkeys([*sizes, *scores.fidelity, *scores.tasks, *scores.positions]):
        tasks = scores.tasks.get(name, {})
        texts = scores.contexts.get(name) or {f.context: f for n, f in scores.fidelity.items() if n == name}
        models[name] = ModelSummary(
            size=sizes.get(name),
            tasks={task: _task(score, losses.get((name, task))) for task, score in tasks.items()},
            texts={length: _text(score) for length, score in texts.items()},
            along={
                condition: along_summary(score, scores.positions.get("source", {}).get(condition))
                for condition, score in scores.positions.get(name, {}).items()
            },
            measured=list(measured.get(name, [])),
        )
    return Summary(models=models, comparisons=len(losses), evidence=evidence_of(scores, sizes))


def evidence_of(scores: Scores, sizes: Mapping[str, Size]) -> str:
    """sha256 of all that a Summary is computed from."""
    digest = hashlib.sha256(f"{FORMAT}\n".encode())
    for name, size in sizes.items():
        digest.update(f"{name} {size}\n".encode())
    for name, tasks in scores.tasks.items():
        for label, task in tasks.items():
            digest.update(f"{name} {label} {task.model_dump_json()}\n".encode())
    for name, text in [*scores.fidelity.items(), *((n, t) for n, by in scores.contexts.items() for t in by.values())]:
        digest.update(f"{name} {text.model_dump_json()}\n".encode())
    for name, by_condition in scores.positions.items():
        for along in by_condition.values():
            digest.update(f"{name} {along.model_dump_json()}\n".encode())
    return digest.hexdigest()


def save_summary(folder: Path, summary: Summary) -> None:
    """`summary.json`: whole or absent."""
    save(folder / SUMMARY, summary)


def stored_summary(folder: Path, evidence: str) -> Summary | None:
    """The folder's Summary; None where there is none, or it is of other scores, damaged, or another version's."""
    try:
        found = Summary.model_validate_json(read_bytes(folder / SUMMARY))
    except (QtoolError, ValidationError):
        return None
    return found if found.evidence == evidence else None


def _losses(scores: Scores) -> dict[tuple[str, str], Loss]:
    """(model, task) -> its paired difference to the source."""
    source = scores.tasks.get("source", {})
    found = {
        (name, task): _difference(name, task, source[task], score)
        for name, tasks in scores.tasks.items()
        for task, score in tasks.items()
        if name != "source" and task in source
    }
    adjusted = holm([difference.p for difference in found.values()])
    losses = {}
    for ((name, task), difference), p in zip(found.items(), adjusted, strict=True):
        rates = source[task].rates
        kept = recovery(difference, sum(rates) / len(rates)) if any(rates) else None
        losses[name, task] = Loss(difference=difference, recovery=kept, p_holm=p, comparisons=len(found))
    return losses


def _difference(name: str, task: str, source: TaskScore, score: TaskScore) -> Difference:
    if list(source.outcomes) != list(score.outcomes) or source.samples != score.samples:
        raise QtoolError(f"{task}: source and {name} were asked other problems; their scores must not be paired.")
    return rate_difference(source.solved, score.solved, score.samples)


def _task(score: TaskScore, loss: Loss | None) -> TaskSummary:
    solved, samples = score.solved, score.samples
    pass_at = {1: mean_rate(solved, samples)}
    for k in SHOWN_K:
        if k <= samples:
            pass_at[k] = bootstrap_mean([pass_at_k(samples, right, k) for right in solved])
    return TaskSummary(
        digest=score.digest, settings=score.settings, samples=samples, pass_at=pass_at, loss=loss,
        solved=dict(zip(score.outcomes, solved, strict=True)), left_out=score.left_out, in_process=score.in_process,
        sandbox=score.sandbox, source=score.source,
    )  # fmt: skip


def _text(score: FidelityScore) -> TextSummary:
    return TextSummary(
        digest=score.digest, settings=score.settings, kls=score.kl, nlls=score.nll, kl=_mean(score.kl),
        perplexity=_perplexity(score.nll), top1=sum(score.top1) / len(score.top1),
        kl_by_position=score.kl_by_position, position_bin=score.position_bin, kl_by_layer=score.kl_by_layer,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> Interval:
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap_mean(values)


def _perplexity(nlls: Sequence[float]) -> Interval:
    """exp of the mean negative log-likelihood, and of the ends of its interval."""
    found = _mean(nlls)
    low, high = (end if math.isnan(end) else bounded_exp(end) for end in (found.low, found.high))
    return Interval(perplexity(nlls), low, high, found.confidence)


def perplexity(nlls: Sequence[float]) -> float:
    """exp of the mean negative log-likelihood."""
    return bounded_exp(sum(nlls) / len(nlls))


def bounded_exp(value: float) -> float:
    """exp; infinite where a float cannot hold it, and for NaN."""
    return math.exp(value) if value < 700 else math.inf
