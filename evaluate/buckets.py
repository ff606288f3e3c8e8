"""The buckets of a long text: they double from 2,048 positions on, or from a quarter of a shorter text."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = 128  # neighbouring positions that are resampled as one
FEW = 8  # blocks: of fewer a bootstrap interval is too narrow to judge by (of two it misses the mean half the time)
FIRST = 2048  # positions of the first bucket


def foretold(length: int) -> int:
    """The longest length up to this one whose last block foretells a token: of a block of one token none comes next."""
    return length - (length % BLOCK == 1)


def buckets_of(length: int, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """(0, 2048), (2048, 4096), (4096, 8192) and so on to ``length``; whole blocks."""
    first = min(FIRST, max(1, length // 4 // block) * block)
    start, end = 0, min(first, length)
    while start < length:
        yield start, end
        start, end = end, min(2 * end, length)


def blocks_of(start: int, end: int, block: int) -> slice:
    """The blocks of a bucket."""
    return slice(start // block, -(-end // block))


def bucket_name(start: int, end: int) -> str:
    """`0-2K`; of short texts in tokens."""
    return f"{tokens_text(start)}-{tokens_text(end)}"


def tokens_text(tokens: int) -> str:
    """`4K`, `131K` never: 1024 of them are one K; `640` where they are not whole."""
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)
