"""Safetensors files as literal bytes, through the safetensors library, and resumed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.shards import open_shards
from qtool.convert.files.writer import Spec, TensorWriter

SPECS: dict[str, Spec] = {
    "a.weight": (torch.float16, (2, 3)),
    "b.codes": (torch.int32, (2,)),
    "c.scale": (torch.bfloat16, (4,)),
}
TENSORS = {
    "a.weight": torch.arange(6).reshape(2, 3).half(),
    "b.codes": torch.tensor([1, -1], dtype=torch.int32),
    "c.scale": torch.tensor([1.0, 0.5, 2.0, -1.0]).bfloat16(),
}


def fill(writer: TensorWriter) -> None:
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.commit({"layer": 0})
    writer.close()


def test_literal_bytes(tmp_path: Path) -> None:
    fill(open_shards(tmp_path, SPECS, "key"))
    data = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}
    assert header["b.codes"] == {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}
    assert header["a.weight"] == {"dtype": "F16", "shape": [2, 3], "data_offsets": [8, 20]}
    assert header["c.scale"] == {"dtype": "BF16", "shape": [4], "data_offsets": [20, 28]}
    body = data[8 + length :]
    assert body[:8] == b"\x01\x00\x00\x00\xff\xff\xff\xff"
    assert body[8:20] == struct.pack("<6e", 0, 1, 2, 3, 4, 5)
    assert body[20:28] == bytes.fromhex("803f003f004080bf")


@pytest.mark.parametrize("max_shard", [10, 10_000])
def test_the_safetensors_library_reads_it(tmp_path: Path, max_shard: int) -> None:
    fill(open_shards(tmp_path, SPECS, "key", max_shard=max_shard))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == (3 if max_shard == 10 else 1)
    found = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    read = dict(Checkpoint.open(tmp_path).read())
    assert read.keys() == TENSORS.keys()


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    writer = open_shards(tmp_path, SPECS, "key")
    with pytest.raises(ValueError, match="planned"):
        writer.write("a.weight", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="planned"):
        writer.write("a.weight", torch.zeros(3, 2).half())
    writer.close()


def test_finished_steps_survive_and_a_torn_line_does_not(tmp_path: Path) -> None:
    writer = open_shards(tmp_path, SPECS, "key")
    writer.write("a.weight", TENSORS["a.weight"])
    writer.commit({"layer": 0})
    writer.close()
    with writer.journal_path.open("a") as file:
        file.write('{"layer": 1')  # killed in the middle of a line
    again = open_shards(tmp_path, SPECS, "key")
    assert again.steps == [{"layer": 0}]
    again.write("b.codes", TENSORS["b.codes"])
    again.write("c.scale", TENSORS["c.scale"])
    again.commit({"layer": 1})
    again.close()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in Checkpoint.open(tmp_path).read())


def test_another_key_or_another_plan_starts_over(tmp_path: Path) -> None:
    for key, specs in (("other", SPECS), ("key", SPECS | {"d": (torch.int32, (1,))})):
        first = open_shards(tmp_path, SPECS, "key")
        first.commit({"layer": 0})
        first.close()
        second = open_shards(tmp_path, specs, key)
        assert second.steps == []
        second.close()


def test_the_space_is_reserved_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from qtool import QtoolError

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(QtoolError, match="No space left on device") as error:
        open_shards(tmp_path, SPECS, "key")
    assert error.value.exit_code == 3
