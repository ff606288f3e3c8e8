"""Open a run's report in Chromium at the width of a telephone (390) and of a screen (1280): nothing is cut, nothing
beyond its picture, no text below nine pixels; a screenshot of each. Needs `chromium` on PATH (Debian's package); exit 1
for a fault.

    python scripts/check_report.py runs/218f1f2dd055aa3c/report.html --out pictures
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTHS = (390, 1280)
SMALLEST = 9.0  # pixels of a letter's height on the screen
LOOK = """
addEventListener('load', () => {
  document.querySelectorAll('details').forEach(d => d.open = false);
  const seen = e => e.getClientRects().length > 0, faults = [];
  const name = e => (e.getAttribute('aria-label') || e.className || e.tagName) + '';
  if (document.documentElement.scrollWidth > innerWidth + 1)
    faults.push('the page is ' + document.documentElement.scrollWidth + ' wide');
  document.querySelectorAll('.scroll').forEach(e => {
    if (seen(e) && e.scrollWidth > e.clientWidth + 1 && !e.querySelector('.matrix'))
      faults.push('cut: ' + name(e) + ' needs ' + e.scrollWidth + ' of ' + e.clientWidth);
  });
  document.querySelectorAll('svg').forEach(svg => {
    if (!seen(svg)) return;
    const box = svg.getBoundingClientRect();
    svg.querySelectorAll('text').forEach(t => {
      const at = t.getBoundingClientRect();
      if (at.left < box.left - 1 || at.right > box.right + 1 || at.bottom > box.bottom + 1 || at.top < box.top - 1)
        faults.push('beyond its picture: ' + t.textContent + ' in ' + name(svg));
      const size = parseFloat(getComputedStyle(t).fontSize) * box.width / svg.viewBox.baseVal.width;
      if (size < SMALLEST) faults.push('small: ' + t.textContent + ' ' + size.toFixed(1) + ' px in ' + name(svg));
    });
  });
  document.querySelectorAll('h1,h2,h3,p,li,th,td').forEach(e => {
    if (seen(e) && e.scrollWidth > e.clientWidth + 2 && getComputedStyle(e).overflow === 'visible'
        && getComputedStyle(e).display !== 'inline' && !e.closest('.scroll') && e.clientWidth)
      faults.push('text beyond its box: ' + e.textContent.slice(0, 60));
  });
  const out = document.createElement('pre');
  out.id = 'found'; out.textContent = JSON.stringify([...new Set(faults)]);
  document.body.append(out);
});
"""


def chromium(*arguments: str) -> str:
    """What a headless Chromium prints."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("chromium is not on PATH")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([program, *quiet, *arguments], capture_output=True, text=True, timeout=180, check=False)
    return done.stdout


def look_at(report: Path, width: int, out: Path | None) -> list[str]:
    """What is wrong at this width."""
    page = re.sub(r"<meta http-equiv=[^>]*>", "", report.read_text(encoding="utf-8"))  # it forbids scripts
    page = page.replace("</head>", f"<script>{LOOK.replace('SMALLEST', str(SMALLEST))}</script></head>")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "report.html"
        copy.write_text(page, encoding="utf-8")
        # a window is at least 500 wide: a narrower page is looked at in a frame
        frame = Path(folder) / "frame.html"
        frame.write_text(f'<body style="margin:0"><iframe id="f" src="report.html" width="{width}" height="3000" '
                         'style="border:0"></iframe>')  # fmt: skip
        size = f"--window-size={max(width, 500)},3000"
        dumped = chromium(size, "--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom",
                          f"file://{_unframed(frame, copy)}")  # fmt: skip
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            picture = out.resolve() / f"report-{width}.png"
            chromium(size, "--allow-file-access-from-files", f"--screenshot={picture}", f"file://{frame}")
    found = re.search(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)
    if found is None:
        return [f"{width}: the page did not load"]
    faults: list[Any] = json.loads(html.unescape(found[1]))
    return [f"{width}: {fault}" for fault in faults]


def _unframed(frame: Path, copy: Path) -> Path:
    """A frame whose findings are copied out, so that they are in the page that is dumped."""
    script = """<script>addEventListener('load', () => setTimeout(() => {
      const found = document.getElementById('f').contentDocument.getElementById('found');
      if (found) document.body.append(document.importNode(found, true)); }, 500));</script>"""
    looked = frame.with_name("looked.html")
    looked.write_text(frame.read_text() + script)
    return looked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, help="folder for screenshots")
    options = parser.parse_args()
    faults = [fault for width in WIDTHS for fault in look_at(options.report, width, options.out)]
    print(*faults, sep="\n")
    print(f"{len(faults)} faults at {' and '.join(map(str, WIDTHS))} pixels")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
