"""Memory beside weights and cache: activations, logits, contexts, compute buffers, as each engine needs them.

transformers' and llama.cpp's figures follow from what their graphs keep alive (tests compare them with both); vLLM's
are its own accounting with the constants named here, which no test of ours has run.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtool.convert.models.geometry import Geometry
from qtool.sizing.accelerators import Accelerator

MIB = 2**20
CUDA_CONTEXT = 500 * MIB  # driver context, loaded kernels: 0.4 to 0.6 GiB on Ampere and later
ALLOCATOR_SLACK = 0.02  # of activations: rounding of torch's allocator to 2 MiB, segments half used
VLLM_UTILIZATION = 0.92  # CacheConfig.gpu_memory_utilization
VLLM_GRAPHS = 512 * MIB  # captured CUDA graphs, which lie outside the profiled peak
VLLM_PARALLEL = 1024 * MIB  # NCCL and all-reduce buffers of a rank
LARGE_CARD = 70 * 2**30  # vLLM batches more tokens above this, but for the A100
UBATCH = 512  # llama.cpp's n_ubatch


@dataclass(frozen=True)
class Overhead:
    """Bytes on one card. ``activations``: grows with the tokens of one forward; ``fixed``: does not."""

    activations: int
    fixed: int

    @property
    def total(self) -> int:
        return self.activations + self.fixed


def transformers_activations(geometry: Geometry, context: int, sequences: int) -> int:
    """Peak bytes that a whole prefill keeps alive beside weights and cache (SDPA attention, logits of last positions).

    Live at once in the gated MLP: embeddings, the layer's input, the residual, its norm (4 hidden) and three of the
    intermediate's width; in the rotary step of attention three hidden states and four queries, the layer's own keys and
    values not yet being in the cache. Beside them cos and sin and the positions (int64) of one sequence. Gemma 2's soft
    cap rules SDPA out: the scores of all heads are whole, before softmax, after it and as float32 between, beside two
    masks, three hidden states, queries, and keys and values repeated for every query head.
    """
    g, tokens = geometry, context * sequences
    queries = g.q_row
    widest = tokens * max(3 * g.intermediate + 4 * g.hidden, 3 * g.hidden + 4 * queries) * g.width
    if g.whole_scores:
        scores = tokens * context * (g.heads * (2 * g.width + 4) + 2 * g.width)
        repeated = 2 * queries if g.heads > g.kv_heads else 0
        widest = max(widest, scores + tokens * (3 * g.hidden + queries + repeated) * g.width)
    rotary = context * (2 * g.head_dim * g.width + 8) + 8 * tokens
    return widest + rotary + g.vocab * sequences * g.width


def transformers_overhead(
    geometry: Geometry, context: int, sequences: int, compute: str, dequantized: int = 0
) -> Overhead:
    """``dequantized``: bytes of the largest matrix that is expanded to 16 bits before it is multiplied (NF4)."""
    activations = transformers_activations(geometry, context, sequences) + dequantized
    return Overhead(activations, CUDA_CONTEXT + cublas_workspace(compute))


def cublas_workspace(compute: str) -> int:
    """What torch gives cuBLAS: 4096 KiB x 8 on compute capability 9.0, else 8.1 MiB (CUBLAS_WORKSPACE_CONFIG)."""
    return 32 * MIB if compute == "9.0" else 8_519_680


def vllm_batch_tokens(card: Accelerator) -> int:
    """Default max_num_batched_tokens of `vllm serve` (engine/arg_utils.py, get_batch_defaults)."""
    return 8192 if card.memory >= LARGE_CARD and "A100" not in card.name else 2048


def vllm_overhead(geometry: Geometry, card: Accelerator, cards: int, sequences: int) -> Overhead:
    """What profiling finds before vLLM gives the rest to the cache: a forward of the largest batch (fused gate and up,
    their product, residual and hidden states), or sampling for ``sequences`` (its max_num_seqs: logits in 16 and 32
    bits, a sorted copy, int64 order, probabilities), whichever is larger; and the context, CUDA graphs, NCCL."""
    g = geometry
    forward = (3 * g.intermediate // cards + 3 * g.hidden) * g.width * vllm_batch_tokens(card)
    sampling = g.vocab * sequences * (g.width + 4 + 4 + 8 + 4)
    parallel = VLLM_PARALLEL if cards > 1 else 0
    return Overhead(max(forward, sampling), CUDA_CONTEXT + VLLM_GRAPHS + parallel)


def llama_cpp_compute(
    geometry: Geometry, cells: int, context: int, flash_attention: bool = True, ubatch: int = UBATCH, sliding: int = 0
) -> int:
    """Bytes of llama.cpp's compute buffer for graphs of ``ubatch`` tokens, float32. ``cells``: cache cells that one
    sequence's attention spans; ``context``: n_ctx of all sequences, which no batch exceeds; ``sliding``: cells of the
    layers that slide, which have a mask of their own.

    With flash attention the feed-forward part is the widest (three intermediates, five hidden states) and the mask is
    float16; without, keys and values are copied, scores of every head are whole, and the mask is float32. Fitted to
    what llama.cpp allocates (tests/test_llama_cpp_memory.py).
    """
    g, tokens = geometry, min(ubatch, context)
    forward = 3 * g.intermediate + 5 * g.hidden
    if flash_attention:
        return tokens * (4 * (forward + 10) + 2 * (cells + sliding))
    attention = 6 * g.heads * g.head_dim + g.heads * cells
    return tokens * 4 * (max(forward, attention) + 2 * g.kv_row + cells + sliding + 5)


def llama_cpp_overhead(
    geometry: Geometry, cells: int, context: int, sequences: int, cuda: bool, sliding: int = 0
) -> Overhead:
    """Compute buffer, logits of one token a sequence, and the CUDA context where there is one."""
    compute = llama_cpp_compute(geometry, cells, context, sliding=sliding)
    return Overhead(compute + 4 * geometry.vocab * sequences, CUDA_CONTEXT if cuda else 0)
