"""What a recipe may say under `outputs:`: one model for each method, keys with their public names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

import torch

from qtool.quantize.grid import GridSpec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class AwqMethod(BaseModel):
    """AWQ into the AutoAWQ GEMM container. ``scaling: none`` with ``rounding: rtn`` is plain round-to-nearest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["awq"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "awq"
    bits: Literal[4] = 4
    group_size: Literal[32, 64, 128] = 128
    zero_point: Literal[True] = True
    scaling: Literal["none", "awq"] = "awq"
    rounding: Literal["rtn", "gptq"] = "gptq"
    clip: bool = True
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.05
    propagate_error: bool = True
    propagate_strength: Annotated[float, Field(gt=0, le=1)] = 0.5
    dtype: Literal["float16", "bfloat16"] = "float16"

    @property
    def spec(self) -> GridSpec:
        return GridSpec(self.bits, self.group_size, sym=False, dtype=DTYPES[self.dtype])

    @property
    def own_stream(self) -> bool:
        """Whether this output is calibrated on the inputs that its own quantized prefix produces."""
        return self.rounding == "gptq" and self.propagate_error


Method = Annotated[AwqMethod, Field()]
