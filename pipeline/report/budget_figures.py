"""Pictures of types by budget: bits by layer and matrix, and what other sizes would have given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtool.convert.files.chosen import Chosen
from qtool.report.figures import WIDTH, Frame, axes, svg, ticks
from qtool.report.markup import visible
from qtool.runs.evidence import plain

NEAR = (0.8, 1.5)  # sizes that are drawn, times the chosen one: KL grows fourfold with every bit that goes


def near(chosen: Chosen) -> list[tuple[int, float]]:
    """The points of its curve that are drawn."""
    return [point for point in chosen.curve if NEAR[0] * chosen.nbytes <= point[0] <= NEAR[1] * chosen.nbytes]


def size_against_kl(chosen: Chosen, measured: float | None, width: int = WIDTH) -> str:
    """The best mixes by size and expected KL, and the one that was chosen; ``measured``: its KL on held-out text."""
    points = near(chosen)
    unit, scale = ("GB", 1e9) if chosen.nbytes >= 1e9 else ("MB", 1e6)
    sizes = [nbytes / scale for nbytes, _ in points]
    across = ticks(min(sizes), max(sizes))
    up = ticks(0, max([cost for _, cost in points] + ([measured] if measured else [])))
    frame = Frame.of(width, (across[0], across[-1]), (up[0], up[-1]))
    path = " ".join(f"{frame.x(size):.1f},{frame.y(cost):.1f}" for size, (_, cost) in zip(sizes, points, strict=True))
    parts = [axes(frame, across, up, f"size of the tensors, {unit}", "KL to source, nats a token")]
    parts.append(f'<g class="s1"><polyline class="line" points="{path}"/></g>')
    told = [f"{plain(size, 3)} {unit}: {plain(cost)}" for size, (_, cost) in zip(sizes, points, strict=True)]
    marks: Mapping[str, float | None] = {"chosen, expected": chosen.expected, "chosen, measured": measured}
    for number, (name, value) in enumerate(marks.items()):
        if value is not None:
            x, y = frame.x(chosen.nbytes / scale), frame.y(value)
            parts.append(f'<g class="s{number + 1}"><circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>')
            above = (value, number) >= (max(one for one in marks.values() if one is not None), 0)
            place = (
                f'x="{x + 8:.1f}" y="{y - 6:.1f}"' if above else f'text-anchor="end" x="{x - 8:.1f}" y="{y + 16:.1f}"'
            )
            parts.append(f'<text class="s{number + 1} name" {place}>{visible(name)}</text>')
    parts.append(
        f'<text class="soft" x="{frame.left}" y="20">line: what the best mix of each size is expected to lose</text>'
    )
    own = f"{plain(chosen.nbytes / scale, 3)} {unit}, expected {plain(chosen.expected)}"
    said = f"Chosen: {own}. Best mixes: {_some(told)}."
    return svg("Size against expected KL", said, frame.bottom + 52, parts, width)


def _some(told: Sequence[str]) -> str:
    step = max(1, len(told) // 8)
    return "; ".join(told[::step])
