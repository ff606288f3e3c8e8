"""Weights that no working model has are named; zeros that mean something are not."""

from __future__ import annotations

import pytest
import torch

from qtool import QtoolError
from qtool.quantize.soundness import refuse_unsound


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("mlp.up_proj.weight", torch.tensor([[1.0, float("nan")]]), "NaN or Inf"),
        ("mlp.up_proj.weight", torch.tensor([[1.0, float("-inf")]]), "NaN or Inf"),
        ("mlp.up_proj.weight", torch.zeros(2, 3), "all zero"),
        ("input_layernorm.weight", torch.zeros(3), "all zero"),
    ],
)
def test_it_is_named(name: str, tensor: torch.Tensor, said: str) -> None:
    with pytest.raises(QtoolError, match=rf"model\.layers\.3\.{name}: .*{said}"):
        refuse_unsound({"self_attn.q_proj.weight": torch.ones(2, 2), name: tensor}, "model.layers.3.", lambda _: 0.0)


def test_zeros_that_mean_something() -> None:
    refuse_unsound({"input_layernorm.weight": torch.zeros(3)}, "", lambda _: 1.0)  # 1 + weight
    refuse_unsound({"self_attn.q_proj.bias": torch.zeros(3)}, "", lambda _: 0.0)
