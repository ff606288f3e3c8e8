"""What a long text came to: KL, agreement and perplexity in buckets of positions, each with its interval.

Within a bucket blocks of neighbouring positions are resampled. A model is paired with the source under the same
condition, and with no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from qtool.evaluate.buckets import BLOCK, blocks_of, bucket_name, buckets_of
from qtool.evaluate.scorecard import PositionScore, Settings
from qtool.evaluate.statistics import Interval, bootstrap_mean


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
        return bucket_name(self.start, self.end)

    @property
    def perplexity(self) -> float:
        """exp of `nll`."""
        return math.exp(self.nll.estimate) if self.nll.estimate < 700 else math.inf


class AlongSummary(BaseModel):
    """One model along one text under one condition. ``cache_bytes``: at the text's end. ``kls`` and ``nlls``: nats a
    token, one for each ``block`` positions."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    digest: str
    settings: Settings
    length: int
    buckets: list[Bucket]
    kl: Interval
    cache_bytes: int
    block: int = BLOCK
    kls: list[float] = []
    nlls: list[float] = []

    def blocks(self, bucket: Bucket) -> slice:
        """Which of them a bucket has."""
        return blocks_of(bucket.start, bucket.end, self.block)


def along_summary(score: PositionScore, source: PositionScore | None) -> AlongSummary:
    """``source``: the source's score under the same condition, or None. Raises ValueError where it is of another text
    or condition."""
    if source is not None and (source.digest, source.settings.condition) != (score.digest, score.settings.condition):
        raise ValueError(f"{score.subject} and the source read other texts, or under other conditions")
    is_source = source is None or source.subject == score.subject
    buckets = []
    for start, end in buckets_of(score.length, score.block):
        part = blocks_of(start, end, score.block)
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
        cache_bytes=score.cache_bytes, block=score.block, kls=score.kl, nlls=score.nll,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> Interval:
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan, math.nan)
    return bootstrap_mean(values)
