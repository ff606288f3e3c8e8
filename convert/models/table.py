"""The one table of families. A new family is a module beside this one and a row here (docs/adding-a-family.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError
from qtool.convert.models.ernie4_5 import ERNIE, ERNIE_MOE
from qtool.convert.models.family import LAYERS, Family, GgufFacts
from qtool.convert.models.gemma import GEMMA, GEMMA2, GEMMA3
from qtool.convert.models.glm4 import GLM, GLM4
from qtool.convert.models.glm4_moe import GLM4_MOE
from qtool.convert.models.granite import GRANITE
from qtool.convert.models.hunyuan import HUNYUAN_MOE, HY_V3
from qtool.convert.models.laguna import LAGUNA
from qtool.convert.models.lfm2 import LFM2
from qtool.convert.models.llama import IQUEST_CODER, LLAMA, MISTRAL
from qtool.convert.models.loop import IQUEST_LOOP_CODER
from qtool.convert.models.mellum import MELLUM
from qtool.convert.models.minimax_m2 import MINIMAX_M2
from qtool.convert.models.ministral3 import MINISTRAL3
from qtool.convert.models.mixtral import MIXTRAL
from qtool.convert.models.olmoe import OLMOE
from qtool.convert.models.phi3 import PHI3
from qtool.convert.models.qwen2 import QWEN2
from qtool.convert.models.qwen2_moe import QWEN2_MOE
from qtool.convert.models.qwen3 import QWEN3
from qtool.convert.models.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from qtool.convert.models.qwen3_moe import QWEN3_MOE
from qtool.convert.models.seed_oss import SEED_OSS
from qtool.convert.models.starcoder2 import STARCODER2

_ALL = (
    LLAMA, MISTRAL, QWEN2, QWEN3, IQUEST_CODER, GEMMA, GEMMA2, GEMMA3, IQUEST_LOOP_CODER, MIXTRAL, QWEN3_MOE,
    QWEN2_MOE, OLMOE, GLM4_MOE, MINISTRAL3, SEED_OSS, GRANITE, STARCODER2, PHI3,
    GLM, GLM4, MELLUM, MINIMAX_M2, ERNIE, ERNIE_MOE, HUNYUAN_MOE, HY_V3, LAGUNA, LFM2,
    QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def find_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json: the first known of those that `architectures` names; None where none is known."""
    return next((FAMILIES[name] for name in _names(config) if name in FAMILIES), None)


def family_of(config: Mapping[str, Any]) -> Family:
    """The same. Raises QtoolError saying which are known and how one is added."""
    found = find_family(config)
    if found is None:
        raise QtoolError(
            f"architecture {names_of(config)} is not known to qtool. Known: {', '.join(quantized())}. What is missing: "
            "a module in convert/models and its row in FAMILIES of convert/models/table.py (docs/adding-a-family.md)."
        )
    return found


def gguf_facts(config: Mapping[str, Any]) -> GgufFacts:
    """How llama.cpp wants the model of a config.json. Raises QtoolError naming its architecture and those that can be
    written."""
    family = find_family(config)
    if family is not None and family.gguf is not None:
        return family.gguf
    known = [name for name, other in FAMILIES.items() if other.gguf is not None]
    why = family.no_gguf if family else "cannot be written as GGUF yet"
    raise QtoolError(f"architecture {names_of(config)} {why}. Known: {', '.join(known)}.")


def prefix_of(config: Mapping[str, Any]) -> str:
    """How the names of its layers' tensors begin; of an architecture that is not known, as most do."""
    family = find_family(config)
    return family.prefix if family else LAYERS


def architecture_name(config: Mapping[str, Any]) -> str:
    """The name by which a config.json's family is known; else the first one it has; empty where none is named."""
    found = find_family(config)
    return found.name if found else next(iter(_names(config)), "")


def names_of(config: Mapping[str, Any]) -> str:
    """The names, to show."""
    return ", ".join(_names(config)) or "(none named in config.json)"


def quantized() -> list[str]:
    """Architectures that outputs can be made of."""
    return list(FAMILIES)


def _names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list | tuple) else []
