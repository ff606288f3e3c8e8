"""The reference engine's logits, and how far a peer's are from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.convert.artifact import Artifact
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines.torch_model import load_model

# An exact kernel multiplies by the very float16 weights that the codes stand for, with activations rounded to
# float16 (11 bits) in each linear. Seen on SmolLM2-135M: 8e-4 after 30 layers, 2.5e-4 after 2; 0.4 when zero
# points are read one too high in one group of each row, 2 with a wrong nibble order.
MAX_RELATIVE_ERROR = 1e-2


def compute_reference(artifact: Artifact, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits [batch, length, vocabulary] of the reference engine; float32 is what it evaluates with."""
    model = load_model(artifact.read(), load_config(artifact.path), torch.device("cpu")).to(dtype)
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens, use_cache=False).logits.float()
    return logits


@dataclass(frozen=True)
class Distance:
    """How far logits are from the reference: largest difference, relative error (Frobenius), same top-1."""

    largest: float
    relative: float
    top1: float

    @classmethod
    def between(cls, logits: torch.Tensor, reference: torch.Tensor) -> Distance:
        """Compare [batch, length, vocabulary] with its reference; near ties count as the same top-1."""
        difference = logits - reference
        loss = reference.amax(-1) - reference.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
        tie = MAX_RELATIVE_ERROR * reference.square().mean().sqrt()
        relative = difference.norm() / reference.norm()
        return cls(float(difference.abs().max()), float(relative), float((loss <= tie).double().mean()))

    def __str__(self) -> str:
        return f"relative {self.relative:.1e}, largest {self.largest:.3f}, top-1 {self.top1:.2%}"
