"""The numbers of a model on which its memory, its speed and its tensors depend."""

from __future__ import annotations

from dataclasses import dataclass

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Geometry:
    """What a config.json says of a model's shape, and what its family adds; `convert.models.shape` reads it.

    windows: for each layer the tokens its attention looks back on, None for all.
    mlp_matrices: gate, up and down.
    whole_scores: transformers computes attention without SDPA, every head's scores at once.
    llama_cpp_windows: llama.cpp's sliding layers keep their window alone.
    loops: how often a token passes through all layers; passes after the first attend to the first one's cache and to
        their own last ``loop_window`` tokens.
    assumed: what config.json did not say, and what was taken instead.
    """

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
    attention_bias: bool = False
    mlp_bias: bool = False
    mlp_matrices: int = 3
    whole_scores: bool = False
    llama_cpp_windows: bool = False
    loops: int = 1
    loop_window: int = 0
    assumed: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Bytes of an activation or of an unquantized weight."""
        return WIDTHS[self.dtype]

    @property
    def q_row(self) -> int:
        """Numbers in one token's queries of one layer."""
        return self.heads * self.head_dim

    @property
    def kv_row(self) -> int:
        """Numbers in one token's keys of one layer; its values are as many."""
        return self.kv_heads * self.head_dim

    @property
    def layer_linears(self) -> int:
        """Weights of one layer's linears."""
        attention = self.hidden * (2 * self.q_row + 2 * self.kv_row)
        return attention + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Weights of the output head (the embedding's own where they are tied)."""
        return self.vocab * self.hidden
