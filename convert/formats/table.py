"""The formats that an output can be stored in, as one table: `quant_method` in config.json -> module.

A row is a module with the facts of `Stored`; one whose matrices lie in safetensors files has the functions of
`Container` too. ``section`` is always ``quantization_config``, all that a reader has: whatever a container needs to
know, it must find there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from qtool import QtoolError
from qtool.convert.files.writer import Spec
from qtool.convert.formats import autoawq, autogptq, bnb_nf4, compressed_tensors
from qtool.convert.formats.apart import Apart
from qtool.convert.formats.codes import Codes
from qtool.convert.formats.gguf import stored as gguf
from qtool.convert.models.shape import Decoder
from qtool.convert.runtimes.rule import Observed, Runtime, RuntimeRule

Section = Mapping[str, Any]


class Stored(Protocol):
    """What every format says of itself."""

    RUNS_IN: tuple[Runtime, ...]
    """The runtimes that read it, each with what it needs there; the first is the one it is planned for."""
    RULES: tuple[RuntimeRule, ...]
    """The runtimes' loading rules, as `qtool verify` asks them."""

    def stores(self, made: Mapping[str, Any]) -> bool:
        """Whether an output lies in it, by what its manifest says of it."""

    def section_of(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """The ``quantization_config`` of such an output; empty where the file says it itself."""


class OneFile(Stored, Protocol):
    """A format whose single file says everything itself."""

    SAFETENSORS: Literal[False]


class Container(Stored, Protocol):
    """What a format of safetensors files offers beside that."""

    SAFETENSORS: Literal[True]
    MARK: str
    """The suffix that every linear in this container has, and nothing else."""
    SUFFIXES: tuple[str, ...]
    """All suffixes that may replace ``weight``."""
    POSITIVE: tuple[str, ...]
    """Suffixes of tensors whose numbers are all above zero."""
    NONZERO: tuple[str, ...]
    """Suffixes of tensors whose numbers have either sign, and none of which is zero."""
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

    def with_plain(self, section: Section, plain: Sequence[str], experts: bool) -> dict[str, Any]:
        """The section for a model in whose layers the modules of ``plain`` stay unquantized. Raises QtoolError where it
        has ``experts`` and no runtime reads these from such files."""

    def with_apart(self, section: Section, apart: Apart, linears: Sequence[str]) -> dict[str, Any]:
        """The section of an output that stores some of its ``linears`` otherwise, so that every loader is told of each.
        Raises QtoolError where loaders cannot be told."""

    def own(self, section: Section, linear: str) -> Section:
        """The section as it is for one linear: with its own settings, where it has some. Raises QtoolError for rules
        that qtool does not read."""

    def with_parts(self, section: Section, parts: Sequence[str], matrices: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The section for a model in which modules stay unquantized whose names have one of ``parts``, so that no
        loader takes them for others. ``matrices``: a layer's quantized modules, those of one input together."""

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

    def shape(
        self, sizes: Callable[[str], tuple[int, ...]], tensor: Callable[[str], torch.Tensor], section: Section
    ) -> tuple[int, int]:
        """``(out, in)`` of a linear; ``sizes(suffix)``: the shape of one of its tensors, which need not be read for
        it; ``tensor(suffix)`` reads one."""

    def observed(self, tensor: Callable[[str], torch.Tensor], parts: Collection[str], section: Section) -> Observed:
        """What the container's loading rules ask of a linear's numbers; ``parts``: the suffixes that it has."""


FORMATS: dict[str, Container | OneFile] = {
    "awq": autoawq,
    "gptq": autogptq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bnb_nf4,
    "gguf": gguf,
}
# What reads weights that are not quantized, or quantized by somebody else.
OTHERS_RUN_IN = (Runtime("vllm", "vLLM"), Runtime("transformers", "transformers"))


def container_of(section: Section) -> Container:
    """The container that a ``quantization_config`` speaks of. Raises QtoolError naming those that qtool reads."""
    found = FORMATS.get(str(section.get("quant_method")))
    if found is None or not found.SAFETENSORS:
        known = ", ".join(name for name, row in FORMATS.items() if row.SAFETENSORS)
        raise QtoolError(f"quant_method {section.get('quant_method')!r} cannot be read back; qtool reads {known}.")
    return found


def of_model(container: Container, section: Section, decoder: Decoder) -> dict[str, Any]:
    """The section, told of what a model leaves unquantized. Raises QtoolError where no runtime reads it so."""
    plain, parts = decoder.beside_experts(), decoder.family.unlike_layers
    said = container.with_plain(section, plain, bool(decoder.shape.experts)) if plain else dict(section)
    matrices = [[matrix.module for matrix in feed.consumers] for feed in decoder.feeds(0)]
    return container.with_parts(said, parts, matrices) if parts else said


def geometry_of(section: Section) -> dict[str, Any]:
    """bits, group_size, sym, as the container reads them; AutoAWQ's says no sym."""
    return {"bits": 4} | container_of(section).geometry(section)


def rules_of(section: Section) -> tuple[RuntimeRule, ...]:
    """The loading rules of a ``quantization_config``; none for a format that qtool does not know."""
    found = FORMATS.get(str(section.get("quant_method")))
    return found.RULES if found else ()


def runs_in(name: str) -> tuple[Runtime, ...]:
    """What runs weights in the format ``name`` (`quant_method`), the one to plan for first."""
    return FORMATS[name].RUNS_IN if name in FORMATS else OTHERS_RUN_IN


def in_safetensors(name: str) -> bool:
    """Whether weights in the format ``name`` lie there, as all do that qtool does not know."""
    return name not in FORMATS or FORMATS[name].SAFETENSORS


def runtime_of(section: Section, engine: str) -> Runtime | None:
    """What a file with this ``quantization_config`` needs in ``engine``; None where that does not read it."""
    found = FORMATS.get(str(section.get("quant_method")))
    return next((runtime for runtime in found.RUNS_IN if runtime.engine == engine), None) if found else None


def format_of(made: Mapping[str, Any]) -> Container | OneFile | None:
    """The format of an output, by what its manifest says of it."""
    return next((row for row in FORMATS.values() if row.stores(made)), None)
