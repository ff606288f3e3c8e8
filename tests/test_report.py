"""The report: hostile answers stay text, nothing is loaded, nothing overflows, and it says what the run says."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from qtool.cli import main
from qtool.convert.verify.verification import Check, Verification
from qtool.evaluate.scorecard import FidelityScore, ProblemOutcome, Scores, Settings, TaskScore
from qtool.report.columns import say
from qtool.report.files import write_report
from qtool.report.html import html_report
from qtool.report.markdown import markdown_report
from qtool.report.markup import visible
from qtool.report.pictures import pictures, verdict_of
from qtool.report.problems import LONGEST, _marked
from qtool.report.script import SCRIPT
from qtool.report.tables import by_task, footnote, score_rows
from qtool.report.terminal import print_rows
from qtool.runs.gates import GateResult
from qtool.runs.groups import groups_of
from qtool.runs.measurements import Measurement, Row
from qtool.runs.record import RunRecord
from qtool.runs.summary import summarise

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    '</pre></details></main><script>document.title="owned"</script><img src=x onerror=alert(1)>'
    '<style>*{display:none}</style><a href="https://example.org">x</a>\u202e\x1b[31m' + "x" * 3000
)
ASKED = Settings(engine="reference", dtype="float32", device="cpu", prompt="completion", max_new_tokens=8)


def score(name: str, solved: list[bool], samples: int = 1) -> TaskScore:
    made = [
        ProblemOutcome(outcome="passed" if right else "failed", detail=HOSTILE, completion=f"return {name}\n{HOSTILE}")
        for right in solved
    ]
    names = [f"t/{i}<b>" for i in range(len(solved))]
    more = {n: (made[(i + 1) % len(made)],) * (samples - 1) for i, n in enumerate(names)} if samples > 1 else {}
    return TaskScore(
        key=name, subject=name, task="hostile", digest="d", settings=ASKED, sandbox="none", seconds=1.0,
        outcomes=dict(zip(names, made, strict=True)), samples=samples, more=more,
    )  # fmt: skip


def fidelity(name: str, kl: float) -> FidelityScore:
    return FidelityScore(
        key=name, subject=name, digest="t", settings=ASKED, tokens=96, nll=[1.0, 1.2], kl=[kl, 2 * kl],
        top1=[0.9, 0.8], kl_p95=kl, kl_p999=kl, kl_by_position=[kl, kl / 2, kl], position_bin=32, context=96,
        kl_by_layer=[kl, kl / 3],
    )  # fmt: skip


@pytest.fixture
def record(finished: RunRecord) -> RunRecord:
    """The finished run with scores of which every text is hostile."""
    right = {"source": [True] * 30 + [False] * 4, "awq": [True] * 22 + [False] * 12, "nf4": [True] * 31 + [False] * 3}
    scores = Scores(
        tasks={
            name: {"hostile": score(name, solved), "sampled": score(name, solved, 3)} for name, solved in right.items()
        },
    )
    for name, kl in (("source", 0.0), ("awq", 0.02), ("nf4", 0.04)):
        scores.add_fidelity(fidelity(name, kl))
        scores.add_fidelity(fidelity(name, 2 * kl).model_copy(update={"context": 192, "kl_by_position": []}))
    verdicts = [
        GateResult("awq", "max_drop 3 points on hostile", "fail", f"lost {HOSTILE}", "warn"),
        GateResult("nf4", "max_kld 0.1", "undecided", "the interval includes it", "warn"),
    ]
    manifests = {n: m.model_copy(update={"notes": [HOSTILE]}) for n, m in finished.manifests.items()}
    done = Row(64, 2, "ok", "", {"p50": 0.5}, 0.02, 90.0, 1.5, None, None, {"resident": 3 * 2**30})
    made = Measurement("k", "m", "llama.cpp", "xllamacpp 1", "a <b>card</b>", 32, 3, "2026-01-01", (done,))
    measured = {"source": [made], "awq": [made], "nf4": [replace(made, rows=(), why=HOSTILE)]}
    sizes = {name: model.size for name, model in finished.summary.models.items() if model.size}
    summary = summarise(scores, sizes, measured)
    return replace(finished, scores=scores, summary=summary, verdicts=verdicts, manifests=manifests)


class Page(HTMLParser):
    """Tags, attributes and text as a browser's parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_answers_stay_text_and_nothing_is_loaded(record: RunRecord) -> None:
    text = html_report(record, pictures(record))
    page = Page(text)
    assert page.tags.count("script") == 1  # its own, whole and last; the policy allows no other text
    assert text.endswith(f"<script>{SCRIPT}</script>\n</body>\n</html>\n")
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"; script-src 'sha256-{allowed}'; base-uri 'none'" in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|fetch|import|XMLHttp|cookie", SCRIPT)
    assert not {"img", "iframe", "link", "object", "form", "base"} & set(page.tags)
    assert {name for name, _ in page.attributes if name in ("src", "style", "srcset") or name.startswith("on")} == set()
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    quoted = html.escape('href="https://example.org"')
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "").replace(quoted, "")
    assert "content=\"default-src 'none'; style-src 'sha256-" in text
    assert "unsafe" not in text
    assert any('<script>document.title="owned"' in words for words in page.words)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u202e\\u001b[31m" in text


def test_the_page_is_whole(record: RunRecord) -> None:
    """Every element that is opened is closed: as XML, void elements aside, it parses."""
    text = html_report(record, pictures(record)).replace(SCRIPT, "")
    text = re.sub(r"<(meta[^>]*)>", r"<\1/>", text).replace("<!doctype html>", "")
    text = re.sub(r"<details open>", '<details open="">', text)
    root = ET.fromstring(text)
    anchors = {node.get("id") for node in root.iter() if node.get("id")}
    links = [node.get("href") for node in root.iter() if node.tag == "a"]
    assert links
    assert {str(link).removeprefix("#") for link in links} <= anchors
    headings = [node.text for node in root.iter() if node.tag == "h2"]
    assert headings == [
        "Scores", "Memory and speed", "Size against quality", "Where the distribution moved", "Error of every linear",
        "Problem by problem", "Checks", "Time and memory of this run", "Recipe and versions",
    ]  # fmt: skip


def test_outcomes_that_changed_are_side_by_side(record: RunRecord) -> None:
    text = html_report(record, pictures(record))
    assert "34 problems: 22 solved by every model, 3 by none, 9 told them apart." in text
    assert text.count('<details class="problem"') >= 9
    lost = text[text.index('id="t0-25"') :]
    assert "lost by awq" in lost[:200]
    plain = re.sub(r"</?mark[^>]*>", "", lost)  # of a line that changed the letters are marked
    assert plain.index("return source") < plain.index("return awq")
    gained = text[text.index('id="t0-30"') :]
    assert "gained by nf4" in gained[:200]
    assert "(1 of 3 samples passed)" in text
    assert "33%" in text


def test_problems_say_what_a_filter_asks(record: RunRecord) -> None:
    text = html_report(record, pictures(record))
    row = r'<tr data-is="([a-z ]*)"><th scope="row">(?:<a [^>]*>)?t/{}&lt;b&gt;'
    for number, said in ((0, "every"), (25, "apart lost"), (30, "apart gained"), (33, "none")):
        found = re.findall(row.format(number), text[: text.index("<h3>sampled")])
        assert found, number
        assert set(found) == {said}


def test_scores_stand_by_difficulty_and_category(record: RunRecord) -> None:
    """Counted by hand: of 34 problems the source solves the first 30, awq 22, nf4 31; the last level begins at 30."""
    about = {
        f"t/{i}<b>": {"difficulty": "level 10" if i >= 30 else f"level {1 + i % 2}", "category": "one"}
        for i in range(34)
    }
    tasks = {name: found["hostile"].model_copy(update={"groups": about}) for name, found in record.scores.tasks.items()}
    groups = groups_of(tasks)
    assert [(group.kind, group.value, group.problems) for group in groups] == [
        ("difficulty", "level 1", 15), ("difficulty", "level 2", 15), ("difficulty", "level 10", 4),
    ]  # fmt: skip  # of one category alone there is nothing to tell
    assert [group.rates["source"].estimate for group in groups] == [1, 1, 0]
    assert [(group.lost["awq"], group.gained["nf4"]) for group in groups] == [(4, 0), (4, 0), (0, 1)]
    for name, found in tasks.items():
        record.scores.tasks[name]["hostile"] = found
    text = html_report(record, pictures(record))
    assert re.search(r'level 10</th><td[^>]*><span class="n">4</span></td>', text)
    assert "1 gained" in text


def test_a_name_between_colons_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    say("a:dog:b: 1")
    print_rows([{"model": "a:dog:b"}])
    assert capsys.readouterr().out.count("a:dog:b") == 2


def test_many_columns_are_a_table_for_each_task(record: RunRecord) -> None:
    rows = score_rows(record.summary)
    parts = by_task(rows, record.summary, 9)
    assert [next(iter(part)) for part in (list(rows[0]) for rows in parts)] == ["model"] * 3
    assert {head for row in parts[1] for head in row} == {
        "model",
        "hostile",
        "hostile: points lost",
        "hostile: recovery",
    }
    cells = [sorted((head, said) for part in parts for row in part for head, said in row.items() if head != "model")]
    assert cells == [sorted((head, said) for row in rows for head, said in row.items() if head != "model")]
    assert by_task(rows, record.summary, 99) == [rows]


def test_time_and_memory_have_a_box(record: RunRecord) -> None:
    told = replace(
        record, seconds=90.0, stages={"opening": 0.01, "rounding": 80.0, "writing": 40.0}, peaks={"resident": 3 * 10**9}
    )
    text = html_report(told, [])
    box = text[text.index('<div class="spent">') :]
    assert "90 s in all; at most 3.00 GB resident. Stages that ran side by side add up to more." in box
    assert '<meter min="0" max="80.00" value="40.00" aria-label="writing">' in box
    assert "opening" not in box[: box.index("</div>")]


def test_long_answers_are_cut_and_say_so(record: RunRecord) -> None:
    tasks = record.scores.tasks["awq"]
    long = ProblemOutcome(outcome="failed", detail="", completion="y" * (LONGEST + 7))
    outcomes = tasks["hostile"].outcomes | {"t/25<b>": long}
    tasks["hostile"] = tasks["hostile"].model_copy(update={"outcomes": outcomes})
    assert "7 more characters in the score file" in html_report(record, [])


@pytest.mark.parametrize(
    ("verdicts", "kind", "headline"),
    [
        ([], "undecided", "Not judged: the recipe has no gates"),
        (["pass"], "pass", "Passed: 1 of 1 gates met"),
        (["pass", "undecided"], "undecided", "Undecided: 1 of 2 gates need more data, none failed"),
        (["fail", "undecided"], "fail", "Failed: 1 of 2 gates not met"),
    ],
)
def test_headline(finished: RunRecord, verdicts: list[Any], kind: str, headline: str) -> None:
    run = replace(finished, verdicts=[GateResult("awq", "g", verdict, "r", "warn") for verdict in verdicts])
    assert verdict_of(run) == (kind, headline)
    broken = Verification(Path("x"), [Check("files", "fail", "gone")])
    assert verdict_of(replace(run, checks={"awq": broken})) == ("fail", "Failed: awq did not verify")


def test_the_table_says_what_p_is(record: RunRecord) -> None:
    rows = {row["model"]: row for row in score_rows(record.summary)}
    # 8 lost, none gained: p = 2 / 2**8; three other tests stand beside it
    assert rows["awq"]["hostile: points lost"].endswith("p=0.023") or "p=0.0" in rows["awq"]["hostile: points lost"]
    assert "Holm-adjusted over the 4 comparisons" in footnote(record.summary)
    alone = Scores(tasks={name: {"hostile": record.scores.tasks[name]["hostile"]} for name in ("source", "awq")})
    (row,) = (row for row in score_rows(summarise(alone)) if row["model"] == "awq")
    assert row["hostile: points lost"].endswith("p=0.0078")
    assert "Holm" not in footnote(summarise(alone))
    assert "hostile, pass@1 of 3" not in row
    assert "sampled, pass@1 of 3" in rows["awq"]
    assert rows["awq"]["KL to source"].startswith("0.0300 [")
    assert rows["awq"]["KL to source, 192 tokens"].startswith("0.0600 [")


def test_memory_speed_and_recovery_stand_in_the_table(record: RunRecord) -> None:
    rows = {row["model"]: row for row in score_rows(record.summary)}
    assert {rows["awq"][head] for head in ("engine", "peak memory", "tokens/s")} == {"llama.cpp", "3.00 GiB", "50"}
    assert "tokens/s" not in rows["nf4"]
    assert rows["awq"]["hostile: recovery"].startswith("73.3% [")  # 22 of 30
    assert rows["nf4"]["hostile: recovery"].startswith("103.3% [")
    assert "hostile: recovery" not in rows["source"]
    said = footnote(record.summary)
    assert "64 tokens of prompt, 2 requests at once, on a <b>card</b>." in said
    assert "Recovery: score in % of the source's" in said
    text = markdown_report(record, [])
    assert "## Memory and speed" in text
    assert "| awq | llama.cpp | 64 x 2 | 0.5 | 50 | 90 | 1.5 | 3.00 |" in text
    assert "32 tokens generated for each, medians of 3, on a <b>card</b> (llama.cpp: xllamacpp 1)." in text
    assert "- nf4 (llama.cpp): not measured: &lt;/pre>" in text


def test_what_a_score_does_not_cover_is_said(record: RunRecord) -> None:
    tasks = record.scores.tasks["source"]
    tasks["hostile"] = tasks["hostile"].model_copy(update={"left_out": {"t/99<i>": HOSTILE}, "in_process": 12})
    sizes = {name: model.size for name, model in record.summary.models.items() if model.size}
    record = replace(record, summary=summarise(record.scores, sizes))
    said = footnote(record.summary)
    assert "hostile: 1 problem of the benchmark could not be asked here." in said
    assert "hostile: 12 of 34 programs shared a process with their test" in said
    assert "hostile: the programs ran without a sandbox." in said
    text = html_report(record, pictures(record))
    assert "Not asked: 1 problem" in text
    assert "t/99&lt;i&gt;" in text


def test_a_narrow_terminal_cuts_no_cell(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Console(width=72, file=io.StringIO(), legacy_windows=False)
    monkeypatch.setattr("qtool.report.terminal.console", narrow)
    rows = score_rows(record.summary)
    print_rows(rows)
    printed = narrow.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "…" not in printed
    assert all(cell in printed for row in rows for cell in row.values())
    assert max(map(len, printed.splitlines())) <= 72


def test_markdown_names_pictures_and_changes(record: RunRecord) -> None:
    text = markdown_report(record, pictures(record))
    assert "**Failed: 1 of 2 gates not met.**" in text
    assert "![KL by layer](figures/kl-by-layer.svg)" in text
    assert re.search(r"\| awq \| hostile \| 8: t/22&lt;b>, .* \| 0 \|", text)
    fenced = replace(record, recipe_text="a: |\n  ```\n  not the end\n")
    assert "\n````yaml\n" in markdown_report(fenced, [])


def test_pictures_are_files_of_their_own(record: RunRecord, tmp_path: Path) -> None:
    path = write_report(record, tmp_path / "out")
    assert path.read_text().startswith("<!doctype html>")
    names = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    assert names == {
        "size-speed.svg", "size-score-0.svg", "size-score-1.svg", "size-kl.svg", "kl-by-position-96.svg",
        "kl-by-layer.svg", "errors-0-awq.svg", "errors-1-nf4.svg",
    }  # fmt: skip
    for file in (tmp_path / "out" / "figures").iterdir():
        ET.parse(file)
    linked = re.findall(r"\(figures/([^)]+)\)", (tmp_path / "out" / "report.md").read_text())
    assert set(linked) == names


def test_report_command(finished: RunRecord, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(finished.folder), "--out", str(tmp_path / "r")])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == f"report: {tmp_path / 'r' / 'report.html'}"
    text = (tmp_path / "r" / "report.html").read_text()
    assert "0 by none" in text or "1 by none" in text
    assert str(finished.folders["awq"].parent) not in text.replace(html.escape(finished.recipe_text.strip()), "")
    missing = CliRunner().invoke(main, ["report", "none", "--runs", str(tmp_path)])
    assert (missing.exit_code, "no such run" in missing.output) == (2, True)


def test_visible_spells_out_what_hides() -> None:
    assert visible("a\u202eb\x00\u200b\ufeff<") == "a\\u202eb\\u0000\\u200b\\ufeff&lt;"
    assert visible("a\tb\r\nc") == "a\tb\nc"
    assert visible("\u061c\xad\u180e\u3164\ufff9") == "\\u061c\\u00ad\\u180e\\u3164\\ufff9"
    assert visible("".join(chr(0xE0000 + ord(letter)) for letter in "hi")) == "\\U000e0068\\U000e0069"
    assert visible("\U0001f600 \u00e9 \u4e2d") == "\U0001f600 \u00e9 \u4e2d"


MEASURE = """<!doctype html><meta charset=utf-8><body><script>
const widths = WIDTHS, found = [];
for (const width of widths) {
  const frame = document.createElement('iframe');
  frame.width = width; frame.height = 900; frame.srcdoc = PAGE;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    for (const node of page.querySelectorAll('details')) node.open = true;
    const boxed = node => node.closest('.scroll, pre');
    const wide = [...page.querySelectorAll('body *')].filter(node => !boxed(node.parentElement)
      && node.getBoundingClientRect().right > width + 0.5).map(node => node.tagName + '.' + node.className);
    found.push({width, scroll: root.scrollWidth, wide: wide.slice(0, 5), title: page.title,
      scripts: page.querySelectorAll('script, img').length, tools: page.querySelectorAll('.tools').length,
      column: frame.contentWindow.getComputedStyle(page.querySelector('main')).maxWidth,
      ink: frame.contentWindow.getComputedStyle(page.querySelector('svg .front')).strokeDasharray});
    if (found.length == widths.length) document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';
  };
  document.body.append(frame);
}
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_nothing_overflows_in_a_browser(record: RunRecord, tmp_path: Path) -> None:
    """At desktop and phone width, everything unfolded; the hashes of its style and of its script are accepted, and no
    other script ran."""
    text = html_report(record, pictures(record))
    page = json.dumps(text).replace("</", "<\\/").replace("<!--", "<\\!--")
    (tmp_path / "measure.html").write_text(MEASURE.replace("WIDTHS", "[1280, 390]").replace("PAGE", page))
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=8000 --dump-dom"
    )
    done = subprocess.run(
        [str(BROWSER), *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "measure.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search("FOUND(.*)END", done.stdout)
    assert found, done.stdout[-500:]
    for view in json.loads(html.unescape(found[1])):
        assert view["scroll"] <= view["width"], view
        assert view["wide"] == [], view
        assert view["title"] == "tiny · qtool"
        assert view["scripts"] == 1
        assert view["tools"] == 2  # the page's own script made them, one for each task
        assert view["column"] == "1240px"
        assert view["ink"] == "5px, 4px"


def test_an_answer_that_repeats_a_line_takes_no_time() -> None:
    start = time.monotonic()
    assert "<mark>" in _marked("\n" * 12_000, "\n" * 11_999 + "x")
    assert time.monotonic() - start < 8  # it was 12 s


def test_what_only_looks_like_a_line_end_is_shown() -> None:
    assert _marked("a\u2028b\r\nc\n", "c") == "<mark>a\\u2028b</mark>\nc"
