"""Layers are written behind the walk: matrices of all outputs side by side, each output's layers in order, and no
layer is noted of which a part is missing or wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.files import workers as pools
from qtool.convert.formats import autoawq
from qtool.convert.formats.codes import UniformCodes
from qtool.convert.formats.plan import LinearPlan, OutputPlan
from qtool.convert.formats.shards import Shards, ShardTensors
from qtool.make.lane import Lane
from qtool.make.writer import OutputWriter
from qtool.make.writing import writing
from qtool.quantize.methods.method import LayerCodes
from qtool.quantize.walk import LayerResult

LAYERS, MATRICES = 3, 5
SECTION = autoawq.quantization_config(32, [])
CPU = torch.device("cpu")


def codes(seed: int) -> UniformCodes:
    generator = torch.Generator().manual_seed(seed)
    return UniformCodes(
        torch.randint(0, 16, (16, 64), dtype=torch.uint8, generator=generator),
        torch.rand(16, 2, generator=generator).half(), torch.zeros(16, 2, dtype=torch.uint8), 4, 32,
    )  # fmt: skip


@dataclass
class Writer(OutputWriter):
    """A real file without a job; ``seen``: what was called, in order."""

    file: ShardTensors
    kept: None = None
    seen: list[Any] = field(default_factory=list)
    before: Callable[[str], None] = lambda name: None

    def put_matrix(self, name: str, chosen: Any) -> None:
        self.before(name)
        super().put_matrix(name, chosen)
        self.seen.append(name)

    def commit(self, result: LayerResult, chosen: LayerCodes) -> None:
        super().commit(result, chosen)
        self.seen.append(result.index)


def writer(folder: Path, before: Callable[[str], None] = lambda name: None) -> Writer:
    specs = {}
    linears = []
    for layer in range(LAYERS):
        for matrix in range(MATRICES):
            name = f"l.{layer}.m{matrix}"
            linears.append(LinearPlan(name, 16, 64, 32, 1))
            specs |= {f"{name}.{key}": spec for key, spec in autoawq.specs(16, 64, SECTION, torch.float16).items()}
    form = Shards(SECTION, torch.float16, 32)
    return Writer(ShardTensors(form, folder, OutputPlan(specs, linears, 1, 1), "k"), before=before)  # type: ignore[call-arg]  # a class of this test


def layer(index: int, names: list[str]) -> LayerResult:
    def made(seed: int) -> LayerCodes:
        return LayerCodes(codes={f"m{number}": codes(seed + number) for number in range(MATRICES)})

    return LayerResult(index, f"l.{index}.", {name: made(100 * index + 10 * n) for n, name in enumerate(names)})


def write(writers: dict[str, Writer], look_again: Callable[[], None] = lambda: None) -> list[int]:
    done: list[int] = []
    with writing(writers, CPU, look_again, lambda: done.append(1)) as written:
        for index in range(LAYERS):
            written.give(layer(index, list(writers)))
    return done


def test_every_layer_is_noted_after_all_its_matrices_and_in_order(tmp_path: Path) -> None:
    writers = {name: writer(tmp_path / name) for name in ("a", "b")}
    assert len(write(writers)) == LAYERS
    for number, (name, one) in enumerate(writers.items()):
        at = 0
        for index in range(LAYERS):
            part = one.seen[at : at + MATRICES + 1]
            assert part[-1] == index
            assert sorted(part[:-1]) == [f"l.{index}.m{matrix}" for matrix in range(MATRICES)]
            at += MATRICES + 1
        assert [step["layer"] for step in one.file.steps] == list(range(LAYERS))
        assert one.file.codes("l.2.m3").equals(codes(200 + 10 * number + 3)), name
        one.release()


def test_matrices_of_all_outputs_are_in_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until four have begun, of both outputs."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    at_once, most = [0], [0]
    lock = threading.Lock()

    def before(name: str) -> None:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        with lock:
            at_once[0] -= 1

    writers = {name: writer(tmp_path / name, before) for name in ("a", "b")}
    write(writers)
    assert most == [4]
    for one in writers.values():
        one.release()


def test_a_fault_in_one_is_raised_and_its_layer_is_not_noted(tmp_path: Path) -> None:
    def broken(name: str) -> None:
        if name == "l.1.m3":
            raise QtoolError("full", 3)

    writers = {"a": writer(tmp_path / "a"), "b": writer(tmp_path / "b", broken)}
    with pytest.raises(QtoolError, match="full"):
        write(writers)
    assert [step["layer"] for step in writers["b"].file.steps] == [0]
    assert [step["layer"] for step in writers["a"].file.steps] in ([0], [0, 1])
    assert not [t for t in threading.enumerate() if t.name.startswith(("writer", "packing"))]
    for one in writers.values():
        one.release()


def test_what_does_not_read_back_is_refused(tmp_path: Path) -> None:
    one = writer(tmp_path / "a")
    put = one.file._writer.write

    def flipped(name: str, tensor: torch.Tensor) -> None:
        put(name, tensor ^ 1 if name == "l.1.m2.qweight" else tensor)

    one.file._writer.write = flipped  # type: ignore[method-assign]  # a disk that errs
    with pytest.raises(QtoolError, match=r"l.1.m2 does not read back as it was written"):
        write({"a": one})
    assert [step["layer"] for step in one.file.steps] == [0]
    one.release()


def test_a_source_that_changed_stops_before_the_layer(tmp_path: Path) -> None:
    looked: list[int] = []

    def look_again() -> None:
        looked.append(1)
        if len(looked) == 2:
            raise QtoolError("changed")

    one = writer(tmp_path / "a")
    with pytest.raises(QtoolError, match="changed"):
        write({"a": one}, look_again)
    assert one.seen[-1] == 0
    one.release()


def test_workers_compute_alone_and_leave_the_others_as_they_were() -> None:
    before = torch.get_num_threads()
    with pools.workers("test", 3) as pool:
        found = set(pool.map(lambda _: (torch.get_num_threads(), threading.current_thread().name), range(50)))
        assert {threads for threads, _ in found} == {1}
        assert all(name.startswith("test") for _, name in found)
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [torch.get_num_threads()] == [before]


def test_a_processors_lane_holds_nothing_back() -> None:
    lane = Lane(CPU)
    assert lane.mark() is None
    with lane.held(None), lane.held(None):
        pass
