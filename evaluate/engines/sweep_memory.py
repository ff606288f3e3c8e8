"""What a sweep of a long text takes (`layered`): how many queries at a time, how many bytes."""

from __future__ import annotations

from qtool import QtoolError
from qtool.convert.models.geometry import Geometry
from qtool.evaluate.buckets import foretold
from qtool.evaluate.engines.engine import CHUNK

QUERIES = 1024  # of a chunk, at most
SCORES = 2**31  # bytes of all heads' scores of a chunk, for models whose attention needs them whole


def queries_of(geometry: Geometry, length: int) -> int:
    """Queries of a chunk: fewer where the model's attention holds the scores of all heads."""
    if not geometry.whole_scores:
        return min(QUERIES, length)
    each = geometry.heads * length * (2 * geometry.width + 4)
    return max(16, min(QUERIES, length, SCORES // each))


def peak_bytes(geometry: Geometry, length: int, chunk: int, width: int, ranks: int = 1) -> int:
    """Most bytes that a sweep holds on its device, with activations ``width`` bytes wide: embedding and head, one
    layer, all positions' hidden states, one layer's keys and values, and these once more for every query head (SDPA
    with a mask repeats them); a chunk's mask, as booleans and as numbers, its MLP; logits of `CHUNK` positions four
    times (as computed, as float32, their logarithms, what is compared). Of several ``ranks`` each has its part of the
    hidden states, twice when they change hands for the head, and keys and values of all, with a chunk of each rank's
    on its way."""
    g = geometry
    mixed = g.mlp_matrices * g.hidden * (g.experts * g.expert_width + g.shared_width)
    dense = g.mlp_matrices * g.hidden * g.intermediate
    layer = g.hidden * (2 * g.q_row + 2 * g.kv_row) + max(mixed, dense)
    outside = g.head_weights * (1 if g.tied else 2)
    own = -(-length // ranks) + (chunk if ranks > 1 else 0)  # the last step may be a chunk longer for one of them
    keys = length * (2 * g.kv_row + (2 * g.q_row if g.heads > g.kv_heads else 0))
    sent = chunk * (ranks + 2) * 2 * g.kv_row
    kept = own * g.hidden + max(keys + sent, own * g.hidden if ranks > 1 else 0)
    scores = chunk * length * (g.heads * (2 * width + 4) if g.whole_scores else 0)
    mask = chunk * length * (1 + width)
    work = chunk * (4 * g.hidden + 3 * max(g.mlp_width, g.q_row))
    logits = min(CHUNK, length) * g.vocab * (width + 3 * 4)
    return width * (layer + outside + kept + work) + scores + mask + logits


def require_memory(geometry: Geometry, length: int, width: int, free: int | None, ranks: int = 1) -> None:
    """Raises QtoolError (exit 3) where a sweep of ``length`` tokens needs more than ``free`` bytes, with a length that
    fits."""
    needed = peak_bytes(geometry, length, queries_of(geometry, length), width, ranks)
    if free is None or needed <= free:
        return
    fits = length
    while fits >= CHUNK and peak_bytes(geometry, fits, queries_of(geometry, fits), width, ranks) > free:
        fits = foretold(fits // 2)
    advice = f"`length: {fits}` fits" if fits >= CHUNK else "not even its layers one at a time fit; take a larger card"
    raise QtoolError(
        f"long: a text of {length:,} tokens takes about {needed / 2**30:.1f} GiB here and {free / 2**30:.1f} GiB are "
        f"free; {advice}.",
        exit_code=3,
    )
