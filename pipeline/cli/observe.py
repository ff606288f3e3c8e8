"""`qtool watch`: parse, call, print."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.options import FAILED, Number, card_options, planned_server

if TYPE_CHECKING:
    from qtool.evaluate.engines.scrape import Page
    from qtool.report.observed import Reading
    from qtool.sizing.serving import PlannedServer


@click.command()
@click.argument("url")
@click.option("--artifact", help="What it serves (a folder or config.json): the plan and its bounds stand beside.")
@card_options
@click.option("--every", default=2.0, show_default=True, type=Number(min=0.1), help="Seconds to a reading.")
@click.option("--once", is_flag=True, help="Two readings and the table, then stop; exit 1 where the cache binds.")
@click.option("--for", "length", type=Number(min=0.1), help="Stop after so many seconds.")
def watch(
    url: str, artifact: str | None, every: float, once: bool, length: float | None, **asked: Any
) -> None:  # fmt: skip
    """Read /metrics of the server at URL (vLLM, SGLang, llama-server) again and again; say which limit binds.

    Cache use, preemptions, queue, latency percentiles, prefix hits and tokens/s, in the last moments and since the
    server's start, beside what was planned. A full cache that makes the engine throw requests out (nothing fails, it
    only gets slow) is called what it is. One table on a terminal, else a line now and then. Ctrl-C ends it.
    OPENAI_API_KEY is sent to URL.

    \b
    Examples:
      qtool watch http://127.0.0.1:8000
      qtool watch http://127.0.0.1:8000 --artifact artifacts/My-Model-awq --card L40S --context 32k --users 8
      qtool watch http://127.0.0.1:8080 --once          llama-server, started with --metrics
    """
    from rich.console import Console
    from rich.live import Live

    from qtool.evaluate.engines.scrape import engine_of, metrics_url, scrape
    from qtool.evaluate.engines.server import KEY_VARIABLE
    from qtool.report import observed

    address, key = metrics_url(url), os.environ.get(KEY_VARIABLE) or None
    first = scrape(address, key)
    engine = engine_of(first, address)[0].name
    plan = None if artifact is None else planned_server(artifact, engine, **asked)
    console = Console()
    before, ends = first, time.monotonic() + (length if length is not None else float("inf"))
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, transient=once) as live:
        while not once:
            time.sleep(every)
            now = scrape(address, key)
            reading = _reading(url, before, now, plan)
            if console.is_terminal:
                live.update(observed.table(reading), refresh=True)
            else:
                click.echo(observed.line(reading))
            if time.monotonic() >= ends:
                break
            before = now
    if not once:
        return
    time.sleep(every)
    reading = _reading(url, first, scrape(address, key), plan)
    console.print(observed.table(reading), soft_wrap=True, highlight=False)
    if reading.verdict.limit == "cache":
        raise SystemExit(FAILED)


def _reading(url: str, before: Page, now: Page, plan: PlannedServer | None) -> Reading:
    from qtool.evaluate.engines.scrape import engine_of
    from qtool.observe.limit import binding
    from qtool.observe.window import observe
    from qtool.report.observed import Reading

    facts, metrics = engine_of(now, url)
    lately, ever = observe(before, now, metrics), observe(None, now, metrics)
    return Reading(url, facts.name, metrics, lately, ever, now.missing(metrics), plan, binding(lately, plan))
