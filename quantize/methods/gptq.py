"""GPTQ into the GPTQ container or compressed-tensors: codes that make up for each other's errors (../rounding.py).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from qtool import QtoolError
from qtool.convert.formats import autogptq, compressed_tensors
from qtool.convert.formats.plan import ModelShape
from qtool.convert.formats.shards import Shards
from qtool.quantize.grid import GridSpec
from qtool.quantize.methods.budget import Budget
from qtool.quantize.methods.grid_work import tried
from qtool.quantize.methods.method import Name, Pattern
from qtool.quantize.methods.on_grid import GridMethod
from qtool.quantize.methods.two_kinds import WHOLE, alike_of, nothing_left
from qtool.quantize.rounding import Factor

CHOICES: dict[str, tuple[Literal[4, 8], Literal[32, 64, 128]]] = {  # what a budget chooses from: bits, group
    "int4-g128": (4, 128), "int4-g64": (4, 64), "int4-g32": (4, 32), "int8-g128": (8, 128),
}  # fmt: skip


class LinearSettings(BaseModel):
    """Of the linears that a pattern names; what is left out is as in the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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

    budget: Budget | None = None
    """How large the weights may be, in place of `bits` and `group_size`: each linear gets its own, or 16 bits."""

    @model_validator(mode="after")
    def _one_rule(self) -> GptqMethod:
        said = [name for name in ("bits", "group_size", "modules", "ignore") if name in self.model_fields_set]
        if self.budget is not None and said:
            raise ValueError(f"`{said[0]}` and `budget` both say how linears are stored; leave one out")
        return self

    def decided(self, mix: Mapping[str, str]) -> GptqMethod:
        """The smallest kind that is used stands for the rest, the others by name."""
        used = [kind for kind in CHOICES if kind in mix.values()]
        if not used:
            raise nothing_left()
        rest = CHOICES[used[0]]
        own = {module: LinearSettings(bits=bits, group_size=size) for module, kind in mix.items()
               if kind not in (used[0], WHOLE) for bits, size in [CHOICES[kind]]}  # fmt: skip
        left = tuple(module for module, kind in mix.items() if kind == WHOLE)
        changes = {"bits": rest[0], "group_size": rest[1], "modules": own, "ignore": left, "budget": None}
        return self.model_copy(update=changes)

    def offers(self, shape: ModelShape) -> dict[str, dict[str, int]]:
        """As `Method.offers`: four and eight bits in groups, and 16 bits. Raises QtoolError where no group fits."""
        found: dict[str, dict[str, int]] = {}
        faults: list[QtoolError] = []
        for kind, (bits, size) in CHOICES.items():
            alone = self.model_copy(update={"bits": bits, "group_size": size, "budget": None})
            try:
                plan = alone.container.of_model(shape.decoder).plan(shape)
            except QtoolError as error:
                faults.append(error)
                continue
            for linear in plan.linears:
                found.setdefault(linear.name, {})[kind] = linear.nbytes
                found[linear.name][WHOLE] = 2 * linear.out * linear.columns
        if not found:
            raise faults[0]
        return {module: {kind: own[kind] for kind in (*CHOICES, WHOLE) if kind in own} for module, own in found.items()}

    def alike(self, shape: ModelShape) -> tuple[tuple[str, ...], ...]:
        """As `two_kinds.alike_of`."""
        return alike_of(shape)

    def trial(self, weight: Tensor, type_name: str, gram: Tensor | None, factor: Factor | None) -> Tensor:
        """As `Method.trial`; AWQ's scales are not searched for it."""
        if type_name == WHOLE or gram is None or factor is None:
            return weight.to(self.stored_dtype).float()
        bits, size = CHOICES[type_name]
        return tried(self, weight, gram, factor, GridSpec(bits, size, self.sym, self.stored_dtype))

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
