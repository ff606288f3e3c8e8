"""Did it get worse? Two models' stored scores, paired: by problem, by window of text; what does not pair is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qtool import QtoolError
from qtool.baseline import Baseline, Measured, TaskResult, TextResult
from qtool.evaluate.rates import mean_rate, rate_difference
from qtool.evaluate.regression import Interval, bootstrap_mean, holm
from qtool.tables import perplexity, points, size_text, task_label

ALPHA = 0.05
KL_RISE = 0.05  # a rise of the mean KL by less than this share of it is no regression, whatever its interval
KL_FLOOR = 1e-4  # nats a token: below it lies the noise of another order of summation
NLL_RISE = 0.01  # nats a token, about 1 % of perplexity; judged where no KL can be

Shown = Literal["worse", "better", "no loss shown", "not compared", "not judged"]


@dataclass(frozen=True)
class Change:
    """One measurement of two models. ``shown`` is "worse" only where the data show it, "not judged" where it
    only informs; ``p`` after Holm, if tested."""

    model: str
    what: str
    before: str
    after: str
    change: str
    shown: Shown
    p: float | None = None


def pair_up(
    one: tuple[Baseline, str | None], other: tuple[Baseline, str | None]
) -> tuple[list[tuple[str, Measured, Measured]], list[str]]:
    """The models to compare and a note on each that has no partner. Raises QtoolError when none pair."""
    (first, a), (second, b) = one, other
    if a is not None and b is not None:
        label = a if a == b else f"{a} -> {b}"
        return [(label, first.subjects[a], second.subjects[b])], []
    if a is None and b is None:
        common = [name for name in first.subjects if name in second.subjects]
        alone = [f"{n}: only in A" for n in first.subjects if n not in common]
        alone += [f"{n}: only in B" for n in second.subjects if n not in common]
        if not common:
            raise QtoolError(f"nothing to compare: A has {', '.join(first.subjects)}; B {', '.join(second.subjects)}.")
        return [(name, first.subjects[name], second.subjects[name]) for name in common], alone
    a = a or _partner(str(b), first, "A")
    b = b or _partner(a, second, "B")
    return [(a if a == b else f"{a} -> {b}", first.subjects[a], second.subjects[b])], []


def _partner(name: str, among: Baseline, side: str) -> str:
    others = [other for other in among.subjects if other != "source"]
    if name in among.subjects:
        return name
    if len(others) == 1:
        return others[0]
    raise QtoolError(f"{side} has several models; name one: {', '.join(f'{side}:{n}' for n in among.subjects)}.")


def compare(pairs: Sequence[tuple[str, Measured, Measured]], same_source: bool) -> list[Change]:
    """Every measurement that both of a pair have. Raises QtoolError listing everything that must not be paired:
    engines, dtypes, prompts, lengths, problems, texts. p is adjusted (Holm) over all tasks of all pairs."""
    faults = [f"{label}: {fault}" for label, a, b in pairs for fault in _misfits(a, b)]
    if faults:
        raise QtoolError("these scores must not be paired:\n" + "\n".join(f"  {fault}" for fault in faults))
    changes = []
    for label, a, b in pairs:
        changes += _size(label, a, b) + _tasks(label, a, b) + _texts(label, a, b, same_source)
    tested = [i for i, change in enumerate(changes) if change.p is not None]
    adjusted = holm([changes[i].p or 0.0 for i in tested])
    for i, p in zip(tested, adjusted, strict=True):
        changes[i] = replace(changes[i], p=p, shown=changes[i].shown if p < ALPHA else "no loss shown")
    return changes


def _misfits(a: Measured, b: Measured) -> list[str]:
    faults = []
    for label in [label for label in a.tasks if label in b.tasks]:
        one, other = a.tasks[label], b.tasks[label]
        differences = one.settings.differences(other.settings)
        if one.digest != other.digest or list(one.solved) != list(other.solved):
            differences.append(f"other problems ({len(one.solved)} and {len(other.solved)})")
        if one.samples != other.samples:
            differences.append(f"samples {one.samples} and {other.samples}")
        faults += [f"{task_label(label)}: {difference}" for difference in differences]
    for length in [length for length in a.texts if length in b.texts]:
        one_text, other_text = a.texts[length], b.texts[length]
        plain = {"prompt", "max_new_tokens", "temperature", "top_p"}  # play no part in perplexity and KL
        differences = [d for d in one_text.settings.differences(other_text.settings) if d.split()[0] not in plain]
        if one_text.digest != other_text.digest:
            differences.append("other windows of text")
        faults += [f"held-out text: {difference}" for difference in differences]
    return faults


def _size(label: str, a: Measured, b: Measured) -> list[Change]:
    if a.nbytes is None or b.nbytes is None:
        return []
    change = f"{100 * (b.nbytes / a.nbytes - 1):+.1f} %"
    return [Change(label, "size", size_text(a.nbytes), size_text(b.nbytes), change, "not judged")]


def _tasks(label: str, a: Measured, b: Measured) -> list[Change]:
    changes = []
    for task in dict.fromkeys([*a.tasks, *b.tasks]):
        name = task_label(task)
        if task in a.tasks and task in b.tasks:
            changes.append(_task(label, name, a.tasks[task], b.tasks[task]))
        else:
            has = "A" if task in a.tasks else "B"
            changes.append(Change(label, name, "", "", f"only {has} was asked", "not compared"))
    return changes


def _task(label: str, name: str, a: TaskResult, b: TaskResult) -> Change:
    one, other = list(a.solved.values()), list(b.solved.values())
    difference = rate_difference(one, other, a.samples)
    before, after = (mean_rate(counts, a.samples).estimate for counts in (one, other))
    change = f"lost {points(difference)} points on {difference.problems} problems"
    change += f" ({difference.lost} lost, {difference.gained} gained)"
    if difference.detectable is not None:
        change += f"; losses from {difference.detectable:.1f} points on would show"
    shown: Shown = "worse" if difference.loss.estimate > 0 else "better"
    return Change(label, name, f"{before:.1%}", f"{after:.1%}", change, shown, difference.p)


def _texts(label: str, a: Measured, b: Measured, same_source: bool) -> list[Change]:
    changes = []
    lengths = dict.fromkeys([*a.texts, *b.texts])
    for length in lengths:
        at = f", windows of {length}" if len(lengths) > 1 else ""
        if length not in a.texts or length not in b.texts:
            has = "A" if length in a.texts else "B"
            changes.append(Change(label, f"held-out text{at}", "", "", f"only {has} was measured", "not compared"))
            continue
        one, other = a.texts[length], b.texts[length]
        broken = [side for side, text in (("A", one), ("B", other)) if not _finite(text)]
        if broken:
            shown: Shown = "not compared" if len(broken) > 1 else "worse" if broken == ["B"] else "better"
            said = f"not a number in {' and '.join(broken)}"
            changes.append(Change(label, f"held-out text{at}", "", "", said, shown))
            continue
        judged = same_source and (any(one.kl) or any(other.kl))
        changes.append(_perplexity(label, at, one, other, judged))
        if judged:
            changes.append(_kl(label, at, one, other))
        elif not same_source:
            changes.append(Change(label, f"KL to source{at}", "", "", "the sources differ", "not judged"))
    return changes


def _kl(label: str, at: str, a: TextResult, b: TextResult) -> Change:
    rise = bootstrap_mean([y - x for x, y in zip(a.kl, b.kl, strict=True)])
    before, after = _mean(a.kl), _mean(b.kl)
    margin = max(KL_RISE * before, KL_FLOOR)
    change = f"rose by {rise.estimate:.4f} [{rise.low:.4f}, {rise.high:.4f}] nats a token on {len(a.kl)} windows"
    return Change(label, f"KL to source{at}", f"{before:.4f}", f"{after:.4f}", change, _beyond(rise, margin))


def _perplexity(label: str, at: str, a: TextResult, b: TextResult, informs_only: bool) -> Change:
    rise = bootstrap_mean([y - x for x, y in zip(a.nll, b.nll, strict=True)])
    before, after = (f"{perplexity(values):.3f}" for values in (a.nll, b.nll))
    ratio = [f"{perplexity([x]):.4f}" for x in (rise.estimate, rise.low, rise.high)]
    shown: Shown = "not judged" if informs_only else _beyond(rise, NLL_RISE)
    return Change(label, f"perplexity{at}", before, after, f"times {ratio[0]} [{ratio[1]}, {ratio[2]}]", shown)


def _beyond(rise: Interval, margin: float) -> Shown:
    return "worse" if rise.low > margin else "better" if rise.high < -margin else "no loss shown"


def _finite(text: TextResult) -> bool:
    return all(map(math.isfinite, [*text.kl, *text.nll]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
