"""GPTQ into the GPTQ container or compressed-tensors: codes that make up for each other's errors (../rounding.py).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from qtool.convert.formats import autogptq, compressed_tensors
from qtool.convert.formats.shards import Shards
from qtool.quantize.grid import GridSpec
from qtool.quantize.methods.method import Name, Pattern
from qtool.quantize.methods.on_grid import GridMethod


class LinearSettings(BaseModel):
    """Of the linears that a pattern names; what is left out is as in the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bits: Literal[4, 8] | None = None
    """Of a weight."""
    group_size: Literal[-1, 32, 64, 128] | None = None
    """Weights that share a scale; -1: a row."""


class GptqMethod(GridMethod):
    """GPTQ into the GPTQ container (version 1 for symmetric grids, 2 for asymmetric ones) or into compressed-tensors.

    ``desc_act`` rounds columns by descending ``diag(G)``, on grids fitted before (static groups of neighbouring
    columns), so that every kernel can run the result. The file says what is in it, ``desc_act: false`` and
    ``static_groups: true`` (or ``actorder: static``): true stands for scattered columns, and vLLM refuses it.
    ``signed`` lets scales of symmetric grids be negative, so that the longer side of a group's range is the one with
    eight steps, not seven; only with ``descent``.
    """

    short: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gptq": {}, "gptq-8": {"bits": 8}, "compressed-tensors": {"format": "compressed-tensors"},
    }  # fmt: skip
    grouped: ClassVar[bool] = True

    method: Literal["gptq"]
    """GPTQ."""
    name: Name = "gptq"
    """Of the output: its folder's name ends so."""
    format: Literal["gptq", "compressed-tensors"] = "gptq"
    """The container: AutoGPTQ's, or compressed-tensors."""
    bits: Literal[4, 8] = 4
    """Of a weight."""
    group_size: Literal[-1, 32, 64, 128] = 128
    """Weights that share a scale; -1: a row."""
    sym: bool = True
    """A symmetric grid, without zero points; Marlin kernels want it."""
    signed: bool = True
    """Scales of symmetric grids may be negative, with `descent`."""
    desc_act: bool = False
    """Round the columns with the largest inputs first."""
    static_groups: Literal[True] = True
    """Groups are neighbouring columns all the same."""
    scaling: Literal["none", "awq"] = "none"
    """`awq` folds AWQ's scales first."""
    modules: dict[Pattern, LinearSettings] = Field(default_factory=dict)
    """Linears with bits or a group size of their own, by name or pattern; of several that name one the last counts."""

    @property
    def rounding(self) -> Literal["gptq"]:
        """What makes it GPTQ."""
        return "gptq"

    @property
    def spec(self) -> GridSpec:
        """As the keys say."""
        return GridSpec(self.bits, self.group_size, self.sym, self.stored_dtype)

    @property
    def act_order(self) -> bool:
        """Whether columns are rounded by descending ``diag(G)``."""
        return self.desc_act

    @property
    def container(self) -> Shards:
        """As `format` says."""
        if self.format == "compressed-tensors":
            section = compressed_tensors.quantization_config(self.bits, self.group_size, self.sym, self.desc_act)
        else:
            section = autogptq.quantization_config(self.bits, self.group_size, self.sym, self.damp_percent)
        return Shards(section, self.stored_dtype, self.group_size, self.asked)
