"""Text parts of models of text and images: read, quantized and verified as the text models that they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import converted, make_model

from qtool.convert.artifact import Artifact
from qtool.convert.files.config_file import read_config
from qtool.convert.files.wrappers import text_part
from qtool.convert.models.fused import open_model
from qtool.convert.models.shape import tensor_shapes
from qtool.convert.skeleton import load_config
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines.torch_model import load_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
TEXT: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
TOWER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
         "patch_size": 14}  # fmt: skip


def wrapped(kind: str) -> Any:
    """transformers' own model of text and images."""
    import transformers as t

    if kind == "Mistral3":
        text = t.Ministral3Config(**TEXT, rope_parameters=dict(YARN))
        return t.Mistral3ForConditionalGeneration(
            t.Mistral3Config(text_config=text, vision_config=t.PixtralVisionConfig(**TOWER, head_dim=32))
        )
    if kind == "Gemma3":
        text = t.Gemma3TextConfig(
            **TEXT, query_pre_attn_scalar=32, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
        )
        return t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(text_config=text, vision_config=t.SiglipVisionConfig(**TOWER), mm_tokens_per_image=4)
        )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    text = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"rope_parameters": rope}
    tower = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [0],
    }
    return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=text, vision_config=tower))


@pytest.mark.parametrize("kind", ["Mistral3", "Gemma3", "Qwen2_5_VL"])
def test_the_text_part_is_quantized_as_a_model_of_its_own(kind: str, tmp_path: Path) -> None:
    """It computes what the whole model does with text; the tower is left out and named."""
    torch.manual_seed(0)
    model = wrapped(kind).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.08 if parameter.ndim > 1 else 1 + 0.1 * torch.randn_like(parameter)
            )
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in make_model(tmp_path / "plain").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = read_config(folder)
    assert "text_config" not in config
    assert "vision_config" not in config
    alone = load_model(open_model(folder).read(), load_config(folder), CPU)
    with torch.inference_mode():
        whole = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        expected = whole(input_ids=TOKENS).logits
        torch.testing.assert_close(alone(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    shapes = tensor_shapes(config)
    assert {name: info.shape for name, info in open_model(folder).tensors.items() if name in shapes} == shapes
    made = converted(folder, [{"method": "awq", "group_size": 32, "rounding": "rtn", "dtype": "bfloat16"}], tmp_path)
    artifact = Artifact.open(made["awq"])
    assert artifact.config["architectures"] == config["architectures"]
    assert set(json.loads((made["awq"] / "config.json").read_text())) >= {"hidden_size", "quantization_config"}
    assert artifact.manifest is not None
    assert any(
        "left out" in note and ("vision" in note or "visual" in note or "multi_modal" in note)
        for note in artifact.manifest.notes
    )
    assert verify(made["awq"], folder).sound
    found = load_model(artifact.read(), load_config(made["awq"]), CPU)(TOKENS).logits.log_softmax(-1)
    expected = expected.log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.5


def test_other_models_stay_as_they_are() -> None:
    plain = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}
    assert text_part(plain) is plain
    other = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral4"}}
    assert text_part(other) is other
