"""From a source checkpoint to sealed artifacts: plan, walk once, write every output, re-read what was written, seal."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qtool import QtoolError
from qtool.convert.artifact import (
    EXTRAS,
    FOLD_SCALES,
    MANIFEST,
    PARTIAL,
    Artifact,
    Manifest,
    copy_sidecars,
    file_entries,
    read_manifest,
    seal,
    write_config,
)
from qtool.convert.checkpoint import Checkpoint
from qtool.convert.containers import Linears, container_of
from qtool.convert.plan import OutputPlan, layer_of, plan_output
from qtool.convert.skeleton import build_skeleton, expected_shapes, load_config
from qtool.convert.source import ModelSource
from qtool.convert.verify import check_files
from qtool.convert.writer import ShardWriter, Spec
from qtool.quantize.architectures import Architecture, architecture_of
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.folding import LayerOutput
from qtool.quantize.layers import Walk
from qtool.quantize.methods import Method, Nf4Method, needs_calibration, weights_per_scale
from qtool.quantize.nf4 import load_bitsandbytes
from qtool.recipe import Recipe, digest_of

PACKAGES = ("qtool-llm", "torch", "transformers", "safetensors")


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


def open_job(recipe: Recipe, source: ModelSource, device: torch.device, outputs: Sequence[Method]) -> Job:
    """Validate everything that can be validated without reading a weight. Raises QtoolError."""
    trusted = recipe.model.trust_remote_code
    checkpoint = Checkpoint.open(source.path)
    config = load_config(source.path, trusted)
    architecture = architecture_of(config)
    shapes, tied = expected_shapes(build_skeleton(config, trusted))
    checkpoint.check_shapes(shapes, tied)
    if any(isinstance(method, Nf4Method) for method in outputs):
        load_bitsandbytes()  # said now, not after hours
    plans = {
        method.name: plan_output(
            checkpoint.tensors,
            architecture.prefix,
            architecture.linears,
            method.quantization_config(),
            method.stored_dtype,
            weights_per_scale(method),
        )
        for method in outputs
    }
    return Job(recipe, source, checkpoint, config, architecture, plans, device)


def versions(method: Method | None = None) -> dict[str, str]:
    """Of the packages that decide the bytes (of ``method``'s output)."""
    names = (*PACKAGES, "bitsandbytes") if isinstance(method, Nf4Method) else PACKAGES
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def artifact_key(job: Job, method: Method, calibration: CalibrationSet) -> str:
    """Same key, same bytes: source commit, calibration tokens (where they matter), the output's section, device kind,
    versions."""
    return digest_of(
        {
            "source": job.source.commit,
            "calibration": calibration.digest if needs_calibration(method) else None,
            "output": method.model_dump(mode="json"),
            "device": device_kind(job.device),
            "versions": versions(method),
        }
    )


def device_kind(device: torch.device) -> str:
    """`cpu`, or the accelerator's name."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def finished(folder: Path, key: str) -> bool:
    """Whether ``folder`` already is this very artifact, unchanged. Raises QtoolError when it is something else."""
    if not folder.exists():
        return False
    if not (folder / MANIFEST).exists():
        raise QtoolError(f"{folder}: exists and was not written by qtool. Move it away, or change `output_dir:`.")
    manifest = read_manifest(folder)
    if manifest.key != key:
        raise QtoolError(
            f"{folder}: holds an artifact of another recipe, source or version of qtool. Move it away, rename this "
            "output (`name:`), or change `output_dir:`."
        )
    _, reasons, _ = check_files(folder, manifest)
    if reasons:
        raise QtoolError(f"{folder}: was finished, but {reasons[0]}. Delete the folder and run again.")
    return True


def make_artifacts(job: Job, methods: Sequence[Method], calibration: CalibrationSet) -> dict[str, Artifact]:
    """Every output as a sealed artifact; those finished before are reused, those begun are continued."""
    keys = {method.name: artifact_key(job, method, calibration) for method in methods}
    pending = [method for method in methods if not finished(job.folder(method), keys[method.name])]
    _check_disk(job, pending)
    writers = {method.name: _OutputWriter(job, method, keys[method.name]) for method in pending}
    if writers:
        _walk(job, pending, writers, calibration)
    for method in pending:
        writers[method.name].seal(calibration)
    return {method.name: Artifact.open(job.folder(method)) for method in methods}


def _walk(
    job: Job, methods: Sequence[Method], writers: Mapping[str, _OutputWriter], calibration: CalibrationSet
) -> None:
    model = build_skeleton(job.config, job.recipe.model.trust_remote_code)
    start = min(writer.layers_done for writer in writers.values())
    walk = Walk(
        model, job.checkpoint, calibration, methods, job.device, lambda name, index: writers[name].restore(index)
    )
    for writer in writers.values():
        writer.write_outside_layers()
    with progress_bar() as bar:
        task = bar.add_task("quantizing layers", total=len(walk.layers), completed=start)
        for result in walk.run(start):
            for name, output in result.outputs.items():
                writers[name].write_layer(result.index, output)
            bar.advance(task)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """The one progress bar: written to stderr, quiet where nobody watches."""
    from rich.console import Console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar


def _check_disk(job: Job, pending: Sequence[Method]) -> None:
    """Refuse to start what the disk cannot hold (space that a begun output reserved already counts as there)."""
    need = sum(job.plans[m.name].nbytes for m in pending if not _partial(job.folder(m)).exists())
    parent = Path(job.recipe.output_dir).expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if need > free:
        raise QtoolError(
            f"{parent}: {need / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free. Free some space, or set `output_dir:`.",
            exit_code=3,
        )


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


class _OutputWriter:
    """One output on disk: its weights, its fold scales, its journal, and finally its manifest."""

    def __init__(self, job: Job, method: Method, key: str) -> None:
        self.job, self.method, self.key = job, method, key
        self.plan = job.plans[method.name]
        self.section = method.quantization_config()
        self.container = container_of(self.section)
        self.partial = _partial(job.folder(method))
        self.weights = ShardWriter(self.partial, self.plan.specs, key)
        self.scales: ShardWriter | None = None
        if not isinstance(method, Nf4Method):
            self.scales = ShardWriter(self.partial / EXTRAS, self._scale_specs(), key, FOLD_SCALES)
        self.written = Checkpoint.open(self.partial)
        self.linears = Linears(self.written, self.section)

    def _scale_specs(self) -> dict[str, Spec]:
        specs: dict[str, Spec] = {}
        for linear in self.plan.linears:
            specs[f"{linear.name}.columns"] = (torch.float32, (linear.columns,))
            specs[f"{linear.name}.rows"] = (torch.float32, (linear.out,))
        return specs

    @property
    def layers_done(self) -> int:
        """Layers whose weights and scales both reached the disk."""
        steps = len(self.weights.steps)
        return steps if self.scales is None else min(steps, len(self.scales.steps))

    def write_outside_layers(self) -> None:
        """Embeddings, final norm and head, in the stored dtype. Raises QtoolError where it cannot hold them."""
        for name, (dtype, _) in self.plan.specs.items():
            if layer_of(name, self.job.architecture.prefix) is None:
                self.weights.write(name, _stored(name, self.job.checkpoint.tensor(name), dtype))

    def write_layer(self, index: int, output: LayerOutput) -> None:
        """Write, make durable, read back and compare bit for bit, then note the layer as done."""
        prefix = f"{self.job.architecture.prefix}{index}."
        for name, tensor in output.tensors.items():
            self.weights.write(prefix + name, _stored(prefix + name, tensor, self.plan.specs[prefix + name][0]))
        for linear, codes in output.codes.items():
            for suffix, tensor in self.container.pack(codes, self.section).items():
                self.weights.write(f"{prefix}{linear}.{suffix}", tensor)
            if self.scales is not None:
                self.scales.write(f"{prefix}{linear}.columns", output.columns[linear])
                self.scales.write(f"{prefix}{linear}.rows", output.rows[linear])
        self.weights.flush()
        for linear, codes in output.codes.items():
            if not self.linears.codes(prefix + linear).equals(codes.cpu()):
                raise QtoolError(f"{self.partial}: {prefix}{linear} does not read back as it was written.", 3)
        records = {prefix + linear: record for linear, record in output.records.items()}
        if self.scales is not None and index >= len(self.scales.steps):
            self.scales.commit({"layer": index})
        if index >= len(self.weights.steps):
            self.weights.commit({"layer": index, "records": records})

    def restore(self, index: int) -> dict[str, torch.Tensor]:
        """A finished layer's state dict, as a reader of the artifact gets it."""
        prefix = f"{self.job.architecture.prefix}{index}."
        linears = [name for name in self.linears.names() if name.startswith(prefix)]
        parts = {f"{linear}.{suffix}" for linear in linears for suffix in self.linears.parts(linear)}
        state = {f"{linear}.weight": self.linears.codes(linear).dequantize() for linear in linears}
        others = [name for name in self.plan.specs if name.startswith(prefix) and name not in parts]
        state |= {name: self.written.tensor(name) for name in others}
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    def seal(self, calibration: CalibrationSet) -> None:
        """Close the files, carry the sidecars along, describe everything in the manifest, rename."""
        self.weights.close()
        if self.scales is not None:
            self.scales.close()
        job, method = self.job, self.method
        copy_sidecars(job.source.path, self.partial, job.recipe.model.trust_remote_code)
        write_config(job.source.path, self.partial, self.section, method.stored_dtype)
        ledger = {linear: record for step in self.weights.steps for linear, record in step["records"].items()}
        used = job.recipe.calibration.model_dump(mode="json") | {"digest": calibration.digest}
        manifest = Manifest(
            qtool=version("qtool-llm"),
            key=self.key,
            output=method.model_dump(mode="json"),
            source={"model": job.recipe.model.id, "name": job.source.name, "commit": job.source.commit},
            calibration=used if needs_calibration(method) else {},
            device=device_kind(job.device),
            versions=versions(method),
            parameters=self.plan.parameters,
            tensor_bytes=self.plan.nbytes,
            bits_per_weight=round(self.plan.bits_per_weight, 4),
            ledger=ledger,
            files=file_entries(self.partial),
        )
        seal(self.partial, job.folder(method), manifest)


def _stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast to the stored dtype. Raises QtoolError naming a tensor that it cannot hold."""
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        why = (
            "holds NaN or Inf" if not bool(tensor.isfinite().all()) else f"does not fit {dtype}; set `dtype: bfloat16`"
        )
        raise QtoolError(f"{name}: {why}.")
    return cast
