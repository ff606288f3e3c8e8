"""What a new user meets: recipes by name, progress in a log, what loads the artifact, tables that fit."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.progress import Task, TaskID

from qtool import QtoolError
from qtool.cli import main
from qtool.cli.options import write_text
from qtool.convert.verify.verification import Check
from qtool.make import progress
from qtool.recipe.paths import locate
from qtool.report import loading
from qtool.report.columns import print_table

SHIPPED = {path.stem for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml")}


@pytest.mark.parametrize("typed", ["demo", "demo.yaml", "recipes/demo.yaml"])
def test_a_recipe_that_ships_goes_by_name(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "model: qtool-demo" in locate(Path(typed)).read_text()
    (tmp_path / "recipes").mkdir()
    (tmp_path / typed).write_text("model: mine\n")
    assert locate(Path(typed)) == Path(typed), "a file of the user's goes first"


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_name_that_is_listed_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dot in it begins no ending: qwen2.5-coder-32b."""
    monkeypatch.chdir(tmp_path)
    assert locate(Path(name)).name == locate(Path(f"{name}.yaml")).name == f"{name}.yaml"


@pytest.mark.parametrize("typed", ["dmeo", "other/demo", "demo.txt", "."])
def test_a_recipe_that_is_nowhere_names_those_that_ship(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QtoolError, match=", ".join(sorted(SHIPPED))):
        locate(Path(typed))


def test_help_names_every_recipe_that_ships_and_a_run_says_which_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(main, ["run", "--help"]).output
    assert ", ".join(sorted(SHIPPED)) in " ".join(shown.split())
    result = CliRunner().invoke(main, ["run", "smoke", "--dry-run"])
    assert (result.exit_code, "`qtool recipes smoke` prints it" in result.stderr) == (0, True), result.output
    assert "files that stay behind" in result.stdout


class Clock:
    """Seconds that pass only when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_when_a_stage_begins_and_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress.Stages(lines=True, get_time=clock) as stages:
        slow = stages.add_task("quantizing layers", total=28, completed=8)  # eight of an earlier run
        for _ in range(2):
            clock.now += 40
            stages.advance(slow)
        quick = stages.add_task("awq: running heldout", total=40)
        for step in range(1, 41):
            clock.now += 0.1
            stages.update(quick, completed=step)
    assert capsys.readouterr().err.splitlines() == [
        "quantizing layers: 8 of 28",
        "quantizing layers: 9 of 28 after 0:40, about 12:40 to go",
        "quantizing layers: 10 of 28 after 1:20, about 12:00 to go",
        "awq: running heldout: 0 of 40",
    ]


def test_the_time_to_go_of_layers_that_take_minutes() -> None:
    clock = Clock()
    task = Task(TaskID(0), "layers", 80, 10, _get_time=clock, fields={progress.BEGUN: 10})
    task.start_time = clock.now
    assert progress.seconds_to_go(task) is None
    clock.now += 300
    task.completed = 12
    assert progress.seconds_to_go(task) == 150 * 68
    assert progress.ToGo().render(task).plain == "2:50:00 to go"
    assert [progress.duration(s) for s in (0, 32, 601, 3723)] == ["0:00", "0:32", "10:01", "1:02:03"]


def test_before_the_first_layer_has_ended_there_is_a_time_to_go(capsys: pytest.CaptureFixture[str]) -> None:
    """By the part of it that is done; what is being written behind it does not count twice."""
    clock = Clock()
    with progress.Stages(lines=True, get_time=clock) as stages:
        task = stages.add_task("quantizing layers", total=80)
        clock.now += 60
        stages.update(task, at=0.25, doing="layer 1, awq: mlp.down_proj")
        stages.say_slow_ones()
        clock.now += 180
        stages.update(task, at=1.0, doing="layer 2, inputs of self_attn.q_proj")
        stages.advance(task)
    assert capsys.readouterr().err.splitlines() == [
        "quantizing layers: 0 of 80",
        "quantizing layers: 0 of 80 after 1:00, about 5:19:00 to go; layer 1, awq: mlp.down_proj",
        "quantizing layers: 1 of 80 after 4:00, about 5:16:00 to go; layer 2, inputs of self_attn.q_proj",
    ]


def rule(name: str, fails: tuple[int, ...] = (), required: bool = False) -> list[Check]:
    runtime = name.split(":")[0]
    return [
        Check(f"{name}, TP {n}", "fail" if n in fails else "pass", f"{n} is wrong" if n in fails else "as read",
              required, runtime, n)
        for n in (1, 2, 4, 8)
    ]  # fmt: skip


def test_what_loads_it_is_said_in_a_sentence() -> None:
    keys = Check("transformers 5.23: keys", "pass", "as read", True, "transformers 5.23")
    shapes = Check("transformers + GPTQModel 7.6: shapes", "pass", "as run", False, "transformers + GPTQModel 7.6")
    vllm = [
        Check("vLLM 0.32: loading", "pass", "as run", False, "vLLM 0.32"),
        *rule("vLLM 0.32: Marlin kernel", (4, 8)),
    ]
    assert loading.what_loads_it([keys, shapes, *vllm, *rule("vLLM 0.32: CPU kernel", (1, 2, 4, 8))]) == (
        "loads in transformers + GPTQModel 7.6 and vLLM 0.32 (not its CPU kernel), on 1 or 2 cards; "
        "does not split over 4 or 8"
    )
    refused = [Check("vLLM 0.32: loading", "fail", "sym is false", False, "vLLM 0.32")]
    assert loading.what_loads_it([keys, *refused]) == "loads in transformers 5.23; not in vLLM 0.32 (sym is false)"
    assert loading.what_loads_it(rule("SGLang 0.5: Marlin kernel", (1, 2, 4, 8))) == "not in SGLang 0.5 (1 is wrong)"
    assert loading.what_loads_it([Check("tensors", "pass", "finite")]) == ""


def test_a_rule_is_one_row_and_only_a_fault_of_the_artifact_is_a_fail() -> None:
    found = loading.lines(
        [
            Check("tensors", "fail", "NaN"),
            *rule("vLLM 0.32: Marlin kernel", (4, 8)),
            *rule("SGLang 0.5: x", (1, 2, 4, 8)),
        ]
    )
    assert [(line.name, line.result, line.detail) for line in found] == [
        ("tensors", "FAIL", "NaN"),
        ("vLLM 0.32: Marlin kernel", "pass", "as read, on 1 or 2 cards; not over 4 (nor over 8): 4 is wrong"),
        ("SGLang 0.5: x", "no", "1 is wrong"),
    ]


def test_a_wide_table_goes_on_below_itself_with_its_first_columns() -> None:
    rows = [{"format": "awq", "context": "2,048", **{f"x {n}": "12345.67 !" for n in range(12)}}]
    file = io.StringIO()
    print_table(Console(file=file, width=80), rows, "title", lead=2)
    lines = file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert sum("awq" in line and "2,048" in line for line in lines) == 3
    assert sum(line.count("12345.67 !") for line in lines) == 12


def test_files_are_written_into_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    write_text(tmp_path / "reports" / "today" / "q.xml", "<x/>")
    assert (tmp_path / "reports" / "today" / "q.xml").read_text() == "<x/>"


def test_a_gain_is_called_a_gain() -> None:
    from qtool.evaluate.rates import rate_difference
    from qtool.runs.evidence import moved

    better = rate_difference([0, 0, 1, 1] * 10, [1, 0, 1, 1] * 10, 1)
    assert moved(better.loss).startswith("gained 25.0 points [")
    assert moved(rate_difference([1, 0, 1, 1] * 10, [0, 0, 1, 1] * 10, 1).loss).startswith("lost 25.0 points [")


def test_plans_have_plain_numbers_and_stop_where_nothing_fits() -> None:
    b40 = Path(__file__).parent / "data" / "iquest" / "IQuest-Coder-V1-40B"
    typed = ["plan", str(b40), "--gpu", "RTX3090", "--gpus", "3", "--full"]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(main, typed)
    lines = result.output.splitlines()
    assert "e+0" not in result.output
    assert sum("cannot be served" in line for line in lines) == 2, "awq and gptq are refused for one reason"
    (grid,) = (number for number, line in enumerate(lines) if line.lstrip().startswith("format"))
    rows = [line.split() for line in lines[grid + 2 :]]
    assert [row[0] for row in rows[:4]] == ["bf16", "awq", "gptq", "nf4"], "a row each for what is refused"
    assert "tok/s" not in " ".join(rows[1])


def test_a_refusal_to_publish_names_the_ways_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtool.recipe.judging import PublishSection
    from qtool.share import admission

    monkeypatch.setattr(admission, "refusals", lambda *_: ([], ["no gate judged it"], None))
    # neither is looked at here
    two = [admission.Offer(name, tmp_path, None, None) for name in ("awq", "gptq")]  # type: ignore[arg-type]
    with pytest.raises(
        QtoolError, match=r"gptq: no gate judged it\nWays on: `--only NAME` .*`gates:`.*`--allow-failed`"
    ):
        admission.accept(two, PublishSection(to="my-org"), False)
