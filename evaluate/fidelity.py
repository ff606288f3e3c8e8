"""How far a quantized model's next-token distribution moved from its source's, on held-out text.

KL(source || quantized) in nats per token, over the source's ``TOP`` most likely tokens plus one bucket for the rest:
a lower bound of the full divergence (exact when the vocabulary is no larger), whose storage does not grow with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TOP = 2048


@dataclass(frozen=True)
class Reference:
    """The source's distribution at each position: ``tokens`` int32, ``logprobs`` float32 ``[windows, length, top]``."""

    tokens: Tensor
    logprobs: Tensor

    def save(self, path: Path) -> None:
        save_file({"tokens": self.tokens, "logprobs": self.logprobs}, path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        data = load_file(path)
        return cls(data["tokens"], data["logprobs"])


@dataclass(frozen=True)
class Divergence:
    """Means for each window, and quantiles of the KL over all tokens."""

    nll: list[float]
    kl: list[float]
    top1: list[float]
    kl_p95: float
    kl_p999: float


@torch.inference_mode()
def reference(model: nn.Module, windows: Tensor, progress: Callable[[], None] = lambda: None) -> Reference:
    """Run the source once; every artifact is compared with what is kept here. ``windows`` int64 ``[n, length]``."""
    tokens, logprobs = [], []
    for window in windows:
        logs = _logprobs(model, window)
        top = logs.topk(min(TOP, logs.shape[-1]), dim=-1)
        tokens.append(top.indices.to(torch.int32).cpu())
        logprobs.append(top.values.cpu())
        progress()
    return Reference(torch.stack(tokens), torch.stack(logprobs))


@torch.inference_mode()
def diverge(
    model: nn.Module, windows: Tensor, source: Reference, progress: Callable[[], None] = lambda: None
) -> Divergence:
    """Perplexity (as mean negative log-likelihood), KL to the source and top-1 agreement of ``model``."""
    nll, kl, top1, every = [], [], [], []
    for number, window in enumerate(windows):
        logs = _logprobs(model, window)
        targets = window[1:].to(logs.device).unsqueeze(1)
        nll.append(float(-logs[:-1].gather(1, targets).mean()))
        index = source.tokens[number].to(logs.device, torch.int64)
        divergence = bucketed_kl(source.logprobs[number].to(logs.device), logs.gather(1, index))
        every.append(divergence.cpu())
        kl.append(float(divergence.mean()))
        top1.append(float((logs.argmax(-1) == index[:, 0]).float().mean()))
        progress()
    flat = torch.cat(every)
    return Divergence(nll, kl, top1, _quantile(flat, 0.95), _quantile(flat, 0.999))


def bucketed_kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL over the listed tokens plus one bucket for the others: log-probabilities ``[n, top]`` -> ``[n]``."""
    p = p_log.exp()
    listed = (p * (p_log - q_log)).sum(-1)
    p_rest = (1 - p.sum(-1)).clamp_min(0)
    q_rest = (1 - q_log.exp().sum(-1)).clamp_min(1e-12)
    rest = torch.where(p_rest > 1e-7, p_rest * (p_rest.clamp_min(1e-12) / q_rest).log(), torch.zeros_like(p_rest))
    return (listed + rest).clamp_min(0)


def _logprobs(model: nn.Module, window: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits = model(input_ids=window.unsqueeze(0).to(device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def _quantile(values: Tensor, q: float) -> float:
    rank = min(values.numel() - 1, int(q * values.numel()))
    return float(values.sort().values[rank])
