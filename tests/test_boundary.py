"""What is no QtoolError still ends in one line and the right code."""

from __future__ import annotations

import os
import signal

import click
import pytest

from qtool import Interrupted, QtoolError
from qtool.cli.boundary import Boundary


def run(error: BaseException) -> int:
    group = Boundary("qtool")

    @group.command()
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        group.main(["command"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (QtoolError("a.yaml: wrong"), 2, "a.yaml: wrong"),
        (QtoolError("no gguf", exit_code=3), 3, "no gguf"),
        (OSError(28, "No space left on device", "x/y"), 3, "x/y: No space left on device"),
        (MemoryError(), 3, "memory"),
        (KeyError("a"), 3, "KeyError at test_boundary.py"),
        (KeyboardInterrupt(), 130, "Run the same command again"),
        (Interrupted("it continues at layer 3"), 130, "it continues at layer 3"),
        (click.UsageError("no such option"), 2, "no such option"),
        (SystemExit(1), 1, ""),
    ],
)
def test_a_line_and_a_code(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QTOOL_TRACEBACK", raising=False)
    assert run(error) == code
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_orderly(signum: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    group, closed = Boundary("qtool"), []

    @group.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), signum)
        finally:
            closed.append(signum)

    outside = signal.signal(signum, signal.SIG_DFL)  # nohup has the suite ignore one
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as ended:
        group.main(["command"])
    assert ended.value.code == 128 + signum
    assert closed == [signum]
    assert f"Ended by {signum.name}. Run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signum) is before
    signal.signal(signum, outside)
