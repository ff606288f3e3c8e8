"""The writer of an output: a layer at a time into its format's file; and finally its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from qtool import QtoolError
from qtool.convert.artifact import seal
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.chosen import CHOSEN
from qtool.convert.files.config_file import read_config
from qtool.convert.files.durable import save
from qtool.convert.files.folder import EXTRAS, copy_sidecars, file_entries, write_config
from qtool.convert.files.licence import read_licence
from qtool.convert.files.manifest import Manifest
from qtool.convert.files.shards import open_shards
from qtool.convert.files.small_floats import small_floats_of
from qtool.convert.files.writer import TensorWriter
from qtool.convert.formats.codes import Codes
from qtool.convert.formats.format import CalibrationText
from qtool.convert.models.model_config import runtime_keys
from qtool.make.job import Job, device_kind, versions
from qtool.make.output import Output
from qtool.make.token_proof import prove
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.method import LayerCodes
from qtool.quantize.walk import Column, LayerResult
from qtool.recipe.redaction import without_folders
from qtool.runs.coverage import coverage


class OutputWriter:
    """An output on its way to the disk: its weights, what its method keeps beside them, and their journals."""

    def __init__(self, job: Job, output: Output) -> None:
        self.job, self.output = job, output
        method, partial = output.method, output.partial
        self.file = output.container.open(partial, output.plan, output.key, job.files)
        self.kept: TensorWriter | None = None
        if method.kept_as is not None:
            self.kept = open_shards(partial / EXTRAS, output.kept_specs, output.key, method.kept_as)
        if self.layers_done == 0:  # a vocabulary that a runtime reads otherwise is known before any work
            try:
                prove(self.file.question)
            except QtoolError as error:
                self.release()
                if self.file.question is None or (rules := self.file.question.rules) is None:
                    raise
                why = f"{error.message.rstrip('.')}: output {output.name!r} has `pre_tokenizer: {rules}`."
                raise QtoolError(why) from error

    @property
    def column(self) -> Column:
        """As the walk sees it."""
        output = self.output
        return Column(output.method, output.plan, output.importance, self.file.state)

    @property
    def layers_done(self) -> int:
        """Layers whose weights, and what is kept beside them, both reached the disk."""
        steps = len(self.file.steps)
        return steps if self.kept is None else min(steps, len(self.kept.steps))

    def put_tensors(self, prefix: str, codes: LayerCodes) -> None:
        """Write what is not quantized, and what the method keeps."""
        for name, tensor in codes.tensors.items():
            self.file.write(prefix + name, tensor)
        if self.kept is not None:
            for name, tensor in codes.kept.items():
                self.kept.write(prefix + name, tensor)

    def put_matrix(self, name: str, codes: Codes) -> None:
        """Write, read back and compare bit for bit, where the codes lie. Several threads may."""
        self.file.write_codes(name, codes)
        if not self.file.codes(name, codes.device).equals(codes):
            raise QtoolError(f"{self.file.place}: {name} does not read back as it was written.", 3)

    def commit(self, result: LayerResult, codes: LayerCodes) -> None:
        """Make a layer durable whose every part was put, then note it as done; tensors outside the layers are not
        noted, and written again by every run."""
        if result.index is None:
            return
        if self.kept is not None and result.index >= len(self.kept.steps):
            self.kept.commit({"layer": result.index})
        if result.index >= len(self.file.steps):
            records = {result.prefix + matrix: record for matrix, record in codes.records.items()}
            self.file.commit({"layer": result.index, "records": records})

    def close(self) -> None:
        """All layers are written. Threads make the files' digests from here on."""
        self.file.close()
        if self.kept is not None:
            self.kept.close()

    def release(self) -> None:
        """Close what is open, finished or not."""
        self.file.release()
        if self.kept is not None:
            self.kept.release()

    def seal(self, calibration: CalibrationSet) -> None:
        """Close the files, carry the sidecars along, describe everything in the manifest, rename."""
        job, output = self.job, self.output
        self.close()
        kept = None if self.kept is None else Checkpoint.open(self.kept.folder)
        ledger = {matrix: record for step in self.file.steps for matrix, record in step["records"].items()}
        notes = [*output.notes, *output.method.remarks(ledger)]
        if (reached := coverage(ledger)) and reached.unseen:
            notes.append(f"of the experts {reached.lost}: they are rounded for what all tokens would show them")
        proof = prove(self.file.question)
        copy_sidecars(job.source.path, output.partial, job.recipe.model.trust_remote_code)
        container = output.container
        source, more = job.source.path, runtime_keys(read_config(job.source.path))
        stored = output.method.stored_dtype
        write_config(source, output.partial, container.config_section, stored, more, container.copies)
        text = job.recipe.calibration
        # the file may be published: where the text lay on this machine is nobody's business
        told = CalibrationText(text.samples, text.length, without_folders(text.text))
        notes += self.file.finish(proof, kept, told)
        if output.chosen is not None:
            save(output.partial / CHOSEN, output.chosen)
        for file in (self.file, self.kept):
            if file is not None:
                file.wait()
        manifest = manifest_of(job, output, calibration, ledger, notes)
        seal(output.partial, output.folder, manifest, job.require_unchanged)


def manifest_of(
    job: Job,
    output: Output,
    calibration: CalibrationSet,
    ledger: dict[str, dict[str, float]],
    notes: Sequence[str] = (),
) -> Manifest:
    """What `qtool.json` says of the files that have grown."""
    plan, method = output.plan, output.method
    used = job.recipe.calibration.model_dump(mode="json") | {"digest": calibration.digest}
    if job.decoder.shape.experts:
        used["experts"] = job.recipe.experts.model_dump(mode="json")
    return Manifest(
        qtool=version("qtool-llm"),
        key=output.key,
        output=method.model_dump(mode="json"),
        source={"model": job.recipe.model.id, "name": job.source.name, "commit": job.source.commit}
        | ({"stored_as": stored} if (stored := small_floats_of(read_config(job.source.path))) else {})
        | read_licence(job.source.path),
        calibration=used if method.calibrated else {},
        device=device_kind(job.device),
        versions=versions(method, job.device),
        parameters=plan.parameters,
        tensor_bytes=plan.nbytes,
        bits_per_weight=round(plan.bits_per_weight, 4),
        ledger=ledger,
        files=file_entries(output.partial),
        notes=[*job.notes, *notes],
    )
