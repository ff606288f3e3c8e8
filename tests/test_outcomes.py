"""How answers fail: the classes, and where they are shown; answers compared by letter; two models on one page."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from qtool.cli import main
from qtool.evaluate.outcomes import KINDS, MEANINGS, counts, kind_of, repeats
from qtool.evaluate.scorecard import Grade, ProblemOutcome
from qtool.report.html import html_report
from qtool.report.pictures import pictures
from qtool.report.problems import _marked
from qtool.runs.record import load_run

STORED = Path(__file__).parent / "data" / "stored_run" / "00265698"


def answer(outcome: Grade, completion: str, detail: str = "") -> ProblemOutcome:
    return ProblemOutcome(outcome=outcome, completion=completion, detail=detail)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (answer("passed", "return 1"), "passed"),
        (answer("passed", "x = 1\n" * 20), "passed"),
        (answer("failed", "return 2", "AssertionError"), "wrong"),
        (answer("failed", "return (", "SyntaxError: '(' was never closed (<program>, line 3)"), "syntax"),
        (answer("failed", "  return 1", "IndentationError: unexpected indent"), "syntax"),
        (answer("failed", "raise E('no SyntaxErrors here')", "E: no SyntaxErrors here"), "wrong"),
        (answer("timeout", "while True: pass"), "timeout"),
        (answer("failed", " \n\t\n"), "empty"),
        (answer("failed", "    x = f(x)\n" * 12, "SyntaxError: cut"), "loop"),
        (answer("timeout", "if a:\n  b()\nelse:\n  c()\n" * 7), "loop"),
        (answer("error", "return 1", "the sandbox died"), "error"),
    ],
)
def test_an_answer_has_one_kind(given: ProblemOutcome, kind: str) -> None:
    assert kind_of(given) == kind
    assert set(MEANINGS) == set(KINDS)


@pytest.mark.parametrize("text", ["=" * 200, "\n" * 200, "a b c d e f", "x = 1\n" * 3, "", "# ------\n" + "-" * 99])
def test_what_only_looks_like_a_loop(text: str) -> None:
    assert not repeats(text)


def test_endless_answers_are_looked_at_quickly() -> None:
    import time

    started = time.perf_counter()
    repeats("ab" * 10**6)
    repeats("".join(map(str, range(200_000))))
    assert time.perf_counter() - started < 1


def test_counts_leave_out_what_is_not_there() -> None:
    found = counts([answer("passed", "a"), answer("failed", ""), answer("failed", "")])
    assert found == {"passed": 1, "empty": 2}


def test_the_report_says_how_answers_ended() -> None:
    run = load_run(STORED)
    page = html_report(run, pictures(run))
    assert 'aria-label="how the answers ended"' in page
    assert "passed: every test held" in page


def test_of_a_line_that_changed_the_letters_are_marked() -> None:
    assert _marked("def f(x):\n    return x + 1\n", "def f(x):\n    return x + 2\n") == (
        "def f(x):\n    return x + <mark>1</mark>"
    )
    assert _marked("a<b\n", "a<c\n") == "a&lt;<mark>b</mark>"
    assert _marked("whole new\n", "zzz\n") == "<mark>whole new</mark>"
    gone = _marked("return x\n", "return -x\n")
    assert "<mark title=" in gone
    assert '"-"' in gone
    assert ElementTree.fromstring(f"<pre>{gone}</pre>").text == "return "
    assert _marked("x" * 5000 + "a", "x" * 5000 + "b").startswith("<mark>x"), "long lines are not compared by letter"


def test_two_models_on_one_page(tmp_path: Path) -> None:
    typed = ["compare", f"{STORED}:awq", f"{STORED}:rtn", "--html", str(tmp_path / "new" / "c.html")]
    result = CliRunner().invoke(main, typed)
    page = (tmp_path / "new" / "c.html").read_text()
    assert f"report: {tmp_path / 'new' / 'c.html'}" in result.output
    assert "Is B worse than A?" in page
    assert "KL to source" in page
    assert "Content-Security-Policy" in page
    assert page.count("<script") == page.count("script-src 'sha256-") == 1  # qtool's own, which the policy names
    hostile = CliRunner().invoke(main, ["compare", str(STORED), f"{STORED}:awq<b>", "--html", str(tmp_path / "d.html")])
    assert hostile.exit_code == 2
