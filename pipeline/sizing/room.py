"""How much of a card is left for weights once a context and its users have what they need."""

from __future__ import annotations

from dataclasses import replace

from qtool import QtoolError
from qtool.convert.formats.plan import ModelShape
from qtool.convert.formats.table import runs_in
from qtool.evaluate.engines.table import planned_engine
from qtool.quantize.methods.budget import Fits
from qtool.sizing.accelerators import choose, load_accelerators
from qtool.sizing.fit import Setting, cache_of, largest_context, most_sequences, overhead_of
from qtool.sizing.formats import SOURCE, weights_of
from qtool.sizing.headers import Headers


def room(shape: ModelShape, smallest: int, asked: Fits, family: str) -> int:
    """Bytes of all tensors. ``smallest``: of the smallest file that the model can become; ``family``: its container,
    which says the engine. Raises QtoolError for a card
    that is not known, and for one that cannot hold even that, with what it would hold."""
    (card, *others) = choose(load_accelerators(), asked.card, "budget: fits: card")
    if others:
        raise QtoolError(f"budget: fits: card: {asked.card}: name one card.")
    geometry = shape.decoder.shape
    if geometry.max_context and asked.context > geometry.max_context:
        raise QtoolError(
            f"budget: fits: context {asked.context:,} is more than the {geometry.max_context:,} tokens that the model "
            "was made for."
        )
    whole = weights_of(Headers("", shape.config, geometry, shape.tensors), SOURCE)
    share = smallest / whole.nbytes
    least = replace(
        whole, layers=int(whole.layers * share), embedding=int(whole.embedding * share), head=int(whole.head * share),
        other=int(whole.other * share),
    )  # fmt: skip
    facts = planned_engine(runs_in(family)[0].engine).on(card)
    setting = Setting(geometry, least, facts, card, kv_dtype=facts.cache_types[0].name)
    beside = cache_of(setting, asked.context, asked.users) + overhead_of(setting, asked.context, asked.users).total
    elsewhere = least.nbytes - setting.resident  # an embedding that stays in host memory
    left = setting.limit - beside + elsewhere
    if left < smallest:
        context, users = largest_context(setting, asked.users), most_sequences(setting, asked.context)
        works = [f"context {context}" for _ in range(bool(context))] + [f"users {users}" for _ in range(bool(users))]
        raise QtoolError(
            f"budget: fits: {card.key} leaves {left / 1e9:.2f} GB for weights beside {asked.context:,} tokens for "
            f"{asked.users}; the smallest file of this model takes {smallest / 1e9:.2f} GB. The nearest that works: "
            f"{' or '.join(works) or 'a larger card'}."
        )
    return left
