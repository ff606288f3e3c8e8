"""Does it fit, how long a context, how many sequences, how fast at best: weights on a card, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines.facts import EngineFacts, Load, Overhead
from qtool.sizing.accelerators import Accelerator
from qtool.sizing.bounds import Range, decode_seconds, offload_seconds, prefill_seconds
from qtool.sizing.formats import Weights
from qtool.sizing.kv_cache import kv_bytes

GIB = 2**30
LIMIT = 1 << 22  # tokens or sequences beyond which nobody looks
HOST_BANDWIDTH = 80e9  # bytes/s, two channels of DDR5: what layers outside the card read from


@dataclass(frozen=True)
class Setting:
    """One way to serve: the model's shape, its weights in a format, the engine's facts, the card and how many."""

    geometry: Geometry
    weights: Weights
    facts: EngineFacts
    card: Accelerator
    cards: int = 1
    kv_dtype: str = "bf16"

    @property
    def engine(self) -> str:
        """Its name."""
        return self.facts.name

    @property
    def limit(self) -> int:
        """Bytes of each card that the engine takes."""
        return int(self.card.memory * self.facts.memory_share)

    @property
    def resident(self) -> int:
        """Bytes of weights on each card. An embedding that stays in host memory is copied as head where it is tied;
        tensor parallelism splits all but norms; other engines give each card its share of the layers."""
        w = self.weights
        on_cards = w.nbytes if self.facts.embedding_on_card else w.layers + (w.head or w.embedding) + w.other
        return -(-(on_cards - w.other) // self.cards) + w.other

    @property
    def at_once(self) -> int:
        """Cards that work at the same time."""
        return self.cards if self.facts.split_faults else 1


@dataclass(frozen=True)
class Estimate:
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
    chunk = setting.facts.prefill_tokens(setting.card)
    ranks = setting.at_once
    nbytes = kv_bytes(setting.geometry, setting.facts, context, sequences, setting.kv_dtype, chunk, ranks)
    return nbytes if ranks > 1 else -(-nbytes // setting.cards)


def cache_to_ask(setting: Setting, context: int, sequences: int) -> int:
    """Bytes of the cache on each card that an engine is told, of which it keeps some blocks for itself."""
    facts = setting.facts
    spare = kv_bytes(setting.geometry, facts, facts.block * facts.spare_blocks, 1, setting.kv_dtype)
    return cache_of(setting, context, sequences) + spare // setting.at_once


def overhead_of(setting: Setting, context: int, sequences: int) -> Overhead:
    """Activations, logits, context and graphs on each card."""
    expanded = setting.weights.largest
    return setting.facts.overhead(Load(setting.geometry, setting.card, setting.cards, context, sequences, expanded))


def estimate_of(setting: Setting, context: int, sequences: int) -> Estimate:
    """Everything about one context and number of sequences."""
    cache = cache_of(setting, context, sequences)
    return Estimate(
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


def split_faults(setting: Setting) -> list[str]:
    """Why the cards cannot share the model as the engine would split it; empty where they can."""
    split = setting.facts.split_faults
    return split(setting.geometry, setting.weights.group, setting.cards) if split and setting.cards > 1 else []


def offload_of(setting: Setting, context: int, sequences: int, host: float = HOST_BANDWIDTH) -> Offload | None:
    """What the engine can leave outside the cards so that the rest fits; None where even that does not help.

    ``host``: bytes/s of host memory, at which layers are computed that an engine runs where they lie; others are
    brought over the host link at each step.
    """
    w, g, rule = setting.weights, setting.geometry, setting.facts.offload
    over = estimate_of(setting, context, sequences).total - setting.limit
    if rule is None or over <= 0 or setting.card.unified:
        return None
    layer = -(-w.layers // g.layers)
    if rule.computed_there:
        layer += -(-cache_of(setting, context, sequences) * setting.cards // g.layers)
        units = -(-over * setting.cards // layer)
        if units > g.layers:
            return None
        moved = units * layer
        elsewhere = offload_seconds(moved, host)
        why = f"{units} of {g.layers} layers and their cache in host memory, computed there at {host / 1e9:.0f} GB/s"
        why += " (assumed)" if host == HOST_BANDWIDTH else ""
    elif setting.card.host_link is None or over > w.layers // setting.cards:
        return None
    else:
        units = -(-over // rule.unit) if rule.unit else -(-over * setting.cards // layer)
        moved = units * (rule.unit or layer)
        elsewhere = offload_seconds(moved * g.loops, setting.card.host_link)
        why = f"{moved / GIB:.1f} GiB over the host link at {setting.card.host_link / 1e9:.0f} GB/s each step"
    flag = rule.flag(units, g.layers)
    return Offload(moved, flag, _step(setting, context, sequences, moved, elsewhere), why)


def _step(setting: Setting, context: int, sequences: int, moved: int = 0, elsewhere: float = 0.0) -> Range:
    w = setting.weights
    cache = kv_bytes(setting.geometry, setting.facts, context, sequences, setting.kv_dtype)
    layers = max(0, w.layers - moved)
    return decode_seconds(
        setting.geometry, setting.facts, setting.card, layers, w.head or w.embedding, cache, sequences,
        setting.at_once, elsewhere,
    )  # fmt: skip


def _first(setting: Setting, context: int, sequences: int) -> Range | None:
    return prefill_seconds(
        setting.geometry, setting.facts, setting.card, context, sequences, setting.weights.layers, setting.at_once
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
