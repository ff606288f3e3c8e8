"""`qtool check --markdown`: a table that GitHub shows, of what models and recipes wrote nothing but text."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qtool.cli import main
from qtool.report.check_markdown import LONGEST, check_markdown
from qtool.runs.gates import GateResult
from qtool.runs.record import load_run

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).parent / "data" / "stored_run" / "00265698"


def result(verdict: str, reason: str = "why", on_undecided: str = "warn", gate: str = "max_kld 1") -> GateResult:
    return GateResult("awq", gate, verdict, reason, on_undecided)  # type: ignore[arg-type]  # one of the three


@pytest.mark.parametrize(
    ("verdicts", "head"),
    [
        (["pass", "pass"], "## ✅ qtool-demo: all 2 checks held"),
        (["pass", "undecided"], "## ✅ qtool-demo: 1 of 2 checks held, 1 undecided"),
        (["pass", "fail", "undecided"], "## ❌ qtool-demo: 1 of 3 checks failed"),
    ],
)
def test_the_verdict_comes_first_and_what_failed_before_the_rest(verdicts: list[str], head: str) -> None:
    lines = check_markdown(load_run(STORED), [result(verdict) for verdict in verdicts]).splitlines()
    assert lines[0] == head
    table = [line for line in lines if line.startswith("| ")][1 : 1 + len(verdicts)]
    order = ["fail", "undecided", "pass"]
    found = [next(word for word in order if word in row.split("|")[1]) for row in table]
    assert found == sorted(verdicts, key=order.index)


def test_nothing_ends_a_cell_or_calls_somebody() -> None:
    text = check_markdown(load_run(STORED), [result("fail", "a|b @everyone <script>`x`\n## c \u202e")])
    row = next(line for line in text.splitlines() if "everyone" in line)
    assert "a\\|b" in row
    assert "@everyone" not in row
    assert "<script" not in row
    assert "\\u202e" in row


def test_it_fits_a_comment() -> None:
    many = [result("fail", "x" * 500, gate=f"g{i}") for i in range(500)]
    assert len(check_markdown(load_run(STORED), many)) < 65_536
    assert LONGEST < 65_536


def test_files_are_written_into_folders_that_are_not_there(tmp_path: Path) -> None:
    typed = ["check", str(STORED)]
    for option, name in (("--markdown", "a/b/c.md"), ("--junit", "d/e.xml"), ("--json", "f/g.json")):
        typed += [option, str(tmp_path / name)]
    CliRunner().invoke(main, typed)
    assert all((tmp_path / name).stat().st_size for name in ("a/b/c.md", "d/e.xml", "f/g.json"))


def test_the_example_is_a_workflow_that_names_what_there_is() -> None:
    """`scripts/check_workflow.py` runs it; here only that it can be read and types no option that is not there."""
    found = yaml.safe_load((ROOT / "examples" / "github-actions" / "quantize.yml").read_text())
    steps = found["jobs"]["quantize"]["steps"]
    typed = " ".join(step.get("run", "") for step in steps)
    options = {word for word in typed.replace("=", " ").split() if word.startswith("--")}
    known = {name for command in main.commands.values() for one in command.params for name in one.opts}
    assert options - {"--", "--index-url", "--edit-last", "--create-if-none", "--body-file"} <= known
    assert all(("uses" in step) != ("run" in step) for step in steps)
