"""Did it get worse? Two models' stored scores, paired: by problem, by window of text; what does not pair is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from qtool import QtoolError
from qtool.evaluate.buckets import FEW
from qtool.evaluate.rates import mean_rate, rate_difference
from qtool.evaluate.statistics import Interval, bootstrap_mean, holm
from qtool.runs import evidence
from qtool.runs.baseline import Baseline, Measured, TaskResult, TextResult
from qtool.runs.evidence import Evidence, task_label
from qtool.runs.informative import uninformative
from qtool.runs.summary import perplexity

ALPHA = 0.05
KL_RISE = 0.05  # a rise of the mean KL by less than this share of it is no regression, whatever its interval
KL_FLOOR = 1e-4  # nats a token: below it lies the noise of another order of summation
NLL_RISE = 0.01  # nats a token, about 1 % of perplexity; judged where no KL can be

ANSWERING = ("prompt", "max_new_tokens", "temperature", "top_p")  # play no part in perplexity and KL

Shown = Literal["worse", "better", "no loss shown", "uninformative", "not compared", "not judged"]


@dataclass(frozen=True)
class Change:
    """One measurement of two models, A and B. ``shown`` is "worse" only where the data show it, "not judged" where it
    only informs. ``numbers``: None where there is nothing to compare; ``note`` then says why, as it does of what is
    uninformative, and ``only`` which side alone was measured."""

    model: str
    what: str
    shown: Shown
    numbers: Evidence | None
    note: str = ""
    only: Literal["", "A", "B"] = ""

    @property
    def p(self) -> float | None:
        """After Holm, if tested."""
        return self.numbers.p_holm if self.numbers else None

    @property
    def before(self) -> str:
        """A's own number, for people; "" where there is none."""
        return evidence.side(self.numbers, self.numbers.before) if self.numbers else ""

    @property
    def after(self) -> str:
        """B's."""
        return evidence.side(self.numbers, self.numbers.after) if self.numbers else ""

    @property
    def change(self) -> str:
        """What became of it, for people."""
        return self.note or (evidence.change(self.numbers) if self.numbers else "")


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
        if not common and len(first.subjects) == len(second.subjects) == 1:  # of one model each, whatever its name
            (before, one_model), (after, other_model) = *first.subjects.items(), *second.subjects.items()
            return [(f"{before} -> {after}", one_model, other_model)], []
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
        changes += _along(label, a, b, same_source)
    return _adjusted(changes)


def _adjusted(changes: Sequence[Change]) -> list[Change]:
    """With Holm's p over all that were tested; what it does not bear out is not shown."""
    tested = [change.numbers.p for change in changes if change.numbers and change.numbers.p is not None]
    adjusted = iter(holm(tested))
    judged = []
    for change in changes:
        if (numbers := change.numbers) is not None and numbers.p is not None:
            p = next(adjusted)
            change = replace(
                change,
                numbers=replace(numbers, p_holm=p, comparisons=len(tested)),
                shown=change.shown if p < ALPHA else "no loss shown",
            )
        judged.append(change)
    return judged


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
        differences = one_text.settings.differences(other_text.settings, but=ANSWERING)
        if one_text.digest != other_text.digest:
            differences.append("other windows of text")
        faults += [f"held-out text: {difference}" for difference in differences]
    for condition in [condition for condition in a.along if condition in b.along]:
        one_long, other_long = (next(iter(side.along[condition].values())) for side in (a, b))
        differences = one_long.settings.differences(other_long.settings, but=ANSWERING)
        if one_long.digest != other_long.digest:
            differences.append("other texts")
        named = f" @ {condition}" if condition else ""
        faults += [f"long text{named}: {difference}" for difference in differences]
    return faults


def _size(label: str, a: Measured, b: Measured) -> list[Change]:
    if a.nbytes is None or b.nbytes is None:
        return []
    return [Change(label, "size", "not judged", Evidence("size", b.nbytes, before=a.nbytes, after=b.nbytes))]


def _tasks(label: str, a: Measured, b: Measured) -> list[Change]:
    changes = []
    for task in dict.fromkeys([*a.tasks, *b.tasks]):
        name = task_label(task)
        if task in a.tasks and task in b.tasks:
            changes.append(_task(label, name, a.tasks[task], b.tasks[task]))
        else:
            changes.append(_alone(label, name, task in a.tasks, "asked"))
    return changes


def _alone(label: str, what: str, in_a: bool, done: str) -> Change:
    only: Literal["A", "B"] = "A" if in_a else "B"
    return Change(label, what, "not compared", None, f"only {only} was {done}", only)


def _task(label: str, name: str, a: TaskResult, b: TaskResult) -> Change:
    one, other = list(a.solved.values()), list(b.solved.values())
    difference = rate_difference(one, other, a.samples)
    before, after = (mean_rate(counts, a.samples).estimate for counts in (one, other))
    numbers = Evidence(
        "loss", difference.loss.estimate, interval=difference.loss, before=before, after=after, n=difference.problems,
        lost=difference.lost, gained=difference.gained, detectable=difference.detectable, p=difference.p, alpha=ALPHA,
    )  # fmt: skip
    told_apart = any(other) and not any(one)
    if not told_apart and (why := uninformative([one, other], a.samples)):
        return Change(
            label, name, "uninformative", replace(numbers, p=None), why.replace("the source solves", "both solve")
        )
    return Change(label, name, "worse" if difference.loss.estimate > 0 else "better", numbers)


def _texts(label: str, a: Measured, b: Measured, same_source: bool) -> list[Change]:
    changes = []
    lengths = dict.fromkeys([*a.texts, *b.texts])
    for length in lengths:
        at = f", windows of {length}" if len(lengths) > 1 else ""
        if length not in a.texts or length not in b.texts:
            changes.append(_alone(label, f"held-out text{at}", length in a.texts, "measured"))
            continue
        one, other = a.texts[length], b.texts[length]
        if not (_finite(one) and _finite(other)):
            changes.append(_broken(label, f"held-out text{at}", one, other))
            continue
        judged = same_source and (any(one.kl) or any(other.kl))
        changes.append(_perplexity(label, at, one, other, judged))
        if judged:
            changes.append(_kl(label, at, one, other))
        elif not same_source:
            changes.append(Change(label, f"KL to source{at}", "not judged", None, "the sources differ"))
    return changes


def _along(label: str, a: Measured, b: Measured, same_source: bool) -> list[Change]:
    """Of every bucket of a long text under every condition that both were put under: KL, or perplexity where they are
    of two sources. Blocks are paired, never those of two conditions; of a few nothing is judged."""
    changes = []
    for condition in dict.fromkeys([*a.along, *b.along]):
        named = f" @ {condition}" if condition else ""
        if condition not in a.along or condition not in b.along:
            changes.append(_alone(label, f"long text{named}", condition in a.along, "measured"))
            continue
        for bucket, one in a.along[condition].items():
            other, at = b.along[condition][bucket], f" at {bucket}{named}"
            if not (_finite(one) and _finite(other)):
                changes.append(_broken(label, f"long text{at}", one, other))
            elif same_source and not (any(one.kl) or any(other.kl)):
                continue  # the source itself
            else:
                of = _kl if same_source else partial(_perplexity, informs_only=False)
                change = of(label, at, one, other, unit="blocks")
                changes.append(replace(change, shown="not judged") if len(one.kl) < FEW else change)
    return changes


def _broken(label: str, what: str, one: TextResult, other: TextResult) -> Change:
    """Where not both gave numbers."""
    broken = [side for side, text in (("A", one), ("B", other)) if not _finite(text)]
    shown: Shown = "not compared" if len(broken) > 1 else "worse" if broken == ["B"] else "better"
    return Change(label, what, shown, None, f"not a number in {' and '.join(broken)}")


def _kl(label: str, at: str, a: TextResult, b: TextResult, unit: str = "windows") -> Change:
    rise = bootstrap_mean([y - x for x, y in zip(a.kl, b.kl, strict=True)])
    before, after = _mean(a.kl), _mean(b.kl)
    margin = max(KL_RISE * before, KL_FLOOR)
    numbers = Evidence("KL", rise.estimate, margin, rise, before=before, after=after, n=len(a.kl), unit=unit)
    return Change(label, f"KL to source{at}", _beyond(rise, margin), numbers)


def _perplexity(label: str, at: str, a: TextResult, b: TextResult, informs_only: bool, unit: str = "windows") -> Change:
    rise = bootstrap_mean([y - x for x, y in zip(a.nll, b.nll, strict=True)])
    before, after = (perplexity(values) for values in (a.nll, b.nll))
    limit = None if informs_only else NLL_RISE
    numbers = Evidence("nll", rise.estimate, limit, rise, before=before, after=after, n=len(a.nll), unit=unit)
    return Change(label, f"perplexity{at}", "not judged" if limit is None else _beyond(rise, limit), numbers)


def _beyond(rise: Interval, margin: float) -> Shown:
    return "worse" if rise.low > margin else "better" if rise.high < -margin else "no loss shown"


def _finite(text: TextResult) -> bool:
    return all(map(math.isfinite, [*text.kl, *text.nll]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
