"""AWQ into the AutoAWQ container: scales searched on Gram matrices (../scaling.py), codes with zero points.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from qtool.convert.formats import autoawq
from qtool.convert.formats.shards import Shards
from qtool.quantize.grid import GridSpec
from qtool.quantize.methods.method import SKIPPED, Name
from qtool.quantize.methods.on_grid import GridMethod


class AwqMethod(GridMethod):
    """AWQ into the AutoAWQ GEMM container. ``scaling: none`` with ``rounding: rtn`` is plain round-to-nearest."""

    short: ClassVar[Mapping[str, Mapping[str, Any]]] = {"awq": {}}
    grouped: ClassVar[bool] = True

    method: Literal["awq"]
    """AWQ, in AutoAWQ's container."""
    name: Name = "awq"
    """Of the output: its folder's name ends so."""
    bits: Literal[4] = 4
    """Of a weight."""
    group_size: Literal[32, 64, 128] = 128
    """Weights that share a scale."""
    zero_point: Literal[True] = True
    """The grid is asymmetric."""
    scaling: Literal["none", "awq"] = "awq"
    """`awq` searches scales of the inputs; `none` leaves them."""
    rounding: Literal["rtn", "gptq"] = "gptq"
    """`gptq` compensates errors; `rtn` takes the nearest code."""

    @property
    def spec(self) -> GridSpec:
        """With zero points."""
        return GridSpec(self.bits, self.group_size, sym=False, dtype=self.stored_dtype)

    @property
    def signed(self) -> bool:
        """Zero points give each side of a range what it needs."""
        return False

    @property
    def act_order(self) -> bool:
        """The container has no g_idx, and needs none."""
        return False

    @property
    def container(self) -> Shards:
        """AutoAWQ's."""
        section = autoawq.quantization_config(self.group_size, SKIPPED)
        return Shards(section, self.stored_dtype, self.group_size, self.asked)
