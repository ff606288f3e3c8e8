"""The files of `qtool report`."""

from __future__ import annotations

from pathlib import Path

from qtool.report.html import html_report
from qtool.report.markdown import markdown_report
from qtool.report.pictures import pictures
from qtool.runs.record import RunRecord


def write_report(run: RunRecord, out: Path) -> Path:
    """report.html, report.md and figures/*.svg in ``out``; the path of the HTML file."""
    drawn = pictures(run)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (out / "figures" / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    (out / "report.md").write_text(markdown_report(run, drawn), encoding="utf-8")
    path = out / "report.html"
    path.write_text(html_report(run, drawn), encoding="utf-8")
    return path
