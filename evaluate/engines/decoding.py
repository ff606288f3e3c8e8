"""Texts that a torch model goes on with, several at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from qtool.evaluate.engines.condition import Condition
from qtool.evaluate.engines.engine import Completion, Decoding, Request
from qtool.evaluate.engines.rotation import rotated_for
from qtool.evaluate.engines.sampling import sample, shared_noise

CHECK_EVERY = 8  # decoding steps between looks at the text for a stop
COMPACT_BELOW = 0.75  # finished rows leave the batch when fewer than this share of it is still running
PREFILL = 2048  # tokens of a prompt that are taken up at once: no larger scores and activations exist


class Rows:
    """Rows decoded together, padded on the left; the key/value cache grows by one position a step."""

    def __init__(
        self, model: Any, tokenizer: Any, condition: Condition, rows: list[int], encoded: list[list[int]],
        requests: Sequence[Request], decoding: Decoding,
    ) -> None:  # fmt: skip
        from qtool.evaluate.engines.cache import make_cache

        device = next(model.parameters()).device
        width = max(map(len, encoded))
        self.model, self.tokenizer, self.rows, self.decoding = model, tokenizer, rows, decoding
        self.input = torch.zeros(len(rows), width, dtype=torch.int64)
        self.mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, ids in enumerate(encoded):
            self.input[row, width - len(ids) :] = torch.tensor(ids)
            self.mask[row, width - len(ids) :] = 1
        self.input, self.mask = self.input.to(device), self.mask.to(device)
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.cache = make_cache(self.model, condition)
        self.made: list[list[int]] = [[] for _ in rows]
        self.ends = end_tokens(self.model, self.tokenizer)
        self.seeds = torch.tensor([requests[row].seed for row in rows], device=device)

    def decode(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Each row's text when it has ended."""
        limit = self.decoding.max_new_tokens
        for step in range(limit):
            following = self._forward(step)
            live = []
            for slot, token in enumerate(following):
                if self.rows[slot] < 0:
                    continue
                self.made[slot].append(token)
                ended = token in self.ends
                if ended or step + 1 == limit or (step + 1) % CHECK_EVERY == 0:
                    text = self.tokenizer.decode(self.made[slot][: -1 if ended else None], skip_special_tokens=True)
                    if ended or step + 1 == limit or requests[self.rows[slot]].finished(text):
                        yield self.rows[slot], text
                        self.rows[slot] = -1
                        continue
                live.append(slot)
            if not live:
                return
            self._next(following, live)

    @torch.inference_mode()  # not around `decode`: a generator would leave the mode on for its consumer
    def _forward(self, step: int) -> list[int]:
        behind = self.mask.shape[1] - self.input.shape[1]
        parts = zip(self.input.split(PREFILL, 1), self.positions.split(PREFILL, 1), strict=True)
        with nullcontext() if step else rotated_for(self.model, self.mask.shape[1]):
            for part, positions in parts:
                behind += part.shape[1]
                mask = self.cache.mask(part.shape[1], next(self.model.parameters()))
                output = self.model(
                    input_ids=part, attention_mask=self.mask[:, :behind] if mask is None else mask,
                    position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1,
                )  # fmt: skip
        logits = output.logits[:, -1]
        if self.decoding.temperature > 0:
            noise = shared_noise(self.seeds, step, logits.shape[-1])
            chosen = sample(logits, self.decoding.temperature, self.decoding.top_p, noise)
        else:
            chosen = logits.argmax(-1)
        tokens: list[int] = chosen.tolist()
        return tokens

    @torch.inference_mode()
    def _next(self, following: list[int], live: list[int]) -> None:
        device = self.mask.device
        self.input = torch.tensor(following, device=device).unsqueeze(1)
        self.positions = self.positions[:, -1:] + 1
        if len(live) < COMPACT_BELOW * len(self.rows):
            keep = torch.tensor(live, device=device)
            self.cache.batch_select_indices(keep)
            self.input, self.positions, self.mask = self.input[keep], self.positions[keep], self.mask[keep]
            self.seeds = self.seeds[keep]
            self.rows = [self.rows[slot] for slot in live]
            self.made = [self.made[slot] for slot in live]
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=1)


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """End-of-text ids of the tokenizer and of the model's generation_config (a chat model may have several), of its
    config where that names none: transformers' own order, and that of convert/formats/gguf/stops.py."""
    ends = {tokenizer.eos_token_id}
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            ends |= set(eos) if isinstance(eos, list) else {eos}
            break
    return ends - {None}
