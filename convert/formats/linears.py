"""The quantized linears of a folder of safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.codes import CPU, Codes, check_codes
from qtool.convert.formats.table import Container, container_of
from qtool.convert.runtimes.rule import Observed


@dataclass(frozen=True)
class Linears:
    """The quantized linears of an open folder, finished or not."""

    checkpoint: Checkpoint
    section: Mapping[str, Any]

    @property
    def container(self) -> Container:
        return container_of(self.section)

    def own(self, linear: str) -> Mapping[str, Any]:
        """The section as it is for a linear. Raises QtoolError for rules that qtool does not read."""
        return self.container.own(self.section, linear)

    def names(self) -> list[str]:
        """In file order."""
        mark = f".{self.container.MARK}"
        return [name.removesuffix(mark) for name in self.checkpoint.tensors if name.endswith(mark)]

    def parts(self, linear: str) -> list[str]:
        """Suffixes of the tensors that the folder holds for a linear."""
        return [suffix for suffix in self.container.SUFFIXES if f"{linear}.{suffix}" in self.checkpoint.tensors]

    def codes(self, linear: str, device: torch.device = CPU) -> Codes:
        """One linear as codes and scales, unpacked on ``device``. Raises QtoolError where its tensors do not fit
        together or config.json."""
        names = {suffix: f"{linear}.{suffix}" for suffix in self.parts(linear)}
        tensors = {suffix: self.checkpoint.tensor(name).to(device) for suffix, name in names.items()}
        try:
            codes = self.container.unpack(tensors, self.own(linear))
            check_codes(codes)
        except QtoolError as error:
            raise QtoolError(f"{self.checkpoint.path}: {linear}: {error.message}") from error
        except KeyError as error:
            raise QtoolError(f"{self.checkpoint.path}: {linear} lacks {error}, or config.json does.") from error
        except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:  # the last two: torch's
            raise QtoolError(f"{self.checkpoint.path}: {linear} does not fit its config.json ({error}).") from error
        return codes

    def shape(self, linear: str) -> tuple[int, int]:
        """``(out, in)``."""
        tensors = self.checkpoint.tensors

        def sizes(suffix: str) -> tuple[int, ...]:
            return tensors[f"{linear}.{suffix}"].shape

        own = self.own(linear)
        return self.container.shape(sizes, lambda suffix: self.checkpoint.tensor(f"{linear}.{suffix}"), own)

    def observed(self, linear: str) -> Observed:
        """What the container's loading rules ask of a linear's numbers."""
        return self.container.observed(
            lambda suffix: self.checkpoint.tensor(f"{linear}.{suffix}"), self.parts(linear), self.own(linear)
        )
