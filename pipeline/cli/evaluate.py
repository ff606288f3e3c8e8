"""`qtool evaluate`: score a model, or check the harness that would."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from qtool import QtoolError
from qtool.cli.options import Number, device_option, log_options, runs_option
from qtool.evaluate.engines.table import ENGINES

_DAY = click.DateTime(["%Y-%m-%d"])


class _Lengths(click.ParamType[tuple[int, ...]]):
    """One window length or several, `2048,8192`."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return tuple(int(part) for part in value.split(",")) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 2048,8192.", param, ctx)


@click.command()
@click.argument("model", required=False)
@click.option("--source", type=click.Path(path_type=Path), help="The unquantized model: scored too, and compared with.")
@click.option("--task", "tasks", multiple=True, help="A shipped task, a benchmark (docs/tasks.md), or a file of one.")
@click.option("--after", type=_DAY, metavar="DAY", help="LiveCodeBench: contests from this day on (2025-01-31).")
@click.option("--before", type=_DAY, metavar="DAY", help="LiveCodeBench: contests up to this day.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many problems of each task.")
@click.option("--text", help="Held-out text for perplexity and KL: a shipped name, a file or a data set.")
@click.option("--windows", default=16, show_default=True, type=click.IntRange(min=1), help="Windows of --text.")
@click.option("--window-length", default="512", show_default=True, type=_Lengths(), help="Tokens in one.")
@click.option("--by-layer", is_flag=True, help="Also the KL of each layer alone (slow: a pass for every layer).")
@click.option("--long", "long_text", help="One long text, told by position: a folder of code, a file, a shipped name.")
@click.option("--long-length", default=32768, show_default=True, type=click.IntRange(min=8), help="Its tokens.")
@click.option(
    "--condition",
    "conditions",
    multiple=True,
    metavar="TYPE|SINK+RECENT",
    help="Ask all of it again with such a cache: q8_0, or 4+4096 for a rolling window (several).",
)
@click.option("--engine", type=click.Choice(list(ENGINES)), default="reference", show_default=True)
@click.option("--base-url", metavar="URL", help="Engine openai: the server's address, which ends in /v1.")
@click.option("--prompt", type=click.Choice(["auto", "completion", "chat"]), default="auto", show_default=True)
@click.option("--max-new-tokens", default=384, show_default=True, type=click.IntRange(min=1))
@click.option("--samples", default=1, show_default=True, type=click.IntRange(min=1), help="Answers a problem (pass@k).")
@click.option("--temperature", default=0.0, show_default=True, type=Number(min=0), help="0: greedy.")
@click.option("--top-p", default=1.0, show_default=True, type=Number(min=0, max=1, min_open=True))
@click.option("--seed", default=0, show_default=True, help="Of the sampled answers.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Or requests at a time.")
@click.option("--sandbox", type=click.Choice(["auto", "none"]), default="auto", show_default=True)
@click.option("--self-check", "check", is_flag=True, help="Only judge the harness: known answers, right and wrong.")
@click.option("--plan", "plans", is_flag=True, help="Only say how many problems show a loss of --detect points.")
@click.option(
    "--detect",
    default=1.0,
    show_default=True,
    type=Number(min=0, max=100, min_open=True),
    help="Points of loss, for --plan.",
)
@click.option(
    "--discordance",
    type=Number(min=0, max=1),
    help="For --plan: share of outcomes that change (default: as seen in --runs).",
)
@click.option("--trust-remote-code", is_flag=True, help="Let the model's own code run.")
@runs_option
@device_option
@log_options
def evaluate(
    model: str | None, source: Path | None, tasks: tuple[str, ...], after: datetime | None, before: datetime | None,
    limit: int | None, long_text: str | None, long_length: int, conditions: tuple[str, ...], text: str | None,
    windows: int, window_length: tuple[int, ...], by_layer: bool, engine: str, base_url: str | None, prompt: str,
    check: bool, plans: bool, detect: float, discordance: float | None, trust_remote_code: bool, runs: Path,
    device: str, **asked: Any,
) -> None:  # fmt: skip
    """Score MODEL (an artifact, any unquantized model's folder, or a Hub id) on coding tasks and held-out text.

    With --engine openai, MODEL is a name that the server at --base-url has (its only one if left out), and a key is
    read from OPENAI_API_KEY. A run that was interrupted goes on with the next problem.

    \b
    Examples:
      qtool evaluate artifacts/My-Model-awq --source ./My-Model --task handwritten --text heldout-code
      qtool evaluate qtool-demo --task heldout --limit 100
      qtool evaluate ./My-Model --task humaneval --limit 40 --prompt completion
      qtool evaluate ./My-Model --task humaneval --samples 20 --temperature 0.8 --top-p 0.95
      qtool evaluate --engine openai --base-url http://127.0.0.1:8000/v1 --task humaneval --prompt chat
      qtool evaluate ./My-Model --task mbpp+ --task livecodebench --after 2025-01-01
      qtool evaluate ./My-Model --long ./my-repository --long-length 32768 --condition q8_0 --condition 4+4096
      qtool evaluate --self-check --task humaneval
      qtool evaluate --plan --detect 1
    """
    if plans:
        _plan(tasks, limit, detect, discordance, runs)
        return
    import qtool
    from qtool.measure.scoring import check_harness, evaluate_served
    from qtool.report import terminal as report
    from qtool.runs.summary import summarise
    from qtool.verbs import evaluate_section, task_sections

    if check:
        tasks = tasks or ("handwritten", "heldout")
    if not tasks and not text and not long_text:
        raise QtoolError("nothing to measure: give --task, --text or --long, for example --task handwritten.")
    fidelity = {"text": text, "samples": windows, "length": window_length, "by_layer": by_layer} if text else None
    asked |= {"engine": "reference" if check else engine, "base_url": None if check else base_url, "prompt": prompt}
    days = (after and after.date(), before and before.date())
    asked |= {"tasks": task_sections(tasks, limit, *days), "text": fidelity}
    asked |= {"long": {"text": long_text, "length": long_length} if long_text else None}
    asked |= {"conditions": [_condition(said) for said in conditions]}
    if base_url is not None and model is not None:
        asked["models"] = {model: model}
    if model is None and not check and base_url is None and not ENGINES[engine].facts.served:
        raise QtoolError("name a MODEL folder; only --engine openai and --self-check go without one.")
    if check or base_url is not None or model is None:
        section = evaluate_section(asked)
        if check:
            report.print_self_check(check_harness(section, Path(model) if model else None, runs, trust_remote_code))
        else:
            report.print_scores(summarise(evaluate_served(section, runs)))
        return
    found = qtool.score(model, source, runs=runs, device=device, trust_remote_code=trust_remote_code, **asked)
    report.print_scores(found)


def _condition(said: str) -> dict[str, Any]:
    """`q8_0`, or `4+4096`."""
    sink, plus, recent = said.partition("+")
    if not plus:
        return {"cache": said.lower()}
    if not (sink.isdecimal() and recent.isdecimal()):
        raise QtoolError(f"--condition {said}: a cache type such as q8_0, or a window such as 4+4096.")
    return {"window": {"sink": int(sink), "recent": int(recent)}}


def _plan(tasks: tuple[str, ...], limit: int | None, detect: float, discordance: float | None, runs: Path) -> None:
    """What each task (default: all that have names) would show."""
    from qtool.evaluate.tasks.loading import load_task, task_sizes
    from qtool.report.power import print_power
    from qtool.runs.power import power_of, seen_in

    sizes = task_sizes()
    if tasks:
        sizes = {task: sizes[task] if task in sizes else len(load_task(task).problems) for task in tasks}
    if limit:
        sizes = {task: min(limit, problems) for task, problems in sizes.items()}
    seen = seen_in(runs)
    print_power(detect, power_of(sizes, seen, discordance), seen, discordance)
