"""A run as one HTML file: verdict, scores, pictures, problems, checks, recipe."""

from __future__ import annotations

from qtool.report import loading
from qtool.report.along import TITLE, along_note, along_rows
from qtool.report.markup import visible
from qtool.report.measured import measured_faults, measured_rows, measured_ways
from qtool.report.page import figure, page, table
from qtool.report.pictures import Picture, cost_lines, verdict_of
from qtool.report.problems import task_section
from qtool.report.served import PROVED, finding_rows, proof_rows, proof_ways
from qtool.report.tables import by_task, footnote, score_rows
from qtool.runs.evidence import size_text, spent_text
from qtool.runs.record import RunRecord

MOST_COLUMNS = 9  # of scores, on a screen
SHORTEST = 0.05  # seconds of a stage that is shown


def html_report(run: RunRecord, drawn: list[Picture]) -> str:
    """The file's text; everything that a model, a recipe or a file name wrote is escaped."""
    source = run.lock.source
    about = f"Source commit <code>{visible(source.commit[:19])}</code> · run <code>{visible(run.folder.name)}</code> · "
    about += f"{visible(run.finished)} · {visible(run.lock.device)}"
    header = f'<h1>{visible(source.name)}: what quantization cost</h1><p class="soft">{about}</p>{_verdict(run)}'
    sections = [("scores", "Scores", _scores(run))]
    if run.summary.measured:
        sections.append(("measured", "Memory and speed", _measured(run, drawn)))
    if run.summary.proofs:
        sections.append(("served", "In real servers", _served(run)))
    if run.summary.along:
        sections.append(("along", TITLE, _along(run, drawn)))
    for anchor, heading in (
        ("size", "Size against quality"),
        ("kl", "Where the distribution moved"),
        ("errors", "Error of every linear"),
    ):
        shown = [figure(p.svg, p.narrow, p.caption, p.title) for p in drawn if p.section == anchor]
        if shown:
            sections.append((anchor, heading, f'<div class="grid">{"".join(shown)}</div>'))
    if run.summary.tasks:
        sections.append(("problems", "Problem by problem", _problems(run)))
    sections.append(("checks", "Checks", _checks(run)))
    if run.stages or run.peaks:
        sections.append(("spent", "Time and memory of this run", _spent(run)))
    sections.append(("recipe", "Recipe and versions", _recipe(run)))
    made = f"qtool {visible(run.lock.versions.get('qtool-llm', ''))}. This page is one file: it loads nothing."
    return page(f"{source.name} · qtool", header, sections, made)


def _verdict(run: RunRecord) -> str:
    kind, headline = verdict_of(run)
    gates = "".join(
        f'<li><span class="tag {v.verdict}">{"FAIL" if v.failed else v.verdict}</span>'
        f"<span><b>{visible(v.output)}</b> {visible(v.gate)}: {visible(v.reason)}</span></li>"
        for v in run.verdicts
    )
    return f'<div class="verdict {kind}"><p>{visible(headline)}</p><ul>{gates}</ul></div>'


def _scores(run: RunRecord) -> str:
    lines = "".join(f"<li><b>{visible(name)}</b>: {visible(said)}</li>" for name, said in cost_lines(run))
    rows = "".join(
        table(part, "scores", "scores of the source and every artifact")
        for part in by_task(score_rows(run.summary), run.summary, MOST_COLUMNS)
    )
    return f'<ul>{lines}</ul>{rows}<p class="soft">{visible(footnote(run.summary))}</p>'


def _measured(run: RunRecord, drawn: list[Picture]) -> str:
    rows = table(measured_rows(run.summary.measured), "scores", "memory and speed of the source and every artifact")
    ways = visible(" ".join(measured_ways(run.summary.measured)))
    faults = "".join(f"<li>{visible(fault)}</li>" for fault in measured_faults(run.summary.measured))
    shown = "".join(figure(p.svg, p.narrow, p.caption, p.title) for p in drawn if p.section == "measured")
    return f'{rows}<p class="soft">{ways}</p><ul>{faults}</ul><div class="grid">{shown}</div>'


def _along(run: RunRecord, drawn: list[Picture]) -> str:
    rows = table(along_rows(run.summary), "scores", "the source and every artifact along a long text")
    shown = "".join(figure(p.svg, p.narrow, p.caption, p.title) for p in drawn if p.section == "along")
    return f'{rows}<p class="soft">{visible(along_note(run.summary))}</p><div class="grid">{shown}</div>'


def _served(run: RunRecord) -> str:
    proofs = run.summary.proofs
    rows = table(proof_rows(proofs), "words", "what was started in real servers")
    found = table(finding_rows(proofs), "words", "everything that was looked at")
    ways = visible(" ".join(proof_ways(proofs)))
    return (
        f'<p>{visible(PROVED)}</p>{rows}<p class="soft">{ways}</p><details><summary>Findings</summary>{found}</details>'
    )


def _problems(run: RunRecord) -> str:
    questions = run.questions()
    parts = []
    for number, task in enumerate(run.summary.tasks):
        scores = {name: found[task] for name, found in run.scores.tasks.items() if task in found}
        parts.append(task_section(task, scores, questions.get(task, {}), number))
    return "\n".join(parts)


def _checks(run: RunRecord) -> str:
    parts = []
    for name, checked in run.checks.items():
        loads = loading.what_loads_it(checked.checks)
        said = visible("; ".join(filter(None, ["sound" if checked.sound else "NOT sound", loads])))
        notes = "".join(f"<li>{visible(note)}</li>" for note in run.manifests[name].notes)
        rows = [
            {"check": line.name, "result": line.result, "detail": line.detail} for line in loading.lines(checked.checks)
        ]
        body = f"<ul>{notes}</ul>{table(rows, 'words', f'checks of {name}')}"
        opened = "" if checked.sound else " open"
        parts.append(f"<details{opened}><summary><b>{visible(name)}</b>: {said}</summary>{body}</details>")
    return "\n".join(parts)


def _spent(run: RunRecord) -> str:
    """Each stage with its seconds and a bar, the longest one whole; peaks of memory."""
    longest = max(run.stages.values(), default=0.0) or 1.0
    bars = "".join(
        f'<li><span>{visible(name)}</span><meter min="0" max="{longest:.2f}" value="{seconds:.2f}" '
        f'aria-label="{visible(name)}">{seconds:.1f}</meter><span>{seconds:,.1f} s</span></li>'
        for name, seconds in run.stages.items()
        if seconds >= SHORTEST
    )
    peaks = "; ".join(f"{size_text(nbytes)} {visible(place)}" for place, nbytes in run.peaks.items())
    said = f"{run.seconds:,.0f} s in all" + (f"; at most {peaks}" if peaks else "")
    side = " Stages that ran side by side add up to more." if sum(run.stages.values()) > run.seconds else ""
    return f'<div class="spent"><p>{said}.{side}</p><ul>{bars}</ul></div>'


def _recipe(run: RunRecord) -> str:
    lock = run.lock
    facts = {
        "model": lock.source.model, "source commit": lock.source.commit, "calibration digest": lock.calibration,
        "recipe digest": lock.recipe, "device": lock.device, "took": spent_text(run.seconds, run.stages, run.peaks),
    }  # fmt: skip
    facts |= {f"artifact {name}": entry.key for name, entry in lock.artifacts.items()}
    for name, settings in _settings(run).items():
        facts[f"settings, {name}"] = settings
    rows = [{"what": key, "value": value} for key, value in (facts | lock.versions).items()]
    return f"<pre>{visible(run.recipe_text.strip())}</pre>{table(rows, 'words', 'versions and digests')}"


def _settings(run: RunRecord) -> dict[str, str]:
    """Task -> how it was asked, and in which sandbox its programs ran."""
    said = {}
    for task, score in next((model.tasks for model in run.summary.models.values() if model.tasks), {}).items():
        settings = ", ".join(f"{key} {value}" for key, value in score.settings.model_dump().items() if value != "")
        said[task] = f"{settings}; sandbox {score.sandbox}" + (f"; from {score.source}" if score.source else "")
    return said
