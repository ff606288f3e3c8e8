"""Every script starts: `--help` says what it does, and nothing that it imports has moved away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "scripts"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
# One process for all of them: torch and transformers are imported once.
HELP_OF_ALL = """
import contextlib, io, json, os, runpy, sys, traceback

folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
kept, environment = list(sys.path), dict(os.environ)
said = {}
for name in names:
    out = io.StringIO()
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(os.path.join(folder, name), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = traceback.format_exc()
    said[name] = [code, out.getvalue()]
    sys.path[:] = kept
    os.environ.clear()
    os.environ.update(environment)
print(json.dumps(said))
"""


def help_of(folder: Path, names: list[str]) -> dict[str, tuple[int | str, str]]:
    """Script -> (exit code or traceback, what it printed) of `--help`."""
    command = [sys.executable, "-c", HELP_OF_ALL, str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: (code, text) for name, (code, text) in json.loads(done.stdout).items()}


def faults(folder: Path) -> list[str]:
    """What is wrong with the scripts of a folder, a line each."""
    paths = sorted(folder.glob("*.py"))
    programs = {path.name for path in paths if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    return [
        f"{name}: {code or 'prints no usage'}"
        for name, (code, text) in help_of(folder, [path.name for path in paths]).items()
        if code or (name in programs and not text.startswith("usage: "))
    ]


@pytest.mark.slow
def test_every_script_starts() -> None:
    assert len(SCRIPTS) > 20
    assert faults(FOLDER) == []


def test_scripts_that_do_not_start_are_seen(tmp_path: Path) -> None:
    (tmp_path / "moved.py").write_text("from qtool.convert.no_such_module import anything\n")
    (tmp_path / "silent.py").write_text('if __name__ == "__main__":\n    print("at work")\n')
    (tmp_path / "fine.py").write_text("import json\n")
    moved, silent = faults(tmp_path)
    assert "No module named 'qtool.convert.no_such_module'" in moved
    assert silent == "silent.py: prints no usage"


def test_the_sweep_spells_out_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that changes must not change what a row of docs/benchmarks.md is."""
    from qtool.quantize.methods.awq import AwqMethod

    monkeypatch.syspath_prepend(str(FOLDER))
    import sweep_rounding

    decided_elsewhere = {"method", "name", "bits", "group_size", "zero_point", "dtype", "ignore", "budget"}
    for name, keys in sweep_rounding.SETTINGS.items():
        AwqMethod.model_validate({"method": "awq"} | keys)
        assert set(keys) == set(AwqMethod.model_fields) - decided_elsewhere, name
    assert set(sweep_rounding.QUICK) < set(sweep_rounding.SETTINGS)
    rows = [json.dumps(keys, sort_keys=True) for keys in sweep_rounding.SETTINGS.values()]
    assert len(set(rows)) == len(rows)


def test_the_check_of_every_change_holds_every_net() -> None:
    text = (FOLDER / "test.sh").read_text()
    for net in ("ruff check .", "ruff format --check .", "bin/mypy\n", "bin/mypy scripts\n", "-m pytest"):
        assert net in text, net
