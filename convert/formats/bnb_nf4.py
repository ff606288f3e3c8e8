"""The bitsandbytes container for NF4 (`quant_method: bitsandbytes`), as transformers saves and loads it.

Sources: bitsandbytes functional.py (QuantState.as_dict), utils.py (pack_dict_to_tensor); transformers
quantizers/quantizer_bnb_4bit.py. A linear keeps its name ``weight``: uint8 ``[out * in / 2, 1]``; beside it lie absmax,
quant_map float32 ``[16]`` and a uint8 tensor that is JSON; with double quantization also nested_absmax and
nested_quant_map float32 ``[256]``, and absmax is uint8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import DTYPES
from qtool.convert.files.reading import strict_json
from qtool.convert.formats.apart import Apart, only_ignored
from qtool.convert.formats.codes import Codes, Nested, Nf4Blocks, names_in
from qtool.convert.runtimes import vllm
from qtool.convert.runtimes.rule import HEAD, TRANSFORMERS, Runtime, RuntimeRule, Subject, nothing_observed, shards

SAFETENSORS: Literal[True] = True
MARK = "weight.quant_state.bitsandbytes__nf4"
SUFFIXES: tuple[str, ...] = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    MARK,
)
POSITIVE: tuple[str, ...] = ()
NONZERO: tuple[str, ...] = ()
BY_ROW = False
EXPANDS = True
COPIES: tuple[str, ...] = ()
BLOCK, NESTED_BLOCK = 64, 256
LONGEST_STATE = 4096  # bytes of a QuantState's JSON; real ones have 200
KEYS = frozenset(
    {
        "quant_method", "load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit", "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_skip_modules",
        "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
    }
)  # fmt: skip
# Kernels have these values built in, whatever quant_map says. bitsandbytes functional.py, get_4bit_type("nf4").
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def skipped(section: Mapping[str, Any]) -> list[str]:
    """Names, or parts of them, of modules that stay unquantized."""
    return names_in(section.get("llm_int8_skip_modules"), "llm_int8_skip_modules")


def with_plain(section: Mapping[str, Any], plain: Sequence[str], experts: bool) -> dict[str, Any]:
    """Full names. Raises QtoolError for experts: transformers 5.23 loads none from such files, and vllm-bnb-plugin
    0.0.3, which has code for them, was never seen to."""
    if not experts:
        return {**section, "llm_int8_skip_modules": [*skipped(section), *plain]}
    raise QtoolError(
        "transformers cannot load experts in NF4 (it looks for them as one tensor of 16 bits), and no other "
        "runtime was seen to. Take `method: gptq` with `format: compressed-tensors`, `method: awq`, or `method: gguf`."
    )


def with_apart(section: Mapping[str, Any], apart: Apart, linears: Sequence[str]) -> dict[str, Any]:
    """Full names, and those of what vLLM joins: its plugin looks for these alone. Raises QtoolError for settings."""
    names = vllm.named(only_ignored(apart, "bitsandbytes'"))
    return {**section, "llm_int8_skip_modules": [*skipped(section), *names]}


def own(section: Mapping[str, Any], linear: str) -> Mapping[str, Any]:
    """The same: no linear has settings of its own."""
    return section


def with_parts(section: Mapping[str, Any], parts: Sequence[str], matrices: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The parts themselves: a name that holds one stays as it is."""
    return {**section, "llm_int8_skip_modules": [*skipped(section), *parts]}


LONGEST_FLOAT = "-2.2250738585072014e-308"


def geometry(section: Mapping[str, Any]) -> dict[str, Any]:
    """double_quant."""
    return {"double_quant": section.get("bnb_4bit_use_double_quant")}


def multiples(section: Mapping[str, Any]) -> tuple[int, int]:
    """Two weights to a byte, wherever a row ends."""
    return 1, 2


def specs(
    out: int, columns: int, section: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors that replace one ``.weight`` of ``dtype``."""
    blocks = -(-out * columns // BLOCK)
    nested = bool(section["bnb_4bit_use_double_quant"])
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.uint8, (out * columns // 2, 1)),
        "weight.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        MARK: (torch.uint8, (len(_state((out, columns), BLOCK, dtype, NESTED_BLOCK if nested else None, 0.0)),)),
    }
    if nested:
        found["weight.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
        found["weight.nested_quant_map"] = (torch.float32, (256,))
    return found


def pack(codes: Codes, section: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Suffix -> tensor for one linear."""
    assert isinstance(codes, Nf4Blocks)
    nested = codes.nested
    block, offset = (nested.block, nested.offset) if nested is not None else (None, 0.0)
    state = _state(codes.shape, codes.block, codes.dtype, block, offset)
    found = {
        "weight": codes.packed,
        "weight.absmax": codes.absmax,
        "weight.quant_map": codes.table,
        MARK: torch.tensor(list(state), dtype=torch.uint8),
    }
    if nested is not None:
        found |= {"weight.nested_absmax": nested.scale, "weight.nested_quant_map": nested.table}
    return found


def unpack(tensors: Mapping[str, torch.Tensor], section: Mapping[str, Any]) -> Nf4Blocks:
    """Inverse of `pack`."""
    state = _read_state(tensors[MARK])
    if tensors["weight.quant_map"].tolist() != list(NF4):
        raise QtoolError("weight.quant_map does not hold NF4's 16 values, which kernels have built in")
    nested = None
    if "nested_offset" in state:
        nested = Nested(
            tensors["weight.nested_absmax"], tensors["weight.nested_quant_map"], state["nested_blocksize"],
            float(state["nested_offset"]),
        )  # fmt: skip
    out, columns = state["shape"]
    return Nf4Blocks(
        packed=tensors["weight"],
        absmax=tensors["weight.absmax"],
        table=tensors["weight.quant_map"],
        shape=(out, columns),
        block=state["blocksize"],
        dtype=_dtype(state["dtype"]),
        nested=nested,
    )


def shape(
    sizes: Callable[[str], tuple[int, ...]], tensor: Callable[[str], torch.Tensor], section: Mapping[str, Any]
) -> tuple[int, int]:
    """``(out, in)``."""
    out, columns = _read_state(tensor(MARK))["shape"]
    return out, columns


def quantization_config(double_quant: bool, skipped: list[str]) -> dict[str, Any]:
    """The section that transformers' BitsAndBytesConfig reads; its own defaults are fp4 and float32 arithmetic."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "_load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def stores(made: Mapping[str, Any]) -> bool:
    """Whether an output that a manifest tells of lies in this format."""
    return bool(made.get("method") == "nf4")


def section_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Of such an output."""
    return quantization_config(made["double_quant"], ["lm_head"])


def _state(shape: tuple[int, int], block: int, dtype: torch.dtype, nested_block: int | None, offset: float) -> bytes:
    """QuantState's JSON, padded with spaces (which JSON allows) to a length that depends on neither the offset's
    digits nor the dtype's: the plan knows every tensor's size before a weight is read."""
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": block, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape),
    }  # fmt: skip
    room = len("bfloat16") - len(state["dtype"])
    if nested_block is not None:
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": offset}
        room += len(LONGEST_FLOAT) - len(json.dumps(offset))
    return (json.dumps(state) + " " * room).encode()


def _read_state(tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.dtype == torch.uint8 and tensor.ndim == 1 and tensor.numel() <= LONGEST_STATE:
        with suppress(ValueError, RecursionError):
            state = strict_json(bytes(tensor.tolist()).decode())
            if isinstance(state, dict) and _is_state(state):
                return state
    raise QtoolError(f"{MARK} is not the JSON of a bitsandbytes QuantState.")


def _is_state(state: dict[str, Any]) -> bool:
    """Whether the numbers that `unpack` takes are there, and numbers."""
    shape, nested = state.get("shape"), "nested_offset" in state
    sizes = [*shape] if isinstance(shape, list) and len(shape) == 2 else [None]
    sizes += [state.get("blocksize"), *([state.get("nested_blocksize")] if nested else [])]
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        return False
    offset = isinstance(state["nested_offset"], int | float) if nested else True
    return offset and state.get("quant_type", "nf4") == "nf4" and isinstance(state.get("dtype"), str)


def _dtype(name: str) -> torch.dtype:
    found = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if name not in found:
        raise QtoolError(f"{MARK}: dtype {name!r} is unknown.")
    return found[name]


def _keys(subject: Subject, _: int) -> Iterator[str]:
    section = subject.quantization
    expected = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}
    for key, value in expected.items():
        if section.get(key) != value:
            yield f"{key} is {section.get(key)!r}, expected {value!r}"
    if section.get("bnb_4bit_compute_dtype") not in ("bfloat16", "float16", "float32"):
        yield f"bnb_4bit_compute_dtype is {section.get('bnb_4bit_compute_dtype')!r}"
    if "lm_head" not in (section.get("llm_int8_skip_modules") or ()):
        yield "llm_int8_skip_modules lacks 'lm_head'"
    nested = section.get("bnb_4bit_use_double_quant")
    for name in subject.linears:
        if (f"{name}.weight.nested_absmax" in subject.tensors) != bool(nested):
            yield f"{name}: bnb_4bit_use_double_quant is {nested}, the tensors say otherwise"


def _shapes(subject: Subject, _: int) -> Iterator[str]:
    yield from shards(subject, 1, multiple_out=32, multiple_in=64)


def _vllm(section: Mapping[str, Any]) -> Iterator[str]:
    if not section.get("load_in_4bit") and not section.get("load_in_8bit"):
        yield "neither load_in_4bit nor load_in_8bit is true"


observed = nothing_observed
PLUGIN, PLUGIN_VERSION = "vllm-bnb-plugin", "0.0.3"
RUNS_IN: tuple[Runtime, ...] = (
    Runtime("transformers", "transformers", "bitsandbytes", "pip install 'qtool-llm[nf4]'"),
    vllm.runtime(_vllm, PLUGIN, f"pip install {PLUGIN}", vllm.fuses_unnamed),
)
RULES: tuple[RuntimeRule, ...] = (
    RuntimeRule("keys", "transformers", "5.23", f"{TRANSFORMERS} (BitsAndBytesConfig)", _keys, required=True),
    HEAD,
    RuntimeRule("CPU and GEMV kernels", "bitsandbytes", "0.50.2", "bitsandbytes/functional.py", _shapes),
    vllm.loading(_vllm, "vllm_bnb_plugin", f"{PLUGIN} {PLUGIN_VERSION} in vLLM", vllm.fuses_unnamed),
)
