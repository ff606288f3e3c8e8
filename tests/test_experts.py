"""Mixtures of experts: tensors and names against transformers' own conversion, scales against its forward."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTURES
from torch import Tensor, nn

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.models.experts import Mixture, in_files, in_memory
from qtool.convert.models.feeds import Heads, Norm, Nothing, Rows
from qtool.convert.models.refusals import refuse_architecture
from qtool.convert.models.shape import Decoder, decoder_of
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.evaluate.engines.torch_model import load_model
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import read_headers


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_models import make_model

    path = tmp_path_factory.mktemp(request.param) / "model"
    return make_model(path, request.param, **MIXTURES[request.param])


def _decoder(folder: Path) -> tuple[Decoder, Mixture]:
    decoder = decoder_of(json.loads((folder / "config.json").read_text()))
    assert decoder.family.mixture is not None
    return decoder, decoder.family.mixture


def _layer(decoder: Decoder, tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    at = decoder.at(layer)
    return {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}


def _logits(folder: Path, decoder: Decoder, files: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Of transformers' model with the tensors of ``files``, float32."""
    model = build_skeleton(load_config(folder))
    state = {name: tensor for name, tensor in files.items() if decoder.layer_of(name) is None}
    for layer in range(decoder.shape.layers):
        held = in_memory(_decoder(folder)[1], decoder.shape.experts, _layer(decoder, files, layer))
        state |= {decoder.at(layer) + name: tensor for name, tensor in held.items()}
    missing, unexpected = model.load_state_dict({n: t.float() for n, t in state.items()}, assign=True, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()  # type: ignore[operator]  # a method of transformers' models
    logits: Tensor = model(input_ids=tokens).logits
    return logits


def _reverted(model: nn.Module) -> dict[str, Tensor]:
    from transformers import core_model_loading

    found: dict[str, Tensor] = core_model_loading.revert_weight_conversion(model, dict(model.state_dict()))
    return found


def test_tensors_are_those_that_transformers_would_save(folder: Path) -> None:
    """Names and shapes of every tensor, from transformers' own conversion of a model without weights."""
    decoder, _ = _decoder(folder)
    expected = {name: tuple(t.shape) for name, t in _reverted(build_skeleton(load_config(folder))).items()}
    if decoder.shape.tied:
        del expected["lm_head.weight"]
    assert decoder.tensors() == expected
    assert decoder.tensors() == {name: info.shape for name, info in Checkpoint.open(folder).tensors.items()}


def test_memory_and_files_are_each_other(folder: Path) -> None:
    """A layer's state dict as transformers has it, and back, bit for bit."""
    from transformers import AutoModelForCausalLM

    decoder, mixture = _decoder(folder)
    tensors = dict(Checkpoint.open(folder).read())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layers: Any = model.get_submodule(decoder.prefix.rstrip("."))
    for layer in range(decoder.shape.layers):
        files, state = _layer(decoder, tensors, layer), layers[layer].state_dict()
        held = in_memory(mixture, decoder.shape.experts, files)
        assert set(held) == set(state)
        # transformers may round routers and their biases with the rest; artifacts and vLLM keep them
        cast = {name for name in state if not decoder.family.casts(mixture.in_files(name))}
        assert all(torch.equal(held[name].to(state[name].dtype), state[name]) for name in cast)
        assert all(torch.equal(held[name], state[name]) for name in state.keys() - cast)
        back = in_files(mixture, decoder.shape.experts, state)
        assert set(back) == set(files)
        rounded = {mixture.in_files(name) for name in cast}
        assert all(torch.equal(back[name], files[name].to(back[name].dtype)) for name in rounded)
        assert all(torch.equal(back[name], files[name]) for name in files.keys() - rounded)


def test_a_model_is_loaded_from_files_of_any_order(folder: Path) -> None:
    """Experts come one by one, in whatever order; one that is missing, or of another shape, is named."""
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    decoder, mixture = _decoder(folder)
    tensors = list(Checkpoint.open(folder).read())
    config, cpu = load_config(folder), torch.device("cpu")
    state = load_model(iter(reversed(tensors)), config, cpu).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    first = decoder.shape.sparse.index(True)
    lost = f"model.layers.{first}.{mixture.module(2, 'up')}.weight"
    with pytest.raises(QtoolError, match=rf"lacks {re.escape(lost)} \(1 tensors of experts missing\)"):
        load_model(((name, tensor) for name, tensor in tensors if name != lost), config, cpu)
    with pytest.raises(QtoolError, match=rf"{re.escape(lost)} is \[63, 128\]"):
        load_model(((name, tensor[:63] if name == lost else tensor) for name, tensor in tensors), config, cpu)


def test_every_scale_of_every_feed_changes_nothing(folder: Path) -> None:
    """Producers divided and all consumers multiplied by a scale of 0.3 to 3, drawn for each channel that may have its
    own: the logits stay, and so does the router's choice. One consumer left out moves them by far more."""
    decoder, _ = _decoder(folder)
    tensors = {name: tensor.float() for name, tensor in Checkpoint.open(folder).read()}
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = _logits(folder, decoder, tensors, tokens)
    scaled = {name: tensor.clone() for name, tensor in tensors.items()}
    forgotten = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.manual_seed(3)
    for layer in range(decoder.shape.layers):
        for feed in decoder.feeds(layer):
            _scale(decoder.at(layer), feed, scaled, forget=False)
        torch.manual_seed(3)
        for feed in decoder.feeds(layer):
            _scale(decoder.at(layer), feed, forgotten, forget=True)
    error = (_logits(folder, decoder, scaled, tokens) - expected).norm() / expected.norm()
    wrong = (_logits(folder, decoder, forgotten, tokens) - expected).norm() / expected.norm()
    assert float(error) < 1e-5
    assert float(wrong) > 1e-2


def _scale(at: str, feed: Any, tensors: dict[str, Tensor], forget: bool) -> None:
    columns = feed.consumers[0].of(tensors[at + feed.consumers[0].tensor]).shape[1]
    ties = feed.producer.ties(columns, torch.device("cpu"))
    own = torch.exp(torch.empty(columns if ties is None else int(ties.max()) + 1).uniform_(-1.2, 1.2))
    spread = own if ties is None else own[ties]
    match feed.producer:
        case Norm(name):
            weight, added = tensors[f"{at}{name}.weight"], float(feed.producer.plus_one)
            weight.add_(added).div_(own).sub_(added)
        case Rows(matrix) | Heads(matrix):
            matrix.of(tensors[at + matrix.tensor]).div_(own[:, None])
            if (bias := tensors.get(at + matrix.tensor.replace(".weight", ".bias"))) is not None:
                bias /= own
        case Nothing():
            return
    for matrix in feed.consumers:
        matrix.of(tensors[at + matrix.tensor]).mul_(spread)
    for name in () if forget else feed.also:
        tensors[at + name] *= spread


def test_a_missing_expert_is_named(folder: Path) -> None:
    decoder, mixture = _decoder(folder)
    files = _layer(decoder, dict(Checkpoint.open(folder).read()), decoder.shape.sparse.index(True))
    name = f"{mixture.module(3, 'up')}.weight"
    del files[name]
    with pytest.raises(KeyError, match=name.replace(".", r"\.")):
        in_memory(mixture, decoder.shape.experts, files)


def test_experts_see_their_own_tokens_and_routers_all(model_maker: Callable[..., Path]) -> None:
    """What `Feed.routed` and `Matrix.expert` say of a mixture without a shared expert."""
    decoder = decoder_of({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 10, "num_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "decoder_sparse_step": 2,
    })  # fmt: skip
    assert decoder.shape.sparse == (False, True, False, True)
    assert not any(feed.routed for feed in decoder.feeds(0))
    _, _, read, *downs = decoder.feeds(1)
    assert read.routed
    assert [matrix.expert for matrix in read.consumers] == [0, 0, 1, 1, 2, 2]
    assert read.also == ("mlp.gate.weight",)
    assert [down.consumers[0].module for down in downs] == [f"mlp.experts.{e}.down_proj" for e in range(3)]
    assert all(down.routed and down.split for down in downs)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("GptOssForCausalLM", "its experts come in MXFP4"),
        (
            "DeepseekV2ForCausalLM",
            r"compresses keys and values \(MLA\).*; llama\.cpp's convert_hf_to_gguf\.py and llama-q",
        ),
        ("Glm4MoeLiteForCausalLM", r"\(MLA\).*llama-quantize make a GGUF"),
        ("KimiLinearForCausalLM", r"\(KDA\).*llama-quantize make a GGUF"),
        ("SomethingMoeForCausalLM", r"a mixture of experts \(num_experts: 4\), whose tensors and feeds qtool does not"),
    ],
)
def test_what_is_not_supported_says_why(architecture: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=said):
        refuse_architecture(tmp_path, {"architectures": [architecture], "num_experts": 4})


def test_a_plan_of_what_is_not_supported_says_why_too(tmp_path: Path) -> None:
    """Its own dtype is planned; a format is refused with the reason."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 64, "vocab_size": 100,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "dtype": "bfloat16",
    }))  # fmt: skip
    headers = read_headers(str(path))
    assert weights_of(headers, "source").nbytes > 0
    with pytest.raises(
        QtoolError, match=r"is not quantized yet \(its attention compresses .*\): only its own dtype can"
    ):
        weights_of(headers, "awq")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 4 experts"),
        ({"num_experts": 10**9}, "num_experts is 1,000,000,000; no model has more than 8,192"),
        ({"moe_intermediate_size": "wide"}, "moe_intermediate_size is 'wide'; a positive whole number is needed"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; a positive whole number is needed"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers is 'all'; a list of layers is needed"),
        ({"num_experts": 0}, "num_experts is 0; a positive whole number is needed"),
        ({"num_local_experts": 5}, "num_experts is 4 and num_local_experts is 5; both name one thing"),
    ],
)
def test_numbers_that_no_mixture_has_are_named(changes: dict[str, Any], said: str) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 10, "num_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    with pytest.raises(QtoolError, match=said):
        decoder_of(config | changes)
