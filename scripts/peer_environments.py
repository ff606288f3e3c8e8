"""The virtual environments in which `check_interop.py` runs other people's software, and how it asks them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"  # installed first; the constraint for everything else


@dataclass(frozen=True)
class Environment:
    """A virtual environment: distribution -> version prefix that must be there; what pip installs for it."""

    needs: dict[str, str]
    installs: tuple[tuple[str, ...], ...]


ENVIRONMENTS = {
    "gptqmodel": Environment(
        {"torch": "2.13.0", "gptqmodel": "7.6", "transformers": "5.", "optimum": "2."},
        (("gptqmodel==7.6.*", "optimum==2.3.0", "transformers==5.23.0"),),
    ),
    # AutoAWQ without its dependencies: they ask for triton (1 GB), and its unpacking code needs torch only.
    "autoawq": Environment(
        {"torch": "2.13.0", "autoawq": "0.2.9", "safetensors": "0."},
        (("numpy", "safetensors"), ("--no-deps", "autoawq==0.2.9")),
    ),
    # AutoGPTQ likewise; the modules that unpack import transformers, of any version.
    "autogptq": Environment(
        {"torch": "2.13.0", "auto-gptq": "0.7.1", "transformers": "5."},
        (("numpy", "safetensors", "transformers==5.23.0"), ("--no-deps", "auto-gptq==0.7.1")),
    ),
}


def run_child(python: Path, script: str, *arguments: str | Path, scratch: Path) -> Any:
    """Run a script of this folder in a peer's Python, isolated from ours; return the JSON that it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(python), "-I", str(HERE / script), *map(str, arguments)]
    log = scratch / f"{Path(script).stem}.log"
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=scratch, check=False)
    if done.returncode != 0:
        tail = "\n".join(re.split(r"[\r\n]+", log.read_text(errors="replace"))[-15:])
        raise ChildProcessError(f"{script} ended with {done.returncode}:\n{tail}")
    return json.loads(done.stdout)


def has_packages(python: Path, needs: dict[str, str]) -> bool:
    """Tell whether `python` exists and sees every distribution of `needs` at a version with that prefix."""
    if not python.is_file():
        return False
    code = (
        "import importlib.metadata as m, json, sys; needs = json.loads(sys.argv[1])\n"
        "sys.exit(not all(m.version(name).startswith(needs[name]) for name in needs))"
    )
    command = [str(python), "-I", "-c", code, json.dumps(needs)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def prepare_environment(name: str, peers: Path, torch_index: str | None) -> None:
    """Make the environment `name` under `peers` unless it is there already. Raises CalledProcessError."""
    environment = ENVIRONMENTS[name]
    folder = peers / name
    python = folder / "bin" / "python"
    if has_packages(python, environment.needs):
        return
    print(f"making the environment {folder} ...", file=sys.stderr)
    venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = ["--index-url", torch_index] if torch_index else []
    subprocess.run([*pip, *index, TORCH], check=True)
    for packages in environment.installs:
        subprocess.run([*pip, "--constraint", str(constraints), *packages], check=True)
    if not has_packages(python, environment.needs):
        raise RuntimeError(f"{folder} still lacks one of {environment.needs}")
