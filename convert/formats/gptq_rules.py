"""What runtimes ask of a GPTQ file: their loading rules, and why some do not load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.convert.formats.gptq_dynamic import DYNAMIC, other_sizes
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
    shards,
)

# auto_gptq/modeling/_const.py (0.7.1), with a transformers from 4.38 on
AUTOGPTQ_MODELS = {
    "Yi", "baichuan", "bloom", "codegen", "deci", "falcon", "gemma", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
    "internlm", "llama", "longllama", "mistral", "mixtral", "moss", "opt", "qwen", "qwen2", "RefinedWeb",
    "RefinedWebModel", "stablelm_epoch", "xverse",
}  # fmt: skip
WRITTEN = ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")
ASYMMETRIC = "take `format: compressed-tensors` for asymmetric codes, or `method: awq`: vLLM loads both"


def _keys(subject: Subject, _: int) -> Iterator[str]:
    section = subject.quantization
    for key in WRITTEN:
        if key not in section:
            yield f"quantization_config lacks {key!r}"
    if section.get("bits") not in (4, 8, None):
        yield f"bits is {section['bits']!r}, expected 4 or 8"
    if section.get("checkpoint_format") not in ("gptq", "gptq_v2", None):
        yield f"checkpoint_format is {section['checkpoint_format']!r}, expected 'gptq' or 'gptq_v2'"
    if section.get("lm_head"):
        yield "lm_head is true, but the head is not quantized"


def _zeros(subject: Subject, _: int) -> Iterator[str]:
    """Kernels that ignore the zeros of symmetric files (Marlin) never notice; all others print nonsense."""
    section = subject.quantization
    version = section.get("checkpoint_format")
    for name, (low, high) in subject.zeros.items():
        middle = 2 ** (int(subject.geometry_of(name).get("bits") or 4) - 1)
        if section.get("sym") and (low, high) != (middle, middle):
            found = str(low) if low == high else f"{low} to {high}"
            yield f"{name}: zero points are {found} in checkpoint_format {version!r}, a symmetric grid has {middle}"
        elif not section.get("sym") and version == "gptq" and low == 0:
            yield f"{name}: a zero point of 0 cannot be told in version 1; write checkpoint_format 'gptq_v2'"


def _groups(subject: Subject, _: int) -> Iterator[str]:
    """``desc_act: false`` tells kernels that they need no g_idx: what it says is lost then."""
    if not subject.quantization.get("desc_act"):
        for name in sorted(subject.scattered):
            yield f"{name}: g_idx is not i // group_size, and desc_act is false"


def _side(subject: Subject, _: int) -> Iterator[str]:
    side = subject.quantize_config
    if side is None:
        yield "quantize_config.json is missing"
        return
    keys = sorted(key for key in {*side, *subject.quantization} if side.get(key) != subject.quantization.get(key))
    if keys:
        yield f"quantize_config.json and config.json disagree on {', '.join(keys)}"


def _autogptq(subject: Subject, _: int) -> Iterator[str]:
    kind = subject.config.get("model_type")
    if kind not in AUTOGPTQ_MODELS:
        yield f"it knows no models of type {kind!r}"
    if subject.quantization.get("checkpoint_format") != "gptq":
        yield "it reads version 1 only (checkpoint_format: gptq)"
    if subject.quantization.get(DYNAMIC):
        yield f"it knows no {DYNAMIC}: it takes all linears for alike"
    yield from shards(subject, 1, multiple_out=32, multiple_in=32)


def _shapes(subject: Subject, _: int) -> Iterator[str]:
    yield from shards(subject, 1, multiple_out=8, multiple_in=8)


def _sizes(subject: Subject, _: int) -> Iterator[str]:
    yield from _transformers(subject.quantization)


def _sglang(subject: Subject, tp: int) -> Iterator[str]:
    if not subject.geometry["sym"]:
        yield "the grid is asymmetric (sym: false); Marlin takes symmetric ones"
    if subject.geometry["bits"] not in (4, 8):
        yield f"bits is {subject.geometry['bits']}; Marlin takes 4 and 8"
    yield from sglang.marlin(subject, tp)


def _vllm(section: Mapping[str, Any]) -> Iterator[str]:
    yield from vllm.lacking(section, "bits", "group_size", "sym", "desc_act")
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


def _transformers(section: Mapping[str, Any]) -> Iterator[str]:
    if other_sizes(section):
        yield "it makes all linears of one size (optimum reads no `dynamic`); vLLM and GPTQModel.load do not"


RUNS_IN: tuple[Runtime, ...] = (
    vllm.runtime(_vllm, refuses_model=vllm.takes_no_gptq),
    Runtime(
        "transformers",
        "transformers",
        "gptqmodel",
        "pip install gptqmodel optimum",
        _transformers,
        refuses_experts=fused_experts,
    ),
    sglang.RUNTIME,
)
RULES: tuple[RuntimeRule, ...] = (
    RuntimeRule("keys", "transformers", "5.23", f"{TRANSFORMERS} (GPTQConfig)", _keys, required=True),
    RuntimeRule("zero points", "GPTQModel", "7.6", "gptqmodel/utils/model.py", _zeros, required=True),
    RuntimeRule("groups", "all", "kernels", "desc_act and g_idx", _groups, required=True),
    RuntimeRule("quantize_config.json", "AutoGPTQ", "0.7.1", "auto_gptq/modeling/_base.py", _side, required=True),
    HEAD,
    experts_rule(fused_experts),
    RuntimeRule("shapes", "transformers + GPTQModel", "7.6", QLINEAR, _shapes, proof="run"),
    RuntimeRule("sizes", "transformers + GPTQModel", "7.6", "optimum/gptq/quantizer.py", _sizes, proof="run"),
    RuntimeRule("model, version, shapes", "AutoGPTQ", "0.7.1", "_const.py, qlinear_cuda.py", _autogptq),
    *vllm.rules("auto_gptq.py", _vllm, refuses_model=vllm.takes_no_gptq),
    sglang.marlin_rule("gptq.py", _sglang),
)
