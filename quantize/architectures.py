"""Facts about decoder layers, as a table: which linears share an input, and which tensor can absorb its scale.

Names are those of the checkpoint below ``{prefix}{layer index}.``. A new architecture is a new row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qtool import QtoolError


@dataclass(frozen=True)
class InputGroup:
    """Linears fed by one tensor. ``producer`` made that tensor, so dividing its output by s and multiplying the
    linears' columns by s changes nothing:

    norm: RMSNorm weight /= s.   linear: the producer's rows (and bias) /= s.
    heads: as linear, but each key/value head feeds several query heads, which must then share its scales.
    """

    name: str
    linears: tuple[str, ...]
    producer: str
    kind: Literal["norm", "linear", "heads"]


@dataclass(frozen=True)
class Architecture:
    """Where the decoder layers are, and their input groups in forward order."""

    groups: tuple[InputGroup, ...]
    prefix: str = "model.layers."

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)


LLAMA = Architecture(
    groups=(
        InputGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "norm"),
        InputGroup("o", ("self_attn.o_proj",), "self_attn.v_proj", "heads"),
        InputGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm"),
        InputGroup("down", ("mlp.down_proj",), "mlp.up_proj", "linear"),
    )
)

ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,  # its q/k norms sit behind q_proj and k_proj, which no scale passes
    "IQuestCoderForCausalLM": LLAMA,
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
