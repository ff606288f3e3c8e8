"""`qtool bundle`: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qtool.cli.options import card_options, planned_server
from qtool.evaluate.engines.table import SERVERS

BUNDLED = [name for name, facts in SERVERS.items() if facts.bundle]


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@card_options
@click.option("--engine", type=click.Choice(BUNDLED), help="Default: the format's own.")
@click.option("--repo", metavar="ORG/NAME", help="The artifact on the Hub, for files that name it there.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write (default: ARTIFACT/serve).")
def bundle(artifact: Path, engine: str | None, repo: str | None, out: Path | None, **asked: Any) -> None:
    """Write the files that start, watch and load ARTIFACT, from its plan.

    For vLLM: a recipe, Helm values for production-stack and llm-d, a KServe LLMInferenceService, docker compose. For a
    .gguf file: llama-server's preset, Ollama's Modelfile, docker compose. For both: Prometheus alert rules and a
    Grafana dashboard whose limits are the plan's, and a script that puts on the planned load. Images are pinned.
    Nothing of it was run; every file says so.

    \b
    Examples:
      qtool bundle artifacts/My-Model-awq --card L40S --context 32k --users 8
      qtool bundle artifacts/My-Model-awq --card H100 --gpus 2 --repo my-org/My-Model-AWQ
      qtool bundle artifacts/My-Model-gguf --card RTX4090 --out deploy
    """
    from qtool.bundle.bundle import make_bundle, write_bundle

    folder = out or artifact / "serve"
    made = make_bundle(artifact, planned_server(str(artifact), engine, **asked), repo, folder)
    click.echo(f"planned: {made.target.planned}")
    for path in write_bundle(made, folder):
        click.echo(f"  {path}")
    for text in made.left_out:
        click.echo(f"left out: {text}")
    click.echo("Not run: configuration only. README.md says what each is for.")
