"""The list of models that vLLM publishes recipes for: each is quantized, or it is said what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_the_share_is_what_the_page_says() -> None:
    run = [sys.executable, str(ROOT / "scripts" / "count_coverage.py")]
    *rows, last = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    models = yaml.safe_load((ROOT / "tests" / "data" / "coverage" / "vllm-recipes.yaml").read_text(encoding="utf-8"))
    names = [name for held in models.values() for name in held]
    assert len(names) == len(set(names)) == 173
    assert len(rows) == len(models)
    assert all(row.partition(": ")[2] for row in rows)
    assert not [row for row in rows if "not known to qtool" in row or "no row of WRAPPERS" in row]
    page = " ".join((ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8").split())
    assert last == "74 of 173 models are quantized (43%); of the 141 that write text 52%"
    # a fact for each
    assert (
        "and 74 with mixtures, short convolutions, delta nets and text parts of models of images (43 %, 52 %)" in page
    )
