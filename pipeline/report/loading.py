"""What an artifact's checks say to a reader: a sentence on what loads it, and a row for each rule instead of one for
each number of cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qtool.convert.verify.verification import Check


@dataclass(frozen=True)
class Line:
    """One rule. ``result``: pass, FAIL (the artifact is at fault), no (a fact about the model), not made."""

    name: str
    result: str
    detail: str


def what_loads_it(checks: Sequence[Check]) -> str:
    """`loads in vLLM 0.32 and SGLang 0.5, on 1 or 2 cards; does not split over 4 or 8`; empty without rules."""
    found: dict[str, list[Check]] = {}
    for check in checks:
        if check.runtime and not check.runtime.startswith("all "):
            found.setdefault(check.runtime, []).append(check)
    loading, refused = [], []
    for runtime, rules in found.items():
        broken = [check for check in rules if check.cards <= 1 and check.status == "fail"]
        kernels = {check.rule for check in rules if check.cards}
        lost = {check.rule for check in broken if check.cards}
        if len(broken) > len(lost) or (kernels and lost == kernels):
            refused.append(f"not in {runtime} ({broken[0].detail})")
        else:
            without = f" (not its {_listed(name.split(': ')[-1] for name in sorted(lost))})" if lost else ""
            loading.append(runtime + without)
    loading = [name for name in loading if not _within(name, loading)]
    said = [f"loads in {_listed(loading)}{_over_cards(checks)}"] if loading else []
    return "; ".join(said + refused)


def _within(name: str, others: Sequence[str]) -> bool:
    """`transformers 5.23` says nothing beside `transformers + GPTQModel 7.6`."""
    return any(name.split()[0] in other.split()[:-1] and "+" in other for other in others if other != name)


def _over_cards(checks: Sequence[Check]) -> str:
    """Of the rules that hold on one card: over how many all of them hold."""
    single = {check.rule for check in checks if check.cards == 1 and check.status == "pass"}
    held: dict[int, bool] = {}
    for check in checks:
        if check.cards and check.rule in single:
            held[check.cards] = held.get(check.cards, True) and check.status == "pass"
    fits, splits_not = [n for n, holds in held.items() if holds], [n for n, holds in held.items() if not holds]
    if not held:
        return ""
    over = f", on {_listed(map(str, fits), 'or')} card{'s' if fits != [1] else ''}"
    return over + (f"; does not split over {_listed(map(str, splits_not), 'or')}" if splits_not else "")


def lines(checks: Sequence[Check]) -> list[Line]:
    """Every check; a rule that was looked at for several numbers of cards is one of them."""
    found = []
    for rule, same in _by_rule(checks).items():
        first, broken = same[0], [check for check in same if check.status == "fail"]
        result = {"fail": "FAIL" if first.required else "no"}.get(first.status, first.status)
        detail = first.detail
        if first.cards and first.status == "pass":
            held = _listed((str(check.cards) for check in same if check.status == "pass"), "or")
            detail += f", on {held} card{'s' if held != '1' else ''}"
            if broken:
                more = [str(check.cards) for check in broken[1:]]
                also = f" (nor over {_listed(more, 'or')})" if more else ""
                detail += f"; not over {broken[0].cards}{also}: {broken[0].detail}"
        found.append(Line(rule, result, detail))
    return found


def _by_rule(checks: Iterable[Check]) -> dict[str, list[Check]]:
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(check.rule, []).append(check)
    return found


def _listed(parts: Iterable[str], word: str = "and") -> str:
    *most, last = list(parts)
    return f"{', '.join(most)} {word} {last}" if most else last
