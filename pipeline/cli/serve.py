"""`qtool serve` and `qtool prove`: parse, call, print."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.decorators import FC

from qtool import Interrupted
from qtool.cli.options import FAILED, Number, one_number
from qtool.evaluate.engines.table import PROBES, SERVERS

if TYPE_CHECKING:
    from qtool.sizing.serving import PlannedServer

PORT = 8000


def _planned_options(command: FC) -> FC:
    """What a server is planned with."""
    for option in reversed((
        click.option("--card", help="The card, or `cpu` (default: this machine's card, else its processor)."),
        click.option("--gpus", default=1, show_default=True, type=click.IntRange(min=1), help="How many share it."),
        click.option("--context", default="", help="Tokens of each user: 8k (default: the longest that fits)."),
        click.option("--users", default=4, show_default=True, type=click.IntRange(min=1), help="At once."),
        click.option("--chunk", default=0, type=click.IntRange(min=0), help="Tokens of a prompt in one step."),
        click.option("--kv-dtype", default="", help="The cache's type: bf16, f16, fp8, q8_0, q4_0."),
        click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), help="Default: as the files say."),
        click.option("--python", help="Of an environment that has the engine (default: PATH, then qtool's own)."),
        click.option("--patience", default=900.0, show_default=True, type=Number(min=0, min_open=True),
                     help="Seconds in which it must answer."),
    )):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("artifact")
@click.option("--engine", type=click.Choice(list(SERVERS)), help="Default: the first that runs the format.")
@_planned_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(1, 65535))
@click.option("--shared-prefix", default="", help="Tokens that all prompts begin with: say what sharing them saves.")
@click.option("--dry-run", is_flag=True, help="Print the command alone and stop.")
@click.option("--quiet", is_flag=True, help="Do not show the engine's own log.")
def serve(
    artifact: str, engine: str | None, card: str | None, gpus: int, context: str, users: int, chunk: int, kv_dtype: str,
    dtype: str | None, python: str | None, patience: float, host: str, port: int, shared_prefix: str, dry_run: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Start ARTIFACT (or any model's folder) in an engine as planned, try it, and stay in front. Ctrl-C ends it whole.

    The engine is found on PATH, in qtool's own environment, or in that of --python (or of QTOOL_VLLM_PYTHON,
    QTOOL_SGLANG_PYTHON, QTOOL_LLAMA_CPP_PYTHON). --dry-run prints a line that a shell takes as it is.

    \b
    Examples:
      qtool serve artifacts/My-Model-awq
      qtool serve artifacts/My-Model-awq --context 8k --users 16 --shared-prefix 2k
      qtool serve artifacts/My-Model-gguf --engine llama.cpp --port 8080
      qtool serve artifacts/My-Model-awq --engine vllm --card H100 --gpus 2 --dry-run | tee serve.sh
    """
    from qtool.serve.running import running, smoke, stay

    planned = _plan(artifact, engine, card, gpus, context, users, chunk, kv_dtype, dtype, host, port)
    line, found = _typed(planned, python)
    _say(_what(planned))
    if tokens := one_number(shared_prefix, "--shared-prefix"):
        _say(_shared(planned, tokens))
    if planned.facts.untried:
        _say(f"not run: {planned.facts.untried}")
    if dry_run:
        if not found:
            _say(f"{planned.facts.name} is not installed here: {planned.facts.install}")
        click.echo(line)
        return
    echo: Callable[[str], None] | None = None if quiet else _say
    try:
        with running(planned, python, patience, echo) as server:
            text, seconds = smoke(planned, server)
            _say(f"answers at {planned.url}/v1 as {planned.serving.name}; it continued a prompt with {text!r} in "
                 f"{seconds:.2g} s. Ctrl-C ends it.")  # fmt: skip
            stay(server)
    except KeyboardInterrupt as error:
        raise Interrupted("The server and all its processes have ended.") from error


@click.command()
@click.argument("artifact")
@click.option("--engine", type=click.Choice(list(PROBES)), help="Default: the first that runs the format.")
@_planned_options
@click.option("--no-log", is_flag=True, help="Print only; leave qtool.json as it is.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings along.")
@click.option("--json", "as_json", is_flag=True, help="Print the proof as JSON.")
def prove(
    artifact: str, engine: str | None, card: str | None, gpus: int, context: str, users: int, chunk: int, kv_dtype: str,
    dtype: str | None, python: str | None, patience: float, no_log: bool, trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Start ARTIFACT in a real server and hold it against the reference, the tokenizer and the plan.

    Log-probabilities on 64 fixed pieces of code, chat template and tool calls, stop tokens, a prompt that fills the
    context, the cache's blocks, memory, decode and prefill, and what a shared beginning saves. The proof goes into
    qtool.json, from where report, card and gates (`served: vllm`) have it. Exit code 1 where something fails.

    \b
    Examples:
      qtool prove artifacts/My-Model-awq --engine vllm --dtype float16
      qtool prove artifacts/My-Model-gguf --engine llama.cpp --context 4k --users 2
      qtool prove artifacts/My-Model-awq --python ~/vllm/bin/python --no-log --json
    """
    from qtool.report.served import print_proof
    from qtool.serve.prove import artifact_of, record
    from qtool.serve.prove import prove as prove_artifact

    opened = artifact_of(artifact)
    planned = _plan(artifact, engine, card, gpus, context, users, chunk, kv_dtype, dtype)
    _say(_what(planned))
    proof = prove_artifact(opened, planned, python, patience, _say, trust_remote_code)
    if not no_log:
        if opened.manifest is None:
            _say(f"{artifact} has no qtool.json: the proof is printed, not kept")
        record(opened, proof)
    if as_json:
        click.echo(json.dumps(proof.model_dump(), indent=2))
    else:
        print_proof(proof)
    if not proof.passed:
        raise SystemExit(FAILED)


def _plan(
    model: str, engine: str | None, card: str | None, gpus: int, context: str, users: int, chunk: int, kv_dtype: str,
    dtype: str | None, host: str = "127.0.0.1", port: int = PORT,
) -> PlannedServer:  # fmt: skip
    from qtool.serve.here import server_here

    asked: dict[str, Any] = {"engine": engine, "cards": gpus, "users": users, "kv_dtype": kv_dtype.lower()}
    asked |= {
        "context": one_number(context, "--context"),
        "dtype": dtype or "",
        "chunk": chunk,
        "host": host,
        "port": port,
    }
    return server_here(model, card, **asked)


def _typed(planned: PlannedServer, python: str | None) -> tuple[str, bool]:
    """The line for a shell, and whether the engine is here."""
    from dataclasses import replace

    from qtool.serve.programs import find_program, with_program

    launch, program = planned.launch, find_program(planned.facts, python)
    if program is None:
        return launch.text, False
    words = with_program(launch.words, program)
    return replace(launch, words=words).text, True


def _what(planned: PlannedServer) -> str:
    """What is about to be served, and how far its answers are right."""
    from qtool.sizing.plan import gib
    from qtool.sizing.serve_command import limits

    s, e, facts = planned.serving, planned.estimate, planned.facts
    blocks = f", {planned.blocks:,} blocks of {facts.block} tokens" if planned.blocks and facts.block > 1 else ""
    return (
        f"{s.name} in {facts.name}, {facts.served_dtype(s)}, on {s.cards} x {planned.setting.card.key}: {s.sequences} "
        f"users of {s.context:,} tokens; {gib(e.weights)} GiB weights, {gib(e.cache)} cache ({s.cache_type}{blocks}), "
        f"{gib(e.overhead.total)} beside them, of {gib(e.limit)}"
        + "".join(f"\n{line}" for line in limits(planned.headers, planned.setting))
    )


def _shared(planned: PlannedServer, tokens: int) -> str:
    from qtool.report.plan import shared_line
    from qtool.sizing.sharing import check_prefix, shared_prefix

    check_prefix(tokens, planned.serving.context)
    return shared_line(shared_prefix(planned.setting, tokens, planned.serving.sequences))


def _say(line: str) -> None:
    click.echo(line, err=True)
