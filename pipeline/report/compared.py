"""`qtool compare A B --html`: the answer, every measurement, and which problems were lost and gained, one HTML file."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.report.markup import visible
from qtool.report.page import page, table
from qtool.report.tables import Row
from qtool.runs.baseline import Measured
from qtool.runs.compare import Change
from qtool.runs.evidence import p_text, task_label

Pair = tuple[str, Measured, Measured]
MOST = 200  # problems that are named


def compared_page(
    names: tuple[str, str], pairs: Sequence[Pair], changes: Sequence[Change], notes: Sequence[str]
) -> str:
    """The file's text. ``names``: A and B as they were typed."""
    worse = [change for change in changes if change.shown == "worse"]
    told = any(change.shown in ("better", "no loss shown") for change in changes)
    kind = "fail" if worse else "pass" if told else "undecided"
    answer = (
        f"B is worse: {', '.join(f'{change.model} on {change.what}' for change in worse)}" if worse
        else "No loss from A to B is shown" if told else "Nothing here can show a loss"
    )  # fmt: skip
    a, b = (f"<code>{visible(name)}</code>" for name in names)
    header = f'<h1>Is B worse than A?</h1><p class="soft">A: {a} · B: {b}</p>'
    header += f'<div class="verdict {kind}"><p>{visible(answer)}</p></div>'
    rows = table([_row(change) for change in changes], "scores words", "every measurement of A and B")
    told_notes = "".join(f"<li>{visible(note)}</li>" for note in notes)
    tests = sum(change.p is not None for change in changes)
    about = "Brackets are 95 % intervals." + (f" p is Holm-adjusted over {tests} tests." if tests > 1 else "")
    sections = [("measured", "Measurements", f'{rows}<p class="soft">{about}</p><ul>{told_notes}</ul>')]
    moved = "".join(_problems(label, one, other) for label, one, other in pairs)
    if moved:
        sections.append(("problems", "Problems whose outcome changed", moved))
    return page("A and B · qtool", header, sections, "This page is one file: it loads nothing.")


def _row(change: Change) -> Row:
    n = change.numbers
    p = p_text(n.p_holm, None) if n is not None and n.p_holm is not None else ""
    return {
        "model": change.model, "what": change.what, "result": "" if change.shown == "not judged" else change.shown,
        "A": change.before, "B": change.after, "change": change.change, "p": p,
    }  # fmt: skip


def _problems(label: str, one: Measured, other: Measured) -> str:
    """Of one pair of models, a list for each task that both were asked."""
    parts = []
    for task in [task for task in one.tasks if task in other.tasks]:
        before, after = one.tasks[task].solved, other.tasks[task].solved
        lost = [problem for problem, count in before.items() if after.get(problem, count) < count]
        gained = [problem for problem, count in before.items() if after.get(problem, count) > count]
        if lost or gained:
            parts.append(
                f"<h3>{visible(label)}, {visible(task_label(task))}</h3>{_list('lost', lost)}{_list('gained', gained)}"
            )
    return "".join(parts)


def _list(word: str, problems: Sequence[str]) -> str:
    if not problems:
        return ""
    more = f" and {len(problems) - MOST} more" if len(problems) > MOST else ""
    named = ", ".join(f"<code>{visible(problem)}</code>" for problem in problems[:MOST])
    return f"<p>{len(problems)} {word}: {named}{more}</p>"
