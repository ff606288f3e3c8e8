"""A recipe's `serve:`: every output proved in the servers that read its format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import click

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.evaluate.engines.facts import EngineFacts
from qtool.evaluate.engines.table import SERVERS
from qtool.recipe.judging import ServeSection
from qtool.serve.here import server_here
from qtool.serve.programs import require_program
from qtool.serve.prove import Say, prove, proved_so, record


def require_servers(section: ServeSection, gguf: Iterable[bool]) -> None:
    """Raises QtoolError (exit 3) for a server that is not here, before a weight is read. ``gguf``: of each output,
    whether it is a .gguf file."""
    for facts in {facts.name: facts for one in gguf for facts in _servers(section, one)}.values():
        require_program(facts)


def prove_artifacts(
    section: ServeSection, artifacts: Mapping[str, Artifact], trust_remote_code: bool = False
) -> dict[str, Artifact]:
    """The artifacts with their proofs in qtool.json. One that was proved so before, in the same way, is not started
    again. A server that refuses an output's format is said, and proves nothing."""
    proved = {}
    for name, artifact in artifacts.items():
        for facts in _servers(section, artifact.gguf is not None):
            try:
                planned = server_here(
                    str(artifact.path), None, engine=facts.name, context=section.context or 0, users=section.users,
                    dtype=section.dtype or "",
                )  # fmt: skip
            except QtoolError as error:
                click.echo(f"{name}: not proved in {facts.name}: {error.message}", err=True)
                continue
            if proved_so(artifact, planned) is None:
                proof = prove(artifact, planned, say=_said_of(name), trust_remote_code=trust_remote_code)
                artifact = record(artifact, proof)
        proved[name] = artifact
    return proved


def _servers(section: ServeSection, gguf: bool) -> list[EngineFacts]:
    return [SERVERS[engine] for engine in dict.fromkeys(section.prove) if SERVERS[engine].gguf == gguf]


def _said_of(name: str) -> Say:
    return lambda line: click.echo(f"{name}: {line}", err=True)
