"""The report's pictures as SVG text: pure functions, no scripts, no network, legible on light and dark screens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtool.evaluate.statistics import Interval
from qtool.report.markup import visible
from qtool.runs.evidence import plain

WIDTH, NARROW = 640, 346  # of a screen, and of a telephone: each chart is drawn for both
_LIGHT = ("#4b5563", "#2563b0", "#b45309", "#15803d", "#7e22ce", "#be123c", "#0e7490", "#5b5b12")  # grey: the source
_DARK = ("#b6bfcc", "#7fb2f0", "#f0a95a", "#6fce8e", "#c79bf2", "#f58ba3", "#5fcbe0", "#cfcf6a")
_HEAT = ("#f7f1e3", "#f2b66d", "#d9573f", "#8a1c4a", "#2b0b2f")  # light to dark, evenly spaced
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


def _style() -> str:
    light = "".join(f".qf .s{i}{{--c:{colour}}}" for i, colour in enumerate(_LIGHT))
    dark = "".join(f".qf .s{i}{{--c:{colour}}}" for i, colour in enumerate(_DARK))
    return (
        ".qf{font:12px system-ui,-apple-system,'Segoe UI',sans-serif}"
        ".qf .bg{fill:#fff}.qf text{fill:#1f2328}.qf .soft{fill:#59636e}.qf .grid{stroke:#e1e4e8}"
        ".qf .axis{stroke:#818b98}.qf .front{stroke:#818b98;stroke-dasharray:5 4;fill:none}"
        ".qf .dot{fill:var(--c);stroke:var(--c);stroke-width:2}.qf .open{fill:#fff}"
        ".qf .line{stroke:var(--c);stroke-width:2;fill:none}.qf .name{fill:var(--c);font-weight:600}"
        f".qf .ondark{{fill:#fff}}.qf .onlight{{fill:#1f2328}}{light}"
        "@media(prefers-color-scheme:dark){.qf .bg,.qf .open{fill:#151b23}.qf text{fill:#e6edf3}.qf .soft{fill:#9aa4b0}"
        ".qf .grid{stroke:#2b333d}.qf .axis,.qf .front{stroke:#6b7684}.qf .name{fill:var(--c)}"
        f".qf .ondark{{fill:#fff}}.qf .onlight{{fill:#1f2328}}{dark}}}"
    )


STYLE = _style()


@dataclass(frozen=True)
class Point:
    """One model: bytes of its tensors, its score and the score's interval."""

    name: str
    nbytes: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Frame:
    """Maps data to the plot's rectangle (pixels; y grows downwards)."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    left: float = 62
    top: float = 34
    width: float = WIDTH - 62 - 24
    height: float = 250

    @classmethod
    def of(cls, width: int, xs: tuple[float, float], ys: tuple[float, float], top: float = 34) -> Frame:
        """In a picture so wide."""
        return cls(xs, ys, top=top, width=width - 62 - (24 if width == WIDTH else 12))

    def x(self, value: float) -> float:
        return self.left + self.width * (value - self.xs[0]) / (self.xs[1] - self.xs[0])

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - (value - self.ys[0]) / (self.ys[1] - self.ys[0]))

    @property
    def bottom(self) -> float:
        return self.top + self.height


def pareto(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """Those that no other beats (as small and as good, one of them strictly), smallest first."""
    sign = 1 if higher_is_better else -1

    def beats(a: Point, b: Point) -> bool:
        first, second = (-a.nbytes, sign * a.score), (-b.nbytes, sign * b.score)
        return first != second and first[0] >= second[0] and first[1] >= second[1]

    return sorted((p for p in points if not any(beats(q, p) for q in points)), key=lambda p: p.nbytes)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below ``low`` to ``high`` or just above it."""
    span = high - low if high > low else 1.0
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def shade(share: float) -> str:
    """A colour from light (0) to dark (1), as #rrggbb."""
    place = min(max(share, 0.0), 1.0) * (len(_HEAT) - 1)
    index = min(int(place), len(_HEAT) - 2)
    low, high = (bytes.fromhex(_HEAT[i][1:]) for i in (index, index + 1))
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + bytes(mixed).hex()


def size_against(
    points: Sequence[Point], axis: str, higher_is_better: bool, width: int = WIDTH, of: str = "the tensors"
) -> str:
    """Size against a score, each with its interval; models that none beats are joined: the Pareto front."""
    unit, scale = ("GB", 1e9) if max(p.nbytes for p in points) >= 1e9 else ("MB", 1e6)
    across = ticks(0, max(p.nbytes for p in points) / scale)
    lows = [x for p in points for x in (p.low, p.high, p.score) if math.isfinite(x)]
    up = ticks(min(lows) if higher_is_better else 0, max(lows))
    frame = Frame.of(width, (0, across[-1]), (up[0], up[-1]))
    front = pareto(points, higher_is_better=higher_is_better)
    places = _spread({i: frame.x(p.nbytes / scale) for i, p in enumerate(points)})
    path = " ".join(f"{places[points.index(p)]:.1f},{frame.y(p.score):.1f}" for p in front)
    parts = [axes(frame, across, up, f"size of {of}, {unit}", axis)]
    parts.append(f'<polyline class="front" points="{path}"/>')
    taken, marks = [], _marks([point.name for point in points])
    for i, point in enumerate(points):
        x, y = places[i], frame.y(point.score)
        low, high = (frame.y(min(max(v, up[0]), up[-1])) for v in (point.low, point.high))
        taken += [(x - 5, y - 5, 10.0, 10.0), (x - 2, high, 4.0, low - high)]
        whisker = f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
        mark = "dot" if point in front else "dot open"
        parts.append(f'<g class="{marks[i]}">{whisker}<circle class="{mark}" cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>')
    for i, point in enumerate(points):
        x, y = _label_place(places[i], frame.y(point.score), len(point.name), taken, frame)
        parts.append(f'<text class="{marks[i]} name" x="{x:.1f}" y="{y:.1f}">{visible(point.name)}</text>')
    note = "filled, joined: Pareto front" + (" (none is both smaller and better)" if width == WIDTH else "")
    parts.append(f'<text class="soft" x="{frame.left}" y="20">{note}</text>')
    told = "; ".join(
        f"{p.name}: {plain(p.nbytes / scale, 3)} {unit}, {plain(p.score)} [{plain(p.low)}, {plain(p.high)}]"
        for p in points
    )
    why = f"{told}. Pareto front: {', '.join(p.name for p in front)}. Models of nearly one size are drawn side by side."
    return svg(f"Size against {axis}", why, frame.bottom + 52, parts, width)


def kl_by_position(series: Mapping[str, Sequence[float]], position_bin: int, width: int = WIDTH) -> str:
    """Mean KL divergence to the source along the window, one line a model; ``position_bin`` tokens to a value."""
    longest = max(len(values) for values in series.values())
    at = [(i + 0.5) * position_bin for i in range(longest)]
    across = [tick for tick in ticks(0, longest * position_bin) if tick <= longest * position_bin]
    return _lines(series, at, across, "position in the window, tokens", "KL by token position", width)


def kl_by_layer(series: Mapping[str, Sequence[float]], width: int = WIDTH) -> str:
    """Mean KL divergence to the source when only that layer is the quantized one, one line a model."""
    longest = max(len(values) for values in series.values())
    across = [tick for tick in ticks(0, max(longest - 1, 1)) if tick == int(tick)]
    return _lines(series, list(range(longest)), across, "the one quantized layer", "KL by layer", width)


def kl_by_bucket(series: Mapping[str, Sequence[Interval]], names: Sequence[str], width: int = WIDTH) -> str:
    """Mean KL divergence to the source in each bucket of positions with its interval, one line a model."""
    lines = {name: [value.estimate for value in values] for name, values in series.items()}
    at = list(range(len(names)))
    label = "position in the text, tokens"
    return _lines(lines, at, at, label, "KL by position in a long text", width, names, series)


def _lines(
    series: Mapping[str, Sequence[float]], at: Sequence[float], across: Sequence[float], label: str, title: str,
    width: int, names: Sequence[str] = (), spans: Mapping[str, Sequence[Interval]] | None = None,
) -> str:  # fmt: skip
    """``names``: of the places ``across``, instead of their numbers; ``spans``: what is drawn upright at each point."""
    highest = [span.high for found in (spans or {}).values() for span in found if math.isfinite(span.high)]
    up = ticks(0, max([value for values in series.values() for value in values] + highest))
    legend, rows = _legend(list(series), width)
    frame = Frame.of(width, (min(0, across[0]), max(across[-1], at[-1])), (up[0], up[-1]), 20 + 18 * rows)
    parts = [axes(frame, across, up, label, "KL to source, nats a token", names), *legend]
    marks = _marks(list(series))
    for i, (name, values) in enumerate(series.items()):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(value):.1f}" for x, value in zip(at, values, strict=False))
        dots = "".join(
            f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(value):.1f}" r="2"/>'
            for x, value in zip(at, values, strict=False)
            if len(values) <= 32
        )
        dots += "".join(
            f'<line class="line" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" '
            f'y1="{frame.y(max(0.0, span.low)):.1f}" y2="{frame.y(span.high):.1f}"/>'
            for x, span in zip(at, (spans or {}).get(name, ()), strict=False)
            if math.isfinite(span.high)
        )
        parts.append(f'<g class="{marks[i]}"><polyline class="line"{_dash(i)} points="{path}"/>{dots}</g>')
    told = "; ".join(f"{name}: {plain(values[0])} to {plain(values[-1])}" for name, values in series.items() if values)
    return svg(title, f"First and last value of each: {told}.", frame.bottom + 52, parts, width)


def _legend(names: Sequence[str], width: int) -> tuple[list[str], int]:
    """Swatch and name for each series, wrapped; and the number of rows."""
    parts, x, row, marks = [], 62.0, 0, _marks(names)
    for i, name in enumerate(names):
        wide = 42 + _text_width(len(name))
        if x + wide > width - 10 and x > 62:
            x, row = 62.0, row + 1
        y = 20 + 18 * row
        swatch = f'<line class="line"{_dash(i)} x1="{x:.0f}" x2="{x + 24:.0f}" y1="{y - 4}" y2="{y - 4}"/>'
        parts.append(f'<g class="{marks[i]}">{swatch}<text x="{x + 30:.0f}" y="{y}">{visible(name)}</text></g>')
        x += wide
    return parts, row + 1


def _marks(names: Sequence[str]) -> list[str]:
    """The class that colours each: the source grey, the others by rank, so that a model keeps its colour."""
    others = [name for name in names if name != "source"]
    return ["s0" if name == "source" else f"s{1 + others.index(name) % (len(_LIGHT) - 1)}" for name in names]


def _dash(i: int) -> str:
    dash = _DASHES[i % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def axes(
    frame: Frame, across: Sequence[float], up: Sequence[float], x_label: str, y_label: str, names: Sequence[str] = ()
) -> str:
    parts = []
    for value in up:
        y = frame.y(value)
        line = f'<line class="grid" x1="{frame.left}" x2="{frame.left + frame.width}" y1="{y:.1f}" y2="{y:.1f}"/>'
        place = f'text-anchor="end" x="{frame.left - 8}" y="{y + 4:.1f}"'
        parts.append(f'{line}<text class="soft" {place}>{plain(value)}</text>')
    for number, value in enumerate(across):
        x, told = frame.x(value), visible(names[number]) if names else plain(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.bottom}" y2="{frame.bottom + 4}"/>')
        parts.append(f'<text class="soft" text-anchor="middle" x="{x:.1f}" y="{frame.bottom + 18}">{told}</text>')
    end = frame.left + frame.width
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{end}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    middle = frame.left + frame.width / 2
    parts.append(f'<text text-anchor="middle" x="{middle:.0f}" y="{frame.bottom + 40}">{visible(x_label)}</text>')
    turn = f"translate(14 {frame.top + frame.height / 2:.0f}) rotate(-90)"
    return "".join(parts) + f'<text text-anchor="middle" transform="{turn}">{visible(y_label)}</text>'


def _spread(places: Mapping[int, float], gap: float = 10) -> dict[int, float]:
    """Moves x positions at least ``gap`` apart, in their order and as little as possible (least squares: adjacent
    violators are pooled)."""
    order = sorted(places, key=lambda i: places[i])
    pools: list[tuple[float, int]] = []  # sum and count of x less rank times gap
    for rank, i in enumerate(order):
        pools.append((places[i] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = (pools[-1][0] + total, pools[-1][1] + count)
    bases = [total / count for total, count in pools for _ in range(count)]
    return {i: base + rank * gap for rank, (i, base) in enumerate(zip(order, bases, strict=True))}


def _label_place(
    x: float, y: float, length: int, taken: list[tuple[float, float, float, float]], frame: Frame
) -> tuple[float, float]:
    """Where a name goes: the first place near its point that is free; below all others where none is."""
    wide, tall = _text_width(length), 13.0
    ends = frame.left + frame.width + 20
    ways = [(x + 9, y + 4), (x - 9 - wide, y + 4)]
    steps = (-12, 20, -26, 34, -40, 48, -54, 62, -68, 76, -82, 90, -96, 104)
    ways += [(x + side, y + step) for step in steps for side in (9, -9 - wide, -wide / 2)]
    for left, base in ways:
        box = (left, base - 11, wide, tall)
        inside = left >= frame.left and left + wide <= ends and frame.top <= base <= frame.bottom - 3
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return left, base
    return min(x + 9, ends - wide), min(y + 4, frame.bottom - 3)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _text_width(length: int) -> float:
    return 7.0 * length + 4


def svg(title: str, told: str, height: float, parts: Sequence[str], width: float = WIDTH) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="qf" role="img" aria-label="{visible(title)}" {size}>'
    words = f"<title>{visible(title)}</title><desc>{visible(told)}</desc><style>{STYLE}</style>"
    return f'{head}{words}<rect class="bg" width="{width:.0f}" height="{height:.0f}"/>{"".join(parts)}</svg>\n'
