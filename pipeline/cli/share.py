"""Commands that share artifacts: publish, pull, reproduce."""

from __future__ import annotations

from pathlib import Path

import click

from qtool.cli.options import FAILED, device_option, runs_option


@click.command()
@click.argument("what", metavar="RUN|ARTIFACT")
@click.option("--to", metavar="ORG[/NAME]", help="Where to; the name may hold {model}, {output} and {format}.")
@click.option("--only", multiple=True, metavar="NAME", help="Publish only this output of the run (repeatable).")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Onto this branch, made where it is missing.")
@click.option("--pr", is_flag=True, help="Open a pull request; the branch itself stays as it is.")
@click.option("--license", "licence", metavar="ID", help="The source's licence, where its own card does not say it.")
@click.option("--allow-failed", is_flag=True, help="Also what no gate passed; the card then says so.")
@click.option("--dry-run", is_flag=True, help="Print the files and the card; the network is not touched.")
@runs_option
def publish(
    what: str, to: str | None, only: tuple[str, ...], private: bool, revision: str | None, pr: bool,
    licence: str | None, allow_failed: bool, dry_run: bool, runs: Path,
) -> None:  # fmt: skip
    """Put what passed on the Hub, its evidence on the card, and read every file back.

    Refused: what a gate failed or left undecided, what no gate judged, changed or unfinished artifacts, licences that
    are unknown or forbid it, repositories that hold something else. Log in with `hf auth login`, or set HF_TOKEN.
    Exit code 1 when something is refused or does not read back as it was sent.

    \b
    Examples:
      qtool publish latest --to my-org --dry-run
      qtool publish latest --to "my-org/{model}-{format}" --private
      qtool publish artifacts/My-Model-awq --to my-org/My-Model-AWQ --pr
    """
    from qtool.share import admission
    from qtool.share import publish as publishing

    offers = admission.offers(what, runs, only)
    run = offers[0].run
    section = publishing.with_options(
        run.recipe.publish if run else None, to, private=private, revision=revision, pr=pr, license=licence
    )
    plans = publishing.plan(admission.accept(offers, section, allow_failed), section)
    for planned in plans:
        if dry_run:
            click.echo(f"{planned.target.repo}: {len(planned.uploads)} files, {planned.size:,} bytes")
            for upload in planned.uploads:
                click.echo(f"  {upload.size:>15,}  {upload.path}")
            click.echo(f"\n{planned.card}")
            continue
        sent = publishing.send(planned)
        publishing.note(runs, planned, sent)
        state = "published and read back" if sent.fresh else "were there already, unchanged"
        click.echo(f"{sent.repo}: {len(planned.uploads)} files {state}: {sent.url}")


@click.command()
@click.argument("repo", metavar="ORG/NAME")
@click.option("--revision", metavar="REV", help="A branch or commit; main by default.")
@click.option("--into", type=click.Path(path_type=Path), help="Folder to write to; ./NAME by default.")
@click.option("--score", is_flag=True, help="Put the card's tasks to it here, and compare problem by problem.")
@click.option("--source", metavar="MODEL", help="With --score: the source model, a folder or a Hub id, for the KL too.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="With --score: where.")
@runs_option
def pull(
    repo: str, revision: str | None, into: Path | None, score: bool, source: str | None, device: str, runs: Path
) -> None:
    """Fetch what qtool published, verify every file against its manifest, and say which numbers hold here.

    Sizes are compared with the published ones; scores with those that --runs has of the same artifact, or that --score
    makes: the answers run in a sandbox, a file or a server that the card names is not used. Scores of another engine,
    dtype or kind of device are not compared. Exit code 1 when a check fails or a score is shown to be worse here.

    \b
    Examples:
      qtool pull my-org/My-Model-AWQ-4bit
      qtool pull my-org/My-Model-AWQ-4bit --score --source ./My-Model
      qtool pull my-org/My-Model-AWQ-4bit --revision w4 --into models/awq
    """
    from qtool.report import terminal as report
    from qtool.share.pull import Again
    from qtool.share.pull import pull as pull_artifacts

    again = Again(source, device) if score else None
    commit, artifacts = pull_artifacts(repo, revision, into or Path(repo.split("/")[-1]), runs, again)
    click.echo(f"{repo} at {commit}")
    for pulled in artifacts:
        report.print_verification(pulled.verification)
        for label, lines in (("checked", pulled.checked), ("not checked", pulled.unchecked), ("FAILED", pulled.faults)):
            for line in lines:
                click.echo(f"{label}: {line}")
        if pulled.changes:
            click.echo("A: as published; B: as measured here")
            report.print_changes(pulled.changes, [])
    if not all(pulled.sound for pulled in artifacts):
        raise SystemExit(FAILED)


@click.command()
@click.argument("artifact", metavar="DIR|ORG/NAME")
@click.option("--source", metavar="MODEL", help="Where the source model is here: a folder or a Hub id.")
@click.option("--text", metavar="FILE", help="Where the calibration text is here.")
@device_option
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the source model brings along.")
def reproduce(artifact: str, source: str | None, text: str | None, device: str, trust_remote_code: bool) -> None:
    """Build an artifact (a folder, or a repository of the Hub) again from its manifest and compare every tensor.

    Exit code 1 when a tensor differs; then it says what differs between the machines.

    \b
    Examples:
      qtool reproduce artifacts/My-Model-awq
      qtool reproduce my-org/My-Model-AWQ-4bit --source ./My-Model --text ./calibration.txt
    """
    from qtool.convert.files.durable import working_folder
    from qtool.share import hub
    from qtool.share.reproduce import Given, published
    from qtool.share.reproduce import reproduce as build_again

    with working_folder("qtool-reproduce-") as work:
        folder = Path(artifact)
        if published(artifact):
            folder = Path(work) / "published" / folder.name
            click.echo(f"{artifact} at {hub.fetch(artifact, None, folder)}")
        comparison = build_again(folder, Given(source, text, device, trust_remote_code), Path(work) / "again")
    if not comparison.differing:
        click.echo(f"{artifact}: {comparison.tensors} tensors, the same bit for bit")
        return
    click.echo(f"{artifact}: {len(comparison.differing)} of {comparison.tensors} tensors differ")
    for line in comparison.differing[:20]:
        click.echo(f"  {line}")
    for line in comparison.reasons or ("device and versions are the same: this should not be",):
        click.echo(f"why it may: {line}")
    raise SystemExit(FAILED)


@click.command()
@click.argument("run")
@click.option("--to", "tool", required=True, type=click.Choice(["mlflow", "wandb", "trackio"]), help="The tool.")
@click.option("--project", default="qtool", show_default=True, help="What it is called there (MLflow: experiment).")
@runs_option
def track(run: str, tool: str, project: str, runs: Path) -> None:
    """Log RUN to MLflow, Weights & Biases (offline) or trackio: scores with their intervals, settings, the report.

    Each model of the run becomes a run there. The tool's own package has to be installed; its own environment variables
    (MLFLOW_TRACKING_URI, WANDB_MODE, TRACKIO_DIR) say where things go.

    \b
    Examples:
      qtool track latest --to mlflow --project my-quantizations
      WANDB_MODE=online qtool track latest --to wandb
    """
    from qtool.report.files import write_report
    from qtool.runs.record import load_run
    from qtool.runs.shelf import find_run
    from qtool.share.tracking import track as log_run

    record = load_run(find_run(run, runs))
    report = record.folder / "report.html"
    if not report.exists():
        report = write_report(record, record.folder)
    for name, place in log_run(record, tool, project, report):
        click.echo(f"{name}: {place}")
