"""Sampled tokens with noise that models share: what two models answer differs where their distributions do, and hardly
where they do not, so that fewer problems show a loss.

A token is drawn as the largest of log-probability + Gumbel noise (Maddison et al. 2014, arXiv:1411.0030). The noise of
a token is a function of the sample's seed, its place in the answer and the token's number alone: the same for source
and artifact, in every batch, on every device. Two models with distributions p and q then draw different tokens with a
probability of at most 2 TV / (1 + TV), TV being their total variation distance; drawn apart, two models that are alike
would differ nearly as often as a model from itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 32) - 1


def shared_noise(seeds: Tensor, step: int, vocabulary: int) -> Tensor:
    """Gumbel noise float64 ``[n, vocabulary]`` of the samples with these ``seeds`` int64 ``[n]`` at token ``step``."""
    key = _mixed(seeds ^ _mixed(torch.full_like(seeds, (step + 1) * 0x9E3779B9 & _WORD)))
    tokens = _mixed(torch.arange(vocabulary, dtype=torch.int64, device=seeds.device))
    uniform = (_mixed(tokens ^ key.unsqueeze(-1)).double() + 0.5) / (1 << 32)
    return -torch.log(-torch.log(uniform))


def sample(logits: Tensor, temperature: float, top_p: float, noise: Tensor) -> Tensor:
    """Tokens ``[n]`` with Gumbel ``noise [n, vocabulary]`` from the fewest likeliest tokens whose mass reaches
    ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751) of softmax(``logits [n, vocabulary]`` / temperature)."""
    scores = logits.double() / temperature
    if top_p < 1:
        probabilities, tokens = torch.softmax(scores, -1).sort(-1, descending=True)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, tokens, beyond), -torch.inf)
    return (scores + noise).argmax(-1)


def _mixed(words: Tensor) -> Tensor:
    """Words of 32 bits in int64, well stirred: Wellons' `lowbias32` (https://nullprogram.com/blog/2018/07/31/). What a
    product has beyond 64 bits is lost, and what is kept is right all the same."""
    words = (words ^ (words >> 16)) * 0x7FEB352D & _WORD
    words = (words ^ (words >> 15)) * 0x846CA68B & _WORD
    return words ^ (words >> 16)
