"""Plans of mixtures of experts: sizes of public models, what a token reads, experts in host memory, shared cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from moe_models import MIXTURES
from small_models import make_model

from qtool.cli import main
from qtool.convert.formats.gguf.types import tensor_types
from qtool.evaluate.engines.llama_cpp import FACTS as LLAMA_CPP
from qtool.evaluate.engines.vllm import split_faults
from qtool.sizing.accelerators import load_accelerators
from qtool.sizing.fit import Setting, estimate_of, offload_of
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import Headers, read_headers
from qtool.sizing.plan import Question, make_plan
from qtool.sizing.plan_json import as_json

COMMON: dict[str, Any] = {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6}
QWEN3_30B = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "max_position_embeddings": 262144,
}  # fmt: skip
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536,
}  # fmt: skip
OLMOE = COMMON | {
    "architectures": ["OlmoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
    "num_attention_heads": 16, "vocab_size": 50304, "num_experts": 64, "num_experts_per_tok": 8,
}  # fmt: skip
QWEN15 = COMMON | {
    "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "num_experts": 60,
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
}  # fmt: skip
MIXTRAL = COMMON | {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip


def headers(tmp_path: Path, config: dict[str, Any]) -> Headers:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return read_headers(str(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "gigabytes"),
    [(QWEN3_30B, 16.80), (QWEN3_235B, 124.05), (OLMOE, 3.90), (QWEN15, 8.36), (MIXTRAL, 24.65)],
)
def test_sizes_of_public_models_in_awq(config: dict[str, Any], gigabytes: float, tmp_path: Path) -> None:
    """Counted by hand from shapes: four bits in groups of 128, router, embeddings and head in 16 bits."""
    assert weights_of(headers(tmp_path, config), "awq").nbytes / 1e9 == pytest.approx(gigabytes, abs=0.006)


def test_the_published_file_of_qwen3_coder_30b(tmp_path: Path) -> None:
    weights = weights_of(headers(tmp_path, QWEN3_30B), "Q4_K_M")
    assert weights.nbytes / 2**20 == pytest.approx(17691, abs=1)  # published: 18.6 GB
    assert weights.bits_per_weight == pytest.approx(4.861, abs=0.0005)
    assert weights.experts / weights.layers == pytest.approx(0.969, abs=0.001)


def test_eight_experts_are_taken_for_mixtral() -> None:
    """llama.cpp gives the attention of a model with eight experts more bits, and of no other."""
    shapes: dict[str, tuple[int, ...]] = {
        "blk.0.attn_v.weight": (256, 256), "blk.0.attn_k.weight": (256, 256), "blk.0.attn_output.weight": (256, 256),
        "blk.0.attn_q.weight": (256, 256), "blk.0.ffn_gate_inp.weight": (8, 256), "output.weight": (512, 256),
        "blk.0.ffn_down_exps.weight": (8, 256, 256), "blk.0.ffn_up_exps.weight": (8, 256, 256),
        "blk.0.ffn_down_shexp.weight": (256, 256),
    }  # fmt: skip
    found = {name: typed.type for name, typed in tensor_types(shapes, "Q4_K_M", 8, experts=8).items()}
    assert [found[f"blk.0.attn_{part}.weight"] for part in ("v", "k", "output", "q")] == [
        "Q8_0",
        "Q8_0",
        "Q5_K",
        "Q4_K",
    ]
    assert found["blk.0.ffn_gate_inp.weight"] == "F32"
    assert found["blk.0.ffn_down_exps.weight"] == found["blk.0.ffn_down_shexp.weight"] == "Q6_K"
    assert found["blk.0.ffn_up_exps.weight"] == "Q4_K"
    other = {name: typed.type for name, typed in tensor_types(shapes, "Q4_K_M", 8, experts=16).items()}
    assert [other[f"blk.0.attn_{part}.weight"] for part in ("v", "k", "output")] == ["Q6_K", "Q4_K", "Q4_K"]
    large = {name: typed.type for name, typed in tensor_types(shapes, "Q6_K", 8, experts=8).items()}
    assert large["blk.0.attn_v.weight"] == "Q8_0"
    assert large["blk.0.attn_output.weight"] == "Q6_K"


@pytest.mark.slow
def test_a_token_reads_its_own_experts(tmp_path: Path) -> None:
    """3.35 of 30.53 billion weights; a step of many sequences reads more of them, at most all."""
    found = headers(tmp_path, QWEN3_30B)
    geometry = found.geometry
    assert geometry.idle / 1e9 == pytest.approx(27.18, abs=0.01)
    awq = weights_of(found, "awq")
    assert awq.read(1.0) == awq.layers
    assert awq.read(geometry.expert_share) / 1e9 == pytest.approx(1.44, abs=0.02)
    assert geometry.experts_met(1) == pytest.approx(8 / 128)
    assert geometry.experts_met(2) == pytest.approx(1 - (120 / 128) ** 2)
    (card,) = (card for card in load_accelerators().values() if card.key == "RTX3090")
    plan = make_plan(found, Question([card], contexts=(8192,), formats=("awq",)))
    assert any("8 of 128 work on a token, 3.35 of 30.53 billion weights" in note for note in plan.notes)
    assert as_json(plan)["experts"] == {"of_a_layer": 128, "active": 8, "idle_parameters": geometry.idle}
    one, eight = (next(c for c in plan.answers[0].cells if c.sequences == n) for n in (1, 8))
    assert one.step.best < 2.1e9 / card.bandwidth * 1.5  # two gigabytes, not seventeen
    assert one.step.slow is not None
    assert eight.step.slow is not None
    assert eight.step.slow > 2 * one.step.slow


def test_experts_go_to_host_memory_before_whole_layers(tmp_path: Path) -> None:
    (card,) = (card for card in load_accelerators().values() if card.key == "RTX3090")
    found = headers(tmp_path, QWEN3_30B)
    setting = Setting(found.geometry, weights_of(found, "Q8_0"), LLAMA_CPP, card, kv_dtype="f16")
    offload = offload_of(setting, 8192, 1)
    assert offload is not None
    count = int(offload.flag.removeprefix("-ngl 99 --n-cpu-moe "))
    over = estimate_of(setting, 8192, 1).total - setting.limit
    layer = setting.weights.experts // 48
    assert count == -(-over // layer)
    assert offload.moved == count * layer
    assert "the experts of 14 of 48 layers" in offload.why
    assert offload.step.best < 0.02  # whole layers would take a tenth of a second of 80 GB/s


def test_cards_share_experts_only_where_groups_fit(tmp_path: Path) -> None:
    """An expert 768 wide: groups of 128 on one or two cards, of 64 on four, of 32 on eight."""
    geometry = headers(tmp_path, QWEN3_30B).geometry
    fit = {
        group: [cards for cards in (1, 2, 4, 8) if not split_faults(geometry, group, cards)] for group in (128, 64, 32)
    }
    assert fit == {128: [1, 2], 64: [1, 2, 4], 32: [1, 2, 4, 8]}
    assert split_faults(geometry, 128, 4) == [
        "an expert's down_proj: 768 columns / 4 do not divide by the group size 128"
    ]
    shared = headers(tmp_path, QWEN15 | {"shared_expert_intermediate_size": 100}).geometry
    assert split_faults(shared, 1, 8) == ["the shared expert's width 100 does not divide by 8"]


def test_a_dry_run_has_one_row_for_all_experts_alike(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "Qwen3Moe", **MIXTURES["Qwen3Moe"])
    outputs = [{"method": "gptq", "group_size": 32}]
    recipe = {"model": str(model), "calibration": {"text": "qtool-code", "length": 64}, "outputs": outputs}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    said = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["run", str(tmp_path / "r.yaml"), "--dry-run", "--full"])
    assert said.exit_code == 0, said.output
    (row,) = [line for line in said.output.splitlines() if "experts" in line and "up_proj" in line]
    assert " 12 " in row  # six experts in two layers; the third is dense
