"""The report's maps as SVG text: what each linear, and each expert, lost; what reached each expert."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.report.figures import WIDTH, shade, svg
from qtool.report.markup import visible


def heat_map(
    values: Mapping[tuple[int, str], float], label: str, span: tuple[float, float] | None = None, room: int = WIDTH,
    digits: int = 4,
) -> str:  # fmt: skip
    """Layers down, linears across; a pair that nobody measured stays empty. ``span``: of the colours (None: of these
    values); ``digits``: of its numbers, behind the point."""
    layers = sorted({layer for layer, _ in values})
    linears = list(dict.fromkeys(linear for _, linear in sorted(values, key=lambda key: key[0])))
    low, high = span or (min(values.values()), max(values.values()))
    left, top, wide, tall = (72, 84, 68, 22) if room == WIDTH else (60, 112, 39, 22)
    width = max(int(left + wide * (place + 0.5) + 7 * len(linear)) for place, linear in enumerate(linears))
    width = width if room == WIDTH else left + wide * len(linears) + 8
    turned = 'rotate(-28)"' if room == WIDTH else 'rotate(58)" text-anchor="end"'
    parts, word = [], "layer " if room == WIDTH else ""
    for column, linear in enumerate(linears):
        x = left + wide * (column + 0.5) - 4
        parts.append(f'<text transform="translate({x:.0f} {top - 8}) {turned}>{visible(linear)}</text>')
    for row, layer in enumerate(layers):
        y = top + tall * row
        parts.append(f'<text class="soft" text-anchor="end" x="{left - 8}" y="{y + 15}">{word}{layer}</text>')
        for column, linear in enumerate(linears):
            value = values.get((layer, linear))
            if value is not None:
                share = (value - low) / (high - low) if high > low else 0.5
                parts.append(
                    _cell(
                        left + wide * column,
                        y,
                        wide,
                        tall,
                        share,
                        f"{value:.{digits}f}" if room == WIDTH else f"{value:.{digits - 1}f}".removeprefix("0"),
                    )
                )
    y = top + tall * len(layers) + 18
    parts += _key(left, y, f"{low:.{digits}f}", f"{high:.{digits}f}", label if room == WIDTH else "")
    worst = max(values, key=lambda key: values[key])
    span_text = f"from {min(values.values()):.{digits}f} to {values[worst]:.{digits}f}"
    told = f"{label}: {span_text}; largest in layer {worst[0]}, {worst[1]}."
    return svg(label, told, y + 24, parts, max(width, left + 206 + 8 * len(label) if room == WIDTH else room))


def expert_map(
    values: Mapping[tuple[int, int], float],
    label: str,
    digits: int = 4,
    span: tuple[float, float] | None = None,
    room: int = WIDTH,
) -> str:
    """Layers down, experts across, a small cell each; layers without experts are left out, and what is 0 has a red
    edge. ``digits``: of its numbers, behind the point; ``span``: of the colours (None: of these values)."""
    layers, experts = sorted({layer for layer, _ in values}), max(expert for _, expert in values) + 1
    low, high = span or (min(values.values()), max(values.values()))
    left, top, tall = 72 if room == WIDTH else 56, 24, 10
    wide = max(1.5, min(12.0, (768 if room == WIDTH else room - left - 8) / experts))
    parts = [f'<text class="soft" x="{left}" y="{top - 8}">expert 0 to {experts - 1}</text>']
    for row, layer in enumerate(layers):
        y = top + tall * row
        if row % 2 == 0:
            parts.append(f'<text class="soft" text-anchor="end" x="{left - 8}" y="{y + 9}">layer {layer}</text>')
        for expert in range(experts):
            if (value := values.get((layer, expert))) is not None:
                colour = shade((value - low) / (high - low) if high > low else 0.5)
                x = left + wide * expert
                edge = "" if value else ' stroke="#c0392b"'
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{tall}" fill="{colour}"{edge}/>')
    y = top + tall * len(layers) + 18
    parts += _key(left, y, f"{low:,.{digits}f}", f"{high:,.{digits}f}", label if room == WIDTH else "")
    most = max(values, key=lambda place: values[place])
    least, place = min(values.values()), f"largest in layer {most[0]}, expert {most[1]}"
    told = f"{label}: from {least:,.{digits}f} to {values[most]:,.{digits}f}; {place}."
    needed = int(max(left + wide * experts + 20, left + 206 + 8 * len(label)))
    return svg(label, told, y + 24, parts, needed if room == WIDTH else max(room, int(left + wide * experts)))


def _key(left: int, y: int, low: str, high: str, label: str) -> list[str]:
    """What the colours of a map stand for."""
    parts = [
        f'<rect x="{left + 6 * step}" y="{y}" width="6" height="10" fill="{shade(step / 23)}"/>' for step in range(24)
    ]
    parts.append(f'<text class="soft" text-anchor="end" x="{left - 8}" y="{y + 9}">{low}</text>')
    parts.append(f'<text class="soft" x="{left + 152}" y="{y + 9}">{high}</text>')
    return [*parts, f'<text class="soft" x="{left + 206}" y="{y + 9}">{visible(label)}</text>']


def _cell(x: float, y: float, wide: float, tall: float, share: float, words: str) -> str:
    box = f'<rect x="{x}" y="{y}" width="{wide - 1}" height="{tall - 1}" fill="{shade(share)}"/>'
    ink = "ondark" if share > 0.5 else "onlight"
    return f'{box}<text class="{ink}" text-anchor="middle" x="{x + wide / 2}" y="{y + 15}">{words}</text>'
