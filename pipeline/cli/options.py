"""What several commands share: options, the exit code of a failed check, the file that a user named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.decorators import FC

from qtool import QtoolError
from qtool.runs import log

if TYPE_CHECKING:
    from qtool.sizing.serving import PlannedServer

FAILED = 1  # the exit code where a gate or a check failed
RUNS = "Folder of run logs and scores."


class Number(click.FloatRange):
    """A number that a comparison can hold against a limit: ``nan`` and ``inf`` are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def runs_option(command: FC) -> FC:
    """`--runs`."""
    folder = click.Path(path_type=Path)
    return click.option("--runs", default="runs", show_default=True, type=folder, help=RUNS)(command)


def device_option(command: FC) -> FC:
    """`--device`."""
    return click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
    )(command)


def log_options(command: FC) -> FC:
    """`-v`, `-q`, `--log-json`: what is said on stderr while the command works."""

    def speak(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        told = context.meta.setdefault("qtool.log", {})
        told[parameter.name] = value
        level = log.QUIET if told.get("quiet") else log.VERBOSE if told.get("verbose") else log.NORMAL
        log.speak(level, told.get("log_json", False))

    options = [
        click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=speak, help="Every step's seconds."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=speak, help="Results alone."),
        click.option("--log-json", is_flag=True, expose_value=False, callback=speak,
                     help="Progress as JSON lines, on stderr."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def set_option(command: FC) -> FC:
    """`--set`."""
    said = "A value of the recipe, by path: outputs.0.group_size=64 (repeatable)."
    return click.option("--set", "changes", multiple=True, metavar="PATH=VALUE", help=said)(command)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """``2k,8k,131072`` -> (2048, 8192, 131072). Raises QtoolError naming what is no number."""
    found = []
    for part in filter(None, (piece.strip().lower() for piece in text.split(","))):
        digits, scale = (part[:-1], 1024) if part.endswith("k") else (part, 1)
        if not digits.isdigit() or int(digits) == 0:
            raise QtoolError(f"{option} {part}: a whole number above 0 is needed, or one with k for 1024: 2k,8k,128k.")
        found.append(int(digits) * scale)
    return tuple(found)


def one_number(text: str, option: str) -> int:
    """As `numbers`, of one at most; 0 for none."""
    found = numbers(text, option)
    if len(found) > 1:
        raise QtoolError(f"{option} {text}: name one number.")
    return found[0] if found else 0


def card_options(command: FC) -> FC:
    """What is served on which cards: `--card`, `--gpus`, `--context`, `--users`, `--kv-dtype`."""
    options = [
        click.option("--card", help="The card, or `cpu` (default: this machine's card, else its processor)."),
        click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=1), help="How many share it."),
        click.option("--context", default="", help="Tokens of each user: 8k (default: the longest that fits)."),
        click.option("--users", default=4, show_default=True, type=click.IntRange(min=1), help="At once."),
        click.option("--kv-dtype", default="", help="The cache's type (default: the engine's own)."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def planned_server(
    model: str, engine: str | None, card: str | None, gpus: int, context: str, users: int, kv_dtype: str
) -> PlannedServer:
    """What `card_options` asked for. Raises QtoolError where it does not fit or the engine does not serve it."""
    from qtool.serve.here import server_here

    tokens = one_number(context, "--context")
    return server_here(model, card, engine=engine, cards=gpus, context=tokens, users=users, kv_dtype=kv_dtype.lower())


def write_text(path: Path, text: str) -> None:
    """A file that the user named; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
