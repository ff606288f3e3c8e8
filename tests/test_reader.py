"""What reads weights answers alike, however they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import converted

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.reader import Folder
from qtool.convert.verify.way import way_of
from qtool.runs.record import RunRecord


def test_every_format_is_read_through_the_same_questions(finished: RunRecord, tiny: Path, tmp_path: Path) -> None:
    made = converted(tiny, [{"method": "gguf", "type": "Q8_0", "imatrix": False}], tmp_path)
    kinds = set()
    for path in [*finished.folders.values(), *made.values()]:
        artifact = Artifact.open(path)
        assert artifact.manifest is not None
        weights = artifact.weights
        tensors = dict(weights.read())
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == weights.shapes()
        assert set(weights.linears()) == set(artifact.manifest.ledger)
        assert weights.nbytes == artifact.manifest.tensor_bytes
        assert sum(read().nbytes for read in weights.stored().values()) == weights.nbytes
        linear = weights.linears()[0]
        assert torch.equal(weights.codes(linear).dequantize().float(), tensors[f"{linear}.weight"])
        kinds.add(way_of(artifact).__name__.rsplit(".", 1)[-1])  # type: ignore[attr-defined]  # each way is a module
    assert kinds == {"shards", "gguf"}


def test_the_other_kind_of_file_is_not_there(finished: RunRecord) -> None:
    for path in finished.folders.values():
        artifact = Artifact.open(path)
        with pytest.raises(QtoolError, match=r"holds .*, no (safetensors|\.gguf file)"):
            _ = artifact.file if artifact.gguf is None else artifact.checkpoint


def test_a_model_that_is_not_quantized_has_no_linears(tiny: Path) -> None:
    folder = Folder(Checkpoint.open(tiny), {})
    assert folder.linears() == []
    assert dict(folder.read()).keys() == folder.checkpoint.tensors.keys()
