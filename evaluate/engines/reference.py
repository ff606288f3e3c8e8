"""The engine `reference`: any artifact, dequantized into transformers' own model. Needs no kernel of any format. A
model that does not fit into memory is read layer by layer, for log-probabilities (streamed.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qtool import QtoolError
from qtool.evaluate.engines.engine import Engine, Model, Running, Use
from qtool.evaluate.engines.facts import BF16, FP8, Q4_0, Q8_0, EngineFacts


def _dtype(device: str) -> str:
    import torch

    from qtool.evaluate.engines.torch_model import compute_dtype

    return str(compute_dtype(torch.device(device))).removeprefix("torch.")


FACTS = EngineFacts(
    name="reference",
    packages=("torch", "transformers"),
    dtype=_dtype,
    logits=True,
    layered=True,
    judged_caches=(BF16, FP8, Q8_0, Q4_0),
    simulates=True,
    rolls=True,
)


@contextmanager
def _open(model: Model, use: Use) -> Iterator[Running]:
    import torch

    from qtool.evaluate.engines.streamed import fits, open_streamed
    from qtool.evaluate.engines.torch_model import TorchModel, load_model

    if model.stream is None:
        raise QtoolError(f"{model.name}: has no weights here; use engine openai.")
    device = torch.device(use.device)
    if fits(model.config, device, model.trust_remote_code):
        loaded = load_model(model.stream(""), model.config, device, model.trust_remote_code)
        yield TorchModel(FACTS, loaded, model.tokenizer, use.condition)
    else:
        yield open_streamed(FACTS, model.stream, model.config, device, model.trust_remote_code)


ENGINE = Engine(FACTS, _open)
