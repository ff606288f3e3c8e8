"""Everything behind a model's last layer, run by the model's own forward, for a survey (survey.py): what the next
tokens are, what the head is fed, what its errors cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.models.tied import EMBEDDING, HEAD
from qtool.quantize.source_model import SourceModel


class Head:
    """Everything behind the last layer, run by the model's own forward: a player stands in for the layers."""

    def __init__(self, source: SourceModel) -> None:
        self._source, self._model = source, source.model
        self._decoder: Any = source.model.get_submodule(source.decoder.prefix.split(".layers")[0])
        checkpoint, device = source.checkpoint, source.device
        self.tied = HEAD not in checkpoint.tensors
        self.weight = checkpoint.tensor(EMBEDDING if self.tied else HEAD).to(device)
        called = source.decoder.family.final_norm
        last: Any = getattr(self._decoder, called)
        self._norm = last
        self._layers = self._decoder.layers
        at = source.decoder.prefix.removesuffix("layers.")
        names = [name for name, _ in last.named_parameters()]
        norm = {name: checkpoint.tensor(f"{at}{called}.{name}").to(device, source.dtype) for name in names}
        last.load_state_dict(norm, assign=True)
        self._module: Any = source.model.get_submodule("lm_head")
        self._before = self._module.weight
        self._module.weight = nn.Parameter(self.weight.to(source.dtype), requires_grad=False)
        self._norm.requires_grad_(False)
        self._player = Player()
        self._decoder.layers = nn.ModuleList([self._player])
        self._inputs: Tensor = torch.empty(0)
        self._hook = self._module.register_forward_pre_hook(self._keep)
        columns = self.weight.shape[1]
        self._gram = torch.zeros(columns, columns, device=device)
        self._chances = torch.zeros(len(self.weight), device=device)
        self._tokens = 0

    def _keep(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = inputs[0].detach()

    def logits(self, states: Tensor) -> Tensor:
        """Of the last layer's outputs."""
        self._player.states = states
        result: Tensor = self._model(inputs_embeds=states, use_cache=False).logits
        return result

    def add(self, probabilities: Tensor) -> None:
        """Of the window that was run last, ``[tokens, vocabulary]``: the Fisher information of logits is
        diag(p) - p pᵀ, whose diagonal is taken."""
        x = self._inputs.flatten(0, -2).float()
        self._gram += x.t() @ x
        self._chances += (probabilities * (1 - probabilities)).sum(0)
        self._tokens += len(x)

    @property
    def counts(self) -> Tensor:
        """How much each row's loss counts ``[vocabulary]``."""
        return self._chances

    def losses(self, error: Tensor) -> Tensor:
        """Of ``error [rows, in]`` what each row loses: nats a token, times what it counts."""
        return ((error @ self._gram) * error).sum(1) / (2 * self._tokens**2)

    def close(self) -> None:
        """The skeleton as it was."""
        self._hook.remove()
        self._decoder.layers = self._layers
        self._norm.to("meta")
        self._module.weight = self._before


class Player(nn.Module):
    """Stands in for all layers: gives what it is told, whatever it gets."""

    states: Tensor

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Called by the model."""
        return self.states
