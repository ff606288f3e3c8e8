"""What an output will be, tensor by tensor, from shapes alone: names, dtypes, bytes, bits per weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import TensorInfo
from qtool.convert.files.writer import Spec, nbytes
from qtool.convert.formats.containers import Section, container_of
from qtool.convert.models.shape import Decoder

GROUP_SIZES = (128, 64, 32)
QUANTIZED_SHARE = 0.99  # of the weights that are to be quantized


@dataclass(frozen=True)
class LinearPlan:
    """One quantized linear: shape ``[out, in]``, its group size, the bytes it will take and, in GGUF, its type."""

    name: str
    out: int
    columns: int
    group_size: int
    nbytes: int
    type: str = ""


@dataclass(frozen=True)
class OutputPlan:
    """``specs``: every tensor of the artifact in walk order. ``parameters``: weights of the source model."""

    specs: dict[str, Spec]
    linears: list[LinearPlan]
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of all stored tensors over the source's parameters."""
        return 8 * self.nbytes / self.parameters


def plan_output(
    tensors: Mapping[str, TensorInfo],
    decoder: Decoder,
    section: Section,
    dtype: torch.dtype | None,
    group_size: int,
) -> OutputPlan:
    """Every layer's matrices go into the container that ``section`` speaks of, the rest is stored in ``dtype`` (None:
    each tensor in its own). ``group_size``: weights to a scale, -1 for whole rows.

    Raises QtoolError naming the linears whose columns the group size does not divide, and the sizes that fit.
    """
    container = container_of(section)
    rows_multiple, columns_multiple = container.multiples(section)
    specs: dict[str, Spec] = {}
    plans: list[LinearPlan] = []
    held = decoder.held()
    for name in walk_order(tensors, decoder):
        info = tensors[name]
        stored = dtype or info.dtype
        if name not in held:
            specs[name] = (stored if decoder.family.casts(name) else info.dtype, info.shape)
        for module, matrix in held.get(name, ()):
            out, columns = matrix.shape(info.shape)
            size = columns if group_size == -1 else group_size
            fits = (
                (not container.BY_ROW or columns % size == 0)
                and out % rows_multiple == 0
                and columns % columns_multiple == 0
            )
            packed = container.specs(out, columns, section, stored) if fits else {}
            specs |= {f"{module}.{suffix}": spec for suffix, spec in packed.items()}
            taken = sum(nbytes(spec) for spec in packed.values()) if fits else -1
            plans.append(LinearPlan(module, out, columns, size, taken))
    unfit = [plan for plan in plans if plan.nbytes < 0]
    if unfit:
        raise QtoolError(_why_unfit(unfit, plans, group_size, rows_multiple, columns_multiple))
    parameters = sum(info.nbytes // info.dtype.itemsize for info in tensors.values())
    return OutputPlan(specs, plans, parameters, sum(nbytes(spec) for spec in specs.values()))


def walk_order(tensors: Mapping[str, TensorInfo], decoder: Decoder) -> list[str]:
    """Embeddings, then layer 0, 1, 2 …, then the rest: the order in which tensors are written."""

    def key(name: str) -> tuple[int, int, str]:
        layer = decoder.layer_of(name)
        if layer is not None:
            return 1, layer, name
        return (0 if "embed" in name else 2), 0, name

    return sorted(tensors, key=key)


def _why_unfit(
    unfit: list[LinearPlan], plans: list[LinearPlan], group_size: int, rows_multiple: int, columns_multiple: int
) -> str:
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
