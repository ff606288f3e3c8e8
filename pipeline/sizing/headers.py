"""A model as its config.json and the headers of its weights tell it; no weight is read or downloaded."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import COMPUTED, DTYPES
from qtool.convert.files.config_file import CONFIG, check_config, read_config
from qtool.convert.files.decoded import in_16_bits
from qtool.convert.files.diagnosis import why_no_model
from qtool.convert.files.reading import named, read_json, refuse_link, shown
from qtool.convert.files.shard_header import INDEX
from qtool.convert.files.small_floats import without_small_floats
from qtool.convert.files.source import SHIPPED, asking_the_hub, name_of, shipped
from qtool.convert.files.tensor_info import TensorInfo
from qtool.convert.files.wrapped_tensors import text_names
from qtool.convert.files.wrappers import text_part
from qtool.convert.formats.gguf.imatrix import IMATRIX
from qtool.convert.models.fused import each_alone, open_model
from qtool.convert.models.geometry import Geometry
from qtool.convert.models.refusals import check_sizes
from qtool.convert.models.shape import decoder_of, read_geometry, tensor_shapes
from qtool.convert.models.table import FAMILIES, find_family, names_of
from qtool.convert.models.tied import check_folder


@dataclass(frozen=True)
class Headers:
    """``tensors``: as stored. ``gguf``: the .gguf file, where the folder holds one. ``assumed``: what was not found and
    what was taken instead. ``place``: the model as it was typed, for commands typed in the same folder, with its
    ``revision`` on the Hub."""

    name: str
    config: Mapping[str, Any]
    geometry: Geometry
    tensors: Mapping[str, TensorInfo]
    gguf: Path | None = None
    assumed: tuple[str, ...] = ()
    place: str = ""
    revision: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether the weights are an artifact's, not a source's."""
        return self.gguf is not None or bool(self.config.get("quantization_config"))


def read_headers(model: str, revision: str | None = None) -> Headers:
    """``model``: a folder, a config.json, a shipped name or a Hub id. Raises QtoolError: exit 2 for what is not there
    or is no model, exit 3 where the Hub cannot be reached."""
    if model in SHIPPED:
        return replace(_local(shipped(model), model), place=str(shipped(model)))
    path = named(model)
    if os.path.isdir(path):  # False for a name that no file can have
        return replace(_local(path, name_of(path)), place=str(path) if model.startswith("~") else model)
    if os.path.exists(path):
        if path.suffix == ".gguf":
            return _gguf(path)
        if path.suffix != ".json":
            raise QtoolError(
                f"{path}: name a model's folder, its config.json, a .gguf file beside one, a recipe (.yaml), a Hub id."
            )
        config = without_small_floats(text_part(check_config(read_json(path), str(path))))
        return replace(_from_config(config, name_of(path.parent), str(path)), place=str(path.parent))
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise QtoolError(f"{shown(model)}: no such folder or file, and not a Hub id (org/name).")
    return replace(_hub(model, revision), place=model, revision=revision)


def _local(path: Path, name: str) -> Headers:
    where = str(path / CONFIG)
    if not (path / CONFIG).exists():
        raise QtoolError(f"{where}: no such file. {why_no_model(path)}")
    config = without_small_floats(read_config(path))
    found = [file for file in sorted(path.glob("*.gguf")) if file.name != IMATRIX]
    if found:
        refuse_link(path, found[0])
        geometry = read_geometry(config, where)
        return Headers(name, config, geometry, {}, found[0], geometry.assumed)
    if any(path.glob("*.safetensors")) or (path / INDEX).exists():
        geometry = read_geometry(config, where)
        checkpoint = open_model(path)
        if "quantization_config" not in config:  # packed tensors have other shapes; verify knows them
            check_sizes(checkpoint, config)
            if find_family(config) is not None:
                checkpoint.check_shapes(tensor_shapes(config))
        check_folder(path)
        return Headers(name, config, geometry, _served(checkpoint.tensors, config), assumed=geometry.assumed)
    return _from_config(config, name, where)


def _gguf(path: Path) -> Headers:
    """One .gguf file, whose folder has the config.json that goes with it."""
    if not (path.parent / CONFIG).is_file():
        command = shlex.join(["llama-server", "-m", str(path)])
        raise QtoolError(
            f"{path}: its folder has no {CONFIG}, from which the model's shape is read. Put the source's there. To "
            f"serve the file: {command}"
        )
    config = read_json(path.parent / CONFIG)
    geometry = read_geometry(config, str(path.parent / CONFIG))
    return Headers(path.parent.resolve().name, config, geometry, {}, path, geometry.assumed, str(path.parent))


def _from_config(config: Mapping[str, Any], name: str, where: str) -> Headers:
    geometry = read_geometry(config, where)
    dtype = getattr(torch, geometry.dtype)
    said = "no weights are here: every tensor's shape follows from config.json, its dtype is"
    if find_family(config) is not None:
        shapes = tensor_shapes(config)
    else:
        shapes = _skeleton_shapes(config, where)
        said = "no weights are here: shapes are those of transformers' own model class, the dtype is"
    tensors = {tensor: TensorInfo(Path(), dtype, shape) for tensor, shape in shapes.items()}
    return Headers(name, config, geometry, tensors, assumed=(*geometry.assumed, f"{said} {geometry.dtype}"))


def _skeleton_shapes(config: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    from transformers import AutoConfig

    from qtool.convert.skeleton import build_skeleton, expected_shapes

    try:
        built = AutoConfig.for_model(**config)
        shapes, tied = expected_shapes(build_skeleton(built))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QtoolError(
            f"{where}: architecture {names_of(config)} is neither known to qtool ({', '.join(FAMILIES)}) nor to "
            "transformers, and its weights are not here. Name the folder with its weights, or its Hub id."
        ) from error
    return {name: shape for name, shape in shapes.items() if name not in tied}


def _hub(model: str, revision: str | None) -> Headers:
    """config.json and each shard's first bytes, by HTTP range requests."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    name = model.split("/")[-1]
    offline = "Plan from the folder, or from its config.json alone: `qtool plan path/to/config.json`."
    with asking_the_hub(model, revision, offline):
        stored = check_config(read_json(Path(hf_hub_download(model, CONFIG, revision=revision))), f"{model}/{CONFIG}")
        read = text_part(stored)
        config = without_small_floats(read)
        try:
            metadata = HfApi().get_safetensors_metadata(model, revision=revision)
        except NotASafetensorsRepoError:
            return _from_config(config, name, f"{model}/{CONFIG}")
    tensors = {}
    for shard, header in metadata.files_metadata.items():
        for tensor, info in header.tensors.items():
            if info.dtype not in DTYPES:
                raise QtoolError(f"{model}: {tensor} is stored as {info.dtype}; qtool plans from FP16, BF16 or FP32.")
            if not tensor.endswith(COMPUTED):
                tensors[tensor] = TensorInfo(Path(shard), DTYPES[info.dtype], tuple(info.shape))
    geometry = read_geometry(config, f"{model}/{CONFIG}")
    alone = each_alone(in_16_bits(text_names(tensors, stored), read), config)
    return Headers(name, config, geometry, _served(alone, config), assumed=geometry.assumed)


def _served(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Without layers beyond the last, which no engine loads that is not told to guess tokens."""
    family = find_family(config)
    if family is None or not family.drafts:
        return dict(tensors)
    decoder = decoder_of(config)
    return {name: info for name, info in tensors.items() if not decoder.is_draft(name)}
