"""What several commands share: options, the exit code of a failed check, the file that a user named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.decorators import FC

FAILED = 1  # the exit code where a gate or a check failed
RUNS = "Folder of run logs and scores."


def runs_option(command: FC) -> FC:
    """`--runs`."""
    folder = click.Path(path_type=Path)
    return click.option("--runs", default="runs", show_default=True, type=folder, help=RUNS)(command)


def device_option(command: FC) -> FC:
    """`--device`."""
    return click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
    )(command)


class Tokens(click.ParamType[int]):
    """A whole number above 0, `8192`, or one with k for 1024, `8k`."""

    name = "TOKENS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value).strip().lower()
        digits, scale = (text[:-1], 1024) if text.endswith("k") else (text, 1)
        if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
            self.fail(f"{value!r} is no whole number above 0, nor one with k for 1024 (8k).", param, ctx)
        return int(digits) * scale


def card_options(command: FC) -> FC:
    """What is served on which cards: `--gpu`, `--gpus`, `--context`, `--users`, `--cards`."""
    options = [
        click.option("--gpu", "--card", help="The card (default: this machine's, where qtool knows it)."),
        click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=1), help="How many of them."),
        click.option("--context", type=Tokens(), help="Of each sequence (default: the longest that --users can have)."),
        click.option("--users", type=click.IntRange(min=1), help="Sequences at once (default: 8)."),
        click.option("--cards", type=click.Path(path_type=Path), help="A YAML file of cards of your own."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def write_text(path: Path, text: str) -> None:
    """A file that the user named; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
