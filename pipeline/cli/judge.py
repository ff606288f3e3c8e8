"""Commands that judge stored scores: compare, check, baseline, report. Nothing is run again."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli.options import FAILED, runs_option, write_text


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--html", type=click.Path(path_type=Path), help="Write the comparison as one HTML file, too.")
@runs_option
def compare(a: str, b: str, html: Path | None, runs: Path) -> None:
    """Is B worse than A? Stored scores, paired problem by problem; scores of other engines or prompts are refused.

    A and B: a run (the beginning of its id, its folder, or latest), one of its models as RUN:NAME, an artifact's
    folder, or a baseline file; or both logs of lm-eval (samples_….jsonl, or their folder) or of inspect_ai (JSON). Exit
    code 1 when B is shown to be worse.

    \b
    Examples:
      qtool compare artifacts/My-Model-awq artifacts/My-Model-gptq
      qtool compare baseline.json latest --html compared.html
      qtool compare 6443ead6:awq latest:awq
      qtool compare lm-eval/my-model lm-eval/my-model-awq
    """
    from qtool.report import terminal as report
    from qtool.runs.compare import compare as compare_scores
    from qtool.runs.compare import pair_up
    from qtool.runs.sides import resolve_side

    one, other = resolve_side(a, runs), resolve_side(b, runs)
    pairs, notes = pair_up(one, other)
    changes = compare_scores(pairs, one[0].source == other[0].source)
    report.print_changes(changes, notes)
    if html is not None:
        from qtool.report.compared import compared_page

        write_text(html, compared_page((a, b), pairs, changes, notes))
        click.echo(f"report: {html}")
    if any(change.shown == "worse" for change in changes):
        raise SystemExit(FAILED)


@click.command()
@click.argument("run")
@click.option("--baseline", type=click.Path(path_type=Path), help="Also fail on what got worse than in this file.")
@click.option("--recipe", type=click.Path(path_type=Path), help="Judge by the gates of this recipe instead.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the results as JUnit XML.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results as JSON.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write them for a CI job's summary or a comment.")
@runs_option
def check(
    run: str, baseline: Path | None, recipe: Path | None, junit: Path | None, json_file: Path | None,
    markdown: Path | None, runs: Path,
) -> None:  # fmt: skip
    """Judge RUN again from its stored scores: the recipe's gates, and regressions against a baseline.

    RUN is a name, the beginning of a run's id, its folder, or latest. Exit code 1 when a check fails. The files'
    folders are made where they are missing.

    \b
    Examples:
      qtool check latest
      qtool check latest --baseline baseline.json --junit qtool.xml
      qtool check nightly --markdown "$GITHUB_STEP_SUMMARY"
    """
    from qtool.report import terminal as report
    from qtool.runs.baseline import load_baseline
    from qtool.runs.check import as_json, check_run
    from qtool.runs.record import load_run
    from qtool.runs.shelf import find_run

    record = load_run(find_run(run, runs))
    gates = record.recipe.gates
    if recipe:
        from qtool.recipe.paths import locate
        from qtool.recipe.sections import load_recipe  # with every method

        gates = load_recipe(locate(recipe)).gates
    results = check_run(record, gates, load_baseline(baseline) if baseline else None)
    report.print_results(results)
    if junit:
        from qtool.report.junit import as_junit

        write_text(junit, as_junit(record, results))
    if json_file:
        write_text(json_file, json.dumps(as_json(record, results), indent=2) + "\n")
    if markdown:
        from qtool.report.check_markdown import check_markdown

        write_text(markdown, check_markdown(record, results))
    if any(result.failed for result in results):
        raise SystemExit(FAILED)


@click.group()
def baseline() -> None:
    """Keep a run's scores in a small file, to compare later runs with.

    \b
    Examples:
      qtool baseline save latest baseline.json
    """


@baseline.command()
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path))
@runs_option
def save(run: str, file: Path, runs: Path) -> None:
    """Write which problems each model of RUN solved, and its KL window by window, to FILE.

    \b
    Examples:
      qtool baseline save latest baseline.json
    """
    from qtool.runs.baseline import measured, save_baseline
    from qtool.runs.shelf import find_run

    found = measured(find_run(run, runs))
    save_baseline(found, file)
    click.echo(f"{file}: {', '.join(found.subjects)} of run {found.run}")


@click.command()
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to; the run's own by default.")
@runs_option
def report(run: str, out: Path | None, runs: Path) -> None:
    """Write RUN as one HTML file that needs no network, as Markdown for a model card, and its figures as SVG.

    \b
    Examples:
      qtool report latest
      qtool report 6443ead6 --out public
    """
    from qtool.report.files import write_report
    from qtool.runs.record import load_run
    from qtool.runs.shelf import find_run

    record = load_run(find_run(run, runs))
    click.echo(f"report: {write_report(record, out or record.folder)}")
