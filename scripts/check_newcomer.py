"""A new user's path, from a wheel in an empty folder: recipes, init, plan, run, check, compare, report, runs, CI files.

Builds the source archive and the wheel from what git tracks, installs the wheel (without dependencies, over the
environment that runs this script), and types the commands of README and docs/running.md in a folder of its own. Every
step is measured: seconds, lines, the longest line of a table. Exit 1 where one did not do what it should. Two minutes
on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"pipeline": "qtool", "convert": "qtool/convert", "quantize": "qtool/quantize", "evaluate": "qtool/evaluate",
            "recipes": "qtool/recipes"}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What is typed, the exit code it must have, words that must be in what it says."""

    typed: str
    code: int = 0
    says: tuple[str, ...] = ()


STEPS = (
    Step("qtool --version", says=("qtool, version",)),
    Step("qtool --help", 0, ("Examples:", "qtool run demo")),
    Step("qtool recipes", says=("smoke", "qtool init")),
    Step("qtool run nothing", 2, ("demo", "smoke")),
    Step("qtool init", 2, ("qtool init ./My-Model",)),
    Step("qtool init qtool-demo --method awq --card L40S", says=("next: qtool run recipe.yaml --dry-run",)),
    Step("qtool plan qtool-demo --gpu L40S", says=("awq", "--full")),
    Step("qtool run recipe.yaml --dry-run", says=("this job fits",)),
    Step("qtool run recipe.yaml --set evaluate.tasks.0.groupsize=1", 2, ("--set", "unknown key")),
    Step(
        "qtool run recipe.yaml --set evaluate.tasks.0.limit=60 --set calibration.samples=16 --name first",
        says=("verified", "report: ", "KL to source"),
    ),
    Step("qtool check first --junit out/new/q.xml --json out/q.json --markdown out/q.md", says=("pass",)),
    Step("qtool baseline save first baseline.json", says=("baseline.json",)),
    Step("qtool compare baseline.json first --html out/compared.html", says=("No loss",)),
    Step("qtool report first --out public", says=("report: public",)),
    Step("qtool evaluate --plan --detect 1", says=("problems",)),
    Step("qtool runs", says=("first", "qtool-demo")),
    Step("qtool verify artifacts/qtool-demo-awq", says=("sound",)),
    Step("qtool runs remove first --yes", says=("removed",)),
)


def build(folder: Path) -> tuple[Path, list[str]]:
    """The wheel, and what is missing in it of what git tracks."""
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    code = "from setuptools import build_meta as b; b.build_sdist('../dist'); b.build_wheel('../dist')"
    (folder / "dist").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    wheel = next((folder / "dist").glob("*.whl"))
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = [name for name in tracked.split("\0") if name.split("/")[0] in PACKAGES]
    inside = [f"{PACKAGES[name.split('/')[0]]}/{name.partition('/')[2]}" for name in wanted]
    return wheel, [name for name in inside if name not in packed]


def run(step: Step, work: Path, environment: dict[str, str]) -> list[str]:
    """What was wrong; a line of measurements is printed."""
    started = time.monotonic()
    done = subprocess.run(step.typed.split(), cwd=work, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    tables = [len(line) for line in done.stdout.splitlines() if line.startswith("  ")]
    seconds, lines = time.monotonic() - started, len(said.splitlines())
    print(f"  {seconds:5.1f} s {lines:4} lines {max(tables, default=0):4} columns   {step.typed}")
    faults = []
    if done.returncode != step.code:
        faults.append(f"exit {done.returncode}, not {step.code}: {said[-300:]}")
    faults += [f"does not say {words!r}" for words in step.says if words not in said]
    if "Traceback" in said:
        faults.append("a traceback")
    if step.code == 2 and len(done.stderr.strip().splitlines()) > 2:  # the line on what is opened, and the error's
        faults.append(f"an error of {len(done.stderr.splitlines())} lines")
    if max(tables, default=0) > 80:
        faults.append(f"a table of {max(tables)} columns")
    return [f"{step.typed}: {fault}" for fault in faults]


def main(words: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    with tempfile.TemporaryDirectory(prefix="qtool-newcomer-") as name:
        folder = Path(name)
        wheel, missing = build(folder)
        faults = [f"not in the wheel: {file}" for file in missing]
        site = folder / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
        subprocess.run(command, check=True, capture_output=True)
        work = folder / "work"
        work.mkdir()
        tool = folder / "bin" / "qtool"
        tool.parent.mkdir()
        tool.write_text(f"#!{sys.executable} -P\nimport sys\nsys.path.insert(0, {str(site)!r})\n"
                        "from qtool.cli import main\nmain(prog_name='qtool')\n")  # fmt: skip
        tool.chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("QTOOL_")}
        environment |= {"PATH": f"{tool.parent}:{environment['PATH']}", "COLUMNS": "80", "HF_HUB_OFFLINE": "1",
                        "PYTHONPATH": str(site)}  # fmt: skip
        code = f"import sys; sys.path.insert(0, {str(site)!r}); import qtool; print(qtool.__file__)"
        ask = [sys.executable, "-P", "-c", code]
        where = subprocess.run(ask, capture_output=True, text=True, check=True, cwd=work).stdout
        faults += [] if where.startswith(str(site)) else [f"not the wheel's: {where}"]
        for step in STEPS:
            faults += run(step, work, environment)
        for path in ("out/new/q.xml", "out/q.json", "out/q.md", "out/compared.html", "public/report.html"):
            faults += [] if (work / path).is_file() else [f"{path} is missing"]
        faults += ["the run is still there"] if list((work / "runs").glob("*/recipe.yaml")) else []
    print(*(f"FAULT {fault}" for fault in faults), sep="\n")
    print("OK: a new user gets there" if not faults else f"{len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
