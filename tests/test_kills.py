"""A few of the kills of `scripts/check_kills.py`, which tries them all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_kills.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_a_kill_before_an_operation_costs_no_finished_layer() -> None:
    for package in ("gguf", "bitsandbytes"):
        pytest.importorskip(package)
    words = ["--every", "90", "--random", "0", "--no-scores"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    good, total = done.stdout.splitlines()[-1].rpartition(" ")[2].split("/")
    assert good == total
    assert int(total) >= 4
