"""Memory that glibc keeps goes back between layers, where it has grown; and a limit of memory that scripts set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qtool.evaluate.engines.machine import anonymous_memory
from qtool.make import freed
from qtool.make.freed import Freed

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import limited


@pytest.mark.skipif(freed._trimming() is None, reason="another C library")
def test_what_is_free_between_pieces_that_live_goes_back() -> None:
    """Blocks of 48 KiB come out of the heap; every sixteenth one lives, so the heap cannot shrink."""
    watch = Freed()
    assert not watch.give_back()
    blocks = [bytearray(os.urandom(48 * 1024)) for _ in range(4000)]  # 190 MB
    kept = blocks[::16]
    grown = anonymous_memory() or 0
    del blocks
    held = anonymous_memory() or 0
    assert held > grown - 40e6 or not watch.give_back()  # glibc kept it
    if held > grown - 40e6:
        assert watch.give_back()
        assert (anonymous_memory() or 0) < held - 100e6
    assert len(kept) == 250
    assert not watch.give_back()


def test_a_session_is_counted_and_a_limit_says_how_it_is_held(tmp_path: Path) -> None:
    """A command that takes 90 MB of its own; its code and words come back."""
    take = "import time, sys; x = bytearray(b'x' * 90_000_000); time.sleep(.8); print(len(x)); sys.exit(5)"
    used = limited.run([sys.executable, "-c", take], tmp_path, os.environ, 1.0, card=True)
    assert (used.code, used.said) == (5, "90000000\n")
    assert 80e6 < used.anonymous < 300e6
    assert used.how.startswith(("control group", "a scope", "a watcher"))


def test_more_than_the_limit_is_ended(tmp_path: Path) -> None:
    take = "import time; x = bytearray(b'x' * 300_000_000); time.sleep(3)"
    used = limited.run([sys.executable, "-c", take], tmp_path, os.environ, 0.1, card=True)
    assert used.code != 0
