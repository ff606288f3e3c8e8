"""A job: a recipe whose source was opened and checked, the plan of each output, and the key that names its bytes."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.artifact import PARTIAL
from qtool.convert.checkpoint import Checkpoint
from qtool.convert.ggml import FLOATS, load_gguf
from qtool.convert.gguf_plan import plan_gguf
from qtool.convert.plan import OutputPlan, plan_output
from qtool.convert.reading import read_json
from qtool.convert.skeleton import build_skeleton, expected_shapes, load_config
from qtool.convert.source import ModelSource, sha256_file
from qtool.quantize.architectures import Architecture, architecture_of
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.ggml import load_library, quantizer_package
from qtool.quantize.methods import GgufMethod, Method, Nf4Method, needs_calibration, weights_per_scale
from qtool.quantize.nf4 import load_bitsandbytes
from qtool.quantize.precision import fast_bfloat16
from qtool.recipe import Recipe, digest_of

PACKAGES: tuple[str, ...] = ("qtool-llm", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Job:
    """A source model, opened and checked, with what every stage needs of it."""

    recipe: Recipe
    source: ModelSource
    checkpoint: Checkpoint
    config: Any
    architecture: Architecture
    plans: Mapping[str, OutputPlan]
    device: torch.device

    def folder(self, method: Method) -> Path:
        """Where an output's artifact goes."""
        return Path(self.recipe.output_dir).expanduser() / f"{self.source.name}-{method.name}"

    def partial(self, method: Method) -> Path:
        """Where it grows."""
        folder = self.folder(method)
        return folder.with_name(folder.name + PARTIAL)


def open_job(recipe: Recipe, source: ModelSource, device: torch.device, outputs: Sequence[Method]) -> Job:
    """Validate everything that can be validated without reading a weight. Raises QtoolError."""
    trusted = recipe.model.trust_remote_code
    checkpoint = Checkpoint.open(source.path)
    config = load_config(source.path, trusted)
    architecture = architecture_of(config)
    shapes, tied = expected_shapes(build_skeleton(config, trusted))
    checkpoint.check_shapes(shapes, tied)
    strangers = [name for name in checkpoint.tensors if name.startswith(architecture.prefix) and name not in shapes]
    if strangers:  # the walk would leave them unwritten
        raise QtoolError(
            f"{checkpoint.tensors[strangers[0]].file}: holds {strangers[0]} ({len(strangers)} such), which config.json "
            "does not imply. Weights and config.json are not of one model."
        )
    if any(isinstance(method, Nf4Method) for method in outputs):
        load_bitsandbytes()  # said now, not after hours
    plans = {method.name: _plan(method, checkpoint, architecture, device) for method in outputs}
    return Job(recipe, source, checkpoint, config, architecture, plans, device)


def _plan(method: Method, checkpoint: Checkpoint, architecture: Architecture, device: torch.device) -> OutputPlan:
    if isinstance(method, GgufMethod):
        load_gguf()  # said now, not after hours
        if method.type not in FLOATS and device.type == "cpu":
            load_library()
        config = read_json(checkpoint.path / "config.json")
        return plan_gguf(checkpoint.tensors, architecture.prefix, architecture.linears, config, method.type)
    return plan_output(
        checkpoint.tensors,
        architecture.prefix,
        architecture.linears,
        method.quantization_config(),
        method.stored_dtype,
        weights_per_scale(method),
    )


def versions(method: Method | None = None) -> dict[str, str]:
    """Of the packages that decide the bytes (of ``method``'s output)."""
    names = PACKAGES
    if isinstance(method, Nf4Method):
        names = (*names, "bitsandbytes")
    elif isinstance(method, GgufMethod):
        names = (*names, "gguf", *quantizer_package())
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def artifact_key(job: Job, method: Method, calibration: CalibrationSet) -> str:
    """Same key, same bytes: source commit, calibration tokens (where they matter), the output's section and the
    importance matrix that it names, device kind, versions. Raises QtoolError where that file cannot be read."""
    made_from: dict[str, Any] = {
        "source": job.source.commit,
        "calibration": calibration.digest if needs_calibration(method) else None,
        "output": method.model_dump(mode="json"),
        "container": method.quantization_config(),
        "device": device_kind(job.device),
        "versions": versions(method),
    }
    if job.recipe.model.trust_remote_code:
        made_from["code"] = True  # the model's own *.py files are carried along
    if isinstance(method, GgufMethod) and isinstance(method.imatrix, str):
        path = Path(method.imatrix).expanduser()
        try:
            made_from["imatrix"] = sha256_file(path)
        except OSError as error:
            raise QtoolError(f"{path}: {error.strerror} (`imatrix:` of output {method.name!r}).") from error
    return digest_of(made_from)


def device_kind(device: torch.device) -> str:
    """The accelerator's name, or `cpu` and whether it has bfloat16 products: what calibration's numbers depend on."""
    if device.type == "cpu":
        return "cpu, bfloat16" if fast_bfloat16() else "cpu"
    return torch.cuda.get_device_name(device)
