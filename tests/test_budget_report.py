"""What is told of types by budget: the file beside an artifact, the pictures, what a larger file would buy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtool import QtoolError
from qtool.convert.files.chosen import CHOSEN, Chosen, read_chosen
from qtool.make.mixes import more
from qtool.report.budget_figures import size_against_kl
from qtool.report.maps import heat_map

A, B = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
SIZES = {"Q4_K": 4500, "Q6_K": 6562, "BF16": 16000}
TOLD: dict[str, Any] = {
    "budget": {"target_bpw": 5.6}, "mix": {A: "Q4_K", B: "Q6_K"}, "sizes": {A: SIZES, B: SIZES},
    "costs": {A: {"Q4_K": 0.01, "Q6_K": 0.001, "BF16": 0.0}, B: {"Q4_K": 0.04, "Q6_K": 0.004, "BF16": 0.0}},
    "beside": 138, "parameters": 16000, "curve": [[9138, 0.05], [11200, 0.014], [13262, 0.005], [32138, 0.0]],
}  # fmt: skip


def chosen() -> Chosen:
    return Chosen.model_validate_json(json.dumps(TOLD))


def test_what_a_file_beside_an_artifact_says(tmp_path: Path) -> None:
    assert read_chosen(tmp_path) is None
    (tmp_path / CHOSEN).write_text(json.dumps(TOLD))
    found = read_chosen(tmp_path)
    assert found == chosen()
    assert found.nbytes == 138 + 4500 + 6562
    assert found.expected == pytest.approx(0.014)
    assert found.bits == {A: 4.5, B: pytest.approx(6.562)}
    assert found.said.startswith("types by budget (target_bpw 5.6): 5.600 bits a weight, expected KL 0.014")


@pytest.mark.parametrize(
    "change",
    [{"mix": {A: "Q9_K"}}, {"mix": {"other": "Q4_K"}}, {"costs": {A: {"Q4_K": -1}}}, {"parameters": 0}, {"curve": 3}],
)
def test_a_file_that_does_not_hold_together_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / CHOSEN).write_text(json.dumps(TOLD | change))
    with pytest.raises(QtoolError, match=r"budget\.json: does not say how types were chosen"):
        read_chosen(tmp_path)


def test_what_a_larger_file_would_buy() -> None:
    said = more(chosen(), 2062)
    assert said.startswith("0.002 MB more would buy: expected KL 0.005 for 0.014, by larger types for 1 of 2 matrices")
    assert said.endswith(f"({A} first, Q4_K -> Q6_K)")
    whole = chosen().model_copy(update={"mix": {A: "BF16", B: "BF16"}})
    assert more(whole, 1000) == "nothing more is gained by a larger file"


def test_where_a_little_more_buys_nothing_the_next_step_is_told() -> None:
    """Groups of few matrices leave gaps: a twentieth of this file is less than one of them takes."""
    assert more(chosen()).startswith("0.002 MB more would buy: expected KL 0.005 for 0.014")
    large = chosen().model_copy(update={"mix": {A: "Q6_K", B: "BF16"}})
    assert more(large).startswith("0.009 MB more would buy: expected KL 0 for 0.001, by larger types for 1 of 2")


def test_pictures() -> None:
    drawn = size_against_kl(chosen(), 0.02)
    assert "chosen, measured" in drawn
    assert "Chosen: 0.0112 MB, expected 0.014." in drawn
    assert drawn.count("<circle") == 2
    assert size_against_kl(chosen(), None).count("<circle") == 1
    bits = heat_map({(0, "mlp.up_proj"): 4.5, (1, "mlp.up_proj"): 6.5625}, "bits", (2.0, 9.0), digits=2)
    assert ">4.50<" in bits
    assert "from 4.50 to 6.56; largest in layer 1, mlp.up_proj." in bits
