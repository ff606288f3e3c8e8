"""The containers a quantized linear can be stored in, as one table: `quant_method` in config.json -> module.

A container is a module with the functions of `Container`. ``section`` is always ``quantization_config``, all that a
reader has: whatever a container needs to know, it must find there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.writer import Spec
from qtool.convert.formats import autoawq, autogptq, bnb_nf4, compressed_tensors
from qtool.convert.formats.codes import Codes, check_codes

Section = Mapping[str, Any]


class Container(Protocol):
    """What every container module offers."""

    MARK: str
    """The suffix that every linear in this container has, and nothing else."""
    SUFFIXES: tuple[str, ...]
    """All suffixes that may replace ``weight``."""
    POSITIVE: tuple[str, ...]
    NONZERO: tuple[str, ...]
    """Suffixes of tensors whose numbers are all above zero."""
    BY_ROW: bool
    """Whether a scale belongs to columns of one row, so that the group size must divide them."""
    EXPANDS: bool
    """Whether engines expand a whole matrix to 16 bits before they use it."""
    COPIES: tuple[str, ...]
    """Files beside config.json that hold the section too."""

    KEYS: frozenset[str]
    """What the section says: a key beside these makes some loader read the tensors in another way."""

    def skipped(self, section: Section) -> list[str]:
        """Names and patterns of the modules that loaders told by this section leave unquantized."""

    def geometry(self, section: Section) -> dict[str, Any]:
        """What the section says of all linears, under the names recipes use (``group_size``, ``bits``, ``sym`` …); None
        where it says nothing."""

    def multiples(self, section: Section) -> tuple[int, int]:
        """What ``out`` and ``in`` must be multiples of, apart from the group size."""

    def specs(self, out: int, columns: int, section: Section, dtype: torch.dtype) -> dict[str, Spec]:
        """Suffix -> (dtype, shape) of the tensors that replace one ``.weight [out, in]``."""

    def pack(self, codes: Codes, section: Section) -> dict[str, torch.Tensor]:
        """Suffix -> tensor for one linear."""

    def unpack(self, tensors: Mapping[str, torch.Tensor], section: Section) -> Codes:
        """Inverse of `pack`."""

    def shape(self, tensor: Callable[[str], torch.Tensor], section: Section) -> tuple[int, int]:
        """``(out, in)`` of a linear; ``tensor(suffix)`` reads one of its tensors."""


CONTAINERS: dict[str, Container] = {
    "awq": autoawq,
    "gptq": autogptq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bnb_nf4,
}


def container_of(section: Section) -> Container:
    """The container that a ``quantization_config`` speaks of. Raises QtoolError naming those that qtool reads."""
    method = section.get("quant_method")
    if method not in CONTAINERS:
        raise QtoolError(f"quant_method {method!r} cannot be read back; qtool reads {', '.join(CONTAINERS)}.")
    return CONTAINERS[method]


def geometry_of(section: Section) -> dict[str, Any]:
    """bits, group_size, sym, as the container reads them; AutoAWQ's says no sym."""
    return {"bits": 4} | container_of(section).geometry(section)


@dataclass(frozen=True)
class Linears:
    """The quantized linears of an open folder, finished or not."""

    checkpoint: Checkpoint
    section: Section

    @property
    def container(self) -> Container:
        return container_of(self.section)

    def names(self) -> list[str]:
        """In file order."""
        mark = f".{self.container.MARK}"
        return [name.removesuffix(mark) for name in self.checkpoint.tensors if name.endswith(mark)]

    def parts(self, linear: str) -> list[str]:
        """Suffixes of the tensors that the folder holds for a linear."""
        return [suffix for suffix in self.container.SUFFIXES if f"{linear}.{suffix}" in self.checkpoint.tensors]

    def codes(self, linear: str) -> Codes:
        """One linear as codes and scales. Raises QtoolError where its tensors do not fit together or config.json."""
        tensors = {suffix: self.checkpoint.tensor(f"{linear}.{suffix}") for suffix in self.parts(linear)}
        try:
            codes = self.container.unpack(tensors, self.section)
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
        return self.container.shape(lambda suffix: self.checkpoint.tensor(f"{linear}.{suffix}"), self.section)
