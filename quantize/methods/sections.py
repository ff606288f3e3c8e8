"""What a recipe may say under `outputs:`: one model for each method, keys with their public names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qtool.quantize.methods.number import Number

if TYPE_CHECKING:  # a recipe is read without them
    import torch

    from qtool.quantize.grid import GridSpec

SKIPPED = ["lm_head"]  # never quantized
# a folder's name ends at 255 bytes, and the model's stands in front of it
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _OnGrid(_Section):
    """What AWQ and GPTQ outputs have in common: integer codes on a uniform grid, chosen on calibration statistics."""

    clip: bool = True
    damp_percent: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    propagate_error: bool = True
    propagate_strength: Annotated[Number, Field(gt=0, le=1)] = 0.25  # .5 harms deep models: docs/benchmarks.md
    dtype: Literal["float16", "bfloat16"] = "float16"

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of scales and of everything that is not quantized."""
        import torch

        return torch.float16 if self.dtype == "float16" else torch.bfloat16


class AwqMethod(_OnGrid):
    """AWQ into the AutoAWQ GEMM container. ``scaling: none`` with ``rounding: rtn`` is plain round-to-nearest."""

    method: Literal["awq"]
    name: Name = "awq"
    bits: Literal[4] = 4
    group_size: Literal[32, 64, 128] = 128
    zero_point: Literal[True] = True
    scaling: Literal["none", "awq"] = "awq"
    rounding: Literal["rtn", "gptq"] = "gptq"

    @property
    def spec(self) -> GridSpec:
        from qtool.quantize.grid import GridSpec

        return GridSpec(self.bits, self.group_size, sym=False, dtype=self.stored_dtype)

    @property
    def act_order(self) -> bool:
        return False

    @property
    def own_stream(self) -> bool:
        """Whether this output is calibrated on the inputs that its own quantized prefix produces."""
        return self.rounding == "gptq" and self.propagate_error

    def quantization_config(self) -> dict[str, Any]:
        """The section that loaders read."""
        from qtool.convert.formats import autoawq

        return autoawq.quantization_config(self.group_size, SKIPPED)


class GptqMethod(_OnGrid):
    """GPTQ into the GPTQ container (version 1 for symmetric grids, 2 for asymmetric ones) or into compressed-tensors.

    ``desc_act`` rounds columns by descending ``diag(G)``, on grids fitted before (static groups of neighbouring
    columns), so that every kernel can run the result. The file says what is in it, ``desc_act: false`` and
    ``static_groups: true`` (or ``actorder: static``): true stands for scattered columns, and vLLM refuses it.
    """

    method: Literal["gptq"]
    name: Name = "gptq"
    format: Literal["gptq", "compressed-tensors"] = "gptq"
    bits: Literal[4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: Literal[True] = True
    scaling: Literal["none", "awq"] = "none"

    @property
    def rounding(self) -> Literal["gptq"]:
        return "gptq"

    @property
    def spec(self) -> GridSpec:
        from qtool.quantize.grid import GridSpec

        return GridSpec(self.bits, self.group_size, self.sym, self.stored_dtype)

    @property
    def act_order(self) -> bool:
        """Whether columns are rounded by descending ``diag(G)``."""
        return self.desc_act

    @property
    def own_stream(self) -> bool:
        """Whether this output is calibrated on the inputs that its own quantized prefix produces."""
        return self.propagate_error

    def quantization_config(self) -> dict[str, Any]:
        """The section that loaders read."""
        from qtool.convert.formats import autogptq, compressed_tensors

        if self.format == "compressed-tensors":
            return compressed_tensors.quantization_config(self.bits, self.group_size, self.sym, self.desc_act)
        return autogptq.quantization_config(self.bits, self.group_size, self.sym, self.damp_percent)


class Nf4Method(_Section):
    """NF4 by bitsandbytes; needs no calibration. What is not quantized keeps the source's dtype."""

    method: Literal["nf4"]
    name: Name = "nf4"
    double_quant: bool = True
    blocksize: Literal[64] = 64

    @property
    def own_stream(self) -> bool:
        return False

    @property
    def stored_dtype(self) -> None:
        """None: each tensor keeps its own."""
        return None

    def quantization_config(self) -> dict[str, Any]:
        """The section that loaders read."""
        from qtool.convert.formats import bnb_nf4

        return bnb_nf4.quantization_config(self.double_quant, SKIPPED)


class GgufMethod(_Section):
    """A .gguf file for llama.cpp, each tensor in the type that llama.cpp's own rules give it.

    ``imatrix``: weigh errors by the mean square of each input channel over the calibration text (true), by a file that
    llama.cpp's llama-imatrix made (its path), or by nothing but the weights (false).
    """

    method: Literal["gguf"]
    name: Name = "gguf"
    type: Literal["Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "F16", "BF16"] = "Q4_K_M"
    imatrix: bool | Annotated[str, Field(min_length=1)] = True
    pre_tokenizer: str | None = None  # llama.cpp's name of the split rules, where qtool cannot tell it

    @property
    def own_stream(self) -> bool:
        return False

    @property
    def takes_importance(self) -> bool:
        """Whether the blocks of this type depend on an importance matrix (llama.cpp's Q8_0 and floats do not)."""
        return self.type not in ("Q8_0", "F16", "BF16")

    @property
    def needs_importance(self) -> bool:
        """Whether the walk must measure the mean square of every input channel."""
        return self.imatrix is True and self.takes_importance

    def quantization_config(self) -> dict[str, Any]:
        """What identifies the container; no loader reads it."""
        return {"quant_method": "gguf", "type": self.type}


GridMethod = AwqMethod | GptqMethod
Method = Annotated[AwqMethod | GptqMethod | Nf4Method | GgufMethod, Field(discriminator="method")]


def needs_calibration(method: Method) -> bool:
    """Whether the output depends on the calibration set."""
    if isinstance(method, GgufMethod):
        return method.needs_importance
    return not isinstance(method, Nf4Method)


def weights_per_scale(method: AwqMethod | GptqMethod | Nf4Method) -> int:
    """Group size (-1 for whole rows) or block size."""
    return method.blocksize if isinstance(method, Nf4Method) else method.group_size
