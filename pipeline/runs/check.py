"""`qtool check`: a stored run judged again, its gates and, beside a baseline, what got worse; as JSON for
programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from qtool import QtoolError
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.verify.files import check_files
from qtool.recipe.judging import GateSection
from qtool.runs.baseline import Baseline, measured
from qtool.runs.compare import Change, compare
from qtool.runs.evidence import Result, p_text
from qtool.runs.gates import GateResult, judge
from qtool.runs.record import RunRecord


def check_run(run: RunRecord, gates: Sequence[GateSection], baseline: Baseline | None) -> list[GateResult]:
    """Verification of each artifact, every gate, and every measurement of the baseline. Raises QtoolError when the
    baseline's scores must not be paired with this run's."""
    results = [_verified(name, run) for name in run.lock.artifacts]
    results += judge(run.summary, gates)
    if baseline is not None:
        results += _against(run, baseline)
    return results


def _verified(name: str, run: RunRecord) -> GateResult:
    checks = run.checks[name].checks if name in run.checks else []
    broken = [f"{c.name}: {c.detail}" for c in checks if c.required and c.status == "fail"]
    if not any(c.required and c.status == "pass" for c in checks):
        broken.append("the run holds no checks of it")
    now, reason = _now(name, run)
    reason = "; ".join([*broken, *now]) or f"files, tensors and required rules held in the run; {reason}"
    return GateResult(name, "verified", "fail" if broken or now else "pass", reason, "fail")


def _now(name: str, run: RunRecord) -> tuple[list[str], str]:
    """(what is no longer as the run left it, what was looked at): the artifact's files by the manifest that the run
    kept, where its folder is still there."""
    entry, manifest = run.lock.artifacts[name], run.manifests[name]
    folder = run.folder / entry.path
    if not os.path.lexists(folder / MANIFEST):
        return [], f"as stored: {os.path.relpath(folder)} is gone"
    try:
        there = read_manifest(folder)
    except QtoolError as error:
        return [error.message], ""
    if there.key != manifest.key:
        return [], f"as stored: {os.path.relpath(folder)} holds another artifact now"
    _, reasons, _ = check_files(folder, manifest)
    reasons += ["its manifest is not the one of the run"] if there != manifest else []
    return [f"since the run: {reason}" for reason in reasons[:3]], f"the {len(manifest.files)} files are unchanged"


def _against(run: RunRecord, baseline: Baseline) -> list[GateResult]:
    now = measured(run.folder)
    pairs = [(name, was, now.subjects[name]) for name, was in baseline.subjects.items() if name in now.subjects]
    if not pairs:
        raise QtoolError(f"the baseline has {', '.join(baseline.subjects)}; this run {', '.join(now.subjects)}.")
    changes = compare(pairs, baseline.source == now.source)
    results = [_result(change) for change in changes if change.shown != "not judged"]
    gone = [name for name in baseline.subjects if name not in now.subjects]
    return results + [GateResult(name, "in the baseline", "fail", "this run did not make it", "fail") for name in gone]


def _result(change: Change) -> GateResult:
    verdict: Result = "fail" if change.shown == "worse" else "pass"
    if change.shown == "not compared":  # what this run alone has is new; what the baseline alone has is missing
        verdict = "pass" if change.only == "B" else "fail"
    if change.shown == "uninformative":
        verdict = "undecided"
    numbers = change.numbers
    p = f", {p_text(numbers.p_holm, numbers.comparisons)}" if numbers and numbers.p_holm is not None else ""
    values = f"{change.before} -> {change.after}: " if change.before else ""
    words = {"worse": "worse than the baseline", "better": "better than the baseline"}.get(change.shown, change.shown)
    return GateResult(
        change.model, f"no regression: {change.what}", verdict, f"{words}: {values}{change.change}{p}",
        "warn" if change.shown == "uninformative" else "fail", numbers,
    )  # fmt: skip


_RESULTS = TypeAdapter(list[GateResult], config=ConfigDict(defer_build=True, ser_json_inf_nan="strings"))


def as_json(run: RunRecord, results: Sequence[GateResult]) -> dict[str, Any]:
    """For programs: every result, the numbers it rests on, and its reason."""
    found = json.loads(_RESULTS.dump_json(list(results)))
    return {
        "run": run.folder.name,
        "model": run.lock.source.model,
        "commit": run.lock.source.commit,
        "finished": run.finished,
        "failed": any(result.failed for result in results),
        "results": [
            {
                "output": r.output, "gate": r.gate, "verdict": r.verdict, "failed": r.failed, "reason": r.reason,
                "evidence": data["evidence"],
            }
            for r, data in zip(results, found, strict=True)
        ],
    }  # fmt: skip
