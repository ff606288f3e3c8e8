"""Gates: the recipe's conditions, judged for every output they name, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtool.evaluate.buckets import FEW
from qtool.evaluate.engines.table import ENGINES
from qtool.recipe.judging import GateSection
from qtool.recipe.long import LongGate
from qtool.runs.evidence import Evidence, Result, of_interval, of_loss, plain, reason, result_of
from qtool.runs.informative import of_task, too_low_for
from qtool.runs.summary import Loss, ModelSummary, Summary


@dataclass(frozen=True)
class GateResult:
    """One gate on one output. ``verdict``: pass, fail, or undecided (which fails where the gate says so). ``reason`` is
    for people; programs read ``evidence``, None where there is no number: nothing was measured, or a file was checked.
    """

    output: str
    gate: str
    verdict: Result
    reason: str
    on_undecided: str
    evidence: Evidence | None = None

    @property
    def failed(self) -> bool:
        return self.verdict == "fail" or (self.verdict == "undecided" and self.on_undecided == "fail")


@dataclass(frozen=True)
class _Plain:
    """No number to judge by: the verdict, and why."""

    why: str
    verdict: Result = "undecided"


def judge(summary: Summary, gates: Sequence[GateSection]) -> list[GateResult]:
    """Every gate on every model it names (all beside the source, when it names none). What was not measured is
    undecided and says why; nothing is left out."""
    results = []
    for gate in gates:
        others = [name for name in summary.models if name != "source"] or ["source"]
        for name in [gate.output] if gate.output else others:
            for label, found in _found(gate, name, summary):
                results.append(_result(gate, name, label, found))
    return results


def _result(gate: GateSection, name: str, label: str, evidence: Evidence | _Plain) -> GateResult:
    if isinstance(evidence, _Plain):
        return GateResult(name, label, evidence.verdict, evidence.why, gate.on_undecided)
    return GateResult(name, label, result_of(evidence), reason(evidence), gate.on_undecided, evidence)


def _found(gate: GateSection, name: str, summary: Summary) -> Iterator[tuple[str, Evidence | _Plain]]:
    label, model = _label(gate), summary.models.get(name)
    if model is None:
        yield label, _Plain("this run did not make that output")
    elif name == "source":
        yield label, _Plain("no model was scored against a source")
    elif gate.max_size is not None or gate.min_bits_saved is not None:
        yield label, _size(gate, model, summary.models.get("source"))
    elif gate.served is not None:
        yield label, _served(gate.served, model)
    elif gate.max_kld is not None:
        yield label, _kld(gate.max_kld, model) if gate.long is None else _kld_along(gate.max_kld, gate.long, model)
    else:
        yield from _losses(gate, label, name, summary)


def _label(gate: GateSection) -> str:
    if gate.max_size is not None:
        return f"max_size {plain(gate.max_size)} GB"
    if gate.min_bits_saved is not None:
        return f"min_bits_saved {gate.min_bits_saved:g} bpw"
    if gate.served is not None:
        return f"served {gate.served}"
    if gate.max_kld is not None:
        return f"max_kld {plain(gate.max_kld)}" + (_where(gate.long) if gate.long else "")
    return f"max_drop {gate.max_drop:g} points" if gate.max_drop is not None else f"min_recovery {gate.min_recovery:g}"


def _where(long: LongGate) -> str:
    """` at 64K-128K, q8_0`."""
    name = long.condition.name
    return f" at {long.bucket or 'the long text'}" + (f", {name}" if name else "")


def _size(gate: GateSection, model: ModelSummary, source: ModelSummary | None) -> Evidence | _Plain:
    """A size is exact: never undecided where it is known."""
    if gate.max_size is not None:
        if model.size is None or model.size.files is None:
            return _Plain("the size of its files is not known: this run did not make it")
        return Evidence("size", model.size.files, round(gate.max_size * 1e9))
    if model.size is None or source is None or source.size is None:
        return _Plain("the bits a weight of it and of its source are not known: this run did not make it")
    saved = source.size.bits_per_weight - model.size.bits_per_weight
    return Evidence("bits saved", saved, gate.min_bits_saved)


def _served(engine: str, model: ModelSummary) -> _Plain:
    found = [proof for proof in model.proofs if proof.engine == engine]
    if not found:
        return _Plain(f"nobody proved it in {engine}: `serve: {{prove: [{engine}]}}` in the recipe, or `qtool prove`")
    failures = [f"{finding.what}: {finding.detail}" for proof in found for finding in proof.failures]
    if failures:
        return _Plain("; ".join(failures), "fail")
    return _Plain("; ".join(f"proved in {proof.version}, {proof.dtype}" for proof in found), "pass")


def _kld(limit: float, model: ModelSummary) -> Evidence | _Plain:
    text = model.text
    if text is None:
        return _Plain("no KL was measured: `evaluate:` names no `text:`")
    if math.isnan(text.kl.estimate):
        return _Plain("the KL is not a number: the model's output holds NaN or Inf", "fail")
    return of_interval("KL", text.kl, limit, len(text.kls))


def _kld_along(limit: float, asked: LongGate, model: ModelSummary) -> Evidence | _Plain:
    """Of the score under the condition that the gate names, and of no other."""
    name = asked.condition.name
    under = [a for said, a in model.along.items() if ENGINES[a.settings.engine].facts.said(asked.condition) == said]
    if not under:
        return _Plain(f"no KL was measured along a long text{f' under {name}' if name else ''}")
    (along,) = under
    if asked.bucket is None:
        kl, blocks = along.kl, along.kls
    else:
        buckets = {bucket.name: bucket for bucket in along.buckets}
        if (bucket := buckets.get(asked.bucket)) is None:
            return _Plain(f"the long text was of other buckets: {', '.join(buckets)}")
        kl, blocks = bucket.kl, along.kls[along.blocks(bucket)]
    if math.isnan(kl.estimate):
        return _Plain("the KL is not a number: the model's output holds NaN or Inf", "fail")
    if len(blocks) < FEW:
        return _Plain(f"{len(blocks)} blocks of {along.block} tokens are too few to judge by; take a longer text")
    return of_interval("KL", kl, limit, len(blocks))


def _losses(gate: GateSection, kind: str, name: str, summary: Summary) -> Iterator[tuple[str, Evidence | _Plain]]:
    asked, source = summary.models[name].tasks, summary.models.get("source", ModelSummary()).tasks
    tasks = [gate.task] if gate.task else list(asked)
    if not tasks:
        yield kind, _Plain("no task was run: `evaluate:` names none")
    for task in tasks:
        label = f"{kind} on {Path(task).name}"
        loss = asked[task].loss if task in asked else None
        if task not in source or loss is None:
            who = name if task in source else "the source"
            yield label, _Plain(f"{who} has no score on {Path(task).name}")
        else:
            why = of_task(summary, task) if not any(source[task].solved.values()) else ""
            why = why or (too_low_for(source[task], gate.max_drop) if gate.max_drop is not None else "")
            yield label, _Plain(why) if why else _loss(gate, loss)


def _loss(gate: GateSection, loss: Loss) -> Evidence | _Plain:
    if gate.max_drop is not None:
        return of_loss(loss, gate.max_drop)
    if gate.min_recovery is not None and loss.recovery is not None:
        return of_loss(loss, gate.min_recovery, "recovery")
    return _Plain("the source solved nothing: there is nothing to recover")
