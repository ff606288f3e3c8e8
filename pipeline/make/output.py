"""One output of a job: how it is made, what it will be, under which key, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.convert.files.chosen import Chosen
from qtool.convert.files.folder import PARTIAL
from qtool.convert.files.reading import named, open_file
from qtool.convert.files.shards import file_sizes
from qtool.convert.files.watch import Watched, watch
from qtool.convert.files.writer import Spec
from qtool.convert.formats.format import Format, ModelFiles
from qtool.convert.formats.gguf.imatrix import SIZE_LIMIT
from qtool.convert.formats.plan import ModelShape, OutputPlan
from qtool.make.mixes import foreseen
from qtool.quantize.methods.method import Method
from qtool.quantize.ranks import dealt_out

UNKNOWN = "until the calibration pass has told what each costs"
TOKENIZER_AND_CONFIG = 32 * 2**20  # sidecars carried along, the manifest


@dataclass(frozen=True)
class Output:
    """``folder``: where the artifact goes; ``imatrix``: the importance matrix that its recipe names; ``key``: of its
    bytes, empty before the calibration set is known; ``chosen``: how the types of its matrices were, where a budget
    says so and they are; ``foreseen``: what they would be if all weights counted alike, where they are not yet."""

    method: Method
    container: Format
    plan: OutputPlan
    folder: Path
    imatrix: Watched | None = None
    key: str = ""
    chosen: Chosen | None = None
    foreseen: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the recipe and its reader say."""
        return self.method.name

    @property
    def partial(self) -> Path:
        """Where the artifact grows."""
        return self.folder.with_name(self.folder.name + PARTIAL)

    @property
    def notes(self) -> list[str]:
        """What is to be said before it is made: fallback types, what a runtime refuses or needs."""
        return [*self.plan.notes, *self.container.notes(), *self._types]

    @property
    def _types(self) -> list[str]:
        """How types by budget came about."""
        if self.method.undecided is not None:
            return [f"types by budget ({self.method.undecided}): shown as if all matrices counted alike, {UNKNOWN}"]
        return [] if self.chosen is None else [self.chosen.said]

    @property
    def types(self) -> dict[str, str]:
        """Matrix -> its type, where a budget says what it may take: as chosen, or as foreseen."""
        return dict(self.chosen.mix if self.chosen is not None else self.foreseen)

    @property
    def kept_specs(self) -> dict[str, Spec]:
        """Of the tensors that the method keeps beside the weights."""
        plan = self.plan
        return {} if self.method.kept_as is None else self.method.kept_specs([*plan.linears, *plan.plain])

    @cached_property
    def importance(self) -> dict[str, torch.Tensor] | None:
        """Matrix -> mean square of its input channels, as the file says that the recipe names. Raises QtoolError where
        it was made for another model."""
        return None if self.imatrix is None else self.container.importance(self.imatrix.path, self.plan)

    @property
    def disk_bytes(self) -> int:
        """What its folder takes: the weights, what the method keeps beside them, what the format adds, sidecars."""
        kept = sum(file_sizes(self.kept_specs).values())
        weights = self.container.file_bytes(self.plan) or self.plan.nbytes
        return weights + kept + self.container.beside_bytes(kept) + TOKENIZER_AND_CONFIG


def plan_output(method: Method, shape: ModelShape, folder: Path, files: ModelFiles | None = None) -> Output:
    """``files``: of the source, where they lie here; a budget then counts the file's header, too. Raises QtoolError
    naming the output where the model cannot be made into it, or the importance matrix that it names cannot be read."""
    with naming(method):
        budget = method.undecided
        mix = {} if budget is None else foreseen(method, budget, shape, files)
        planned = method.decided(mix) if mix else method
        container = planned.container.of_model(shape.decoder)
        plan = container.plan(shape)
    return Output(method, container, plan, folder, _imatrix(method), foreseen=mix)


@contextmanager
def naming(method: Method) -> Iterator[None]:
    """What is wrong is said of the output of this name: a recipe has several."""
    try:
        yield
    except QtoolError as error:
        raise QtoolError(f"output {method.name!r}: {error.message}", exit_code=error.exit_code) from error


def owners_of(outputs: Sequence[Output], ranks: int) -> list[int]:
    """The rank that makes each: it holds the folder, rounds and writes."""
    return dealt_out([output.method.cost for output in outputs], ranks)


def _imatrix(method: Method) -> Watched | None:
    if method.importance_file is None:
        return None
    path = named(method.importance_file)
    try:
        open_file(path, SIZE_LIMIT).close()
        return watch(path)
    except (OSError, QtoolError) as error:
        why = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ").rstrip(".")
        raise QtoolError(f"{path}: {why} (`imatrix:` of output {method.name!r}).") from error
