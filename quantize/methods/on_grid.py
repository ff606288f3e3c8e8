"""Methods on a uniform grid: their keys, and what they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.convert.files.folder import FOLD_SCALES
from qtool.convert.files.writer import Spec
from qtool.convert.formats.plan import LinearPlan
from qtool.convert.models.feeds import Feed
from qtool.quantize import descent, scaling
from qtool.quantize.crew import SOLO, Crew
from qtool.quantize.methods.grid_work import GridWork, OnGrid
from qtool.quantize.methods.method import Inputs, Layer, LayerCodes, LayerWork, Method, Needs, Statistics
from qtool.quantize.methods.number import Number
from qtool.quantize.stacks import stacks_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class GridMethod(Method):
    """What AWQ and GPTQ outputs have in common."""

    clip: bool = True
    """Search how far the range of each group is cut."""
    descent: bool = True
    """Improve codes one by one after rounding."""
    damp_percent: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Part of the Gram matrix's mean diagonal that is added to it."""
    propagate_error: bool = True
    """Round against the inputs that the quantized prefix produces."""
    propagate_strength: Annotated[Number, Field(gt=0, le=1)] = 0.5  # of three: docs/benchmarks.md
    """How much of the prefix's error a matrix makes up for."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Of scales and of all that stays in 16 bits."""

    @property
    def needs(self: OnGrid) -> Needs:
        """Only a rounding that compensates can make up for what its own prefix did."""
        return Needs.OWN_STREAM if self.rounding == "gptq" and self.propagate_error else Needs.GRAM

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of scales and of everything that is not quantized."""
        return DTYPES[self.dtype]

    @property
    def kept_as(self) -> str:
        """What the columns were multiplied by, and the rows divided by."""
        return FOLD_SCALES

    def kept_specs(self, matrices: Sequence[LinearPlan]) -> dict[str, Spec]:
        """Ones where nothing is folded."""
        specs: dict[str, Spec] = {}
        for matrix in matrices:
            specs[f"{matrix.name}.columns"] = (torch.float32, (matrix.columns,))
            specs[f"{matrix.name}.rows"] = (torch.float32, (matrix.out,))
        return specs

    def workspace(self: OnGrid, out: int, columns: int) -> int:
        """Of the search for scales; beside the weights, three matrices like the Gram matrix to factorize it, or one and
        what the rounding holds."""
        weights = out * columns
        searched = scaling.SEARCHED * weights
        if self.rounding != "gptq":
            return searched
        rounding = descent.workspace(out, columns) if self.descent else 4 * weights
        return max(searched if self.scaling == "awq" else 0, 3 * columns**2 + weights, columns**2 + rounding)

    @property
    def asks_source(self: OnGrid) -> bool:
        """Scales are searched on the source's own inputs, the same for every output."""
        return self.scaling == "awq"

    def begin(self: OnGrid, layer: Layer, inputs: Inputs) -> LayerWork:
        """Search and fold the scales of all feeds."""
        return GridWork(self, layer.feeds, layer.weights, inputs.statistics, layer.plans, inputs.crew)

    def quantize(self: OnGrid, layer: Layer, inputs: Inputs) -> LayerCodes:
        """As `quantize_layer`."""
        found = inputs.statistics
        return quantize_layer(self, layer.feeds, layer.weights, found, inputs.owned, layer.plans, inputs.crew)


def quantize_layer(
    method: OnGrid,
    feeds: Sequence[Feed],
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, Statistics],
    owned: bool = False,
    plans: Mapping[str, LinearPlan] | None = None,
    crew: Crew = SOLO,
) -> LayerCodes:
    """A layer on one set of statistics, collected before any of it is rounded. ``weights``: tensor name -> tensor of
    any float dtype (left unchanged); ``statistics``: a stack's name -> its input's, used up to spare memory where
    ``owned``, left unchanged otherwise; ``plans``: as `GridWork` takes them."""
    work = GridWork(method, feeds, weights, statistics, plans, crew)
    for stack in filter(work.quantizes, stacks_of(feeds)):
        work.round(stack, work.folded_statistics(stack, statistics[stack.name], owned))
    return work.finish()
