"""What a worker holds and does for a job: as few modules, imports and kernel work as can be, without a clock."""

from __future__ import annotations

import ast
import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from qtool.evaluate.sandbox import process, rehearsal, seccomp
from qtool.evaluate.sandbox.cell import Kit
from qtool.evaluate.sandbox.execute import Job, run_programs

# What a job has no use for and every process of a worker would carry, and what brings it.
HEAVY = {
    "asyncio",
    "ssl",
    "socket",
    "subprocess",
    "concurrent",
    "uuid",
    "logging",
    "multiprocessing",
    "email",
    "pickle",
}


def modules_of_a_worker(folder: Path, in_process: bool) -> set[str]:
    """Those that a worker has when it would fork for its first job."""
    begun = process._BOOT.partition("from qtool.evaluate.sandbox.worker")[0]
    code = begun + (
        "from qtool.evaluate.sandbox import worker\n"
        "worker._serve = lambda cell: print(sorted(sys.modules), file=sys.stderr)\n"
        "worker.main(sys.argv[2])\n"
    )
    config = json.dumps({"tier": "none", "uid": 0, "folder": str(folder), "kit": asdict(Kit(unittest=in_process))})
    command = [sys.executable, "-s", "-P", "-S", "-B", "-c", code, str(Path(process.__file__).parent), config]
    # The environment that a worker gets: none of the caller's.
    said = subprocess.run(command, capture_output=True, check=True, text=True, env={})
    return set(ast.literal_eval(said.stderr))


def test_worker_is_light_and_its_jobs_import_nothing(tmp_path: Path) -> None:
    known = modules_of_a_worker(tmp_path, in_process=False)
    with_unittest = modules_of_a_worker(tmp_path, in_process=True)
    assert not {name for name in known if name.split(".")[0] in HEAVY}
    assert "unittest" in with_unittest - known
    assert not with_unittest & {"candidate", "__test__"}, "a rehearsal leaves no module behind"
    program = "import sys\ndef f(values):\n    return sorted(sys.modules)\n"
    test = (
        "import sys\ndef check(candidate):\n"
        f"    known = {sorted(known)!r}\n"
        "    more = sorted(set(candidate([1])) - set(known))\n"
        "    assert more == ['candidate'], more\n"
        "    assert sorted(set(sys.modules) - set(known)) == []\n"
    )
    printed = f"import sys\nprint(sorted(set(sys.modules) - set({sorted(known)!r})))\n"
    _passes(
        Job("call", program, test, "f"),
        Job("stdin", printed, "def check(candidate):\n    assert candidate('') == '[]\\n'\n", "f", run="stdin"),
    )
    alone = f"def check(candidate):\n    more = sorted(set(candidate([1])) - set({sorted(with_unittest)!r}))\n"
    _passes(Job("alone", program, alone + "    assert more == ['__test__'], more\n", "f", run="in_process"))


def _passes(*jobs: Job) -> None:
    outcomes = run_programs(jobs, timeout=30.0, sandbox="none", workers=1)
    assert [(each.outcome, each.detail) for each in outcomes] == [("passed", "")] * len(jobs)


def test_what_is_loaded_late_still_crosses() -> None:
    """Values, classes and exceptions of modules that a worker starts without."""
    given = (
        "import uuid\ndef f(value):\n    assert type(value) is uuid.UUID\n"
        "    return value, uuid.UUID(int=7), uuid.UUID\n",
        "import uuid\ndef check(candidate):\n    one = uuid.UUID(int=1)\n"
        "    assert candidate(one) == (one, uuid.UUID(int=7), uuid.UUID)\n",
    )
    unnamed = (
        "import uuid\ndef f():\n    return uuid.UUID(int=7)\n",
        "def check(candidate):\n    assert candidate().int == 7\n",
    )
    named = (
        "def f(kind):\n    return kind('{00000000-0000-0000-0000-000000000007}').int\n",
        "import uuid\ndef check(candidate):\n    assert candidate(uuid.UUID) == 7\n",
    )
    raised = (
        "def f(name):\n    if name == 'asyncio':\n        import asyncio\n        raise asyncio.QueueEmpty('x')\n"
        "    import subprocess\n    raise subprocess.TimeoutExpired('x', 1)\n",
        "def raised(candidate, name):\n    try:\n        candidate(name)\n    except Exception as error:\n"
        "        return error\n\n"
        "def check(candidate):\n    empty, late = raised(candidate, 'asyncio'), raised(candidate, 'subprocess')\n"
        "    import asyncio, subprocess\n"
        "    assert type(empty) is asyncio.QueueEmpty and type(late) is subprocess.TimeoutExpired\n",
    )
    waited = (
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1\n",
        "async def check(candidate):\n    assert await candidate(1) == 2\n",
    )
    pairs = [given, unnamed, named, raised, waited]
    _passes(*(Job(str(number), program, test, "f") for number, (program, test) in enumerate(pairs)))
    _passes(Job("alone", *waited, "f", run="in_process"))


def test_program_makes_the_tests_side_import_nothing_else() -> None:
    """A module of the standard library that the program names in an exception is loaded there if it is a known one."""
    program = (
        "import turtledemo\nclass E(Exception):\n    pass\n"
        "E.__module__, E.__qualname__ = 'turtledemo', 'E'\nturtledemo.E = E\ndef f():\n    raise E('x')\n"
    )
    test = (
        "import sys\ndef check(candidate):\n    try:\n        candidate()\n    except Exception as error:\n"
        "        assert str(error) == 'x'\n    assert 'turtledemo' not in sys.modules\n"
    )
    _passes(Job("named", program, test, "f"))


def test_rehearsal_keeps_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    rehearsal.run(in_process=True)
    assert before == (os.listdir("/proc/self/fd") if before else [])


@pytest.mark.parametrize("execute", [False, True])
@pytest.mark.parametrize("machine", sorted(seccomp._ALLOWED))
def test_filter_allows_the_listed_calls_and_no_other(machine: str, execute: bool) -> None:
    architecture, ranges = seccomp._ALLOWED[machine]
    allowed = {number for low, high in ranges for number in range(low, high + 1)}
    allowed |= {seccomp._EXECVE[machine]} if execute else set()
    # Judged by their arguments, here no pointers: sending to nobody, reading a limit, plain fcntl and ioctl.
    allowed |= {seccomp._SENDTO[machine], seccomp._PRLIMIT[machine], seccomp._FCNTL[machine], seccomp._IOCTL[machine]}
    allowed -= {seccomp._FALLOCATE[machine]}  # in a range, and told "not supported" before
    filtered = seccomp._program(machine, execute)
    x32 = 0x40000000
    for number in [*range(1200), *range(x32, x32 + 600), 2**32 - 1]:
        said = _run_filter(filtered, number, architecture)
        assert (said == seccomp._ALLOW) == (number in allowed), number
        assert _run_filter(filtered, number, architecture ^ 1) != seccomp._ALLOW


def _run_filter(code: bytes, number: int, architecture: int) -> int:
    """What the kernel would make of a call with that number and arguments of zeros: BPF as `_program` writes it."""
    at = {seccomp._AT_NUMBER: number, seccomp._AT_ARCHITECTURE: architecture}
    holds = {
        seccomp._EQUAL: lambda a, k: a == k,
        seccomp._GREATER: lambda a, k: a > k,
        seccomp._AT_LEAST: lambda a, k: a >= k,
        seccomp._ANY_BIT: lambda a, k: bool(a & k),
    }
    loaded, line = 0, 0
    instructions = list(struct.iter_unpack("=HBBI", code))
    while True:
        kind, if_true, if_false, value = instructions[line]
        line += 1
        if kind == seccomp._RETURN:
            return int(value)
        if kind == seccomp._LOAD:
            loaded = at.get(value, 0)
        else:
            line += if_true if holds[kind](loaded, value) else if_false
