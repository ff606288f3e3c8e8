"""What a long text came to: KL, agreement and perplexity in buckets of positions, each with its interval.

Buckets double from 2,048 positions on, or from a quarter of a shorter text. Within one, blocks of neighbouring
positions are resampled. A model is paired with the source under the same condition, and with no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from qtool.evaluate.scorecard import PositionScore, Settings
from qtool.evaluate.statistics import Interval, bootstrap_mean

FIRST = 2048  # positions of the first bucket


class Bucket(BaseModel):
    """Positions ``start`` to ``end``. ``kl``: to the source with its whole cache, nats a token; ``top1``: share of
    positions; ``nll``: mean negative log-likelihood, nats a token; ``rise``: of that above the source's under the same
    condition, paired by block (None for the source). What is no number is NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    start: int
    end: int
    kl: Interval
    top1: Interval
    nll: Interval
    rise: Interval | None

    @property
    def name(self) -> str:
        """`0-2K`; of short texts in tokens."""
        return f"{tokens_text(self.start)}-{tokens_text(self.end)}"

    @property
    def perplexity(self) -> float:
        """exp of `nll`."""
        return math.exp(self.nll.estimate) if self.nll.estimate < 700 else math.inf


class AlongSummary(BaseModel):
    """One model along one text under one condition. ``cache_bytes``: at the text's end."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    digest: str
    settings: Settings
    length: int
    buckets: list[Bucket]
    kl: Interval
    cache_bytes: int


def along_summary(score: PositionScore, source: PositionScore | None) -> AlongSummary:
    """``source``: the source's score under the same condition, or None. Raises ValueError where it is of another text
    or condition."""
    if source is not None and (source.digest, source.settings.condition) != (score.digest, score.settings.condition):
        raise ValueError(f"{score.subject} and the source read other texts, or under other conditions")
    is_source = source is None or source.subject == score.subject
    buckets = []
    for start, end in buckets_of(score.length, score.block):
        part = slice(start // score.block, -(-end // score.block))
        rises = (
            None
            if is_source or source is None
            else [mine - theirs for mine, theirs in zip(score.nll[part], source.nll[part], strict=True)]
        )
        bucket = Bucket(
            start=start, end=end, kl=_mean(score.kl[part]), top1=_mean(score.top1[part]), nll=_mean(score.nll[part]),
            rise=None if rises is None else _mean(rises),
        )  # fmt: skip
        buckets.append(bucket)
    return AlongSummary(
        digest=score.digest, settings=score.settings, length=score.length, buckets=buckets, kl=_mean(score.kl),
        cache_bytes=score.cache_bytes,
    )  # fmt: skip


def buckets_of(length: int, block: int) -> Iterator[tuple[int, int]]:
    """(0, 2048), (2048, 4096), (4096, 8192) and so on to ``length``; whole blocks."""
    first = min(FIRST, max(1, length // 4 // block) * block)
    start, end = 0, min(first, length)
    while start < length:
        yield start, end
        start, end = end, min(2 * end, length)


def tokens_text(tokens: int) -> str:
    """`4K`, `131K` never: 1024 of them are one K; `640` where they are not whole."""
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)


def _mean(values: Sequence[float]) -> Interval:
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap_mean(values)
