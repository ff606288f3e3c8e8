"""What llama.cpp computes from a .gguf file, against transformers; and transformers with ggml's own roundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.convert.artifact import Artifact
from qtool.convert.skeleton import load_config
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate.engines import llama_cpp
from qtool.evaluate.engines import server as served
from qtool.evaluate.engines.torch_model import load_model


def llama_logprobs(artifact: Artifact, ids: list[int], positions: list[int], exact: bool = True) -> Tensor:
    """Log-probabilities after each of ``positions``, float32 ``[positions, vocabulary]``. ``exact``: keys and values in
    float32 and attention step by step."""
    assert artifact.gguf is not None
    vocab = int(artifact.config["vocab_size"])
    letter = load_tokenizer(artifact.path, False).encode("a")[0]  # of half a character llama-server tells nothing
    found = torch.full((len(positions), vocab), -torch.inf)
    with llama_cpp.serve(artifact.gguf, 256, exact=exact) as url:
        for row, position in zip(found, positions, strict=True):
            for token, value in served.top_logprobs(url, ids[: position + 1], vocab, letter).items():
                row[token] = value
    return found


@torch.inference_mode()
def reference_logprobs(artifact: Artifact, source: Path, ids: list[int], rounded: bool = False) -> Tensor:
    """Of transformers' model, float32 ``[tokens, vocabulary]``. ``rounded``: inputs of matrices in float16, as ggml
    rounds them where the matrix is float16; experts' are left as they are."""
    model: Any = load_model(artifact.read(), load_config(source), torch.device("cpu"))
    for module in model.modules() if rounded else ():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, taken: (taken[0].half().float(), *taken[1:]))
    logprobs: Tensor = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logprobs


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL, nats."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())
