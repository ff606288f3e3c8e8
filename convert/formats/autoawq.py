"""The AutoAWQ GEMM container (`quant_method: awq`, `version: gemm`).

Sources: AutoAWQ awq/modules/linear/gemm.py, awq/utils/packing_utils.py, awq/models/_config.py.
A linear ``[out, in]`` becomes qweight int32 ``[in, out/8]``, qzeros int32 ``[in/g, out/8]``, scales ``[in/g, out]``;
both packed along OUT in AWQ order; ``w = (q - z) * s``; zeros stored as they are (no -1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from qtool import QtoolError
from qtool.convert.formats.apart import Apart, only_ignored
from qtool.convert.formats.codes import Codes, UniformCodes, group_size_of, names_in
from qtool.convert.formats.packing import AWQ_ORDER, pack_rows, unpack_rows
from qtool.convert.runtimes import sglang, vllm
from qtool.convert.runtimes.rule import (
    HEAD,
    QLINEAR,
    TRANSFORMERS,
    Runtime,
    RuntimeRule,
    Subject,
    experts_rule,
    fused_experts,
    heads,
    nothing_observed,
    shards,
)

SAFETENSORS: Literal[True] = True
MARK = "qweight"
SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales")
POSITIVE: tuple[str, ...] = ("scales",)
NONZERO: tuple[str, ...] = ()
BY_ROW = True
EXPANDS = False
COPIES: tuple[str, ...] = ()
KEYS = frozenset({"quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert"})
WRITTEN = ("quant_method", "bits", "group_size", "zero_point", "version")


def skipped(section: Mapping[str, Any]) -> list[str]:
    """Names, or parts of them, of modules that stay unquantized."""
    return names_in(section.get("modules_to_not_convert"), "modules_to_not_convert")


def with_plain(section: Mapping[str, Any], plain: Sequence[str], experts: bool) -> dict[str, Any]:
    """Full names: vLLM looks for a name anywhere in a module's, and `mlp.gate` is part of a dense layer's
    `mlp.gate_up_proj`."""
    return {**section, "modules_to_not_convert": [*skipped(section), *plain]}


def with_apart(section: Mapping[str, Any], apart: Apart, linears: Sequence[str]) -> dict[str, Any]:
    """Full names. Raises QtoolError for settings: the section has one group size for all."""
    return {**section, "modules_to_not_convert": [*skipped(section), *vllm.named(only_ignored(apart, "AutoAWQ's"))]}


def own(section: Mapping[str, Any], linear: str) -> Mapping[str, Any]:
    """The same: no linear has settings of its own."""
    return section


def with_parts(section: Mapping[str, Any], parts: Sequence[str], matrices: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The parts themselves: a name that holds one stays as it is."""
    return {**section, "modules_to_not_convert": [*skipped(section), *parts]}


def geometry(section: Mapping[str, Any]) -> dict[str, Any]:
    """group_size."""
    return {"group_size": section.get("group_size")}


def multiples(section: Mapping[str, Any]) -> tuple[int, int]:
    """Rows are packed in eights."""
    return 8, 1


def specs(
    out: int, columns: int, section: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors that replace one ``.weight``."""
    groups = columns // group_size_of(section["group_size"], columns)
    return {
        "qweight": (torch.int32, (columns, out // 8)),
        "qzeros": (torch.int32, (groups, out // 8)),
        "scales": (dtype, (groups, out)),
    }


def pack(codes: Codes, section: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Suffix -> tensor for one linear."""
    assert isinstance(codes, UniformCodes)
    return {
        "qweight": pack_rows(codes.codes, AWQ_ORDER),
        "qzeros": pack_rows(codes.zero, AWQ_ORDER),
        "scales": codes.scale.t().contiguous(),
    }


def unpack(tensors: Mapping[str, torch.Tensor], section: Mapping[str, Any]) -> UniformCodes:
    """Inverse of `pack`. Raises QtoolError for a section that speaks of another packing."""
    if section.get("bits", 4) != 4 or section.get("version", "gemm") != "gemm":
        raise QtoolError("quantization_config: qtool reads AWQ with bits 4 in version 'gemm'.")
    return UniformCodes(
        codes=unpack_rows(tensors["qweight"], AWQ_ORDER),
        scale=tensors["scales"].t().contiguous(),
        zero=unpack_rows(tensors["qzeros"], AWQ_ORDER),
        bits=4,
        group_size=group_size_of(section["group_size"], tensors["qweight"].shape[0]),
    )


def shape(
    sizes: Callable[[str], tuple[int, ...]], tensor: Callable[[str], torch.Tensor], section: Mapping[str, Any]
) -> tuple[int, int]:
    """``(out, in)``."""
    columns, words = sizes("qweight")
    return words * 8, columns


def quantization_config(group_size: int, skipped: list[str]) -> dict[str, Any]:
    """The section that loaders look for in config.json."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skipped or None,
    }


def stores(made: Mapping[str, Any]) -> bool:
    """Whether an output that a manifest tells of lies in this format."""
    return bool(made.get("method") == "awq")


def section_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Of such an output."""
    return quantization_config(made["group_size"], ["lm_head"])


def _keys(subject: Subject, _: int) -> Iterator[str]:
    for key in WRITTEN:
        if key not in subject.quantization:
            yield f"quantization_config lacks {key!r}"
    if subject.quantization.get("version") not in ("gemm", None):
        yield f"version is {subject.quantization['version']!r}, expected 'gemm'"
    if subject.quantization.get("bits") not in (4, None):
        yield f"bits is {subject.quantization['bits']}, AWQ kernels hold 4"


def _shapes(subject: Subject, _: int) -> Iterator[str]:
    yield from shards(subject, 1, multiple_out=8, multiple_in=1)


def _unfused_shapes(subject: Subject, tp: int) -> Iterator[str]:
    """AutoAWQLinearMethod.create_weights, of every AWQ kernel."""
    yield from heads(subject, tp)
    yield from shards(subject, tp, multiple_out=8, multiple_in=1)


def _sglang(subject: Subject, tp: int) -> Iterator[str]:
    if not subject.quantization.get("zero_point"):
        yield "zero_point is not true"
    yield from sglang.marlin(subject, tp)


def _vllm(section: Mapping[str, Any]) -> Iterator[str]:
    yield from vllm.lacking(section, "bits", "group_size", "zero_point")
    if section.get("bits") not in (4, None):
        yield f"bits is {section['bits']!r}; vLLM's AWQ has 4"
    if section.get("zero_point") is False:
        yield "zero_point is false: vLLM leaves the zero points out (it loads, and what it answers is wrong)"


observed = nothing_observed
RUNS_IN: tuple[Runtime, ...] = (
    vllm.runtime(_vllm),
    Runtime("transformers", "transformers", "gptqmodel", "pip install gptqmodel", refuses_experts=fused_experts),
    sglang.RUNTIME,
)
RULES: tuple[RuntimeRule, ...] = (
    RuntimeRule("keys", "transformers", "5.23", f"{TRANSFORMERS} (AwqConfig)", _keys, required=True),
    HEAD,
    experts_rule(fused_experts),
    RuntimeRule("shapes", "transformers + GPTQModel", "7.6", QLINEAR, _shapes, proof="run"),
    *vllm.rules(
        "auto_awq.py",
        _vllm,
        RuntimeRule("plain kernel", "vLLM", vllm.VERSION, f"{vllm.FOLDER}/auto_awq.py", _unfused_shapes, True),
    ),
    sglang.marlin_rule("awq.py", _sglang),
)
