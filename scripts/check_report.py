"""Open a run's report in Chromium as wide as a telephone (390) and as a screen (1280), by day and by night: it cuts
nothing, nothing stands beyond its picture, no text is below nine pixels; its script finds, filters and sorts; axe-core
finds no serious fault; a screenshot of each. Needs `chromium` on PATH (Debian's package), and for axe-core its file:
`npm pack axe-core` in some folder, unpacked, holds package/axe.min.js. Exit 1 for a fault.

    python scripts/check_report.py runs/88ab27a5024cc402/report.html --out pictures --axe axe.min.js
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
SCHEMES = {"day": 1, "night": 0}  # as Chromium numbers prefers-color-scheme
LOOK = """
addEventListener('load', async () => {
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
  document.querySelectorAll('.task').forEach((task, number) => {
    const whole = task.querySelector('.all'), rows = () => [...whole.querySelectorAll('tbody tr')];
    const shown = () => rows().filter(row => !row.hidden), find = task.querySelector('input[type=search]');
    const show = task.querySelector('select'), say = said => faults.push('task ' + number + ': ' + said);
    if (!find || !show) { say('no controls'); return; }
    const all = rows().length, name = rows()[all - 1].cells[0].textContent, put = (control, value) => {
      control.value = value;
      control.dispatchEvent(new Event(control === find ? 'input' : 'change'));
    };
    put(find, name);
    if (!shown().some(row => row.cells[0].textContent === name) || (all > 1 && shown().length === all))
      say('search for ' + name + ' shows ' + shown().length + ' of ' + all);
    put(find, 'no problem is called so');
    if (shown().length) say('search for nothing shows ' + shown().length);
    put(find, '');
    for (const kind of ['every', 'none', 'apart', 'lost', 'gained']) {
      put(show, kind);
      const wanted = rows().filter(row => row.dataset.is.split(' ').includes(kind)).length;
      if (shown().length !== wanted) say(kind + ' shows ' + shown().length + ' of ' + wanted);
      const cards = [...task.querySelectorAll('.problem')].filter(card => !card.hidden);
      if (cards.some(card => !card.dataset.is.split(' ').includes(kind))) say(kind + ' shows other answers');
    }
    put(show, '');
    if (shown().length !== all) say('without a filter ' + shown().length + ' of ' + all);
    const heads = whole.querySelectorAll('thead button'), order = () => rows().map(row => row.cells[0].textContent);
    const rates = () => rows().map(row => Number(row.cells[1].dataset.sort)), before = order().join();
    heads[1].click();
    if (rates().some((rate, at) => at && rate < rates()[at - 1])) say('not sorted by a score');
    heads[0].click();
    const names = order(), sorted = [...names].sort((a, b) => a.localeCompare(b, 'en', {numeric: true}));
    if (names.join() !== sorted.join()) say('not sorted by name');
    if (heads[0].closest('th').getAttribute('aria-sort') !== 'ascending') say('aria-sort is not told');
    whole.open = false;
  });
  if (typeof axe !== 'undefined') {
    document.querySelectorAll('details').forEach(d => d.open = true);
    const done = await axe.run(document, {resultTypes: ['violations']});
    for (const one of done.violations)
      if (['serious', 'critical'].includes(one.impact))
        faults.push('axe, ' + one.impact + ': ' + one.help + ' (' + one.nodes.length + ' times, first '
          + one.nodes[0].target + ': ' + one.nodes[0].failureSummary.split('\\n').slice(0, 2).join(' ') + ')');
  }
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


def look_at(report: Path, width: int, scheme: str, axe: Path | None, out: Path | None) -> list[str]:
    """What is wrong at this width, by day or by night."""
    page = re.sub(r"<meta http-equiv=[^>]*>", "", report.read_text(encoding="utf-8"))  # it forbids other scripts
    page = page.replace("</head>", f"<script>{LOOK.replace('SMALLEST', str(SMALLEST))}</script></head>")
    if axe is not None:
        page = page.replace("</head>", f"<script>{axe.read_text(encoding='utf-8')}</script></head>")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "report.html"
        copy.write_text(page, encoding="utf-8")
        # a window is at least 500 wide: a narrower page is looked at in a frame
        frame = Path(folder) / "frame.html"
        frame.write_text(f'<body style="margin:0"><iframe id="f" src="report.html" width="{width}" height="3000" '
                         'style="border:0"></iframe>')  # fmt: skip
        size = (f"--window-size={max(width, 500)},3000", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}")
        dumped = chromium(*size, "--allow-file-access-from-files", "--virtual-time-budget=60000", "--dump-dom",
                          f"file://{_unframed(frame, copy)}")  # fmt: skip
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            picture = out.resolve() / f"report-{width}-{scheme}.png"
            shutil.copy(report, copy)  # as it is, under its own policy
            chromium(*size, "--allow-file-access-from-files", f"--screenshot={picture}", f"file://{frame}")
    found = re.search(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)
    if found is None:
        return [f"{width} by {scheme}: the page did not load"]
    faults: list[Any] = json.loads(html.unescape(found[1]))
    return [f"{width} by {scheme}: {fault}" for fault in faults]


def _unframed(frame: Path, copy: Path) -> Path:
    """A frame whose findings are copied out, so that they are in the page that is dumped."""
    script = """<script>addEventListener('load', () => setInterval(() => {
      const found = document.getElementById('f').contentDocument.getElementById('found');
      if (found && !document.getElementById('found')) document.body.append(document.importNode(found, true)); }, 200));
      </script>"""
    looked = frame.with_name("looked.html")
    looked.write_text(frame.read_text() + script)
    return looked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, help="folder for screenshots")
    parser.add_argument("--axe", type=Path, metavar="axe.min.js", help="axe-core's file")
    options = parser.parse_args()
    faults = [
        fault
        for width in WIDTHS
        for scheme in SCHEMES
        for fault in look_at(options.report, width, scheme, options.axe, options.out)
    ]
    print(*faults, sep="\n")
    print(f"{len(faults)} faults at {' and '.join(map(str, WIDTHS))} pixels")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
