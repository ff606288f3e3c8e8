"""How much a conversion takes of memory and disk, from the recipe and the headers of the source's weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qtool.convert.files.tensor_info import TensorInfo
from qtool.convert.models.shape import Decoder
from qtool.convert.text.source import TextSource
from qtool.evaluate.engines.token_proof import proof_bytes
from qtool.make.output import Output, owners_of
from qtool.make.writing import memory
from qtool.quantize.memory import peak_bytes, score_bytes
from qtool.quantize.methods.method import members_of
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.survey import AHEAD
from qtool.quantize.survey_memory import survey_bytes

# torch, transformers and the rest in host memory, and freed blocks that the heap keeps (cli/heap.py): of the process's
# own. Measured without a card (docs/benchmarks.md); beside one the driver and its libraries take more, which nobody
# measured apart.
LIBRARIES = {"cpu": 490 * 10**6, "cuda": 2**30}


@dataclass(frozen=True)
class Work:
    """``text``: the calibration set; ``tensors``: the source's, as stored; ``outputs``: those to be made."""

    text: TextSource
    decoder: Decoder
    tensors: Mapping[str, TensorInfo]
    outputs: Sequence[Output]
    device: torch.device

    def device_peaks(self, cards: int = 1) -> list[int]:
        """Bytes on the computing device of each rank."""
        if not self.outputs:
            return [0]
        peaks = [self._device_peak(cards, rank) for rank in range(cards)]
        return [max(peaks[0], self.measuring()[0]), *peaks[1:]]

    def measuring(self) -> tuple[int, int]:
        """(on the computing device of the first rank, in host memory besides) while it is measured what types cost."""
        if all(output.method.undecided is None for output in self.outputs):
            return 0, 0
        shapes = {name: info.shape for name, info in self.tensors.items()}
        width = 4 if self.device.type == "cpu" and not fast_bfloat16() else 2
        on_device, kept = survey_bytes(self.decoder, shapes, self.text.length, width, self.device)
        return on_device, kept + (1 + AHEAD[self.device.type]) * self.layer_bytes()

    def host_peak(self, cards: int = 1) -> int:
        """Bytes of host memory, of all ranks."""
        if not self.outputs:
            return 0
        computing = 0
        if self.device.type == "cpu":
            computing = sum(self.device_peaks(cards)) + cards * memory(self.outputs, self.device) + self._rounded()
        walking = computing + cards * 2 * max(self.layer_bytes(), self._largest())
        return cards * LIBRARIES[self.device.type] + max(walking, self._proving()) + self.measuring()[1]

    def _proving(self) -> int:
        """While the tokens of a file are compared, before the walk and after it: one file at a time."""
        asked = any(output.container.proves_tokens for output in self.outputs)
        return proof_bytes(self.decoder.shape) if asked else 0

    def disk_bytes(self) -> int:
        """Space that a begun output has reserved already counts as there."""
        return sum(output.disk_bytes for output in self.outputs if not any(output.partial.glob("*")))

    def _device_peak(self, ranks: int, rank: int) -> int:
        text, device = self.text, self.device.type
        shapes = {name: info.shape for name, info in self.tensors.items()}
        scores = score_bytes(self.decoder.shape, text.samples, text.length, device)
        methods = [output.method for output in self.outputs]
        owners = owners_of(self.outputs, ranks)
        crews = members_of(methods, owners, ranks)
        deals = zip(methods, owners, crews, strict=True)
        mine = [method for method, owner, crew in deals if owner == rank or (rank in crew and method.needs.gram)]
        return peak_bytes(self.decoder, shapes, methods, text.samples * text.length, device, scores, ranks, mine)

    def _rounded(self) -> int:
        """Codes of outputs that no walk of Gram matrices counts: of the layer being rounded and of the one on its way
        to the disk, about a byte a weight."""
        count = sum(not output.method.needs.gram for output in self.outputs)
        return 2 * count * self.layer_parameters()

    def layer_parameters(self) -> int:
        """Of the largest layer."""
        return self._of_layer(lambda info: math.prod(info.shape))

    def layer_bytes(self) -> int:
        """The stored bytes of the largest layer; two are in host memory at once, one read ahead."""
        return self._of_layer(lambda info: info.nbytes)

    def _of_layer(self, size: Callable[[TensorInfo], int]) -> int:
        sizes = dict.fromkeys(range(self.decoder.shape.layers), 0)
        for name, info in self.tensors.items():
            layer = self.decoder.layer_of(name)
            if layer is not None:
                sizes[layer] += size(info)
        return max(sizes.values())

    def _largest(self) -> int:
        return max(info.nbytes for info in self.tensors.values())
