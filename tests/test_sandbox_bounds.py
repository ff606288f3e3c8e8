"""What a judged program may see and take: no third-party package, no published solution, a bounded disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiers import HERE

from qtool.evaluate.sandbox import cell, scratch
from qtool.evaluate.sandbox.cell import Kit, hidden_paths
from qtool.evaluate.sandbox.execute import Job, run_programs
from qtool.evaluate.sandbox.isolation import readable_without, third_party

TEST = "def check(candidate):\n    assert candidate(1) == 1\n"


@pytest.mark.parametrize("tier", HERE)
def test_third_party_packages_are_not_there(tier: str) -> None:
    program = """
        import glob, os
        def f(x):
            base = os.path.dirname(os.__file__)
            for pattern in ("site-packages/*", "../*/site-packages/*", "../*/dist-packages/*"):
                assert not glob.glob(os.path.join(base, pattern)), pattern
            import colorsys, xml.etree.ElementTree, lib2to3.pgen2.token  # the standard library is
            return x
    """
    import textwrap

    outcome = run_programs([Job("a", textwrap.dedent(program), TEST, "f")], timeout=20, sandbox=tier)[0]
    assert outcome.passed, outcome.detail


@pytest.mark.parametrize("tier", [tier for tier in HERE if tier != "namespaces"])
@pytest.mark.parametrize(
    "loop",
    ["open(f'f{n}', 'wb').write(bytes(2**24))", "open(f'f{n}', 'w').close()",
     "os.mkdir(f'd{n}'); open(f'd{n}/f', 'wb').write(bytes(2**24)); os.chmod(f'd{n}', 0)"],
)  # fmt: skip
def test_the_disk_is_bounded_where_it_is_the_hosts(tier: str, loop: str) -> None:
    program = f"import os, time\ndef f(x):\n    for n in range(20_000):\n        {loop}\n    return x\n"
    outcome = run_programs([Job("a", program, TEST, "f")], timeout=20, sandbox=tier)[0]
    assert (outcome.outcome, outcome.detail) == ("failed", "wrote more than 64 MiB or 4096 files")


def test_reserving_disk_is_writing_it() -> None:
    """Without fallocate the C library writes, so that the limit of a file holds and time passes."""
    program = """import os
def f(x):
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(fd, 0, 8192)
    return os.fstat(fd).st_size
"""
    test = "def check(candidate):\n    assert candidate(1) == 8192\n"
    assert run_programs([Job("a", program, test, "f")], timeout=20)[0].passed


def test_crowded_counts_bytes_and_entries(tmp_path: Path) -> None:
    inner = tmp_path / "a/b"
    inner.mkdir(parents=True)
    (inner / "f").write_bytes(bytes(2**20))
    assert scratch.crowded(str(tmp_path), 2**19, 100)
    assert not scratch.crowded(str(tmp_path), 2**22, 3)
    assert scratch.crowded(str(tmp_path), 2**22, 2)


def test_what_is_split_and_what_is_hidden(tmp_path: Path) -> None:
    for name in ("lib/python/json", "lib/python/site-packages/qtool", "lib/other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lib/python/os.py").write_text("")
    (tmp_path / "lib/python/link").symlink_to(tmp_path / "lib/other")
    hidden = third_party([tmp_path / "lib"])
    assert hidden == [tmp_path / "lib/python/site-packages"]
    shown = readable_without(tmp_path / "lib", hidden)
    assert [str(path.relative_to(tmp_path)) for path in shown] == ["lib/other", "lib/python/json", "lib/python/os.py"]


def test_solutions_beside_libraries_are_hidden(tmp_path: Path) -> None:
    for name in ("numpy", *cell.WITH_SOLUTIONS):
        (tmp_path / name).mkdir()
    hidden = hidden_paths(Kit(("numpy",), (str(tmp_path),)))
    assert {path.name for path in hidden if path.is_relative_to(tmp_path)} == set(cell.WITH_SOLUTIONS)


@pytest.fixture
def interpreter_in_tmp() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="interpreter-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif("namespaces" not in HERE, reason="no namespaces on this machine")
def test_an_interpreter_in_the_temporary_folder_can_judge(interpreter_in_tmp: Path) -> None:
    """The job's own /tmp must not hide the standard library."""
    library = Path(os.__file__).parent
    copy = interpreter_in_tmp / "lib" / library.name
    ignored = shutil.ignore_patterns(
        "site-packages", "test", "tests", "idlelib", "ensurepip", "__pycache__", "config-*"
    )
    shutil.copytree(library, copy, ignore=ignored, symlinks=True)
    (interpreter_in_tmp / "bin").mkdir()
    python = interpreter_in_tmp / "bin/python3"
    shutil.copy(os.path.realpath(sys.executable), python)
    code = (
        "import sys, types, json\n"
        f"sys.path.insert(0, {str(Path(cell.__file__).parents[3])!r})\n"
        f"sys.path += {[path for path in sys.path if 'site-packages' in path]!r}\n"
        "from qtool.evaluate.sandbox.execute import Job, run_programs, detect_sandbox\n"
        f"out = run_programs([Job('a', 'def f(x): import colorsys; return x', {TEST!r}, 'f')], sandbox='namespaces')\n"
        "print(out[0].outcome, out[0].detail)\n"
    )
    environment = {"PYTHONHOME": str(interpreter_in_tmp), "PATH": os.environ["PATH"]}
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split()[:1] == ["passed"], done.stdout + done.stderr
