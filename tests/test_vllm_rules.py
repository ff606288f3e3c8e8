"""vLLM's rules against what vLLM 0.32 said when it was run (scripts/check_vllm.py)."""

from __future__ import annotations

from typing import Any

import pytest

from qtool.convert.formats import autoawq, autogptq, bnb_nf4, compressed_tensors
from qtool.convert.formats.table import FORMATS
from qtool.convert.runtimes.rule import Subject
from qtool.convert.runtimes.vllm import dtype_flag
from qtool.evaluate.engines.vllm import FACTS

AWQ = autoawq.quantization_config(128, ["lm_head"])
GPTQ = autogptq.quantization_config(4, 128, True, 0.1)
ROWS = autogptq.quantization_config(4, -1, True, 0.1)
COMPRESSED = compressed_tensors.quantization_config(4, 128, True, True)


def without(section: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name != key}


def ordered(order: object) -> dict[str, Any]:
    section = compressed_tensors.quantization_config(4, 128, True, True)
    section["config_groups"]["group_0"]["weights"]["actorder"] = order
    return section


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (AWQ, None),
        (GPTQ, None),
        (ROWS, None),
        (autogptq.quantization_config(8, 128, True, 0.1), None),  # accelerators only: the CPU kernel's rule
        (ROWS | {"desc_act": True}, None),  # read as false
        (COMPRESSED, None),
        (compressed_tensors.quantization_config(4, 128, False, False), None),
        (ordered("weight"), None),
        (bnb_nf4.quantization_config(True, ["lm_head"]), None),
        ({}, None),
        (AWQ | {"zero_point": False}, "zero_point is false"),
        (GPTQ | {"desc_act": True}, "desc_act is true"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"desc_act": True}}}, "desc_act is true in the dynamic rule '+:.*down.*'"),
        (GPTQ | {"dynamic": {"-:.*down.*": {"desc_act": True}}}, None),
        (GPTQ | {"dynamic": {"+:.*": {"desc_act": True, "group_size": -1}}}, None),
        (autogptq.quantization_config(4, 128, False, 0.1), "sym is false"),
        (without(GPTQ, "bits"), "quantization_config lacks 'bits'"),
        (without(GPTQ, "desc_act"), "quantization_config lacks 'desc_act'"),
        (ordered("group"), "actorder is 'group'"),
        (ordered("dynamic"), "actorder is 'dynamic'"),
        (ordered(True), "actorder is True"),
        (AWQ | {"quant_method": "hqq"}, "vLLM knows no quant_method 'hqq'"),
    ],
)
def test_what_vllm_refuses(section: dict[str, Any], said: str | None) -> None:
    found = FACTS.refuses_model({"quantization_config": section} if section else {})
    assert [reason for reason in found if said and said in reason] == found
    assert bool(found) == (said is not None)


def test_an_asymmetric_file_is_told_the_way_that_loads() -> None:
    (reason,) = FACTS.refuses_model({"quantization_config": autogptq.quantization_config(4, 128, False, 0.1)})
    assert "format: compressed-tensors" in reason


def test_the_plugin_of_nf4_is_named() -> None:
    config = {"quantization_config": bnb_nf4.quantization_config(True, ["lm_head"])}
    said = "vLLM loads it with vllm-bnb-plugin only (pip install vllm-bnb-plugin, in vLLM's environment)"
    assert FACTS.needs_beside(config) == said
    assert FACTS.needs_beside({"quantization_config": AWQ}) == ""
    runtimes = [rule.runtime for rule in FORMATS["bitsandbytes"].RULES if "vLLM" in rule.runtime]
    assert runtimes == ["vllm-bnb-plugin 0.0.3 in vLLM"]


def test_a_class_that_does_not_name_its_fused_matrices_takes_no_nf4() -> None:
    section = bnb_nf4.quantization_config(True, ["lm_head", "gate_projections"])
    (reason,) = FACTS.refuses_model({"architectures": ["IQuestLoopCoderForCausalLM"], "quantization_config": section})
    assert "does not name its fused matrices" in reason
    assert not FACTS.refuses_model({"architectures": ["LlamaForCausalLM"], "quantization_config": section})


def test_glm4_takes_no_gptq() -> None:
    """vLLM 0.32 ends in `MergedColumnParallelLinear … no attribute 'data'`; AWQ and compressed-tensors load."""
    section = autogptq.quantization_config(4, 128, True, 0.1)
    (reason,) = FACTS.refuses_model({"architectures": ["Glm4ForCausalLM"], "quantization_config": section})
    assert "does not load GPTQ files; take `format: compressed-tensors`" in reason
    assert not FACTS.refuses_model({"architectures": ["GlmForCausalLM"], "quantization_config": section})


def test_gemma_runs_in_bfloat16() -> None:
    config = {"architectures": ["Gemma2ForCausalLM"], "dtype": "float16", "quantization_config": AWQ}
    assert dtype_flag(config) == "bfloat16"
    assert dtype_flag(config | {"dtype": "bfloat16"}) is None
    assert dtype_flag(config | {"architectures": ["GemmaForCausalLM"]}) is None
    assert not FACTS.refuses_model(config)


def test_kernels_of_a_refused_file_say_nothing() -> None:
    subject = Subject({"quantization_config": GPTQ | {"desc_act": True}}, {"q_proj": (128, 128)})
    asked = [rule for rule in FORMATS["gptq"].RULES if rule.runtime == "vLLM"]
    assert [rule.name for rule in asked if rule.applies(subject)] == ["loading"]
    assert {rule.version for rule in asked} == {"0.32"}


def test_every_source_exists_in_the_version_that_the_rule_names() -> None:
    """awq.py, awq_marlin.py and gptq_marlin.py were there before 0.32."""
    named = {rule.source.rsplit("/", 1)[-1] for row in FORMATS.values() for rule in row.RULES if rule.runtime == "vLLM"}
    assert named == {
        "auto_awq.py", "auto_gptq.py", "compressed_tensors.py", "marlin.py", "cpu.py", "marlin_utils.py",
    }  # fmt: skip
