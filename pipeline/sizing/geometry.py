"""What a model's memory and speed depend on, read from its config.json alone: layers, heads, windows, loops, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool import QtoolError
from qtool.convert.models.model_config import PERIODS, completed, is_tied, layer_windows
from qtool.quantize.architectures import ARCHITECTURES

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
LOOPED = "IQuestLoopCoderForCausalLM"
# architectures whose every tensor follows from config.json (`tensor_shapes`)
KNOWN = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "IQuestCoderForCausalLM", LOOPED,
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
)  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """``windows``: for each layer the tokens its attention looks back on, None for all. ``loops``: how often a token
    passes through all layers; passes after the first attend to the first one's cache and to their own last
    ``loop_window`` tokens. ``assumed``: what config.json did not say, and what was taken instead."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    windows: tuple[int | None, ...]
    max_context: int | None
    dtype: str
    loops: int = 1
    loop_window: int = 0
    assumed: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Bytes of an activation or of an unquantized weight."""
        return WIDTHS[self.dtype]

    @property
    def kv_row(self) -> int:
        """Numbers in one token's keys of one layer; its values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def whole_scores(self) -> bool:
        """Whether transformers holds the scores of all heads at once."""
        known = ARCHITECTURES.get(self.architecture)
        return known is not None and known.whole_scores

    @property
    def layer_linears(self) -> int:
        """Weights of one layer's linears."""
        queries = self.heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * self.kv_row)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Weights of the output head (the embedding's own where they are tied)."""
        return self.vocab * self.hidden


def read_geometry(config: Mapping[str, Any], where: str = "config.json") -> Geometry:
    """Raises QtoolError naming every key that is missing or is no positive number."""
    missing = [key for key in REQUIRED if config.get(key) is None]
    if missing:
        raise QtoolError(
            f"{where}: lacks {', '.join(missing)}; memory and speed cannot be told without. "
            "Multimodal models keep them in a nested section that qtool does not plan yet."
            if "text_config" in config
            else f"{where}: lacks {', '.join(missing)}; memory and speed cannot be told without."
        )
    assumed: list[str] = []
    heads = _positive(config, "num_attention_heads", where)
    hidden = _positive(config, "hidden_size", where)
    layers = _positive(config, "num_hidden_layers", where)
    full = completed(config)  # with what transformers' class takes for keys that are missing
    kv_heads, head_dim = (_optional(full, key, where) for key in ("num_key_value_heads", "head_dim"))
    if config.get("num_key_value_heads") is None and kv_heads == heads:
        assumed.append(f"num_key_value_heads is missing: every head has its own keys and values ({heads})")
    if head_dim is None and hidden % heads:
        raise QtoolError(f"{where}: hidden_size {hidden} does not divide by {heads} heads, and there is no head_dim.")
    max_context = _optional(config, "max_position_embeddings", where)
    if max_context is None:
        assumed.append("max_position_embeddings is missing: no context is refused as too long")
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise QtoolError(f"{where}: architectures is {names!r}; a list of names is needed.")
    architecture = next((name for name in names if name in KNOWN), names[0] if names else "")
    if not architecture:
        assumed.append("no architecture is named: planned as a decoder of attention and gated MLP layers")
    elif architecture not in KNOWN:
        assumed.append(f"{architecture} is not known to qtool: its cache and activations are planned as Llama's")
    for key in ("sliding_window", "sliding_window_pattern", "max_window_layers"):
        if config.get(key):  # 0 and null say that nothing slides, or all does
            _positive(config, key, where)
    loops = _optional(config, "loop_num", where) or (2 if architecture == LOOPED else 1)
    return Geometry(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size", where),
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        vocab=_positive(config, "vocab_size", where),
        tied=is_tied(config),
        windows=layer_windows(config, layers),
        max_context=max_context,
        dtype=_dtype(config, assumed, where),
        loops=loops,
        loop_window=(_optional(config, "loop_window_size", where) or 64) if loops > 1 else 0,
        assumed=tuple(assumed),
    )


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config holds, a tied head left out. Raises QtoolError
    for an architecture whose tensors qtool does not know by heart."""
    geometry = read_geometry(config)
    if geometry.architecture not in KNOWN:
        raise QtoolError(
            f"architecture {geometry.architecture or '(none named in config.json)'}: its tensors are not known to "
            f"qtool without its weights' headers. Known: {', '.join(KNOWN)}."
        )
    g = geometry
    qwen2 = g.architecture == "Qwen2ForCausalLM"
    biased = bool(config.get("attention_bias")) or qwen2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (g.vocab, g.hidden)}
    for index in range(g.layers):
        layer = f"model.layers.{index}."
        for name, rows in (("q", g.heads * g.head_dim), ("k", g.kv_row), ("v", g.kv_row)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, g.hidden)
            if biased:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (g.hidden, g.heads * g.head_dim)
        if biased and not qwen2:
            shapes[f"{layer}self_attn.o_proj.bias"] = (g.hidden,)
        for name, rows, columns in (
            ("gate", g.intermediate, g.hidden), ("up", g.intermediate, g.hidden), ("down", g.hidden, g.intermediate),
        ):  # fmt: skip
            shapes[f"{layer}mlp.{name}_proj.weight"] = (rows, columns)
            if config.get("mlp_bias"):
                shapes[f"{layer}mlp.{name}_proj.bias"] = (rows,)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if g.architecture in PERIODS:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {f"{layer}{norm}.weight": (g.hidden,) for norm in norms}
        if g.architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"):
            shapes |= {f"{layer}self_attn.{norm}.weight": (g.head_dim,) for norm in ("q_norm", "k_norm")}
        if g.architecture == LOOPED:  # gates between the first pass's cache and the pass's own window
            shapes[f"model.gate_projections.{index}.weight"] = (g.heads, g.head_dim)
            shapes[f"model.gate_projections.{index}.bias"] = (g.heads,)
    shapes["model.norm.weight"] = (g.hidden,)
    if not g.tied:
        shapes["lm_head.weight"] = (g.vocab, g.hidden)
    return shapes


def _positive(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise QtoolError(f"{where}: {key} is {value!r}; a positive whole number is needed.")
    return value


def _optional(config: Mapping[str, Any], key: str, where: str) -> int | None:
    return None if config.get(key) is None else _positive(config, key, where)


def _dtype(config: Mapping[str, Any], assumed: list[str], where: str) -> str:
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        assumed.append("dtype is missing: bfloat16")
        return "bfloat16"
    name = str(name).removeprefix("torch.")
    if name not in WIDTHS:
        raise QtoolError(f"{where}: dtype {name!r}; qtool plans models in {', '.join(WIDTHS)}.")
    return name
