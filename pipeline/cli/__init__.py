"""The command line: parse, call, print. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import atexit
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qtool import QtoolError
from qtool.cli import batch as cli_batch
from qtool.cli import bundle as cli_bundle
from qtool.cli import context as cli_context
from qtool.cli import evaluate as cli_evaluate
from qtool.cli import judge as cli_judge
from qtool.cli import observe as cli_observe
from qtool.cli import recipes as cli_recipes
from qtool.cli import runs as cli_runs
from qtool.cli import serve as cli_serve
from qtool.cli import share as cli_hub
from qtool.cli import sizing as cli_sizing
from qtool.cli.boundary import Boundary
from qtool.cli.heap import give_back_freed
from qtool.cli.options import FAILED, device_option, log_options, runs_option, set_option
from qtool.cli.processors import share_processors
from qtool.cli.recipes import complete_recipe
from qtool.runs import log

if TYPE_CHECKING:  # torch takes seconds to import
    from qtool.make.job import Job

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}  # every command takes them over


@click.group(cls=Boundary, context_settings=CONTEXT)
@click.version_option(package_name="qtool-llm", prog_name="qtool")
def main() -> None:
    """Quantize a code model, and know what it cost.

    \b
    Examples:
      qtool run demo                       make and judge a model that ships
      qtool init ./My-Model                a recipe for yours, with its reasons
      qtool run recipe.yaml --dry-run      the plan: sizes, bits, memory, disk
      qtool verify artifacts/My-Model-awq  re-open an artifact and check it
      qtool evaluate artifacts/My-Model-awq --source ./My-Model --task mbpp+
      qtool check latest --baseline FILE   judge a stored run again, in CI

    Exit codes: 0 fine, 1 a gate or a check failed, 2 the input is wrong, 3 the machine lacks something,
    130 interrupted.
    """
    share_processors(os.environ)  # before any command loads torch
    give_back_freed(os.environ)
    atexit.register(gc.freeze)  # at the end the system takes all memory: nothing is gained by a search for circles


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path), shell_complete=complete_recipe)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop: no weight is read, nothing is written.")
@click.option("--full", is_flag=True, help="With --dry-run: what becomes of every linear.")
@click.option("--only", multiple=True, metavar="NAME", help="Make and judge only this output (repeatable).")
@set_option
@runs_option
@device_option
@log_options
@click.option(
    "--gpus",
    default=1,
    show_default=True,
    type=click.IntRange(min=1, max=64),
    help="Cards that make the artifacts together: the same bytes, sooner.",
)
@click.option("--name", default="", help="What the run is called, in the place of its id (`qtool runs`).")
@click.option("--force", is_flag=True, help="Replace artifacts of another recipe that lie where these go.")
@click.option("--profile", type=click.Path(path_type=Path), help="Write a trace of the stages (chrome://tracing).")
def run(
    recipe: Path, dry_run: bool, full: bool, only: tuple[str, ...], changes: tuple[str, ...], runs: Path, device: str,
    gpus: int, name: str, force: bool, profile: Path | None,
) -> None:  # fmt: skip
    """Turn the model of RECIPE into verified artifacts and score them against it.

    RECIPE is a YAML file, or the name of one that ships with qtool: all, awq, budgets, demo, devstral, gguf, gptq,
    iquest-40b, iquest-40b-loop, ladder, long, nf4, qwen2.5-coder-32b, qwen3-coder-30b-a3b, smoke (`qtool recipes` says
    what each is). Run again after an interruption: what is finished is used again, each layer, too.

    \b
    Examples:
      qtool run demo
      qtool run awq --dry-run
      qtool run awq --set model=./My-Model --set outputs.0.group_size=64
      qtool run my-recipe.yaml --only awq --device cuda
      qtool run my-recipe.yaml --gpus 4   (or: torchrun --nproc-per-node 4 -m qtool run my-recipe.yaml)
    """
    from qtool.cli import cards as cli_cards  # with processes, ports and threads

    if full and not dry_run:
        raise QtoolError("--full: goes with --dry-run, and makes nothing.")
    cli_cards.require_cards(gpus, device, os.environ)
    if gpus > 1 and not dry_run:
        words = cli_cards.words_of(recipe, only, changes, runs, name, force, profile)
        raise SystemExit(cli_cards.launch(words, gpus, os.environ))
    with cli_cards.alike(os.environ):
        from qtool.recipe.overrides import parse_overrides
        from qtool.recipe.paths import locate

        found = locate(recipe)
        if found != recipe:
            log.say(f"recipe: {found.name} of qtool's own (`qtool recipes {found.stem}` prints it)")
        log.say(f"opening {found.name}", event="stage")  # before torch is imported, which takes seconds
        from qtool.make.seat import Seat
        from qtool.preparing import prepare, require_texts
        from qtool.report import terminal as report
        from qtool.report.files import write_report
        from qtool.run import run as run_recipe
        from qtool.runs.shelf import check_name

        cli_cards.follow(os.environ)
        seat = Seat.of(os.environ)
        if name:
            check_name(name)
        overrides = parse_overrides(changes)
    if dry_run:
        if not seat.rank:
            place = Seat(0, gpus).device("cuda") if gpus > 1 else seat.device(device)
            job = prepare(found, place, only, overrides=overrides)
            require_texts(job)
            _print_plan(job, runs, max(gpus, seat.number), full)
        return
    with cli_cards.named(seat.rank, seat.number):
        result = run_recipe(found, runs, device, only, profile, overrides, name, force, seat)
    if result is not None:
        report.print_run(result)
        click.echo(f"report: {write_report(result, result.folder)}")
        if result.failed:
            raise SystemExit(FAILED)


def _print_plan(job: Job, runs: Path, cards: int, full: bool) -> None:
    """What the job would make and take, with the mixes of budgets whose costs are known."""
    from qtool.make.budgets import known
    from qtool.make.needs import needs_of
    from qtool.report import job as job_report

    planned = known(job)
    job_report.print_plan(planned, needs_of(planned, runs, cards=cards), full)


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--source", type=click.Path(path_type=Path), help="The source model's folder: also recompute each linear's error."
)
def verify(artifact: Path, source: Path | None) -> None:
    """Re-open ARTIFACT: sha256, shapes, finiteness, and the loading rules of transformers, vLLM and SGLang.

    \b
    Examples:
      qtool verify artifacts/My-Model-awq
      qtool verify artifacts/My-Model-awq --source ./My-Model
    """
    import qtool
    from qtool.report import terminal as report

    result = qtool.verify(artifact, source)
    report.print_verification(result)
    if not result.sound:
        raise SystemExit(FAILED)


main.add_command(cli_recipes.init)
main.add_command(cli_recipes.recipes)
main.add_command(cli_evaluate.evaluate)
main.add_command(cli_judge.compare)
main.add_command(cli_judge.check)
main.add_command(cli_judge.baseline)
main.add_command(cli_judge.report)
main.add_command(cli_runs.shelf)
main.add_command(cli_sizing.plan)
main.add_command(cli_sizing.measure)
main.add_command(cli_observe.watch)
main.add_command(cli_context.context)
main.add_command(cli_batch.batch)
main.add_command(cli_bundle.bundle)
main.add_command(cli_serve.serve)
main.add_command(cli_serve.prove)
main.add_command(cli_hub.publish)
main.add_command(cli_hub.pull)
main.add_command(cli_hub.reproduce)
main.add_command(cli_hub.track)
