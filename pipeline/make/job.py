"""A job: a recipe whose source was opened and checked, its outputs as planned, and the keys that name their bytes."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import CONFIG, read_config, read_stored_config
from qtool.convert.files.decoded import in_16_bits
from qtool.convert.files.diagnosis import refuse_quantized, why_no_model
from qtool.convert.files.reading import named, shown
from qtool.convert.files.sidecars import check_sidecars, left_out
from qtool.convert.files.small_floats import small_floats_of, without_small_floats
from qtool.convert.files.source import ModelSource
from qtool.convert.files.watch import require_unchanged
from qtool.convert.files.wrapped_tensors import text_names
from qtool.convert.formats.format import ModelFiles
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.fused import each_alone
from qtool.convert.models.refusals import check_sizes, refuse_architecture
from qtool.convert.models.shape import Decoder, decoder_of
from qtool.convert.models.tied import check_head
from qtool.convert.skeleton import build_skeleton, file_shapes, load_config
from qtool.make.output import Output, plan_output
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.method import Method
from qtool.quantize.precision import fast_bfloat16
from qtool.recipe.checking import digest_of
from qtool.recipe.sections import Recipe

PARTS = ("model.", "lm_head.")  # of every model; what stands elsewhere is a value head, a draft head, a tower
THREADS = "threads"  # among a manifest's versions
PACKAGES: tuple[str, ...] = ("qtool-llm", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Job:
    """A source model, opened and checked, and the outputs to make of it."""

    recipe: Recipe
    source: ModelSource
    checkpoint: Checkpoint
    config: Any
    decoder: Decoder
    outputs: tuple[Output, ...]
    device: torch.device
    notes: tuple[str, ...] = ()  # tensors of the source that go into no artifact
    behind: tuple[str, ...] = ()  # names of files that do not; not for artifacts, which may be published

    @property
    def remarks(self) -> list[str]:
        """What of the source's folder no artifact carries."""
        more = f" and {len(self.behind) - 5} more" if len(self.behind) > 5 else ""
        names = ", ".join(map(shown, self.behind[:5]))
        files = [f"files that stay behind, no part of the model: {names}{more}"] if self.behind else []
        return [*self.notes, *files]

    @property
    def files(self) -> ModelFiles:
        """Of the source, for what a container says beside the tensors."""
        return _files(self.source, self.recipe)

    def output(self, name: str) -> Output:
        """The output of that name."""
        return next(output for output in self.outputs if output.name == name)

    def require_unchanged(self) -> None:
        """Raises QtoolError naming a file that is no longer what the outputs' keys were made of."""
        self.source.require_unchanged()
        require_unchanged([output.imatrix for output in self.outputs if output.imatrix])


def open_job(recipe: Recipe, source: ModelSource, device: torch.device, methods: Sequence[Method]) -> Job:
    """Validate everything that can be validated without reading a weight. Raises QtoolError."""
    trusted = recipe.model.trust_remote_code
    checkpoint = open_source(source.path)
    check_sidecars(source.path, trusted)
    config = load_config(source.path, trusted)
    decoder = decoder_of(read_config(source.path))
    skeleton = build_skeleton(config, trusted)
    shapes, tied = file_shapes(skeleton, decoder)
    check_head(checkpoint, bool(tied))
    checkpoint.check_shapes(shapes, tied)
    unknown = [name for name in checkpoint.tensors if name not in shapes]
    checkpoint.refuse_strangers([n for n in unknown if n.startswith(PARTS) and not decoder.is_draft(n)])
    said = f"left out, no part of {config.architectures[0]}: {', '.join(unknown[:3])} ({len(unknown)} tensors)"
    checkpoint = checkpoint.without(unknown)
    checkpoint.check_dtypes()
    for method in methods:
        method.require(device)  # said now, not after hours
    raw = read_config(source.path)
    shape = ModelShape(checkpoint.tensors, decoder, raw)
    made = named(recipe.output_dir)
    files = _files(source, recipe)
    outputs = tuple(plan_output(method, shape, made / f"{source.name}-{method.name}", files) for method in methods)
    for container in {type(output.container): output.container for output in outputs}.values():
        container.prove(skeleton, raw)
    notes = ((said,) if unknown else ()) + (
        (f"the source is stored in fewer bits ({stored}): read in 16 bits, and errors are against what is read",)
        if (stored := small_floats_of(raw))
        else ()
    )
    return Job(recipe, source, checkpoint, config, decoder, outputs, device, notes,
               tuple(left_out(source.path, trusted)))  # fmt: skip


def _files(source: ModelSource, recipe: Recipe) -> ModelFiles:
    return ModelFiles(source.path, source.name, read_config(source.path), recipe.model.trust_remote_code)


def open_source(folder: Path) -> Checkpoint:
    """The unquantized model in a folder. Every cheap look comes before a model is built, the sizes of config.json
    against the shards' headers among them. Raises QtoolError saying what the folder holds instead."""
    if not folder.is_dir() or not (folder / CONFIG).exists():
        raise QtoolError(why_no_model(folder) if folder.is_dir() else f"{folder}: no such folder.")
    said = read_config(folder)
    raw = without_small_floats(said)
    refuse_quantized(folder, raw, ())
    checkpoint = Checkpoint.open(folder)
    named = text_names(checkpoint.tensors, read_stored_config(folder))
    checkpoint = checkpoint.holding(in_16_bits(named, said))
    refuse_quantized(folder, raw, checkpoint.tensors)
    refuse_architecture(folder, raw)
    check_sizes(checkpoint, raw)
    return checkpoint.holding(each_alone(checkpoint.tensors, raw))


def versions(method: Method | None = None, device: torch.device | None = None) -> dict[str, str]:
    """Of the packages that decide the bytes (of ``method``'s output); made on ``device``, the threads that do."""
    names = PACKAGES + (method.packages if method else ())
    threads = {THREADS: str(torch.get_num_threads())} if method and device and threads_matter(device, method) else {}
    return {"python": platform.python_version()} | {name: version(name) for name in names} | threads


def artifact_key(job: Job, output: Output, calibration: CalibrationSet, threads: int | None = None) -> str:
    """Two artifacts of the same key have the same bytes.

    In the key: the source's commit, the calibration tokens where they matter, the output's section, the importance
    matrix that it names, the kind of device, the versions. ``threads`` (None: as many as torch uses now) is in it where
    they matter: sums of calibration are cut into as many parts.
    """
    return keys_by_threads(job, output, calibration, [threads or torch.get_num_threads()])[0]


def keys_by_threads(job: Job, output: Output, calibration: CalibrationSet, threads: Sequence[int]) -> list[str]:
    """`artifact_key` for each of these numbers; one key alone where the number does not matter."""
    method = output.method
    made_from: dict[str, Any] = {
        "source": job.source.commit,
        "calibration": calibration.digest if method.calibrated else None,
        "output": method.model_dump(mode="json"),
        "container": output.container.section,
        "device": device_kind(job.device),
        "versions": versions(method),
    }
    if job.decoder.shape.experts and method.calibrated:
        made_from["experts"] = job.recipe.experts.model_dump(mode="json")
    if job.recipe.model.trust_remote_code:
        made_from["code"] = True  # the model's own *.py files are carried along
    if output.imatrix is not None:
        made_from["imatrix"] = output.imatrix.digest
    if not threads_matter(job.device, method):
        return [digest_of(made_from)]
    return [digest_of(made_from | {THREADS: number}) for number in threads]


def threads_matter(device: torch.device, method: Method) -> bool:
    """Whether the number of threads decides bytes: a processor's matrix products are summed in as many parts. Without
    calibration every row is rounded by itself; an accelerator sums in its own order."""
    return device.type == "cpu" and method.calibrated


def device_kind(device: torch.device) -> str:
    """The accelerator's name, or `cpu` and whether it has bfloat16 products: what calibration's numbers depend on."""
    if device.type == "cpu":
        return "cpu, bfloat16" if fast_bfloat16() else "cpu"
    return torch.cuda.get_device_name(device)
