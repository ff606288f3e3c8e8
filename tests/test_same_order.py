"""Sums in the same order every time: an accelerator adds what several threads put in one place as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTURES
from small_models import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.shape import decoder_of
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.quantize import scaling
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.nf4 import Nf4Method
from qtool.quantize.walk import Column, Walk

# torch.use_deterministic_algorithms's list, of forwards; of index_put and put those that accumulate
AS_THEY_COME = {
    "index_add", "scatter_add", "scatter_reduce", "index_reduce", "cumsum", "cumprod", "histc", "bincount", "put",
    "index_put", "kthvalue",
}  # fmt: skip


# every operation is looked at, and a descent takes some for each column
NARROW = {"hidden_size": 64, "head_dim": 16}


class Adding(TorchDispatchMode):
    """Notes operations that add floats in the order in which threads come."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__.strip("_")
        if name in AS_THEY_COME:
            given = [one for one in tree_leaves([args, kwargs]) if isinstance(one, torch.Tensor)]
            adds = name not in ("index_put", "put") or True in [*args[3:], *(kwargs or {}).values()]
            if adds and any(one.is_floating_point() for one in given):
                self.seen.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mixtral", "Qwen2Moe"])
def test_no_sum_depends_on_who_comes_first(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family, **{"intermediate_size": 64} | MIXTURES.get(family, {}) | NARROW)
    checkpoint, config = Checkpoint.open(folder), read_config(folder)
    decoder = decoder_of(config)
    methods: list[Method] = [AwqMethod(method="awq", group_size=32), GptqMethod(method="gptq", group_size=32)]
    methods += [GgufMethod(method="gguf")] if family in MIXTURES else [Nf4Method(method="nf4")]
    shape = ModelShape(checkpoint.tensors, decoder, config)
    columns = [Column(method, method.container.of_model(decoder).plan(shape)) for method in methods]
    text = CalibrationSet(torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(0)), "test")
    model = build_skeleton(load_config(folder))
    walk = Walk(model, decoder, checkpoint, text, columns, torch.device("cpu"))
    with Adding() as adding:
        for result in walk.run():
            assert len(result.outputs) == len(methods)
    assert adding.seen == set()


def test_what_shares_a_scale_has_its_mean() -> None:
    values = torch.randn(3, 12)
    for tie in (torch.arange(12) // 6 * 3 + torch.arange(12) % 3, torch.arange(12) % 4):
        expected = torch.stack([values[:, tie == number].mean(1) for number in tie.tolist()], 1)
        assert torch.allclose(scaling._pool(values, tie), expected)
        assert torch.allclose(scaling._pool(values[0], tie), expected[0])


def test_the_mode_sees_what_it_looks_for() -> None:
    with Adding() as adding:
        torch.zeros(2).index_add_(0, torch.tensor([0, 0]), torch.ones(2))
        torch.zeros(2).index_put_((torch.tensor([0]),), torch.ones(1))
        torch.bincount(torch.tensor([0, 1]))
    assert adding.seen == {"index_add"}
