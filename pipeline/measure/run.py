"""A measurement from its arguments: in this process for `qtool measure`; for a recipe, each model in a process of its
own, so that one's memory is not counted as another's and what runs out of memory takes nothing down."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import Progress

from qtool import QtoolError
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.files.source import resolve
from qtool.evaluate.engines.engine import package_versions
from qtool.evaluate.engines.openai import connect
from qtool.evaluate.sandbox.secrets import for_child
from qtool.measure.engines import Server, Transformers, Vllm, llama_cpp_machine
from qtool.measure.machine import less_device_memory, machine_name
from qtool.measure.measure import Engine, measure
from qtool.measure.scoring_engine import PACKAGES
from qtool.measure.subjects import Subject
from qtool.recipe.judging import MeasureSection
from qtool.runs.measurements import Measurement, Row, from_json, log, measured_models
from qtool.sizing.accelerators import Accelerator
from qtool.sizing.fit import Cell, Setting, cell_of
from qtool.sizing.formats import artifact_weights, weights_of
from qtool.sizing.headers import Headers, read_headers


@dataclass(frozen=True)
class Asked:
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
    api_key: str | None = None
    trust_remote_code: bool = False


def measure_model(asked: Asked) -> Measurement:
    """Measure; nothing is logged, and the key is left open. Raises QtoolError."""
    url = asked.model.startswith(("http://", "https://"))
    if url and "@" in asked.model:
        raise QtoolError("a URL with a password in it would end in the log: put the server's key into OPENAI_API_KEY.")
    known = asked.shape if url else asked.model
    headers = read_headers(known) if known else None
    engine_name = "server" if url else asked.engine
    if headers is not None:
        check_contexts("--context", asked.contexts, asked.tokens, headers.geometry.max_context, headers.name)
    setting = _setting(headers, engine_name, asked.card) if headers else None

    def predict(context: int, sequences: int) -> Cell | None:
        return None if setting is None else cell_of(setting, context + asked.tokens, sequences)

    with _engine(asked, headers, url) as engine:
        rows = tuple(measure(engine, asked.contexts, asked.batches, asked.tokens, asked.repeats, predict, asked.price))
    machine = asked.model if url else _machine(engine_name, asked.device)
    return Measurement(
        None, asked.model, engine_name, _version(engine_name), machine, asked.tokens, asked.repeats, _now(), rows
    )


def model_key(model: str) -> str | None:
    """As runs name it: an artifact's key, a source's commit; None for a URL. Reads all of a source folder."""
    if model.startswith(("http://", "https://")):
        return None
    return read_manifest(Path(model)).key if (Path(model) / MANIFEST).exists() else resolve(model).commit


def engine_of(model: str) -> str:
    """The engine that runs a folder where none was asked for."""
    return "llama.cpp" if any(Path(model).glob("*.gguf")) else "transformers"


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
            subject.key, subject.name, engine, _version(engine), _machine(engine, str(device)), section.tokens,
            section.repeats, _now(), tuple(cells),
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


def _machine(engine: str, device: str) -> str:
    found = llama_cpp_machine() if engine == "llama.cpp" else None
    return found or machine_name({"llama.cpp": "cpu", "vllm": "auto"}.get(engine, device))


def _version(engine: str) -> str:
    return package_versions(*PACKAGES.get(engine, ()))


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


def _setting(headers: Headers, engine: str, card: Accelerator | None) -> Setting | None:
    if card is None:
        return None
    weights = artifact_weights(headers) if headers.quantized else weights_of(headers, "source")
    named = "vllm" if engine == "server" else engine
    kv_dtype = "f16" if named == "llama.cpp" else "bf16"
    return Setting(headers.geometry, weights, named, card, 1, kv_dtype)


def _only_model(url: str) -> str:
    """As `qtool evaluate` takes it; a server that keeps no list of models takes any name. Raises QtoolError."""
    try:
        return connect(url, None).model
    except QtoolError as error:
        if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code in (404, 405, 501):
            return "default"
        raise


@contextmanager
def _engine(asked: Asked, headers: Headers | None, url: bool) -> Iterator[Engine]:
    longest, most = max(asked.contexts) + asked.tokens, max(asked.batches)
    if url:
        vocabulary = headers.geometry.vocab if headers else 1000
        name = asked.name or _only_model(asked.model)
        yield Server(asked.model, name, vocabulary, asked.api_key)
        return
    assert headers is not None
    open_engine: dict[str, Callable[[], Engine]] = {
        "transformers": lambda: Transformers(resolve(asked.model).path, asked.device, asked.trust_remote_code),
        "vllm": lambda: Vllm(resolve(asked.model).path, longest, most, headers.geometry.vocab),
    }
    if asked.engine in open_engine:
        if headers.gguf is not None:
            raise QtoolError(f"{asked.model}: holds a .gguf file; measure it with --engine llama.cpp.")
        yield open_engine[asked.engine]()
        return
    if headers.gguf is None:
        raise QtoolError(f"{asked.model}: holds no .gguf file; --engine llama.cpp needs one.")
    from qtool.evaluate.engines import llama_cpp

    with llama_cpp.serve(headers.gguf, longest, most) as address:
        yield Server(address, headers.gguf.stem, headers.geometry.vocab, inside=True)
