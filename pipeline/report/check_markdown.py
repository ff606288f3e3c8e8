"""`qtool check` as Markdown: for the summary of a CI job, or a comment on a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.report.markup import spelt
from qtool.report.tables import footnote, markdown_cell, markdown_table, score_rows
from qtool.runs.evidence import spent_text
from qtool.runs.gates import GateResult
from qtool.runs.record import RunRecord
from qtool.runs.shelf import name_of_run

SIGNS = {"pass": "✅ pass", "undecided": "❔ undecided", "fail": "❌ fail"}
LONGEST = 60_000  # characters: a comment on GitHub ends at 65,536


def check_markdown(run: RunRecord, results: Sequence[GateResult]) -> str:
    """The verdict, a row for each result with those that failed first, the scores, time and place."""
    failed = [result for result in results if result.failed]
    open_ = [result for result in results if result.verdict == "undecided" and not result.failed]
    rest = [result for result in results if result not in failed and result not in open_]
    said = f"{len(failed)} of {len(results)} checks failed" if failed else f"all {len(results)} checks held"
    if open_ and not failed:
        said = f"{len(rest)} of {len(results)} checks held, {len(open_)} undecided"
    name = name_of_run(run.folder)
    parts = [f"## {SIGNS['fail' if failed else 'pass'].split()[0]} {_cell(run.lock.source.name)}: {said}"]
    rows = [
        {
            "result": SIGNS["fail" if r.failed else r.verdict], "output": _text(r.output), "check": _text(r.gate),
            "why": _text(r.reason),
        }
        for r in [*failed, *open_, *rest]
    ]  # fmt: skip
    if rows:
        parts.append(markdown_table(rows))
    parts.append(f"<details><summary>Scores</summary>\n\n{markdown_table(score_rows(run.summary))}\n\n"
                 f"{_cell(footnote(run.summary))}\n\n</details>")  # fmt: skip
    called, spent = f" ({name})" if name else "", _cell(spent_text(run.seconds, run.stages, run.peaks))
    parts.append(f"Run `{run.folder.name}`{called} of {run.finished} on {_cell(run.lock.device)}, {spent}.")
    text = "\n\n".join(parts) + "\n"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n\n… cut: a comment ends here.\n"


def _cell(text: str) -> str:
    return markdown_cell(_text(text))


def _text(text: str) -> str:
    """What a model or a recipe wrote, as it is and no mention of anybody; `markdown_table` sees to the rest."""
    return spelt(text).replace("@", "@\N{ZERO WIDTH SPACE}").replace("`", "'")
