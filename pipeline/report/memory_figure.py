"""Stacked memory by context for each format against the card's line, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.report.markup import visible
from qtool.sizing.fit import GIB, Estimate
from qtool.sizing.plan import Answer, Plan

WIDTH, LEFT, TOP, HEIGHT, FOOT = 760, 58, 46, 230, 86
PARTS = ("weights", "KV cache", "activations", "context, graphs")
STYLE = (
    ".mf{font:12px system-ui,-apple-system,'Segoe UI',sans-serif}.mf .bg{fill:#fff}.mf text{fill:#1f2328}"
    ".mf .soft{fill:#59636e}.mf .grid{stroke:#e1e4e8}.mf .limit{stroke:#be123c;stroke-width:2}.mf .over{fill:#be123c}"
    ".mf .p0{fill:#2563b0}.mf .p1{fill:#d97706}.mf .p2{fill:#15803d}.mf .p3{fill:#818b98}"
    "@media(prefers-color-scheme:dark){.mf .bg{fill:#151b23}.mf text{fill:#e6edf3}.mf .soft{fill:#9aa4b0}"
    ".mf .grid{stroke:#2b333d}.mf .limit{stroke:#f58ba3}.mf .over{fill:#f58ba3}.mf .p0{fill:#7fb2f0}"
    ".mf .p1{fill:#f0a95a}.mf .p2{fill:#6fce8e}.mf .p3{fill:#6b7684}}"
)


def memory_by_context(plan: Plan) -> str:
    """One panel for each card: bars for each format and context (the fewest sequences asked for), a line where the
    card ends; bars that reach past 1.25 times the line are cut and say how much they are."""
    cards = list(dict.fromkeys(answer.setting.card.key for answer in plan.answers))
    panel = TOP + HEIGHT + FOOT
    parts = [
        _panel(plan, [answer for answer in plan.answers if answer.setting.card.key == card], number * panel)
        for number, card in enumerate(cards)
    ]
    height = panel * len(cards) + 26
    legend = "".join(
        f'<rect class="p{i}" x="{LEFT + 150 * i}" y="{height - 20}" width="11" height="11"/>'
        f'<text x="{LEFT + 150 * i + 16}" y="{height - 10}">{name}</text>'
        for i, name in enumerate(PARTS)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mf" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img"><title>Memory by context: {visible(plan.headers.name)}</title>'
        f'<style>{STYLE}</style><rect class="bg" width="{WIDTH}" height="{height}"/>{"".join(parts)}{legend}</svg>\n'
    )


def _panel(plan: Plan, answers: Sequence[Answer], offset: float) -> str:
    setting = answers[0].setting
    limit = setting.card.memory
    top = 1.25 * limit
    base = offset + TOP + HEIGHT

    def y(nbytes: float) -> float:
        return base - HEIGHT * min(nbytes, top) / top

    cards = f"{setting.cards} x {setting.card.key}" if setting.cards > 1 else setting.card.key
    fewest = min(plan.sequences)
    title = f"{plan.headers.name} on {cards}, {fewest} sequence{'s' if fewest > 1 else ''}: GiB on each card"
    out = [f'<text x="{LEFT}" y="{offset + 20}" font-weight="600">{visible(title)}</text>']
    step = _step(top / GIB)
    for number in range(int(top / GIB / step) + 1):
        place = y(number * step * GIB)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 16}" y1="{place:.1f}" y2="{place:.1f}"/>')
        out.append(f'<text class="soft" x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{number * step:g}</text>')
    group = (WIDTH - LEFT - 16) / len(answers)
    bar = min(26.0, (group - 14) / len(plan.contexts))
    for number, answer in enumerate(answers):
        left = LEFT + group * number + (group - bar * len(plan.contexts)) / 2
        for place, context in enumerate(plan.contexts):
            cell = next(c for c in answer.cells if c.context == context and c.sequences == fewest)
            out.append(_bar(cell, left + place * bar, bar - 3, y, top, base))
        label = f"{answer.setting.weights.format}, {answer.setting.kv_dtype}"
        middle = left + bar * len(plan.contexts) / 2
        out.append(f'<text x="{middle:.1f}" y="{base + 56}" text-anchor="middle">{visible(label)}</text>')
        out.append(
            f'<text class="soft" x="{middle:.1f}" y="{base + 71}" text-anchor="middle">'
            f"{visible(answer.setting.engine)}</text>"
        )
    line = y(limit)
    out.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - 16}" y1="{line:.1f}" y2="{line:.1f}"/>')
    out.append(
        f'<text class="over" x="{WIDTH - 16}" y="{offset + 20}" text-anchor="end">the line: {setting.card.key}, '
        f"{limit / GIB:.1f} GiB</text>"
    )
    return "".join(out)


def _bar(cell: Estimate, x: float, width: float, y: object, top: float, base: float) -> str:
    assert callable(y)
    parts, done = [], 0
    sizes = (cell.weights, cell.cache, cell.overhead.activations, cell.overhead.fixed)
    for number, size in enumerate(sizes):
        low, high = y(done), y(done + size)
        done += size
        if low - high > 0.05:
            parts.append(
                f'<rect class="p{number}" x="{x:.1f}" y="{high:.1f}" width="{width:.1f}" height="{low - high:.1f}"/>'
            )
    if cell.total > top:
        middle = x + width / 2
        parts.append(
            f'<text class="over" x="{middle:.1f}" y="{y(top) - 3:.1f}" text-anchor="middle" font-size="9">'
            f"{cell.total / GIB:.0f}</text>"
        )
    label = f"{cell.context // 1024}k" if cell.context % 1024 == 0 else f"{cell.context:,}"
    middle = x + width / 2
    parts.append(
        f'<text class="soft" font-size="10" text-anchor="end" transform="translate({middle + 4:.1f},{base + 8}) '
        f'rotate(-60)">{label}</text>'
    )
    return "".join(parts)


def _step(span: float) -> float:
    return next(step for step in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500) if span / step <= 7)
