"""Facts about decoder layers, as a table: which linears share an input, and which tensor can absorb its scale.

Names are those of the checkpoint below ``{prefix}{layer index}.``. A new architecture is a new row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from qtool import QtoolError


@dataclass(frozen=True)
class InputGroup:
    """Linears fed by one tensor. ``producer`` made that tensor, so dividing its output by s and multiplying the
    linears' columns by s changes nothing:

    norm: RMSNorm weight /= s.   norm_plus_one: a norm that applies 1 + weight: weight <- (1 + weight) / s - 1.
    linear: the producer's rows (and bias) /= s.
    heads: as linear, but each key/value head feeds several query heads, which must then share its scales.
    """

    name: str
    linears: tuple[str, ...]
    producer: str
    kind: Literal["norm", "norm_plus_one", "linear", "heads"]


@dataclass(frozen=True)
class Architecture:
    """Where the decoder layers are, and their input groups in forward order. ``whole_scores``: transformers computes
    its attention without SDPA, every head's scores at once."""

    groups: tuple[InputGroup, ...]
    prefix: str = "model.layers."
    whole_scores: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)


def _decoder(before_mlp: str, norm: Literal["norm", "norm_plus_one"]) -> Architecture:
    """Attention and a gated MLP, each behind a norm of kind ``norm``; the MLP's is called ``before_mlp``."""
    return Architecture(
        groups=(
            InputGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", norm),
            InputGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads"),
            InputGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), before_mlp, norm),
            InputGroup("down", ("mlp.down_proj",), "mlp.up_proj", "linear"),
        )
    )


LLAMA = _decoder("post_attention_layernorm", "norm")
GEMMA = _decoder("post_attention_layernorm", "norm_plus_one")
# two more norms, behind o_proj and down_proj, feed the residual stream and absorb nothing
GEMMA3 = _decoder("pre_feedforward_layernorm", "norm_plus_one")
GEMMA2 = replace(GEMMA3, whole_scores=True)  # for its soft cap

ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,  # its q/k norms sit behind q_proj and k_proj, which no scale passes
    "IQuestCoderForCausalLM": LLAMA,
    "GemmaForCausalLM": GEMMA,  # CodeGemma
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,  # text only (gemma3_text); its q/k norms are as Qwen3's
}


def architecture_of(config: Any) -> Architecture:
    """The table's row for a config. Raises QtoolError saying what a new row needs."""
    names = getattr(config, "architectures", None) or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise QtoolError(
        f"architecture {', '.join(names) or '(none named in config.json)'} is not known to qtool. Known: "
        f"{', '.join(ARCHITECTURES)}. What is missing: which linears share an input and which norm or linear feeds "
        "them (a row of ARCHITECTURES in quantize/architectures.py)."
    )
