"""How fast an engine can be at most (what physics allows), and at least in practice: always a range, never a point.

Bounds: every weight and every cached key and value crosses the memory bus once for each token of each decode step, and
every product of a prefill is computed. The low ends are efficiencies seen in published runs, wide on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines.facts import EngineFacts
from qtool.sizing.accelerators import Accelerator


@dataclass(frozen=True)
class Range:
    """``best``: no machine of this kind beats it. ``slow``: expected at worst; None where nobody can tell."""

    best: float
    slow: float | None

    def per_second(self, amount: float) -> Range:
        """Of seconds: how many of ``amount`` in one second, best first."""
        return Range(amount / self.best, amount / self.slow if self.slow else None)


def decode_seconds(
    geometry: Geometry, engine: EngineFacts, card: Accelerator, layer_bytes: int, head_bytes: int, cache_bytes: int,
    sequences: int, cards: int = 1, elsewhere: float = 0.0,
) -> Range:  # fmt: skip
    """One step of all ``sequences``. ``layer_bytes``: what the layers' weights take, read once for each loop;
    ``head_bytes``: what else is read (the head; of the embedding only a row); ``cache_bytes``: all cached keys and
    values. ``cards``: those that work at once (tensor parallel). ``elsewhere``: seconds spent on what does not lie on
    the card (`offload_seconds`).
    """
    weights = layer_bytes * geometry.loops + head_bytes
    bus = card.bandwidth * cards
    best = (weights + _cache_reads(geometry, cache_bytes)) / bus
    flops = 2 * sequences * (geometry.layer_linears * geometry.layers * geometry.loops + geometry.head_weights)
    if card.bf16 is not None:
        best = max(best, flops / peak(card) / cards)
    e = engine.efficiency
    slow = weights / bus / e.weights + _cache_reads(geometry, cache_bytes) / bus / e.cache
    slow += geometry.layers * geometry.loops * e.per_layer + e.per_forward
    if card.bf16 is not None:
        slow = max(slow, flops / card.bf16 / e.compute / cards)
    return Range(best + elsewhere, slow + 2 * elsewhere)


def prefill_seconds(
    geometry: Geometry, engine: EngineFacts, card: Accelerator, context: int, sequences: int, layer_bytes: int,
    cards: int = 1, elsewhere: float = 0.0,
) -> Range | None:  # fmt: skip
    """Until the first token of all ``sequences``; None where the card's rate is unknown."""
    if card.bf16 is None:
        return None
    flops = prefill_flops(geometry, context, sequences)
    best = max(flops / peak(card) / cards, layer_bytes * geometry.loops / card.bandwidth / cards)
    e = engine.efficiency
    host = geometry.layers * geometry.loops * e.per_layer + e.per_forward
    return Range(best + elsewhere, flops / card.bf16 / e.compute / cards + best + host + 2 * elsewhere)


def prefill_flops(geometry: Geometry, context: int, sequences: int) -> float:
    """Multiplications and additions of a prompt: linears, causal attention (half of all pairs, or the window), and the
    head for each sequence's last position."""
    g = geometry
    linears = 2 * g.layer_linears * g.layers * g.loops * context
    pairs = sum(_pairs(context, window) for window in g.windows)
    if g.loops > 1:  # later passes attend to the first one's whole cache and to their own window
        pairs += (g.loops - 1) * g.layers * (_pairs(context, None) + _pairs(context, g.loop_window))
    attention = 4 * g.heads * g.head_dim * pairs
    return float(sequences * (linears + attention + 2 * g.head_weights))


def offload_seconds(nbytes: int, rate: float) -> float:
    """Weights that cross a link, or are read by the processor, once a step."""
    return nbytes / rate


def _pairs(context: int, window: int | None) -> float:
    if window is None or window >= context:
        return context * (context + 1) / 2
    return window * (window + 1) / 2 + (context - window) * window


def _cache_reads(geometry: Geometry, cache_bytes: int) -> int:
    """Every further pass of a looped model reads the first one's cache again."""
    return cache_bytes * geometry.loops


def peak(card: Accelerator) -> float:
    """The fastest rate that the card could use for 16-bit activations: clocks may exceed the data sheet's a little, so
    a bound that must hold takes 5 % more."""
    assert card.bf16 is not None
    return card.bf16 * 1.05
