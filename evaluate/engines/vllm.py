"""The engine `vllm`: what it takes, refuses and is started with; `vllm_model` is its loaded model.

Memory is vLLM's own accounting with the constants named here. On a processor blocks are larger, nothing is captured,
and the cache gets the bytes that it is told (run with vLLM 0.32, scripts/check_serving.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qtool import QtoolError
from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.engine import Engine, Model, Running, Use
from qtool.evaluate.engines.facts import (
    BF16,
    CUDA_CONTEXT,
    F16,
    FP8,
    GIB,
    MIB,
    Card,
    Efficiency,
    EngineFacts,
    Launch,
    Load,
    Metrics,
    OffloadRule,
    Overhead,
    Serving,
)

if TYPE_CHECKING:
    from qtool.evaluate.engines.probe import Probe

BLOCK = 16  # tokens to a block of the cache (CacheConfig.block_size on CUDA)
PROCESSOR_BLOCK = 128  # and on a processor (platforms/cpu.py)
PROCESSES = 2048 * MIB  # server, engine and worker on a processor, before weights and cache: 620 to 650 MiB each
PROCESSOR_SHARE = 0.9  # of the memory that is free, of which it is told nothing
UTILIZATION = 0.92  # CacheConfig.gpu_memory_utilization
GRAPHS = 512 * MIB  # captured CUDA graphs, which lie outside the profiled peak
PARALLEL = 1024 * MIB  # NCCL and all-reduce buffers of a rank
LARGE_CARD = 70 * GIB  # it batches more tokens above this, but for the A100


def prefill_tokens(card: Card) -> int:
    """Default max_num_batched_tokens of `vllm serve` (engine/arg_utils.py, get_batch_defaults)."""
    return 8192 if card.memory >= LARGE_CARD and "A100" not in card.name else 2048


def cells(block: int) -> Callable[[int, int | None, int], int]:
    """Blocks of a cache; a sliding layer's has its window and one chunk (v1/core/single_type_kv_cache_manager.py)."""

    def tokens(context: int, window: int | None, chunk: int) -> int:
        if window is None:
            return -(-context // block) * block
        held = min(context, window - 1 + chunk)
        return min(-(-held // block) + 1, -(-context // block)) * block

    return tokens


def overhead(load: Load) -> Overhead:
    """What vLLM's profiling finds before the rest is given to the cache.

    It is the larger of two. A forward of the largest batch holds fused gate and up, their product, residual and hidden
    states, and what each of a token's experts made of it. Sampling for the sequences (vLLM's max_num_seqs) holds logits
    in 16 and 32 bits, a sorted copy, its int64 order and probabilities. The context, CUDA graphs and NCCL come on top.
    """
    g = load.geometry
    forward = (3 * g.mlp_width // load.cards + (3 + g.active) * g.hidden) * g.width * prefill_tokens(load.card)
    sampling = g.vocab * load.sequences * (g.width + 4 + 4 + 8 + 4)
    parallel = PARALLEL if load.cards > 1 else 0
    return Overhead(max(forward, sampling), CUDA_CONTEXT + GRAPHS + parallel)


def split_faults(geometry: Geometry, group: int, cards: int) -> list[str]:
    """Why ``cards`` tensor-parallel ranks cannot share the model; ``group``: columns to a scale."""
    faults = []
    if geometry.heads % cards:
        faults.append(f"{geometry.heads} heads do not divide by {cards}")
    if geometry.kv_heads % cards and cards % geometry.kv_heads:
        faults.append(f"{geometry.kv_heads} key/value heads neither divide by {cards} nor divide it")
    dense = geometry.intermediate if geometry.sparse_layers < geometry.layers else 0
    widths = {"intermediate_size": dense, "an expert's width": geometry.expert_width,
              "the shared expert's width": geometry.shared_width}  # fmt: skip
    uneven = [f"{what} {width} does not divide by {cards}" for what, width in widths.items() if width % cards]
    if uneven or group <= 1:
        return faults + uneven
    inputs = {"down_proj": dense, "an expert's down_proj": geometry.expert_width,
              "the shared expert's down_proj": geometry.shared_width, "o_proj": geometry.q_row}  # fmt: skip
    for what, columns in inputs.items():
        if columns % cards or columns // cards % group:
            faults.append(f"{what}: {columns} columns / {cards} do not divide by the group size {group}")
    return faults


def processor_overhead(load: Load) -> Overhead:
    """A forward of the largest batch, the processes themselves, and what they keep beside the weights: embedding and
    head once more, packed for oneDNN (vocab_parallel_embedding.py packs both and removes neither)."""
    g = load.geometry
    packed = g.vocab * g.hidden * g.width * (1 if g.tied else 2)
    return replace(overhead(load), fixed=PROCESSES + packed)


def _dtype(serving: Serving) -> str:
    from qtool.convert.runtimes.vllm import dtype_flag

    return serving.dtype or dtype_flag(serving.config) or serving.served_dtype


def _launch(serving: Serving) -> Launch:
    words = ["vllm", "serve", serving.place, "--max-model-len", str(serving.context)]
    words += ["--max-num-seqs", str(serving.sequences)]
    words += ["--revision", serving.revision] if serving.revision else []
    dtype = _dtype(serving)
    words += ["--dtype", dtype] if dtype else []
    words += ["--tensor-parallel-size", str(serving.cards)] if serving.cards > 1 else []
    words += ["--kv-cache-dtype", "fp8"] if serving.cache_type == "fp8" else []
    words += ["--enable-chunked-prefill", "--max-num-batched-tokens", str(max(serving.prefill, serving.sequences))]
    words += ["--enable-prefix-caching" if serving.prefix_cache else "--no-enable-prefix-caching"]
    if serving.processor:  # compiling takes minutes there and a C++ compiler
        words += ["--kv-cache-memory-bytes", str(serving.cache_bytes), "--enforce-eager"]
    else:
        words += ["--gpu-memory-utilization", f"{serving.share:g}"]
    words += serving.offload.split()
    words += ["--served-model-name", serving.name] if serving.name else []
    words += ["--host", serving.host, "--port", str(serving.port)]
    return Launch(tuple(words))


def _refusals(config: Mapping[str, Any]) -> list[str]:
    from qtool.convert.formats.table import runtime_of

    section = config.get("quantization_config") or {}
    runtime = runtime_of(section, FACTS.name)
    if runtime is None:
        return [f"vLLM knows no quant_method {section.get('quant_method')!r}"] if section else []
    return [*runtime.refuses(section), *runtime.refuses_model(config)]


def _plugin(config: Mapping[str, Any]) -> str:
    from qtool.convert.formats.table import runtime_of

    runtime = runtime_of(config.get("quantization_config") or {}, FACTS.name)
    return runtime.note if runtime else ""


METRICS = Metrics(
    prefix="vllm:",
    since="vLLM 0.32",
    label="model_name",
    cache="vllm:kv_cache_usage_perc",
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    preempted="vllm:num_preemptions_total",
    prompt="vllm:prompt_tokens_total",
    generated="vllm:generation_tokens_total",
    hits="vllm:prefix_cache_hits_total",
    asked=("vllm:prefix_cache_queries_total",),
    first="vllm:time_to_first_token_seconds",
    step="vllm:inter_token_latency_seconds",
)

FACTS = EngineFacts(
    name="vllm",
    packages=("vllm", "torch", "transformers", "compressed-tensors", "vllm-bnb-plugin"),
    install="pip install vllm (in an environment of its own; it brings its own torch; for a CPU: docs/vllm.md)",
    place="as built",
    cache_types=(BF16, F16, FP8),
    judged_caches=(FP8,),
    cells=cells(BLOCK),
    prefill_tokens=prefill_tokens,
    overhead=overhead,
    memory_share=UTILIZATION,
    takes_all=True,
    offload=OffloadRule(flag=lambda units, layers: f"--cpu-offload-gb {units}", unit=GIB),
    split_faults=split_faults,
    efficiency=Efficiency(0.50, 0.35, 0.35, 20e-6, 8e-3),  # it replays graphs
    metrics=METRICS,
    image="vllm/vllm-openai:v0.32.0",
    command_in_image=("vllm", "serve"),
    bench=("vllm", "bench", "serve"),
    bundle=("recipe", "production-stack", "llm-d", "kserve", "compose", "alerts", "dashboard", "load"),
    launch=_launch,
    served_dtype=_dtype,
    program="vllm",
    module="vllm.entrypoints.cli.main",
    package="vllm",
    block=BLOCK,
    spare_blocks=1,
    load=lambda download: [(f"vllm serve {download.place}", "bash")],
    refuses_card=lambda card: f"vLLM does not run on {card.key}; take a GGUF format" if card.unified else "",
    refuses_model=_refusals,
    needs_beside=_plugin,
    refuses_gguf=(
        "vLLM finds no weights in a folder with a .gguf file; the file alone it takes with vllm-gguf-plugin, on an "
        "accelerator"
    ),
)
FACTS = replace(
    FACTS,
    processor=replace(
        FACTS,
        cells=cells(PROCESSOR_BLOCK),
        block=PROCESSOR_BLOCK,
        overhead=processor_overhead,
        memory_share=PROCESSOR_SHARE,
        takes_all=False,
        offload=None,
        efficiency=Efficiency(0.05, 0.05, 0.02, 1e-3, 50e-3),
    ),
)


@contextmanager
def _open(model: Model, use: Use) -> Iterator[Running]:
    if model.path is None:
        raise QtoolError(f"{model.name}: engine vllm runs model folders only.")
    from qtool.evaluate.engines.vllm_model import closing, load

    timed = use.slots if use.timed else None
    loaded = load(
        FACTS, model.path, model.tokenizer, use.context(), model.trust_remote_code, timed, use.condition.cache
    )
    with closing(loaded) as running:
        yield running


def _used(model: Model) -> tuple[str, str]:
    from qtool.evaluate.engines.vllm_model import used

    return used(FACTS, model.path, model.trust_remote_code) if model.path else (FACTS.place, FACTS.dtype(""))


def probe() -> Probe:
    """How its server is proved."""
    from qtool.evaluate.engines.vllm_probe import PROBE

    return PROBE


ENGINE = Engine(FACTS, _open, used=_used, machine=lambda device: machine.machine_name("auto"))
