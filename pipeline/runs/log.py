"""What a command says while it works, on stderr: lines for people, or a JSON object a line for programs.

Results go to stdout and are none of its business. It is told once, by the command line, how much to say.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import Any

import click

QUIET, NORMAL, VERBOSE = -1, 0, 1


@dataclass
class Voice:
    """``level``: QUIET says nothing but errors, VERBOSE every step with its seconds; ``as_json``: for programs."""

    level: int = NORMAL
    as_json: bool = False


voice = Voice()


def speak(level: int, as_json: bool) -> None:
    """How this process speaks from now on."""
    voice.level, voice.as_json = level, as_json


def say(text: str, event: str = "note", level: int = NORMAL, **facts: Any) -> None:
    """One line, where so much is to be said. ``event``: its kind, for programs, with ``facts``."""
    if level > voice.level:
        return
    if voice.as_json:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        click.echo(json.dumps({"time": now, "event": event, "text": text} | facts, ensure_ascii=False), err=True)
    else:
        click.echo(text, err=True)
