"""A torch model in this process: loaded from a stream of tensors, generating in batches, timed, read out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool import QtoolError
from qtool.convert.files.checkpoint import TensorStream
from qtool.convert.files.reading import read_json
from qtool.convert.models.experts import assembled
from qtool.convert.models.family import Family
from qtool.convert.models.feeds import Shape
from qtool.convert.models.table import find_family
from qtool.convert.models.tied import check_equal
from qtool.convert.skeleton import build_skeleton, expected_shapes
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.decoding import Rows
from qtool.evaluate.engines.engine import (
    CHUNK,
    Batch,
    Completion,
    Decoding,
    Loaded,
    OutOfMemory,
    Reading,
    Request,
)
from qtool.evaluate.engines.rotation import rotated_for

MOST_TOKENS = 2**16  # of the prompts of a batch


@dataclass(frozen=True)
class TorchModel(Loaded):
    """A model that runs here, for the engine with these facts."""

    model: nn.Module
    tokenizer: Any
    condition: Condition = PLAIN

    @property
    def dtype(self) -> str:
        """Of the activations."""
        return next(str(p.dtype) for p in self.model.parameters() if p.is_floating_point()).removeprefix("torch.")

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self._device.type

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        """Similar lengths are batched together, whatever is done: a batch is repeated whole, so that each row meets
        the same neighbours (and the same rounding) as in a run that was not interrupted. Long rows meet fewer, and
        where a window rolls none: its sinks are a row's first tokens, which padding would move."""
        encoded = [self.tokenizer(request.prompt, add_special_tokens=False).input_ids for request in requests]
        order = sorted(range(len(requests)), key=lambda index: len(encoded[index]), reverse=True)
        start = 0
        while start < len(order):
            fit = max(1, MOST_TOKENS // max(1, len(encoded[order[start]])))
            size = 1 if self.condition.recent else min(decoding.batch_size, fit)
            rows = order[start : start + size]
            start += size
            if any(row not in done for row in rows):
                texts = [encoded[row] for row in rows]
                batch = Rows(self.model, self.tokenizer, self.condition, rows, texts, requests, decoding)
                yield from (found for found in batch.decode(requests) if found[0] not in done)

    def logits(self, window: Tensor) -> Iterator[Tensor]:
        """Chunk by chunk; a window longer than one goes through a key/value cache."""
        return logits_of(self.model, self.condition)(window)

    def time(self, batch: Batch) -> Reading:
        """A whole prefill, then single steps on the cache that transformers grows. Raises OutOfMemory."""
        try:
            return self._time(batch)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if self.device == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory(str(error).splitlines()[0]) from error

    @torch.inference_mode()
    def _time(self, batch: Batch) -> Reading:
        ids = torch.tensor(batch.prompts, device=self._device)
        model: Any = self.model
        sequences, tokens = len(batch.prompts), batch.tokens
        machine.reset_resident_peak()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = self._now()
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = self._now() - started
        for _ in range(tokens - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        wall = self._now() - started
        steps = ((wall - first) / (tokens - 1),) * sequences if tokens > 1 else ()
        return Reading((first,) * sequences, steps, wall, tokens * sequences, None, self._peaks())

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peaks(self) -> dict[str, int | None]:
        if self.device != "cuda":
            return {"resident": machine.resident_peak()}
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "allocated": torch.cuda.max_memory_allocated(), "device": total - free,
            "resident": machine.resident_peak(),
        }  # fmt: skip


def fill(model: nn.Module, state: Mapping[str, Tensor], wanted: set[str], tied: bool) -> None:
    """Put ``state`` in the place of a skeleton's tensors. Raises QtoolError where one that is ``wanted`` is missing."""
    missing = sorted(wanted - set(state))
    if missing:
        raise QtoolError(f"the model lacks {missing[0]} ({len(missing)} tensors missing).")
    model.load_state_dict(state, strict=False, assign=True)
    if tied:
        any_model: Any = model
        any_model.tie_weights()


def dtype_of(family: Family | None, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of computing with a tensor where a model's others are ``dtype``: what a family does not cast is widened at most,
    for some classes multiply such a router by states of the model's own dtype."""
    return dtype if family is None or family.casts(name) else torch.promote_types(tensor.dtype, dtype)


def load_model(stream: TensorStream, config: Any, device: torch.device, trust_remote_code: bool = False) -> nn.Module:
    """Fill a skeleton from a stream of named tensors: float32 on the CPU, bfloat16 on an accelerator. Answers end as
    the generation_config.json beside ``config`` says."""
    dtype = compute_dtype(device)
    model = build_skeleton(config, trust_remote_code)
    shapes, tied = expected_shapes(model)
    family = find_family({"architectures": config.architectures})
    placed: TensorStream = ((name, tensor.to(device, dtype_of(family, name, tensor, dtype))) for name, tensor in stream)
    state = {name: tensor for name, tensor in in_model_names(placed, config, shapes) if name in shapes}
    if tied:
        check_equal(state)
    fill(model, state, set(shapes) - tied, bool(tied))
    any_model: Any = model
    file = Path(config.name_or_path, "generation_config.json")
    if config.name_or_path and file.is_file() and (ends := read_json(file).get("eos_token_id")) is not None:
        any_model.generation_config.eos_token_id = ends
    return model.to(device).eval()


def in_model_names(stream: TensorStream, config: Any, shapes: Mapping[str, Shape]) -> TensorStream:
    """A stream of tensors as files hold them, as transformers' model holds them. ``shapes``: of the tensors there.
    Raises QtoolError naming an expert that is missing."""
    family = find_family({"architectures": config.architectures})
    if family is None or family.mixture is None:
        return stream
    return assembled(family.mixture, family.prefix, shapes, stream)


def compute_dtype(device: torch.device) -> torch.dtype:
    """In which unquantized weights are computed with."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def logits_of(model: nn.Module, condition: Condition = PLAIN) -> Callable[[Tensor], Iterator[Tensor]]:
    """What gives the logits of a window int64 ``[length]``: ``[chunk, vocabulary]`` for each `CHUNK` positions."""

    def logits(window: Tensor) -> Iterator[Tensor]:
        device = next(model.parameters()).device
        cache = None
        if len(window) > CHUNK or condition != PLAIN:
            from qtool.evaluate.engines.cache import make_cache  # transformers' caches take seconds to import

            cache = make_cache(model, condition)
        for start in range(0, len(window), CHUNK):
            with rotated_for(model, len(window)):
                logits = _chunk_logits(model, window[start : start + CHUNK].unsqueeze(0).to(device), cache)
            yield logits

    return logits


@torch.inference_mode()
def _chunk_logits(model: nn.Module, part: Tensor, cache: Any) -> Tensor:
    logits: Tensor
    if cache is None:
        logits = model(input_ids=part, use_cache=False).logits[0]
    else:
        mask = cache.mask(part.shape[1], next(model.parameters()))
        logits = model(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True).logits[0]
    return logits
