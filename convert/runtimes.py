"""Static loading rules of the runtimes that should load an artifact, as one table: rule, runtime, version, source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TENSOR_PARALLEL = (1, 2, 4, 8)
ROW_PARALLEL = ("o_proj", "down_proj")  # split along IN; every other linear is split along OUT
AWQ_KEYS = ("quant_method", "bits", "group_size", "zero_point", "version")


@dataclass(frozen=True)
class Subject:
    """What rules look at: config.json and the quantized linears' shapes ``name -> (out, in)``."""

    config: dict[str, Any]
    linears: dict[str, tuple[int, int]]

    @property
    def quantization(self) -> dict[str, Any]:
        section: dict[str, Any] = self.config.get("quantization_config") or {}
        return section


@dataclass(frozen=True)
class RuntimeRule:
    """``broken(subject, tp)`` yields a reason for every way the rule is broken at that tensor-parallel size."""

    name: str
    runtime: str
    version: str
    source: str
    broken: Callable[[Subject, int], Iterator[str]]
    tensor_parallel: bool = False


def _awq_keys(subject: Subject, _: int) -> Iterator[str]:
    for key in AWQ_KEYS:
        if key not in subject.quantization:
            yield f"quantization_config lacks {key!r}"
    if subject.quantization.get("version") not in ("gemm", None):
        yield f"version is {subject.quantization['version']!r}, expected 'gemm'"
    if subject.quantization.get("bits") not in (4, None):
        yield f"bits is {subject.quantization['bits']}, AWQ kernels hold 4"


def _awq_shapes(subject: Subject, _: int) -> Iterator[str]:
    yield from _shards(subject, 1, multiple_out=8, multiple_in=1)


def _vllm_plain(subject: Subject, tp: int) -> Iterator[str]:
    yield from _heads(subject, tp)
    yield from _shards(subject, tp, multiple_out=8, multiple_in=1)


def _marlin(subject: Subject, tp: int) -> Iterator[str]:
    if not subject.quantization.get("zero_point"):
        yield "zero_point is not true"
    if subject.quantization.get("group_size") not in (-1, 32, 64, 128):
        yield f"group_size {subject.quantization.get('group_size')} is not one of -1, 32, 64, 128"
    yield from _heads(subject, tp)
    yield from _shards(subject, tp, multiple_out=64, multiple_in=128)


def _heads(subject: Subject, tp: int) -> Iterator[str]:
    heads = subject.config.get("num_attention_heads", tp)
    kv = subject.config.get("num_key_value_heads", heads)
    if heads % tp:
        yield f"{heads} attention heads do not split over {tp} cards"
    elif kv % tp and tp % kv:
        yield f"{kv} key/value heads neither split over nor repeat on {tp} cards"


def _shards(subject: Subject, tp: int, multiple_out: int, multiple_in: int) -> Iterator[str]:
    """One reason for each kind of linear (all layers have the same shapes) whose shard breaks a multiple."""
    group = int(subject.quantization.get("group_size", 0))
    seen: set[tuple[str, int, int]] = set()
    for name, (out, columns) in subject.linears.items():
        kind = name.rsplit(".", 1)[-1]
        if (kind, out, columns) in seen:
            continue
        seen.add((kind, out, columns))
        rows_split = kind not in ROW_PARALLEL
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


_VLLM_AWQ = "vllm/model_executor/layers/quantization/awq.py"
_VLLM_MARLIN = "vllm/model_executor/layers/quantization/awq_marlin.py, utils/marlin_utils.py"
AWQ_RULES = (
    RuntimeRule("keys", "transformers", "5.23", "transformers/utils/quantization_config.py (AwqConfig)", _awq_keys),
    RuntimeRule("shapes", "transformers + GPTQModel", "7.6", "gptqmodel/nn_modules/qlinear", _awq_shapes),
    RuntimeRule("plain kernel", "vLLM", "0.33", _VLLM_AWQ, _vllm_plain, tensor_parallel=True),
    RuntimeRule("Marlin kernel", "vLLM", "0.33", _VLLM_MARLIN, _marlin, tensor_parallel=True),
    RuntimeRule("Marlin kernel", "SGLang", "0.5", "sglang/srt/layers/quantization/awq.py", _marlin, tensor_parallel=True),
)
RULES = {"awq": AWQ_RULES}
