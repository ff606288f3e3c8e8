"""Does it fit, how long a context, how many sequences, how fast at best: weights on a card, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qtool.convert.models.geometry import Geometry
from qtool.sizing.accelerators import Accelerator
from qtool.sizing.bounds import Range, decode_seconds, offload_seconds, prefill_seconds
from qtool.sizing.formats import Weights
from qtool.sizing.kv_cache import cells, kv_bytes, sliding_cells
from qtool.sizing.workspace import (
    ALLOCATOR_SLACK,
    VLLM_UTILIZATION,
    Overhead,
    llama_cpp_overhead,
    transformers_overhead,
    vllm_batch_tokens,
    vllm_overhead,
)

GIB = 2**30
LIMIT = 1 << 22  # tokens or sequences beyond which nobody looks
HOST_BANDWIDTH = 80e9  # bytes/s, two channels of DDR5: what llama.cpp's layers outside the card read from
LLAMA_CPP_MARGIN = 0.98  # of the card: llama.cpp leaves no reserve of its own, the driver and the display need some


@dataclass(frozen=True)
class Setting:
    """One way to serve: the model's shape, its weights in a format, engine, card and how many of them."""

    geometry: Geometry
    weights: Weights
    engine: str
    card: Accelerator
    cards: int = 1
    kv_dtype: str = "bf16"

    @property
    def limit(self) -> int:
        """Bytes of each card that the engine takes."""
        share = {"vllm": VLLM_UTILIZATION, "llama.cpp": LLAMA_CPP_MARGIN}.get(self.engine, 1.0)
        return int(self.card.memory * share)

    @property
    def resident(self) -> int:
        """Bytes of weights on each card. llama.cpp leaves the embedding in host memory, and copies a tied one as head;
        tensor parallelism splits all but norms; transformers and llama.cpp give each card its share of the layers."""
        w = self.weights
        on_cards = w.layers + (w.head or w.embedding) + w.other if self.engine == "llama.cpp" else w.nbytes
        return -(-(on_cards - w.other) // self.cards) + w.other

    @property
    def at_once(self) -> int:
        """Cards that work at the same time: tensor parallel in vLLM, one after the other elsewhere."""
        return self.cards if self.engine == "vllm" else 1


@dataclass(frozen=True)
class Cell:
    """One context and number of sequences: bytes on each card and ranges of seconds (``first_token`` None where the
    card's rate is unknown)."""

    context: int
    sequences: int
    weights: int
    cache: int
    overhead: Overhead
    limit: int
    step: Range
    first_token: Range | None

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.overhead.total

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True)
class Offload:
    """What goes on where a setting does not fit: ``moved`` bytes outside the card, the engine's own flag for it, and
    the seconds of one decode step."""

    moved: int
    flag: str
    step: Range
    why: str


def cache_of(setting: Setting, context: int, sequences: int) -> int:
    """Bytes of the cache on each card."""
    chunk = vllm_batch_tokens(setting.card) if setting.engine == "vllm" else 0
    ranks = setting.at_once
    nbytes = kv_bytes(setting.geometry, setting.engine, context, sequences, setting.kv_dtype, chunk, ranks)
    return nbytes if ranks > 1 else -(-nbytes // setting.cards)


def overhead_of(setting: Setting, context: int, sequences: int) -> Overhead:
    """Activations, logits, context and graphs on each card."""
    g, card = setting.geometry, setting.card
    if setting.engine == "vllm":
        return vllm_overhead(g, card, setting.cards, sequences)
    if setting.engine == "llama.cpp":
        each = cells("llama.cpp", context, None)
        return llama_cpp_overhead(g, each, each * sequences, sequences, card.cuda, sliding_cells(g, context))
    found = transformers_overhead(g, context, sequences, card.compute, setting.weights.largest)
    return Overhead(int(found.activations * (1 + ALLOCATOR_SLACK)), found.fixed)


def cell_of(setting: Setting, context: int, sequences: int) -> Cell:
    """Everything about one context and number of sequences."""
    cache = cache_of(setting, context, sequences)
    return Cell(
        context, sequences, setting.resident, cache, overhead_of(setting, context, sequences), setting.limit,
        _step(setting, context, sequences), _first(setting, context, sequences),
    )  # fmt: skip


def fits(setting: Setting, context: int, sequences: int) -> bool:
    """Whether the setting holds so much (without the speeds: it is asked often)."""
    beside = cache_of(setting, context, sequences) + overhead_of(setting, context, sequences).total
    return setting.resident + beside <= setting.limit


def largest_context(setting: Setting, sequences: int = 1) -> int:
    """Tokens that each of ``sequences`` can have, at most the model's own context; 0 where nothing fits."""
    most = setting.geometry.max_context or LIMIT
    return _largest(lambda context: fits(setting, context, sequences), most)


def most_sequences(setting: Setting, context: int) -> int:
    """Sequences of ``context`` tokens that fit at once."""
    return _largest(lambda sequences: fits(setting, context, sequences), 4096)


def parallel_faults(geometry: Geometry, weights: Weights, cards: int) -> list[str]:
    """Why ``cards`` tensor-parallel ranks cannot share the model (vLLM's rules); empty where they can."""
    if cards == 1:
        return []
    faults = []
    if geometry.heads % cards:
        faults.append(f"{geometry.heads} heads do not divide by {cards}")
    if geometry.kv_heads % cards and cards % geometry.kv_heads:
        faults.append(f"{geometry.kv_heads} key/value heads neither divide by {cards} nor divide it")
    if geometry.intermediate % cards:
        faults.append(f"intermediate_size {geometry.intermediate} does not divide by {cards}")
    elif weights.group > 1:
        for what, columns in (("down_proj", geometry.intermediate), ("o_proj", geometry.heads * geometry.head_dim)):
            if columns % cards or columns // cards % weights.group:
                faults.append(f"{what}: {columns} columns / {cards} do not divide by the group size {weights.group}")
    return faults


def offload_of(setting: Setting, context: int, sequences: int, host: float = HOST_BANDWIDTH) -> Offload | None:
    """What the engine can leave outside the cards so that the rest fits; None where even that does not help.

    vLLM and transformers bring the moved weights over the host link at each step; llama.cpp computes its moved layers
    where they lie, at the speed of host memory (``host``: bytes/s), cache included.
    """
    w, g = setting.weights, setting.geometry
    over = cell_of(setting, context, sequences).total - setting.limit
    if over <= 0 or setting.card.unified:
        return None
    layer = -(-w.layers // g.layers)
    if setting.engine == "llama.cpp":
        cache = -(-cache_of(setting, context, sequences) * setting.cards // g.layers)
        out = -(-over * setting.cards // (layer + cache))
        if out > g.layers:
            return None
        moved = out * (layer + cache)
        elsewhere, flag = offload_seconds(moved, host), f"-ngl {g.layers - out + 1}"
        why = f"{out} of {g.layers} layers and their cache in host memory, computed there at {host / 1e9:.0f} GB/s"
        why += " (assumed)" if host == HOST_BANDWIDTH else ""
    elif setting.card.host_link is None or over > w.layers // setting.cards:
        return None
    else:
        gib = -(-over // GIB)
        out = -(-over * setting.cards // layer)
        moved = gib * GIB if setting.engine == "vllm" else out * layer
        elsewhere = offload_seconds(moved * g.loops, setting.card.host_link)
        flag = f"--cpu-offload-gb {gib}" if setting.engine == "vllm" else 'device_map="auto"'
        why = f"{moved / GIB:.1f} GiB over the host link at {setting.card.host_link / 1e9:.0f} GB/s each step"
    return Offload(moved, flag, _step(setting, context, sequences, moved, elsewhere), why)


def _step(setting: Setting, context: int, sequences: int, moved: int = 0, elsewhere: float = 0.0) -> Range:
    w = setting.weights
    cache = kv_bytes(setting.geometry, setting.engine, context, sequences, setting.kv_dtype)
    layers = max(0, w.layers - moved)
    return decode_seconds(
        setting.geometry, setting.engine, setting.card, layers, w.head or w.embedding, cache, sequences,
        setting.at_once, elsewhere,
    )  # fmt: skip


def _first(setting: Setting, context: int, sequences: int) -> Range | None:
    return prefill_seconds(
        setting.geometry, setting.engine, setting.card, context, sequences, setting.weights.layers, setting.at_once
    )


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest n up to ``most`` that holds, given that every smaller one does."""
    if holds(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
