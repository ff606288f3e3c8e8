"""Static loading rules of the runtimes that should load an artifact, as one table: rule, runtime, version, source."""

from __future__ import annotations

from collections.abc import Iterator

from qtool.convert.runtimes import vllm as vllm_rules
from qtool.convert.runtimes.rule import RuntimeRule, Subject, heads, shards

__all__ = ["RULES", "TENSOR_PARALLEL", "RuntimeRule", "Subject"]

TENSOR_PARALLEL = (1, 2, 4, 8)
AWQ_KEYS = ("quant_method", "bits", "group_size", "zero_point", "version")
GPTQ_KEYS = ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")
MARLIN_GROUPS = (-1, 32, 64, 128)  # of SGLang, which has vLLM's older Marlin
QUANTIZED = (".qweight", ".weight_packed", ".weight.absmax")  # how the tensors of a quantized module end


def _awq_keys(subject: Subject, _: int) -> Iterator[str]:
    for key in AWQ_KEYS:
        if key not in subject.quantization:
            yield f"quantization_config lacks {key!r}"
    if subject.quantization.get("version") not in ("gemm", None):
        yield f"version is {subject.quantization['version']!r}, expected 'gemm'"
    if subject.quantization.get("bits") not in (4, None):
        yield f"bits is {subject.quantization['bits']}, AWQ kernels hold 4"


def _awq_shapes(subject: Subject, _: int) -> Iterator[str]:
    yield from shards(subject, 1, multiple_out=8, multiple_in=1)


def _awq_marlin(subject: Subject, tp: int) -> Iterator[str]:
    if not subject.quantization.get("zero_point"):
        yield "zero_point is not true"
    yield from _marlin(subject, tp)


def _marlin(subject: Subject, tp: int) -> Iterator[str]:
    if subject.geometry["group_size"] not in MARLIN_GROUPS:
        yield f"group_size {subject.geometry['group_size']} is not one of -1, 32, 64, 128"
    yield from heads(subject, tp)
    yield from shards(subject, tp, multiple_out=64, multiple_in=128)


def _symmetric_marlin(subject: Subject, tp: int) -> Iterator[str]:
    if not subject.geometry["sym"]:
        yield "the grid is asymmetric (sym: false); Marlin takes symmetric ones"
    if subject.geometry["bits"] not in (4, 8):
        yield f"bits is {subject.geometry['bits']}; Marlin takes 4 and 8"
    yield from _marlin(subject, tp)


def _gptq_keys(subject: Subject, _: int) -> Iterator[str]:
    section = subject.quantization
    for key in GPTQ_KEYS:
        if key not in section:
            yield f"quantization_config lacks {key!r}"
    if section.get("bits") not in (4, 8, None):
        yield f"bits is {section['bits']!r}, expected 4 or 8"
    if section.get("checkpoint_format") not in ("gptq", "gptq_v2", None):
        yield f"checkpoint_format is {section['checkpoint_format']!r}, expected 'gptq' or 'gptq_v2'"
    if section.get("lm_head"):
        yield "lm_head is true, but the head is not quantized"


def _gptq_zeros(subject: Subject, _: int) -> Iterator[str]:
    """Kernels that ignore the zeros of symmetric files (Marlin) never notice; all others print nonsense."""
    section = subject.quantization
    middle = 2 ** (int(section.get("bits") or 4) - 1)
    version = section.get("checkpoint_format")
    for name, (low, high) in subject.zeros.items():
        if section.get("sym") and (low, high) != (middle, middle):
            found = str(low) if low == high else f"{low} to {high}"
            yield f"{name}: zero points are {found} in checkpoint_format {version!r}, a symmetric grid has {middle}"
        elif not section.get("sym") and version == "gptq" and low == 0:
            yield f"{name}: a zero point of 0 cannot be told in version 1; write checkpoint_format 'gptq_v2'"


def _gptq_groups(subject: Subject, _: int) -> Iterator[str]:
    """``desc_act: false`` tells kernels that they need no g_idx: what it says is lost then."""
    if not subject.quantization.get("desc_act"):
        for name in sorted(subject.scattered):
            yield f"{name}: g_idx is not i // group_size, and desc_act is false"


def _gptq_side(subject: Subject, _: int) -> Iterator[str]:
    side = subject.quantize_config
    if side is None:
        yield "quantize_config.json is missing"
        return
    keys = sorted(key for key in {*side, *subject.quantization} if side.get(key) != subject.quantization.get(key))
    if keys:
        yield f"quantize_config.json and config.json disagree on {', '.join(keys)}"


def _autogptq(subject: Subject, _: int) -> Iterator[str]:
    if subject.quantization.get("checkpoint_format") != "gptq":
        yield "it reads version 1 only (checkpoint_format: gptq)"
    yield from shards(subject, 1, multiple_out=32, multiple_in=32)


def _gptq_shapes(subject: Subject, _: int) -> Iterator[str]:
    yield from shards(subject, 1, multiple_out=8, multiple_in=8)


def _compressed_keys(subject: Subject, _: int) -> Iterator[str]:
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


def _nf4_keys(subject: Subject, _: int) -> Iterator[str]:
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


def _nf4_shapes(subject: Subject, _: int) -> Iterator[str]:
    yield from shards(subject, 1, multiple_out=32, multiple_in=64)


def _head(subject: Subject, _: int) -> Iterator[str]:
    """No loader of these formats is told of a quantized head or embedding; a tied head lives in the embedding."""
    for name in subject.tensors:
        module = next((name.removesuffix(end) for end in QUANTIZED if name.endswith(end)), "")
        if module.endswith(("lm_head", "embed_tokens")):
            yield f"{name}: {module} is quantized, and no loader expects that"
    if (
        subject.tensors
        and "lm_head.weight" not in subject.tensors
        and subject.config.get("tie_word_embeddings") is False
    ):
        yield "lm_head.weight is missing, and tie_word_embeddings is false"


_TRANSFORMERS = "transformers/utils/quantization_config.py"
_QLINEAR = "gptqmodel/nn_modules/qlinear/__init__.py"
_SGLANG = "sglang/srt/layers/quantization"
_HEAD = RuntimeRule("embeddings and head", "all", "loaders", "tie_word_embeddings in config.json", _head, required=True)
AWQ_RULES = (
    RuntimeRule("keys", "transformers", "5.23", f"{_TRANSFORMERS} (AwqConfig)", _awq_keys, required=True),
    _HEAD,
    RuntimeRule("shapes", "transformers + GPTQModel", "7.6", _QLINEAR, _awq_shapes, proof="run"),
    *vllm_rules.AWQ,
    RuntimeRule("Marlin kernel", "SGLang", "0.5", f"{_SGLANG}/awq.py", _awq_marlin, tensor_parallel=True),
)
GPTQ_RULES = (
    RuntimeRule("keys", "transformers", "5.23", f"{_TRANSFORMERS} (GPTQConfig)", _gptq_keys, required=True),
    RuntimeRule("zero points", "GPTQModel", "7.6", "gptqmodel/utils/model.py", _gptq_zeros, required=True),
    RuntimeRule("groups", "all", "kernels", "desc_act and g_idx", _gptq_groups, required=True),
    RuntimeRule("quantize_config.json", "AutoGPTQ", "0.7.1", "auto_gptq/modeling/_base.py", _gptq_side, required=True),
    _HEAD,
    RuntimeRule("shapes", "transformers + GPTQModel", "7.6", _QLINEAR, _gptq_shapes, proof="run"),
    RuntimeRule("version and shapes", "AutoGPTQ", "0.7.1", "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", _autogptq),
    *vllm_rules.GPTQ,
    RuntimeRule("Marlin kernel", "SGLang", "0.5", f"{_SGLANG}/gptq.py", _symmetric_marlin, tensor_parallel=True),
)
COMPRESSED_RULES = (
    RuntimeRule("keys", "compressed-tensors", "0.20", "quantization/quant_config.py", _compressed_keys, required=True),
    _HEAD,
    *vllm_rules.COMPRESSED,
)
NF4_RULES = (
    RuntimeRule("keys", "transformers", "5.23", f"{_TRANSFORMERS} (BitsAndBytesConfig)", _nf4_keys, required=True),
    _HEAD,
    RuntimeRule("CPU and GEMV kernels", "bitsandbytes", "0.50.2", "bitsandbytes/functional.py", _nf4_shapes),
    *vllm_rules.NF4,
)
RULES = {
    "awq": AWQ_RULES,
    "gptq": GPTQ_RULES,
    "compressed-tensors": COMPRESSED_RULES,
    "bitsandbytes": NF4_RULES,
}
