"""How a mixture of experts is computed here, so that its statistics can be taken: which tokens its router sends where,
and what each expert makes of them before its down matrix.

transformers holds all experts of a layer in one module with fused parameters, whatever the architecture
(integrations/moe.py), and lets a model's experts be computed by any registered function of
``(module, hidden [T, h], index [T, k], weights [T, k])``. `forward` is such a function: a loop over the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool import QtoolError

NAME = "qtool"  # of the registered function


@dataclass(frozen=True)
class Routed:
    """One call of a mixture: T tokens, each sent to k of E experts.

    hidden: the experts' inputs ``[T, h]``; index: the experts of each token ``[T, k]``. tokens: int64 ``[T * k]``, the
    token of each slot, ordered by expert; weights ``[T * k]``: what its expert's output is multiplied by; counts: the
    slots of each expert.
    """

    hidden: Tensor
    index: Tensor
    tokens: Tensor
    weights: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, hidden: Tensor, index: Tensor, weights: Tensor, experts: int) -> Routed:
        """As the experts' module is called."""
        flat = index.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts).tolist()  # waits for the device
        return cls(hidden, index, order // index.shape[1], weights.flatten()[order], tuple(counts))

    def slots(self) -> Iterator[tuple[int, slice]]:
        """(expert, its slots) of those that any token is sent to."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def agreement(self, source: Routed) -> tuple[Tensor, Tensor]:
        """Of the tokens that ``source`` sends to each expert, how many this sends there too, and of how many: float32
        ``[E]``."""
        both = (self.index.unsqueeze(2) == source.index.unsqueeze(1)).any(1)
        sent = source.index.flatten()
        hits = torch.zeros(len(self.counts), device=sent.device).index_add_(0, sent, both.flatten().float())
        return hits, torch.tensor(source.counts, dtype=torch.float32, device=sent.device)


Taker = Callable[[int, Tensor], None]  # of an expert and the input of its down matrix, [slots, I]
Watch = Callable[[Routed], Taker | None]
_WATCHES: dict[int, Watch] = {}  # id(module) -> who looks on


def prepare(model: Any) -> None:
    """Have `forward` compute a model's experts. Raises QtoolError where its class does not let it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    try:
        model.set_experts_implementation(NAME)
    except (AttributeError, ValueError) as error:
        raise QtoolError(f"{type(model).__name__}: transformers computes its experts in a way of its own.") from error


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
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert, slots in call.slots():
        tokens = call.tokens[slots]
        made = inner(module, module.gate_up_proj[expert], hidden[tokens])
        if take:
            take(expert, made)
        output = functional.linear(made, module.down_proj[expert]) * call.weights[slots].unsqueeze(1)
        total.index_add_(0, tokens, output.float())  # each token once in a call: the order of sums is fixed
    return total.to(hidden.dtype)


def inner(module: Any, gate_up: Tensor, inputs: Tensor) -> Tensor:
    """The input of an expert's down matrix ``[tokens, I]``, from its gate and up ``[2 I, h]``."""
    made: Tensor = module._apply_gate(functional.linear(inputs, gate_up))
    return made


@contextmanager
def watched(module: nn.Module, watch: Watch) -> Iterator[None]:
    """While open, ``watch`` is told of every call of the mixture; what it returns, of each expert's inner input. It may
    raise to end the forward."""
    _WATCHES[id(module)] = watch
    try:
        yield
    finally:
        del _WATCHES[id(module)]
