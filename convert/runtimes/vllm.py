"""vLLM's loading rules, as vLLM 0.32 has them.

What it refuses, whatever the card, was seen by running its CPU build (scripts/check_vllm.py runs all of it again), and
so was its kernel for the CPU. Marlin's rules were read: model_executor/kernels/linear/mixed_precision/marlin.py asks
for the type, the group size, and groups that do not lie across ranks; shapes that its tiles do not divide are padded
with zeros, with a warning. Marlin and Machete themselves ran with vLLM 0.26, which asked for `out % 64 == 0` and
`in % 128 == 0` as well and took another kernel where that did not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.convert.models.table import find_family
from qtool.convert.runtimes.rule import RuntimeRule, Subject, heads, shards

VERSION = "0.32"
PLUGIN, PLUGIN_VERSION = "vllm-bnb-plugin", "0.0.3"
WITH_PLUGIN = f"{PLUGIN} {PLUGIN_VERSION} in vLLM"
INSTALL_PLUGIN = f"pip install {PLUGIN}"
MARLIN_GROUPS = (-1, 32, 64, 128)
CPU_MULTIPLE = 32
KEYS = {"awq": ("bits", "group_size", "zero_point"), "gptq": ("bits", "group_size", "sym", "desc_act")}
ASYMMETRIC = "take `format: compressed-tensors` for asymmetric codes, or `method: awq`: vLLM loads both"
_FOLDER = "vllm/model_executor/layers/quantization"
_KERNELS = "vllm/model_executor/kernels/linear/mixed_precision"


def refusals(config: Mapping[str, Any]) -> list[str]:
    """Why vLLM loads a model with this config.json on no platform; empty where nothing is against it. NF4 is loaded,
    but by a plugin: `plugin_of`."""
    section = config.get("quantization_config") or {}
    method = section.get("quant_method")
    checks = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "bitsandbytes": _nf4}
    if method not in checks:
        return [f"vLLM knows no quant_method {method!r}"] if section else []
    missing = [f"quantization_config lacks {key!r}" for key in KEYS.get(str(method), ()) if section.get(key) is None]
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return [*missing, *checks[str(method)](section, dtype)]


def plugin_of(config: Mapping[str, Any]) -> str | None:
    """The package that vLLM needs beside itself for this config.json."""
    return PLUGIN if (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes" else None


def notes(section: Mapping[str, Any]) -> list[str]:
    """What whoever makes an artifact with this quantization_config should hear of vLLM."""
    config = {"quantization_config": section}
    found = [f"vLLM does not load it: {reason}" for reason in refusals(config)]
    plugin = plugin_of(config)
    return [*found, f"vLLM loads it with {plugin} only ({INSTALL_PLUGIN}, in vLLM's environment)"] if plugin else found


def dtype_flag(config: Mapping[str, Any]) -> str | None:
    """What must follow ``--dtype`` where config.json says a dtype that vLLM does not run the model in: vllm/config/
    model.py, whose --dtype auto runs it in bfloat16 then."""
    family = find_family(config)
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return "bfloat16" if family and not family.float16 and said == "float16" else None


def _awq(section: Mapping[str, Any], _: str) -> Iterator[str]:
    if section.get("bits") not in (4, None):
        yield f"bits is {section['bits']!r}; vLLM's AWQ has 4"
    if section.get("zero_point") is False:
        yield "zero_point is false: vLLM leaves the zero points out (it loads, and what it answers is wrong)"


def _gptq(section: Mapping[str, Any], _: str) -> Iterator[str]:
    bits, size = section.get("bits"), section.get("group_size")
    if section.get("sym") is False:
        yield f"sym is false: vLLM's GPTQ takes symmetric files only; {ASYMMETRIC}"
    if bits not in (4, 8, None):
        yield f"bits is {bits!r}; vLLM's GPTQ takes 4 and 8"
    if section.get("desc_act") and size != -1:
        yield "desc_act is true: vLLM takes no groups of scattered columns from 0.32 on; convert again (static groups)"
    for pattern, rule in (section.get("dynamic") or {}).items():
        if pattern.startswith("-:") or not isinstance(rule, Mapping):
            continue
        if rule.get("desc_act", section.get("desc_act")) and rule.get("group_size", size) != -1:
            yield f"desc_act is true in the dynamic rule {pattern!r}: vLLM takes no groups of scattered columns"
        if rule.get("sym") is False:
            yield f"sym is false in the dynamic rule {pattern!r}: vLLM's GPTQ takes symmetric files only"


def _compressed(section: Mapping[str, Any], _: str) -> Iterator[str]:
    for name, group in (section.get("config_groups") or {}).items():
        order = ((group or {}).get("weights") or {}).get("actorder")
        if order not in (None, False, "static", "weight"):
            yield f"{name}: actorder is {order!r}; vLLM takes 'static' and 'weight' from 0.32 on"


def _nf4(section: Mapping[str, Any], _: str) -> Iterator[str]:
    if not section.get("load_in_4bit") and not section.get("load_in_8bit"):
        yield "neither load_in_4bit nor load_in_8bit is true"


def loads(subject: Subject) -> bool:
    """Whether the kernels are worth a look."""
    return not refusals(subject.config)


def _loading(subject: Subject, _: int) -> Iterator[str]:
    yield from refusals(subject.config)


def _unfused_shapes(subject: Subject, tp: int) -> Iterator[str]:
    """AutoAWQLinearMethod.create_weights, of every AWQ kernel."""
    yield from heads(subject, tp)
    yield from shards(subject, tp, multiple_out=8, multiple_in=1)


def _marlin(subject: Subject, tp: int) -> Iterator[str]:
    said = subject.geometry
    if said["group_size"] not in MARLIN_GROUPS:
        yield f"group_size {said['group_size']} is not one of -1, 32, 64, 128"
    if said["bits"] not in (4, 8):
        yield f"bits is {said['bits']}; Marlin takes 4 and 8"
    if said.get("sym") is False and said["bits"] == 8:
        yield "the grid is asymmetric with 8 bits; Marlin takes zero points with 4 bits only"
    yield from heads(subject, tp)
    yield from shards(subject, tp, multiple_out=1, multiple_in=1)


def _cpu(subject: Subject, tp: int) -> Iterator[str]:
    said = subject.geometry
    if said["bits"] != 4:
        yield f"bits is {said['bits']}; vLLM on a CPU takes 4 only"
    if (said["group_size"] or 0) > 0 and said["group_size"] % 2:
        yield f"group_size {said['group_size']} is odd"
    yield from heads(subject, tp)
    yield from shards(subject, tp, CPU_MULTIPLE, CPU_MULTIPLE)


def _rules(file: str, *more: RuntimeRule) -> tuple[RuntimeRule, ...]:
    return (
        RuntimeRule("loading", "vLLM", VERSION, f"{_FOLDER}/{file}", _loading, proof="run"),
        *more,
        RuntimeRule(
            "Marlin kernel", "vLLM", VERSION, f"{_KERNELS}/marlin.py", _marlin, tensor_parallel=True, applies=loads
        ),
        RuntimeRule(
            "CPU kernel", "vLLM", VERSION, f"{_KERNELS}/cpu.py", _cpu, tensor_parallel=True, proof="run", applies=loads
        ),
    )


AWQ = _rules(
    "auto_awq.py",
    RuntimeRule(
        "plain kernel", "vLLM", VERSION, f"{_FOLDER}/auto_awq.py", _unfused_shapes, tensor_parallel=True, applies=loads
    ),
)
GPTQ = _rules("auto_gptq.py")
COMPRESSED = _rules("compressed_tensors/compressed_tensors.py")
NF4 = (RuntimeRule("loading", WITH_PLUGIN, VERSION, "vllm_bnb_plugin", _loading, proof="run"),)
