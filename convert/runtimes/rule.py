"""What a loading rule is, and what rules of several runtimes ask: shards, heads, groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Subject:
    """What rules look at: config.json and the quantized linears' shapes ``name -> (out, in)``; for GPTQ also each
    linear's least and greatest zero point as decoded, and those whose g_idx is not ``i // group_size``; the names of
    all tensors; quantize_config.json; the linears whose columns are split over the cards (of all others the rows
    are); bits, group_size, sym as the container reads them (AutoAWQ's says no sym)."""

    config: dict[str, Any]
    linears: dict[str, tuple[int, int]]
    zeros: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()
    quantize_config: dict[str, Any] | None = None
    scattered: frozenset[str] = frozenset()
    by_columns: frozenset[str] = frozenset()
    geometry: dict[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> dict[str, Any]:
        section: dict[str, Any] = self.config.get("quantization_config") or {}
        return section


def _always(_: Subject) -> bool:
    return True


@dataclass(frozen=True)
class RuntimeRule:
    """``broken(subject, tp)`` yields a reason for every way the rule is broken at that tensor-parallel size. A
    ``required`` rule tells a fault of the artifact; the others tell what a kernel does not take, a fact about the
    model. ``proof``: whether what it says was seen when that version was run, or read in its source. A rule that does
    not ``apply`` says nothing: what is refused at once needs no word on each kernel."""

    name: str
    runtime: str
    version: str
    source: str
    broken: Callable[[Subject, int], Iterator[str]]
    tensor_parallel: bool = False
    required: bool = False
    proof: Literal["run", "read"] = "read"
    applies: Callable[[Subject], bool] = _always

    @property
    def passed(self) -> str:
        """What a subject that breaks nothing is told."""
        return f"loads by the rules, as {self.proof}"


def heads(subject: Subject, tp: int) -> Iterator[str]:
    """Attention heads are split over the cards, key/value heads split or repeated."""
    count = subject.config.get("num_attention_heads", tp)
    kv = subject.config.get("num_key_value_heads", count)
    if count % tp:
        yield f"{count} attention heads do not split over {tp} cards"
    elif kv % tp and tp % kv:
        yield f"{kv} key/value heads neither split over nor repeat on {tp} cards"


def shards(subject: Subject, tp: int, multiple_out: int, multiple_in: int) -> Iterator[str]:
    """One reason for each kind of linear (all layers have the same shapes) whose shard breaks a multiple, or whose
    groups lie across two shards."""
    group = int(subject.geometry.get("group_size") or 0)
    seen: set[tuple[str, int, int]] = set()
    for name, (out, columns) in subject.linears.items():
        kind = name.rsplit(".", 1)[-1]
        if (kind, out, columns) in seen:
            continue
        seen.add((kind, out, columns))
        rows_split = name not in subject.by_columns
        share = out if rows_split else columns
        if share % tp:
            yield f"{kind}: {share} does not split over {tp} cards"
            continue
        out, columns = (out // tp, columns) if rows_split else (out, columns // tp)
        if out % multiple_out:
            yield f"{kind}: out {out} is not a multiple of {multiple_out}"
        if columns % multiple_in:
            yield f"{kind}: in {columns} is not a multiple of {multiple_in}"
        if group > 0 and columns % group:
            yield f"{kind}: in {columns} is not a multiple of the group size {group}"
