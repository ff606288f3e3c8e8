"""`qtool prove`: an artifact started in a real server, held against the reference, the tokenizer and the plan."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.durable import write_whole
from qtool.convert.files.manifest import MANIFEST
from qtool.convert.files.proof import Finding, Proof, replaced
from qtool.convert.files.reading import read_json
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate.engines.machine import device_used, machine_name
from qtool.evaluate.engines.probe import Best, Probe
from qtool.evaluate.engines.server import ServedModel
from qtool.evaluate.engines.table import PROBES
from qtool.serve import findings as look
from qtool.serve import parity, process, quantities
from qtool.serve.process import Server, free_port
from qtool.serve.programs import require_program
from qtool.serve.running import running, smoke
from qtool.sizing.serving import PlannedServer

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Seen:
    """What was learnt while the server ran; the reference is asked after it, when its memory is free again."""

    version: str
    kernels: list[str]
    told: list[list[Best]]
    findings: list[Finding]
    numbers: dict[str, float]


def probe_of(planned: PlannedServer) -> Probe:
    """Raises QtoolError for an engine whose server cannot be proved here."""
    name = planned.facts.name
    if name not in PROBES:
        why = f": {planned.facts.untried}" if planned.facts.untried else ""
        raise QtoolError(f"--engine {name}: not proved{why}. Proofs are made in {', '.join(PROBES)}.")
    return PROBES[name]()


def prove(
    artifact: Artifact, planned: PlannedServer, python: str | None = None, patience: float = process.PATIENCE,
    say: Say = lambda line: None, trust_remote_code: bool = False,
) -> Proof:  # fmt: skip
    """Start the planned server on a free port and look at everything. A finding that fails is a result; QtoolError
    (exit 3) is raised where the server cannot be started, dies, or answers what no server answers."""
    probe = probe_of(planned)
    require_program(planned.facts, python)
    command = _command(planned)
    planned = replace(planned, serving=replace(planned.serving, port=free_port(planned.serving.host)))
    tokenizer = load_tokenizer(artifact.path, trust_remote_code)
    rows = parity.prompt_ids(tokenizer, planned.serving.context - 1)
    taken = None if planned.setting.card.processor else device_used()
    say(f"{planned.facts.name}: starting")
    with running(planned, python, patience) as server:
        try:
            seen = _look(artifact, planned, server, probe, tokenizer, rows, taken, say)
        except QtoolError as error:
            raise server.explained(error, "does not answer") from error
    say("reference: the same tokens")
    s, dtype = planned.serving, planned.facts.served_dtype(planned.serving)
    agreed = _agreement(artifact, probe, dtype, rows, seen, trust_remote_code)
    device = "cpu" if planned.setting.card.processor else "auto"
    return Proof(
        engine=planned.facts.name, version=seen.version, machine=machine_name(device), dtype=dtype,
        cache_type=s.cache_type, context=s.context, users=s.sequences, time=_now(), command=command,
        kernels=seen.kernels, numbers=seen.numbers, findings=[agreed, *seen.findings],
    )  # fmt: skip


def _look(
    artifact: Artifact, planned: PlannedServer, server: Server, probe: Probe, tokenizer: Any, rows: list[list[int]],
    taken: int | None, say: Say,
) -> _Seen:  # fmt: skip
    numbers: dict[str, float] = {}
    name = planned.serving.name
    text, numbers["smoke_seconds"] = smoke(planned, server)
    say(f"{planned.facts.name}: answers ({text[:40]!r}); templates, stops, length, cache, speed")
    served = ServedModel(f"{server.url}/v1", name)
    found = [*look.templates(planned, server, probe, tokenizer)]
    found.append(look.stops(planned, server, end_tokens(artifact), rows[0]))
    found += look.longest_prompt(planned, server, numbers)
    found.append(quantities.cache(planned, server, probe, numbers))
    found += quantities.speed(planned, served, numbers)
    found.append(quantities.shared(planned, server, probe, numbers))
    found.append(quantities.chunked(planned, server, probe, numbers))
    found.append(quantities.preempted(server, probe, numbers))
    found.append(quantities.memory(planned, quantities.held(planned, server, taken), numbers))
    say(f"{planned.facts.name}: log-probabilities of {len(rows)} prompts")  # last: each takes a row of the vocabulary
    told = [probe.forced(server.url, name, row, parity.COUNT) for row in rows]
    lines = server.log()
    return _Seen(probe.version(server.url, lines), probe.kernels(lines), told, found, numbers)


def _agreement(
    artifact: Artifact, probe: Probe, dtype: str, rows: list[list[int]], seen: _Seen, trust_remote_code: bool
) -> Finding:
    reference = parity.Reference(artifact, trust_remote_code)
    found = parity.compare(rows, seen.told, reference.logprobs(rows))
    limit, least, why = parity.LIMIT, parity.LEAST_TOP1, ""
    if dtype == "bfloat16" or probe.rounded:
        floor = reference.floor(rows, probe.rounded)
        limit = max(limit, parity.FLOOR_FACTOR * floor.kl)
        least = min(least, 1 - parity.FLIPS_FACTOR * (1 - floor.top1))
        seen.numbers.update(kl_floor=floor.kl, top1_floor=floor.top1)
        what = "8-bit activations alone cost" if probe.rounded else "bfloat16 alone costs"
        why = f"; {what} this model {floor.kl:.2g} (top-1 {floor.top1:.2%})"
    if not math.isfinite(found.kl):
        return Finding(what="log-probabilities", outcome="fail", detail="the server's are no probabilities")
    seen.numbers.update(kl=found.kl, kl_limit=limit, top1=found.top1, kl_worst=found.worst, tokens=found.tokens)
    detail = (
        f"mean KL {found.kl:.2g} nats a token (at most {limit:.2g}) on {found.tokens:,} tokens, top-1 {found.top1:.2%} "
        f"(at least {least:.2%}), worst {found.worst:.2g} at token {found.position} of prompt {found.prompt}{why}"
    )
    good = found.kl <= limit and found.top1 >= least
    return Finding(what="log-probabilities", outcome="pass" if good else "fail", detail=detail)


def _command(planned: PlannedServer) -> str:
    """As it is typed beside the artifact's folder: where that lay here is nobody's business."""
    s = planned.serving
    name = Path(s.place).resolve().name
    file = None if s.file is None else Path(name, s.file.name)
    return replace(planned, serving=replace(s, place=name, file=file)).launch.text


def end_tokens(artifact: Artifact) -> list[int]:
    """Ids that end an answer, as generation_config.json says, else config.json."""
    file = artifact.path / "generation_config.json"
    said = read_json(file).get("eos_token_id") if file.is_file() else None
    said = artifact.config.get("eos_token_id") if said is None else said
    return [int(token) for token in (said if isinstance(said, list) else [said]) if isinstance(token, int)]


def record(artifact: Artifact, proof: Proof) -> Artifact:
    """Write the proof into qtool.json; an older one of the same engine and dtype goes. An artifact without manifest has
    no place for it."""
    if artifact.manifest is None:
        return artifact
    changed = artifact.manifest.model_copy(update={"proofs": replaced(artifact.manifest.proofs, proof)})
    write_whole(artifact.path / MANIFEST, json.dumps(changed.model_dump(), indent=2, ensure_ascii=False) + "\n")
    return Artifact.open(artifact.path)


def proved_so(artifact: Artifact, planned: PlannedServer) -> Proof | None:
    """A proof of this very server that passed, made here before."""
    s = planned.serving
    wanted = (planned.facts.name, planned.facts.served_dtype(s), s.cache_type, s.context, s.sequences)
    for proof in artifact.manifest.proofs if artifact.manifest else []:
        if wanted == (proof.engine, proof.dtype, proof.cache_type, proof.context, proof.users) and proof.passed:
            return proof
    return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def artifact_of(model: str) -> Artifact:
    """A finished artifact's folder. Raises QtoolError."""
    return Artifact.open(Path(model))
