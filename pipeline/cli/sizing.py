"""`qtool plan` and `qtool measure`: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool import QtoolError
from qtool.cli.load import load_options, measure_load
from qtool.cli.options import FAILED, Number, numbers, one_number, set_option, write_text
from qtool.evaluate.engines.table import planned

if TYPE_CHECKING:
    from qtool.measure.run import Trial


@click.command()
@click.argument("model")
@click.option("--gpu", help="Cards, comma-separated (default: this machine's, else RTX4090,H100).")
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=1), help="How many of each.")
@click.option("--context", "contexts", default="", help="Tokens, comma-separated (default: 2k,8k,32k,64k,128k).")
@click.option("--concurrency", default="", help="Sequences at once, comma-separated (default: 1,2,4,8).")
@click.option("--kv-dtype", default="", help="Cache types, comma-separated: bf16,f16,fp8,q8_0,q4_0.")
@click.option("--engine", type=click.Choice(list(planned())), help="Default: each format's own.")
@click.option("--format", "formats", default="", help="Default: source,awq,gptq,nf4,Q4_K_M,Q8_0.")
@click.option("--cards", type=click.Path(path_type=Path), help="A YAML file of cards of your own.")
@click.option("--host-bandwidth", type=Number(min=1), help="GB/s of host memory, for layers left there.")
@click.option("--shared-prefix", default="", help="Tokens that all prompts begin with: what sharing them saves.")
@click.option("--revision", help="The Hub model's revision.")
@click.option("--runs", default="runs", show_default=True, type=click.Path(path_type=Path), help="Log of past runs.")
@click.option("--full", is_flag=True, help="Every answer in words, every command, memory by context and users.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw memory by context against each card's line.")
@set_option
def plan(
    model: str, gpu: str | None, gpus: int, contexts: str, concurrency: str, kv_dtype: str, engine: str | None,
    formats: str, cards: Path | None, host_bandwidth: float | None, shared_prefix: str, revision: str | None,
    runs: Path, full: bool, as_json: bool, svg: Path | None, changes: tuple[str, ...],
) -> None:  # fmt: skip
    """Does MODEL fit, in which format, with how long a context and how many users? Weights are never downloaded.

    MODEL is a folder, a config.json, a Hub id, an artifact, or a recipe: of a recipe the job itself is planned, what
    converting takes.

    \b
    Examples:
      qtool plan IQuestLab/IQuest-Coder-V1-40B-Instruct --gpu RTX4090,H100
      qtool plan ./My-Model --gpu L40S --gpus 2 --context 32k,128k --concurrency 1,8 --kv-dtype bf16,fp8
      qtool plan artifacts/My-Model-awq --gpu RTX3090 --json
      qtool plan artifacts/My-Model-awq --gpu H100 --concurrency 16 --shared-prefix 6k
      qtool plan recipes/awq.yaml
    """
    import qtool
    from qtool.report import memory_figure
    from qtool.report import plan as plan_report
    from qtool.sizing.plan_json import as_json as to_json

    if model.endswith((".yaml", ".yml")):
        _plan_job(Path(model), runs, as_json, changes)
        return
    if changes:
        raise QtoolError("--set changes a recipe; name one (.yaml).")
    answer = qtool.plan(
        model, gpu, gpus=gpus, contexts=numbers(contexts, "--context"),
        sequences=numbers(concurrency, "--concurrency"), kv_dtypes=_kv_dtypes(kv_dtype), engine=engine,
        formats=list(filter(None, (name.strip() for name in formats.split(",")))), cards=cards,
        host_bandwidth=host_bandwidth, revision=revision, shared_prefix=one_number(shared_prefix, "--shared-prefix"),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(to_json(answer), indent=2))
    else:
        (plan_report.print_full_plan if full else plan_report.print_plan)(answer)
    if svg is not None:
        write_text(svg, memory_figure.memory_by_context(answer))
        click.echo(f"picture: {svg}", err=True)


def _kv_dtypes(text: str) -> tuple[str, ...]:
    known = dict.fromkeys(kind.name for engine in planned().values() for kind in engine.cache_types)
    names = tuple(filter(None, (name.strip().lower() for name in text.split(","))))
    wrong = [name for name in names if name not in known]
    if wrong:
        raise QtoolError(f"--kv-dtype {wrong[0]}: not a cache type. Known: {', '.join(known)}.")
    return names


def _plan_job(recipe: Path, runs: Path, as_json: bool, changes: tuple[str, ...]) -> None:
    from qtool.make.budgets import known
    from qtool.make.needs import needs_of
    from qtool.preparing import prepare
    from qtool.recipe.overrides import parse_overrides
    from qtool.recipe.paths import locate
    from qtool.report.job import print_budgets, print_needs

    job = known(prepare(locate(recipe), "auto", overrides=parse_overrides(changes)))
    needs = needs_of(job, runs)
    if as_json:
        click.echo(json.dumps(needs.as_json(), indent=2))
    else:
        print_budgets(job)
        print_needs(needs)


@click.command()
@click.argument("model")
@click.option("--context", "contexts", default="2k", show_default=True, help="Prompt lengths, comma-separated.")
@click.option("--batch", default="1,2,4,8", show_default=True, help="Requests at once, comma-separated.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(min=2), help="Tokens of each answer.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), help="Medians are taken of these.")
@click.option(
    "--engine", type=click.Choice(list(planned())), help="Default: llama.cpp for .gguf, else "
    "transformers; of a URL none is asked.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="For transformers.")
@click.option("--gpu", help="The card, for prediction and bounds (default: this machine's, where qtool knows it).")
@click.option("--price", type=Number(min=0), help="Of an hour of the machine: cost of a million tokens.")
@click.option("--shape", help="Of a URL: folder or config.json of its model, for prediction.")
@click.option("--name", help="Of a URL: what the server calls its model (default: its only one).")
@load_options
@click.option("--runs", default="runs", show_default=True, type=click.Path(path_type=Path), help="Where to log.")
@click.option("--no-log", is_flag=True, help="Print only; leave the log of --runs as it is.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings along (transformers).")
@click.option("--json", "as_json", is_flag=True, help="Print the measurement as JSON.")
def measure(
    model: str, contexts: str, batch: str, tokens: int, repeats: int, engine: str | None, device: str, gpu: str | None,
    price: float | None, shape: str | None, name: str | None, runs: Path, no_log: bool, trust_remote_code: bool,
    as_json: bool, **load: Any,
) -> None:  # fmt: skip
    """Measure MODEL (a folder, an artifact, or the URL of an OpenAI-compatible server) beside prediction and bound.

    Random prompts; one warm-up, then medians of repeats. A context's row ends at the first batch that runs out of
    memory. A figure that beats its bound was measured wrongly and is rejected. Reports and cards of runs made with the
    same --runs show what was measured of their models. OPENAI_API_KEY is sent to a URL.

    With --concurrency (a closed loop: so many users, each asks again once answered) or --rate (an open loop: requests
    arrive at random, and wait from the moment they were to arrive) a URL is put under load: percentiles, failures,
    goodput under --ttft and --tpot, the largest concurrency whose p95 keeps them. Exit 1 where a request failed.

    \b
    Examples:
      qtool measure artifacts/My-Model-gguf --context 2k,8k --batch 1,4
      qtool measure ./My-Model --engine transformers --price 2.5
      qtool measure http://127.0.0.1:8000/v1 --name My-Model --shape ./My-Model --gpu H100 --batch 1,8,32
      qtool measure http://127.0.0.1:8000/v1 --concurrency 1,4,8,16 --prefix shared --ttft 500 --tpot 50
      qtool measure http://127.0.0.1:8000/v1 --context 1k --rate 2,4,8 --requests 200 --ttft 500 --svg load.svg
    """
    from qtool.convert.files.durable import require_writable
    from qtool.make.device import choose_device
    from qtool.measure.run import Trial, engine_of
    from qtool.sizing.accelerators import one_card

    if not no_log:
        require_writable(runs, "--runs")
    if load["users"] or load["rates"]:
        measure_load(model, numbers(contexts, "--context"), tokens, name, shape, one_card(gpu, here=False),
                     None if no_log else runs, as_json, **load)  # fmt: skip
        return
    url = model.startswith(("http://", "https://"))
    trial = Trial(
        model=model,
        engine=engine or engine_of(model),
        contexts=numbers(contexts, "--context"),
        batches=numbers(batch, "--batch"),
        tokens=tokens,
        repeats=repeats,
        device=str(choose_device(device)) if not url else device,
        card=one_card(gpu, here=not url),
        price=price,
        shape=shape,
        name=name,
        trust_remote_code=trust_remote_code,
    )
    _measure(trial, None if no_log else runs, as_json)


def _measure(trial: Trial, runs: Path | None, as_json: bool) -> None:
    """Measure, log in ``runs``, print; exit 1 where a figure was rejected."""
    import sys
    from contextlib import nullcontext, redirect_stdout
    from dataclasses import replace

    from qtool.measure.run import measure_model, model_key
    from qtool.report import measured as measure_report
    from qtool.runs import measurements

    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # what engines say is no JSON
        measurement = measure_model(trial)
    if runs is not None:
        measurement = replace(measurement, key=model_key(trial.model))
        measurements.log(runs, measurement)
    if as_json:
        click.echo(json.dumps(measurement.as_json(), indent=2))
    else:
        measure_report.print_rows(measurement.rows)
    if any(row.status == "rejected" for row in measurement.rows):
        raise SystemExit(FAILED)
