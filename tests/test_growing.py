"""A file's sha256 is made while the file grows, whatever the order of its tensors, and is never wrong."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest
import torch

from qtool.convert.files import growing, watch
from qtool.convert.files.shards import open_shards
from qtool.convert.files.writer import FINAL, Layout, Place, Spec, TensorWriter

SPECS: dict[str, Spec] = {
    f"{layer}.{name}": (dtype, (3, 5 + layer))
    for layer in range(12)
    for name, dtype in (("a", torch.float16), ("b", torch.int32), ("c", torch.uint8))
}


def tensors(layer: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    names = [name for name in SPECS if name.startswith(f"{layer}.")]
    return {name: torch.randint(0, 100, SPECS[name][1], generator=generator).to(SPECS[name][0]) for name in names}


def write_layer(writer: TensorWriter, layer: int, commit: bool = True) -> None:
    for name, tensor in tensors(layer).items():
        writer.write(name, tensor)
    if commit:
        writer.commit({"layer": layer})


def plain(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that `sha256_file` has read."""
    seen: list[Path] = []
    whole = watch.open_file

    def opened(path: Path, *limits: int) -> object:
        seen.append(path)
        return whole(path, *limits)

    monkeypatch.setattr(watch, "open_file", opened)
    monkeypatch.setattr(watch, "_known", {})
    return seen


@pytest.mark.parametrize("max_shard", [200, 100_000])
def test_no_file_is_read_again_after_its_last_tensor(tmp_path: Path, unread: list[Path], max_shard: int) -> None:
    """That it is opened is how `sha256_file` learns its stamp; what it gives is what it was told."""
    writer = open_shards(tmp_path, SPECS, "key", max_shard=max_shard)
    for layer in range(12):
        write_layer(writer, layer)
    writer.close()
    writer.wait()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == (12 if max_shard == 200 else 1) or max_shard == 200
    known = dict(watch._known)
    assert sorted(known.values()) == sorted(map(plain, shards))
    for path in shards:
        found = os.stat(path)
        watch._known[found.st_dev, watch.stamp_of(path)] = "told"
        assert watch.sha256_file(path) == "told"


def test_most_is_hashed_before_the_last_layer(tmp_path: Path) -> None:
    """In the order of the file: of one that lies as it is written all but the last layer."""
    size = 1000
    places = {str(i): Place("m", 100 + i * size, (torch.uint8, (size,))) for i in range(10)}
    writer = TensorWriter(tmp_path, Layout({"m": bytes(100)}, {"m": 100 + 10 * size}, places, "m.journal.jsonl"), "k")
    (file,) = writer._digests._files.values()
    for i in range(9):
        writer.write(str(i), torch.full((size,), i, dtype=torch.uint8))
        writer.commit({"layer": i})
        writer.wait()
        assert file.hashed == 100 + (i + 1) * size
    writer.write("9", torch.zeros(size, dtype=torch.uint8))
    writer.close()
    writer.wait()
    assert watch.sha256_file(tmp_path / "m") == plain(tmp_path / "m")


def test_what_is_not_durable_is_not_hashed(tmp_path: Path) -> None:
    writer = open_shards(tmp_path, SPECS, "key")
    (file,) = writer._digests._files.values()
    for layer in range(12):
        write_layer(writer, layer, commit=False)
    writer._digests.follow()
    writer.wait()
    assert file.hashed == file.cuts[0]  # the header
    writer.release()


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_writes_rewrites_and_kills_gives_the_files_own_digest(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    writer = open_shards(tmp_path, SPECS, "key", max_shard=rng.choice([200, 600, 100_000]))
    limit = max(writer._layout.sizes.values())
    layer = 0
    while layer < 12:
        write_layer(writer, layer)
        layer += 1
        if rng.random() < 0.3:  # an earlier layer once more, with other numbers first
            name = f"{rng.randrange(layer)}.b"
            writer.write(name, torch.zeros(SPECS[name][1], dtype=torch.int32))
            writer.write(name, tensors(int(name.split(".")[0]))[name])
        if rng.random() < 0.3:  # killed, and gone on with from the journal
            writer.release()
            writer = open_shards(tmp_path, SPECS, "key", max_shard=100_000 if limit > 1000 else 200)
            if not writer.steps:
                layer = 0
    writer.close()
    writer.wait()
    for path in tmp_path.glob("*.safetensors"):
        assert watch.sha256_file(path) == plain(path)


def test_a_resumed_run_hashes_what_the_journal_says_is_final(tmp_path: Path) -> None:
    writer = open_shards(tmp_path, SPECS, "key")
    for layer in range(6):
        write_layer(writer, layer)
    writer.release()
    again = open_shards(tmp_path, SPECS, "key")
    assert again.steps == [{"layer": layer} for layer in range(6)]
    assert FINAL in again.journal_path.read_text()
    (file,) = again._digests._files.values()
    assert file.cuts[0] < file.reached < file.cuts[-1]
    for layer in range(6, 12):
        write_layer(again, layer)
    again.wait()
    assert file.hashed == file.cuts[-1]
    again.close()
    again.wait()
    assert watch.sha256_file(tmp_path / "model.safetensors") == plain(tmp_path / "model.safetensors")


def test_a_tensor_that_is_written_again_is_hashed_again(tmp_path: Path) -> None:
    writer = open_shards(tmp_path, SPECS, "key")
    for layer in range(12):
        write_layer(writer, layer)
    writer.wait()
    (file,) = writer._digests._files.values()
    assert file.hashed == file.cuts[-1]
    writer.write("0.a", torch.ones(SPECS["0.a"][1], dtype=torch.float16))
    writer.commit({"layer": 12})
    writer.close()
    writer.wait()
    assert watch.sha256_file(tmp_path / "model.safetensors") == plain(tmp_path / "model.safetensors")


def test_a_file_that_somebody_touches_is_read(tmp_path: Path) -> None:
    writer = open_shards(tmp_path, SPECS, "key")
    for layer in range(12):
        write_layer(writer, layer)
    writer.close()
    writer.wait()
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert watch.sha256_file(path) == plain(path)


def test_a_stopped_writer_ends_its_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    whole = growing.os.preadv

    def slow(*args: object) -> int:
        begun.set()
        go.wait(0.01)
        return whole(*args)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(growing, "CHUNK", 1)
    monkeypatch.setattr(growing.os, "preadv", slow)
    writer = open_shards(tmp_path, SPECS, "key")
    for layer in range(12):
        write_layer(writer, layer)
    assert begun.wait(5)
    writer.release()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hashing")]


def test_several_threads_write(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    writer = open_shards(tmp_path, SPECS, "key", max_shard=300)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda layer: write_layer(writer, layer, commit=False), range(12)))
    writer.commit({"layer": 0})
    writer.close()
    from qtool.convert.files.checkpoint import Checkpoint

    found = dict(Checkpoint.open(tmp_path).read())
    for layer in range(12):
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(layer).items())
