"""The source as the walk meets it: a skeleton whose layers are filled one at a time, from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.models.shape import Decoder
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.capture import Calls, Hidden, Recorder, advance
from qtool.quantize.memory import BATCH_TOKENS
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.ranks import Ranks
from qtool.quantize.soundness import refuse_unsound


@dataclass
class SourceModel:
    """``model``: on the meta device but for what is filled; ``dtype``: of computing."""

    model: nn.Module
    decoder: Decoder
    checkpoint: Checkpoint
    device: torch.device
    ranks: Ranks
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        embedding = next(info for name, info in self.checkpoint.tensors.items() if "embed_tokens" in name)
        self.dtype = embedding.dtype
        if self.device.type == "cpu" and not (self.dtype == torch.bfloat16 and fast_bfloat16()):
            self.dtype = torch.float32
        if self.decoder.family.mixture is not None:
            for layer in self.layers:
                _also_named(layer, self.decoder.family.mixture.renamed)

    @property
    def layers(self) -> nn.ModuleList:
        """Of the skeleton."""
        layers: Any = self.model.get_submodule(self.decoder.prefix.rstrip("."))
        return layers  # type: ignore[no-any-return]  # get_submodule is typed as Module

    def read(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors in host memory, page-locked where they go on to an accelerator."""
        prefix = self.decoder.at(index)
        names = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): self.checkpoint.tensor(name) for name in names}
        return (
            {name: tensor.pin_memory() for name, tensor in tensors.items()} if self.device.type == "cuda" else tensors
        )

    def place(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer on the device, as transformers holds it."""
        weights = {
            name: tensor.to(self.device, self.dtype_of(name, tensor), non_blocking=True)
            for name, tensor in tensors.items()
        }
        where, offset = f"{self.checkpoint.path}: {self.decoder.at(index)}", self.decoder.family.norm_offset
        self.ranks.own([(0, partial(refuse_unsound, weights, where, offset))])
        return self.decoder.in_memory(weights)

    def dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """Of computing with a layer's tensor of that name: what is never cast is at least as fine as all others."""
        return self.dtype if self.decoder.family.casts(name) else torch.promote_types(self.dtype, tensor.dtype)

    def fill(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The skeleton's layer with these tensors, named as in memory."""
        layer = self.layers[index]
        layer.load_state_dict(dict(state), assign=True)
        return layer

    def record(self, calibration: CalibrationSet) -> tuple[Hidden, Calls]:
        """Run the model's own forward with recorders in place of the layers: what the first layer is fed by this rank's
        batches, and the other arguments (masks, positions, rotary tables) of every layer. The turns of a looped model
        lie side by side; each begins where the one before ends, so that all layers are read once for it."""
        decoder: Any = self.model.get_submodule(self.decoder.prefix.split(".layers")[0])
        final = self.decoder.family.final_norm
        layers, norm = decoder.layers, getattr(decoder, final)
        recorders = [Recorder(layer) for layer in layers]
        decoder.layers = nn.ModuleList(recorders)
        setattr(decoder, final, nn.Identity())
        state = {}
        for name, tensor in decoder.state_dict().items():
            if not name.startswith("layers.") and tensor.is_meta:
                full = self.decoder.prefix.removesuffix("layers.") + name
                state[name] = self.checkpoint.tensor(full).to(self.device, self.dtype)
        decoder.load_state_dict(state, assign=True, strict=False)
        for module in decoder.children():
            if module is not decoder.layers:
                module.to(self.device)
        loops, length = self.decoder.shape.loops, calibration.tokens.shape[1]
        size = max(1, BATCH_TOKENS[self.device.type] // (length * loops))
        asked = {"side_by_side": True} if loops > 1 else {}
        hidden: Hidden = []
        batches = calibration.batches(size)
        dealt = list(self.ranks.dealt(batches))
        try:
            for tokens in dealt or batches[:1]:  # who has no batch needs the layers' arguments all the same
                for recorder in recorders:
                    recorder.passes = 0
                decoder(input_ids=tokens.to(self.device), use_cache=False, **asked)
                hidden += [recorders[0].begun] if dealt else []
        finally:
            decoder.layers = layers
            setattr(decoder, final, norm)
            decoder.embed_tokens.to("meta")
        if len(hidden) < self.ranks.rounds(len(batches)):
            shape = (0, length, self.decoder.shape.hidden)
            hidden.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        last: Calls = {}
        for turn in range(loops):
            last = {id(layer): recorder.calls[turn] for layer, recorder in zip(layers, recorders, strict=True)}
            if turn + 1 < loops:
                hidden = self._with_next_turn(hidden, last, length)
        return hidden, last

    def _with_next_turn(self, hidden: Hidden, calls: Calls, length: int) -> Hidden:
        """A looped model's hidden states before its first layer, with those of one turn more at their end."""
        ended = list(hidden)
        for index in range(len(self.layers)):
            layer = self.fill(index, self.place(index, self.read(index)))
            advance(layer, ended, calls)
            layer.to("meta")
        return [torch.cat([begun, end[:, -length:]], 1) for begun, end in zip(hidden, ended, strict=True)]


def _also_named(layer: nn.Module, renamed: Mapping[str, str]) -> None:
    """Modules that transformers calls otherwise than the files answer to the files' names, too: matrices have those."""
    for stored, held in renamed.items():
        parent, _, own = stored.rpartition(".")
        with suppress(AttributeError):  # a tensor, or a module of which nothing is quantized
            object.__setattr__(layer.get_submodule(parent), own, layer.get_submodule(held))  # it stays registered once
