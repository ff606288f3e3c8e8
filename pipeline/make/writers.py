"""One output on its way to disk in safetensors shards, a layer at a time; and the manifest of any output."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.files.artifact import EXTRAS, FOLD_SCALES, copy_sidecars, file_entries, seal, write_config
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.licence import read_licence
from qtool.convert.files.manifest import Manifest
from qtool.convert.files.writer import ShardWriter, Spec
from qtool.convert.formats.containers import Linears, container_of
from qtool.convert.runtimes import vllm as vllm_rules
from qtool.make.job import Job, device_kind, versions
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.folding import LayerOutput
from qtool.quantize.methods.sections import AwqMethod, GptqMethod, Method, Nf4Method, needs_calibration


class SafetensorsOutput:
    """One output on disk: its weights, its fold scales, its journal, and finally its manifest."""

    def __init__(self, job: Job, method: AwqMethod | GptqMethod | Nf4Method, key: str) -> None:
        self.job, self.method, self.key = job, method, key
        self.plan = job.plans[method.name]
        self.section = method.quantization_config()
        self.container = container_of(self.section)
        self.partial = job.partial(method)
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
            if self.job.decoder.layer_of(name) is None:
                self.weights.write(name, stored(name, self.job.checkpoint.tensor(name), dtype))

    def write_layer(self, index: int, output: LayerOutput) -> None:
        """Write, make durable, read back and compare bit for bit, then note the layer as done."""
        prefix = self.job.decoder.at(index)
        for name, tensor in output.tensors.items():
            self.weights.write(prefix + name, stored(prefix + name, tensor, self.plan.specs[prefix + name][0]))
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
        prefix = self.job.decoder.at(index)
        linears = [name for name in self.linears.names() if name.startswith(prefix)]
        parts = {f"{linear}.{suffix}" for linear in linears for suffix in self.linears.parts(linear)}
        state = {f"{linear}.weight": self.linears.codes(linear).dequantize() for linear in linears}
        others = [name for name in self.plan.specs if name.startswith(prefix) and name not in parts]
        state |= {name: self.written.tensor(name) for name in others}
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    def release(self) -> None:
        """Close what is open, finished or not."""
        for writer in (self.weights, self.scales):
            if writer is not None:
                writer.release()

    def seal(self, calibration: CalibrationSet) -> None:
        """Close the files, carry the sidecars along, describe everything in the manifest, rename."""
        self.weights.close()
        if self.scales is not None:
            self.scales.close()
        job, method = self.job, self.method
        copy_sidecars(job.source.path, self.partial, job.recipe.model.trust_remote_code)
        write_config(job.source.path, self.partial, self.section, method.stored_dtype)
        ledger = {linear: record for step in self.weights.steps for linear, record in step["records"].items()}
        notes = vllm_rules.notes(self.section)
        manifest = manifest_of(job, method, self.key, calibration, ledger, self.partial, notes)
        seal(self.partial, job.folder(method), manifest, job.require_unchanged)


def manifest_of(
    job: Job,
    method: Method,
    key: str,
    calibration: CalibrationSet,
    ledger: dict[str, dict[str, float]],
    folder: Path,
    notes: Sequence[str] = (),
) -> Manifest:
    """What `qtool.json` says of the files in ``folder``."""
    plan = job.plans[method.name]
    used = job.recipe.calibration.model_dump(mode="json") | {"digest": calibration.digest}
    return Manifest(
        qtool=version("qtool-llm"),
        key=key,
        output=method.model_dump(mode="json"),
        source={"model": job.recipe.model.id, "name": job.source.name, "commit": job.source.commit}
        | read_licence(job.source.path),
        calibration=used if needs_calibration(method) else {},
        device=device_kind(job.device),
        versions=versions(method, job.device),
        parameters=plan.parameters,
        tensor_bytes=plan.nbytes,
        bits_per_weight=round(plan.bits_per_weight, 4),
        ledger=ledger,
        files=file_entries(folder),
        notes=[*job.notes, *notes],
    )


def stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast to the stored dtype. Raises QtoolError naming a tensor that it cannot hold."""
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        why = (
            "holds NaN or Inf" if not bool(tensor.isfinite().all()) else f"does not fit {dtype}; set `dtype: bfloat16`"
        )
        raise QtoolError(f"{name}: {why}.")
    return cast
