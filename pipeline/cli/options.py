"""What several commands share: options, the exit code of a failed check, the file that a user named."""

from __future__ import annotations

from pathlib import Path

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


def write_text(path: Path, text: str) -> None:
    """A file that the user named; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
