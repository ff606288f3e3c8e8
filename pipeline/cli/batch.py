"""`qtool batch`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from qtool import QtoolError
from qtool.cli.options import FAILED, runs_option

NAMES = ("here", "slurm", "ray", "kubernetes", "skypilot", "huggingface")  # as batch/table.py, which loads torch


@click.command()
@click.argument("models", type=click.Path(path_type=Path))
@click.option("--on", "engine", type=click.Choice(NAMES), help="The engine that job files are written for.")
@click.option("--out", default="batch", show_default=True, type=click.Path(path_type=Path), help="Their folder.")
@click.option("--start", is_flag=True, help="Also start them, by the engine's own command.")
@click.option("--status", is_flag=True, help="Only a line for each model: where it stands.")
@runs_option
def batch(models: Path, engine: str | None, out: Path, start: bool, status: bool, runs: Path) -> None:
    """Many models by one file: what each takes, job files for an engine, where each stands.

    MODELS is a YAML file: a list of models, each with a recipe and what is set in it. Alone the command checks all
    recipes and says what every job takes; no weight is read. Models whose runs are finished are left out of job files,
    and a job goes on where a killed one stopped, so the same command may be given again at any time.

    \b
    Examples:
      qtool batch models.yaml
      qtool batch models.yaml --on slurm --start
      qtool batch models.yaml --on kubernetes --out jobs
      qtool batch models.yaml --status
    """
    from qtool.batch.models import load_batch
    from qtool.batch.state import states_of
    from qtool.report.batch import print_states

    if start and engine is None:
        raise QtoolError(f"--start: say on which engine: --on {', --on '.join(NAMES)}.")
    found, asked = load_batch(models)
    states = states_of(asked, runs)
    if status:
        print_states(states)
        return
    from qtool.batch.engine import Place
    from qtool.batch.files import render, write
    from qtool.batch.files import start as start_jobs
    from qtool.batch.needs import tasks_of
    from qtool.batch.table import ENGINES
    from qtool.report.batch import print_tasks

    finished = {state.name for state in states if state.finished}
    left = [one for one in asked if one.name not in finished]
    if finished:
        click.echo(f"finished before, left out: {', '.join(name for name in finished)}", err=True)
    if not left:
        return
    tasks = tasks_of(left, runs)
    print_tasks(tasks)
    if engine is None:
        return
    row = ENGINES[engine]
    made = render(row, tasks, Place(out.resolve(), Path.cwd(), str(runs), found.image), found.of(engine))
    for path in write(made, out):
        click.echo(f"  {path}")
    if start:
        if start_jobs(row, made, out):
            raise SystemExit(FAILED)
        return
    for words in made.start[:3]:
        click.echo(f"start: cd {out} && {' '.join(words)}")
