"""How a mixture of experts is computed here, so that its statistics can be taken: which tokens its router sends where,
and what each expert makes of them before its down matrix.

transformers holds all experts of a layer in one module with fused parameters, whatever the architecture
(integrations/moe.py), and lets a model's experts be computed by any registered function of
``(module, hidden [T, h], index [T, k], weights [T, k])``. `forward` is such a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool import QtoolError

NAME = "qtool"  # of the registered function


@dataclass(frozen=True)
class Routed:
    """One call of a mixture: T tokens, each sent to k of E experts, so T * k slots, ordered by expert.

    hidden: the experts' inputs ``[T, h]``; index: the experts of each token ``[T, k]``; order: each slot's place in
    ``index``, int64; weights ``[T * k]``: what its expert's output is multiplied by; counts: the slots of each expert.
    """

    hidden: Tensor
    index: Tensor
    order: Tensor
    weights: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, hidden: Tensor, index: Tensor, weights: Tensor, experts: int) -> Routed:
        """As the experts' module is called."""
        flat = index.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts).tolist()  # waits for the device
        return cls(hidden, index, order, weights.flatten()[order], tuple(counts))

    @property
    def tokens(self) -> Tensor:
        """Of each slot, int64."""
        return self.order // self.index.shape[1]

    @property
    def inputs(self) -> Tensor:
        """Of each slot ``[T * k, h]``."""
        return self.hidden[self.tokens]

    @property
    def _places(self) -> Tensor:
        """The inverse of ``order``: slots as they lie in ``index``."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return places

    def total(self, outputs: Tensor) -> Tensor:
        """The weighted sum of each token's slots, ``[T * k, h]`` -> float32 ``[T, h]``; always in the same order."""
        slots = (outputs * self.weights.unsqueeze(1))[self._places]
        return slots.view(*self.index.shape, -1).sum(1, dtype=torch.float32)

    def shared_out(self, behind: Tensor) -> Tensor:
        """What each slot's expert should add to its own output, so that the weighted outputs of a token's experts make
        up together for ``behind [T, h]``, by the least change of all: ``[T * k, h]``."""
        weights = self.weights.float()
        squares = weights.square()[self._places].view(self.index.shape).sum(1)
        share = weights / squares[self.tokens].clamp_min(1e-12)
        return behind[self.tokens] * share.to(behind.dtype).unsqueeze(1)

    def agreement(self, source: Routed) -> tuple[Tensor, Tensor]:
        """Of the tokens that ``source`` sends to each expert, how many this sends there too, and of how many: float32
        ``[E]``."""
        both = (self.index.unsqueeze(2) == source.index.unsqueeze(1)).any(1)
        sent = source.index.flatten()
        hits = torch.bincount(sent[both.flatten()], minlength=len(self.counts)).float()
        return hits, torch.tensor(source.counts, dtype=torch.float32, device=sent.device)


def gate_of(layer: nn.Module, name: str, hidden: Tensor) -> Tensor:
    """What a shared expert's output is multiplied by, ``[T]``: the sigmoid of its gate. ``name``: of the gate's weight
    ``[1, h]`` in a layer; ``hidden [T, h]``: the mixture's inputs."""
    return functional.linear(hidden, layer.get_parameter(name)).sigmoid().squeeze(-1)


Taker = Callable[[Tensor], None]  # of the inputs of the down matrices, [slots, I]
Watch = Callable[[Routed], Taker | None]
_WATCHES: dict[int, Watch] = {}  # id(module) -> who looks on


def prepare(model: Any) -> None:
    """Have `forward` compute a model's experts. Raises QtoolError where its class does not let it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    with suppress(AttributeError, ValueError):
        model.set_experts_implementation(NAME)
    if getattr(model.config, "_experts_implementation", None) != NAME:
        raise QtoolError(f"{type(model).__name__}: transformers computes its experts in a way of its own.")


def mixture_of(layer: nn.Module) -> Any:
    """The module that holds a layer's experts. Raises QtoolError where there is none, or one that cannot be read."""
    for module in layer.modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "num_experts"):
            unlike = any(getattr(module, name, False) for name in ("is_transposed", "has_bias", "has_post_expert_norm"))
            if unlike or not module.is_concatenated or not module.has_gate:
                raise QtoolError(f"{type(module).__name__}: experts held in this way are not quantized yet.")
            return module
    raise QtoolError(f"{type(layer).__name__}: transformers holds no experts there in a way that qtool knows.")


def forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``[T, h]``: every token's experts, each weighted; summed in float32."""
    call = Routed.of(hidden, index, weights, module.num_experts)
    watch = _WATCHES.get(id(module))
    take = watch(call) if watch else None
    made = inner(module, module.gate_up_proj, call.inputs, call.counts)
    if take:
        take(made)
    return call.total(products(module.down_proj, made, call.counts)).to(hidden.dtype)


def inner(module: Any, gate_up: Tensor, inputs: Tensor, counts: Sequence[int]) -> Tensor:
    """The inputs of the down matrices ``[slots, I]``, from the experts' gates and ups ``[E, 2 I, h]``."""
    made: Tensor = module._apply_gate(products(gate_up, inputs, counts))
    return made


def products(matrices: Tensor, inputs: Tensor, counts: Sequence[int]) -> Tensor:
    """``x Wᵀ`` with each slot's own expert: ``matrices [E, out, in]``, ``inputs [slots, in]`` -> ``[slots, out]``."""
    if not len(inputs):
        return inputs.new_zeros(0, matrices.shape[1])
    if inputs.is_cuda and inputs.dtype == torch.bfloat16 and hasattr(functional, "grouped_mm"):
        ends = torch.tensor(counts, device=inputs.device).cumsum(0, dtype=torch.int32)
        grouped: Tensor = functional.grouped_mm(inputs, matrices.mT, offs=ends)
        return grouped
    parts = zip(inputs.split(list(counts)), matrices, strict=True)
    return torch.cat([functional.linear(part, matrix) for part, matrix in parts])


@contextmanager
def watched(module: nn.Module, watch: Watch) -> Iterator[None]:
    """While open, ``watch`` is told of every call of the mixture; what it returns, of the inner inputs. It may raise to
    end the forward."""
    _WATCHES[id(module)] = watch
    try:
        yield
    finally:
        del _WATCHES[id(module)]
