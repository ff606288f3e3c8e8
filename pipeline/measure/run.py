"""A measurement from its arguments: in this process for `qtool measure`; for a recipe, each model in a process of its
own, so that one's memory is not counted as another's and what runs out of memory takes nothing down."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import Progress

from qtool import QtoolError
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.files.source import resolve
from qtool.evaluate.engines.engine import Engine, Model, Use, package_versions
from qtool.evaluate.engines.facts import EngineFacts
from qtool.evaluate.engines.table import ENGINES, planned, planned_engine
from qtool.evaluate.sandbox.secrets import for_child
from qtool.measure.measure import measure
from qtool.measure.subjects import Subject
from qtool.recipe.judging import MeasureSection
from qtool.runs.measurements import Measurement, Row, from_json, less_device_memory, log, measured_models
from qtool.sizing.accelerators import Accelerator
from qtool.sizing.fit import Estimate, Setting, estimate_of
from qtool.sizing.formats import artifact_weights, weights_of
from qtool.sizing.headers import Headers, read_headers

SERVER, SERVED_AS = "server", "vllm"  # the engine's name in the ledger, and the one it is predicted as
UNKNOWN_VOCABULARY = 1000  # ids that every model has, for a server whose model is not told


@dataclass(frozen=True)
class Trial:
    """``model``: a folder, a shipped name, or a server's URL, whose ``shape`` is then told by a folder or config.json
    (None: nothing is predicted). ``name``: what the server calls its model (None: it has only one)."""

    model: str
    engine: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: int
    repeats: int
    device: str
    card: Accelerator | None
    price: float | None
    shape: str | None = None
    name: str | None = None
    trust_remote_code: bool = False

    @property
    def served(self) -> bool:
        """Whether the model is behind a URL."""
        return self.model.startswith(("http://", "https://"))


def measure_model(trial: Trial) -> Measurement:
    """Measure; nothing is logged, and the key is left open. Raises QtoolError."""
    if trial.served and "@" in trial.model:
        raise QtoolError("a URL with a password in it would end in the log: put the server's key into OPENAI_API_KEY.")
    known = trial.shape if trial.served else trial.model
    headers = read_headers(known) if known else None
    if headers is not None:
        check_contexts("--context", trial.contexts, trial.tokens, headers.geometry.max_context, headers.name)
    facts = planned_engine(SERVED_AS if trial.served else trial.engine)
    setting = _setting(headers, facts, trial.card) if headers else None

    def predict(context: int, sequences: int) -> Estimate | None:
        return None if setting is None else estimate_of(setting, context + trial.tokens, sequences)

    longest = max(trial.contexts) + trial.tokens
    use = Use(trial.device, max(trial.batches), lambda: longest, timed=True)
    engine, model = _opened(trial, headers)
    vocabulary = headers.geometry.vocab if headers else UNKNOWN_VOCABULARY
    with engine.open(model, use) as running:
        rows = tuple(measure(
            running.time, trial.contexts, trial.batches, trial.tokens, trial.repeats, predict, vocabulary, trial.price
        ))  # fmt: skip
    name = SERVER if trial.served else trial.engine
    machine = trial.model if trial.served else engine.machine(trial.device)
    version = package_versions(*engine.facts.packages)
    return Measurement(None, trial.model, name, version, machine, trial.tokens, trial.repeats, _now(), rows)


def _opened(trial: Trial, headers: Headers | None) -> tuple[Engine, Model]:
    """The engine, and the model as it finds it. Raises QtoolError where it does not run such a file."""
    if trial.served:
        engine = next(engine for engine in ENGINES.values() if engine.facts.served)
        return engine, Model(trial.model, base_url=trial.model, served=trial.name)
    assert headers is not None
    engine = ENGINES[trial.engine]
    if headers.gguf is not None and not engine.facts.gguf:
        raise QtoolError(f"{trial.model}: holds a .gguf file; measure it with --engine {engine_of(trial.model)}.")
    if headers.gguf is None and engine.facts.gguf:
        raise QtoolError(f"{trial.model}: holds no .gguf file; --engine {trial.engine} needs one.")
    path = None if engine.facts.gguf else resolve(trial.model).path
    return engine, Model(
        headers.name, path=path, gguf=headers.gguf, trust_remote_code=trial.trust_remote_code
    )  # fmt: skip


def model_key(model: str) -> str | None:
    """As runs name it: an artifact's key, a source's commit; None for a URL. Reads all of a source folder."""
    if model.startswith(("http://", "https://")):
        return None
    return read_manifest(Path(model)).key if (Path(model) / MANIFEST).exists() else resolve(model).commit


def engine_of(model: str) -> str:
    """The engine that runs a folder where none was asked for."""
    gguf = any(Path(model).glob("*.gguf"))
    return next(name for name, facts in planned().items() if facts.gguf == gguf)


def measure_subjects(
    section: MeasureSection, subjects: Sequence[Subject], device: torch.device, trusted: bool, runs: Path, bar: Progress
) -> None:
    """Measure what the ledger has not measured so on this machine, each model in its own process. What cannot be
    measured here is logged with the reason; it is tried again next time."""
    for subject in subjects:
        if subject.path is None:
            continue
        engine = engine_of(str(subject.path))
        cells = [Row(context, batch, "not run") for context in section.contexts for batch in sorted(section.batches)]
        wanted = Measurement(
            subject.key, subject.name, engine, package_versions(*ENGINES[engine].facts.packages),
            ENGINES[engine].machine(str(device)), section.tokens, section.repeats, _now(), tuple(cells),
        )  # fmt: skip
        known = measured_models(runs, {subject.name: subject.key}).get(subject.name, [])
        if any(wanted.repeats_of(m) and not any(row.status == "rejected" for row in m.rows) for m in known):
            continue
        step = bar.add_task(f"{subject.name}: measuring memory and speed", total=1)
        log(runs, _apart(wanted, section, subject.path, device, trusted))
        bar.advance(step)


def _apart(
    wanted: Measurement, section: MeasureSection, path: Path, device: torch.device, trusted: bool
) -> Measurement:
    """`qtool measure` in a process of its own."""
    words = [
        "--context", ",".join(map(str, section.contexts)), "--batch", ",".join(map(str, section.batches)),
        "--tokens", section.tokens, "--repeats", section.repeats, "--device", device, "--no-log", "--json",
    ]  # fmt: skip
    words += ["--price", section.price] if section.price is not None else []
    words += ["--trust-remote-code"] if trusted else []
    taken = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        taken = total - free  # by this process and others, all the while
    done = subprocess.run(
        [sys.executable, "-P", "-m", "qtool", "measure", str(path), *map(str, words)],
        capture_output=True, text=True, errors="replace", check=False, env=for_child(os.environ),
    )  # fmt: skip
    try:
        found = from_json(json.loads(done.stdout))
    except ValueError:
        return replace(wanted, rows=(), why=_reason(done))
    return replace(less_device_memory(found, taken), key=wanted.key, model=wanted.model)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"its process was killed by signal {-done.returncode}; memory ran out, most likely"
    lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]  # no progress bar
    errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return (errors or lines or [f"its process ended with code {done.returncode}"])[-1]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_contexts(key: str, contexts: Sequence[int], tokens: int, most: int | None, model: str) -> None:
    """``key``: where the contexts were asked for. Raises QtoolError for a prompt that is, with ``tokens`` after it,
    longer than the model's context (None: unknown)."""
    longest = max(contexts)
    if most is not None and longest + tokens > most:
        raise QtoolError(
            f"{key}: a prompt of {longest:,} tokens and {tokens} generated are more than the {most:,} that {model} was "
            "made for (max_position_embeddings in config.json). Ask for less."
        )


def _setting(headers: Headers, engine: EngineFacts, card: Accelerator | None) -> Setting | None:
    if card is None:
        return None
    weights = artifact_weights(headers) if headers.quantized else weights_of(headers, "source")
    return Setting(headers.geometry, weights, engine, card, 1, engine.cache_types[0].name)
