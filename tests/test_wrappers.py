"""Text parts of models of text and images: read, quantized and verified as the text models that they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import converted, make_model

from qtool import QtoolError
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
    if kind == "InternVL":
        text = t.Qwen3Config(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
        return t.InternVLForConditionalGeneration(
            t.InternVLConfig(text_config=text, vision_config=t.InternVLVisionConfig(**TOWER | {"image_size": [28, 28]}))
        )
    if kind.startswith("Qwen3_5"):
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
        text = TEXT | {
            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "rope_parameters": rope,
            "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        }  # fmt: skip
        if kind == "Qwen3_5Moe":
            more = {"num_experts": 6, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
            text = {key: value for key, value in text.items() if key != "intermediate_size"} | more
            text["num_experts_per_tok"] = 2
        tower = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
                 "num_position_embeddings": 16}  # fmt: skip
        return getattr(t, f"{kind}ForConditionalGeneration")(
            getattr(t, f"{kind}Config")(text_config=text, vision_config=tower)
        )
    if kind == "Lfm2Vl":
        small = {key: value for key, value in TEXT.items() if key != "head_dim"}
        text = t.Lfm2Config(**small, layer_types=["conv", "full_attention"], block_multiple_of=32)
        tower = {key: value for key, value in TOWER.items() if key != "image_size"} | {"num_patches": 16}
        return t.Lfm2VlForConditionalGeneration(
            t.Lfm2VlConfig(text_config=text, vision_config=t.Siglip2VisionConfig(**tower))
        )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    text = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"rope_parameters": rope}
    tower = {
        "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
        "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0], "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_position_embeddings": 16, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    if kind in ("Glm4v", "Glm4vMoe", "GlmOcr"):
        text["rope_parameters"] = rope | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    if kind == "GlmOcr":
        text["head_dim"] = 48
        text["rope_parameters"] = rope | {"mrope_section": [4, 4, 4], "partial_rotary_factor": 0.5}
    if kind == "PaddleOCRVL":
        text |= {"head_dim": 48, "tie_word_embeddings": False}
        text["rope_parameters"] = rope | {"mrope_section": [8, 8, 8]}
    if kind == "Glm4vMoe":
        text |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
                 "first_k_dense_replace": 1}  # fmt: skip
    if kind == "Qwen3VLMoe":
        text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    tower = {key: value for key, value in tower.items() if key in getattr(t, f"{kind}VisionConfig")().to_dict()} if (
        hasattr(t, f"{kind}VisionConfig")
    ) else tower  # fmt: skip
    return getattr(t, f"{kind}ForConditionalGeneration")(
        getattr(t, f"{kind}Config")(text_config=text, vision_config=tower)
    )


KINDS = [
    "Mistral3", "Gemma3", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Glm4v", "GlmOcr", "Glm4vMoe", "PaddleOCRVL",
    "InternVL", "Lfm2Vl", "Qwen3_5", "Qwen3_5Moe",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_part_is_quantized_as_a_model_of_its_own(kind: str, tmp_path: Path) -> None:
    """It computes what the whole model does with text; the tower is left out and named."""
    torch.manual_seed(0)
    model = wrapped(kind).to(torch.bfloat16).eval()
    usual = 0.0 if kind.startswith("Qwen3_5") else 1.0  # of norms; its apply 1 + weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.08 if parameter.ndim > 1 else usual + 0.1 * torch.randn_like(parameter)
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
        "left out" in note and any(part in note for part in ("vision", "visual", "multi_modal", "mlp_AR"))
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


def test_a_scaling_of_positions_is_not_lost_with_their_kinds() -> None:
    """What says that positions are of three kinds is left out; a scaling beside it stays."""
    text = {"model_type": "qwen2_5_vl_text", "hidden_size": 4}
    plain = {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "mrope_section": [4, 6, 6]}
    for key in ("rope_scaling", "rope_parameters"):
        found = text_part(plain | {"text_config": text | {key: yarn}})
        assert found[key] == {name: value for name, value in yarn.items() if name != "mrope_section"}
    usual = text | {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}}
    assert "rope_scaling" not in text_part(plain | {"text_config": usual})


def test_internvl_under_its_own_names(tmp_path: Path) -> None:
    """`llm_config`, whose head is tied or not whatever stands outside; a tower beside the language model."""
    plain = make_model(tmp_path / "plain", "Qwen3")
    expected = load_model(open_model(plain).read(), load_config(plain), CPU)(TOKENS).logits
    folder = tmp_path / "model"
    folder.mkdir()
    for file in plain.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {f"language_model.{name}": tensor for name, tensor in open_model(plain).read()}
    save_file(tensors | {"vision_model.weight": torch.zeros(3)}, folder / "model.safetensors")
    text = json.loads((plain / "config.json").read_text())
    outer = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(outer | {"llm_config": text, "vision_config": {}}))
    found = load_model(open_model(folder).read(), load_config(folder), CPU)(TOKENS).logits
    assert torch.equal(found, expected)
    made = converted(folder, [{"method": "awq", "group_size": 32, "rounding": "rtn"}], tmp_path)["awq"]
    assert verify(made, folder).sound
    assert Artifact.open(made).config["architectures"] == ["Qwen3ForCausalLM"]


def test_what_lies_twice_or_is_quantized_inside_is_refused(tmp_path: Path) -> None:
    """Under both generations' names, and where the text's own section says that it is quantized."""
    plain = make_model(tmp_path / "plain", "Qwen3")
    tensors = {
        f"model.language_model.{name.removeprefix('model.')}": tensor for name, tensor in open_model(plain).read()
    }
    text = json.loads((plain / "config.json").read_text()) | {"model_type": "qwen3_vl_text"}
    outer = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
    }
    for label, more, section, said in (
        (
            "twice",
            {"language_model.model.norm.weight": torch.ones(128)},
            {},
            "one tensor of the text model, model.norm",
        ),
        ("inside", {}, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized already"),
    ):
        folder = tmp_path / label
        folder.mkdir()
        for file in plain.glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(tensors | more, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(outer | {"text_config": text | section}))
        with pytest.raises(QtoolError, match=said):
            converted(folder, [{"method": "awq", "group_size": 32, "rounding": "rtn"}], tmp_path)
