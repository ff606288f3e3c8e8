"""How far a quantized model's next-token distribution moved from its source's, on held-out text.

KL(source || quantized) in nats per token. The source runs once; kept at each position are its likeliest tokens, on
disk, for all artifacts. KL over those tokens plus one bucket for the rest never exceeds the full divergence (the
data-processing inequality); where the vocabulary is no larger than what is kept, it is exact.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qtool import QtoolError
from qtool.convert.files.checkpoint import TensorStream
from qtool.convert.files.durable import naming, whole_folder
from qtool.evaluate.engines.engine import CHUNK
from qtool.evaluate.engines.torch_model import logits_of

TOP = 2048  # tokens kept at a position
BUDGET = 2**30  # bytes on disk for one reference: fewer are kept where TOP would need more
BINS = 64  # of kl_by_position
Logits = Callable[[Tensor], Iterator[Tensor] | None]  # a window -> its logits in chunks: a running model's


@dataclass(frozen=True)
class Reference:
    """The source's distributions in ``folder``, a file for each chunk, mapped into memory when read.

    ``logprobs``: float32 ``[positions, kept]``, the largest first, with ``tokens`` int32 beside them. Exact ones are
    ``[positions, vocabulary]`` in the order of the vocabulary, without ``tokens``.
    """

    folder: Path

    def fault(self, windows: Tensor) -> str:
        """What is wrong with it as the source's distributions over ``windows`` int64 ``[n, length]``; "" for nothing.
        Reads it once: no probability is more than one, none is left over."""
        for window in range(windows.shape[0]):
            for start in range(0, windows.shape[1], _chunk_length(windows.shape[1])):
                name = _file(window, start)
                if not (self.folder / name).is_file():
                    return f"{name} is missing"
                try:
                    tokens, logs = self.chunk(window, start)
                except (SafetensorError, OSError, ValueError) as error:
                    return f"{name}: {error}"
                positions = min(_chunk_length(windows.shape[1]), windows.shape[1] - start)
                shape = logs.ndim == 2 and len(logs) == positions and (tokens is None or tokens.shape == logs.shape)
                if not shape or logs.dtype != torch.float32 or (tokens is not None and tokens.dtype != torch.int32):
                    return f"{name} is of another shape"
                least = 0.999 if tokens is None else 0.0
                total = logs.double().exp().sum(-1)
                if not bool(((total <= 1.001) & (total > least)).all()):
                    return f"{name} holds no probabilities"
        return ""

    def chunk(self, window: int, start: int) -> tuple[Tensor | None, Tensor]:
        """(tokens, or None for the whole vocabulary; log-probabilities) of the chunk at ``start``."""
        with safe_open(self.folder / _file(window, start), framework="pt") as file:
            names = file.keys()
            return file.get_tensor("tokens") if "tokens" in names else None, file.get_tensor("logprobs")


@dataclass(frozen=True)
class Divergence:
    """Means for each window, quantiles over all tokens, and the mean KL of each bin of ``position_bin`` positions.
    ``kept``: source tokens at a position; 0 = all, exact."""

    nll: list[float]
    kl: list[float]
    top1: list[float]
    kl_p95: float
    kl_p999: float
    kl_by_position: list[float]
    position_bin: int
    kept: int


def kept_tokens(vocabulary: int, positions: int) -> int:
    """How many tokens a reference of ``positions`` keeps at each: all of a small vocabulary, else TOP, less where
    BUDGET (8 bytes each) demands it, never under 64."""
    if vocabulary <= TOP and 4 * vocabulary * positions <= BUDGET:
        return vocabulary
    return min(vocabulary, TOP, max(64, BUDGET // (8 * positions)))


@torch.inference_mode()
def make_reference(
    logits: Logits, windows: Tensor, folder: Path, progress: Callable[[], None] = lambda: None,
    kept: int | None = None,
) -> Reference:  # fmt: skip
    """Run the source over ``windows`` int64 ``[n, length]``; ``folder`` is whole or absent."""
    with whole_folder(folder) as partial:
        for number, window in enumerate(windows):
            write_reference(logprobs(logits, window), number, partial, windows.numel(), kept)
            progress()
    return Reference(folder)


def write_reference(
    chunks: Iterable[tuple[int, Tensor]], number: int, folder: Path, positions: int, kept: int | None = None
) -> None:
    """Into ``folder`` the source's distributions at some chunks of window ``number``: (start, log-probabilities) of
    each. ``positions``: of the whole reference."""
    for start, logs in chunks:
        count = kept or kept_tokens(logs.shape[-1], positions)
        tensors = {"logprobs": logs.cpu()}
        if count < logs.shape[-1]:
            top = logs.topk(count, dim=-1)
            tensors = {"tokens": top.indices.to(torch.int32).cpu(), "logprobs": top.values.cpu()}
        _write(tensors, folder / _file(number, start))


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    with naming(path):
        try:
            save_file(tensors, path)
        except SafetensorError as error:  # its words for a full disk
            raise OSError(errno.EIO, str(error)) from error


@torch.inference_mode()
def diverge(
    logits: Logits, windows: Tensor, source: Reference, progress: Callable[[], None] = lambda: None
) -> Divergence:
    """Perplexity (as mean negative log-likelihood), KL to the source and top-1 agreement of ``logits``' model."""
    length = windows.shape[1]
    nll, top1, kept = [], [], 0
    every = torch.empty(windows.shape)
    for number, window in enumerate(windows):
        loss, agreed = 0.0, 0
        for start, logs in logprobs(logits, window):
            end = start + len(logs)
            targets = window[start + 1 : end + 1].to(logs.device).unsqueeze(1)
            loss -= float(logs[: len(targets)].gather(1, targets).sum(dtype=torch.float64))
            tokens, p_log = source.chunk(number, start)
            every[number, start:end], best = compare(tokens, p_log, logs)
            agreed += int((logs.argmax(-1).cpu() == best).sum())
            kept = 0 if tokens is None else tokens.shape[1]
        nll.append(loss / (length - 1))
        top1.append(agreed / length)
        progress()
    size = -(-length // BINS)
    means = every.double().mean(0)
    return Divergence(
        nll, every.double().mean(1).tolist(), top1, _quantile(every.flatten(), 0.95), _quantile(every.flatten(), 0.999),
        [float(part.mean()) for part in means.split(size)], size, kept,
    )  # fmt: skip


@torch.inference_mode()
def diverge_by_layer(
    model: nn.Module, prefix: str, stream: TensorStream, windows: Tensor, source: Reference,
    progress: Callable[[], None] = lambda: None,
) -> list[float]:  # fmt: skip
    """Mean KL with one layer at a time replaced by the artifact's. ``model`` holds the source and holds it again
    afterwards; ``stream`` is the artifact's: beside the model only the layers that it has not completed are in memory.
    A layer's scales must be folded into that layer alone. Raises QtoolError where the stream lacks a layer."""
    layers: Any = model.get_submodule(prefix.rstrip("."))
    errors: dict[int, float] = {}
    for index, state in _layers(stream, prefix, layers):
        layer = layers[index]
        original = dict(layer.state_dict())
        layer.load_state_dict({n: t.to(original[n].device, original[n].dtype) for n, t in state.items()}, assign=True)
        total = 0.0
        for number, window in enumerate(windows):
            for start, logs in logprobs(logits_of(model), window):
                tokens, p_log = source.chunk(number, start)
                total += float(compare(tokens, p_log, logs)[0].double().sum())
        errors[index] = total / windows.numel()
        layer.load_state_dict(original, assign=True)
        progress()
    if len(errors) != len(layers):
        raise QtoolError(f"the artifact lacks layer {next(i for i in range(len(layers)) if i not in errors)}.")
    return [errors[index] for index in range(len(layers))]


def _layers(stream: TensorStream, prefix: str, layers: Any) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each layer of the stream as soon as it is complete."""
    growing: dict[int, dict[str, Tensor]] = {}
    inside = ((name.removeprefix(prefix), tensor) for name, tensor in stream if name.startswith(prefix))
    for number, group in groupby(inside, key=lambda item: int(item[0].split(".", 1)[0])):
        growing.setdefault(number, {}).update((name.split(".", 1)[1], tensor) for name, tensor in group)
        if set(growing[number]) >= set(layers[number].state_dict()):
            state = growing.pop(number)
            yield number, {name: state[name] for name in layers[number].state_dict()}


def compare(tokens: Tensor | None, p_log: Tensor, q_log: Tensor) -> tuple[Tensor, Tensor]:
    """(KL at each position, the source's likeliest token), on the CPU, of `Reference.chunk` and of a model."""
    p_log = p_log.to(q_log.device)
    if tokens is None:
        return (p_log.exp() * (p_log - q_log)).sum(-1).clamp_min(0).cpu(), p_log.argmax(-1).cpu()
    index = tokens.to(q_log.device, torch.int64)
    return bucketed_kl(p_log, q_log.gather(1, index)).cpu(), tokens[:, 0].to(torch.int64)


def bucketed_kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL over the listed tokens plus one bucket for the others: log-probabilities ``[n, top]`` -> ``[n]``."""
    p = p_log.exp()
    listed = (p * (p_log - q_log)).sum(-1)
    p_rest = (1 - p.sum(-1)).clamp_min(0)
    q_rest = (1 - q_log.exp().sum(-1)).clamp_min(1e-12)
    rest = torch.where(p_rest > 1e-7, p_rest * (p_rest.clamp_min(1e-12) / q_rest).log(), torch.zeros_like(p_rest))
    return (listed + rest).clamp_min(0)


def logprobs(logits: Logits, window: Tensor, starts: Sequence[int] | None = None) -> Iterator[tuple[int, Tensor]]:
    """(start, float32 log-probabilities ``[chunk, vocabulary]``): every chunk sees all that precedes it. ``starts``:
    where the chunks begin that ``logits`` gives, where these are not all."""
    chunks = logits(window)
    if chunks is None:
        raise QtoolError("perplexity and KL need all logits, which this engine does not give; take engine reference.")
    every = range(0, len(window), CHUNK) if starts is None else starts
    for start, chunk in zip(every, chunks, strict=True):
        yield start, torch.log_softmax(chunk.float(), dim=-1)


def _chunk_length(length: int) -> int:
    return min(length, CHUNK)


def _file(window: int, start: int) -> str:
    return f"{window:05}-{start:07}.safetensors"


def _quantile(values: Tensor, q: float) -> float:
    rank = min(values.numel() - 1, int(q * values.numel()))
    return float(values.sort().values[rank])
