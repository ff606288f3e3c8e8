"""A proof in a manifest: the artifact was started in a real server, and answered as the reference does or did not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

Outcome = Literal["pass", "fail", "not asked"]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Finding(_Stored):
    """One thing that was looked at. ``detail``: what was seen beside what had to be, or why it was not asked."""

    what: str
    outcome: Outcome
    detail: str


class Proof(_Stored):
    """``engine`` with the ``version`` that it said, on ``machine``, in ``dtype``, with ``users`` of ``context`` tokens
    at once and a cache of ``cache_type``. ``command``: what it was started with; ``kernels``: what computed, as its log
    says; ``numbers``: what was measured and planned, by name (nats, bytes, seconds, tokens)."""

    engine: str
    version: str
    machine: str
    dtype: str
    cache_type: str
    context: int
    users: int
    time: str
    command: str
    kernels: list[str]
    numbers: dict[str, float]
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome == "fail"]


def replaced(proofs: Sequence[Proof], new: Proof) -> list[Proof]:
    """``proofs`` with ``new``; an older one of the same engine and dtype goes."""
    kept = [proof for proof in proofs if (proof.engine, proof.dtype) != (new.engine, new.dtype)]
    return [*kept, new]
