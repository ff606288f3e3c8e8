"""`qtool batch` with real engines: Slurm and Ray as clusters of one node, a job killed in the middle and taken up
again, the bytes of a run that nobody disturbed; and job files of the others, read by the engines' own packages.

    python scripts/check_batch.py                        # as root for Slurm (Debian: slurm-wlm, munge)
    python scripts/check_batch.py --ray DIR/bin/ray --sky DIR/bin/python --kubernetes DIR/bin/python

What is absent is skipped with a sentence. Everything lies in a folder whose name wants quoting in every language.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import batch_clusters
import yaml
from bench_run import digest

HOSTILE = 'it\'s $(touch pwned) "a" `touch pwned`; #'
PROCESSORS, PORT, PATIENCE = 2, 26379, 1200.0
QTOOL = [sys.executable, "-P", "-m", "qtool"]
SKY = """import sys, yaml
from sky import task
for path in sys.argv[1:]:
    found = task.Task.from_yaml(path)
    with open(path, encoding="utf-8") as file:
        assert found.envs["QTOOL_RECIPE"] == yaml.safe_load(file)["envs"]["QTOOL_RECIPE"], path
"""
KUBERNETES = """import sys, yaml, kubernetes_validate as k
with open(sys.argv[1], encoding="utf-8") as file:
    for document in yaml.safe_load_all(file):
        k.validate(document, k.latest_version(), strict=True)
print(k.latest_version())
"""


def models() -> dict[str, Any]:
    """Two models that are one in everything but their folders."""
    return {
        "recipe": "base.yaml", "card": "cpu", "processors": PROCESSORS, "image": "example.org/qtool:1",
        "ray": {"address": f"127.0.0.1:{PORT}"},
        "models": [
            {"name": "one", "model": "qtool-demo", "set": {"output_dir": "artifacts/one"}},
            {"name": "two", "model": "qtool-demo", "set": {"output_dir": f"artifacts/{HOSTILE}"}},
        ],
    }  # fmt: skip


def base() -> dict[str, Any]:
    """GPTQ with propagated inputs, and Q4_K_M: layers that take seconds."""
    return {
        "model": "qtool-demo", "calibration": {"text": "qtool-code", "samples": 32, "length": 256},
        "outputs": [{"method": "gptq"}, {"method": "gguf", "type": "Q4_K_M"}],
    }  # fmt: skip


def prepared(folder: Path) -> Path:
    """A current folder with models.yaml and the recipe."""
    folder.mkdir(parents=True)
    listed = models()
    (folder / "models.yaml").write_text(yaml.safe_dump(listed, sort_keys=False))
    (folder / "base.yaml").write_text(yaml.safe_dump(base(), sort_keys=False))
    return folder


def qtool(folder: Path, words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What the command prints; it has to end with 0."""
    told = os.environ | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_thisIsNoTokenButLooksLikeOne"} | dict(environment or {})
    done = subprocess.run([*QTOOL, *words], cwd=folder, env=told, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"qtool {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def undisturbed(folder: Path) -> dict[str, str]:
    """Model -> digest of its artifacts, made by a plain `qtool run`."""
    prepared(folder)
    found = {}
    for name, made in folders(folder).items():
        qtool(folder, ["run", "base.yaml", "--device", "cpu", "--set", f"output_dir={json.dumps(str(made))}"],
              {"OMP_NUM_THREADS": str(PROCESSORS)})  # fmt: skip
        found[name] = digest(made)
    return found


def folders(folder: Path) -> dict[str, Path]:
    """Model -> where its artifacts are made."""
    return {"one": folder / "artifacts" / "one", "two": folder / "artifacts" / HOSTILE}


def kill_in_the_middle(folder: Path, ended: Callable[[], bool]) -> int:
    """SIGKILL to the first `qtool run` of ``folder`` that has written a layer, and not all; its process id."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not ended():
        for name, made in folders(folder).items():
            begun = [path for path in made.glob("*.partial/*journal.jsonl") if path.read_bytes().count(b"\n") >= 2]
            found = _process(f"recipes/{name}.yaml", folder)
            if begun and found is not None:
                os.kill(found, signal.SIGKILL)
                return found
        time.sleep(0.02)
    raise SystemExit("no job was there to kill")


def _process(recipe: str, folder: Path) -> int | None:
    """The qtool that runs this recipe in ``folder``."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ours = "run" in words and "qtool" in words and any(word.endswith(recipe) for word in words)
            if ours and Path(os.readlink(path / "cwd")) == folder:
                return int(path.name)
        except OSError:
            continue
    return None


def wait_for(folder: Path, wanted: str) -> str:
    """The lines of --status, once ``wanted`` is in them."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        said = qtool(folder, ["batch", "models.yaml", "--status"])
        if wanted in said:
            return said
        time.sleep(10)
    raise SystemExit(f"not after {PATIENCE:.0f} s: {wanted}\n{said}")


def check_slurm(folder: Path, environment: Mapping[str, str]) -> str:
    """Submit, kill one job of the array, submit again; the last state."""
    qtool(folder, ["batch", "models.yaml", "--on", "slurm"])
    tested = subprocess.run(
        ["sbatch", "--test-only", "slurm-0.sh"], cwd=folder / "batch", env=os.environ | dict(environment),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tested.returncode:
        raise SystemExit(f"sbatch --test-only: {tested.stderr}")
    print(qtool(folder, ["batch", "models.yaml", "--on", "slurm", "--start"], environment).splitlines()[-1])
    killed = kill_in_the_middle(folder, lambda: False)
    print(f"slurm: killed process {killed}; {wait_for(folder, '1 of 2 finished')}")
    qtool(folder, ["batch", "models.yaml", "--on", "slurm", "--start"], environment)
    return wait_for(folder, "2 of 2 finished")


def check_ray(folder: Path, environment: Mapping[str, str]) -> str:
    """Start; kill one; Ray starts it again by itself."""
    told = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment)
    words = [*QTOOL, "batch", "models.yaml", "--on", "ray", "--start"]
    with (folder / "ray.txt").open("wb") as said:
        process = subprocess.Popen(words, cwd=folder, env=told, stdout=said, stderr=said)
    try:
        killed = kill_in_the_middle(folder, lambda: process.poll() is not None)
        print(f"ray: killed process {killed}")
        if process.wait(PATIENCE):
            raise SystemExit(f"ray: ended with {process.returncode}\n{(folder / 'ray.txt').read_text()}")
    finally:
        process.kill()
    return wait_for(folder, "2 of 2 finished")


def run_engine(
    name: str, cluster: AbstractContextManager[dict[str, str]], check: Callable[[Path, Mapping[str, str]], str],
    folder: Path, expected: Mapping[str, str],
) -> None:  # fmt: skip
    """An engine for real: the bytes in the end are those of the undisturbed runs."""
    prepared(folder)
    with cluster as environment:
        print(check(folder, environment).strip())
    found = {model: digest(made) for model, made in folders(folder).items()}
    if found != expected:
        raise SystemExit(f"{name}: other bytes: {found}, not {expected}")
    print(f"{name}: a job killed and taken up again, the same bytes: {found}")


def check_files(folder: Path, options: argparse.Namespace) -> None:
    """Job files that nothing here starts, read by the engines' own packages."""
    prepared(folder)
    for engine in ("here", "slurm", "ray", "kubernetes", "skypilot", "huggingface"):
        qtool(folder, ["batch", "models.yaml", "--on", engine, "--out", f"jobs-{engine}"])
    for script in folder.glob("jobs-*/*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    python(options.sky, "skypilot", SKY, sorted(folder.glob("jobs-skypilot/*.yaml")), "SkyPilot's own schema and Task")
    python(options.kubernetes, "kubernetes", KUBERNETES, [folder / "jobs-kubernetes/kubernetes.yaml"],
           "kubernetes-validate, strictly")  # fmt: skip
    if shutil.which("hf") is None and not (Path(sys.executable).parent / "hf").exists():
        print("huggingface: skipped, `hf` is not here")
        return
    beside = f"{Path(sys.executable).parent}:{Path(shutil.which('hf') or sys.executable).parent}:{os.environ['PATH']}"
    text = (folder / "jobs-huggingface/huggingface.sh").read_text().replace("hf jobs run", "hf jobs run --dry-run")
    done = subprocess.run(["sh", "-c", text], cwd=folder, capture_output=True, text=True, check=False,
                          env=os.environ | {"PATH": beside, "HF_TOKEN": "hf_thisIsNoTokenButLooksLikeOne"})  # fmt: skip
    print(f"huggingface: hf jobs run --dry-run: {done.returncode}\n{done.stdout[-600:]}{done.stderr[-600:]}")


def python(program: str | None, name: str, code: str, files: Sequence[Path], by: str) -> None:
    """Read files by a package in an environment of its own."""
    if program is None:
        print(f"{name}: skipped, no --{'sky' if name == 'skypilot' else name}")
        return
    subprocess.run([program, "-c", code, *map(str, files)], check=True, env=os.environ | {"HOME": str(files[0].parent)})
    print(f"{name}: {len(files)} files taken by {by}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", default=shutil.which("ray"), help="the program")
    parser.add_argument("--sky", help="a Python that has SkyPilot")
    parser.add_argument("--kubernetes", help="a Python that has kubernetes-validate")
    parser.add_argument("--only", default="files,slurm,ray")
    options = parser.parse_args()
    chosen = options.only.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the clusters are ended then, too
    with tempfile.TemporaryDirectory(prefix="qtool-") as temporary:
        root = Path(temporary).resolve()
        if "files" in chosen:
            check_files(root / f"files {HOSTILE}", options)
        expected = undisturbed(root / "undisturbed") if {"slurm", "ray"} & set(chosen) else {}
        lacking = [program for program in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(program) is None]
        if "slurm" in chosen and (lacking or os.geteuid()):
            print(f"slurm: skipped, {'not root' if not lacking else f'{lacking[0]} is not here'}")
        elif "slurm" in chosen:
            cluster = batch_clusters.slurm(root / "slurm", PROCESSORS)
            run_engine("slurm", cluster, check_slurm, root / f"slurm {HOSTILE}", expected)
        if "ray" in chosen and options.ray is None:
            print("ray: skipped, `ray` is not here")
        elif "ray" in chosen:
            made = batch_clusters.ray(root / "ray", PROCESSORS, options.ray, PORT)
            run_engine("ray", made, check_ray, root / f"ray {HOSTILE}", expected)
        if list(root.rglob("pwned")):
            raise SystemExit("a name was run as a command")
    print("all that is here holds")


if __name__ == "__main__":
    main()
