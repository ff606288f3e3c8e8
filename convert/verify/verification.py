"""What verifying an artifact found: its checks, as a run keeps them and a reader sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qtool import QtoolError

Status = Literal["pass", "fail", "not made"]


@dataclass(frozen=True)
class Check:
    """One line of the report. ``required`` checks decide whether the artifact is sound; loading rules only inform.
    ``runtime``: of a loading rule, `vLLM 0.32`; ``cards``: how many it was looked at for, 0 for a rule that asks
    nothing of their number."""

    name: str
    status: Status
    detail: str
    required: bool = True
    runtime: str = ""
    cards: int = 0

    @property
    def rule(self) -> str:
        """The name without the number of cards."""
        return self.name.removesuffix(over(self.cards))


def over(cards: int) -> str:
    """`, TP 2`; nothing for a rule that asks nothing of the number of cards."""
    return f", TP {cards}" if cards else ""


@dataclass
class Verification:
    """All checks of one artifact, those not made included."""

    path: Path
    checks: list[Check] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not any(check.required and check.status == "fail" for check in self.checks)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """What breaks a check off has failed it: the files may be anybody's."""
        try:
            yield
        except QtoolError as error:
            self.add(name, [error.message], "")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            self.add(name, [f"cannot be checked ({type(error).__name__}: {error})"], "")

    def add(
        self, name: str, reasons: list[str], passed: str, required: bool = True, runtime: str = "", cards: int = 0
    ) -> None:
        """A check fails with its first reasons or passes with ``passed``."""
        more = f" (+{len(reasons) - 3} more)" if len(reasons) > 3 else ""
        detail = "; ".join(reasons[:3]) + more if reasons else passed
        self.checks.append(Check(name, "fail" if reasons else "pass", detail, required, runtime, cards))
