"""The report's problems: who solved which, and the answers to every problem whose outcome changed, side by side."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from qtool.evaluate.outcomes import KINDS, MEANINGS, counts
from qtool.evaluate.scorecard import ProblemOutcome, TaskScore
from qtool.report.markup import spelt, visible
from qtool.report.page import table
from qtool.report.tables import Row, count_of
from qtool.runs.evidence import task_label
from qtool.runs.groups import Group, groups_of

LONGEST = 12_000  # characters of an answer that are shown
MANY_LINES = 1000
LONG_LINE = 400  # characters of a line that is compared letter by letter
ALIKE = 0.5  # of two lines' letters, that it is worth while


def task_section(task: str, scores: Mapping[str, TaskScore], prompts: Mapping[str, str], number: int) -> str:
    """HTML for one task: counts, the matrix, the answers that changed. ``scores``: subject -> its score."""
    rates = {name: dict(zip(score.outcomes, score.rates, strict=True)) for name, score in scores.items()}
    problems = list(next(iter(rates.values())))
    same = [problem for problem in problems if len({rates[name][problem] for name in rates}) == 1]
    differing = [problem for problem in problems if problem not in set(same)]
    every = sum(all(rates[name][p] == 1 for name in rates) for p in same)
    none = sum(all(rates[name][p] == 0 for name in rates) for p in same)
    said = f"{len(problems)} problems: {every} solved by every model, {none} by none, {len(differing)} told them apart."
    places = {problem: f"t{number}-{rank}" for rank, problem in enumerate(problems)}
    changed = [p for p in differing if _changed(p, rates)]
    parts = [f'<div class="task"><h3>{visible(task_label(task))}</h3><p>{said}</p>']
    parts.append(_outcomes(scores))
    parts += _by_group(groups_of(scores) if "source" in scores else [])
    if differing:
        parts.append(_matrix(differing, rates, places, set(changed)))
    whole = _matrix(problems, rates, places, set(changed))
    parts.append(f'<details class="all"><summary>All {len(problems)} problems</summary>{whole}</details>')
    if changed:
        parts.append(f"<h4>Answers to the {len(changed)} problems whose outcome changed</h4>")
        parts += [_answers(problem, scores, rates, prompts.get(problem, ""), places[problem]) for problem in changed]
    left_out = next(iter(scores.values())).left_out
    if left_out:
        rows = "".join(f"<li><code>{visible(name)}</code>: {visible(why)}</li>" for name, why in left_out.items())
        missing = count_of(len(left_out), "problem")
        parts.append(f"<details><summary>Not asked: {missing}</summary><ul>{rows}</ul></details>")
    return "\n".join([*parts, "</div>"])


def _outcomes(scores: Mapping[str, TaskScore]) -> str:
    """How each model's answers ended, a row each; what each word means."""
    found = {
        name: counts(a for problem in score.outcomes for a in score.answers(problem)) for name, score in scores.items()
    }
    kinds = [kind for kind in KINDS if any(kind in row for row in found.values())]
    rows = [{"model": name} | {kind: str(row.get(kind, 0)) for kind in kinds} for name, row in found.items()]
    said = "; ".join(f"{kind}: {MEANINGS[kind]}" for kind in kinds)
    return f'{table(rows, "scores", "how the answers ended")}<p class="soft">{visible(said)}.</p>'


def _by_group(groups: Sequence[Group]) -> list[str]:
    """A table for each kind of group: pass@1 of every model, and what each artifact lost and gained."""
    tables = []
    for kind in dict.fromkeys(group.kind for group in groups):
        rows: list[Row] = []
        for group in (one for one in groups if one.kind == kind):
            row = {kind: group.value, "problems": str(group.problems)}
            for name, rate in group.rates.items():
                moved = f", {group.lost[name]} lost, {group.gained[name]} gained" if name in group.lost else ""
                row[name] = f"{rate.estimate:.0%} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]{moved}"
            rows.append(row)
        note = "Brackets: 95 % intervals of each score alone. Groups are small, and no test was made on them."
        tables.append(f'{table(rows, "scores", f"scores by {kind}")}<p class="soft">{note}</p>')
    return tables


def _changed(problem: str, rates: Mapping[str, Mapping[str, float]]) -> list[str]:
    source = rates.get("source", {}).get(problem)
    return [name for name in rates if name != "source" and source is not None and rates[name][problem] != source]


def _matrix(
    problems: list[str], rates: Mapping[str, Mapping[str, float]], places: Mapping[str, str], linked: set[str]
) -> str:
    head = "".join(f'<th scope="col">{visible(name)}</th>' for name in rates)
    rows = []
    for problem in problems:
        name = visible(problem)
        first = f'<a href="#{places[problem]}">{name}</a>' if problem in linked else name
        cells = "".join(_cell(rates[subject][problem]) for subject in rates)
        rows.append(f'<tr data-is="{_kinds(problem, rates)}"><th scope="row">{first}</th>{cells}</tr>')
    table = f'<table class="matrix"><thead><tr><th scope="col">problem</th>{head}</tr></thead>'
    label = "which model solved which problem"
    body = f"{table}<tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll tall" tabindex="0" role="region" aria-label="{label}">{body}</div>'


def _kinds(problem: str, rates: Mapping[str, Mapping[str, float]]) -> str:
    """What a filter asks of a problem, in words that the page's script knows."""
    found = [of[problem] for of in rates.values()]
    source = rates.get("source", {}).get(problem)
    said = {
        "every": all(rate == 1 for rate in found), "none": all(rate == 0 for rate in found),
        "apart": len(set(found)) > 1, "lost": source is not None and min(found) < source,
        "gained": source is not None and max(found) > source,
    }  # fmt: skip
    return " ".join(word for word, true in said.items() if true)


def _cell(rate: float) -> str:
    kind, said = ("yes", "solved") if rate == 1 else ("no", "failed") if rate == 0 else ("part", f"{rate:.0%}")
    return f'<td class="{kind}" data-sort="{rate:.4f}">{said}</td>'


def _answers(
    problem: str, scores: Mapping[str, TaskScore], rates: Mapping[str, Mapping[str, float]], prompt: str, place: str
) -> str:
    source, changed = scores["source"], _changed(problem, rates)
    lost = [name for name in changed if rates[name][problem] < rates["source"][problem]]
    gained = [name for name in changed if name not in lost]
    both = (("lost", lost), ("gained", gained))
    words = [f"{kind} by {', '.join(map(visible, names))}" for kind, names in both if names]
    reference = _pick(source, problem, passing=bool(lost))
    cards = [_card("source", source, problem, reference, reference.completion)]
    for name in changed:
        answer = _pick(scores[name], problem, passing=name in gained)
        cards.append(_card(name, scores[name], problem, answer, reference.completion))
    asked = f"<details><summary>the question</summary><pre>{_cut(prompt)}</pre></details>" if prompt else ""
    summary = f"<summary><code>{visible(problem)}</code> {'; '.join(words)}</summary>"
    kinds = f'data-is="{_kinds(problem, rates)}" data-name="{visible(problem)}"'
    shown = f'{summary}{asked}<div class="pair">{"".join(cards)}</div>'
    return f'<details class="problem" id="{place}" {kinds}>{shown}</details>'


def _pick(score: TaskScore, problem: str, passing: bool) -> ProblemOutcome:
    """Of several samples the first that shows the change."""
    answers = score.answers(problem)
    return next((answer for answer in answers if (answer.outcome == "passed") == passing), answers[0])


def _card(name: str, score: TaskScore, problem: str, answer: ProblemOutcome, reference: str) -> str:
    right = sum(outcome.outcome == "passed" for outcome in score.answers(problem))
    count = f" ({right} of {score.samples} samples passed)" if score.samples > 1 else ""
    mark = "yes" if answer.outcome == "passed" else "no"
    detail = f'<p class="detail">{visible(answer.detail[:600])}</p>' if answer.detail else ""
    head = f'<h5>{visible(name)} <span class="{mark}">{answer.outcome}</span>{count}</h5>'
    return f"<section>{head}<pre>{_marked(answer.completion, reference)}</pre>{detail}</section>"


def _marked(text: str, reference: str) -> str:
    """The answer; marked are the lines that the reference does not have, of one that changed the characters."""
    # spelt first: what merely looks like the end of a line is shown as what it is
    lines, other = (spelt(words[:LONGEST]).removesuffix("\n").split("\n") for words in (text, reference))
    many = len(lines) > MANY_LINES  # a model that repeats one line would take minutes otherwise
    rows = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, other, lines, autojunk=many).get_opcodes():
        if kind == "replace" and b - a == d - c:
            rows += [_line(line, before) for line, before in zip(lines[c:d], other[a:b], strict=True)]
        else:
            rows += [visible(line) if kind == "equal" else _mark(line) for line in lines[c:d]]
    return "\n".join(rows) + _rest(text)


def _mark(text: str) -> str:
    return f"<mark>{visible(text) or ' '}</mark>"


def _line(line: str, before: str) -> str:
    """A line in the place of another: marked is what differs, or all of it where little is the same."""
    if max(len(line), len(before)) > LONG_LINE:
        return _mark(line)
    matcher = difflib.SequenceMatcher(None, before, line, autojunk=False)
    if matcher.ratio() < ALIKE:
        return _mark(line)
    parts = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            parts.append(visible(line[c:d]))
        else:  # what is gone leaves a mark, too
            parts.append(
                _mark(line[c:d]) if d > c else f'<mark title="{visible(before[a:b])}">\N{ZERO WIDTH SPACE}</mark>'
            )
    return "".join(parts)


def _cut(text: str) -> str:
    return visible(text[:LONGEST]) + _rest(text)


def _rest(text: str) -> str:
    more = len(text) - LONGEST
    return f"\n<i>… {more} more characters in the score file</i>" if more > 0 else ""
