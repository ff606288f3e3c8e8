"""The one place where exceptions of other people's code become a line and an exit code.

0 fine, 1 a gate or a check failed, 2 the input is wrong, 3 the machine lacks something, 130 interrupted (128 and the
signal's number). Whoever knows what went wrong raises QtoolError; what arrives here as anything else was foreseen by
nobody nearer to it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from qtool import Interrupted, QtoolError
from qtool.runs import log

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_received: list[int] = []
TRACEBACK = "QTOOL_TRACEBACK"


class Boundary(click.Group):
    """A group of commands none of which ends in a traceback (set QTOOL_TRACEBACK=1 to see one)."""

    def main(  # type: ignore[override]  # click's overloads; the parameters are its own
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """As click's, with Ctrl-C as 130 and every other exception as one line."""
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            with _ended_orderly():
                code = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.ClickException as error:
            _show(error)
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort) as error:
            signum = _received[-1] if _received else signal.SIGINT
            _received.clear()
            said = "Interrupted" if signum == signal.SIGINT else f"Ended by {signal.Signals(signum).name}"
            click.echo(f"\n{said}. {_go_on(error)}", err=True)
            sys.exit(128 + signum)
        except Exception as error:  # whatever a library raises: `explain` makes one line of it
            if os.environ.get(TRACEBACK):
                raise
            line = explain(error)
            _show(line)
            sys.exit(line.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


def _show(error: click.ClickException) -> None:
    """One line; for programs a JSON line, where the command was asked for such."""
    if log.voice.as_json:
        log.say(error.format_message(), "error", log.QUIET, exit_code=error.exit_code)
    else:
        error.show()


@contextmanager
def _ended_orderly() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGQUIT end a command as Ctrl-C does: what is open is closed, and it is said how to go on."""

    def end(signum: int, _: object) -> None:
        _received.append(signum)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # what the starter of this process chose to ignore (nohup) stays ignored
    before = {s: signal.signal(s, end) for s in _ENDING if signal.getsignal(s) is signal.SIG_DFL}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _go_on(error: BaseException) -> str:
    cause = error.__cause__ or error  # click raises Abort from what it caught
    said = str(cause) if isinstance(cause, Interrupted) else ""
    return said or "Run the same command again: it continues after what is finished."


def explain(error: Exception) -> QtoolError:
    """What a foreign exception says to a user, with its exit code."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return QtoolError(f"{where}{error.strerror or error}. Free what is missing and run again.", exit_code=3)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return QtoolError("The memory is used up. `--dry-run` and `qtool plan` say what is needed.", exit_code=3)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())[:300]
    return QtoolError(
        f"{type(error).__name__}{place}: {text}\nThis is a fault of qtool: it should have said what is wrong with the "
        f"input. Set {TRACEBACK}=1 for the whole traceback and report it.",
        exit_code=3,
    )
