"""What two habits of servers are worth, as quantities of a plan: prompts that begin alike share the cache of that
beginning (prefix caching), and a long prompt is taken up in chunks between which others go on (chunked prefill)."""

from __future__ import annotations

from dataclasses import dataclass

from qtool import QtoolError
from qtool.sizing.bounds import Range, peak, prefill_flops, prefill_seconds
from qtool.sizing.fit import Setting
from qtool.sizing.serving import block_bytes


@dataclass(frozen=True)
class Shared:
    """What ``users`` save whose prompts begin with the same ``tokens``: only whole blocks are shared. ``held``: tokens
    in them; ``blocks`` and ``nbytes``: of the cache, of all users together; ``seconds``: of a first token whose
    beginning is there already (None: the card's rate is unknown). An engine whose users hold caches of their own saves
    seconds and no block."""

    tokens: int
    users: int
    held: int
    blocks: int
    nbytes: int
    seconds: Range | None


@dataclass(frozen=True)
class Chunked:
    """A prompt of ``tokens`` taken up in ``steps`` of at most ``chunk`` tokens. ``pause``: seconds that others wait for
    their next token meanwhile, ``whole``: that they would wait without chunks (None: the card's rate is unknown)."""

    tokens: int
    chunk: int
    steps: int
    pause: Range | None
    whole: Range | None


def check_prefix(tokens: int, context: int | None) -> None:
    """Raises QtoolError for a beginning that fills the whole context of a user, or more."""
    if context and tokens >= context:
        raise QtoolError(f"--shared-prefix {tokens}: a user's context is {context:,} tokens, the beginning included.")


def shared_prefix(setting: Setting, tokens: int, users: int) -> Shared:
    """A system prompt or a repository of ``tokens`` that every user's prompt begins with."""
    each = tokens // setting.facts.block
    blocks = each * max(0, users - 1) if setting.facts.shares else 0
    held = each * setting.facts.block
    return Shared(tokens, users, held, blocks, blocks * block_bytes(setting), _arithmetic(setting, held))


def chunked_prefill(setting: Setting, tokens: int, chunk: int) -> Chunked:
    """A prompt of ``tokens``, taken up ``chunk`` at a time beside others that are answered."""
    whole = _prefill(setting, tokens)
    steps = -(-tokens // chunk)
    # the last chunk attends to all before it: its share of the prompt's arithmetic is the largest
    last = whole
    if steps > 1 and whole is not None and (before := _prefill(setting, tokens - chunk)) is not None:
        slow = None if whole.slow is None or before.slow is None else max(0.0, whole.slow - before.best)
        last = Range(max(0.0, whole.best - before.best), slow)
    return Chunked(tokens, chunk, steps, last, whole)


def _arithmetic(setting: Setting, tokens: int) -> Range | None:
    """Of a prompt, without what every forward costs: that is paid all the same."""
    card = setting.card
    if card.bf16 is None:
        return None
    flops = prefill_flops(setting.geometry, tokens, 1) / setting.at_once
    return Range(flops / peak(card), flops / card.bf16 / setting.facts.efficiency.compute)


def _prefill(setting: Setting, tokens: int) -> Range | None:
    return prefill_seconds(
        setting.geometry, setting.facts, setting.card, tokens, 1, setting.weights.layers, setting.at_once
    )
