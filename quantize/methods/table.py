"""Every method that a recipe can name. A new one is a module and a row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.nf4 import Nf4Method

METHODS: dict[str, type[Method]] = {"awq": AwqMethod, "gptq": GptqMethod, "nf4": Nf4Method, "gguf": GgufMethod}

if TYPE_CHECKING:
    AnyMethod = Method
else:  # what pydantic reads a section with: the model that its key `method` names
    AnyMethod = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007
