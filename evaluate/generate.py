"""The reference engine: any artifact, dequantized into transformers' own model, generating greedily in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool import QtoolError
from qtool.convert.checkpoint import TensorStream
from qtool.convert.skeleton import build_skeleton, expected_shapes

CHECK_EVERY = 8  # decoding steps between looks at the text for a stop
COMPACT_BELOW = 0.75  # finished rows leave the batch when fewer than this share of it is still running


def load_model(stream: TensorStream, config: Any, device: torch.device, trust_remote_code: bool = False) -> nn.Module:
    """Fill a skeleton from a stream of named tensors: float32 on the CPU, bfloat16 on an accelerator."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = build_skeleton(config, trust_remote_code)
    shapes, tied = expected_shapes(model)
    state = {name: tensor.to(device, dtype) for name, tensor in stream if name in shapes}
    missing = sorted(set(shapes) - set(state) - tied)
    if missing:
        raise QtoolError(f"the model lacks {missing[0]} ({len(missing)} tensors missing).")
    model.load_state_dict(state, strict=False, assign=True)
    if tied:
        any_model: Any = model
        any_model.tie_weights()
    return model.to(device).eval()


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    finished: Callable[[str], bool],
    on_text: Callable[[int, str], None],
) -> None:
    """Greedy continuations of ``prompts``: ``on_text(index, text)`` as each is done, similar lengths batched together.

    ``finished(text so far)`` stops a row early; an end-of-text token always does.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]), reverse=True)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _Batch(model, tokenizer, rows, [encoded[row] for row in rows])
        batch.decode(max_new_tokens, finished, on_text)


class _Batch:
    """Rows decoded together, padded on the left; the key/value cache grows by one position a step."""

    def __init__(self, model: nn.Module, tokenizer: Any, rows: list[int], encoded: list[list[int]]) -> None:
        from transformers import DynamicCache

        device = next(model.parameters()).device
        width = max(map(len, encoded))
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.input = torch.zeros(len(rows), width, dtype=torch.int64)
        self.mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, ids in enumerate(encoded):
            self.input[row, width - len(ids) :] = torch.tensor(ids)
            self.mask[row, width - len(ids) :] = 1
        self.input, self.mask = self.input.to(device), self.mask.to(device)
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        config: Any = model.config
        self.cache = DynamicCache(config=config)
        self.made: list[list[int]] = [[] for _ in rows]
        self.ends = end_tokens(model, tokenizer)

    def decode(self, limit: int, finished: Callable[[str], bool], on_text: Callable[[int, str], None]) -> None:
        for step in range(limit):
            following = self._forward().tolist()
            live = []
            for slot, token in enumerate(following):
                self.made[slot].append(token)
                ended = token in self.ends
                look = ended or step + 1 == limit or (step + 1) % CHECK_EVERY == 0
                if look:
                    text = self.tokenizer.decode(self.made[slot][: -1 if ended else None], skip_special_tokens=True)
                    ended = ended or step + 1 == limit or finished(text)
                    if ended and self.rows[slot] >= 0:
                        on_text(self.rows[slot], text)
                        self.rows[slot] = -1
                if self.rows[slot] >= 0:
                    live.append(slot)
            if not live:
                return
            self._next(following, live)

    def _forward(self) -> Tensor:
        output = self.model(
            input_ids=self.input, attention_mask=self.mask, position_ids=self.positions,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        best: Tensor = output.logits[:, -1].argmax(-1)
        return best

    def _next(self, following: list[int], live: list[int]) -> None:
        device = self.mask.device
        self.input = torch.tensor(following, device=device).unsqueeze(1)
        self.positions = self.positions[:, -1:] + 1
        if len(live) < COMPACT_BELOW * len(self.rows):
            keep = torch.tensor(live, device=device)
            self.cache.batch_select_indices(keep)
            self.input, self.positions, self.mask = self.input[keep], self.positions[keep], self.mask[keep]
            self.rows = [self.rows[slot] for slot in live]
            self.made = [self.made[slot] for slot in live]
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=1)


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """End-of-text ids of the tokenizer and of the model's configs (a chat model may have several)."""
    ends = {tokenizer.eos_token_id}
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        ends |= set(eos) if isinstance(eos, list) else {eos}
    return ends - {None}
