"""`qtool measure` with --concurrency or --rate: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.decorators import FC

from qtool import QtoolError
from qtool.cli.options import FAILED, Number, numbers, write_text

if TYPE_CHECKING:
    from qtool.sizing.accelerators import Accelerator


def load_options(command: FC) -> FC:
    """What a load is made of."""
    options = [
        click.option("--concurrency", "users", default="", help="Of a URL: users at once, comma-separated."),
        click.option("--rate", "rates", default="", help="Of a URL: requests a second, comma-separated."),
        click.option("--prefix", type=click.Choice(["none", "shared"]), default="none", show_default=True,
                     help="Under load: whether prompts begin alike."),
        click.option("--prefix-tokens", type=click.IntRange(min=1), help="How many are shared (default: half)."),
        click.option("--requests", default=64, show_default=True, type=click.IntRange(min=1), help="Of each load."),
        click.option("--ttft", type=Number(min=0, min_open=True), help="Objective: ms to the first token."),
        click.option("--tpot", type=Number(min=0, min_open=True), help="Objective: ms to each further one."),
        click.option("--seed", default=0, show_default=True, help="Of prompts and arrivals."),
        click.option("--svg", type=click.Path(path_type=Path), help="Draw the load."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def measure_load(
    url: str, contexts: tuple[int, ...], tokens: int, name: str | None, shape: str | None, card: Accelerator | None,
    runs: Path | None, as_json: bool, **asked: Any,
) -> None:  # fmt: skip
    """``runs``: where to log (None: nowhere); ``asked``: of `load_options`."""
    from qtool.measure.under_load import Ask, put_under_load
    from qtool.report import load_figure, loaded
    from qtool.runs import loads

    if len(contexts) != 1:
        raise QtoolError("--context: under load all prompts have one length; name one.")
    prompt = contexts[0]
    shared = (asked["prefix_tokens"] or prompt // 2) if asked["prefix"] == "shared" else 0
    slo = loads.Slo(*(None if asked[key] is None else asked[key] / 1e3 for key in ("ttft", "tpot")))
    ask = Ask(url, name, prompt, shared, tokens, asked["requests"], numbers(asked["users"], "--concurrency"),
              _rates(asked["rates"]), slo, asked["seed"], shape, card)  # fmt: skip
    load = put_under_load(ask, lambda level: click.echo(f"{level.name}: {level.requests} requests done", err=True))
    if runs is not None:
        loads.log(runs, load)
    if as_json:
        click.echo(json.dumps(load.as_json(), indent=2))
    else:
        loaded.print_load(load)
    if asked["svg"] is not None:
        write_text(asked["svg"], load_figure.under_load(load))
        click.echo(f"picture: {asked['svg']}", err=True)
    if any(level.failed or level.wrong for level in load.levels):
        raise SystemExit(FAILED)


def _rates(text: str) -> tuple[float, ...]:
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            rate = float(part)
        except ValueError:
            rate = 0.0
        if not 0 < rate < float("inf"):
            raise QtoolError(f"--rate {part}: a number above 0 is needed, requests a second: 0.5,2,8.")
        found.append(rate)
    return tuple(found)
