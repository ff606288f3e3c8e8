"""GGUF outputs through the whole pipeline, judged by llama.cpp itself and by the gguf package's reader."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llama_logits import divergence, llama_logprobs, reference_logprobs

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.manifest import Manifest
from qtool.convert.files.source import resolve
from qtool.convert.files.watch import sha256_file
from qtool.convert.files.writer import TensorWriter
from qtool.convert.formats.gguf.file import GgufFile, gguf_layout
from qtool.convert.formats.gguf.imatrix import read_imatrix, write_imatrix
from qtool.convert.formats.gguf.modelfile import modelfile
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines import llama_cpp
from qtool.evaluate.engines import server as served
from qtool.evaluate.engines.engine import Decoding, Model, Request, Running, Use
from qtool.evaluate.engines.torch_model import load_model
from qtool.make.job import Job, open_job
from qtool.make.outputs import make_artifacts
from qtool.make.writer import OutputWriter
from qtool.preparing import calibrate
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.ggml import quantize_ggml
from qtool.quantize.methods.method import LayerCodes
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.walk import LayerResult
from qtool.recipe.sections import load_recipe

gguf: Any = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
MINISTRAL3_ROPE = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0, "beta_fast": 8.0,
    "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0,
}  # fmt: skip
WINDOWS = {"vocab_size": 384, "query_pre_attn_scalar": 32, "sliding_window": 24}  # shorter than the text
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}


def convert(recipe: Path) -> tuple[Job, dict[str, Artifact]]:
    loaded = load_recipe(recipe)
    job = open_job(loaded, resolve(loaded.model.id), torch.device("cpu"), loaded.outputs)
    return job, make_artifacts(job, calibrate(job))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
        ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.0}, "attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": None, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}}),
        ("Qwen2", {"vocab_size": 384}),  # more rows than tokens: the vocabulary is padded
        ("Qwen3", {"vocab_size": 384}),
        ("Gemma", {"vocab_size": 384}),
        ("Ministral3", {"rope_parameters": MINISTRAL3_ROPE}),
        ("SeedOss", {}),
        ("Granite", MULTIPLIERS | {"attention_bias": True}),
        ("Starcoder2", {}),
        ("Phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
        ("Glm", {}),
        ("Ernie4_5", {}),
        ("Glm4", {}),
        ("Gemma2", WINDOWS | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}),
        ("Gemma3", WINDOWS | {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
        ("Gemma3", WINDOWS | {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": TWO_ROPES}),
    ],
)
def test_llama_cpp_computes_what_transformers_does(
    architecture: str, changes: dict[str, Any], model_maker: Callable[..., Path], write_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Names, row order, rotary settings, biases, head: a mistake in any of them moves the distribution."""
    model = model_maker(tmp_path / "model", architecture, **changes)
    _, artifacts = convert(write_recipe(model=str(model), outputs=[{"method": "gguf", "type": "F16"}]))
    artifact = artifacts["gguf"]
    ids = torch.randint(3, 320, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    positions = list(range(47, 2, -5))
    found, usual = (llama_logprobs(artifact, ids, positions, exact) for exact in (True, False))
    plain, rounded = (reference_logprobs(artifact, model, ids, each)[positions] for each in (False, True))
    assert divergence(rounded, found) < 3e-6  # what is left is the order of sums, which moves a rounding now and then
    assert divergence(plain, found) < 1e-5  # inputs in float16
    assert divergence(plain, usual) < 3e-5  # keys, values and sums of attention in float16


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, Artifact]]:
    folder = tmp_path_factory.mktemp("gguf")
    path = folder / "recipe.yaml"
    path.write_text(
        "model: qtool-demo\ncalibration: {text: qtool-code, samples: 8, length: 128}\noutputs:\n"
        "  - {method: gguf, name: q4}\n  - {method: gguf, name: plain, imatrix: false}\n"
        "  - {method: gguf, name: ggml, rounding: ggml}\n  - {method: gguf, name: q5, type: Q5_K_M}\n"
        f"  - {{method: gguf, name: q8, type: Q8_0}}\noutput_dir: {folder}/artifacts\n"
    )
    return convert(path)


def opened(file: Path, tokenizer: Any) -> AbstractContextManager[Running]:
    return llama_cpp.ENGINE.open(Model("m", gguf=file, tokenizer=tokenizer), Use("cpu", 2, lambda: 64))


@pytest.mark.slow
def test_demo_model_verifies_and_generates(demo: tuple[Job, dict[str, Artifact]]) -> None:
    _, artifacts = demo
    for artifact in artifacts.values():
        assert verify(artifact.path).sound
        assert any(note.startswith("token ids: equal") for note in artifact.notes)
    q4 = artifacts["q4"]
    assert q4.gguf is not None
    file = GgufFile.open(q4.gguf, q4.config)
    assert file.metadata("tokenizer.ggml.pre") == "deepseek-coder"
    assert file.metadata("general.file_type") == 15
    requests = [Request(text, lambda _: False) for text in ("def f(a", "class A")]
    with opened(q4.gguf, load_tokenizer(artifacts["q4"].path, False)) as engine:
        found = list(engine.generate(requests, Decoding(max_new_tokens=8, batch_size=2)))
    assert {index for index, _ in found} == {0, 1}


BRIEF = """
import socket, sys
from pathlib import Path
from urllib.parse import urlsplit
from qtool.evaluate.engines import llama_cpp
llama_cpp.PATIENCE = 1
for _ in range(12):
    with llama_cpp.serve(Path(sys.argv[1]), 64):
        pass
with llama_cpp.serve(Path(sys.argv[1]), 64) as url:
    half = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port))
    half.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 99\\r\\n\\r\\n{")
"""


@pytest.mark.slow
def test_a_server_ends_at_once(demo: tuple[Job, dict[str, Artifact]]) -> None:
    """Unused, with its loop not yet running; and with half a request that nobody completes. A proxy is not asked."""
    file = demo[1]["q8"].gguf
    environment = {"PATH": "/usr/bin:/bin", "http_proxy": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", BRIEF, str(file)], check=True, timeout=60, env=environment)


def test_llama_cpp_samples_by_temperature_and_top_p_alone(demo: tuple[Job, dict[str, Artifact]]) -> None:
    """llama-server would cut to its 40 likeliest tokens, and then to those above a twentieth of the likeliest."""
    artifact = demo[1]["q8"]
    assert artifact.gguf is not None
    tokenizer = load_tokenizer(artifact.path, False)
    requests = [Request("def f(a", lambda _: False, seed=seed) for seed in range(60)]
    with opened(artifact.gguf, tokenizer) as engine:
        hot = Decoding(max_new_tokens=1, batch_size=2, temperature=100.0)
        found = {text for _, text in engine.generate(requests, hot)}
    assert len(found) > 40  # nearly uniform over the vocabulary


def test_blocks_are_the_c_codes_with_the_importance_of_the_pass(demo: tuple[Job, dict[str, Artifact]]) -> None:
    """The stored blocks equal a fresh quantization weighed by the published imatrix.gguf, row order included."""
    job, artifacts = demo
    rows = read_imatrix(artifacts["ggml"].path / "imatrix.gguf")
    linear = "model.layers.1.self_attn.q_proj"
    weight = job.checkpoint.tensor(f"{linear}.weight")
    stored = artifacts["ggml"].codes(linear)
    assert stored.equals(quantize_ggml(weight, "Q4_K", rows["blk.1.attn_q.weight"]))
    assert artifacts["plain"].codes(linear).equals(quantize_ggml(weight, "Q4_K"))
    assert not stored.equals(artifacts["plain"].codes(linear))


def test_importance_is_the_mean_square_of_the_inputs(demo: tuple[Job, dict[str, Artifact]]) -> None:
    job, artifacts = demo
    rows = read_imatrix(artifacts["ggml"].path / "imatrix.gguf")
    model = load_model(job.checkpoint.read(), job.config, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    handle = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2))
    )

    tokens = token_windows(job.recipe.calibration, load_tokenizer(job.source.path, False))
    with torch.inference_mode():
        model(tokens)
    handle.remove()
    expected = torch.cat(seen).square().mean(0)
    # where the processor has bfloat16, means of squares alone are taken in it
    precision = 0.05 if fast_bfloat16() else 1e-3
    torch.testing.assert_close(rows["blk.1.ffn_down.weight"], expected, rtol=precision, atol=1e-6)


@pytest.mark.parametrize("name", ["q4", "q5", "ggml"])
def test_llama_cpp_computes_with_the_weights_that_qtool_reads(name: str, demo: tuple[Job, dict[str, Artifact]]) -> None:
    """It rounds the inputs of a block to eight bits, so the distributions differ a little; with blocks by descent no
    more than with ggml's own."""
    job, artifacts = demo
    artifact = artifacts[name]
    assert artifact.gguf is not None
    ids = token_windows(job.recipe.calibration, load_tokenizer(job.source.path, False))[0, :48].tolist()
    reference = load_model(artifact.read(), job.config, torch.device("cpu"))
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    tokenizer = load_tokenizer(artifact.path, False)
    whole = [n for n, row in enumerate(expected) if "\ufffd" not in tokenizer.decode([int(row.argmax())])]
    divergences = []
    with llama_cpp.serve(artifact.gguf, 64) as url:
        for position in whole[::6]:
            found = torch.full((expected.shape[1],), -torch.inf)
            for token, value in served.top_logprobs(url, ids[: position + 1], expected.shape[1]).items():
                found[token] = value
            row = expected[position]
            divergences.append(float((row.exp() * (row - found)).sum()))
    assert sum(divergences) / len(divergences) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Llama", "Gemma"])
def test_a_stopped_run_goes_on_in_its_own_stream(
    architecture: str, model_maker: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stood in the file after the first layer leads to the very bytes of a run that nothing stopped: rows are put
    back in order, norms are without the 1 that Gemma's have there."""
    model = model_maker(tmp_path / "model", architecture, **({} if architecture == "Llama" else {"vocab_size": 384}))
    text = f"model: {model}\noutputs: [{{method: gguf, type: Q5_K_M}}]\noutput_dir: "
    files, writes = [], []
    tokens = CalibrationSet(torch.randint(3, 320, (6, 48), generator=torch.Generator().manual_seed(0)), "test")
    commit = OutputWriter.commit

    def stopping(self: OutputWriter, result: LayerResult, codes: LayerCodes) -> None:
        writes.append(result.index)
        if result.index == 1:
            raise KeyboardInterrupt
        commit(self, result, codes)

    for name in ("whole", "stopped"):
        (tmp_path / "recipe.yaml").write_text(f"{text}{tmp_path}/{name}\n")
        loaded = load_recipe(tmp_path / "recipe.yaml")
        job = open_job(loaded, resolve(loaded.model.id), torch.device("cpu"), loaded.outputs)
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(OutputWriter, "commit", stopping)
                with pytest.raises(KeyboardInterrupt):
                    make_artifacts(job, tokens)
            assert writes[-2:] == [0, 1]
        made = make_artifacts(job, tokens)["gguf"].gguf
        assert made is not None
        files.append(made.read_bytes())
    assert files[0] == files[1]


def test_descent_loses_less_than_ggmls_own_blocks(demo: tuple[Job, dict[str, Artifact]]) -> None:
    """For every matrix of the first feed, whose inputs are the source's, and most others; in files of one size, with
    types mixed in a layer; while the weights themselves move further away."""
    _, artifacts = demo
    q4, ggml = artifacts["q4"], artifacts["ggml"]
    assert q4.gguf is not None
    assert ggml.gguf is not None
    assert q4.gguf.stat().st_size == ggml.gguf.stat().st_size
    assert q4.manifest is not None
    assert ggml.manifest is not None
    ledger, plain = q4.manifest.ledger, ggml.manifest.ledger
    assert set(ledger) == set(q4.linears())
    for linear, record in ledger.items():
        assert record["frobenius"] > plain[linear]["frobenius"], linear
        if "layers.0.self_attn" in linear and "o_proj" not in linear:
            assert record["error"] < 0.85 * record["rtn_error"], linear
    assert {q4.codes(linear).type for linear in q4.linears()} == {"Q4_K", "Q6_K"}  # type: ignore[union-attr]  # blocks
    outside = "model.embed_tokens"
    files = [GgufFile.open(one.gguf, one.config) for one in (q4, ggml) if one.gguf is not None]
    assert torch.equal(*(file.codes(outside).data for file in files))


@pytest.mark.slow
def test_an_imatrix_file_is_used_and_a_wrong_one_refused(demo: tuple[Job, dict[str, Artifact]], tmp_path: Path) -> None:
    _, artifacts = demo
    file = artifacts["ggml"].path / "imatrix.gguf"
    recipe = tmp_path / "recipe.yaml"
    text = f"model: qtool-demo\noutputs: [{{method: gguf, imatrix: {file}}}]\noutput_dir: {tmp_path}/artifacts\n"
    recipe.write_text(text)
    _, made = convert(recipe)
    linear = "model.layers.0.mlp.up_proj"
    assert made["gguf"].codes(linear).equals(artifacts["ggml"].codes(linear))
    other = tmp_path / "other.gguf"
    write_imatrix(other, {"blk.0.attn_q.weight": torch.ones(7)}, 1, 8, "x")
    recipe.write_text(text.replace(str(file), str(other)).replace("/artifacts", "/more"))
    with pytest.raises(QtoolError, match=r"made for another model: blk\.0\.attn_q\.weight has 7 values\."):
        convert(recipe)
    write_imatrix(other, {"of.nothing": torch.ones(7)}, 1, 8, "x")
    with pytest.raises(QtoolError, match="made for another model: it has none of this model's names"):
        convert(recipe)
    other.unlink()
    with pytest.raises(QtoolError, match=r"other\.gguf: no such file \(`imatrix:` of output 'gguf'\)"):
        convert(recipe)


def test_another_importance_matrix_at_the_same_place_is_another_artifact(
    demo: tuple[Job, dict[str, Artifact]], tmp_path: Path
) -> None:
    _, artifacts = demo
    rows = read_imatrix(artifacts["q4"].path / "imatrix.gguf")
    file, recipe = tmp_path / "m.gguf", tmp_path / "recipe.yaml"
    recipe.write_text(f"model: qtool-demo\noutputs: [{{method: gguf, imatrix: {file}}}]\noutput_dir: {tmp_path}/out\n")
    write_imatrix(file, rows, 8, 128, "x")
    convert(recipe)
    convert(recipe)  # the same again is reused
    write_imatrix(file, {name: row.flip(0) for name, row in rows.items()}, 8, 128, "x")
    with pytest.raises(QtoolError, match="holds an artifact of another recipe"):
        convert(recipe)


def test_no_file_tells_where_the_calibration_text_lay(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    _, artifacts = convert(write_recipe(outputs=[{"method": "gguf"}]))
    file = artifacts["gguf"].path / "imatrix.gguf"
    assert gguf.GGUFReader(file).fields["imatrix.datasets"].contents() == ["text.txt"]
    assert str(tmp_path).encode() not in file.read_bytes()


def test_fallbacks_are_told(write_recipe: Callable[..., Path]) -> None:
    _, artifacts = convert(write_recipe(outputs=[{"method": "gguf", "imatrix": False}]))
    notes = artifacts["gguf"].notes
    assert any("attn_q.weight" in note and "128 columns" in note and "Q4_K -> Q5_0" in note for note in notes)
    assert artifacts["gguf"].codes("model.layers.0.self_attn.q_proj").type == "Q5_0"
    assert artifacts["gguf"].codes("model.layers.1.mlp.down_proj").type == "Q6_K"


def test_planted_faults_are_found(demo: tuple[Job, dict[str, Artifact]], tmp_path: Path) -> None:
    import shutil

    _, artifacts = demo
    for number, fault in enumerate(("nan", "truncated", "missing key")):
        folder = tmp_path / str(number)
        shutil.copytree(artifacts["q8"].path, folder)
        file = next(folder.glob("*.gguf"))
        opened = GgufFile.open(file, artifacts["q8"].config)
        if fault == "nan":
            offset = int(opened.tensors["blk.1.ffn_up.weight"].data_offset)
            with file.open("r+b") as stream:
                stream.seek(offset)
                stream.write(b"\x00\x7e")  # a NaN for the first block's scale
        elif fault == "truncated":
            with file.open("r+b") as stream:
                stream.truncate(file.stat().st_size - 4096)
        else:
            data = file.read_bytes()
            file.write_bytes(data.replace(b"llama.block_count", b"llama.block_cound"))
        manifest = json.loads((folder / "qtool.json").read_text())
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        (folder / "qtool.json").write_text(json.dumps(manifest))
        result = verify(folder)
        assert not result.sound
        told = " ".join(check.detail for check in result.checks)
        expected = {
            "nan": "blk.1.ffn_up.weight holds NaN", "truncated": "whole GGUF file|truncated",
            "missing key": "llama.block_count is missing",
        }  # fmt: skip
        assert re.search(expected[fault], told)


def test_resume_ends_with_the_same_bytes(tmp_path: Path) -> None:
    layout = {"a.weight": ("Q8_0", (3, 64)), "b": ("F32", (5,))}
    first, second = torch.randint(0, 255, (204,), dtype=torch.uint8), torch.arange(5.0).view(torch.uint8)

    def begin(folder: Path, key: str = "k") -> TensorWriter:
        return TensorWriter(folder, gguf_layout(folder / "m.gguf", "llama", lambda w: w.add_name("m"), layout), key)

    whole = begin(tmp_path / "whole")
    whole.write("a.weight", first)
    whole.write("b", second)
    whole.close()
    killed = begin(tmp_path / "killed")
    killed.write("a.weight", first)
    killed.commit({"layer": 0})
    killed.close()
    again = begin(tmp_path / "killed")
    assert again.steps == [{"layer": 0}]
    again.write("b", second)
    again.close()
    assert (tmp_path / "killed/m.gguf").read_bytes() == (tmp_path / "whole/m.gguf").read_bytes()
    other = begin(tmp_path / "killed", "other")
    assert other.steps == []
    with pytest.raises(ValueError, match=r"a\.weight: planned torch\.uint8 \[204\]"):
        other.write("a.weight", second)
    other.close()


def test_killed_while_it_starts_over_no_old_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"

    def begin() -> TensorWriter:
        layout = gguf_layout(path, "llama", lambda writer: writer.add_name("m"), {"a.weight": ("F32", (2, 32))})
        return TensorWriter(tmp_path, layout, "k")

    begun = begin()
    begun.write("a.weight", torch.ones(64).view(torch.uint8))
    begun.commit({"layer": 0})
    begun.close()
    path.unlink()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qtool.convert.files.writer.start_journal", killed)
        with pytest.raises(KeyboardInterrupt):
            begin()
    again = begin()
    assert again.steps == []  # with the old journal it would have been one, of a file that holds zeros
    again.close()


def test_an_unknown_architecture_is_named(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    from qtool.convert.models.table import gguf_facts

    with pytest.raises(QtoolError, match=r"PhiForCausalLM cannot be written as GGUF yet\. Known: LlamaForCausalLM"):
        gguf_facts({"architectures": ["PhiForCausalLM"]})


def test_an_unknown_pre_tokenizer_is_refused(
    model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_maker(tmp_path / "model")
    path = model / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, raw["pre_tokenizer"]]}
    path.write_text(json.dumps(raw))
    with pytest.raises(QtoolError, match="no name that qtool knows for these split rules"):
        convert(write_recipe(model=str(model), outputs=[{"method": "gguf", "imatrix": False}]))
    with pytest.raises(QtoolError, match="token ids differ from the tokenizer's: "):
        convert(
            write_recipe(
                model=str(model), outputs=[{"method": "gguf", "imatrix": False, "pre_tokenizer": "deepseek-coder"}]
            )
        )


def test_a_file_that_llama_cpp_does_not_load_is_no_artifact(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    facts = SimpleNamespace(architecture="nosuchmodel")
    monkeypatch.setattr("qtool.convert.formats.gguf.format.gguf_facts", lambda _: facts)
    monkeypatch.setattr("qtool.make.outputs._walk", lambda *_: pytest.fail("layers were quantized before the proof"))
    with pytest.raises(QtoolError, match=r"llama\.cpp cannot load it"):
        convert(write_recipe(outputs=[{"method": "gguf", "imatrix": False}]))


def test_without_llama_cpp_the_proof_is_said_to_be_missing(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.make.token_proof.installed", lambda: False)
    _, made = convert(write_recipe(outputs=[{"method": "gguf", "type": "F16"}]))
    said = "token ids: not compared with llama.cpp's, which is not installed here."
    assert any(note.startswith(said) for note in made["gguf"].notes)


def test_ollama_reads_its_stops_as_the_model_writes_them() -> None:
    """Its parser takes off the quotes and decodes nothing (ollama/parser/parser.go, unquote)."""
    stop = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert f'\nPARAMETER stop "{stop}"\n' in modelfile("m.gguf", None, [stop]).text


def test_sealed_manifest_reads_back(demo: tuple[Job, dict[str, Artifact]]) -> None:
    for name, errors in (("ggml", {"frobenius", "weighted_error"}), ("q4", {"frobenius", "rtn_error", "error"})):
        manifest = demo[1][name].manifest
        assert isinstance(manifest, Manifest)
        assert set(manifest.ledger["model.layers.0.mlp.up_proj"]) == errors
    assert "gguf" in manifest.versions


@pytest.mark.slow
def test_llama_cpp_scores_a_file_beside_another(demo: tuple[Job, dict[str, Artifact]], tmp_path: Path) -> None:
    from qtool.measure.scoring import evaluate_folders
    from qtool.recipe.judging import EvaluateSection

    asked = {"tasks": [{"task": "heldout", "limit": 4}], "engine": "llama.cpp", "max_new_tokens": 64}
    section = EvaluateSection.model_validate(asked)
    q4, q8 = demo[1]["q4"].path, demo[1]["q8"].path
    scores = evaluate_folders(q4, q8, section, tmp_path, "cpu", False)
    for name in ("source", q4.name):
        score = scores.tasks[name]["heldout"]
        assert score.settings.engine == "llama.cpp"
        assert sum(score.passed) >= 2
    with pytest.raises(QtoolError, match=r"engine llama\.cpp runs \.gguf files only"):
        evaluate_folders(demo[0].source.path, None, section, tmp_path, "cpu", False)
