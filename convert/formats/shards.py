"""Safetensors files as a format, whatever container their quantized linears lie in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.shards import file_sizes, open_shards
from qtool.convert.files.writer import Spec, nbytes
from qtool.convert.formats.apart import Apart, find_apart, require_alike
from qtool.convert.formats.codes import CPU, Codes
from qtool.convert.formats.format import CalibrationText, ModelFiles, TokenQuestion
from qtool.convert.formats.linears import Linears
from qtool.convert.formats.plan import LinearPlan, ModelShape, OutputPlan, walk_order
from qtool.convert.formats.table import Container, container_of, geometry_of, of_model
from qtool.convert.models.shape import Decoder
from qtool.convert.runtimes import vllm

GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Shards:
    """``section``: quantization_config, whose `quant_method` names the container; ``dtype``: of what is not quantized
    (None: each tensor keeps its own); ``group_size``: weights to a scale, -1 for whole rows; ``asked``: what the output
    wants otherwise of some linears, as `find_apart` takes it; ``apart``: which these are, once the model is known."""

    section: dict[str, Any]
    dtype: torch.dtype | None
    group_size: int
    asked: Mapping[str, Any] = field(default_factory=dict)
    apart: Apart = field(default_factory=dict)

    @cached_property
    def container(self) -> Container:
        """How a linear lies in the files."""
        return container_of(self.section)

    @property
    def config_section(self) -> dict[str, Any]:
        """All that a reader has."""
        return self.section

    @property
    def copies(self) -> tuple[str, ...]:
        """As the container says."""
        return self.container.COPIES

    @property
    def group(self) -> int:
        """Columns of a row to a scale, 1 where scales do not follow columns."""
        return self.group_size if self.container.BY_ROW else 1

    @property
    def expands(self) -> bool:
        """As the container says."""
        return self.container.EXPANDS

    @property
    def proves_tokens(self) -> bool:
        """A reader takes the tokenizer's own files."""
        return False

    def of_model(self, decoder: Decoder) -> Shards:
        """As the container says it. Raises QtoolError where that holds no experts, and for linears that cannot be
        stored as asked."""
        section, apart = section_for(self.section, self.asked, decoder)
        return replace(self, section=section, apart=apart)

    def plan(self, shape: ModelShape) -> OutputPlan:
        """Raises QtoolError naming the linears whose columns the group size does not divide, and the sizes that fit."""
        specs: dict[str, Spec] = {}
        plans: list[LinearPlan] = []
        plain: list[LinearPlan] = []
        held, casts = shape.decoder.held(), shape.decoder.family.casts
        for name in walk_order(shape.tensors, shape.decoder):
            info = shape.tensors[name]
            stored = self.dtype or info.dtype
            if name not in held:
                specs[name] = (stored if casts(name) else info.dtype, info.shape)
            for module, matrix in held.get(name, ()):
                out, columns = matrix.shape(info.shape)
                if self.apart.get(module, {}) is None:
                    specs[f"{module}.weight"] = spec = (stored, (out, columns))
                    plain.append(LinearPlan(module, out, columns, 1, nbytes(spec)))
                    continue
                plan, packed = self._planned(module, out, columns, stored)
                plans.append(plan)
                specs |= {f"{module}.{suffix}": spec for suffix, spec in packed.items()}
        unfit = [plan for plan in plans if plan.nbytes < 0]
        if unfit:
            multiples = self.container.multiples(self.container.own(self.section, unfit[0].name))
            raise QtoolError(_why_unfit(unfit, plans, *multiples))
        parameters = sum(info.nbytes // info.dtype.itemsize for info in shape.tensors.values())
        total = sum(nbytes(spec) for spec in specs.values())
        return OutputPlan(specs, plans, parameters, total, plain=plain)

    def _planned(self, module: str, out: int, columns: int, stored: torch.dtype) -> tuple[LinearPlan, dict[str, Spec]]:
        """A linear and its tensors' specs by suffix; -1 bytes and none where it does not fit."""
        container, section = self.container, self.container.own(self.section, module)
        own = self.apart.get(module) or {}
        size, bits = own.get("group_size", self.group_size), geometry_of(section)["bits"]
        size = columns if size == -1 else size
        rows_multiple, columns_multiple = container.multiples(section)
        in_groups = not container.BY_ROW or columns % size == 0
        if not in_groups or out % rows_multiple or columns % columns_multiple:
            return LinearPlan(module, out, columns, size, -1, bits=bits), {}
        packed = container.specs(out, columns, section, stored)
        return LinearPlan(module, out, columns, size, sum(map(nbytes, packed.values())), bits=bits), packed

    def prove(self, skeleton: Any, config: Mapping[str, Any]) -> None:
        """config.json is copied: readers follow it themselves."""

    def open(self, folder: Path, plan: OutputPlan, key: str, source: ModelFiles) -> ShardTensors:
        """The files in ``folder``."""
        return ShardTensors(self, folder, plan, key)

    def file_bytes(self, plan: OutputPlan) -> int:
        """Headers included."""
        return sum(file_sizes(plan.specs).values())

    def header_bytes(self, plan: OutputPlan, source: ModelFiles) -> int:
        """The shards' headers."""
        return self.file_bytes(plan) - plan.nbytes

    def beside_bytes(self, kept: int) -> int:
        """Nothing is written beside the tensors."""
        return 0

    def notes(self) -> list[str]:
        """What runtimes refuse, or need beside themselves."""
        found: list[str] = []
        for runtime in self.container.RUNS_IN:
            found += [f"{runtime.title} does not load it: {reason}" for reason in runtime.refuses(self.section)]
            found += [runtime.note] if runtime.note else []
        return found

    def importance(self, path: Path, plan: OutputPlan) -> dict[str, torch.Tensor]:
        """Raises QtoolError: importance matrices name the tensors of .gguf files."""
        raise QtoolError(f"{path}: an importance matrix weighs the tensors of .gguf files alone.")


class ShardTensors:
    """The tensors of one output on their way into ``folder``."""

    question: TokenQuestion | None = None  # a reader takes the tokenizer's own files

    def __init__(self, form: Shards, folder: Path, plan: OutputPlan, key: str) -> None:
        self.place, self._form, self._plan = folder, form, plan
        self._writer = open_shards(folder, plan.specs, key)
        self._written = Checkpoint.open(folder)
        self._linears = Linears(self._written, form.section)
        self.commit, self.close = self._writer.commit, self._writer.close
        self.wait, self.release = self._writer.wait, self._writer.release

    @property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        """The finished steps."""
        return self._writer.steps

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """In the stored dtype. Raises QtoolError where it cannot hold the tensor."""
        self._writer.write(name, stored(name, tensor, self._plan.specs[name][0]))

    def write_codes(self, matrix: str, codes: Codes) -> None:
        """As the container packs them."""
        container = self._form.container
        for suffix, tensor in container.pack(codes, container.own(self._form.section, matrix)).items():
            self._writer.write(f"{matrix}.{suffix}", tensor)

    def codes(self, matrix: str, device: torch.device = CPU) -> Codes:
        """Read back."""
        return self._linears.codes(matrix, device)

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """Names without ``prefix``; matrices dequantized."""
        linears = [name for name in self._linears.names() if name.startswith(prefix)]
        parts = {f"{linear}.{suffix}" for linear in linears for suffix in self._linears.parts(linear)}
        state = {f"{linear}.weight": self._linears.codes(linear).dequantize() for linear in linears}
        others = [name for name in self._plan.specs if name.startswith(prefix) and name not in parts]
        state |= {name: self._written.tensor(name) for name in others}
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    def finish(self, proof: str, kept: Checkpoint | None, text: CalibrationText) -> list[str]:
        """config.json and the tokenizer say the rest."""
        return []


def stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast to the stored dtype. Raises QtoolError naming a tensor that it cannot hold."""
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        why = (
            "holds NaN or Inf" if not bool(tensor.isfinite().all()) else f"does not fit {dtype}; set `dtype: bfloat16`"
        )
        raise QtoolError(f"{name}: {why}.")
    return cast


def section_for(section: Mapping[str, Any], asked: Mapping[str, Any], decoder: Decoder) -> tuple[dict[str, Any], Apart]:
    """(``section`` as it is for a model, which of its linears are stored otherwise). ``asked``: as `find_apart` takes
    it. Raises QtoolError where the container holds no experts, or some linears cannot be stored as asked."""
    container = container_of(section)
    section = of_model(container, section, decoder)
    linears = [module for held in decoder.held().values() for module, _ in held]
    usual = container.geometry(section)
    apart = {
        linear: own and {key: value for key, value in own.items() if value != usual.get(key)}
        for linear, own in find_apart(asked, linears).items()
    }
    apart = {linear: own for linear, own in apart.items() if own is None or own}
    if not apart:
        return section, {}
    together: dict[str, list[str]] = {}
    for linear in linears:
        together.setdefault(vllm.joined(linear) or linear, []).append(linear)
    require_alike(apart, together.values(), "vLLM holds them in one matrix, which is of one kind")
    return container.with_apart(section, apart, linears), apart


def _why_unfit(unfit: list[LinearPlan], plans: list[LinearPlan], rows_multiple: int, columns_multiple: int) -> str:
    group_size = unfit[0].group_size
    for plan in unfit:
        if plan.out % rows_multiple:
            return f"{plan.name} has {plan.out} rows; this format packs rows in groups of {rows_multiple}."
        if plan.columns % columns_multiple:
            return f"{plan.name} has {plan.columns} columns; this format packs columns in groups of {columns_multiple}."
    fitting = [size for size in GROUP_SIZES if all(plan.columns % size == 0 for plan in plans)]
    kinds: dict[tuple[str, int], list[str]] = {}
    for plan in unfit:
        kinds.setdefault((plan.name.rsplit(".", 1)[-1], plan.columns), []).append(plan.name)
    listed = "; ".join(
        f"{kind} ({columns} columns, {len(names)} layers, first {names[0]})" for (kind, columns), names in kinds.items()
    )
    advice = f"Sizes that fit every linear: {', '.join(map(str, fitting))}." if fitting else "No group size fits."
    return f"group_size: {group_size} does not divide the inputs of {listed}. {advice}"
