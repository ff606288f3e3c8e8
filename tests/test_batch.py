"""models.yaml: checked whole; what each job takes; job files in which a stranger's words stay words; where each model
stands."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from qtool import QtoolError
from qtool.batch import engine as batch_engine
from qtool.batch import files, here, ray, slurm
from qtool.batch.engine import Needs, Place, Task, container_script, label_of
from qtool.batch.models import Asked, load_batch
from qtool.batch.needs import HOUR, needs_of, tasks_of
from qtool.batch.state import states_of
from qtool.batch.table import ENGINES
from qtool.cli import main
from qtool.cli.batch import NAMES
from qtool.convert.files.source import shipped
from qtool.make import needs as job_needs
from qtool.preparing import prepare
from qtool.recipe.reference import meanings
from qtool.recipe.sections import load_recipe
from qtool.sizing.accelerators import load_accelerators

HOSTILE = 'it\'s $(touch pwned) "a" `touch pwned`; #'
STORED = Path(__file__).parent / "data" / "stored_run" / "00265698"
DOCS = Path(__file__).parent.parent / "docs" / "batch.md"


def listed(folder: Path, **keys: Any) -> Path:
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump({"recipe": "smoke", "card": "cpu", **keys}, sort_keys=False), encoding="utf-8")
    return path


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["batch", *(str(argument) for argument in arguments)])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_model_is_a_recipe_with_what_is_set_in_it(tmp_path: Path) -> None:
    path = listed(
        tmp_path, set={"calibration.samples": 8, "outputs.0.group_size": 32},
        models=["qtool-demo", {"name": "b", "model": "qtool-demo", "recipe": "gptq",
                               "set": {"outputs[0].group_size": 64, "output_dir": "elsewhere"}}],
    )  # fmt: skip
    _, (one, two) = load_batch(path)
    assert one.name == one.recipe.model.id == "qtool-demo"
    assert one.recipe.outputs[0].model_dump()["group_size"] == 32
    assert (two.name, two.recipe.output_dir, two.recipe.calibration.samples) == ("b", "elsewhere", 8)
    for asked in (one, two):  # the rendered recipe is the same work as the list's
        (tmp_path / "r.yaml").write_text(asked.text, encoding="utf-8")
        assert load_recipe(tmp_path / "r.yaml").digest == asked.recipe.digest
    plain = load_recipe(tmp_path / "r.yaml")
    assert plain.outputs[0].model_dump()["group_size"] == 64


def test_every_fault_of_file_and_recipes_at_once(tmp_path: Path) -> None:
    path = listed(
        tmp_path, modls=[], gpus=0, slurm={"options": ["-p gpu"]},
        models=[{"recipe": "nope"}, {"set": {"outputs.0.group": 64}}, {"set": {"outputs.9.x": 1}}, {"name": "a b"},
                {"name": "ok", "set": {"outputs.": 1}}],
    )  # fmt: skip
    with pytest.raises(QtoolError) as caught:
        load_batch(path)
    for said in (
        "modls: unknown key; did you mean 'models'?", "gpus: Input should be greater than or equal to 1",
        "slurm.options: '-p gpu' is no option of sbatch", "models[0]: nope: No such file",
        "models[1]: smoke.yaml with outputs.0.group set: outputs[0].group: unknown key; did you mean 'group_size'?",
        "models[2]: --set outputs.9.x", "models[3].name:", "models[4]: --set outputs.=1: write PATH=VALUE",
    ):  # fmt: skip
        assert said in caught.value.message, said


def test_models_that_would_be_one_are_refused(tmp_path: Path) -> None:
    path = listed(tmp_path, models=["x/Same", "y/same", {"name": "c", "model": "x/Same"}])
    with pytest.raises(QtoolError, match="several models are called 'same'") as caught:
        load_batch(path)
    assert "several models are made in artifacts/smoke/Same-awq" in caught.value.message
    assert call(path, "--status").exit_code == 2
    (tmp_path / "models.yaml").write_text("- a\n")
    assert "a mapping with `models:`" in call(path).output


# -- what a job takes -------------------------------------------------------------------------------------------------


def asked_of(folder: Path, **keys: Any) -> Asked:
    return load_batch(listed(folder, models=["qtool-demo"], **keys))[1][0]


def test_a_job_takes_what_plan_says(tmp_path: Path) -> None:
    """On a processor the figures are those of `qtool plan RECIPE`, which opens the source."""
    asked = asked_of(tmp_path)
    (tmp_path / "r.yaml").write_text(asked.text, encoding="utf-8")
    plan = job_needs.needs_of(prepare(tmp_path / "r.yaml", "cpu"))
    needs = needs_of(asked, tmp_path / "runs")
    assert (needs.host_bytes, needs.disk_bytes, needs.card) == (plan.host_bytes, plan.disk_bytes, None)
    assert (needs.device_bytes, needs.processors, needs.seconds) == (0, 8, None)


def test_the_smallest_card_that_holds_it_or_the_one_that_was_named(tmp_path: Path) -> None:
    known = load_accelerators()
    needs = needs_of(asked_of(tmp_path, card=None), tmp_path / "runs")
    assert needs.card == min((card for card in known.values() if card.cuda), key=lambda card: card.memory)
    assert not needs.named
    large = {"calibration.samples": 12_000, "calibration.length": 2048}
    larger = needs_of(asked_of(tmp_path, card=None, set=large), tmp_path / "runs")
    assert larger.card is not None
    assert needs.card.memory < larger.device_bytes <= larger.card.memory
    assert needs_of(asked_of(tmp_path, card="h100", gpus=2), tmp_path / "runs").card == known["H100"]
    with pytest.raises(QtoolError, match=r"qtool-demo: L4 has 23\.7 GB, the job takes"):
        tasks_of([asked_of(tmp_path, card="L4", set=large)], tmp_path / "runs")
    with pytest.raises(QtoolError, match="card: H10: not a card"):
        needs_of(asked_of(tmp_path, card="H10"), tmp_path / "runs")


def test_problems_are_asked_of_the_whole_source(tmp_path: Path) -> None:
    """8B weights, 16.4 GB in bfloat16, fit no card of 24 GB with what is worked on; texts alone take layers."""
    config = json.loads((shipped("qtool-demo") / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "head_dim": 128,
               "num_key_value_heads": 8, "num_hidden_layers": 36, "vocab_size": 151936}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    ways: list[tuple[str | None, dict[str, Any]]] = [(None, {}), (None, {"evaluate": {}, "gates": []}), ("cpu", {})]
    rows = [
        {"model": "org/far", "shape": "config.json", "card": card, "name": f"n{number}", "recipe": "awq",
         "set": {"output_dir": f"a{number}"} | more}
        for number, (card, more) in enumerate(ways)
    ]  # fmt: skip
    _, asked = load_batch(listed(tmp_path, card=None, models=rows))
    judged, made, alone = (one.needs for one in tasks_of(asked, tmp_path / "runs"))
    whole = 2 * 7.57e9
    assert judged.device_bytes > whole > made.device_bytes
    assert alone.host_bytes > whole > judged.host_bytes


def test_time_by_the_ledger_or_as_said(tmp_path: Path) -> None:
    asked = asked_of(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    parameters = 1_946_880
    entry = {
        "device": "cpu, bfloat16", "like": job_needs.like(asked.recipe), "seconds": 20_000.0,
        "artifacts": {name: {"bytes": parameters, "bpw": 8.0} for name in ("awq", "gguf")},
    }  # fmt: skip
    (runs / "ledger.jsonl").write_text(json.dumps(entry) + "\n")
    found = needs_of(asked, runs).seconds
    assert found is not None
    assert 2 * 19_000 < found < 2 * 21_000
    (runs / "ledger.jsonl").write_text(json.dumps(entry | {"seconds": 5.0}) + "\n")
    assert needs_of(asked, runs).seconds == HOUR
    assert needs_of(asked_of(tmp_path, hours=0.5), runs).seconds == 1800
    (runs / "ledger.jsonl").write_text(json.dumps(entry | {"device": "NVIDIA H100 80GB HBM3"}) + "\n")
    assert needs_of(asked, runs).seconds is None
    on_card = needs_of(asked_of(tmp_path, card="H100"), runs).seconds
    assert on_card is not None
    assert on_card > HOUR


# -- job files --------------------------------------------------------------------------------------------------------


RECIPE = f"model: |\n  {HOSTILE}\nx: '%s %d $HOME'\n"


def task(name: str = "one", recipe: str = RECIPE, card: str = "", **keys: Any) -> Task:
    found = load_accelerators()[card] if card else None
    told: dict[str, Any] = {"card": found, "cards": 1, "named": True, "processors": 4, "device_bytes": 10**10,
                            "host_bytes": 3 * 10**9, "disk_bytes": 10**9, "seconds": None}  # fmt: skip
    return Task(name, recipe, Needs(**(told | keys)))


def rendered(name: str, tasks: list[Task], folder: Path, **section: Any) -> Mapping[str, str]:
    row = ENGINES[name]
    place = Place(folder / "batch", folder, f"runs {HOSTILE}", "example.org/qtool:1")
    made = files.render(row, tasks, place, row.section.model_validate(section))
    files.write(made, folder / "batch")
    return made.files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name wants quoting; qtool in it writes its words to a file."""
    home = tmp_path / HOSTILE
    home.mkdir()
    said = "import json, sys, os; print(json.dumps([os.getcwd(), *sys.argv[1:]]), file=open('said', 'a'))"
    for module in (here, slurm, ray):
        monkeypatch.setattr(module, "here_command", lambda: [sys.executable, "-c", said])
    return home


def words(folder: Path) -> list[list[str]]:
    assert not list(folder.parent.rglob("pwned"))
    return [json.loads(line) for line in (folder / "said").read_text().splitlines()]


def wanted(folder: Path, name: str) -> list[str]:
    file = folder / "batch" / "recipes" / f"{name}.yaml"
    return [str(folder), "run", str(file), "--device", "cpu", "--runs", f"runs {HOSTILE}", "--name", name]


def test_here_runs_the_very_words(folder: Path) -> None:
    rendered("here", [task("one"), task("two")], folder)
    assert subprocess.run(["sh", "here.sh"], cwd=folder / "batch", check=False).returncode == 0
    assert words(folder) == [wanted(folder, "one"), wanted(folder, "two")]


def test_here_takes_the_device_that_is_there_where_no_card_is_named(folder: Path) -> None:
    """The smallest card that would do is a wish to an engine; this machine may have none."""
    rendered("here", [task("one", card="L4", named=False), task("two", card="L4")], folder)
    subprocess.run(["sh", "here.sh"], cwd=folder / "batch", check=True)
    assert [said[said.index("--device") + 1] for said in words(folder)] == ["auto", "cuda"]


def test_a_task_of_an_array_runs_the_very_words(folder: Path) -> None:
    made = rendered("slurm", [task("one"), task("two"), task("three", host_bytes=10**11, seconds=3600)], folder,
                    options=["--account=a b"], at_once=2)  # fmt: skip
    scripts = sorted(name for name in made if name.startswith("slurm"))
    assert scripts == ["slurm-0.sh", "slurm-1.sh"]  # what takes as much is one array
    for script, number in (("slurm-0.sh", "1"), ("slurm-1.sh", "0")):
        told = {"SLURM_ARRAY_TASK_ID": number, "PATH": os.environ["PATH"]}
        subprocess.run(["bash", script], cwd=folder / "batch", check=True, env=told)
    assert words(folder) == [wanted(folder, "two"), wanted(folder, "three")]
    first, second = (made[name] for name in scripts)
    for line in ("--array=0-1%2", "--mem=4G", "--cpus-per-task=4", "'--account=a b'", "--requeue"):
        assert f"\n#SBATCH {line}\n" in first
    assert "--time" not in first
    assert "\n#SBATCH --time=62\n" in second  # the hour, and the warning before the end
    assert "\n#SBATCH --mem=128G\n" in second


def test_rays_jobs_are_words(folder: Path) -> None:
    made = rendered("ray", [task("one"), task("two", card="H100", cards=2)], folder)
    compile(made["ray_jobs.py"], "ray_jobs.py", "exec")
    told = json.loads(made["ray.json"])
    one, two = told["jobs"]
    assert (told["home"], one["words"][-8:][1:]) == (str(folder), wanted(folder, "one")[2:])
    assert (one["cards"], two["cards"], two["memory"], two["words"][-6:-4]) == (0, 2, 3 * 10**9, ["--gpus", "2"])


def test_a_container_gets_the_recipe_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the shell, percent signs and dollars and all."""
    one = task()
    program = tmp_path / "bin" / "qtool"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > said\n')
    program.chmod(0o755)
    monkeypatch.setattr(batch_engine, "WORK", str(tmp_path / "work"))
    told = {"QTOOL_RECIPE": one.recipe, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", container_script(one)], check=True, env=told)
    assert (tmp_path / "work" / "recipes" / "one.yaml").read_text() == one.recipe
    said = (tmp_path / "work" / "said").read_text().split("\n")
    assert said[:-1] == ["run", "recipes/one.yaml", "--device", "cpu", "--runs", "runs", "--name", "one"]


def test_the_cloud_files_hold_the_recipe_and_what_the_job_takes(folder: Path) -> None:
    one, two = task("One.x"), task("two", card="L40S", cards=4, seconds=7200)
    text = rendered("kubernetes", [one, two], folder, namespace="ml", node_selector={"a": HOSTILE})["kubernetes.yaml"]
    config, first, second = yaml.safe_load_all(text)
    assert config["data"] == {"One.x.yaml": one.recipe, "two.yaml": two.recipe}
    assert (first["metadata"]["name"], first["metadata"]["namespace"]) == ("qtool-one-x", "ml")
    spec = second["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/gpu": "4"}
    assert (container["resources"]["requests"]["cpu"], spec["activeDeadlineSeconds"]) == ("4", 7200)
    assert spec["template"]["spec"]["nodeSelector"] == {"a": HOSTILE}

    found = yaml.safe_load(rendered("skypilot", [two], folder, infra="aws", volume="v")["skypilot-two.yaml"])
    assert found["envs"]["QTOOL_RECIPE"] == two.recipe
    assert found["resources"]["accelerators"] == {"L40S": 4}
    assert (found["resources"]["memory"], found["volumes"]) == ("4+", {"/work": "v"})
    unnamed = rendered("skypilot", [task("two", card="L40S", named=False)], folder)
    any_card = yaml.safe_load(unnamed["skypilot-two.yaml"])
    assert set(any_card["resources"]["accelerators"]) == {"L40S", "A100-80GB", "H100", "H200", "B200"}

    script = rendered("huggingface", [one, two], folder, bucket="me/b")["huggingface.sh"]
    typed = shlex.split(script, comments=True)
    assert f"QTOOL_RECIPE={two.recipe}" in typed
    assert [typed[at + 1] for at, word in enumerate(typed) if word == "--flavor"] == ["cpu-basic", "l40sx4"]
    assert [typed[at + 1] for at, word in enumerate(typed) if word == "--timeout"] == ["86400s", "7200s"]
    with pytest.raises(QtoolError, match="the Hub has no 3 x L40S"):
        rendered("huggingface", [task(card="L40S", cards=3)], folder)


def test_no_secret_stands_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + 30 * "x")
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key-of-mine")
    for name in ENGINES:
        for text in rendered(name, [task("one", card="L4")], folder).values():
            assert "hf_xxx" not in text
            assert "planted" not in text
    for secret in ("hf_" + 30 * "x", "hf_" + 25 * "y", "planted-key-of-mine", "http://me:secret@host/v1"):
        with pytest.raises(QtoolError, match="would stand in it") as caught:
            rendered("here", [task(recipe=f"model: {secret}\n")], folder)
        assert secret not in caught.value.message


def test_a_folder_that_is_somebody_elses(folder: Path) -> None:
    theirs = folder / "batch"
    theirs.mkdir()
    (theirs / "mine.txt").write_text("mine")
    with pytest.raises(QtoolError, match="holds other files"):
        rendered("here", [task()], folder)
    (theirs / "mine.txt").unlink()
    rendered("slurm", [task(), task("two", host_bytes=10**11)], folder)
    (theirs / "slurm-12_0.txt").write_text("what a job said")
    index = json.loads((theirs / files.INDEX).read_text())
    index["files"].append("../said")
    (theirs / files.INDEX).write_text(json.dumps(index))
    (folder / "said").write_text("")
    rendered("here", [task("two")], folder)  # files of the list before go, what jobs said and others' stay
    kept = sorted(path.name for path in theirs.rglob("*") if path.is_file())
    assert kept == ["batch.json", "here.sh", "slurm-12_0.txt", "two.yaml"]
    assert (folder / "said").exists()


# -- the command ------------------------------------------------------------------------------------------------------


def test_states_and_what_is_left_out(tmp_path: Path) -> None:
    path = listed(tmp_path, models=[
        {"name": name, "model": "qtool-demo", "set": {"output_dir": f"artifacts/{name}"}} for name in ("a", "b", "c")
    ])  # fmt: skip
    runs = tmp_path / "runs"
    _, asked = load_batch(path)
    shutil.copytree(STORED, runs / asked[0].recipe.digest[:16])
    begun = tmp_path / "artifacts" / "b" / "qtool-demo-awq.partial"
    begun.mkdir(parents=True)
    (begun / "journal.jsonl").write_text('{"key": "k"}\n{"layer": 0}\n')
    first, second, third = states_of(asked, runs)
    assert (first.finished, second.state, third.state) == (True, "not finished", "not begun")
    assert second.artifacts == {"awq": "1 layers, 0 min ago"}
    lines = call(path, "--status").output.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a", "b", "c", "1 of 3 finished"]
    made = call(path, "--on", "here")
    assert made.exit_code == 0, made.output
    assert sorted(file.name for file in (tmp_path / "batch" / "recipes").iterdir()) == ["b.yaml", "c.yaml"]


def test_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = listed(tmp_path, models=["qtool-demo"], image="x/y")
    assert "say on which engine" in call(path, "--start").output
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = call(path, "--on", "kubernetes", "--start")
    assert (missing.exit_code, "there is no `kubectl` here" in missing.output) == (3, True)
    program = tmp_path / "sbatch"
    program.write_text('#!/bin/sh\necho "$0 $@" > called\nexit 1\n')
    program.chmod(0o755)
    assert call(path, "--on", "slurm", "--start").exit_code == 1
    assert (tmp_path / "batch" / "called").read_text() == f"{program} slurm-0.sh\n"


def test_the_table_the_command_and_the_page_are_one() -> None:
    assert tuple(ENGINES) == NAMES
    text = DOCS.read_text(encoding="utf-8")
    for row in ENGINES.values():
        for key in row.section.model_fields:
            assert f"`{key}`" in text, f"{row.name}: {key}"
            assert meanings(row.section)[key]


def test_labels() -> None:
    assert [label_of(name) for name in ("A.b_C", "--", "x" * 80)] == ["a-b-c", "model", "x" * 60]
