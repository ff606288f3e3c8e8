"""What check_observed.py found, and the page that it writes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from qtool.evaluate.engines.machine import machine_name
from qtool.report.loaded import row_of
from qtool.runs.loads import Load, Slo

USERS, RATES = (1, 4, 16), (8.0,)
PROMPT, SHARED, TOKENS, REQUESTS = 384, 256, 32, 48
SLO = Slo(0.5, 0.05)
KEPT = (
    "load", "requests", "failed", "first p50 ms", "first p95 ms", "step p50 ms", "step p95 ms", "whole p95 ms", "tok/s",
    "prefix hits", "preempted", "good/s", "p95 kept",
)  # fmt: skip


@dataclass
class Findings:
    """``faults``: what was not as said; ``loads``: (server, prefix, load); ``said``: sentences for the document."""

    faults: list[str] = field(default_factory=list)
    loads: list[tuple[str, Load]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        """Print, and keep what does not hold."""
        print(f"{'ok  ' if holds else 'NOT '} {what}", flush=True)
        if not holds:
            self.faults.append(what)


def shown(text: str, url: str) -> str:
    """A command's output without this run's address."""
    return "\n".join(line.rstrip() for line in text.replace(url, "http://127.0.0.1:8000").strip().splitlines())


def document(findings: Findings, versions: str) -> str:
    """Markdown."""
    first, step = 1e3 * (SLO.first or 0), 1e3 * (SLO.step or 0)
    lines = [
        f"{versions}; {machine_name('cpu')}, other work beside it: compare rows, not machines. "
        f"Demo model, {PROMPT} tokens a prompt, {TOKENS} answered, {REQUESTS} requests a level; objective: first token "
        f"within {first:g} ms, each further within {step:g} ms. Chunked prefill on: 128 tokens a step; off: 2,048.",
        "",
    ]
    for shared in (SHARED, 0):
        lines += [
            f"**{shared or 'No'} tokens shared**",
            "",
            f"| server | {' | '.join(KEPT)} |",
            f"|---|{'---|' * len(KEPT)}",
        ]
        for label, load in findings.loads:
            if load.shared == shared:
                for number, level in enumerate(load.levels):
                    row = row_of(level)
                    lines.append(f"| {label if number == 0 else ''} | {' | '.join(row.get(key, '') for key in KEPT)} |")
        lines.append("")
    for said in findings.said:
        lines += [said, ""]
    return "\n".join(lines).rstrip()
