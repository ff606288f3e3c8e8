"""A long text layer by layer: as transformers' own forward, never scores of all positions with all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTURES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.models.shape import shape_of
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines import reference
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.layered import Sweep
from qtool.evaluate.engines.streamed import StreamedModel, open_streamed
from qtool.evaluate.engines.sweep_memory import peak_bytes, queries_of, require_memory
from qtool.evaluate.engines.torch_model import load_model, logits_of

LENGTH = 640
LONG = {"max_position_embeddings": 1024}


def streamed(folder: Path) -> StreamedModel:
    read = Artifact.open(folder).read
    return open_streamed(reference.FACTS, read, load_config(folder), torch.device("cpu"), False)


def text(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(2))


def swept(folder: Path, place: Path, condition: Condition = PLAIN, chunk: int = 96) -> torch.Tensor:
    sweep = Sweep(streamed(folder), chunk, place, condition)
    return torch.cat(list(sweep.logits(sweep.states(text()))))


@torch.inference_mode()
def whole(folder: Path, window: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: torch.Tensor = model(input_ids=window[None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
        ("Gemma2", {"final_logit_softcapping": 4.0, "query_pre_attn_scalar": 32, "sliding_window": 64}),
        ("Qwen3Moe", MIXTURES["Qwen3Moe"]),
        ("Glm4Moe", MIXTURES.get("Glm4Moe", {})),
    ],
)
def test_every_position_as_transformers_computes_it(
    architecture: str, changes: dict[str, Any], model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Chunks of queries, full and sliding layers, scores with and without a cap, experts, another rotation."""
    folder = model_maker(tmp_path / "model", architecture, **(LONG | changes))
    torch.testing.assert_close(swept(folder, tmp_path / "states"), whole(folder, text()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "scaling"),
    [
        (256, {"rope_type": "dynamic", "factor": 4.0}),
        (
            1024,
            {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 256,
             "short_factor": [1.0] * 16, "long_factor": [4.0] * 16},
        ),
    ],
)  # fmt: skip
def test_a_rotation_that_depends_on_the_length_is_that_of_the_whole_text(
    length: int, scaling: dict[str, Any], model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Layer by layer, and in a loaded model's chunks of 512: as one forward over all 640 tokens."""
    folder = model_maker(tmp_path / "model", max_position_embeddings=length, rope_scaling=scaling)
    expected = whole(folder, text())
    torch.testing.assert_close(swept(folder, tmp_path / "states"), expected, rtol=1e-4, atol=1e-4)
    loaded = load_model(Artifact.open(folder).read(), load_config(folder), torch.device("cpu"))
    torch.testing.assert_close(torch.cat(list(logits_of(loaded)(text()))), expected, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_no_tensor_spans_all_positions_twice(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Of a model whose attention is no kernel: each score is a number of a tensor."""
    folder = model_maker(tmp_path / "model", "Gemma2", query_pre_attn_scalar=32, **LONG)
    with Largest() as seen:
        swept(folder, tmp_path / "states", chunk=64)
    assert seen.numbers < LENGTH * LENGTH
    with Largest() as planted:  # what would be seen
        swept(folder, tmp_path / "other", chunk=LENGTH)
    assert planted.numbers >= LENGTH * LENGTH


def test_a_killed_sweep_goes_on_behind_its_last_layer(
    model_maker: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_maker(tmp_path / "model", num_hidden_layers=4, **LONG)
    expected = swept(folder, tmp_path / "whole")
    read: list[int] = []
    fill = StreamedModel.fill

    def watched(model: StreamedModel, number: int) -> torch.nn.Module:
        read.append(number)
        if len(read) == 3:
            raise KeyboardInterrupt
        return fill(model, number)

    monkeypatch.setattr(StreamedModel, "fill", watched)
    place = tmp_path / "states"
    with pytest.raises(KeyboardInterrupt):
        Sweep(streamed(folder), 96, place, every=0.0).states(text())
    assert [path.name for path in place.iterdir()] == ["00002-0-of-1.safetensors"]
    assert torch.equal(swept(folder, place), expected)
    assert read == [0, 1, 2, 2, 3]
    (place / "00004-0-of-1.safetensors").write_bytes(b"damaged")  # everything again
    assert torch.equal(swept(folder, place), expected)


def test_bytes_are_foretold_and_refused_with_what_fits(tmp_path: Path) -> None:
    """An 8B geometry at 128K fits 24 GB, one of 40B 80 GB; half of it is refused and a shorter text named."""
    eight = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2**17,
    }  # fmt: skip
    forty = eight | {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 80,
                     "num_attention_heads": 40}  # fmt: skip
    for config, card in ((eight, 24e9), (forty, 80e9)):
        shape = shape_of(config)
        chunk = queries_of(shape, 2**17)
        assert 0.1 * card < peak_bytes(shape, 2**17, chunk, 2) < card
        require_memory(shape, 2**17, 2, int(card))
    with pytest.raises(QtoolError, match=r"text of 131,072 tokens takes about .* `length: 65536` fits"):
        require_memory(shape_of(eight), 2**17, 2, 7 * 2**30)
    with pytest.raises(QtoolError, match="larger card"):
        require_memory(shape_of(eight), 2**17, 2, 2**30)
    assert queries_of(shape_of(eight | {"architectures": ["Gemma2ForCausalLM"]}), 2**17) < 128
