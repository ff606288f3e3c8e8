"""The GPTQ container (`quant_method: gptq`), versions 1 and 2, 4 and 8 bits.

Sources: AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel
gptqmodel/nn_modules/qlinear/__init__.py and utils/model.py. A linear ``[out, in]`` with n = 32 / bits values to a
word becomes qweight int32 ``[in/n, out]`` packed along IN, qzeros int32 ``[groups, out/n]`` packed along OUT, scales
``[groups, out]``, g_idx int32 ``[in]``; all sequential. ``w[o, i] = scales[g_idx[i], o] * (q - zero)``. Version 1
stores zero - 1, version 2 zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch

from qtool import QtoolError
from qtool.convert.formats import gptq_dynamic, packing
from qtool.convert.formats.apart import Apart
from qtool.convert.formats.codes import Codes, UniformCodes, group_size_of, ordered_groups
from qtool.convert.formats.gptq_dynamic import DYNAMIC, QUANTIZED
from qtool.convert.formats.gptq_rules import RULES as RULES
from qtool.convert.formats.gptq_rules import RUNS_IN as RUNS_IN
from qtool.convert.runtimes import vllm
from qtool.convert.runtimes.rule import Observed

SAFETENSORS: Literal[True] = True
MARK = "qweight"
SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
POSITIVE: tuple[str, ...] = ()
NONZERO: tuple[str, ...] = ("scales",)  # symmetric grids may run backwards
BY_ROW = True
EXPANDS = False
QUANTIZE_CONFIG = "quantize_config.json"  # where AutoGPTQ looks for it
COPIES: tuple[str, ...] = (QUANTIZE_CONFIG,)
KEYS = frozenset(
    {
        "quant_method", "bits", "group_size", "sym", "desc_act", "damp_percent", "true_sequential", "static_groups",
        "lm_head", "checkpoint_format", "method", "format", "pack_dtype", "meta", DYNAMIC,
        QUANTIZED,
    }
)  # fmt: skip
V1, V2 = "gptq", "gptq_v2"
# One in every value of a word. Version 1 is version 2 minus this, as 32-bit words: a zero of 0 borrows from its
# neighbour when written and gives it back when read, so that GPTQModel's own conversions are undone exactly.
ONES = {4: 0x11111111, 8: 0x01010101}


def skipped(section: Mapping[str, Any]) -> list[str]:
    """What `dynamic` leaves unquantized."""
    return gptq_dynamic.left_out(section)


def with_plain(section: Mapping[str, Any], plain: Sequence[str], experts: bool) -> dict[str, Any]:
    """The same: readers see from the tensors' names what is quantized, and never quantize routers."""
    return dict(section)


def with_apart(section: Mapping[str, Any], apart: Apart, linears: Sequence[str]) -> dict[str, Any]:
    """Told in `dynamic`."""
    return gptq_dynamic.with_rules(section, apart, linears)


def own(section: Mapping[str, Any], linear: str) -> Mapping[str, Any]:
    """As `dynamic` has it."""
    return gptq_dynamic.changed(section, linear)


def with_parts(section: Mapping[str, Any], parts: Sequence[str], matrices: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What is quantized is named, for vLLM, which looks for a name anywhere in a module's; of a model without a list of
    fused matrices it takes the names as its own modules have them. What is not is named for SGLang."""
    named = [list(dict.fromkeys([*names, *vllm.named(names)])) for names in matrices]
    return {**section, QUANTIZED: named, DYNAMIC: {f"-:.*{part}.*": {} for part in parts}}


def geometry(section: Mapping[str, Any]) -> dict[str, Any]:
    """bits, group_size, sym, desc_act."""
    return {key: section.get(key) for key in ("bits", "group_size", "sym", "desc_act")}


def multiples(section: Mapping[str, Any]) -> tuple[int, int]:
    """Both are packed: n values to a word."""
    return 32 // _bits(section), 32 // _bits(section)


def specs(
    out: int, columns: int, section: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors that replace one ``.weight``."""
    bits = _bits(section)
    groups = -(-columns // group_size_of(section["group_size"], columns))
    return {
        "qweight": (torch.int32, (columns * bits // 32, out)),
        "qzeros": (torch.int32, (groups, out * bits // 32)),
        "scales": (dtype, (groups, out)),
        "g_idx": (torch.int32, (columns,)),
    }


def pack(codes: Codes, section: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Suffix -> tensor for one linear."""
    assert isinstance(codes, UniformCodes)
    bits = codes.bits
    zeros = packing.pack(codes.zero.t().contiguous(), bits)
    g_idx = ordered_groups(codes.codes.shape[1], codes.group_size, codes.device) if codes.g_idx is None else codes.g_idx
    return {
        "qweight": packing.pack(codes.codes, bits).t().contiguous(),
        "qzeros": zeros if checkpoint_format(section) == V2 else zeros - ONES[bits],
        "scales": codes.scale.t().contiguous(),
        "g_idx": g_idx.int(),
    }


def unpack(tensors: Mapping[str, torch.Tensor], section: Mapping[str, Any]) -> UniformCodes:
    """Inverse of `pack`. A ``g_idx`` that is missing, or says what the order of the columns says, is None then."""
    bits = _bits(section)
    codes = packing.unpack(tensors["qweight"].t().contiguous(), bits)
    columns = codes.shape[1]
    size = group_size_of(section["group_size"], columns)
    groups = tensors["scales"].shape[0]
    if groups != -(-columns // size):
        raise ValueError(f"{groups} groups of {size} are not {columns} columns")
    ordered = ordered_groups(columns, size, codes.device)
    g_idx = tensors["g_idx"].long() if "g_idx" in tensors else ordered
    in_order = columns % size == 0 and torch.equal(g_idx, ordered)
    return UniformCodes(
        codes=codes,
        scale=tensors["scales"].t().contiguous(),
        zero=zero_points(tensors["qzeros"], section).t().contiguous(),
        bits=bits,
        group_size=size,
        g_idx=None if in_order else g_idx,
    )


def scattered(g_idx: torch.Tensor, section: Mapping[str, Any]) -> bool:
    """Whether some group's columns lie apart."""
    columns = g_idx.shape[0]
    return not torch.equal(g_idx.long(), ordered_groups(columns, group_size_of(section.get("group_size"), columns)))


def shape(
    sizes: Callable[[str], tuple[int, ...]], tensor: Callable[[str], torch.Tensor], section: Mapping[str, Any]
) -> tuple[int, int]:
    """``(out, in)``."""
    words, out = sizes("qweight")
    return out, words * 32 // _bits(section)


def zero_points(words: torch.Tensor, section: Mapping[str, Any]) -> torch.Tensor:
    """qzeros ``[groups, out/n]`` -> zeros uint8 ``[groups, out]``."""
    bits = _bits(section)
    return packing.unpack(words if checkpoint_format(section) == V2 else words + ONES[bits], bits)


def checkpoint_format(section: Mapping[str, Any]) -> str:
    """`gptq` (version 1; also where nothing is said, as in AutoGPTQ's files) or `gptq_v2`."""
    said = section.get("checkpoint_format") or section.get("format") or V1
    if said not in (V1, V2):
        raise QtoolError(f"quantization_config: checkpoint_format is {said!r}; qtool reads {V1!r} and {V2!r}.")
    return str(said)


def quantization_config(bits: int, group_size: int, sym: bool, damp_percent: float) -> dict[str, Any]:
    """The section of config.json, which is also the whole of quantize_config.json.

    ``desc_act`` tells readers that groups are of scattered columns, so that they need g_idx. Ours never are, in
    whatever order the columns were rounded (static groups): g_idx is ``i // group_size``. vLLM refuses true.
    """
    container = V1 if sym else V2  # version 1 cannot say "zero is 0" in a way that every reader understands
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": False,
        "damp_percent": damp_percent,
        "true_sequential": True,
        "static_groups": True,
        "lm_head": False,
        "checkpoint_format": container,
        "method": "gptq",  # the last four are GPTQModel's
        "format": container,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["qtool"]},
    }


def observed(tensor: Callable[[str], torch.Tensor], parts: Collection[str], section: Mapping[str, Any]) -> Observed:
    """Zero points, and whether ``desc_act`` would have to be true."""
    low, high = zero_points(tensor("qzeros"), section).aminmax()
    apart = "g_idx" in parts and scattered(tensor("g_idx"), section)
    return Observed((int(low), int(high)), apart)


def stores(made: Mapping[str, Any]) -> bool:
    """Whether an output that a manifest tells of lies in this format."""
    return bool(made.get("method") == "gptq" and made.get("format", "gptq") == "gptq")


def section_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Of such an output."""
    return quantization_config(made["bits"], made["group_size"], made["sym"], made["damp_percent"])


def _bits(section: Mapping[str, Any]) -> int:
    bits = section.get("bits")
    if bits not in packing.WIDTHS:
        raise QtoolError(f"quantization_config: bits is {bits!r}; qtool reads GPTQ with 4 or 8.")
    return int(bits)
