"""transformers' own model classes without their weights: every parameter on the meta device, rotary buffers real."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtool import QtoolError
from qtool.convert.files.config_file import CONFIG, read_config, read_stored_config
from qtool.convert.files.reading import shown
from qtool.convert.files.wrappers import is_wrapped
from qtool.convert.models.shape import Decoder
from qtool.convert.models.table import find_family

_UNKNOWN = "{} ({}) holds buffers that cannot be made from config.json alone."


def load_config(path: Path, trust_remote_code: bool = False) -> Any:
    """config.json as transformers reads it, without the quantization section (dequantized weights are loaded).

    Raises QtoolError when the config is unreadable, says what no model can be, or wants custom code that the recipe
    does not allow.
    """
    from transformers import AutoConfig

    from qtool.convert.models.config_keys import check_class, check_config

    raw = read_config(path)
    check_config(raw)
    family = find_family(raw)
    if (
        family is not None and family.register is not None
    ):  # the class that the walk knows, whatever came with the model
        family.register()
        raw, trust_remote_code = {}, False
    if "auto_map" in raw and not trust_remote_code:
        raise QtoolError(
            f"{path}: config.json asks to run the model's own code (auto_map). Read that code, then set "
            f"`trust_remote_code: true` under `model:` in the recipe.{_known_class(raw)}"
        )
    try:
        if is_wrapped(read_stored_config(path)):  # of its text model alone
            config = AutoConfig.for_model(raw["model_type"], **{k: v for k, v in raw.items() if k != "model_type"})
            config.name_or_path = str(path)
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # its checks raise what they like
        raise _unreadable(path, error) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    check_class(config, trust_remote_code)
    # how a model answers, not what: qtool asks for these itself
    config.return_dict, config._attn_implementation = True, None
    config.output_hidden_states = config._output_attentions = False
    return config


def _known_class(raw: Mapping[str, Any]) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if raw.get("model_type") not in CONFIG_MAPPING_NAMES:
        return ""
    return (
        f" Or remove auto_map from config.json: transformers has a class of its own for model_type "
        f"{raw['model_type']}, which needs no such code."
    )


def _unreadable(path: Path, error: Exception) -> QtoolError:
    reason = shown(" ".join(str(error).split()[:40])) or type(error).__name__
    return QtoolError(f"{path / CONFIG}: transformers cannot make a model of it: {reason}")


def build_skeleton(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """An AutoModelForCausalLM whose parameters take no memory. Non-persistent buffers (rotary tables) are real.

    Raises QtoolError for a config of which transformers makes no model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            trusted = trust_remote_code and not _registered(config)
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except Exception as error:  # a config may hold anything, and so do the exceptions of a model's constructor
        raise _unreadable(Path(getattr(config, "name_or_path", "") or "."), error) from error
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            if next(module.parameters(), None) is None:
                model.set_submodule(name, _rebuild(name, module))
            else:
                _fill_buffers(name, module, model)
    model.eval()
    return model.requires_grad_(False)


def _registered(config: Any) -> bool:
    """Whether qtool has the class that the config's family is built of."""
    family = find_family({"architectures": config.architectures})
    return family is not None and family.register is not None


def _rebuild(name: str, module: nn.Module) -> nn.Module:
    """A module made of buffers only (a rotary embedding) is made again, on the CPU, from its own config."""
    config = getattr(module, "config", None)
    if config is None:
        raise QtoolError(_UNKNOWN.format(type(module).__name__, name))
    with torch.device("cpu"):
        rebuilt: nn.Module = type(module)(config=config)
    return rebuilt


def _fill_buffers(name: str, module: nn.Module, model: Any) -> None:
    """Buffers beside weights (the factor of Gemma's embedding) get the values of the model's own initialization, which
    leaves weights on the meta device as they are. In float32, as rotary tables: a model takes them to its own dtype."""
    for key, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, key, torch.full_like(buffer, torch.nan, dtype=torch.float32, device="cpu"))
    initialize = getattr(model, "_init_weights", None)
    if initialize is not None:
        initialize(module)
    if any(bool(buffer.isnan().any()) for buffer in module.buffers(recurse=False)):
        raise QtoolError(_UNKNOWN.format(type(module).__name__, name))


def file_shapes(model: nn.Module, decoder: Decoder) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """As `expected_shapes`, of the tensors as files hold them: experts each alone, or as the family says."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        layer = decoder.layer_of(name)
        if layer is None:
            shapes[name] = tuple(tensor.shape)
        else:
            layers.setdefault(layer, {})[name.removeprefix(decoder.at(layer))] = tensor
    for layer, state in layers.items():
        held = decoder.in_files(state)
        shapes |= {decoder.at(layer) + name: tuple(tensor.shape) for name, tensor in held.items()}
    return shapes, expected_shapes(model)[1]


def expected_shapes(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """(name -> shape of every tensor a checkpoint must hold, the names that may be absent because they are tied)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = getattr(model, "_tied_weights_keys", None) or {}
    return shapes, set(tied) if getattr(model.config, "tie_word_embeddings", False) else set()
