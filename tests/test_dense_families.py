"""Dense families beside Llama's: scales that change nothing, inputs as the whole model has them, every output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import converted

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.model_config import runtime_keys
from qtool.convert.models.shape import Decoder, decoder_of, shape_of, tensor_shapes
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines.torch_model import load_model
from qtool.quantize import source_model as walked
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.method import LayerCodes
from qtool.quantize.walk import Column, Walk
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import read_headers

CPU = torch.device("cpu")
YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, "beta_fast": 8.0,
    "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Ministral3": ("Ministral3", {"rope_parameters": YARN}),
    "SeedOss": ("SeedOss", {}),
    "SeedOss-biases": ("SeedOss", {"attention_out_bias": True, "mlp_bias": True}),
    "Granite": ("Granite", MULTIPLIERS | {"attention_bias": True}),
    "Starcoder2": ("Starcoder2", {"sliding_window": 24}),
    "Phi3": ("Phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    "Glm": ("Glm", {}),
    "Glm4": ("Glm4", {}),
    "Ernie4_5": ("Ernie4_5", {}),
    "Ernie4_5-biases": ("Ernie4_5", {"use_bias": True}),
    "Lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Lfm2-biases": ("Lfm2", {"layer_types": ["full_attention", "conv"], "conv_bias": True, "block_multiple_of": 64}),
    "Qwen3_5": ("Qwen3_5", {
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
        "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }),
    "Loop": ("IQuestLoopCoder", {"loop_window_size": 16, "rope_theta": 5e5}),
    "DeepSeek-Coder": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}),
    "Codestral": ("Mistral", {"sliding_window": None, "tie_word_embeddings": False}),
}  # fmt: skip
OUTPUTS = [
    {"method": "awq", "name": "awq-g32", "group_size": 32, "dtype": "bfloat16"},
    {"method": "gptq", "name": "gptq-g32", "group_size": 32, "dtype": "bfloat16"},
    {"method": "gptq", "name": "ct", "format": "compressed-tensors", "group_size": 32, "dtype": "bfloat16"},
    {"method": "nf4", "name": "nf4"},
    {"method": "gguf", "name": "q5", "type": "Q5_K_M"},
]
TOKENS = torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS)
def source(request: pytest.FixtureRequest, model_maker: Callable[..., Path], tmp_path: Path) -> Path:
    architecture, changes = MODELS[request.param]
    return model_maker(tmp_path / "model", architecture, **changes)


def unrounded(made: LayerCodes, tensors: dict[str, torch.Tensor], decoder: Decoder, layer: int) -> None:
    """Put a layer's folded tensors into ``tensors`` (float32), its matrices without any rounding."""
    at = decoder.at(layer)
    for name, tensor in made.tensors.items():
        tensors[at + name] = tensor.float()
    for matrix in decoder.matrices(layer):
        held = matrix.of(tensors[at + matrix.tensor])
        held.mul_(made.kept[f"{matrix.module}.columns"]).div_(made.kept[f"{matrix.module}.rows"].unsqueeze(1))


def folded_source(source: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors (float32) with AWQ's scales in matrices and producers, and no rounding."""
    config, checkpoint = read_config(source), Checkpoint.open(source)
    decoder = decoder_of(config)
    method = AwqMethod(method="awq", group_size=32, rounding="rtn", dtype="bfloat16")
    columns = [Column(method, method.container.plan(ModelShape(checkpoint.tensors, decoder, config)))]
    model = build_skeleton(load_config(source))
    walk = Walk(model, decoder, checkpoint, CalibrationSet(TOKENS, "test"), columns, CPU)
    tensors = {name: tensor.float() for name, tensor in checkpoint.read()}
    for result in walk.run():
        assert result.index is not None
        unrounded(result.outputs["awq"], tensors, decoder, result.index)
    return tensors


def test_scales_change_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folded source, not rounded, computes the logits that transformers' own model does."""
    monkeypatch.setattr(walked, "fast_bfloat16", lambda: False)
    checkpoint = Checkpoint.open(source)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(read_config(source))
    before = {name: tensor.float() for name, tensor in checkpoint.read()}
    after = folded_source(source)
    scaled = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(scaled) > 2 * 4
    expected, found = (
        load_model(iter(each.items()), load_config(source), CPU)(input_ids=TOKENS).logits for each in (before, after)
    )
    assert float((expected - found).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.slow
def test_every_output_is_made_and_verified(source: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name = request.node.callspec.params["source"]
    outputs = (
        OUTPUTS[:-1]
        if name in ("SeedOss-biases", "Ernie4_5-biases", "Loop", "Lfm2", "Lfm2-biases", "Qwen3_5")
        else OUTPUTS
    )  # llama.cpp has none of these
    headers = read_headers(str(source))
    expected = load_model(Checkpoint.open(source).read(), load_config(source), CPU)(TOKENS).logits.log_softmax(-1)
    for output, path in converted(source, outputs, tmp_path).items():
        artifact = Artifact.open(path)
        result = verify(path, source)
        assert result.sound, (output, [check for check in result.checks if check.status == "fail"])
        assert artifact.manifest is not None
        if output in ("awq-g32", "gptq-g32", "nf4"):
            assert weights_of(headers, output).nbytes == artifact.manifest.tensor_bytes
        found = load_model(artifact.read(), load_config(source), CPU)(TOKENS).logits.log_softmax(-1)
        assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.5, output


def test_vllm_is_told_how_queries_grow(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Where it looks for it; an artifact that does not say so is not what the source makes of it."""
    model = model_maker(tmp_path / "model", "Ministral3", rope_parameters=YARN)
    (path,) = converted(model, [{"method": "awq", "group_size": 32, "rounding": "rtn"}], tmp_path).values()
    config = json.loads((path / "config.json").read_text())
    assert config["llama_4_scaling"] == {"original_max_position_embeddings": 16, "beta": 0.4}
    assert verify(path, model).sound
    (path / "config.json").write_text(json.dumps(config | {"llama_4_scaling": None}))
    assert not verify(path, model).sound
    config["rope_parameters"] = None  # transformers' class then has settings of its own, as without the key
    assert runtime_keys(config) == {"llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1}}


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("Ministral3", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "llama_4_scaling_beta .* is None"),
        ("Ministral3", {"rope_scaling": {"type": "yarn", "factor": 8.0}}, "llama_4_scaling_beta .* is None"),
        ("IQuestLoopCoder", {"loop_num": 0}, "loop_num is 0; a positive whole number"),
        ("IQuestLoopCoder", {"loop_window_size": 0}, "loop_window_size is 0; a positive whole number"),
    ],
)
def test_what_the_class_cannot_compute_is_refused(architecture: str, changes: dict[str, Any], said: str) -> None:
    """For every output, not GGUF alone: the model is built, and fails or means nothing in its first layer."""
    config = {"architectures": [f"{architecture}ForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 320, "rope_parameters": YARN}
    shape_of(config | sizes)
    with pytest.raises(QtoolError, match=f"config.json: {said}"):
        shape_of(config | sizes | changes)
