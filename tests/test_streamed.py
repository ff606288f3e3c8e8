"""A model that does not fit into memory, read layer by layer: the same log-probabilities, and at most a layer of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTURES
from plain_rounding import rounded

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint, TensorStream
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines import machine, reference
from qtool.evaluate.engines.engine import Decoding, Model, Use
from qtool.evaluate.engines.streamed import StreamedModel
from qtool.evaluate.engines.torch_model import TorchModel


def opened(artifact: Artifact, folder: Path, read: Callable[[str], TensorStream] | None = None) -> Any:
    model = Model("m", stream=read or artifact.read, config=load_config(folder), tokenizer=None)
    return reference.ENGINE.open(model, Use("cpu", 1, lambda: 64))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Qwen3Moe", MIXTURES["Qwen3Moe"]),
        ("Mixtral", MIXTURES["Mixtral"] | {"tie_word_embeddings": False}),
        ("Gemma2", {"final_logit_softcapping": 4.0, "query_pre_attn_scalar": 32}),  # what its head's code does is done
        ("Llama", {}),
    ],
)
@torch.inference_mode()
def test_layers_on_demand_give_the_same_logits(
    architecture: str, changes: dict[str, Any], model_maker: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a source and of an artifact; every layer is read once for all windows, and is gone afterwards."""
    folder = model_maker(tmp_path / "model", architecture, **changes)
    (made,) = rounded(folder, [{"method": "awq", "group_size": 32, "dtype": "bfloat16"}], tmp_path).values()
    windows = torch.randint(0, 320, (3, 40), generator=torch.Generator().manual_seed(1))
    for path in (folder, made):
        artifact = Artifact.open(path)
        monkeypatch.setattr(machine, "free_memory", lambda device: None)
        with opened(artifact, path) as whole:
            assert isinstance(whole, TorchModel)
            expected = [torch.cat(list(whole.logits(window))) for window in windows]
        monkeypatch.setattr(machine, "free_memory", lambda device: 10_000)
        asked: list[str] = []

        def read(prefix: str, artifact: Artifact = artifact, asked: list[str] = asked) -> TensorStream:
            asked.append(prefix)
            return artifact.read(prefix)

        with opened(artifact, path, read) as streamed:
            assert isinstance(streamed, StreamedModel)
            streamed.prepare(windows)
            layers = streamed.model.get_submodule("model.layers")
            assert all(parameter.is_meta for parameter in layers.parameters())
            found = [torch.cat(list(streamed.logits(window))) for window in windows]
            count = len(list(layers.children()))
            assert sorted(name for name in asked if ".layers." in name) == [f"model.layers.{n}." for n in range(count)]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            with pytest.raises(QtoolError, match="gives log-probabilities alone"):
                streamed.generate([], Decoding(1, 1))


def test_an_expert_that_is_missing_is_named(
    model_maker: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_maker(tmp_path / "model", "Qwen3Moe", **MIXTURES["Qwen3Moe"])
    monkeypatch.setattr(machine, "free_memory", lambda device: 10_000)
    lost = "model.layers.2.mlp.experts.1.up_proj.weight"

    def read(prefix: str) -> TensorStream:
        return (pair for pair in Artifact.open(folder).read(prefix) if pair[0] != lost)

    with (
        opened(Artifact.open(folder), folder, read) as streamed,
        pytest.raises(QtoolError, match=lost.replace(".", r"\.")),
    ):
        streamed.prepare(torch.zeros(1, 8, dtype=torch.int64))


def test_a_prefix_reads_its_own_tensors(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_maker(tmp_path / "model", "Qwen3Moe", **MIXTURES["Qwen3Moe"])
    (made,) = rounded(folder, [{"method": "gptq", "group_size": 32}], tmp_path).values()
    for path in (folder, made):
        every = [name for name, _ in Artifact.open(path).read()]
        assert set(every) == set(Checkpoint.open(folder).tensors)
        some = [name for name, _ in Artifact.open(path).read("model.layers.1.")]
        assert some == [name for name in every if name.startswith("model.layers.1.")]
