"""`qtool runs`: which there are, one in detail, a name for one, removing some."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qtool import QtoolError
from qtool.cli.options import runs_option


@click.group("runs", invoke_without_command=True)
@click.pass_context
def shelf(context: click.Context) -> None:
    """List, show, name and remove runs. Alone it lists them.

    A RUN is a name, the beginning of an id, or latest.

    \b
    Examples:
      qtool runs
      qtool runs list awq failed
      qtool runs show nightly
      qtool runs name latest nightly
      qtool runs remove 3f0aee45 nightly --yes
    """
    if context.invoked_subcommand is None:
        context.invoke(list_runs, words=(), runs=Path("runs"))


@shelf.command("list")
@click.argument("words", nargs=-1)
@runs_option
def list_runs(words: tuple[str, ...], runs: Path) -> None:
    """Every run, the newest last: those with each of WORDS in id, name, model, outputs or result.

    \b
    Examples:
      qtool runs list
      qtool runs list Qwen2.5 failed
    """
    from qtool.report.shelf import print_entries
    from qtool.runs.shelf import entries

    there = entries(runs)
    print_entries([entry for entry in there if entry.fits(words)], len(there), runs)


@shelf.command()
@click.argument("run")
@runs_option
def show(run: str, runs: Path) -> None:
    """RUN in detail: source, outputs with size, result and folder, time, the recipe's changes by --set.

    \b
    Examples:
      qtool runs show latest
    """
    from qtool.report.shelf import print_entry
    from qtool.runs.shelf import find_any

    print_entry(find_any(run, runs))


@shelf.command()
@click.argument("run")
@click.argument("called")
@runs_option
def name(run: str, called: str, runs: Path) -> None:
    """Give RUN the name CALLED: every command takes it in the place of an id. A name is one run's at a time.

    \b
    Examples:
      qtool runs name latest nightly
    """
    from qtool.runs.shelf import find_any, give_name

    entry = find_any(run, runs)
    for other in give_name(entry.folder, called):
        click.echo(f"{other} was called {called} before")
    click.echo(f"{entry.id}: {called}")


@shelf.command()
@click.argument("which", nargs=-1, required=True, metavar="RUN...")
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@runs_option
def remove(which: tuple[str, ...], yes: bool, runs: Path) -> None:
    """Remove what is kept of each RUN: recipe, scores, report. Artifacts stay.

    \b
    Examples:
      qtool runs remove 3f0aee45 --yes
    """
    from qtool.runs.shelf import find_any, remove

    found = {entry.id: entry for entry in (find_any(text, runs) for text in which)}
    for entry in found.values():
        click.echo(f"{entry.id}  {entry.name or entry.model}: {entry.state}", err=True)
    if not yes:
        if not sys.stdin.isatty():
            raise QtoolError("nothing was removed: there is no terminal to ask at. Say --yes.")
        click.confirm(f"Remove {len(found)} of {runs}?", abort=True)
    for entry in found.values():
        remove(entry)
        click.echo(f"removed {entry.folder}")
