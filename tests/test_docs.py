"""What docs/how-it-works.md says in numbers is what the code has; links between the pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qtool.evaluate.fidelity import TOP
from qtool.evaluate.sandbox.execute import TIERS
from qtool.evaluate.statistics import RESAMPLES
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gptq import GptqMethod

DOCS = Path(__file__).parent.parent / "docs"


def test_numbers_are_those_of_the_code() -> None:
    text = " ".join((DOCS / "how-it-works.md").read_text(encoding="utf-8").split())
    for method in (AwqMethod(method="awq"), GptqMethod(method="gptq")):
        assert f"propagate_strength = {method.propagate_strength}" in text
        assert f"damp_percent = {method.damp_percent}" in text
    assert f"the {TOP} likeliest tokens" in text
    assert f"{RESAMPLES:,} draws".replace(",", " ") in text
    assert TIERS == ("namespaces", "bubblewrap", "landlock")  # "the strongest first"
    assert "namespaces of its own (no network, no files but the interpreter's), bubblewrap, or Landlock" in text


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\(([\w./-]+\.md)(?:#([\w-]+))?\)", text):
        path = (DOCS / target).resolve()
        assert path.is_file(), target
        heads = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not heading or heading in slugs, f"{target}#{heading}"
