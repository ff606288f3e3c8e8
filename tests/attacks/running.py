"""Run an attack as a forked `qtool` under limits, and say what is bad about the answer."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from attacks.bench import SECRET, Attack, Bench

SECONDS = 45.0
ADDRESS_SPACE = 8 << 30
MEMORY = 3000  # MB that may be in use
LONGEST = 2000  # letters of a refusal
FAULT = "This is a fault of qtool"
OUTPUT = "output.txt"
TASK = {
    "task_id": "t/0",
    "prompt": 'def f(x: int) -> int:\n    """Do it."""\n',
    "entry_point": "f",
    "canonical_solution": "    return x + 1000\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1001\n",
}
OUTPUTS = [
    {"method": "awq", "group_size": 32},
    {"method": "gptq", "group_size": 32, "propagate_error": False},
    {"method": "gptq", "name": "ct", "group_size": 32, "format": "compressed-tensors", "propagate_error": False},
    {"method": "nf4"},
    {"method": "gguf", "name": "q8", "type": "Q8_0"},
]


@dataclass(frozen=True)
class Answer:
    """How a command ended. ``code`` is negative for a signal, None where its time was up."""

    code: int | None
    seconds: float
    megabytes: float
    output: str


def prepare(root: Path) -> Bench:
    """The good things: two models, a text, a task, a run with five artifacts."""
    from small_models import make_model

    root.mkdir(parents=True, exist_ok=True)
    make_model(root / "model", shard="50MB")
    make_model(root / "shards")
    (root / "text.txt").write_text("".join(f"def f{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(400)))
    (root / "task.jsonl").write_text(json.dumps(TASK) + "\n")
    recipe = {
        "model": str(root / "model"),
        "calibration": {"text": str(root / "text.txt"), "samples": 4, "length": 32},
        "outputs": OUTPUTS,
        "evaluate": {
            "tasks": [{"task": str(root / "task.jsonl")}],
            "max_new_tokens": 4,
            "text": {"text": str(root / "text.txt"), "samples": 2, "length": 32, "seed": 3},
        },
        "gates": [{"max_kld": 50.0}],
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answer = command(["run", "recipe.yaml"], root, 600)
    if answer.code != 0:
        raise RuntimeError(f"the good recipe ended with {answer.code}:\n{answer.output[-2000:]}")
    return Bench(root)


def command(words: Sequence[str], work: Path, seconds: float = SECONDS) -> Answer:
    """``qtool WORDS`` in ``work`` in a process of its own."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(words, work, int(seconds))
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        late = time.monotonic() - started > seconds
        if not done and late:
            os.killpg(pid, signal.SIGKILL)
            done, status, usage = os.wait4(pid, 0)
        if done:
            code = None if late else os.waitstatus_to_exitcode(status)
            if code == -signal.SIGXCPU:
                code = None
            text = (work / OUTPUT).read_text(encoding="utf-8", errors="replace")
            return Answer(code, time.monotonic() - started, usage.ru_maxrss / 1024, text)
        time.sleep(0.02)


def _child(words: Sequence[str], work: Path, seconds: int) -> None:
    """Never returns."""
    code = 99
    try:
        os.setsid()
        os.chdir(work)
        output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(number, target)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ |= {"COLUMNS": "400", "HF_TOKEN": SECRET}
        from qtool.cli import main

        main([word.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for word in words])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def faults(attack: Attack, answer: Answer, bench: Bench, work: Path) -> list[str]:
    """What is bad about an answer; nothing for a good one."""
    found = []
    if answer.code is None:
        found.append("no end")
    elif answer.code not in attack.codes:
        found.append(f"exit {answer.code}, not {' or '.join(map(str, sorted(attack.codes)))}")
    if "Traceback (most recent call last)" in answer.output:
        found.append("traceback")
    if FAULT in answer.output:
        found.append("a fault of qtool")
    if answer.megabytes > MEMORY:
        found.append(f"{answer.megabytes:.0f} MB")
    if answer.code in (2, 3):
        if not any(name in answer.output for name in attack.names or ("",)):
            found.append(f"does not name {' or '.join(attack.names)}")
        refusal = answer.output[answer.output.rfind("Error:") :]
        if len(refusal) > LONGEST:
            found.append(f"a message of {len(refusal)} letters")
    if "\x1b]0;" in answer.output or "\x1b[2J" in answer.output:
        found.append("terminal codes of the input in the output")
    if bench.canary.exists():
        found.append("code of the input ran")
    if _leaks(attack.leaks, answer.output, work):
        found.append("a secret is in the output or in a file that was written")
    return found


def _leaks(secret: str, output: str, work: Path) -> bool:
    written = [path for folder in ("artifacts", "runs") for path in (work / folder).rglob("*")]
    files = (path for path in written if path.is_file() and not path.is_symlink())
    return secret in output or any(secret.encode() in path.read_bytes() for path in files)
