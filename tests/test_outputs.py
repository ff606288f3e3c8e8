"""Artifacts on disk: whole or absent, resumed after a kill with the same bytes, reused, or refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from warm import Warm

from qtool import Interrupted, QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.manifest import MANIFEST
from qtool.convert.files.source import HUB_PATTERNS, resolve
from qtool.convert.files.writer import TensorWriter
from qtool.make.job import Job, artifact_key, open_job
from qtool.make.outputs import make_artifacts
from qtool.make.writer import OutputWriter
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.method import LayerCodes
from qtool.quantize.walk import LayerResult
from qtool.recipe.sections import load_recipe

CALIBRATION = CalibrationSet(torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0)), "test")


def job_of(recipe: Path) -> Job:
    loaded = load_recipe(recipe)
    return open_job(loaded, resolve(loaded.model.id), torch.device("cpu"), loaded.outputs)


def make(recipe: Path) -> dict[str, Artifact]:
    job = job_of(recipe)
    return make_artifacts(job, CALIBRATION)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_artifact_is_a_whole_model(write_recipe: Callable[..., Path], tiny: Path) -> None:
    artifact = make(write_recipe())["awq"]
    files = contents(artifact.path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert files[name] == (tiny / name).read_bytes()
    config, source = json.loads(files["config.json"]), json.loads((tiny / "config.json").read_text())
    section = config.pop("quantization_config")
    assert section["quant_method"] == "awq"
    changed = {key for key in config if config[key] != source.get(key)}
    assert changed == {"dtype", "torch_dtype"}  # float16, as stored; everything else is the source's own
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert [key for key in config if key != "torch_dtype"] == list(source)
    assert artifact.manifest is not None
    assert set(artifact.manifest.files) == set(files) - {MANIFEST}
    state = dict(artifact.read())
    from safetensors import safe_open

    names = set()
    for shard in tiny.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            names |= set(file.keys())
    assert set(state) == names
    assert not list(artifact.path.rglob("*journal*"))


EVERY: list[dict[str, Any]] = [
    {"method": "awq", "group_size": 32},
    {"method": "gptq", "group_size": 32},
    {"method": "gptq", "name": "v2", "bits": 8, "group_size": 64, "sym": False, "propagate_error": False},
    {"method": "gptq", "name": "order", "desc_act": True, "group_size": -1, "dtype": "bfloat16", "scaling": "awq"},
    {"method": "gptq", "name": "ct", "format": "compressed-tensors", "group_size": 128, "propagate_error": False},
    {"method": "gptq", "name": "cta", "format": "compressed-tensors", "bits": 8, "sym": False, "group_size": 32},
    {"method": "nf4"},
    {"method": "nf4", "name": "single", "double_quant": False},
]


def test_notices_are_carried_and_indices_of_other_weights_are_not(
    write_recipe: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "with-notice"))
    (model / "NOTICE").write_text("made by someone\n")
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}\n')
    files = contents(make(write_recipe(model=str(model)))["awq"].path)
    assert files["NOTICE"] == b"made by someone\n"
    assert not [name for name in files if name.endswith("index.json")]
    assert any(fnmatch("NOTICE", pattern) for pattern in HUB_PATTERNS)  # or it would never arrive from the Hub


@pytest.mark.slow
def test_the_plan_is_what_is_written(write_recipe: Callable[..., Path]) -> None:
    job = job_of(write_recipe(outputs=EVERY))
    artifacts = make_artifacts(job, CALIBRATION)
    assert len(artifacts) == len(EVERY)
    for name, artifact in artifacts.items():
        plan = job.output(name).plan
        found = {tensor: (info.dtype, info.shape) for tensor, info in artifact.checkpoint.tensors.items()}
        assert found == plan.specs, name
        assert sum(info.nbytes for info in artifact.checkpoint.tensors.values()) == plan.nbytes
        header = int.from_bytes((artifact.path / "model.safetensors").read_bytes()[:8], "little")
        assert (artifact.path / "model.safetensors").stat().st_size == 8 + header + plan.nbytes


def test_largest_magnitudes_do_not_depend_on_the_calibration(write_recipe: Callable[..., Path]) -> None:
    """Other tokens, same key: the artifact is reused."""
    job = job_of(write_recipe(outputs=[{"method": "nf4", "rounding": "absmax"}]))
    first = make_artifacts(job, CALIBRATION)["nf4"]
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    other = CalibrationSet(CALIBRATION.tokens + 1, "other")
    second = make_artifacts(job, other)["nf4"]
    assert (second.path / "model.safetensors").stat().st_mtime_ns == stamp


def test_rows_that_do_not_fill_words_are_refused(
    write_recipe: Callable[..., Path], model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_maker(tmp_path / "odd", intermediate_size=260)
    with pytest.raises(QtoolError, match=r"down_proj has 260 columns; this format packs columns in groups of 8"):
        job_of(write_recipe(model=str(model), outputs=[{"method": "gptq", "group_size": -1}]))
    assert job_of(write_recipe(model=str(model), outputs=[{"method": "nf4"}])).output("nf4").plan.nbytes


def test_everything_is_durable_before_the_folder_gets_its_name(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the rename must not leave a finished folder with an empty config.json."""
    durable: set[int] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        durable.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    path = make(write_recipe())["awq"].path
    assert {file.stat().st_ino for file in (*path.rglob("*"), path, path.parent)} <= durable


def test_one_output_that_cannot_be_sealed_takes_no_other_along(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(outputs=[{"method": "awq", "group_size": 32}, {"method": "nf4"}])
    whole = OutputWriter.seal

    def seal(self: OutputWriter, calibration: CalibrationSet) -> None:
        if self.output.name == "awq":
            self.file.close()
            assert self.kept is not None
            self.kept.close()
            raise QtoolError("planted", exit_code=3)
        whole(self, calibration)

    monkeypatch.setattr(OutputWriter, "seal", seal)
    with pytest.raises(QtoolError, match=r"awq: planted\nFinished all the same: nf4") as error:
        make(recipe)
    assert error.value.exit_code == 3
    assert Artifact.open(Path(load_recipe(recipe).output_dir) / "tiny-nf4").manifest
    monkeypatch.undo()
    assert make(recipe)["awq"].manifest  # goes on after its last layer


def test_a_finished_artifact_is_reused(write_recipe: Callable[..., Path]) -> None:
    first = make(write_recipe())["awq"]
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    assert (make(write_recipe())["awq"].path / "model.safetensors").stat().st_mtime_ns == stamp
    gated = write_recipe(gates=[{"max_size": 1.0}])
    assert (make(gated)["awq"].path / "model.safetensors").stat().st_mtime_ns == stamp


def test_what_is_not_ours_is_refused(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "artifacts" / "tiny-awq"
    folder.mkdir(parents=True)
    with pytest.raises(QtoolError, match="not written by qtool"):
        make(write_recipe())
    folder.rmdir()
    make(write_recipe())
    with pytest.raises(QtoolError, match="another recipe"):
        make(write_recipe(outputs=[{"method": "awq", "group_size": 64}]))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(QtoolError, match=r"tokenizer\.json has"):
        make(write_recipe())


def test_group_size_that_does_not_divide_names_linears_and_sizes(
    write_recipe: Callable[..., Path], model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_maker(tmp_path / "odd", hidden_size=192, intermediate_size=256, head_dim=48)
    with pytest.raises(QtoolError) as error:
        job_of(write_recipe(model=str(model), outputs=[{"method": "awq", "group_size": 128}]))
    assert "128 does not divide the inputs of" in error.value.message
    assert "q_proj (192 columns, 2 layers, first model.layers.0.self_attn.q_proj)" in error.value.message
    assert "down_proj" not in error.value.message
    assert "Sizes that fit every linear: 64, 32" in error.value.message


def test_weights_of_more_layers_than_the_config_has(
    write_recipe: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """They would be planned, never visited, and sealed as zeros."""
    model = Path(shutil.copytree(tiny, tmp_path / "deep"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(QtoolError, match=r"holds model\.layers\.1\..*\(9 such\), which config.json does not imply"):
        job_of(write_recipe(model=str(model)))


def test_a_full_disk_is_said_before_the_work(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what disk_usage returns
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(QtoolError, match=r"0\.00 GB free") as error:
        make(write_recipe())
    assert error.value.exit_code == 3


def test_a_second_writer_is_refused(write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe()
    job = job_of(recipe)
    partial = job.outputs[0].partial
    partial.mkdir(parents=True)
    holder = os.open(partial, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(QtoolError, match=r"tiny-awq\.partial: another qtool is writing there") as error:
        make(recipe)
    assert error.value.exit_code == 3
    os.close(holder)
    assert make(recipe)["awq"].path.exists()
    assert not partial.exists()


def test_an_unfinished_folder_does_not_open(tmp_path: Path) -> None:
    folder = tmp_path / "x-awq.partial"
    folder.mkdir()
    with pytest.raises(QtoolError, match="unfinished"):
        Artifact.open(folder)


KILL = """
import os, signal, sys, torch
from pathlib import Path
from qtool.convert.files import writer
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.make.writer import OutputWriter
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe.sections import load_recipe
from qtool.convert.files.source import resolve

where, number = sys.argv[2], int(sys.argv[3])
target = {"write": writer.TensorWriter, "commit": writer.TensorWriter, "seal": OutputWriter}[where]
original, count = getattr(target, where), 0

def deadly(*args, **kwargs):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    return result

setattr(target, where, deadly)
recipe = load_recipe(Path(sys.argv[1]))
tokens = torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0))
job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
make_artifacts(job, CalibrationSet(tokens, "test"))
"""
OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "group_size": 32},
    {"method": "gptq", "group_size": 32, "desc_act": True},
    {"method": "nf4"},
    {"method": "awq", "name": "rtn", "group_size": 32, "rounding": "rtn"},
]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    pytest.importorskip("bitsandbytes")
    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = {"model": str(tiny), "outputs": OUTPUTS, "output_dir": str(folder / "artifacts")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return {name: contents(artifact.path) for name, artifact in make(folder / "recipe.yaml").items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "layers_done"),
    # 8 writes outside the layers; each layer: 37 writes for awq, 44 for gptq, 37 for rtn, 44 for nf4, and two
    # commits for each (scales, then weights), but one for nf4
    [("write", 20, 0), ("commit", 12, 1), ("write", 270, 1), ("seal", 2, 2)],
)
def test_killed_anywhere_it_continues_and_ends_with_the_same_bytes(
    where: str,
    number: int,
    layers_done: int,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    uninterrupted: dict[str, dict[str, bytes]],
    warm: Warm,
) -> None:
    recipe = write_recipe(outputs=OUTPUTS, calibration=None)  # the default, as `uninterrupted` has it
    said = tmp_path / "said"
    assert warm.run(KILL, [str(recipe), where, str(number)], said) == -signal.SIGKILL, said.read_text()
    artifacts = tmp_path / "artifacts"
    left = [p.name for p in artifacts.iterdir() if not p.name.endswith(".partial")]
    assert left == ([] if (where, number) != ("seal", 2) else ["tiny-awq"])
    journal = artifacts / "tiny-rtn.partial" / "model.journal.jsonl"
    done = len(journal.read_text().splitlines()) - 1
    assert done == layers_done
    again = {name: contents(a.path) for name, a in make(recipe).items()}
    assert again == uninterrupted


Q4, Q8 = ({"method": "gguf", "name": "x", "type": kind} for kind in ("Q4_K_M", "Q8_0"))
AWQ, NF4 = {"method": "awq", "name": "x", "group_size": 32}, {"method": "nf4", "name": "x"}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(Q4, Q8), (AWQ, NF4), (AWQ, Q8), (Q4, AWQ)])
def test_nothing_of_another_recipes_unfinished_work_is_sealed(
    before: dict[str, Any], after: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """One name, first for work that was killed before its end, then for another format."""
    pytest.importorskip("gguf")
    job = job_of(write_recipe(outputs=[before]))
    whole = make(write_recipe(outputs=[before], output_dir=str(tmp_path / "whole")))["x"].path
    partial = Path(shutil.copytree(whole, job.outputs[0].partial))
    (partial / "model.journal.jsonl").write_text('{"key": "of other work"}\n')
    made = make(write_recipe(outputs=[after]))["x"]
    expected = make(write_recipe(outputs=[after], output_dir=str(tmp_path / "expected")))["x"]
    assert contents(made.path) == contents(expected.path)


@pytest.mark.slow
def test_a_source_that_changes_is_not_sealed_under_the_old_ones_key(
    write_recipe: Callable[..., Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed after the first layer was noted: that layer stays, with the source put back the bytes are right."""
    model = Path(shutil.copytree(tiny, tmp_path / "source" / "tiny"))
    recipe = write_recipe(model=str(model))
    expected = contents(make(write_recipe(model=str(model), output_dir=str(tmp_path / "expected")))["awq"].path)
    shard = sorted(model.glob("*.safetensors"))[-1]
    data, commit, done = shard.read_bytes(), TensorWriter.commit, 0

    def changing(self: TensorWriter, step: dict[str, Any]) -> None:
        nonlocal done
        commit(self, step)
        done += 1
        if done == 2:  # scales and weights of layer 0
            shard.write_bytes(data[:-100] + bytes(100))

    write_recipe(model=str(model))
    monkeypatch.setattr(TensorWriter, "commit", changing)
    with pytest.raises(QtoolError, match=rf"{shard.name}: changed while the model was being converted"):
        make(recipe)
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["tiny-awq.partial"]
    monkeypatch.undo()
    shard.write_bytes(data)
    assert contents(make(recipe)["awq"].path) == expected


def test_whatever_number_of_threads_what_was_begun_is_ended_with_it(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is in the key; a finished artifact is not made again for it, and begun work goes on with its own."""
    before = torch.get_num_threads()
    job = job_of(write_recipe())
    nf4 = job_of(write_recipe(outputs=[{"method": "nf4", "rounding": "absmax"}]))
    keys = [artifact_key(job, job.outputs[0], CALIBRATION, number) for number in (1, 2)]
    assert keys[0] != keys[1]
    same = [artifact_key(nf4, nf4.outputs[0], CALIBRATION, number) for number in (1, 2)]
    assert same[0] == same[1]
    seal = OutputWriter.seal

    def fail(*_: object) -> None:
        raise QtoolError("planted")

    monkeypatch.setattr(OutputWriter, "seal", fail)
    with pytest.raises(QtoolError, match="planted"):
        make_artifacts(job, CALIBRATION, threads=2)
    monkeypatch.setattr(OutputWriter, "seal", seal)
    torch.set_num_threads(1)
    try:
        made = make_artifacts(job, CALIBRATION)["awq"]
        assert made.manifest is not None
        assert made.manifest.key == keys[1]
        assert made.manifest.versions["threads"] == "2"
        stamp = (made.path / "model.safetensors").stat().st_mtime_ns
        again = make_artifacts(job, CALIBRATION)["awq"]
        assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_one_who_had_looked_before_another_finished(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(outputs=[{"method": "nf4"}])
    flock, first = fcntl.flock, True

    def late(descriptor: int, operation: int) -> None:
        nonlocal first
        if first:
            first = False
            make(recipe)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    made = make(recipe)["nf4"]
    assert [path.name for path in made.path.parent.iterdir()] == ["tiny-nf4"]


def test_what_a_kill_left_after_the_rename_is_tidied(write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe(outputs=[{"method": "nf4"}])
    made = make(recipe)["nf4"]
    whole = contents(made.path)
    assert made.manifest is not None
    begun = made.path.with_name(made.path.name + ".partial")
    begun.mkdir()
    for folder in (made.path, begun):
        (folder / "model.journal.jsonl").write_text(json.dumps({"key": made.manifest.key}) + "\n")
    assert contents(make(recipe)["nf4"].path) == whole
    assert not begun.exists()


def test_ctrl_c_says_where_it_goes_on(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    commit = OutputWriter.commit

    def interrupted(self: OutputWriter, result: LayerResult, codes: LayerCodes) -> None:
        if result.index == 1:
            raise KeyboardInterrupt
        commit(self, result, codes)

    monkeypatch.setattr(OutputWriter, "commit", interrupted)
    with pytest.raises(Interrupted, match="it continues at layer 2 of 2"):
        make(write_recipe(outputs=[{"method": "nf4"}]))
