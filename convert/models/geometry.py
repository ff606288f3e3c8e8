"""The numbers of a model on which its memory, its speed and its tensors depend."""

from __future__ import annotations

from dataclasses import dataclass

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Geometry:
    """What a config.json says of a model's shape, and what its family adds; `convert.models.shape` reads it.

    windows: for each layer the tokens its attention looks back on, None for all.
    output_bias: attention's last matrix has a bias, where its family says so apart from the others'.
    mlp_matrices: gate, up and down.
    whole_scores: transformers computes attention without SDPA, every head's scores at once.
    llama_cpp_windows: llama.cpp's sliding layers keep their window alone.
    head_norms: q and k have norms over each head, where its family has them in some models alone.
    heads_by_layer: of each layer, where they differ; ``heads`` is the most then.
    gate_rows: gates that attention's output is multiplied by, for each head; 0 where there are none.
    conv_bias: short convolutions and their matrices have biases.
    delta: of gated delta nets: heads of keys, of values, their sizes, the convolution's length.
    clipped_values: attention clips its values, so that no scale passes them.
    experts: routed experts of a layer's mixture, 0 where there is none; ``active`` of them work on a token;
    ``expert_width``: channels between up and down of one; ``shared_width``: of the experts through which every token
    passes, together; ``sparse``: for each layer whether its MLP is such a mixture; others are ``intermediate`` wide.
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
    output_bias: bool = False
    mlp_bias: bool = False
    mlp_matrices: int = 3
    whole_scores: bool = False
    llama_cpp_windows: bool = False
    head_norms: bool = False
    heads_by_layer: tuple[int, ...] = ()
    gate_rows: int = 0
    conv_bias: bool = False
    delta: tuple[int, ...] = ()
    clipped_values: bool = False
    experts: int = 0
    active: int = 0
    expert_width: int = 0
    shared_width: int = 0
    sparse: tuple[bool, ...] = ()
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

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return bool(self.sparse) and self.sparse[layer]

    @property
    def sparse_layers(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return sum(self.sparse)

    @property
    def mlp_width(self) -> int:
        """Channels between up and down that work on one token in the widest layer."""
        mixed = self.active * self.expert_width + self.shared_width if self.sparse_layers else 0
        return max(mixed, self.intermediate if self.sparse_layers < self.layers else 0)

    @property
    def expert_share(self) -> float:
        """Of the routed experts' weights, the part that works on one token."""
        return self.active / self.experts if self.experts else 1.0

    def experts_met(self, tokens: int) -> float:
        """Of the routed experts' weights, the part that ``tokens`` at once need if each is sent anywhere alike; the
        least is `expert_share`, where all are sent to the same experts."""
        return float(1 - (1 - self.expert_share) ** tokens)

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert's linears."""
        return self.mlp_matrices * self.hidden * self.expert_width

    @property
    def idle(self) -> int:
        """Weights of routed experts that do not work on a token."""
        return self.sparse_layers * (self.experts - self.active) * self.expert_weights

    @property
    def linears(self) -> int:
        """Weights of all layers' linears that one token passes through in one pass: of the routed experts those that
        work on it."""
        attention = self.hidden * (2 * self.q_row + 2 * self.kv_row)
        router = self.experts * self.hidden
        dense = self.mlp_matrices * self.hidden * self.intermediate
        shared = self.mlp_matrices * self.hidden * self.shared_width
        mixed = router + self.active * self.expert_weights + shared
        return self.layers * attention + (self.layers - self.sparse_layers) * dense + self.sparse_layers * mixed

    @property
    def head_weights(self) -> int:
        """Weights of the output head (the embedding's own where they are tied)."""
        return self.vocab * self.hidden
