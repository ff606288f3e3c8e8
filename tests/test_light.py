"""Commands that read what is stored start without torch and transformers, whose imports take longer than the work;
those that compute nothing anew without numpy, too. Nor do they load what asks a server, makes problems or runs
programs: a fact of the table of engines costs no HTTP client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qtool.runs.record import RunRecord

CHILD = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(f"{one}.") for one in sys.argv[2:]):
            raise RuntimeError(f"{name} is imported")
        return None

sys.meta_path.insert(0, Blocked())
from qtool.cli import main
for words, code in json.loads(sys.argv[1]):
    try:
        main(words, prog_name="qtool")
    except SystemExit as end:
        print(words, end.code)
        assert end.code == code, (words, end.code)
assert not set(sys.argv[2:]) & set(sys.modules)
"""
HEAVY = ("torch", "transformers")
WORK = (
    "http.client", "ssl", "urllib.request", "multiprocessing", "qtool.evaluate.engines.server",
    "qtool.evaluate.engines.probe", "qtool.evaluate.tasks", "qtool.evaluate.sandbox", "qtool.quantize.methods.table",
)  # fmt: skip
PAGES = ("qtool.report.html", "qtool.report.markdown", "qtool.report.pictures", "xml")
ALSO = ("numpy", "pyarrow", "datasets", "tokenizers", "huggingface_hub")


def light(*commands: tuple[Sequence[object], int], without: Sequence[str] = HEAVY) -> subprocess.CompletedProcess[str]:
    """Commands, each with the exit code that it must have, in a process in which these packages and modules cannot be
    imported."""
    words = json.dumps([([str(word) for word in command], code) for command, code in commands])
    done = subprocess.run([sys.executable, "-P", "-c", CHILD, words, *without], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(finished: RunRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, whose artifacts lie beside it."""
    folder = tmp_path_factory.mktemp("light")
    shutil.copytree(finished.folder.parent, folder / "runs")
    for path in finished.folders.values():
        shutil.copytree(path, folder / "artifacts" / path.name)
    return folder / "runs"


def test_the_block_works() -> None:
    with pytest.raises(AssertionError, match="torch is imported"):
        light((["reproduce", "artifacts"], 0))


def test_help() -> None:
    commands = "run,plan,verify,evaluate,compare,check,baseline,baseline save,report,measure,publish,pull,reproduce"
    asked = [(["--help"], 0), *(([*command.split(), "--help"], 0) for command in commands.split(","))]
    done = light(*asked, without=HEAVY + ALSO + WORK + PAGES)
    assert done.stdout.count("Usage: qtool") == 14


def test_what_reads_a_run(runs: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    artifact = next((runs.parent / "artifacts").glob("*awq*"))
    shown: list[list[object]] = [
        ["check", "latest"],
        ["baseline", "save", "latest", baseline],
        ["runs", "show", "latest"],
    ]
    light(*(([*words, "--runs", runs], 0) for words in shown), without=HEAVY + ALSO + WORK + PAGES)
    written: list[list[object]] = [
        ["check", "latest", "--junit", tmp_path / "a.xml", "--json", tmp_path / "a.json"],
        ["report", "latest", "--out", tmp_path / "out"],
    ]
    done = light(*(([*words, "--runs", runs], 0) for words in written), without=HEAVY + ALSO + WORK)
    assert (tmp_path / "out" / "report.html").is_file()
    assert "pass  awq: verified" in done.stdout
    pairs: list[list[object]] = [
        ["check", "latest", "--baseline", baseline],
        ["compare", "latest:nf4", "latest:awq"],
        ["compare", baseline, "latest"],
        ["compare", artifact, "latest:awq"],
    ]
    light(*(([*words, "--runs", runs], 0) for words in pairs), without=HEAVY + WORK + PAGES)
    alone = (["compare", "latest:nf4", "latest:awq", "--runs", runs], 0)
    light(alone, without=(*HEAVY, *WORK, *PAGES, "qtool.convert.files.folder"))


def test_what_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    done = light((["pull", "no name"], 2), (["check", "latest", "--runs", tmp_path], 2))
    assert "no name of a repository" in done.stderr
    assert "no finished run" in done.stderr
