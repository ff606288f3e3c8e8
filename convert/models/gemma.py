"""Gemma (CodeGemma), Gemma 2 and the text model of Gemma 3: norms that apply 1 + weight, and tied heads; from the
second on, four norms a layer and windows."""

from __future__ import annotations

from dataclasses import replace

from qtool import QtoolError
from qtool.convert.models.family import FULL, SLIDING, TANH_GELU, Family, GgufFacts, Ropes, Settings, Value, Windows
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import TWO_NORMS, decoder_tensors, gated_decoder

WINDOW = 4096
PLUS_ONE = ("norm.weight",)
# llama.cpp scales the scores of models with so many layers by hidden / heads
HIDDEN_OVER_HEADS = {"gemma2": 46, "gemma3": 62}
_FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_DEFAULTS = {
    "head_dim": 256, "max_position_embeddings": 8192, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
_DEFAULTS2 = _DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "sliding_window": WINDOW,
    "query_pre_attn_scalar": 256,
}  # fmt: skip
_SAYS = frozenset((
    "hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
))  # fmt: skip
# of the model with images, from whose config.json the text's may be taken
_SAYS3 = frozenset((
    "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern", "vision_config", "text_config",
    "image_token_id", "mm_tokens_per_image",
))  # fmt: skip


def _keys(architecture: str, settings: Settings, shape: Geometry) -> dict[str, Value]:
    """Windows and soft caps (llama.cpp src/models/gemma2.cpp, gemma3.cpp)."""
    layers = shape.layers
    full_layers = [index for index, window in enumerate(shape.windows) if window is None]
    period = full_layers[0] + 1 if full_layers else layers + 1
    if period == 1 or full_layers != [index for index in range(layers) if (index + 1) % period == 0]:
        raise QtoolError(
            f"config.json: attention slides in all of {layers} layers but {full_layers}; llama.cpp's {architecture} "
            "needs one layer in so many, and not every one, to attend to everything."
        )
    scale = shape.hidden // shape.heads if layers == HIDDEN_OVER_HEADS[architecture] else shape.head_dim
    asked = settings["query_pre_attn_scalar"]
    if asked != scale:
        raise QtoolError(f"config.json: query_pre_attn_scalar is {asked}; llama.cpp's {architecture} takes {scale}.")
    keys: dict[str, Value] = {
        "attention.sliding_window": int(settings.get("sliding_window") or WINDOW),
        "attention.sliding_window_pattern": period,
    }
    final = settings.get("final_logit_softcapping")
    return keys if final is None else keys | {"final_logit_softcapping": float(final)}


def _keys2(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    keys = _keys("gemma2", settings, shape)
    cap = settings.get("attn_logit_softcapping")
    if cap is None or settings.get("final_logit_softcapping") is None:
        raise QtoolError("config.json: a soft cap is null; llama.cpp's gemma2 always has both.")
    return keys | {"attn_logit_softcapping": float(cap)}


def _keys3(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    keys, local = _keys("gemma3", settings, shape), rope[SLIDING]
    if len(local) > 1:
        raise QtoolError("config.json: sliding layers with a rotary scaling of their own cannot be written as GGUF.")
    return keys | {"rope.freq_base_swa": local["freq_base"]}


def _refuse3(settings: Settings, rope: Ropes) -> None:
    if settings.get("attn_logit_softcapping") is not None:
        raise QtoolError("config.json: attn_logit_softcapping is set; llama.cpp's gemma3 has no such cap.")
    if "scaling.attn_factor" in rope[FULL]:  # KL 1.7e-2
        raise QtoolError("config.json: an attention_factor of the rotary scaling cannot be written for llama.cpp's"
                         " gemma3, which applies it to sliding layers as well.")  # fmt: skip


_WINDOW_KEYS = ("attention.sliding_window", "attention.sliding_window_pattern")

GEMMA = Family(
    "GemmaForCausalLM",
    decoder_tensors(),
    gated_decoder(plus_one=True),
    # transformers takes its "gelu" for the tanh one
    replace(TANH_GELU, key="hidden_act", names=(*TANH_GELU.names, "gelu")),
    Windows("none"),
    _DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16},
    plus_one=PLUS_ONE,
    gguf=GgufFacts("gemma", says=_SAYS),
)
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    decoder_tensors(_FOUR_NORMS),
    gated_decoder("pre_feedforward_layernorm", plus_one=True, adds=False),
    TANH_GELU,
    Windows("some", period=2),
    _DEFAULTS2 | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    plus_one=PLUS_ONE,
    whole_scores=True,  # for its soft cap
    float16=False,
    gguf=GgufFacts("gemma2", windows=True, keys=_keys2, required=_WINDOW_KEYS, says=_SAYS),
)
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    decoder_tensors(_FOUR_NORMS, head_norms=True),
    gated_decoder("pre_feedforward_layernorm", plus_one=True, adds=False),
    TANH_GELU,
    Windows("some", period=6, period_key="sliding_window_pattern"),
    _DEFAULTS2 | {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    rope_kinds=(FULL, SLIDING),
    plus_one=PLUS_ONE,
    float16=False,
    gguf=GgufFacts("gemma3", windows=True, keys=_keys3, required=_WINDOW_KEYS, refuse=_refuse3, says=_SAYS | _SAYS3),
)
