"""What a format is: it plans what a file will hold from shapes alone, and opens the file that is written so.

A format is what recipes' outputs are stored in. `Shards` stands for every container of safetensors files (one module
each, the table is in table.py), `Gguf` for llama.cpp's single file. tests/test_additions.py adds a container.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.codes import CPU, Codes
from qtool.convert.formats.plan import ModelShape, OutputPlan
from qtool.convert.models.shape import Decoder


@dataclass(frozen=True)
class ModelFiles:
    """The source's folder, its name and its config.json; ``trusted``: whether its own code may run."""

    path: Path
    name: str
    config: Mapping[str, Any]
    trusted: bool


@dataclass(frozen=True)
class CalibrationText:
    """What a file may say of the text that was looked at: windows, tokens of each, where it came from."""

    samples: int
    length: int
    name: str


@dataclass(frozen=True)
class TokenQuestion:
    """Whether the runtime that reads the file at ``path`` splits text as ``tokenizer`` does. ``beyond``: tokens that
    the file leaves out; ``prompts``: of the model's chat template; ``rules``: the split rules that the recipe named."""

    path: Path
    tokenizer: Any
    beyond: Sequence[str]
    prompts: Sequence[str]
    rules: str | None


class TensorFile(Protocol):
    """What is written of one output: tensors by their names in the source, in any order, a layer at a time. Several
    threads may write and read."""

    place: Path
    """How messages name it."""
    question: TokenQuestion | None
    """What must be asked of a runtime before the file may be trusted; None where nothing is to be asked."""

    @property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        """The finished steps, as the journal has them."""

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor that is not quantized. Raises QtoolError where its stored dtype cannot hold it."""

    def write_codes(self, matrix: str, codes: Codes) -> None:
        """Put a quantized matrix."""

    def codes(self, matrix: str, device: torch.device = CPU) -> Codes:
        """Read a quantized matrix back, unpacked on ``device``."""

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """What was written below ``prefix`` and is not the source's own, as a reader of the artifact gets it; names
        without the prefix."""

    def commit(self, step: dict[str, Any]) -> None:
        """Make everything written so far durable, then note the step in the journal. Raises QtoolError (exit 3)."""

    def close(self) -> None:
        """All tensors are written; a thread makes the files' digests. May be called again."""

    def wait(self) -> None:
        """Until the digests of the closed files are known."""

    def release(self) -> None:
        """Close what is open, finished or not."""

    def finish(self, proof: str, kept: Checkpoint | None, text: CalibrationText) -> list[str]:
        """Write what lies beside the tensors; returns what is to be said of the file. ``proof``: the answer to
        ``question``; ``kept``: what the method keeps beside its codes, closed."""


class Format(Protocol):
    """How an output is stored."""

    @property
    def section(self) -> dict[str, Any]:
        """What identifies the container; ``quant_method`` is its row in the table of formats."""

    @property
    def config_section(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json; empty where the file says it itself."""

    @property
    def copies(self) -> tuple[str, ...]:
        """Files beside config.json that hold the section too."""

    @property
    def group(self) -> int:
        """Columns of a row to a scale, 1 where scales do not follow columns."""

    @property
    def expands(self) -> bool:
        """Whether engines expand a whole matrix to 16 bits before they use it."""

    @property
    def proves_tokens(self) -> bool:
        """Whether the file holds a tokenizer, which is compared with the model's by a runtime that loads it."""

    def of_model(self, decoder: Decoder) -> Format:
        """The same, told of what the model leaves unquantized. Raises QtoolError where no runtime reads
        experts in it."""

    def plan(self, shape: ModelShape) -> OutputPlan:
        """What will be written, tensor by tensor. Raises QtoolError for a model that cannot be stored so."""

    def prove(self, skeleton: Any, config: Mapping[str, Any]) -> None:
        """Raises QtoolError where the model does something that the file cannot say."""

    def open(self, folder: Path, plan: OutputPlan, key: str, source: ModelFiles) -> TensorFile:
        """The file in ``folder`` as planned; work begun under the same key goes on."""

    def file_bytes(self, plan: OutputPlan) -> int | None:
        """On the disk, headers included; None where the header is not known before it is made."""

    def header_bytes(self, plan: OutputPlan, source: ModelFiles) -> int:
        """Of the file that holds the tensors, whatever is no tensor: keys, vocabulary, padding."""

    def beside_bytes(self, kept: int) -> int:
        """Of what `TensorFile.finish` writes, where the method keeps ``kept`` bytes."""

    def notes(self) -> list[str]:
        """What whoever makes such an artifact should hear of the runtimes."""

    def importance(self, path: Path, plan: OutputPlan) -> dict[str, torch.Tensor]:
        """Matrix -> mean square of its input channels float32 ``[in]``, from an importance matrix's file. Raises
        QtoolError where it was made for another model."""
