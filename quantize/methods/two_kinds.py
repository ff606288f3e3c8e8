"""Budgets of containers that hold codes of one kind: a linear takes them, or it stays in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool import QtoolError
from qtool.convert.formats.plan import ModelShape
from qtool.quantize.methods.budget import Budget
from qtool.quantize.methods.method import Method

FOUR, WHOLE = "4 bits", "16 bits"


def require_one_rule(method: Method, budget: Budget | None) -> None:
    """Raises ValueError where a section says both what stays in 16 bits and how large the file may be."""
    if budget is not None and method.ignore:
        raise ValueError("`ignore` and `budget` both say how linears are stored; leave one out")


def offers_of(method: Method, shape: ModelShape) -> dict[str, dict[str, int]]:
    """As `Method.offers`. ``method``: without a budget."""
    plan = method.container.of_model(shape.decoder).plan(shape)
    return {one.name: {FOUR: one.nbytes, WHOLE: 2 * one.out * one.columns} for one in plan.linears}


def changes_of(mix: Mapping[str, str]) -> dict[str, Any]:
    """Keys of the section that a mix becomes. Raises QtoolError where nothing would be quantized."""
    left = tuple(module for module, kind in mix.items() if kind == WHOLE)
    if len(left) == len(mix):
        raise nothing_left()
    return {"ignore": left, "budget": None}


def nothing_left() -> QtoolError:
    """All linears stay as they are."""
    return QtoolError("budget: leaves every linear in 16 bits; take the source itself.")


def alike_of(shape: ModelShape) -> tuple[tuple[str, ...], ...]:
    """vLLM holds q, k and v in one matrix, and gate and up: what one input feeds."""
    decoder = shape.decoder
    return tuple(
        tuple(decoder.at(layer) + matrix.module for matrix in feed.consumers)
        for layer in range(decoder.shape.layers)
        for feed in decoder.feeds(layer)
    )
