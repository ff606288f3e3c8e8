"""Layers on their way to the disk, behind the walk: matrices of all outputs side by side, then each output's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qtool.convert.files.workers import workers
from qtool.make.behind import Behind
from qtool.make.freed import Freed
from qtool.make.lane import Lane
from qtool.make.output import Output
from qtool.make.writer import OutputWriter
from qtool.quantize.walk import LayerResult
from qtool.runs.stages import stage

AT_ONCE = 8  # matrices that are packed and compared
TAKEN = 2  # bytes a weight of each: what was read back, put in order, and its codes


def memory(outputs: Sequence[Output], device: torch.device) -> int:
    """Bytes, where the codes lie, while the largest matrices are packed, read back and compared."""
    largest = max((linear.out * linear.columns for output in outputs for linear in output.plan.linears), default=0)
    count = min(AT_ONCE, torch.get_num_threads()) if device.type == "cpu" else 1
    return count * TAKEN * largest


@dataclass(frozen=True)
class _Given:
    """``made``: the end of the walk's queue on an accelerator when the layer was given."""

    result: LayerResult
    made: torch.cuda.Event | None


class LayerWriting:
    """Takes layers as the walk makes them; one is written while the next one is rounded."""

    def __init__(
        self,
        writers: Mapping[str, OutputWriter],
        device: torch.device,
        pool: ThreadPoolExecutor,
        look_again: Callable[[], None],
        done: Callable[[], None],
    ) -> None:
        self._writers, self._lane, self._pool = writers, Lane(device), pool
        self._look_again, self._done = look_again, done
        self._freed, self._behind = Freed(), Behind(self._write, "writer")

    def give(self, result: LayerResult) -> None:
        """Waits until the layer before is written. Raises what writing it has raised."""
        self._behind.give(_Given(result, self._lane.mark()))

    def _write(self, given: _Given) -> None:
        result = given.result
        if result.index is not None:
            self._look_again()  # before any layer is noted as done
        put = {name: self._put(name, given) for name in result.outputs}
        try:
            for name, matrices in put.items():
                for matrix in matrices:
                    matrix.result()
                with stage("writing", f"{name}: {_place(result)}"):
                    self._writers[name].commit(result, result.outputs[name])
        finally:  # nobody closes a file that is still written to
            waiting = [matrix for matrices in put.values() for matrix in matrices]
            for matrix in waiting:
                matrix.cancel()
            wait(waiting)
        if result.index is not None:
            self._freed.give_back()
            self._done()

    def _put(self, name: str, given: _Given) -> list[Future[None]]:
        """Every tensor and every matrix of an output: each a task."""
        writer, result = self._writers[name], given.result
        codes = result.outputs[name]

        def tensors() -> None:
            with stage("writing", f"{name}: {_place(result)}"), self._lane.held(given.made):
                writer.put_tensors(result.prefix, codes)

        def matrix(module: str) -> None:
            with stage("packing", f"{name}: {result.prefix}{module}"), self._lane.held(given.made):
                writer.put_matrix(result.prefix + module, codes.codes[module])

        return [self._pool.submit(tensors), *(self._pool.submit(matrix, module) for module in codes.codes)]


def _place(result: LayerResult) -> str:
    return result.prefix.rstrip(".") or "outside the layers"


@contextmanager
def writing(
    writers: Mapping[str, OutputWriter], device: torch.device, look_again: Callable[[], None], done: Callable[[], None]
) -> Iterator[LayerWriting]:
    """``look_again`` raises QtoolError where the source is no longer what the keys were made of; ``done`` is called
    after each layer. Both are called from a thread."""
    with workers("packing", AT_ONCE) as pool:
        layers = LayerWriting(writers, device, pool, look_again, done)
        with layers._behind:
            yield layers
