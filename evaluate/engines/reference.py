"""The engine `reference`: any artifact, dequantized into transformers' own model. Needs no kernel of any format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qtool import QtoolError
from qtool.evaluate.engines.engine import Engine, Model, Running, Use
from qtool.evaluate.engines.facts import EngineFacts


def _dtype(device: str) -> str:
    import torch

    from qtool.evaluate.engines.torch_model import compute_dtype

    return str(compute_dtype(torch.device(device))).removeprefix("torch.")


FACTS = EngineFacts(name="reference", packages=("torch", "transformers"), dtype=_dtype, logits=True)


@contextmanager
def _open(model: Model, use: Use) -> Iterator[Running]:
    import torch

    from qtool.evaluate.engines.torch_model import TorchModel, load_model

    if model.stream is None:
        raise QtoolError(f"{model.name}: has no weights here; use engine openai.")
    loaded = load_model(model.stream(), model.config, torch.device(use.device), model.trust_remote_code)
    yield TorchModel(FACTS, loaded, model.tokenizer)


ENGINE = Engine(FACTS, _open)
