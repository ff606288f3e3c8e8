"""glibc gives back what a layer freed: asked of glibc itself, in processes of their own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from qtool.cli.heap import LARGE, give_back_freed

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")
# Blocks that the system gives one by one, before and after a block of 31 MiB was freed: glibc then takes blocks of
# 24 MiB for small ones, and out of the heap.
COUNT = """
import ctypes, sys
from qtool.cli.heap import give_back_freed
library = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")]
library.mallinfo2.restype = Info
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
{begin}
library.free(library.malloc(31 * 2**20))
before = library.mallinfo2().hblks
library.malloc(24 * 2**20)
print(library.mallinfo2().hblks - before)
"""


def counted(begin: str) -> int:
    done = subprocess.run([sys.executable, "-P", "-c", COUNT.format(begin=begin)], capture_output=True, text=True,
                          check=True, env={})  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_what_glibc_learns_it_no_longer_learns() -> None:
    assert LARGE < 24 * 2**20
    assert counted("") == 0  # it has learnt: out of the heap
    assert counted("assert give_back_freed({})") == 1
    assert counted("assert not give_back_freed({'MALLOC_ARENA_MAX': '2'})") == 0


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_every_command_begins_so() -> None:
    assert counted("from qtool.cli import main; main.callback()") == 1


@pytest.mark.parametrize(
    "said", [{"MALLOC_TRIM_THRESHOLD_": "1"}, {"MALLOC_ARENA_MAX": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9"}]
)
def test_what_the_user_set_stays(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("glibc was asked"))
    assert give_back_freed(said) is False


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        def mallopt(self, *_: int) -> int:
            pytest.fail("it was told")

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Musl())
    assert give_back_freed({"GLIBC_TUNABLES": "glibc.rtld.nns=4"}) is False
