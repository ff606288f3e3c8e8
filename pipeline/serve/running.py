"""A planned server, running: its program found, started, asked once, and ended whole."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import environ

from qtool import QtoolError
from qtool.evaluate.engines.probe import expected
from qtool.evaluate.engines.server import ask
from qtool.evaluate.sandbox.secrets import for_child
from qtool.serve import process
from qtool.serve.process import Server
from qtool.serve.programs import require_program, with_program
from qtool.sizing.serving import PlannedServer

SMOKE, SMOKE_TOKENS = "def add(a, b):\n", 8
ANSWERS = 300.0  # seconds in which one short completion must come
AFTER = 600.0  # seconds for a command that follows the start


@contextmanager
def running(
    planned: PlannedServer, python: str | None = None, patience: float = process.PATIENCE,
    echo: Callable[[str], None] | None = None,
) -> Iterator[Server]:  # fmt: skip
    """Start it and wait until it answers. Raises QtoolError (exit 3) where its program is not here, or as `start`."""
    program = require_program(planned.facts, python)
    launch = planned.launch
    words = with_program(launch.words, program)
    with process.start(
        planned.facts.name, words, launch.environment, planned.url, planned.facts.health, patience, echo
    ) as server:
        for more in launch.after:
            done = subprocess.run(
                with_program(more, program), env=for_child(environ) | dict(launch.environment), capture_output=True,
                text=True, errors="replace", timeout=AFTER, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                raise QtoolError(f"{' '.join(more)}: {(done.stderr or done.stdout).strip()[-300:]}", exit_code=3)
        yield server


def smoke(planned: PlannedServer, server: Server) -> tuple[str, float]:
    """One real completion: its text and its seconds. Raises QtoolError (exit 3) for a server that answers nothing, or
    something else than a completion."""
    place = f"{server.url}/v1/completions"
    request = {"model": planned.serving.name, "prompt": SMOKE, "max_tokens": SMOKE_TOKENS, "temperature": 0}
    started = time.monotonic()
    try:
        answer = ask(place, request, ANSWERS)
        with expected(place):
            text = answer["choices"][0]["text"]
            made = int(answer["usage"]["completion_tokens"])
            if not isinstance(text, str) or not 0 < made <= SMOKE_TOKENS:
                raise ValueError(f"{made} tokens made of {SMOKE_TOKENS} asked for")
    except QtoolError as error:
        raise server.explained(error, "does not complete a prompt") from error
    return text, time.monotonic() - started


def stay(server: Server) -> None:
    """Until it ends, which is a fault, or Ctrl-C comes. Raises QtoolError."""
    while True:
        server.require_running()
        time.sleep(process.POLL)
