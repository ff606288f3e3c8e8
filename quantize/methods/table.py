"""Every method that a recipe can name. A new one is a module and a row here."""

from __future__ import annotations

from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.nf4 import Nf4Method

METHODS: dict[str, type[Method]] = {"awq": AwqMethod, "gptq": GptqMethod, "nf4": Nf4Method, "gguf": GgufMethod}
