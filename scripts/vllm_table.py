"""What `check_vllm.py` found, as the Markdown tables of docs/vllm.md."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.evaluate.engines.machine import machine_name

PROMPTS, TOKENS = 20, 32


@dataclass(frozen=True)
class Row:
    """What became of one case in one dtype. ``distance``: nats; ``top1``: share of steps with the same first token."""

    label: str
    dtype: str
    ran: str
    kernels: str
    distance: float | None
    top1: float | None
    verdict: str
    agrees: bool


def said_by(error: str) -> str:
    """The sentence in vLLM's error."""
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", error, re.DOTALL)
    text = " ".join((found.group(1) if found else error.partition(": ")[2] or error).split())
    text = re.sub(r"`?/\S+/", "…/", text)  # where it was tried is nobody's matter
    return text if len(text) <= 140 else text[:139] + "…"


def table(rows: Sequence[Row], answers: list[dict[str, Any]], command: str) -> str:
    """Markdown: machine and versions, then a line for each output."""
    first = next((row for row in answers if "device" in row), answers[0])
    machine = first.get("card") or machine_name("cpu")
    dtypes = [dtype for dtype in ("float32", "float16", "bfloat16") if any(row.dtype == dtype for row in rows)]
    lines = [
        f"vLLM {first['vllm']}, torch {first['torch']}, {machine}; {PROMPTS} prompts, {TOKENS} tokens each.", "",
        f"    {command}", "",
        f"| output | {' | '.join(dtypes)} | kernel, or what vLLM says |", f"|---|{'---|' * (len(dtypes) + 1)}",
    ]  # fmt: skip
    for label in dict.fromkeys(row.label for row in rows):
        found = {row.dtype: row for row in rows if row.label == label}
        cells = [cell(found.get(dtype)) for dtype in dtypes]
        says = "; ".join(dict.fromkeys(row.kernels for row in found.values()))
        lines.append(f"| {label} | {' | '.join(cells)} | {says} |")
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    """``.0022, 100.0 %``."""
    if row is None:
        return ""
    if row.distance is None or row.top1 is None:
        return row.verdict
    mark = "" if row.agrees and row.verdict == "agrees" else f" ({row.verdict})"
    return f"{row.distance:.4f}, {row.top1:.1%}{mark}".replace("0.", ".", 1)


def write_into(document: Path, kind: str, text: str, script: str = "check_vllm") -> None:
    """Between the marks of the ``script``'s ``kind``. Raises QtoolError where the document has none."""
    old = document.read_text(encoding="utf-8")
    begin, end = f"<!-- {script} {kind} -->\n", "<!-- end -->"
    if begin not in old:
        raise QtoolError(f"{document}: has no mark {begin.strip()!r}.")
    head, _, rest = old.partition(begin)
    document.write_text(f"{head}{begin}{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of an answer file; none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
