"""IQuest-Coder's Loop as a model of transformers, which has no class for it: Llama's layers, passed several times.

A token passes through all layers, then through all of them again (``loop_num`` times), with no norm in between. The
first pass, turn 0, is Llama's. In a later turn every head attends twice with its query: to the keys and values that
turn 0 made in this layer (all of them), and to those of its own turn (the last ``loop_window_size`` positions); a gate
that reads the turned query mixes both. Source: vLLM models/iquest_loopcoder.py; the models' own code computes the same.

Turns may lie side by side in one tensor, ``[batch, turns * length, hidden]``: a layer then passes them one after the
other, and every matrix meets the inputs of all turns at once. So the walk calibrates a looped model a layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as llama

Masks = tuple[Tensor | None, Tensor | None]
"""bool ``[batch or 1, 1, queries, keys]``: of attention to all before, and to a window; None: as many queries as keys,
each attends to all before."""


class IQuestLoopCoderConfig(LlamaConfig):  # type: ignore[misc]  # transformers is not typed
    """As configuration_iquestloopcoder.py beside the models has it."""

    model_type = "iquestloopcoder"
    loop_num: int = 2
    loop_window_size: int = 64


class LoopGate(nn.Module):
    """How much of a head's attention is to the first turn's keys: the sigmoid of a product with its query."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.bias = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(self, query: Tensor) -> Tensor:
        """``[batch, heads, length, dim]`` -> ``[batch, heads, length, 1]``."""
        return torch.sigmoid(torch.einsum("bhld,hd->bhl", query, self.weight) + self.bias[:, None]).unsqueeze(-1)


class LoopAttention(llama.LlamaAttention):  # type: ignore[misc]  # transformers is not typed
    """Attention of some turns."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Masks,
        past_key_values: Any = None,
        turns: Sequence[int] = (0,),
        gate: LoopGate | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``hidden_states [batch, turns * length, hidden]``; ``position_embeddings`` are of one turn."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = [each(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projections]
        parts = zip(turns, *(each.chunk(len(turns), 2) for each in heads), strict=True)
        made: list[Tensor] = []
        first: tuple[Tensor, Tensor] | None = None
        for turn, query, key, value in parts:
            query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
            if past_key_values is not None:
                place = turn * self.config.num_hidden_layers + self.layer_idx
                key, value = past_key_values.update(key, value, place)
            if turn == 0:
                first = key, value
                made.append(_attend(query, key, value, attention_mask[0]))
                continue
            if first is None:
                held = past_key_values.layers[self.layer_idx]
                first = held.keys, held.values
            assert gate is not None
            share = gate(query)
            before = _attend(query, *first, attention_mask[0])
            made.append(share * before + (1 - share) * _attend(query, key, value, attention_mask[1]))
        return self.o_proj(torch.cat(made, 2).transpose(1, 2).flatten(2)), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


class LoopLayer(llama.LlamaDecoderLayer):  # type: ignore[misc]  # transformers is not typed
    """Llama's layer, whose attention knows of turns."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = LoopAttention(config, layer_idx)


class LoopModel(llama.LlamaModel):  # type: ignore[misc]  # transformers is not typed
    """Embedding, layers that are passed several times, and the final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(LoopLayer(config, index) for index in range(config.num_hidden_layers))
        self.gate_projections = nn.ModuleList(LoopGate(config) for _ in self.layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        side_by_side: bool = False,
        **_: Any,
    ) -> Any:
        """With ``side_by_side`` all layers are passed with turn 0 alone, then with turns 0 and 1, and so on, each time
        from the beginning and without a cache: a turn begins where the last pass has ended."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if past_key_values is not None or side_by_side else DynamicCache()
        seen = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device).unsqueeze(0)
        shared = {
            "position_embeddings": self.rotary_emb(hidden, position_ids=position_ids),
            "attention_mask": _masks(attention_mask, hidden, seen, self.config.loop_window_size),
            "past_key_values": cache,
        }
        begun = hidden
        for turn in range(self.config.loop_num):
            turns = tuple(range(turn + 1)) if side_by_side else (turn,)
            for layer, gate in zip(self.layers, self.gate_projections, strict=True):
                hidden = layer(hidden, turns=turns, gate=gate, **shared)
            if side_by_side and turn + 1 < self.config.loop_num:
                hidden = begun = torch.cat([begun, hidden[:, -shared["position_embeddings"][0].shape[1] :]], 1)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=cache if use_cache is not False else None
        )


def _masks(attention_mask: Tensor | None, hidden: Tensor, seen: int, window: int) -> Masks:
    """``attention_mask [batch, keys]``: 0 where a row is filled up on its left; such a position sees itself."""
    queries = hidden.shape[1]
    keys = torch.arange(seen + queries, device=hidden.device)
    ago = keys[seen:, None] - keys
    plain = attention_mask is None and not seen
    if plain and queries <= window:
        return None, None
    allowed = (ago >= 0)[None, None]
    near = allowed & (ago < window)
    if attention_mask is not None:
        real = attention_mask[:, None, None, : len(keys)].bool()
        allowed, near = (mask & real | (ago == 0) for mask in (allowed, near))
    return (None if plain else allowed), near


class IQuestLoopCoderForCausalLM(LlamaForCausalLM):  # type: ignore[misc]  # transformers is not typed
    """The model as config.json's `architectures` names it."""

    config_class = IQuestLoopCoderConfig

    def __init__(self, config: Any) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LoopModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> type[nn.Module]:
    """Tell transformers of the class; may be called again."""
    AutoConfig.register(IQuestLoopCoderConfig.model_type, IQuestLoopCoderConfig, exist_ok=True)
    AutoModelForCausalLM.register(IQuestLoopCoderConfig, IQuestLoopCoderForCausalLM, exist_ok=True)
    return IQuestLoopCoderForCausalLM
