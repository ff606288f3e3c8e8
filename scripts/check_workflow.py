"""Run the steps of examples/github-actions/quantize.yml as a runner would: bash -e, the job's environment, a git
repository.

What is GitHub's own is not run: `uses:` (of the artifact to upload it is checked that its paths hold files), `install`
(qtool must be on PATH), `gh` and `git push`, in whose place a recorder notes how they were called. Three jobs one
after another: a first pull request, without a baseline; one whose run is accepted as baseline; one with a worse
artifact, whose check must fail. Takes a minute on two cores; exit 1 where a step did not do what it should.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / "examples" / "github-actions" / "quantize.yml"
OWN = ("install",)  # steps that set up the runner
RECIPE = """\
model: qtool-demo
calibration: {text: qtool-code, samples: 16, length: 128}
outputs:
  - {method: awq, group_size: GROUP, scaling: SCALING, rounding: ROUNDING, clip: CLIP, descent: CLIP}
evaluate:
  text: {text: heldout-code, samples: 32, length: 128}
gates: [{max_kld: 0.5}]
"""
GOOD = {"GROUP": "32", "SCALING": "awq", "ROUNDING": "gptq", "CLIP": "true"}
WORSE = {"GROUP": "128", "SCALING": "none", "ROUNDING": "rtn", "CLIP": "false"}
RECORDER = '#!/bin/sh\necho "$(basename "$0") $*" >> "$RECORDED"\n'


@dataclass
class Ran:
    """A job: step -> exit code, in order; what the recorders noted; the summary."""

    codes: dict[str, int]
    recorded: str
    summary: str


def applies(step: dict[str, Any], event: str, accept: bool, failed: bool) -> bool:
    """GitHub's `if:`, of the few forms that the file has."""
    said = str(step.get("if", ""))
    if failed and "always()" not in said:
        return False
    if "pull_request" in said and event != "pull_request":
        return False
    return "workflow_dispatch" not in said or (event == "workflow_dispatch" and accept)


def filled(text: str) -> str:
    """Without GitHub's expressions."""
    return re.sub(r"\$\{\{\s*([^}]*?)\s*\}\}", lambda found: {"github.token": "x"}.get(found[1], "7"), text)


def run_job(work: Path, bin_folder: Path, event: str, accept: bool) -> Ran:
    """Every step that applies, until one fails; those that always run, all the same."""
    job = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["quantize"]
    summary, recorded = work.parent / "summary.md", work.parent / "recorded.txt"
    for path in (summary, recorded):
        path.write_text("")
    environment = os.environ | {name: str(value) for name, value in job["env"].items()}
    environment |= {"GITHUB_STEP_SUMMARY": str(summary), "RECORDED": str(recorded), "CI": "true"}
    environment["PATH"] = f"{bin_folder}:{Path(sys.executable).parent}:{environment['PATH']}"
    codes, failed = dict[str, int](), False
    for step in job["steps"]:
        name = str(step.get("name") or step["uses"])
        if name in OWN or not applies(step, event, accept, failed):
            continue
        if "run" not in step:
            found = [str(p) for line in str(step.get("with", {}).get("path", "")).split() for p in work.glob(line)]
            codes[name] = 0 if "upload-artifact" not in step["uses"] or found else 1
            continue
        own = {key: filled(str(value)) for key, value in step.get("env", {}).items()}
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", filled(step["run"])]
        done = subprocess.run(shell, cwd=work, env=environment | own, capture_output=True, text=True)
        codes[name] = done.returncode
        print(f"  {name}: exit {done.returncode}")
        if done.returncode and not step.get("continue-on-error"):
            failed = True
            print("\n".join(f"    {line}" for line in (done.stdout + done.stderr).splitlines()[-6:]))
    return Ran(codes, recorded.read_text(), summary.read_text())


def recipe(values: dict[str, str]) -> str:
    """The recipe with these values."""
    return re.sub("|".join(values), lambda found: values[found[0]], RECIPE)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    faults: list[str] = []

    def expect(what: str, holds: bool) -> None:
        if not holds:
            faults.append(what)

    with tempfile.TemporaryDirectory(prefix="qtool-workflow-") as name:
        folder = Path(name)
        work, bin_folder = folder / "repo", folder / "bin"
        work.mkdir()
        bin_folder.mkdir()
        (bin_folder / "gh").write_text(RECORDER)
        git = '#!/bin/sh\ncase "$1" in push) echo "git $*" >> "$RECORDED" ;; *) exec /usr/bin/git "$@" ;; esac\n'
        (bin_folder / "git").write_text(git)
        for path in bin_folder.iterdir():
            path.chmod(0o755)
        subprocess.run(["git", "init", "-q"], cwd=work, check=True)

        print("a first pull request, without a baseline")
        (work / "recipe.yaml").write_text(recipe(GOOD))
        first = run_job(work, bin_folder, "pull_request", False)
        expect("first: every step succeeds", not any(first.codes.values()))
        expect(
            "first: JUnit and JSON are there", all((work / "results" / f"qtool.{x}").is_file() for x in ("xml", "json"))
        )
        expect(
            "first: the summary has the verdict", "## ✅ qtool-demo: " in first.summary and "| check |" in first.summary
        )
        expect("first: one comment from the file", first.recorded.startswith("gh pr comment 7 --edit-last"))

        print("started by hand, accepted as baseline")
        second = run_job(work, bin_folder, "workflow_dispatch", True)
        expect("second: every step succeeds", not any(second.codes.values()))
        expect("second: no comment", "gh pr" not in second.recorded)
        log = subprocess.run(["git", "log", "--name-only"], cwd=work, capture_output=True, text=True, check=True).stdout
        expect("second: the baseline is committed and pushed", "baseline.json" in log and "git push" in second.recorded)

        print("a pull request that makes it worse")
        (work / "recipe.yaml").write_text(recipe(WORSE))
        third = run_job(work, bin_folder, "pull_request", False)
        expect("third: the run itself succeeds", third.codes["run"] == 0)
        expect("third: the check fails", third.codes["check"] == 1)
        expect("third: summary and comment say why", "no regression" in third.summary and "gh pr" in third.recorded)
        expect("third: the report is kept", third.codes["report"] == 0)
    print(*(f"FAULT {fault}" for fault in faults), sep="\n")
    print("OK: the workflow does what it says" if not faults else f"{len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
