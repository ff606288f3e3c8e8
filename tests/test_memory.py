"""The walk's memory, predicted from shapes, against what an accelerator's allocator reported (docs/benchmarks.md)."""

from __future__ import annotations

import math

import pytest

from qtool.convert.models.shape import decoder_of, shape_of
from qtool.quantize.memory import peak_bytes, score_bytes
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.nf4 import Nf4Method

HIDDEN, INNER, TOKENS = 4096, 14336, 128 * 2048
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (1024, HIDDEN), "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 4096,
}  # fmt: skip
AWQ, GPTQ, NF4 = AwqMethod(method="awq"), GptqMethod(method="gptq"), Nf4Method(method="nf4")
SOURCE_INPUTS = {"propagate_error": False}


@pytest.mark.parametrize(
    ("outputs", "measured"),
    [
        ([AWQ.model_copy(update={"rounding": "rtn"})], 5.85),
        ([AWQ.model_copy(update=SOURCE_INPUTS)], 6.27),
        ([GPTQ.model_copy(update=SOURCE_INPUTS)], 6.27),
        ([AWQ], 9.17),
        ([GPTQ], 8.86),
        ([AWQ.model_copy(update=SOURCE_INPUTS), GPTQ.model_copy(update=SOURCE_INPUTS), NF4], 10.02),
        ([AWQ, GPTQ, NF4], 16.72),
    ],
)
def test_peak_is_what_an_h200_measured(outputs: list[Method], measured: float) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.0.{name}.weight": shape for name, shape in SHAPES.items()}
    shapes["model.embed_tokens.weight"] = (4096, HIDDEN)
    llama = decoder_of(CONFIG | {"architectures": ["LlamaForCausalLM"]})
    found = peak_bytes(llama, shapes, outputs, TOKENS, "cuda") / 2**30
    assert found == pytest.approx(measured, rel=0.05)


MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip


GGUF = GgufMethod(method="gguf")


def test_experts_are_counted_a_few_at_a_time() -> None:
    """Qwen3-30B-A3B: every expert's Gram matrices and drifts in one stream, copies of the layer, the forward; a further
    output adds its hidden states and its codes, of the layer before and of this one so far, and no Gram matrix."""
    decoder = decoder_of(MIXTURE)
    tensors = decoder.tensors()
    found = peak_bytes(decoder, tensors, [AWQ, GPTQ, GGUF], TOKENS, "cuda")
    grams, through = 128 * 2048**2, 128 * 2 * 768 * 2048
    layer = sum(math.prod(shape) for name, shape in tensors.items() if ".layers." in name)
    states = 4 * 2 * TOKENS * 2048  # the source's and three of outputs
    alive = 4 * grams + (4 + 2) * through
    copies = 3 * 2 * layer  # the source's, the stream's, its experts as they are put together
    codes = 3 * layer  # of the layer before, and of attention in this one:
    attention = 3 * sum(math.prod(shape) for name, shape in tensors.items() if "self_attn" in name and len(shape) == 2)
    least = states + alive + copies + codes + attention
    assert least < found < least + 1.3 * 2**30  # a forward's tokens
    assert found < 16 * 2**30
    fewer = peak_bytes(decoder, tensors, [AWQ, GPTQ], TOKENS, "cuda")
    assert found - fewer == states / 4 + codes / 3 + attention / 3
    half = decoder_of(MIXTURE | {"num_experts": 64})
    assert peak_bytes(half, half.tensors(), [AWQ, GPTQ, GGUF], TOKENS, "cuda") < found - alive / 2 - copies / 2.1


def test_a_soft_cap_makes_scores_whole() -> None:
    """As tests/test_sizing.py counts them storage by storage: eight bytes a score in 16 bits, four a mask's entry."""
    llama, gemma2, gemma3 = (
        shape_of(CONFIG | {"num_attention_heads": 16, "architectures": [f"{name}ForCausalLM"]})
        for name in ("Llama", "Gemma2", "Gemma3")
    )
    assert score_bytes(gemma2, 128, 2048, "cuda") == 8 * 2048**2 * (16 * 8 + 4)
    assert score_bytes(gemma2, 3, 2048, "cuda") == 3 * 2048**2 * (16 * 8 + 4)
    assert score_bytes(gemma3, 128, 2048, "cuda") == score_bytes(llama, 128, 2048, "cuda") == 0
