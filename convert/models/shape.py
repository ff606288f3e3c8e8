"""A model as its config.json tells it: its numbers, and with its family its tensors, matrices and feeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtool import QtoolError
from qtool.convert.models.experts import in_files, in_memory
from qtool.convert.models.family import Family
from qtool.convert.models.feeds import Feed, Heads, Matrix, Norm, Nothing, Rows, Shape
from qtool.convert.models.geometry import WIDTHS, Geometry
from qtool.convert.models.model_config import completed, is_tied, layer_windows
from qtool.convert.models.table import family_of, find_family

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Decoder:
    """A model of a known family: what the walk, the plans, the checks and the writers ask."""

    family: Family
    shape: Geometry

    @property
    def prefix(self) -> str:
        """Of all layers, as ``model.layers.``."""
        return self.family.prefix

    def at(self, layer: int) -> str:
        """The prefix of one layer, as ``model.layers.3.``."""
        return f"{self.family.prefix}{layer}."

    def layer_of(self, name: str) -> int | None:
        """The layer index in a tensor's name, None outside the layers."""
        number = name[len(self.prefix) :].split(".", 1)[0] if name.startswith(self.prefix) else ""
        return int(number) if number.isdecimal() else None

    def is_draft(self, name: str) -> bool:
        """Whether a tensor lies in a layer beyond the last, which guesses further tokens (`Family.drafts`)."""
        layer = self.layer_of(name)
        return self.family.drafts and layer is not None and layer >= self.shape.layers

    def feeds(self, layer: int) -> tuple[Feed, ...]:
        """In forward order, names below `at`. Raises QtoolError for a family that names one producer twice."""
        feeds = self.family.feeds(self.shape, layer)
        _prove_one_scale(self.family, feeds)
        return feeds

    def matrices(self, layer: int) -> tuple[Matrix, ...]:
        """Those that are quantized, in forward order, names below `at`."""
        return tuple(matrix for feed in self.feeds(layer) for matrix in feed.consumers)

    def beside_experts(self) -> tuple[str, ...]:
        """Full modules that multiply the experts' inputs and are never quantized: routers, gates of shared experts."""
        layers = range(self.shape.layers)
        also = [self.at(layer) + name for layer in layers for feed in self.feeds(layer) for name in feed.also]
        return tuple(name.removesuffix(".weight") for name in also)

    def held(self) -> dict[str, list[tuple[str, Matrix]]]:
        """Name of a checkpoint's tensor -> (full module, matrix) of every matrix in it that is quantized."""
        found: dict[str, list[tuple[str, Matrix]]] = {}
        for layer in range(self.shape.layers):
            at = self.at(layer)
            for matrix in self.matrices(layer):
                found.setdefault(at + matrix.tensor, []).append((at + matrix.module, matrix))
        return found

    def by_columns(self) -> frozenset[str]:
        """Full modules of the matrices whose columns engines split over several cards (`Feed.split`)."""
        layers = range(self.shape.layers)
        split = [(self.at(layer), feed.consumers) for layer in layers for feed in self.feeds(layer) if feed.split]
        return frozenset(at + matrix.module for at, matrices in split for matrix in matrices)

    def tensors(self) -> dict[str, Shape]:
        """Name -> shape of every tensor that a checkpoint holds, a tied head left out."""
        return self.family.tensors(self.shape)

    def in_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One layer's tensors as files hold them (names below `at`), as transformers' layer holds them."""
        mixture = self.family.mixture
        return dict(tensors) if mixture is None else in_memory(mixture, self.shape.experts, tensors)

    def in_files(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `in_memory`."""
        mixture = self.family.mixture
        return dict(state) if mixture is None else in_files(mixture, self.shape.experts, state)


def _prove_one_scale(family: Family, feeds: tuple[Feed, ...]) -> None:
    """Raises QtoolError where two feeds have one producer: each would be scaled by its own search, and the producer,
    which can be divided by one scale alone, would belong to the last."""
    fed: dict[str, str] = {}
    for feed in feeds:
        match feed.producer:
            case Norm(name):
                made = name
            case Rows(matrix) | Heads(matrix):
                made = matrix.module
            case Nothing():
                continue
        if made in fed:
            raise QtoolError(
                f"{family.name}: {fed[made]} and {feed.name} are two feeds of {made}, whose output has one scale. Name "
                "all their matrices in one feed (docs/adding-a-family.md)."
            )
        fed[made] = feed.name


def decoder_of(config: Mapping[str, Any], where: str = "config.json") -> Decoder:
    """Raises QtoolError for an architecture that is not known, and as `shape_of` does."""
    return Decoder(family_of(config), shape_of(config, where))


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> Geometry:
    """Raises QtoolError naming every key that is missing or is no positive number."""
    full = completed(config)  # with what transformers' class takes for keys that are missing
    missing = [key for key in REQUIRED if full.get(key) is None]
    if missing:
        raise QtoolError(
            f"{where}: lacks {', '.join(missing)}; memory and speed cannot be told without. "
            "Multimodal models keep them in a nested section that qtool does not plan yet."
            if "text_config" in config
            else f"{where}: lacks {', '.join(missing)}; memory and speed cannot be told without."
        )
    family, assumed = find_family(config), list[str]()
    heads, hidden, layers, inner, vocab = (
        _positive(full, key, where)
        for key in (
            "num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size",
        )
    )  # fmt: skip
    kv_heads, head_dim = (_optional(full, key, where) for key in ("num_key_value_heads", "head_dim"))
    if config.get("num_key_value_heads") is None and kv_heads == heads:
        assumed.append(f"num_key_value_heads is missing: every head has its own keys and values ({heads})")
    if head_dim is None and hidden % heads:
        raise QtoolError(f"{where}: hidden_size {hidden} does not divide by {heads} heads, and there is no head_dim.")
    max_context = _optional(config, "max_position_embeddings", where)
    if max_context is None:
        assumed.append("max_position_embeddings is missing: no context is refused as too long")
    architecture = _architecture(config, family, assumed, where)
    for key in ("sliding_window", "sliding_window_pattern", "max_window_layers", "loop_num", "loop_window_size"):
        if config.get(key):  # 0 and null say that nothing slides, or all does
            _positive(config, key, where)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is None:
        assumed.append("dtype is missing: bfloat16")
    shape = Geometry(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        vocab=vocab,
        tied=is_tied(config),
        windows=layer_windows(config, layers),
        max_context=max_context,
        dtype=str(dtype or "bfloat16").removeprefix("torch."),
        attention_bias=bool(config.get("attention_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
        whole_scores=family is not None and family.whole_scores,
        llama_cpp_windows=family is not None and family.gguf is not None and family.gguf.windows,
        assumed=tuple(assumed),
    )
    return family.shape(full, shape) if family else shape


def read_geometry(config: Mapping[str, Any], where: str = "config.json") -> Geometry:
    """As `shape_of`. Raises QtoolError for a dtype whose memory and speed are not told, too."""
    shape = shape_of(config, where)
    if shape.dtype not in WIDTHS:
        raise QtoolError(f"{where}: dtype {shape.dtype!r}; qtool plans models in {', '.join(WIDTHS)}.")
    return shape


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name -> shape of every tensor that a checkpoint of this config holds, a tied head left out. Raises QtoolError
    for an architecture whose tensors qtool does not know by heart."""
    return decoder_of(config).tensors()


def _architecture(config: Mapping[str, Any], family: Family | None, assumed: list[str], where: str) -> str:
    names = config.get("architectures") or []
    if not isinstance(names, list | tuple):
        raise QtoolError(f"{where}: architectures is {names!r}; a list of names is needed.")
    if family is not None:
        return family.name
    if not names:
        assumed.append("no architecture is named: planned as a decoder of attention and gated MLP layers")
        return ""
    assumed.append(f"{names[0]} is not known to qtool: its cache and activations are planned as Llama's")
    return str(names[0])


def _positive(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise QtoolError(f"{where}: {key} is {value!r}; a positive whole number is needed.")
    return value


def _optional(config: Mapping[str, Any], key: str, where: str) -> int | None:
    return None if config.get(key) is None else _positive(config, key, where)
