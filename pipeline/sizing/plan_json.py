"""A plan for programs: bytes and seconds, nothing rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.sizing.bounds import Range
from qtool.sizing.fit import Estimate, Offload
from qtool.sizing.plan import Answer, Plan
from qtool.sizing.sharing import Shared


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan, bytes and seconds, for programs."""
    g = plan.headers.geometry
    return {
        "model": plan.headers.name,
        "architecture": g.architecture,
        "experts": {"of_a_layer": g.experts, "active": g.active, "idle_parameters": g.idle} if g.experts else None,
        "notes": list(plan.notes),
        "answers": [_answer_json(answer) for answer in plan.answers],
    }


def _answer_json(answer: Answer) -> dict[str, Any]:
    s, w = answer.setting, answer.setting.weights
    return {
        "card": s.card.key, "cards": s.cards, "format": w.format, "engine": s.engine, "kv_dtype": s.kv_dtype,
        "fits": answer.fits, "faults": list(answer.faults), "largest_context": answer.context,
        "most_sequences": answer.sequences, "least_changes": list(answer.least_changes),
        "changes": list(answer.changes), "command": answer.command,
        "weights_bytes": w.nbytes, "file_bytes": w.files, "bits_per_weight": w.bits_per_weight,
        "offload": _offload_json(answer.offload),
        "shared_prefix": _shared_json(answer.shared),
        "cells": [_cell_json(cell) for cell in answer.cells],
    }  # fmt: skip


def _offload_json(offload: Offload | None) -> dict[str, Any] | None:
    if offload is None:
        return None
    return {"bytes": offload.moved, "flag": offload.flag, "why": offload.why, "step_seconds": _range(offload.step)}


def _shared_json(shared: Shared | None) -> dict[str, Any] | None:
    if shared is None:
        return None
    return {
        "tokens": shared.tokens, "users": shared.users, "tokens_held": shared.held, "blocks_saved": shared.blocks,
        "bytes_saved": shared.nbytes, "seconds_saved": _range(shared.seconds) if shared.seconds else None,
    }  # fmt: skip


def _cell_json(cell: Estimate) -> dict[str, Any]:
    return {
        "context": cell.context, "sequences": cell.sequences, "fits": cell.fits, "weights": cell.weights,
        "cache": cell.cache, "activations": cell.overhead.activations, "fixed": cell.overhead.fixed,
        "total": cell.total, "limit": cell.limit, "step_seconds": _range(cell.step),
        "first_token_seconds": _range(cell.first_token) if cell.first_token else None,
    }  # fmt: skip


def _range(seconds: Range) -> Mapping[str, float | None]:
    return {"best": seconds.best, "slow": seconds.slow}
