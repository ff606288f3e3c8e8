"""The plan's host memory holds the process itself: its libraries, and what every output has beside the walk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.evaluate.engines.token_proof import proof_bytes
from qtool.make.peaks import LIBRARIES, Work
from qtool.preparing import prepare_recipe
from qtool.recipe.sections import checked_recipe


def work(*outputs: dict[str, Any], samples: int = 4) -> Work:
    recipe = {
        "model": "qtool-demo",
        "outputs": list(outputs),
        "calibration": {"text": "qtool-code", "samples": samples},
    }
    job = prepare_recipe(checked_recipe(recipe, "test"), "cpu")
    return Work(job.recipe.calibration, job.decoder, job.checkpoint.tensors, job.outputs, job.device)


NF4 = {"method": "nf4", "rounding": "absmax"}
Q8 = {"method": "gguf", "type": "Q8_0"}


def test_the_process_itself_is_in_the_figure() -> None:
    one = work(NF4)
    assert one.host_peak() > LIBRARIES["cpu"]
    assert one.host_peak(2) > 2 * LIBRARIES["cpu"]  # each rank has its own
    on_card = replace(one, device=torch.device("cuda"))
    assert on_card.host_peak() > LIBRARIES["cuda"]
    assert replace(one, outputs=()).host_peak() == 0


def test_every_output_has_codes_of_two_layers_on_a_processor() -> None:
    """One being chosen, one on its way to the disk: rounded ones, too."""
    one, two = work(NF4), work(NF4, Q8)
    parameters = one.layer_parameters()
    assert two.host_peak() - one.host_peak() == pytest.approx(2 * parameters, rel=0.1)


def test_a_file_whose_tokens_are_compared_takes_a_cache() -> None:
    """llama.cpp keeps 256 tokens of keys and values in each layer while it is asked; it counts where the walk takes
    less, as of many thin layers."""
    one = work(NF4, Q8)
    shape = one.decoder.shape
    deep = replace(one.decoder, shape=replace(shape, layers=400))
    cache = 2 * 2 * 256 * 400 * shape.kv_heads * shape.head_dim
    assert cache < proof_bytes(deep.shape) < 1.5 * cache
    walking = one.host_peak() - LIBRARIES["cpu"]
    assert proof_bytes(shape) < walking < proof_bytes(deep.shape)
    found = replace(one, decoder=deep)._proving()
    assert found == proof_bytes(deep.shape)
    assert replace(one, outputs=one.outputs[:1])._proving() == 0
