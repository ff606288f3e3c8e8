"""Time and memory against the number of layers: random models of one shape, each converted by a `qtool run` of its own.

    python scripts/bench_layers.py FOLDER                            # the table; --svg docs/layers.svg draws it

Processor seconds, user and system, so that other work on the machine counts little; the peak of the process's own
memory. Linear is: the same seconds for each further layer. Flat is: no more memory for further layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_run import GEOMETRIES, make_model
from measured_run import Measured, load, measure

from qtool.report.figures import ticks

OUTPUTS = [{"method": "gptq", "descent": False}]
WIDTH, HEIGHT, LEFT, TOP, GAP, FOOT = 720, 200, 60, 44, 80, 46
STYLE = (
    "svg{font:12px system-ui,-apple-system,'Segoe UI',sans-serif}.bg{fill:#fff}text{fill:#1f2328}.soft{fill:#59636e}"
    ".grid{stroke:#e1e4e8}.line{fill:none;stroke:#2563b0;stroke-width:2}.dot{fill:#2563b0}"
    "@media(prefers-color-scheme:dark){.bg{fill:#151b23}text{fill:#e6edf3}.soft{fill:#9aa4b0}.grid{stroke:#2b333d}"
    ".line{stroke:#7fb2f0}.dot{fill:#7fb2f0}}"
)


def draw(layers: Sequence[int], seconds: Sequence[float], memory: Sequence[float]) -> str:
    """Two panels side by side over the layers: processor seconds, and MB of the process's own at most."""
    each = (WIDTH - GAP) // 2
    panels = _panel("processor seconds", layers, seconds, LEFT, each - LEFT)
    panels += _panel("MB of its own, at most", layers, memory, each + GAP + LEFT // 2, each - LEFT)
    height = TOP + HEIGHT + FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>Seconds and memory of a conversion against layers</title><style>{STYLE}</style>'
        f'<rect class="bg" width="{WIDTH}" height="{height}"/>{panels}</svg>\n'
    )


def _panel(title: str, layers: Sequence[int], values: Sequence[float], left: int, width: int) -> str:
    marks = ticks(0, max(values))
    top, most = marks[-1], max(layers)

    def x(count: float) -> float:
        return left + width * count / most

    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - value / top)

    out = [f'<text x="{left}" y="{TOP - 18}" font-weight="600">{title}</text>']
    for mark in marks:
        out.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        out.append(f'<text class="soft" x="{left - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    pairs = list(zip(layers, values, strict=True))
    path = " ".join(f"{x(count):.1f},{y(value):.1f}" for count, value in pairs)
    out.append(f'<polyline class="line" points="{path}"/>')
    for count, value in pairs:
        out.append(f'<circle class="dot" cx="{x(count):.1f}" cy="{y(value):.1f}" r="3.5"/>')
        out.append(f'<text class="soft" x="{x(count):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{count}</text>')
    out.append(f'<text class="soft" x="{left + width / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">layers</text>')
    return "".join(out)


def row(count: int, found: Measured, before: tuple[int, Measured] | None) -> str:
    """One line of the table; of seconds a further layer, from the model before."""
    each = "" if before is None else f"{(found.seconds - before[1].seconds) / (count - before[0]):.2f}"
    return f"| {count} | {found.seconds:.1f} | {each} | {found.anonymous / 1e6:.0f} | {found.planned / 1e6:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="models are made in it once")
    parser.add_argument("--layers", default="4,8,16,32")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="least")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    counts = [int(text) for text in options.layers.split(",")]

    def measured(count: int) -> Measured:
        model = options.folder / f"{options.geometry}-{count}"
        if not model.exists():
            make_model(model, options.geometry, count)
        recipe = {
            "model": str(model.resolve()), "calibration": {"text": "qtool-code", "samples": 8, "length": 256},
            "outputs": OUTPUTS, "output_dir": "artifacts",
        }  # fmt: skip
        return measure(options.folder / f"work-{count}", recipe)

    with ThreadPoolExecutor(options.at_once) as pool:
        found = list(pool.map(measured, counts))
    print("| layers | processor s | s a further layer | MB of its own | planned MB |\n|---|---|---|---|---|")
    for number, (count, one) in enumerate(zip(counts, found, strict=True)):
        print(row(count, one, (counts[number - 1], found[number - 1]) if number else None))
    print(load())
    if options.svg:
        memory = [one.anonymous / 1e6 for one in found]
        options.svg.write_text(draw(counts, [one.seconds for one in found], memory), encoding="utf-8")


if __name__ == "__main__":
    main()
