"""Gates: the recipe's conditions, judged for every output they name, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.convert.artifact import Manifest
from qtool.evaluate import regression
from qtool.evaluate.rates import rate_difference
from qtool.evaluate.regression import Verdict
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


def judge(
    gates: Sequence[GateSection], manifests: Mapping[str, Manifest], source_bits: float, scores: Scores
) -> list[GateResult]:
    """Every gate on every output it names (all that were made, when it names none). What was not measured is undecided
    and says why; nothing is left out. ``source_bits``: bits a weight of the source."""
    results = []
    for gate in gates:
        for name in [gate.output] if gate.output else manifests:
            for label, verdict in _verdicts(gate, name, manifests.get(name), source_bits, scores):
                results.append(GateResult(name, label, verdict.result, verdict.reason, gate.on_undecided))
    return results


def _verdicts(
    gate: GateSection, name: str, manifest: Manifest | None, source_bits: float, scores: Scores
) -> Iterator[tuple[str, Verdict]]:
    label = _label(gate)
    if manifest is None:
        yield label, Verdict("undecided", "this run did not make that output")
    elif gate.max_size is not None:
        yield label, regression.judge_max_size(manifest.file_bytes, round(gate.max_size * 1e9))
    elif gate.min_bits_saved is not None:
        yield label, regression.judge_min_bits_saved(source_bits - manifest.bits_per_weight, gate.min_bits_saved)
    elif gate.max_kld is not None:
        yield label, _kld_verdict(name, gate.max_kld, scores)
    else:
        yield from _score_verdicts(gate, label, name, scores)


def _label(gate: GateSection) -> str:
    if gate.max_size is not None:
        return f"max_size {gate.max_size:g} GB"
    if gate.min_bits_saved is not None:
        return f"min_bits_saved {gate.min_bits_saved:g} bpw"
    if gate.max_kld is not None:
        return f"max_kld {gate.max_kld:g}"
    return f"max_drop {gate.max_drop:g} points" if gate.max_drop is not None else f"min_recovery {gate.min_recovery:g}"


def _kld_verdict(name: str, limit: float, scores: Scores) -> Verdict:
    score = scores.fidelity.get(name)
    if score is None:
        return Verdict("undecided", "no KL was measured: `evaluate:` names no `text:`")
    if not all(map(math.isfinite, score.kl)):
        return Verdict("fail", "the KL is not a number: the model's output holds NaN or Inf")
    return regression.judge_max_kld(regression.bootstrap_mean(score.kl), limit)


def _score_verdicts(gate: GateSection, kind: str, name: str, scores: Scores) -> Iterator[tuple[str, Verdict]]:
    tasks = [gate.task] if gate.task else list(scores.tasks.get(name, {}))
    if not tasks:
        yield kind, Verdict("undecided", "no task was run: `evaluate:` names none")
    for task in tasks:
        source, quantized = (scores.tasks.get(subject, {}).get(task) for subject in ("source", name))
        label = f"{kind} on {Path(task).name}"
        if source is None or quantized is None:
            yield label, Verdict("undecided", f"{name if source else 'the source'} has no score on {Path(task).name}")
        elif gate.max_drop is not None:
            difference = rate_difference(source.solved, quantized.solved, source.samples)
            yield label, regression.judge_max_drop(difference, gate.max_drop)
        elif gate.min_recovery is not None and any(source.solved):
            difference = rate_difference(source.solved, quantized.solved, source.samples)
            found = regression.recovery(difference, sum(source.rates) / len(source.rates))
            yield label, regression.judge_min_recovery(found, gate.min_recovery)
        else:
            yield label, Verdict("undecided", "the source solved nothing: there is nothing to recover")
