"""A mixture of experts: what a family calls its tensors, what feeds them, and how transformers holds them in memory.

An MLP of E routed experts, each of gate, up and down; a router sends a token to k of them; beside them there may be a
shared expert for every token, behind a gate or not:

    in files                                         in memory
    mlp.experts.7.gate_proj.weight  [I, h]           mlp.experts.gate_up_proj  [E, 2I, h]   rows of gate, then of up
    mlp.experts.7.up_proj.weight    [I, h]
    mlp.experts.7.down_proj.weight  [h, I]           mlp.experts.down_proj     [E, h, I]

transformers (integrations/moe.py) holds them fused in memory, whatever the files hold, and renames them as it loads
(conversion_mapping.py). Artifacts always hold each expert alone, because all their readers want it so; a source whose
files hold them fused is read as if they lay alone (`fused.each_alone`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qtool import QtoolError
from qtool.convert.models.feeds import Feed, Matrix, Norm, Rows, Shape, whole
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.parts import DOWN, GATE, UP, attention_feeds, gated_tensors

MOST_EXPERTS = 8192  # 16 times as many as the largest mixture has; a number without end would never be listed
PARTS = ("gate", "up", "down")
BLOCK = "mlp"  # what transformers calls the mixture in memory
GATE_UP, DOWN_STACK = f"{BLOCK}.experts.gate_up_proj", f"{BLOCK}.experts.down_proj"  # its tensors there


@dataclass(frozen=True)
class Mixture:
    """What a family calls the tensors of a mixture in its files; names are below a layer's prefix.

    block: the mixture. gate, up, down: of an expert. shared: the shared expert, empty where there is none; shared_gate:
    its gate, where it has one. score_bias: what is added to the router's scores to choose experts, and never cast; a
    row where it is ``bias_in_row``. routed_by: the router. renamed: modules or tensors in files -> what transformers
    calls them in memory, where that is more than another name of the block.
    """

    block: str = BLOCK
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = ""
    shared_gate: str = ""
    score_bias: str = ""
    bias_in_row: bool = False
    routed_by: str = "gate"
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def router(self) -> str:
        """The router's weight ``[E, h]``."""
        return f"{self.block}.{self.routed_by}.weight"

    def in_memory(self, name: str) -> str:
        """What a tensor of a layer's files is called in memory, below the layer."""
        return _first_renamed(name, self.renamed) or renamed(name, self.block, BLOCK)

    def in_files(self, name: str) -> str:
        """Inverse of `in_memory`."""
        back = {new: old for old, new in self.renamed.items()}
        return _first_renamed(name, back) or renamed(name, BLOCK, self.block)

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

    def matrix(self, expert: int, part: str) -> Matrix:
        """An expert's matrix."""
        return replace(whole(self.module(expert, part)), expert=expert)


def with_experts(
    shape: Geometry, settings: Mapping[str, Any], count: str, width: int, sparse: Sequence[bool], shared_width: int = 0
) -> Geometry:
    """A geometry with mixtures in the ``sparse`` layers. ``count``: the key that says how many experts there are.
    Raises QtoolError for numbers that no mixture can have."""
    experts, active = (whole_number(settings, key) for key in (count, "num_experts_per_tok"))
    if experts > MOST_EXPERTS:
        raise QtoolError(f"config.json: {count} is {experts:,}; no model has more than {MOST_EXPERTS:,} in a layer.")
    if active > experts:
        raise QtoolError(f"config.json: num_experts_per_tok is {active}, and there are {experts} experts ({count}).")
    return replace(
        shape, experts=experts, active=active, expert_width=width, shared_width=shared_width, sparse=tuple(sparse)
    )


def whole_number(settings: Mapping[str, Any], key: str, least: int = 1) -> int:
    """A key's value. Raises QtoolError where it is no whole number from ``least`` on."""
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "positive whole number" if least else "whole number from 0 on"
        raise QtoolError(f"config.json: {key} is {value!r}; a {kind} is needed.")
    return value


def expert_keys(shape: Geometry) -> dict[str, int | float | str]:
    """llama.cpp's keys of how many experts there are, and how many work on a token."""
    return {"expert_count": shape.experts, "expert_used_count": shape.active}


def check_normalized(settings: Mapping[str, Any], architecture: str, always: bool) -> None:
    """Raises QtoolError where llama.cpp, whose code for ``architecture`` normalises the weights of a token's experts
    ``always`` or never, would compute otherwise than `norm_topk_prob` says."""
    if bool(settings.get("norm_topk_prob")) != always:
        does = "always" if always else "never"
        raise QtoolError(
            f"config.json: norm_topk_prob is {bool(settings.get('norm_topk_prob'))}; llama.cpp's {architecture} {does} "
            "normalises the weights of a token's experts, and no key says otherwise."
        )


def check_all_sparse(sparse: Sequence[bool], architecture: str) -> None:
    """Raises QtoolError where a layer has no experts and llama.cpp's ``architecture`` has them in every layer."""
    if not all(sparse):
        dense = [layer for layer, mixed in enumerate(sparse) if not mixed]
        raise QtoolError(
            f"config.json: {len(dense)} of {len(sparse)} layers have no experts, layer {dense[0]} the first; "
            f"llama.cpp's {architecture} has them in every layer."
        )


def check_own_head(settings: Mapping[str, Any], architecture: str) -> None:
    """Raises QtoolError for a tied head, of which llama.cpp's ``architecture`` knows nothing."""
    if settings.get("tie_word_embeddings"):
        raise QtoolError(
            f"config.json: tie_word_embeddings is true; llama.cpp's {architecture} takes a head of its own alone. Save "
            "the head as a tensor and set it to false."
        )


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


def mixture_feeds(mixture: Mixture, shape: Geometry, plus_one: bool = False) -> tuple[Feed, ...]:
    """One input for the gate and up of every expert, the router and the shared expert's gate; and each expert's own
    input of its down."""
    experts = range(shape.experts)
    read = [mixture.matrix(expert, part) for expert in experts for part in ("gate", "up")]
    downs = [
        Feed(Rows(mixture.matrix(expert, "up")), (mixture.matrix(expert, "down"),), split=True, adds=True)
        for expert in experts
    ]
    if mixture.shared:
        parts = [whole(f"{mixture.shared}.{part}_proj") for part in ("gate", "up", "down")]
        gate, up, down = (replace(matrix, gate=mixture.shared_gate) for matrix in parts)
        read += [gate, up]
        downs.append(Feed(Rows(up), (down,), split=True))
    also = (mixture.router, *((mixture.shared_gate,) if mixture.shared_gate else ()))
    return (Feed(Norm("post_attention_layernorm", plus_one), tuple(read), also=also), *downs)


def mixture_tensors(mixture: Mixture) -> Callable[[Geometry, int], dict[str, Shape]]:
    """Name -> shape of the tensors of a layer's MLP, a mixture or not."""

    def tensors(shape: Geometry, layer: int) -> dict[str, Shape]:
        if not shape.is_sparse(layer):
            return gated_tensors(shape, layer)
        hidden, inner, shared = shape.hidden, shape.expert_width, shape.shared_width
        found: dict[str, Shape] = {mixture.router: (shape.experts, hidden)}
        if mixture.score_bias:
            found[mixture.score_bias] = (1, shape.experts) if mixture.bias_in_row else (shape.experts,)
        sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        for expert in range(shape.experts):
            found |= {f"{mixture.module(expert, part)}.weight": size for part, size in sizes.items()}
        if mixture.shared:
            found |= {f"{mixture.shared}.{part}_proj.weight": (shared, hidden) for part in ("gate", "up")}
            found[f"{mixture.shared}.down_proj.weight"] = (hidden, shared)
        return found | ({mixture.shared_gate: (1, hidden)} if mixture.shared_gate else {})

    return tensors


def in_memory(mixture: Mixture, experts: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors as files hold them, as transformers' layer holds them. Names are below the layer; a layer
    without experts is returned as it is. Raises KeyError naming an expert that is missing."""
    alone = {part: [f"{mixture.module(e, part)}.weight" for e in range(experts)] for part in PARTS}
    taken = {name for names in alone.values() for name in names}
    found = {mixture.in_memory(name): tensor for name, tensor in tensors.items() if name not in taken}
    if not any(name in tensors for name in taken):
        return found
    pairs = zip(alone["gate"], alone["up"], strict=True)
    found[GATE_UP] = torch.stack([torch.cat([tensors[gate], tensors[up]]) for gate, up in pairs])
    found[DOWN_STACK] = torch.stack([tensors[name] for name in alone["down"]])
    return found


def in_files(mixture: Mixture, experts: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `in_memory`: views."""
    found = {mixture.in_files(name): tensor for name, tensor in state.items()}
    if GATE_UP not in state:
        return found
    gate_up, down = state[GATE_UP], state[DOWN_STACK]
    for name in (GATE_UP, DOWN_STACK):
        del found[mixture.in_files(name)]
    for expert in range(experts):
        gate, up = gate_up[expert].chunk(2)
        for part, held in (("gate", gate), ("up", up), ("down", down[expert])):
            found[f"{mixture.module(expert, part)}.weight"] = held
    return found


def assembled(
    mixture: Mixture, prefix: str, shapes: Mapping[str, Shape], stream: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """A stream of a model's tensors as files hold them, as transformers holds them. An expert is copied into its place
    as it comes, so that no layer is there twice. ``prefix``: of all layers; ``shapes``: of the tensors in memory.
    Raises QtoolError naming an expert that never came, or is unlike the others."""
    parts = {getattr(mixture, part): part for part in PARTS}
    layer, block, names = re.escape(prefix), re.escape(mixture.block), "|".join(map(re.escape, parts))
    expert_of = re.compile(rf"({layer}\d+\.){block}\.experts\.(\d+)\.({names})\.weight")
    inside = re.compile(rf"({layer}\d+\.)(.*)")
    stacks: dict[str, Tensor] = {}
    missing: dict[str, set[str]] = {}
    for name, tensor in stream:
        found = expert_of.fullmatch(name)
        if found is None:
            other = inside.fullmatch(name)
            yield (other[1] + mixture.in_memory(other[2]) if other else name), tensor
            continue
        at, expert, part = found[1], int(found[2]), parts[found[3]]
        stack = at + (DOWN_STACK if part == "down" else GATE_UP)
        if stack not in shapes:
            continue  # of a layer that the model does not have
        if stack not in stacks:
            count, rows, columns = shapes[stack]
            stacks[stack] = tensor.new_empty(count, rows, columns)
            beside = ("down",) if part == "down" else ("gate", "up")
            missing[stack] = {f"{at}{mixture.module(e, one)}.weight" for e in range(count) for one in beside}
        held = stacks[stack][expert] if name in missing[stack] else None
        place = held if held is None or part == "down" else held.chunk(2)[part == "up"]
        if place is None or place.shape != tensor.shape:
            raise QtoolError(f"{name} is {list(tensor.shape)}, and config.json has no place for it among its experts.")
        place.copy_(tensor)
        missing[stack].discard(name)
        if not missing[stack]:
            yield stack, stacks.pop(stack)
    for stack in stacks:
        lost = sorted(missing[stack])
        raise QtoolError(f"the model lacks {lost[0]} ({len(lost)} tensors of experts missing).")


def _first_renamed(name: str, table: Mapping[str, str]) -> str:
    """By the first row that says anything of a name; empty where none does."""
    return next((new + name.removeprefix(old) for old, new in table.items() if f"{name}.".startswith(f"{old}.")), "")


def renamed(name: str, old: str, new: str) -> str:
    """A module ``old``, or what lies in it, under its name ``new``."""
    return new + name.removeprefix(old) if name.startswith(f"{old}.") else name
