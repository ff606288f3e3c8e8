"""A job: a recipe whose source was opened and checked, the plan of each output, and the key that names its bytes."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.artifact import PARTIAL
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.diagnosis import refuse_architecture, refuse_quantized, why_no_model
from qtool.convert.files.reading import named, open_file, shown
from qtool.convert.files.sidecars import check_sidecars, left_out
from qtool.convert.files.source import ModelSource
from qtool.convert.files.watch import Watched, require_unchanged, watch
from qtool.convert.formats.gguf.ggml import FLOATS, load_gguf
from qtool.convert.formats.gguf.imatrix import SIZE_LIMIT
from qtool.convert.formats.gguf.plan import plan_gguf
from qtool.convert.formats.plan import OutputPlan, plan_output
from qtool.convert.models.config_file import CONFIG, read_config
from qtool.convert.models.config_keys import prove_gguf
from qtool.convert.models.shape import Decoder, decoder_of
from qtool.convert.models.tied import check_head
from qtool.convert.skeleton import build_skeleton, expected_shapes, load_config
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.ggml import load_library, quantizer_package
from qtool.quantize.methods.nf4 import load_bitsandbytes
from qtool.quantize.methods.sections import GgufMethod, Method, Nf4Method, needs_calibration, weights_per_scale
from qtool.quantize.precision import fast_bfloat16
from qtool.recipe.sections import Recipe, digest_of

PARTS = ("model.", "lm_head.")  # of every model; what stands elsewhere is a value head, a draft head, a tower
THREADS = "threads"  # among a manifest's versions
PACKAGES: tuple[str, ...] = ("qtool-llm", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Job:
    """A source model, opened and checked, with what every stage needs of it."""

    recipe: Recipe
    source: ModelSource
    checkpoint: Checkpoint
    config: Any
    decoder: Decoder
    plans: Mapping[str, OutputPlan]
    device: torch.device
    notes: tuple[str, ...] = ()  # tensors of the source that go into no artifact
    behind: tuple[str, ...] = ()  # names of files that do not; not for artifacts, which may be published
    matrices: Mapping[str, Watched] = field(default_factory=dict)
    """Output -> the importance matrix that its recipe names."""

    @property
    def remarks(self) -> list[str]:
        """What of the source's folder no artifact carries."""
        more = f" and {len(self.behind) - 5} more" if len(self.behind) > 5 else ""
        names = ", ".join(map(shown, self.behind[:5]))
        files = [f"files that stay behind, no part of the model: {names}{more}"] if self.behind else []
        return [*self.notes, *files]

    def require_unchanged(self) -> None:
        """Raises QtoolError naming a file that is no longer what the outputs' keys were made of."""
        self.source.require_unchanged()
        require_unchanged(list(self.matrices.values()))

    def folder(self, method: Method) -> Path:
        """Where an output's artifact goes."""
        return named(self.recipe.output_dir) / f"{self.source.name}-{method.name}"

    def partial(self, method: Method) -> Path:
        """Where it grows."""
        folder = self.folder(method)
        return folder.with_name(folder.name + PARTIAL)


def open_job(recipe: Recipe, source: ModelSource, device: torch.device, outputs: Sequence[Method]) -> Job:
    """Validate everything that can be validated without reading a weight. Raises QtoolError."""
    trusted = recipe.model.trust_remote_code
    checkpoint = open_source(source.path)
    check_sidecars(source.path, trusted)
    config = load_config(source.path, trusted)
    decoder = decoder_of(read_config(source.path))
    skeleton = build_skeleton(config, trusted)
    shapes, tied = expected_shapes(skeleton)
    check_head(checkpoint, bool(tied))
    checkpoint.check_shapes(shapes, tied)
    unknown = [name for name in checkpoint.tensors if name not in shapes]
    checkpoint.refuse_strangers([name for name in unknown if name.startswith(PARTS)])
    said = f"left out, no part of {config.architectures[0]}: {', '.join(unknown[:3])} ({len(unknown)} tensors)"
    checkpoint = checkpoint.without(unknown)
    checkpoint.check_dtypes()
    if any(isinstance(method, Nf4Method) for method in outputs):
        load_bitsandbytes()  # said now, not after hours
    plans = {method.name: _plan(method, checkpoint, decoder, device) for method in outputs}
    if any(isinstance(method, GgufMethod) for method in outputs):
        prove_gguf(skeleton, read_config(source.path))
    return Job(recipe, source, checkpoint, config, decoder, plans, device, (said,) if unknown else (),
               tuple(left_out(source.path, trusted)), _matrices(outputs))  # fmt: skip


def open_source(folder: Path) -> Checkpoint:
    """The unquantized model in a folder. Every cheap look comes before a model is built, the sizes of config.json
    against the shards' headers among them. Raises QtoolError saying what the folder holds instead."""
    if not folder.is_dir() or not (folder / CONFIG).exists():
        raise QtoolError(why_no_model(folder) if folder.is_dir() else f"{folder}: no such folder.")
    raw = read_config(folder)
    refuse_quantized(folder, raw, ())
    checkpoint = Checkpoint.open(folder)
    refuse_quantized(folder, raw, checkpoint.tensors)
    refuse_architecture(folder, raw)
    checkpoint.check_sizes(raw)
    return checkpoint


def _matrices(outputs: Sequence[Method]) -> dict[str, Watched]:
    found = {}
    for method in outputs:
        if isinstance(method, GgufMethod) and isinstance(method.imatrix, str):
            path = named(method.imatrix)
            try:
                open_file(path, SIZE_LIMIT).close()
                found[method.name] = watch(path)
            except (OSError, QtoolError) as error:
                why = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ").rstrip(".")
                raise QtoolError(f"{path}: {why} (`imatrix:` of output {method.name!r}).") from error
    return found


def _plan(method: Method, checkpoint: Checkpoint, decoder: Decoder, device: torch.device) -> OutputPlan:
    if isinstance(method, GgufMethod):
        load_gguf()  # said now, not after hours
        if method.type not in FLOATS and device.type == "cpu":
            load_library()
        config = read_config(checkpoint.path)
        return plan_gguf(checkpoint.tensors, decoder, config, method.type)
    return plan_output(
        checkpoint.tensors,
        decoder,
        method.quantization_config(),
        method.stored_dtype,
        weights_per_scale(method),
    )


def versions(method: Method | None = None, device: torch.device | None = None) -> dict[str, str]:
    """Of the packages that decide the bytes (of ``method``'s output); made on ``device``, the threads that do."""
    names = PACKAGES
    if isinstance(method, Nf4Method):
        names = (*names, "bitsandbytes")
    elif isinstance(method, GgufMethod):
        names = (*names, "gguf", *quantizer_package())
    threads = {THREADS: str(torch.get_num_threads())} if method and device and threads_matter(device, method) else {}
    return {"python": platform.python_version()} | {name: version(name) for name in names} | threads


def artifact_key(job: Job, method: Method, calibration: CalibrationSet, threads: int | None = None) -> str:
    """Same key, same bytes: source commit, calibration tokens (where they matter), the output's section and the
    importance matrix that it names, device kind, versions, and the number of threads (None: as many as torch uses now)
    where sums of calibration were cut into as many parts."""
    return keys_by_threads(job, method, calibration, [threads or torch.get_num_threads()])[0]


def keys_by_threads(job: Job, method: Method, calibration: CalibrationSet, threads: Sequence[int]) -> list[str]:
    """`artifact_key` for each of these numbers; one key alone where the number does not matter."""
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
    if method.name in job.matrices:
        made_from["imatrix"] = job.matrices[method.name].digest
    if not threads_matter(job.device, method):
        return [digest_of(made_from)]
    return [digest_of(made_from | {THREADS: number}) for number in threads]


def threads_matter(device: torch.device, method: Method) -> bool:
    """Whether the number of threads decides bytes: a processor's matrix products are summed in as many parts. Without
    calibration every row is rounded by itself; an accelerator sums in its own order."""
    return device.type == "cpu" and needs_calibration(method)


def device_kind(device: torch.device) -> str:
    """The accelerator's name, or `cpu` and whether it has bfloat16 products: what calibration's numbers depend on."""
    if device.type == "cpu":
        return "cpu, bfloat16" if fast_bfloat16() else "cpu"
    return torch.cuda.get_device_name(device)
