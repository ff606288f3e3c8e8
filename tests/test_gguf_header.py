"""The look at a .gguf header that comes before anything believes it."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import QtoolError
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.formats.gguf.header import read_header, read_value
from qtool.convert.formats.gguf.imatrix import read_imatrix

gguf: Any = pytest.importorskip("gguf")


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def head(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(
    name: bytes, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    count = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def padded(data: bytes, body: int) -> bytes:
    return data + bytes(-len(data) % 32) + bytes(body)


BOMBS = {
    "empty": (b"", "0 bytes"),
    "magic": (b"GGUE" + head(0, 0)[4:], "does not begin with GGUF"),
    "version": (head(0, 0, 9), "version 9"),
    "byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
    "keys": (head(0, 2**62), "keys and 0 tensors in 24 bytes"),
    "tensors": (head(2**60, 0), "tensors in 24 bytes"),
    "many keys of a large file": (head(0, 2**17) + bytes(2**22), "131072 keys"),
    "array": (head(0, 1) + key(b"general.x", 9, array(0, 2**62)), f"{2**62} items"),
    "array of strings": (head(0, 1) + key(b"general.x", 9, array(8, 2_000_000, bytes(64))), "go on past byte"),
    "array of doubles": (head(0, 1) + key(b"general.x", 9, array(12, 2_000_000)), "the file ends"),
    "array of arrays": (head(0, 1) + key(b"general.x", 9, array(9, 1, array(9, 1))), "type 9 of an array's items"),
    "string": (head(0, 1) + key(b"a", 8, struct.pack("<Q", 2**63)), "the file ends"),
    "string inside an array": (head(0, 1) + key(b"a", 9, array(8, 2, text(b"") + struct.pack("<Q", 2**63))), "past"),
    "key's name": (head(0, 1) + struct.pack("<Q", 2**40) + bytes(99), "a key of"),
    "no name": (head(0, 1) + key(b"", 4, bytes(4)), "a key of 0 bytes"),
    "name in no UTF-8": (head(0, 1) + key(b"\xff\xfe", 4, bytes(4)), "utf-8"),
    "value type": (head(0, 1) + key(b"general.x", 99, b""), "unknown value type 99"),
    "two keys": (head(0, 2) + 2 * key(b"a", 4, bytes(4)), "two keys 'a'"),
    "NaN": (head(0, 1) + key(b"a", 6, struct.pack("<f", float("nan"))), "a is nan"),
    "Inf": (head(0, 1) + key(b"a", 12, struct.pack("<d", float("inf"))), "a is inf"),
    "NaN in an array": (head(0, 1) + key(b"a", 9, array(6, 1, struct.pack("<f", float("nan")))), "a holds NaN"),
    "truth": (head(0, 1) + key(b"a", 7, b"\x07"), "a is 7"),
    "alignment 0": (head(0, 1) + key(b"general.alignment", 4, bytes(4)), "general.alignment 0"),
    "alignment 3": (head(0, 1) + key(b"general.alignment", 4, struct.pack("<I", 3)), "general.alignment 3"),
    "alignment 2^31": (head(0, 1) + key(b"general.alignment", 4, struct.pack("<I", 2**31)), "general.alignment"),
    "alignment as text": (head(0, 1) + key(b"general.alignment", 8, text(b"32")), "general.alignment"),
    "dimensions": (head(1, 0) + tensor(b"t", (32,), dims=2**32 - 1), "4294967295 dimensions"),
    "no dimensions": (padded(head(1, 0) + tensor(b"t", ()), 64), "0 dimensions"),
    "shape 0": (padded(head(1, 0) + tensor(b"t", (0,)), 64), "shape"),
    "shape 2^63": (padded(head(1, 0) + tensor(b"t", (2**63, 2**63)), 64), "truncated"),
    "type": (padded(head(1, 0) + tensor(b"t", kind=99), 64), "unknown type 99"),
    "blocks": (padded(head(1, 0) + tensor(b"t", (33,), kind=12), 64), "blocks of 256"),
    "offset outside": (padded(head(1, 0) + tensor(b"t", offset=2**40), 128), "truncated"),
    "offset unaligned": (padded(head(1, 0) + tensor(b"t", offset=8), 256), "offset 8"),
    "body cut": (padded(head(1, 0) + tensor(b"t", (64,)), 128), "truncated"),
    "two tensors": (padded(head(2, 0) + tensor(b"t") + tensor(b"t", offset=128), 512), "two tensors 't'"),
    "overlap": (padded(head(2, 0) + tensor(b"t", (64,)) + tensor(b"u", offset=128), 512), "u and t share bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_lies_is_refused_at_once(name: str, tmp_path: Path) -> None:
    data, said = BOMBS[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(QtoolError, match=r"m\.gguf: not a whole GGUF file") as caught:
        GgufFile.open(path, {})
    assert said in str(caught.value)
    with pytest.raises(QtoolError, match=r"m\.gguf: not an importance matrix"):
        read_imatrix(path)
    assert time.process_time() - start < 5


def test_items_that_are_really_there_are_counted_too(tmp_path: Path) -> None:
    """30 MB of small numbers: lists of Python objects would take gigabytes and minutes."""
    path = tmp_path / "m.gguf"
    path.write_bytes(head(0, 1) + key(b"general.x", 9, array(0, 30_000_000, bytes(30_000_000))))
    with pytest.raises(QtoolError, match="30000000 items"):
        GgufFile.open(path, {})
    path.write_bytes(head(0, 1) + key(b"imatrix.datasets", 9, array(8, 200_000, 200_000 * text(b"x"))))
    assert len(read_value(path, read_header(path), "imatrix.datasets")) == 200_000
    with pytest.raises(QtoolError, match="200000 items"):
        read_imatrix(path)


@pytest.mark.parametrize("read", [lambda path: GgufFile.open(path, {}), read_imatrix])
def test_special_files_are_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "pipe", "is a pipe"), (Path("/dev/zero"), "is a device"), (tmp_path, "is a folder")):
        with pytest.raises(QtoolError, match=said):
            read(path)


def test_the_header_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    import numpy

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "b\u00e9", ""])
    writer.add_token_scores([0.5, -1000.0, 0.0])
    writer.add_add_bos_token(True)
    writer.add_rope_freq_base(1e6)
    writer.add_tensor("a.weight", numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    writer.add_tensor("b", numpy.ones(5, dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, reader = read_header(path), gguf.GGUFReader(path)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            assert read_value(path, header, name) == field.contents()
    assert read_value(path, header, "tokenizer.ggml.tokens") == ["a", "b\u00e9", ""]
    assert read_value(path, header, "tokenizer.ggml.add_bos_token") is True
    assert read_value(path, header, "none") is None
    for theirs in reader.tensors:
        ours = header.tensors[theirs.name]
        assert ours.data_offset == theirs.data_offset
        assert ours.nbytes == theirs.n_bytes
        assert list(ours.shape) == list(reversed(theirs.shape))
    file = GgufFile.open(path, {})
    assert file.blocks("a.weight").dequantize().tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
