"""How far a server's log-probabilities are from the reference's, on 64 fixed pieces of code, token by token.

Teacher-forced: both are asked what follows each true prefix. KL(reference || server) over the tokens that the server
names plus one bucket for the rest never exceeds the full divergence (`evaluate.fidelity`).
"""

from __future__ import annotations

import copy
import importlib.resources
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.artifact import Artifact
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines.probe import Best
from qtool.evaluate.engines.torch_model import load_model, logits_of

COUNT = 20  # likeliest tokens that a server names; more it refuses (vLLM's max_logprobs)
LIMIT = 1e-3  # nats a token, where 16-bit floats round
# Of what the engine's arithmetic alone costs this model; KL goes with the square of an error, flips with the error.
# Seen on the demo model: 1.0 (llama.cpp), 4.4 (vLLM's kernel for a processor, in bfloat16); two linears
# exchanged give thousands.
FLOOR_FACTOR = 6.0
FLIPS_FACTOR = FLOOR_FACTOR**0.5
LEAST_TOP1 = 0.98
TINY = 1e-9  # a probability that no float of a server's answer tells from 0


@dataclass(frozen=True)
class Parity:
    """``kl``: mean nats a token; ``top1``: share of tokens with the same likeliest one; ``worst``: the largest KL, at
    ``prompt`` and ``position`` (of the token that is told)."""

    kl: float
    top1: float
    worst: float
    prompt: int
    position: int
    tokens: int


def prompts() -> list[str]:
    """The pieces of code: the same in every proof."""
    file = importlib.resources.files("qtool.evaluate").joinpath("data/serving_prompts.jsonl")
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def prompt_ids(tokenizer: Any, longest: int) -> list[list[int]]:
    """Token ids of each, at most ``longest``."""
    return [tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:longest] for text in prompts()]


def compare(rows: Sequence[Sequence[int]], told: Iterable[Sequence[Best]], logprobs: Iterable[Tensor]) -> Parity:
    """``told``: of each prompt's tokens but the first, what the server named; ``logprobs``: the reference's, float32
    ``[length, vocabulary]`` a prompt."""
    kls: list[tuple[float, int, int]] = []
    same = 0
    for number, (row, best, reference) in enumerate(zip(rows, told, logprobs, strict=True)):
        for position in range(1, len(row)):
            named, before = best[position - 1], reference[position - 1]
            kls.append((divergence(before, named), number, position))
            same += int(before.argmax()) == max(named, key=lambda token: named[token])
    worst = max(kls)
    mean = sum(kl for kl, _, _ in kls) / len(kls)
    return Parity(mean, same / len(kls), worst[0], worst[1], worst[2], len(kls))


def divergence(reference: Tensor, named: Best) -> float:
    """KL in nats of one token's distribution: ``reference`` log-probabilities ``[vocabulary]``."""
    tokens = list(named)
    if max(tokens) >= len(reference):
        return math.inf
    p = reference[tokens].double()
    q = torch.tensor([named[token] for token in tokens], dtype=torch.float64)
    rest_p = max(TINY, 1.0 - float(p.exp().sum()))
    rest_q = max(TINY, 1.0 - float(q.exp().sum()))
    found = float((p.exp() * (p - q)).sum()) + rest_p * (math.log(rest_p) - math.log(rest_q))
    return max(0.0, found) if math.isfinite(found) else math.inf


class Reference:
    """qtool's own reading of an artifact: its codes dequantized, float32 on the processor."""

    def __init__(self, artifact: Artifact, trust_remote_code: bool = False) -> None:
        config = load_config(artifact.path, trust_remote_code)
        self._model = load_model(artifact.read(), config, torch.device("cpu"), trust_remote_code).float()

    def logprobs(self, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Of each row, float32 ``[length, vocabulary]``."""
        return _logprobs(self._model, rows)

    def floor(self, rows: Sequence[Sequence[int]], block: int) -> Parity:
        """What an engine's arithmetic alone costs: the same model in it, against itself. ``block``: inputs of linears
        rounded to 8 bits in blocks of so many; 0: bfloat16."""
        other = copy.deepcopy(self._model)
        if block:
            for module in other.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(lambda _, inputs: (eight_bits(inputs[0], block), *inputs[1:]))
        else:
            other.to(torch.bfloat16)
        return compare(rows, map(_best, _logprobs(other, rows)), self.logprobs(rows))


def eight_bits(x: Tensor, block: int) -> Tensor:
    """``x`` ``[..., columns]`` as blocks of signed 8-bit numbers with a scale hold it; a last block may be short."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = padded.abs().amax(-1, keepdim=True).clamp_min(TINY) / 127
    rounded: Tensor = ((padded / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]
    return rounded


def _logprobs(model: nn.Module, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    ask = logits_of(model)
    for row in rows:
        yield torch.cat([part.float() for part in ask(torch.tensor(row))]).log_softmax(-1)


def _best(logprobs: Tensor) -> list[Best]:
    values, tokens = logprobs.topk(min(COUNT, logprobs.shape[-1]))
    return [dict(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]
