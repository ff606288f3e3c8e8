"""Gates: the recipe's conditions, judged for every output they name, with their uncertainty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qtool.convert.artifact import Artifact
from qtool.evaluate import regression
from qtool.recipe import GateSection
from qtool.scores import Scores


@dataclass(frozen=True)
class GateResult:
    """One gate on one output. ``verdict``: pass, fail, or undecided (which fails where the gate says so)."""

    output: str
    gate: str
    verdict: regression.Result
    reason: str
    on_undecided: str

    @property
    def failed(self) -> bool:
        return self.verdict == "fail" or (self.verdict == "undecided" and self.on_undecided == "fail")


def judge(gates: Sequence[GateSection], artifacts: dict[str, Artifact], scores: Scores) -> list[GateResult]:
    """Every gate on every output it names (all, when it names none)."""
    results = []
    for gate in gates:
        for name, artifact in artifacts.items():
            if gate.output in (None, name):
                for label, verdict in _verdicts(gate, name, artifact, scores):
                    results.append(GateResult(name, label, verdict.result, verdict.reason, gate.on_undecided))
    return results


def _verdicts(
    gate: GateSection, name: str, artifact: Artifact, scores: Scores
) -> Iterator[tuple[str, regression.Verdict]]:
    if gate.max_size is not None:
        size = artifact.manifest.file_bytes if artifact.manifest else 0
        yield f"max_size {gate.max_size:g} GB", regression.judge_max_size(size, round(gate.max_size * 1e9))
    elif gate.max_kld is not None:
        label = f"max_kld {gate.max_kld:g}"
        score = scores.fidelity.get(name)
        if score is None:
            yield label, regression.Verdict("undecided", "no KL was measured: `evaluate:` names no `text:`")
        else:
            yield label, regression.judge_max_kld(regression.bootstrap_mean(score.kl), gate.max_kld)
    else:
        yield from _score_verdicts(gate, name, scores)


def _score_verdicts(gate: GateSection, name: str, scores: Scores) -> Iterator[tuple[str, regression.Verdict]]:
    kind = f"max_drop {gate.max_drop:g} points" if gate.max_drop is not None else f"min_recovery {gate.min_recovery:g}"
    tasks = [gate.task] if gate.task else list(scores.tasks.get(name, {}))
    if not tasks:
        yield kind, regression.Verdict("undecided", "no task was run: `evaluate:` names none")
    for task in tasks:
        source, quantized = scores.tasks["source"][task].passed, scores.tasks[name][task].passed
        label = f"{kind} on {task}"
        if gate.max_drop is not None:
            yield label, regression.judge_max_drop(regression.paired_difference(source, quantized), gate.max_drop)
        elif gate.min_recovery is not None and any(source):
            ratio = regression.bootstrap_ratio([float(x) for x in quantized], [float(x) for x in source])
            yield label, regression.judge_min_recovery(ratio, gate.min_recovery)
        else:
            yield label, regression.Verdict("undecided", "the source solved nothing: there is nothing to recover")
