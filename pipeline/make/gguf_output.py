"""One output on its way into a .gguf file, a layer at a time; beside it the importance matrix and a Modelfile."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qtool import QtoolError
from qtool.convert.files.artifact import EXTRAS, IMATRIX, copy_sidecars, seal, write_config
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.reading import read_json
from qtool.convert.files.writer import ShardWriter
from qtool.convert.formats.gguf.chat_form import learn
from qtool.convert.formats.gguf.file import GgufFile, GgufWriter
from qtool.convert.formats.gguf.ggml import GgmlBlocks
from qtool.convert.formats.gguf.imatrix import write_imatrix
from qtool.convert.formats.gguf.metadata import add_metadata
from qtool.convert.formats.gguf.modelfile import MODELFILE, modelfile_of
from qtool.convert.formats.gguf.names import ROPE_FREQS, row_order
from qtool.convert.formats.gguf.plan import GgufPlan
from qtool.convert.formats.gguf.stops import find_stops
from qtool.convert.formats.gguf.vocab import add_vocabulary, around_texts, unembedded
from qtool.convert.models.rope import rope_factors
from qtool.convert.models.table import gguf_facts
from qtool.convert.text.windows import load_tokenizer
from qtool.evaluate.engines.llama_cpp import FACTS, installed
from qtool.evaluate.engines.token_proof import prove_tokens
from qtool.make.job import Job
from qtool.make.writers import manifest_of
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.folding import LayerOutput
from qtool.quantize.methods.ggml import fits, quantize_ggml
from qtool.quantize.methods.sections import GgufMethod
from qtool.report.redaction import without_folders

IMPORTANCE = "importance"


class GgufOutput:
    """The file as it grows, its importance rows, its journal, and finally its manifest."""

    def __init__(self, job: Job, method: GgufMethod, key: str) -> None:
        plan = job.plans[method.name]
        assert isinstance(plan, GgufPlan)
        self.job, self.method, self.key, self.plan = job, method, key, plan
        self.config = read_json(job.source.path / "config.json")
        self.tokenizer = load_tokenizer(job.source.path, job.recipe.model.trust_remote_code)
        self.partial = job.partial(method)
        self.path = self.partial / f"{job.source.name}-{method.type}.gguf"
        self.squares: ShardWriter | None = None
        if method.needs_importance:
            specs = {p.name: (torch.float32, (p.columns,)) for p in plan.linears}
            self.squares = ShardWriter(self.partial / EXTRAS, specs, key, IMPORTANCE)
        layout = {name: (plan.types[name].type, shape) for name, shape in plan.shapes.items()}
        self.file = GgufWriter(self.path, gguf_facts(self.config).architecture, self._describe, layout, key)
        self.written = GgufFile.open(self.path, self.config)
        size = int(self.config["vocab_size"])
        self.beyond = unembedded(self.tokenizer, size)
        self.stops = find_stops(job.source.path, self.tokenizer, self.config, size)
        self.chat = learn(self.tokenizer)
        if self.layers_done == 0:  # a vocabulary that llama.cpp reads otherwise is known before any work
            try:
                self._token_proof()
            except QtoolError as error:
                self._close()
                if (rules := method.pre_tokenizer) is None:
                    raise
                why = f"{error.message.rstrip('.')}: output {method.name!r} has `pre_tokenizer: {rules}`."
                raise QtoolError(why) from error

    def _describe(self, writer: object) -> None:
        add_metadata(writer, self.config, self.job.source.name, self.method.type)
        add_vocabulary(writer, self.job.source.path, self.tokenizer, self.config, self.method.pre_tokenizer)

    @property
    def layers_done(self) -> int:
        """Layers whose weights and importance both reached the disk."""
        steps = len(self.file.steps)
        return steps if self.squares is None else min(steps, len(self.squares.steps))

    def write_outside_layers(self) -> None:
        """Embeddings, final norm and head; llama.cpp's importance matrices do not weigh them either."""
        for hf in self.plan.names:
            if self.job.decoder.layer_of(hf) is None:
                self._write(hf, self.job.checkpoint.tensor(hf))
        factors = rope_factors(self.config)
        if factors is not None:
            self.file.write(ROPE_FREQS, factors.view(torch.uint8))

    def write_layer(self, index: int, output: LayerOutput) -> None:
        """Write, make durable, read back and compare bit for bit, then note the layer as done."""
        prefix = self.job.decoder.at(index)
        for name, tensor in output.tensors.items():
            self._write(prefix + name, tensor)
        for linear, codes in output.codes.items():
            assert isinstance(codes, GgmlBlocks)
            self._write_blocks(f"{prefix}{linear}.weight", codes)
            if self.squares is not None:
                self.squares.write(prefix + linear, output.importance[linear].float().cpu())
        self.file.flush()
        for linear, codes in output.codes.items():
            if not self.written.codes(prefix + linear).equals(codes.cpu()):
                raise QtoolError(f"{self.path}: {prefix}{linear} does not read back as it was written.", 3)
        if self.squares is not None and index >= len(self.squares.steps):
            self.squares.commit({"layer": index})
        if index >= len(self.file.steps):
            records = {prefix + linear: record for linear, record in output.records.items()}
            self.file.commit({"layer": index, "records": records})

    def restore(self, index: int) -> Mapping[str, torch.Tensor]:
        """Never asked for: only outputs with a stream of their own are restored, and this one has none."""
        raise AssertionError(f"{self.path}: restored, though no stream passes through it")

    def release(self) -> None:
        """Close what is open, finished or not."""
        for writer in (self.file, self.squares):
            if writer is not None:
                writer.release()

    def seal(self, calibration: CalibrationSet) -> None:
        """Close the file, prove its tokenizer, write what lies beside it, describe all, rename."""
        self._close()
        if self.squares is not None:
            self._write_imatrix()
        left_out = [f"tokens beyond the embedding's rows, left out: {', '.join(self.beyond)}"] if self.beyond else []
        around = around_texts(self.job.source.path, self.tokenizer)
        notes = [*self.plan.notes, *self._unweighed(), *left_out, self._token_proof(), *around, *self.stops.notes]
        copy_sidecars(self.job.source.path, self.partial, self.job.recipe.model.trust_remote_code)
        write_config(self.job.source.path, self.partial, {}, None)
        notes += self._write_modelfile()
        ledger = {linear: record for step in self.file.steps for linear, record in step["records"].items()}
        manifest = manifest_of(self.job, self.method, self.key, calibration, ledger, self.partial, notes)
        seal(self.partial, self.job.folder(self.method), manifest, self.job.require_unchanged)

    def _write(self, hf: str, tensor: torch.Tensor) -> None:
        name = self.plan.names[hf]
        type_name = self.plan.types[name].type
        offset = self.job.decoder.family.norm_offset(hf)
        tensor = tensor.float() + offset if offset else tensor
        if not bool(tensor.isfinite().all()):
            raise QtoolError(f"{hf}: holds NaN or Inf.")
        matrix = tensor.view(-1, tensor.shape[-1]).to(self.job.device)
        if not fits(matrix, type_name):
            raise QtoolError(f"{hf}: does not fit {type_name}, which ends at 65504; set `type: BF16`.")
        self._write_blocks(hf, quantize_ggml(matrix, type_name))

    def _write_blocks(self, hf: str, blocks: GgmlBlocks) -> None:
        name = self.plan.names[hf]
        data = blocks.cpu().data
        order = row_order(name, self.plan.shapes[name][0], self.job.decoder)
        if order is not None:
            data = data.view(order.numel(), -1)[order]  # a bias is one row of blocks, but as many numbers
        self.file.write(name, data)

    def _close(self) -> None:
        self.file.close()
        if self.squares is not None:
            self.squares.close()

    def _write_imatrix(self) -> None:
        rows = Checkpoint.open(self.partial / EXTRAS)
        source = self.job.recipe.calibration
        named = {self.plan.names[f"{linear}.weight"]: rows.tensor(linear) for linear in rows.tensors}
        # the file may be published: where the text lay on this machine is nobody's business
        write_imatrix(self.partial / IMATRIX, named, source.samples, source.length, without_folders(source.text))

    def _write_modelfile(self) -> list[str]:
        made = modelfile_of(self.job.source.path, self.path.name, self.tokenizer, self.chat, self.stops)
        (self.partial / MODELFILE).write_text(made.text, encoding="utf-8")
        return made.notes

    def _unweighed(self) -> list[str]:
        """What a named importance matrix does not hold."""
        if not isinstance(self.method.imatrix, str):
            return []
        records = [record for step in self.file.steps for record in step["records"].items()]
        without = [linear for linear, record in records if "weighted_error" not in record]
        if not without:
            return []
        return [f"{len(without)} of {len(records)} linears have no row in the importance matrix: {without[0]} first"]

    def _token_proof(self) -> str:
        """Raises QtoolError showing the first text that llama.cpp splits otherwise, or that it does not load the
        file."""
        if not installed():
            return f"token ids: not compared with llama.cpp's, which is not installed here. Run: {FACTS.install}"
        prompts = self.chat.prompts if self.chat else ()
        proof = prove_tokens(self.path, self.tokenizer, self.beyond, prompts)
        if proof.fatal is not None:
            raise QtoolError(f"{self.path}: llama.cpp's token ids differ from the tokenizer's: {proof.fatal}")
        if proof.limits:
            shown = "; ".join(f"{limit.token!r} ({limit.habit}), as in {limit}" for limit in proof.limits[:3])
            return (
                f"token ids: as llama.cpp's on code, white space, unicode and the model's own prompts; beside "
                f"{len(proof.limits)} of {proof.tokens} added tokens they differ, for llama.cpp finds those by other "
                f"rules: {shown}"
            )
        return f"token ids: equal to llama.cpp's on code, white space, unicode and {proof.tokens} added tokens"
