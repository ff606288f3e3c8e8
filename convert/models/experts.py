"""A mixture of experts: what a family calls its tensors, what feeds them, and how transformers holds them in memory.

An MLP of E routed experts, each of gate, up and down; a router sends a token to k of them; beside them there may be a
shared expert for every token, behind a gate or not. Checkpoints hold experts in one of two ways:

    each alone                                       fused
    mlp.experts.7.gate_proj.weight  [I, h]           mlp.experts.gate_up_proj  [E, 2I, h]   rows of gate, then of up
    mlp.experts.7.up_proj.weight    [I, h]
    mlp.experts.7.down_proj.weight  [h, I]           mlp.experts.down_proj     [E, h, I]

transformers (integrations/moe.py) holds them fused in memory, whatever the files hold, and renames them as it loads
(conversion_mapping.py). Artifacts always hold each expert alone, because all their readers want it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.convert.models.feeds import Feed, Matrix, Norm, Rows, Shape, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import DOWN, GATE, UP, attention_feeds, gated_tensors

BLOCK = "mlp"  # what transformers calls the mixture in memory
GATE_UP, DOWN_STACK = f"{BLOCK}.experts.gate_up_proj", f"{BLOCK}.experts.down_proj"  # its tensors there


@dataclass(frozen=True)
class Mixture:
    """What a family calls the tensors of a mixture in its files; names are below a layer's prefix.

    block: the mixture. gate, up, down: of an expert. fused: all experts lie in two tensors, named as in memory.
    shared: the shared expert, empty where there is none; shared_gate: its gate, where it has one. score_bias: what is
    added to the router's scores to choose experts, and never cast.
    """

    block: str = BLOCK
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: bool = False
    shared: str = ""
    shared_gate: str = ""
    score_bias: str = ""

    @property
    def router(self) -> str:
        """The router's weight ``[E, h]``."""
        return f"{self.block}.gate.weight"

    @property
    def plain(self) -> tuple[str, ...]:
        """Modules that multiply the experts' input and are never quantized."""
        return tuple(name.removesuffix(".weight") for name in (self.router, self.shared_gate) if name)

    def module(self, expert: int, part: str) -> str:
        """The name of an expert's matrix in artifacts. ``part``: `gate`, `up` or `down`."""
        return f"{self.block}.experts.{expert}.{getattr(self, part)}"

    def stack(self, part: str) -> str:
        """The name that all experts' matrices of a part have together."""
        return f"{self.block}.experts.{getattr(self, part)}"

    def matrix(self, shape: Geometry, expert: int, part: str) -> Matrix:
        """An expert's matrix, wherever the files hold it."""
        module = self.module(expert, part)
        if not self.fused:
            return replace(whole(module), expert=expert)
        if part == "down":
            return Matrix(module, DOWN_STACK, expert, expert=expert)
        first = 0 if part == "gate" else shape.expert_width
        return Matrix(module, GATE_UP, expert, first=first, count=shape.expert_width, expert=expert)


def mixed_decoder(mixture: Mixture) -> Callable[[Geometry, int], tuple[Feed, ...]]:
    """Feeds of attention and, by layer, of a mixture or of a gated MLP."""

    def feeds(shape: Geometry, layer: int) -> tuple[Feed, ...]:
        if shape.is_sparse(layer):
            return (*attention_feeds(shape), *mixture_feeds(mixture, shape))
        return (
            *attention_feeds(shape),
            Feed(Norm("post_attention_layernorm"), (whole(GATE), whole(UP))),
            Feed(Rows(whole(UP)), (whole(DOWN),), split=True, adds=True),
        )

    return feeds


def mixture_feeds(mixture: Mixture, shape: Geometry) -> tuple[Feed, ...]:
    """One input for the gate and up of every expert, the router and the shared expert's gate; and each expert's own
    input of its down."""
    experts = range(shape.experts)
    read = [mixture.matrix(shape, expert, part) for expert in experts for part in ("gate", "up")]
    downs = [
        Feed(Rows(mixture.matrix(shape, expert, "up")), (mixture.matrix(shape, expert, "down"),), split=True)
        for expert in experts
    ]
    if mixture.shared:
        gate, up, down = (whole(f"{mixture.shared}.{part}_proj") for part in ("gate", "up", "down"))
        read += [gate, up]
        downs.append(Feed(Rows(up), (down,), split=True))
    also = (mixture.router, *((mixture.shared_gate,) if mixture.shared_gate else ()))
    return (Feed(Norm("post_attention_layernorm"), tuple(read), also=also), *downs)


def mixture_tensors(mixture: Mixture) -> Callable[[Geometry, int], dict[str, Shape]]:
    """Name -> shape of the tensors of a layer's MLP, a mixture or not."""

    def tensors(shape: Geometry, layer: int) -> dict[str, Shape]:
        if not shape.is_sparse(layer):
            return gated_tensors(shape, layer)
        hidden, inner, shared = shape.hidden, shape.expert_width, shape.shared_width
        found: dict[str, Shape] = {mixture.router: (shape.experts, hidden)}
        if mixture.score_bias:
            found[mixture.score_bias] = (shape.experts,)
        if mixture.fused:
            found |= {GATE_UP: (shape.experts, 2 * inner, hidden), DOWN_STACK: (shape.experts, hidden, inner)}
        else:
            sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
            for expert in range(shape.experts):
                found |= {f"{mixture.module(expert, part)}.weight": size for part, size in sizes.items()}
        if mixture.shared:
            found |= {f"{mixture.shared}.{part}_proj.weight": (shared, hidden) for part in ("gate", "up")}
            found[f"{mixture.shared}.down_proj.weight"] = (hidden, shared)
        return found | ({mixture.shared_gate: (1, hidden)} if mixture.shared_gate else {})

    return tensors


def in_memory(mixture: Mixture, experts: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors as files hold them (fused or each alone), as transformers' layer holds them. Names are below
    the layer; a layer without experts is returned as it is. Raises KeyError naming an expert that is missing."""
    alone = {part: [f"{mixture.module(e, part)}.weight" for e in range(experts)] for part in ("gate", "up", "down")}
    taken = {name for names in alone.values() for name in names}
    found = {_renamed(name, mixture.block, BLOCK): tensor for name, tensor in tensors.items() if name not in taken}
    if not any(name in tensors for name in taken):
        return found
    pairs = zip(alone["gate"], alone["up"], strict=True)
    found[GATE_UP] = torch.stack([torch.cat([tensors[gate], tensors[up]]) for gate, up in pairs])
    found[DOWN_STACK] = torch.stack([tensors[name] for name in alone["down"]])
    return found


def in_files(mixture: Mixture, experts: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `in_memory`, as files of this mixture hold them: views where experts lie alone."""
    found = {_renamed(name, BLOCK, mixture.block): tensor for name, tensor in state.items()}
    if mixture.fused or GATE_UP not in state:
        return found
    gate_up, down = state[GATE_UP], state[DOWN_STACK]
    for name in (GATE_UP, DOWN_STACK):
        del found[_renamed(name, BLOCK, mixture.block)]
    for expert in range(experts):
        gate, up = gate_up[expert].chunk(2)
        for part, held in (("gate", gate), ("up", up), ("down", down[expert])):
            found[f"{mixture.module(expert, part)}.weight"] = held
    return found


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(f"{old}.") else name
