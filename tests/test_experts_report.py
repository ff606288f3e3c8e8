"""What is told of experts: tokens that reached them, those blended, what each lost."""

from __future__ import annotations

from qtool.runs.coverage import by_expert, by_kind, coverage

LEDGER = {
    f"model.layers.{layer}.mlp.experts.{expert}.{part}": {
        "error": 0.01 * (1 + expert + 4 * layer), "frobenius": 0.05, "tokens": float(100 * expert * (layer + 1)),
        "blended": {0: 1.0, 1: 0.25}.get(expert, 0.0),
    }
    for layer in range(2) for expert in range(4) for part in ("gate_proj", "up_proj", "down_proj")
} | {"model.layers.0.self_attn.q_proj": {"error": 0.02, "frobenius": 0.05}}  # fmt: skip


def test_coverage_counts_experts_not_matrices() -> None:
    found = coverage(LEDGER)
    assert found is not None
    assert found.as_json() == {"experts": 8, "fewest": 0, "mean": 225.0, "most": 600, "unseen": 2, "blended": 4}
    assert found.unseen == [(0, 0), (1, 0)]
    assert found.sentence == (
        "8 experts saw 0 to 600 calibration tokens each, 225 in the mean; fewest in layer 0, expert 0; 2 saw none "
        "(layer 0, expert 0; layer 1, expert 0); of "
        "4 a part of the statistics, at most 100%, is that of all tokens, for their own were too few."
    )
    assert coverage({name: record for name, record in LEDGER.items() if "self_attn" in name}) is None
    assert coverage({name: {"error": 0.1} for name in LEDGER}) is None  # made without a text


def test_errors_by_expert_and_by_kind() -> None:
    errors = by_expert(LEDGER, "error")
    assert len(errors) == 8
    assert errors[1, 3] == 0.01 * 8
    kinds = by_kind(LEDGER, "error")
    assert len(kinds) == 7
    assert kinds["model.layers.0.mlp.experts.up_proj"] == 0.025
    assert kinds["model.layers.0.self_attn.q_proj"] == 0.02
