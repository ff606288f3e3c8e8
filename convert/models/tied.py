"""A head that config.json ties to the embedding, and what the shards hold of both.

Runtimes disagree where both are stored and differ: transformers 5 does not tie them then, vLLM and llama.cpp's files do
and never look at the stored head. So such a model is none that a format could say, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config, read_stored_config
from qtool.convert.files.wrapped_tensors import text_names
from qtool.convert.models.model_config import is_tied

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_head(checkpoint: Checkpoint, tied: bool) -> None:
    """Raises QtoolError naming both tensors where the flag and the shards do not go together. The two are read only
    where both are there, one after the other's header."""
    names = checkpoint.tensors
    if not tied:
        if HEAD not in names and EMBEDDING in names:
            raise QtoolError(
                f"{checkpoint.path}: no shard holds {HEAD}, and tie_word_embeddings of config.json is false or missing."
                f" Set it to true if the head is {EMBEDDING}; otherwise download the model again."
            )
        return
    if HEAD in names and EMBEDDING not in names:
        raise QtoolError(
            f"{checkpoint.path}: tie_word_embeddings of config.json is true, but of {EMBEDDING} and {HEAD} the shards "
            f"hold only the head. Rename it to {EMBEDDING}."
        )
    if HEAD in names and EMBEDDING in names:
        same = names[HEAD].shape == names[EMBEDDING].shape and names[HEAD].dtype == names[EMBEDDING].dtype
        if not same or not _same_bits(checkpoint):
            raise QtoolError(f"{names[HEAD].file}: {_differ()}")


def check_equal(state: Mapping[str, torch.Tensor]) -> None:
    """The same for a tied model's tensors that are loaded already."""
    head, embedding = state.get(HEAD), state.get(EMBEDDING)
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise QtoolError(_differ())


def check_folder(path: Path) -> None:
    """The same for a folder that any program may load."""
    if is_tied(read_config(path)) and any(path.glob("*.safetensors")):
        checkpoint = Checkpoint.open(path)
        check_head(checkpoint.holding(text_names(checkpoint.tensors, read_stored_config(path))), True)


def _differ() -> str:
    return (
        f"tie_word_embeddings of config.json is true, but {HEAD} and {EMBEDDING} are both stored and differ; "
        "transformers 5 uses the stored head, vLLM and llama.cpp the embedding. Set tie_word_embeddings to false in "
        "config.json if the stored head is the model's, or remove it from the shards."
    )


def _same_bits(checkpoint: Checkpoint) -> bool:
    """Bit for bit, a part at a time."""
    rows, columns = checkpoint.tensors[HEAD].shape
    step = max(1, 2**24 // max(1, columns))
    return all(
        torch.equal(*(checkpoint.part(name, first, first + step).view(torch.uint8) for name in (HEAD, EMBEDDING)))
        for first in range(0, rows, step)
    )
