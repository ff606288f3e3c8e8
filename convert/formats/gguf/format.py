"""llama.cpp's single file as a format; beside it an importance matrix and a Modelfile for Ollama."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.writer import TensorWriter
from qtool.convert.formats.codes import CPU, Codes
from qtool.convert.formats.format import CalibrationText, ModelFiles, TokenQuestion
from qtool.convert.formats.gguf.chat_form import learn
from qtool.convert.formats.gguf.file import GgufFile, gguf_layout, header_size
from qtool.convert.formats.gguf.ggml import FLOATS, GgmlBlocks
from qtool.convert.formats.gguf.imatrix import IMATRIX, read_imatrix, write_imatrix
from qtool.convert.formats.gguf.metadata import add_metadata
from qtool.convert.formats.gguf.modelfile import MODELFILE, modelfile_of
from qtool.convert.formats.gguf.names import ROPE_FREQS, piece, row_order
from qtool.convert.formats.gguf.plan import GgufPlan, plan_gguf
from qtool.convert.formats.gguf.stops import find_stops
from qtool.convert.formats.gguf.vocab import add_vocabulary, around_texts, unembedded
from qtool.convert.formats.plan import ModelShape, OutputPlan
from qtool.convert.models.config_keys import prove_gguf
from qtool.convert.models.expert_names import expert_of
from qtool.convert.models.rope import rope_factors
from qtool.convert.models.shape import Decoder
from qtool.convert.models.table import gguf_facts
from qtool.convert.text.tokenizer import load_tokenizer

PAD = 31  # bytes behind a tensor, at most


@dataclass(frozen=True)
class Gguf:
    """``type``: the file's type, as llama-quantize names it; ``rules``: llama.cpp's name of the tokenizer's split
    rules, where the recipe says it; ``asked``: what the output wants otherwise of some tensors, as `find_apart` takes
    it; ``mix``: module -> type, where all matrices were given types of their own."""

    type: str
    rules: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    mix: Mapping[str, str] | None = None

    @property
    def section(self) -> dict[str, Any]:
        """No loader reads it."""
        return {"quant_method": "gguf", "type": self.type}

    @property
    def config_section(self) -> dict[str, Any]:
        """The file says it itself."""
        return {}

    @property
    def copies(self) -> tuple[str, ...]:
        """There is no section to copy."""
        return ()

    @property
    def group(self) -> int:
        """Blocks are the file's own matter."""
        return 1

    @property
    def expands(self) -> bool:
        """llama.cpp works on the blocks."""
        return False

    @property
    def proves_tokens(self) -> bool:
        """The file holds a vocabulary and rules of splitting."""
        return True

    def of_model(self, decoder: Decoder) -> Gguf:
        """The same: the file's own keys say all."""
        return self

    def plan(self, shape: ModelShape) -> GgufPlan:
        """As `plan_gguf`."""
        return plan_gguf(shape, self.type, self.asked, self.mix)

    def prove(self, skeleton: Any, config: Mapping[str, Any]) -> None:
        """Every key of config.json that the model reads can be said in the file."""
        prove_gguf(skeleton, config)

    def open(self, folder: Path, plan: OutputPlan, key: str, source: ModelFiles) -> GgufTensors:
        """The file in ``folder``. Raises QtoolError for a vocabulary that a .gguf file cannot hold."""
        assert isinstance(plan, GgufPlan)  # what `plan` returns
        return GgufTensors(self, folder, plan, key, source)

    def file_bytes(self, plan: OutputPlan) -> int | None:
        """The header holds the vocabulary, which no plan reads."""
        return None

    def header_bytes(self, plan: OutputPlan, source: ModelFiles) -> int:
        """Keys, vocabulary, the table of tensors, and what each is padded by at most."""
        assert isinstance(plan, GgufPlan)
        tokenizer = load_tokenizer(source.path, source.trusted)

        def describe(writer: object) -> None:
            add_metadata(writer, source.config, source.name, plan.file_type)
            add_vocabulary(writer, source.path, tokenizer, source.config, self.rules)

        tensors = {name: (plan.types[name].type, shape) for name, shape in plan.shapes.items()}
        with tempfile.TemporaryDirectory(prefix="qtool-keys-") as folder:
            path = Path(folder) / "keys.gguf"
            return header_size(path, gguf_facts(source.config).architecture, describe, tensors) + PAD * len(tensors)

    def beside_bytes(self, kept: int) -> int:
        """imatrix.gguf holds the same rows again."""
        return kept

    def notes(self) -> list[str]:
        """llama.cpp takes what it is given."""
        return []

    def importance(self, path: Path, plan: OutputPlan) -> dict[str, torch.Tensor]:
        """As llama-imatrix writes them, .gguf or .dat."""
        assert isinstance(plan, GgufPlan)
        rows = read_imatrix(path)
        named = {linear: plan.names[f"{linear.name}.weight"] for linear in plan.linears}
        sizes = {name: math.prod(plan.shapes[name][:-2]) * plan.shapes[name][-1] for name in named.values()}
        wrong = [name for name, size in sizes.items() if name in rows and rows[name].numel() != size]
        if wrong or not any(name in rows for name in named.values()):
            why = f"{wrong[0]} has {rows[wrong[0]].numel()} values" if wrong else "it has none of this model's names"
            raise QtoolError(f"{path}: made for another model: {why}.")
        return {
            linear.name: rows[name].view(-1, linear.columns)[expert_of(linear.name) or 0]
            for linear, name in named.items()
            if name in rows
        }


class GgufTensors:
    """The tensors of one .gguf file, under their Hugging Face names, and what the file says beside them."""

    def __init__(self, form: Gguf, folder: Path, plan: GgufPlan, key: str, source: ModelFiles) -> None:
        self._form, self._folder, self._source = form, folder, source
        self.plan, self.config = plan, source.config
        self.tokenizer = load_tokenizer(source.path, source.trusted)
        kind = form.type if form.mix is None else f"{plan.bits_per_weight:.2f}bpw"
        self.place = folder / f"{source.name}-{kind}.gguf"
        tensors = {name: (plan.types[name].type, shape) for name, shape in plan.shapes.items()}
        layout = gguf_layout(self.place, gguf_facts(self.config).architecture, self._describe, tensors)
        self.writer = TensorWriter(folder, layout, key)
        self._written = GgufFile.open(self.place, self.config)
        size = int(self.config["vocab_size"])
        self._beyond = unembedded(self.tokenizer, size)
        self.stops = find_stops(source.path, self.tokenizer, self.config, size)
        self._chat = learn(self.tokenizer)
        prompts = self._chat.prompts if self._chat else ()
        self.question: TokenQuestion | None = TokenQuestion(
            self.place, self.tokenizer, self._beyond, prompts, form.rules
        )
        self.commit, self.close = self.writer.commit, self.writer.close
        self.wait, self.release = self.writer.wait, self.writer.release
        if (factors := rope_factors(self.config)) is not None:  # of config.json, no tensor of the checkpoint
            self.writer.write(ROPE_FREQS, factors.view(torch.uint8))

    def _describe(self, writer: object) -> None:
        add_metadata(writer, self.config, self._source.name, self.plan.file_type)
        add_vocabulary(writer, self._source.path, self.tokenizer, self.config, self._form.rules)

    @property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        """The finished steps."""
        return self.writer.steps

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """In the plan's float type. Raises QtoolError where that cannot hold the tensor."""
        stored = self.plan.names[name]
        type_name = self.plan.types[stored].type
        offset = self._written.decoder.family.norm_offset(name)
        tensor = tensor.float() + offset if offset else tensor
        if not bool(tensor.isfinite().all()):
            raise QtoolError(f"{name}: holds NaN or Inf.")
        cast = tensor.to(FLOATS[type_name]).contiguous()
        if not bool(cast.isfinite().all()):
            raise QtoolError(f"{name}: does not fit {type_name}, which ends at 65504; set `type: BF16`.")
        self._put(name, cast.view(-1, cast.shape[-1]).view(torch.uint8))

    def write_codes(self, matrix: str, codes: Codes) -> None:
        """In llama.cpp's row order."""
        assert isinstance(codes, GgmlBlocks)
        self._put(f"{matrix}.weight", codes.data)

    def codes(self, matrix: str, device: torch.device = CPU) -> GgmlBlocks:
        """In the source's row order."""
        return self._written.codes(matrix).to(device)

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """Names without ``prefix``; dequantized, float32. Without norms that the file holds with 1 added: taking it
        off again would not give the source's."""
        offset = self._written.decoder.family.norm_offset
        names = [name for name in self._written.hf_names() if name.startswith(prefix) and not offset(name)]
        return {name.removeprefix(prefix): self._written.tensor(name) for name in names}

    def finish(self, proof: str, kept: Checkpoint | None, text: CalibrationText) -> list[str]:
        """``kept``: the rows of the importance matrix. Writes it, and a Modelfile for Ollama."""
        if kept is not None:
            self._write_imatrix(kept, text)
        beyond = ", ".join(self._beyond)
        left_out = [f"tokens beyond the embedding's rows, left out: {beyond}"] if beyond else []
        around = around_texts(self._source.path, self.tokenizer)
        made = modelfile_of(self._source.path, self.place.name, self.tokenizer, self._chat, self.stops)
        (self._folder / MODELFILE).write_text(made.text, encoding="utf-8")
        return [*left_out, proof, *around, *self.stops.notes, *made.notes]

    def _write_imatrix(self, kept: Checkpoint, text: CalibrationText) -> None:
        """All experts of a layer are one entry of rows below each other, each with the tokens that were sent to it."""
        seen = {matrix: record.get("tokens") for step in self.steps for matrix, record in step["records"].items()}
        rows: dict[str, list[torch.Tensor]] = {}
        tokens: dict[str, list[float]] = {}
        for matrix in sorted(kept.tensors, key=lambda matrix: expert_of(matrix) or 0):
            name, count = self.plan.names[f"{matrix}.weight"], seen.get(matrix)
            rows.setdefault(name, []).append(kept.tensor(matrix))
            tokens.setdefault(name, []).append(text.samples * text.length if count is None else count)
        stacks = {name: torch.stack(found) for name, found in rows.items()}
        write_imatrix(self._folder / IMATRIX, stacks, text.samples, text.length, text.name, tokens)

    def _put(self, hf: str, data: torch.Tensor) -> None:
        name = self.plan.names[hf]
        order = row_order(name, self.plan.shapes[name][0], self._written.decoder)
        if order is not None:
            data = data.view(order.numel(), -1)[order]  # a bias is one row of blocks, but as many numbers
        self.writer.write(piece(name, expert_of(hf)), data.reshape(-1))
