"""Small models with mixtures of experts: what changes of `small_models.make_model` for each architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from qtool.quantize.methods import on_grid
from qtool.quantize.methods.method import LayerCodes

MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 3,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "norm_topk_prob": True,
    },
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 64},
    "Qwen2Moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 96, "norm_topk_prob": False,
        "tie_word_embeddings": False,
    },
    "Glm4Moe": {
        "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "num_hidden_layers": 3, "routed_scaling_factor": 1.5, "use_qk_norm": True,
        "attention_bias": True, "norm_topk_prob": True,
    },
    "Mellum": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 3,
        "mlp_layer_types": ["sparse", "dense", "sparse"], "sliding_window": 16, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "MiniMaxM2": {
        "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "HYV3": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 3,
        "num_shared_experts": 1, "router_scaling_factor": 1.5, "tie_word_embeddings": False,
    },
    "HunYuanMoEV1": {
        "num_experts": 6, "moe_topk": 2, "intermediate_size": 64, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "Laguna": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_hidden_layers": 3,
        "shared_expert_intermediate_size": 96, "moe_routed_scaling_factor": 1.5, "sliding_window": 16,
        "num_attention_heads_per_layer": [4, 6, 4], "tie_word_embeddings": False,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "Ernie4_5_Moe": {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 64, "num_hidden_layers": 3,
        "moe_num_shared_experts": 1, "tie_word_embeddings": False,
    },
    "Qwen3_5Moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "tie_word_embeddings": False,
        "shared_expert_intermediate_size": 96,
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
        "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "Qwen3Next": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "tie_word_embeddings": False,
        "shared_expert_intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [1],
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
        "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "Olmoe": {
        "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64, "num_key_value_heads": 4,
        "norm_topk_prob": False, "tie_word_embeddings": False,
    },
}  # fmt: skip


def seen_statistics(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """What methods on a grid are given for each layer from now on, copied before they work on it."""
    seen: list[Mapping[str, Any]] = []
    original = on_grid.quantize_layer

    def spy(method: Any, feeds: Any, weights: Any, statistics: Any, *rest: Any) -> LayerCodes:
        seen.append(copy.deepcopy(dict(statistics)))
        return original(method, feeds, weights, statistics, *rest)

    monkeypatch.setattr(on_grid, "quantize_layer", spy)
    return seen
