"""The engine `llama.cpp`: a .gguf file served by llama.cpp itself, in this process, on the loopback interface.

Memory follows from what its graphs keep alive (tests compare the figures with what it says that it allocates).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import QtoolError
from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines.engine import Engine, Model, Running, Use, package_versions
from qtool.evaluate.engines.facts import (
    BF16,
    CUDA_CONTEXT,
    F16,
    MIB,
    Q4_0,
    Q8_0,
    Download,
    Efficiency,
    EngineFacts,
    Launch,
    Load,
    Metrics,
    OffloadRule,
    Overhead,
    Serving,
)
from qtool.evaluate.engines.machine import machine_name

if TYPE_CHECKING:
    from qtool.evaluate.engines.probe import Probe

PATIENCE = 30  # seconds that the server waits for the rest of a request, and at its end for whoever began one
BATCH = 2048  # tokens that are taken up at once (n_batch)
UBATCH = 512  # tokens of one graph (n_ubatch)
BUILD = 11549  # whose server was run here (the last part of xllamacpp 2026.10.11549)
PAD = 256  # cells are padded to this (src/llama-context.cpp, GGML_PAD(n_ctx, 256))
PROGRAM = 256 * MIB  # the server itself, on a processor
PROCESSOR_SHARE = 0.9  # of the memory that is free
MARGIN = 0.98  # of the card: it leaves no reserve of its own, the driver and the display need some


def cells(context: int, window: int | None, chunk: int = 0) -> int:
    """A sliding layer keeps its window and one batch, whatever the ``chunk`` (src/llama-kv-cache-iswa.cpp)."""
    held = context if window is None else min(context, window + UBATCH)
    return -(-held // PAD) * PAD


def sliding_cells(geometry: Geometry, context: int) -> int:
    """Tokens that the cache of a sliding layer has room for, 0 where none slides."""
    windows = [window for window in geometry.windows if window is not None] if geometry.llama_cpp_windows else []
    return cells(context, windows[0]) if windows and geometry.loops == 1 else 0


def compute_buffer(
    geometry: Geometry, cells: int, context: int, flash_attention: bool = True, ubatch: int = UBATCH, sliding: int = 0
) -> int:
    """Bytes of the compute buffer for graphs of ``ubatch`` tokens, float32. ``cells``: cache cells that one sequence's
    attention spans; ``context``: n_ctx of all sequences, which no batch exceeds; ``sliding``: cells of the layers that
    slide, which have a mask of their own.

    With flash attention the feed-forward part is the widest (three intermediates, five hidden states) and the mask is
    float16; without, keys and values are copied, scores of every head are whole, and the mask is float32. Fitted to
    what llama.cpp allocates (tests/test_llama_cpp_memory.py).
    """
    g, tokens = geometry, min(ubatch, context)
    forward = _widest(g)
    if flash_attention:
        return tokens * (4 * (forward + 10) + 2 * (cells + sliding))
    attention = 3 * (g.q_row + g.hidden) + g.heads * cells
    return tokens * 4 * (max(forward, attention) + 2 * g.kv_row + cells + sliding + 5)


def _widest(geometry: Geometry) -> int:
    """Numbers of one token that a layer's feed-forward part keeps at once. Of a mixture, those of all experts that work
    on it; what they made lies where gate and up lay, unless it has no room there."""
    g = geometry
    mixed = g.active * g.expert_width
    made = g.active * g.hidden if g.hidden > 2 * g.expert_width else 0
    dense = g.intermediate if g.sparse_layers < g.layers else 0
    return max(3 * dense, 3 * mixed + made if g.sparse_layers else 0) + 5 * g.hidden


def overhead(load: Load) -> Overhead:
    """Compute buffer, logits of one token a sequence, and the CUDA context where there is one."""
    each = cells(load.context, None)
    buffer = compute_buffer(
        load.geometry, each, each * load.sequences, sliding=sliding_cells(load.geometry, load.context)
    )
    program = 0 if load.card.cuda or not load.card.processor else PROGRAM
    return Overhead(buffer + 4 * load.geometry.vocab * load.sequences, CUDA_CONTEXT if load.card.cuda else program)


def _launch(serving: Serving) -> Launch:
    file = str(serving.file) if serving.file else serving.default_file
    words = ["llama-server", "-m", file, "-c", str(serving.context * serving.sequences)]
    words += ["-np", str(serving.sequences)]
    words += serving.offload.split() if serving.offload else ["-ngl", "99"]
    words += ["-fa", "on", "-b", str(serving.prefill), "-ub", str(min(UBATCH, serving.prefill))]
    if serving.cache_type != "f16":
        words += ["-ctk", serving.cache_type, "-ctv", serving.cache_type]
    words += [] if serving.prefix_cache else ["--no-cache-prompt"]
    words += ["--alias", serving.name] if serving.name else []
    return Launch((*words, "--metrics", "--host", serving.host, "--port", str(serving.port)))


def _load(download: Download) -> list[tuple[str, str]]:
    file = next(name for name in download.files if name.endswith(".gguf") and name != "imatrix.gguf")
    found = [(f"{download.fetch}\nllama-server -m {download.folder}{file}", "bash")]
    if "Modelfile" in download.files:
        found.append((f"cd {download.folder}\nollama create {download.name.lower()} -f Modelfile", "bash"))
    return found


METRICS = Metrics(  # no histograms, no use of the cache, no preemptions: a request that does not fit is refused
    prefix="llamacpp:",
    since=f"llama.cpp b{BUILD}",
    switch="--metrics",
    running="llamacpp:requests_processing",
    waiting="llamacpp:requests_deferred",
    prompt="llamacpp:prompt_tokens_total",
    generated="llamacpp:tokens_predicted_total",
    hits="llamacpp:prompt_tokens_cached_total",
    asked=("llamacpp:prompt_tokens_total", "llamacpp:prompt_tokens_cached_total"),
    step_mean=("llamacpp:tokens_predicted_seconds_total", "llamacpp:tokens_predicted_total"),
)

FACTS = EngineFacts(
    name="llama.cpp",
    packages=("xllamacpp",),
    install="pip install 'qtool-llm[gguf]'",
    place="cpu",
    gguf=True,
    cache_types=(F16, BF16, Q8_0, Q4_0),
    judged_caches=(BF16, Q8_0, Q4_0),
    cells=cells,
    slides=lambda geometry: geometry.llama_cpp_windows,
    prefill_tokens=lambda card: BATCH,
    overhead=overhead,
    memory_share=MARGIN,
    embedding_on_card=False,  # it lies in host memory; a tied one is copied as head
    offload=OffloadRule(
        flag=lambda units, layers: f"-ngl {layers - units + 1}",
        computed_there=True,
        experts=lambda layers: f"-ngl 99 --n-cpu-moe {layers}",  # in short for -ot "blk.N.ffn_.*_exps.=CPU"
    ),
    efficiency=Efficiency(0.40, 0.25, 0.15, 60e-6, 5e-3),
    metrics=METRICS,
    image=f"ghcr.io/ggml-org/llama.cpp:server-cuda-b{BUILD}",
    command_in_image=("llama-server",),
    bundle=("preset", "modelfile", "compose", "alerts", "dashboard", "load"),
    launch=_launch,
    served_dtype=lambda serving: "as stored",
    program="llama-server",
    module="qtool.evaluate.engines.llama_server",
    package="xllamacpp",
    shares=False,  # each slot has cells of its own; the next request to a slot reuses what begins alike
    load=_load,
)
FACTS = replace(FACTS, processor=replace(FACTS, embedding_on_card=True, offload=None, memory_share=PROCESSOR_SHARE))


def installed() -> bool:
    """Whether llama.cpp is here."""
    return importlib.util.find_spec("xllamacpp") is not None


@contextmanager
def serve(
    file: Path, context: int, slots: int = 1, repack: bool = True, metrics: bool = False, cache: str = "",
    exact: bool = False,
) -> Iterator[str]:  # fmt: skip
    """Load ``file`` and answer under the yielded base URL until the block ends. ``context``: tokens to each of
    ``slots`` requests at a time; ``repack``: copy weights into the order that this processor is fastest with;
    ``metrics``: answer at /metrics, too; ``cache``: the type of keys and values, "" for its own; ``exact``: keys and
    values in float32, and no flash attention, which rounds them to float16. Raises QtoolError when
    llama.cpp is not installed or cannot load the file (exit 3), or cannot read its chat template."""
    try:
        import xllamacpp
    except ImportError as error:
        raise QtoolError(
            f"engine llama.cpp needs xllamacpp, which is not installed here. Run: {FACTS.install}", 3
        ) from error
    from concurrent.futures import ThreadPoolExecutor

    from qtool.convert.formats.gguf.header import read_header
    from qtool.evaluate.engines.server import ask

    try:
        read_header(file)  # llama.cpp believes what a header claims
    except ValueError as error:
        raise QtoolError(f"{file}: not a whole GGUF file ({error}).") from error
    params: Any = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), context * slots, slots
    params.cpuparams.n_threads = os.cpu_count() or 1
    params.endpoint_metrics = metrics
    if cache:  # values of a quantized type need flash attention, which its automatic choice takes then
        params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, 0  # only errors are said
    params.no_extra_bufts = not repack
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.timeout_read = params.timeout_write = PATIENCE

    def start() -> Any:
        started = xllamacpp.Server(params)
        # It listens before its loop runs, and told to end in between it would wait for ever: the loop answers this.
        ask(f"{started.listening_address}/slots")
        return started

    try:
        with ThreadPoolExecutor(max_workers=1) as starter:  # where no Ctrl-C can come in between
            running = starter.submit(start).result()
    except RuntimeError as error:
        params.chat_template = "chatml"  # of the file's own it renders a sample before it answers anything
        with suppress(RuntimeError):
            start()
            raise QtoolError(
                f"{file}: llama.cpp does not serve it: it cannot read the model's chat template. Write that without "
                "what llama.cpp's own Jinja lacks (chat_template.jinja of the source), or leave it out."
            ) from error
        raise QtoolError(f"{file}: llama.cpp cannot load it ({error}).", exit_code=3) from error
    try:
        yield f"{running.listening_address}/v1"
    finally:
        del running


@contextmanager
def _open(model: Model, use: Use) -> Iterator[Running]:
    if model.gguf is None:
        raise QtoolError(f"{model.name}: engine llama.cpp runs .gguf files only; use engine reference.")
    from qtool.evaluate.engines.server import ServedModel

    with serve(model.gguf, use.context(), use.slots, cache=use.condition.cache) as url:
        yield ServedModel(
            url, model.gguf.stem, name=FACTS.name, version=package_versions(*FACTS.packages), dtype=FACTS.dtype("cpu"),
            device=FACTS.place, tokenizer=model.tokenizer, inside=True,
            options={"top_k": 0, "min_p": 0.0},  # its own defaults cut more than top_p does
        )  # fmt: skip


def probe() -> Probe:
    """How its server is proved."""
    from qtool.evaluate.engines.llama_cpp_probe import PROBE

    return PROBE


def _machine(device: str) -> str:
    """The card that it computes on here; this machine's processor where it was built for that alone, or is missing."""
    try:
        import xllamacpp
    except ImportError:
        return machine_name("cpu")
    cards = [found for found in xllamacpp.get_device_info() if "GPU" in found["type"].name]
    return str(cards[0]["description"]) if cards else machine_name("cpu")


ENGINE = Engine(FACTS, _open, machine=_machine)
