"""Artifacts whose settings were changed and whose hashes were written anew: each is found by what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool import QtoolError
from qtool.convert.files.watch import sha256_file
from qtool.convert.verify.checks import verify
from qtool.run import run

OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "group_size": 32}, {"method": "gptq", "group_size": 32},
    {"method": "gptq", "name": "ct", "format": "compressed-tensors", "group_size": 32}, {"method": "nf4"},
    {"method": "gguf"},
]  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    recipe = {
        "model": str(tiny), "calibration": {"text": "qtool-code", "samples": 4, "length": 32}, "outputs": OUTPUTS,
        "output_dir": str(folder / "artifacts"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record = run(folder / "recipe.yaml", folder / "runs", "cpu")
    assert not record.failed
    return folder / "artifacts"


def changed(artifacts: Path, name: str, target: Path, edit: Callable[[Path], Any]) -> Path:
    """A copy of an artifact, edited, with the hashes that go with it."""
    folder = target / name
    shutil.copytree(artifacts / f"tiny-{name}", folder)
    edit(folder)
    manifest = json.loads((folder / "qtool.json").read_text())
    for file, entry in manifest["files"].items():
        if (folder / file).exists():
            entry |= {"bytes": (folder / file).stat().st_size, "sha256": sha256_file(folder / file)}
    (folder / "qtool.json").write_text(json.dumps(manifest))
    return folder


def setting(file: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(data | changes))

    return edit


def section(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        said: Mapping[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
        setting(quantization_config=dict(said) | changes)(folder)

    return edit


def key(name: str, value: Any, count: int = 1) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        import gguf

        reader: Any = gguf.GGUFReader(str(next(p for p in folder.glob("*.gguf") if p.name != "imatrix.gguf")), "r+")
        field = reader.fields[name]
        for index in field.data[:count]:
            field.parts[index][0] = value
        reader.data.flush()

    return edit


def faults(folder: Path, source: Path | None = None) -> str:
    failed = [check for check in verify(folder, source).checks if check.status == "fail" and check.required]
    return "; ".join(f"{check.name}: {check.detail}" for check in failed)


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: str(o.get("name", o["method"])))
def test_what_was_made_is_sound(output: dict[str, Any], artifacts: Path, tiny: Path) -> None:
    found = verify(artifacts / f"tiny-{output.get('name', output['method'])}", tiny)
    assert found.sound
    assert "settings of the source" in {check.name for check in found.checks if check.status == "pass"}


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("gguf", key("llama.attention.layer_norm_rms_epsilon", 1e-2), "layer_norm_rms_epsilon is"),
        ("gguf", key("llama.rope.freq_base", 5e5), "llama.rope.freq_base is 500000.0"),
        ("gguf", key("llama.context_length", 10**6), "llama.context_length is 1000000"),
        ("gguf", key("tokenizer.ggml.eos_token_id", 5), "eos_token_id is 5"),
        ("gguf", key("tokenizer.ggml.add_bos_token", True), "add_bos_token is True"),
        ("gguf", key("general.file_type", 7), "general.file_type is 7"),
        ("gguf", key("tokenizer.ggml.token_type", 6, 40), "token_type is 6 at 0, the tokenizer says 3"),
        ("gguf", key("tokenizer.ggml.tokens", 66, 1), "tokenizer.ggml.tokens is"),
        ("gguf", lambda folder: (folder / "Modelfile").write_text("FROM elsewhere\n"), "Modelfile is not what"),
        ("gguf", lambda folder: (folder / "imatrix.gguf").write_bytes(b"GGUF" * 9), "imatrix.gguf: not an importance"),
        ("gguf", setting(rms_norm_eps=0.5), "layer_norm_rms_epsilon is"),
        ("awq", section(zero_point=False), "zero_point is False, and the artifact was made with True"),
        ("nf4", section(load_in_8bit=True), "load_in_8bit is True"),
        ("gptq", section(true_sequential=False), "true_sequential is False"),
        ("ct", section(quantization_status="frozen"), "quantization_status is 'frozen'"),
    ],
)
def test_found_without_the_source(
    name: str, edit: Callable[[Path], Any], said: str, artifacts: Path, tmp_path: Path
) -> None:
    assert said in faults(changed(artifacts, name, tmp_path, edit))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (setting(rms_norm_eps=0.5), "config.json: rms_norm_eps is 0.5, the source says 1e-06"),
        (setting(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "config.json: rope_parameters is"),
        (setting(hidden_act="gelu"), "config.json: hidden_act is 'gelu', the source says 'silu'"),
        (setting(num_attention_heads=8, head_dim=16, num_key_value_heads=4), "config.json: head_dim is 16"),
        (setting(dtype="float32"), "config.json: dtype is 'float32'"),
        (setting(foo=1), "config.json: foo is 1, the source says missing"),
        (setting("generation_config.json", eos_token_id=5), "generation_config.json is not the source's"),
        (setting("tokenizer_config.json", chat_template="x"), "tokenizer_config.json is not the source's"),
        (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json is the source's and not"),
        (lambda folder: (folder / "LICENSE").write_text("mine"), "LICENSE is here and not the source's"),
    ],
)
def test_found_beside_the_source(
    edit: Callable[[Path], Any], said: str, artifacts: Path, tiny: Path, tmp_path: Path
) -> None:
    assert said in faults(changed(artifacts, "awq", tmp_path, edit), tiny)


def test_a_tokenizer_that_is_code_is_not_run(artifacts: Path, tmp_path: Path) -> None:
    """Its keys are not compared then; those of config.json are."""
    code = setting("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    found = {check.name: check for check in verify(changed(artifacts, "gguf", tmp_path, code)).checks}
    assert found["keys of the file"].status == "pass"
    assert "its tokenizer is code" in found["keys of the file"].detail

    def both(folder: Path) -> None:
        code(folder)
        key("llama.rope.freq_base", 5e5)(folder)

    assert "freq_base is 500000.0" in faults(changed(artifacts, "gguf", tmp_path / "b", both))


def test_the_source_is_looked_for(artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="no such folder"):
        verify(artifacts / "tiny-awq", tmp_path / "gone")
