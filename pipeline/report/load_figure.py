"""A load as a picture: latency against throughput, and the requests that kept the objective, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.report.figures import ticks
from qtool.report.markup import visible
from qtool.runs.loads import Level, Load

WIDTH, LEFT, TOP, HEIGHT, GAP, FOOT = 760, 66, 44, 170, 62, 66
STYLE = (
    ".lf{font:12px system-ui,-apple-system,'Segoe UI',sans-serif}.lf .bg{fill:#fff}.lf text{fill:#1f2328}"
    ".lf .soft{fill:#59636e}.lf .grid{stroke:#e1e4e8}.lf .slo{stroke:#be123c;stroke-width:2;stroke-dasharray:6 3}"
    ".lf .p50{fill:#7fb2f0}.lf .p95{fill:#2563b0}.lf .all{fill:#b6bfcc}.lf .good{fill:#15803d}.lf .fail{fill:#be123c}"
    "@media(prefers-color-scheme:dark){.lf .bg{fill:#151b23}.lf text{fill:#e6edf3}.lf .soft{fill:#9aa4b0}"
    ".lf .grid{stroke:#2b333d}.lf .slo{stroke:#f58ba3}.lf .p50{fill:#2f5d93}.lf .p95{fill:#7fb2f0}"
    ".lf .all{fill:#4b5563}.lf .good{fill:#6fce8e}.lf .fail{fill:#f58ba3}}"
)


def under_load(load: Load) -> str:
    """Three panels over the levels: milliseconds to the first token, to each further one, and requests a second."""
    slo, levels = load.slo, load.levels
    first = [(level.first.get("p50"), level.first.get("p95")) for level in levels]
    step = [(level.step.get("p50"), level.step.get("p95")) for level in levels]
    parts = [
        _latency("first token, ms", levels, first, slo.first, 0),
        _latency("each further token, ms", levels, step, slo.step, 1),
        _rates(levels, slo.first is not None or slo.step is not None),
    ]
    height = TOP + 3 * HEIGHT + 2 * GAP + FOOT
    legend = "".join(
        f'<rect class="{name}" x="{LEFT + 150 * i}" y="{height - 20}" width="11" height="11"/>'
        f'<text x="{LEFT + 150 * i + 16}" y="{height - 10}">{text}</text>'
        for i, (name, text) in enumerate(
            (("p50", "p50"), ("p95", "p95"), ("all", "answered"), ("good", "kept the objective"))
        )
    )
    judged = slo.first is not None or slo.step is not None
    if judged:
        legend += f'<text class="soft" x="{LEFT + 600}" y="{height - 10}">dashed: objective</text>'
    title = f"{load.model} under load: {load.prompt:,} tokens a prompt, {load.shared:,} shared, {load.tokens} answered"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lf" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img"><title>{visible(title)}</title><style>{STYLE}</style>'
        f'<rect class="bg" width="{WIDTH}" height="{height}"/>'
        f'<text x="{LEFT}" y="20" font-weight="600">{visible(title)}</text>{"".join(parts)}{legend}</svg>\n'
    )


def _latency(
    title: str, levels: Sequence[Level], found: Sequence[tuple[float | None, float | None]], limit: float | None,
    panel: int,
) -> str:  # fmt: skip
    known = [1e3 * value for pair in found for value in pair if value is not None]
    top = ticks(0, max([*known, 1e3 * limit if limit else 0, 1e-3]))
    out = [_frame(title, top, levels, panel)]
    for number, pair in enumerate(found):
        for place, (name, value) in enumerate(zip(("p50", "p95"), pair, strict=True)):
            x = _x(levels, number) + (place - 1) * 22
            out.append(_bar(name, x, 1e3 * value, top[-1], panel) if value is not None else _failed(x, panel))
    if limit is not None:
        y = _y(1e3 * limit, top[-1], panel)
        out.append(f'<line class="slo" x1="{LEFT}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return "".join(out)


def _rates(levels: Sequence[Level], judged: bool) -> str:
    top = ticks(0, max([level.requests_per_second for level in levels] + [1e-3]))
    out = [_frame("requests a second", top, levels, 2)]
    for number, level in enumerate(levels):
        x = _x(levels, number)
        out.append(_bar("all", x - 22, level.requests_per_second, top[-1], 2))
        out.append(_bar("good", x, level.good, top[-1], 2) if judged else "")
        if level.failed:
            y = _base(2) - 4
            out.append(f'<text class="fail" x="{x + 26:.1f}" y="{y}">{level.failed} failed</text>')
    return "".join(out)


def _frame(title: str, marks: Sequence[float], levels: Sequence[Level], panel: int) -> str:
    out = [f'<text class="soft" x="{LEFT}" y="{_base(panel) - HEIGHT - 8}">{title}</text>']
    for mark in marks:
        y = _y(mark, marks[-1], panel)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for number, level in enumerate(levels):
        x = _x(levels, number)
        out.append(f'<text x="{x:.1f}" y="{_base(panel) + 16}" text-anchor="middle">{visible(level.name)}</text>')
    return "".join(out)


def _bar(name: str, x: float, value: float, top: float, panel: int) -> str:
    y = _y(min(value, top), top, panel)
    return f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="20" height="{_base(panel) - y:.1f}"/>'


def _failed(x: float, panel: int) -> str:
    return f'<text class="fail" x="{x:.1f}" y="{_base(panel) - 4}">failed</text>'


def _base(panel: int) -> float:
    return TOP + HEIGHT + panel * (HEIGHT + GAP)


def _x(levels: Sequence[Level], number: int) -> float:
    return LEFT + (WIDTH - LEFT - 16) * (number + 0.5) / len(levels)


def _y(value: float, top: float, panel: int) -> float:
    return _base(panel) - HEIGHT * value / top
