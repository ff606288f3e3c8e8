"""The compressed-tensors container (`quant_method: compressed-tensors`, `format: pack-quantized`): W4A16 and W8A16.

Sources: compressed-tensors compressors/pack_quantized/{base,helpers}.py, quantization/quant_config.py.
A linear ``[out, in]`` with n = 32 / bits values to a word becomes weight_packed int32 ``[out, in/n]``, weight_scale
``[out, groups]`` and weight_shape int64 ``[2]``. Its values are signed, stored with 2**(bits-1) added, so that a stored
value is our code, and a signed zero point plus 2**(bits-1) our zero. Asymmetric linears also have weight_zero_point
int32 ``[out/n, groups]``, packed along OUT; act-order files by others may have weight_g_idx ``[in]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from qtool import QtoolError
from qtool.convert.formats import packing
from qtool.convert.formats.apart import Apart
from qtool.convert.formats.codes import Codes, UniformCodes, group_size_of, names_in, ordered_groups
from qtool.convert.runtimes import vllm
from qtool.convert.runtimes.rule import HEAD, Runtime, RuntimeRule, Subject, experts_rule, nothing_observed

SAFETENSORS: Literal[True] = True
MARK = "weight_packed"
SUFFIXES: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
POSITIVE: tuple[str, ...] = ()
NONZERO: tuple[str, ...] = ("weight_scale",)  # symmetric grids may run backwards
BY_ROW = True
EXPANDS = False
COPIES: tuple[str, ...] = ()
FORMAT = "pack-quantized"
KEYS = frozenset({"quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme"})


def skipped(section: Mapping[str, Any]) -> list[str]:
    """Names and patterns (`re:…`) of modules that stay unquantized. Raises QtoolError for a scheme that qtool does not
    read: activations, the cache or other modules than all linears."""
    first, *more = groups = [*_groups(section).values()]
    if first.get("targets") != ["Linear"]:
        raise QtoolError(f"quantization_config: targets is {first.get('targets')!r}; qtool reads ['Linear'].")
    if any("Linear" in names_in(group.get("targets"), "targets") for group in more):
        raise QtoolError("quantization_config: two groups have the target 'Linear'.")
    keys = ("input_activations", "output_activations")
    others = [key for group in groups for key in keys if group.get(key) is not None]
    if section.get("kv_cache_scheme") is not None or others:
        raise QtoolError("quantization_config: quantizes activations or the cache too; qtool reads weights only.")
    return names_in(section.get("ignore"), "ignore")


def with_plain(section: Mapping[str, Any], plain: Sequence[str], experts: bool) -> dict[str, Any]:
    """Full names, as every reader takes them."""
    return {**section, "ignore": [*section["ignore"], *plain]}


def with_apart(section: Mapping[str, Any], apart: Apart, linears: Sequence[str]) -> dict[str, Any]:
    """Full names in `ignore`, and a group of `config_groups` for all linears of the same settings: every reader takes
    a full name before the class `Linear`."""
    said = geometry(section)
    order = bool(_scheme(section)["actorder"])
    same: dict[tuple[int, int], list[str]] = {}
    for linear, settings in apart.items():
        if settings is not None:
            own = {**said, **settings}
            same.setdefault((own["bits"], own["group_size"]), []).append(linear)
    groups = dict(section["config_groups"])
    for (bits, size), linears in same.items():
        groups[f"group_{len(groups)}"] = _group(linears, bits, size, said["sym"], order)
    ignored = [linear for linear, settings in apart.items() if settings is None]
    return {**section, "config_groups": groups, "ignore": [*section["ignore"], *ignored]}


def own(section: Mapping[str, Any], linear: str) -> Mapping[str, Any]:
    """With the group alone that names it, or the first. Raises QtoolError for groups that name linears by patterns."""
    groups = _groups(section)
    if len(groups) == 1:
        return section
    chosen, *named = groups
    for key in named:
        targets = names_in(groups[key].get("targets"), "targets")
        if any(target.startswith("re:") for target in targets):
            raise QtoolError("quantization_config: targets holds a pattern; qtool reads the names of linears.")
        chosen = key if linear in targets else chosen
    return {**section, "config_groups": {chosen: groups[chosen]}}


def with_parts(section: Mapping[str, Any], parts: Sequence[str], matrices: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A pattern for each: names are compared whole."""
    return {**section, "ignore": [*section["ignore"], *(f"re:.*{part}.*" for part in parts)]}


def geometry(section: Mapping[str, Any]) -> dict[str, Any]:
    """bits, group_size, sym; of several groups what the first one says, that of all linears which no other names."""
    groups = section.get("config_groups")
    scheme = _scheme(section) if isinstance(groups, dict) and groups else {}
    size = -1 if scheme.get("strategy") == "channel" else scheme.get("group_size")
    return {"bits": scheme.get("num_bits"), "group_size": size, "sym": scheme.get("symmetric")}


def multiples(section: Mapping[str, Any]) -> tuple[int, int]:
    """Columns are packed, and so are the rows of zero points."""
    values = 32 // _bits(section)
    return (1 if _scheme(section)["symmetric"] else values), values


def specs(
    out: int, columns: int, section: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors that replace one ``.weight``."""
    bits = _bits(section)
    groups = columns // _group_size(section, columns)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (out, columns * bits // 32)),
        "weight_scale": (dtype, (out, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not _scheme(section)["symmetric"]:
        found["weight_zero_point"] = (torch.int32, (out * bits // 32, groups))
    return found


def pack(codes: Codes, section: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Suffix -> tensor for one linear."""
    assert isinstance(codes, UniformCodes)
    found = {
        "weight_packed": packing.pack(codes.codes, codes.bits),
        "weight_scale": codes.scale,
        "weight_shape": torch.tensor(codes.codes.shape),
    }
    if not _scheme(section)["symmetric"]:
        found["weight_zero_point"] = packing.pack(codes.zero.t().contiguous(), codes.bits).t().contiguous()
    return found


def unpack(tensors: Mapping[str, torch.Tensor], section: Mapping[str, Any]) -> UniformCodes:
    """Inverse of `pack`."""
    bits = _bits(section)
    scale = tensors["weight_scale"]
    codes = packing.unpack(tensors["weight_packed"], bits)
    columns = codes.shape[1]
    size = _group_size(section, columns)
    if "weight_zero_point" in tensors:
        zero = packing.unpack(tensors["weight_zero_point"].t().contiguous(), bits).t().contiguous()
    else:
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    ordered = ordered_groups(columns, size, codes.device)
    g_idx = tensors["weight_g_idx"].long() if "weight_g_idx" in tensors else ordered
    in_order = columns % size == 0 and torch.equal(g_idx, ordered)
    return UniformCodes(codes, scale, zero, bits, size, None if in_order else g_idx)


def shape(
    sizes: Callable[[str], tuple[int, ...]], tensor: Callable[[str], torch.Tensor], section: Mapping[str, Any]
) -> tuple[int, int]:
    """``(out, in)``."""
    said = tensor("weight_shape")
    if said.dtype != torch.int64 or said.shape != (2,) or not bool((said > 0).all()):
        raise QtoolError("weight_shape is not two whole numbers above 0")
    out, columns = said.tolist()
    return out, columns


def quantization_config(bits: int, group_size: int, sym: bool, desc_act: bool) -> dict[str, Any]:
    """The section that compressed-tensors' own QuantizationConfig reads."""
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": _group(["Linear"], bits, group_size, sym, desc_act)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _group(targets: list[str], bits: int, group_size: int, sym: bool, desc_act: bool) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": "static" if desc_act else None,  # groups are of neighbouring columns all the same
    }
    scheme = {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
    return scheme | {"format": FORMAT}


def stores(made: Mapping[str, Any]) -> bool:
    """Whether an output that a manifest tells of lies in this format."""
    return bool(made.get("format") == "compressed-tensors")


def section_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Of such an output."""
    return quantization_config(made["bits"], made["group_size"], made["sym"], made["desc_act"])


def _scheme(section: Mapping[str, Any]) -> dict[str, Any]:
    """The weights' arguments of the first group."""
    group = next(iter(_groups(section).values()))
    scheme: dict[str, Any] = group.get("weights") or {}
    if not isinstance(scheme, dict) or scheme.get("type", "int") != "int" or scheme.get("dynamic"):
        raise QtoolError("quantization_config: weights is no scheme of static integers, which is what qtool reads.")
    return scheme


def _groups(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups = section.get("config_groups") or {}
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise QtoolError("quantization_config: config_groups holds no group of settings.")
    return groups


def _bits(section: Mapping[str, Any]) -> int:
    bits = _scheme(section).get("num_bits")
    if bits not in packing.WIDTHS:
        raise QtoolError(f"quantization_config: num_bits is {bits!r}; qtool reads pack-quantized with 4 or 8.")
    return int(bits)


def _group_size(section: Mapping[str, Any], columns: int) -> int:
    return group_size_of(geometry(section)["group_size"], columns)


def _keys(subject: Subject, _: int) -> Iterator[str]:
    section = subject.quantization
    if section.get("format") != "pack-quantized":
        yield f"format is {section.get('format')!r}, expected 'pack-quantized'"
    if section.get("quantization_status") != "compressed":
        yield f"quantization_status is {section.get('quantization_status')!r}, expected 'compressed'"
    if "lm_head" not in (section.get("ignore") or ()):
        yield "ignore lacks 'lm_head'"
    for key, value in subject.geometry.items():
        if value is None:
            yield f"config_groups does not say {key}"


def _vllm(section: Mapping[str, Any]) -> Iterator[str]:
    for name, group in (section.get("config_groups") or {}).items():
        order = ((group or {}).get("weights") or {}).get("actorder")
        if order not in (None, False, "static", "weight"):
            yield f"{name}: actorder is {order!r}; vLLM takes 'static' and 'weight' from 0.32 on"


def _decompressed(section: Mapping[str, Any]) -> Iterator[str]:
    if geometry(section).get("sym") is False:
        yield "the grid is asymmetric: it delivers no zero points to experts and fails; a symmetric file loads"


observed = nothing_observed
RUNS_IN: tuple[Runtime, ...] = (
    vllm.runtime(_vllm),
    Runtime(
        "transformers",
        "compressed-tensors",
        "compressed-tensors",
        "pip install compressed-tensors",
        refuses_experts=_decompressed,
    ),
)
RULES: tuple[RuntimeRule, ...] = (
    RuntimeRule("keys", "compressed-tensors", "0.20", "quantization/quant_config.py", _keys, required=True),
    HEAD,
    experts_rule(_decompressed, proof="run"),
    *vllm.rules("compressed_tensors/compressed_tensors.py", _vllm),
)
