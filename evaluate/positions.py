"""Fidelity along one long text: KL to the source, agreement and log-loss of every block of positions.

Neighbouring positions depend on one another, so a block of `BLOCK` is what intervals resample, never a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.evaluate.buckets import BLOCK
from qtool.evaluate.engines.share import ALONE, Share
from qtool.evaluate.fidelity import Logits, Reference, compare, logprobs


@dataclass(frozen=True)
class Blocks:
    """One number for each `BLOCK` positions of a text: mean KL(source || model) in nats a token, mean negative
    log-likelihood, share of positions where the likeliest token is the source's. ``kept``: source tokens at a position;
    0 = all, exact."""

    kl: list[float]
    nll: list[float]
    top1: list[float]
    kept: int


@torch.inference_mode()
def along(
    logits: Logits, window: Tensor, source: Reference, progress: Callable[[], None] = lambda: None,
    share: Share = ALONE,
) -> Blocks:  # fmt: skip
    """``logits``' model on ``window`` int64 ``[length]``, which is the first of ``source``'s windows. Of several ranks
    each has its share of the logits, and all are told all."""
    numbers = torch.zeros(3, len(window))
    kl, nll, top1 = numbers
    kept = 0
    for start, logs in logprobs(logits, window, share.starts(len(window))):
        end = start + len(logs)
        targets = window[start + 1 : end + 1].to(logs.device).unsqueeze(1)
        nll[start : start + len(targets)] = -logs[: len(targets)].gather(1, targets).squeeze(1).cpu()
        tokens, p_log = source.chunk(0, start)
        kl[start:end], best = compare(tokens, p_log, logs)
        top1[start:end] = (logs.argmax(-1).cpu() == best).float()
        kept = 0 if tokens is None else tokens.shape[1]
        progress()
    kl, nll, top1 = torch.stack(share.gather(numbers)).sum(0)  # a position is one rank's; the others say 0
    return Blocks(_means(kl), _means(nll[:-1]), _means(top1), kept)  # the last position has nothing to foretell


def _means(values: Tensor) -> list[float]:
    return [float(part.double().mean()) for part in values.split(BLOCK)]
