"""Mixtures of experts in GGUF files: llama.cpp computes what transformers does; stacks hold each one's own blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_logits import divergence, llama_logprobs, reference_logprobs
from moe_models import MIXTURES
from safetensors.torch import load_file
from small_models import converted, make_model

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.formats.gguf.imatrix import read_imatrix
from qtool.convert.models.config_keys import check_gguf
from qtool.convert.models.shape import decoder_of
from qtool.convert.models.table import FAMILIES
from qtool.convert.skeleton import load_config
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines.torch_model import load_model
from qtool.make.outputs import Interrupted
from qtool.make.writer import OutputWriter
from qtool.quantize.methods.ggml import quantize_ggml
from qtool.quantize.methods.method import LayerCodes
from qtool.quantize.walk import LayerResult

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
CPU = torch.device("cpu")
WIDE = {"hidden_size": 256, "head_dim": 64, "vocab_size": 384}  # rows that K-quants take
OUTPUTS: list[dict[str, Any]] = [
    {"method": "gguf", "name": "f16", "type": "F16"},
    {"method": "gguf", "name": "q4", "type": "Q4_K_M", "imatrix": False},
    {"method": "gguf", "name": "q8", "type": "Q8_0", "imatrix": False},
]
WEIGHED: list[dict[str, Any]] = [
    {"method": "gguf", "name": "stream"},
    {"method": "gguf", "name": "grams", "propagate_error": False},
    {"method": "gguf", "name": "ggml", "rounding": "ggml"},
]


def wide(architecture: str, folder: Path, **others: Any) -> Path:
    """A model whose experts' rows K-quants take."""
    changes = MIXTURES[architecture] | WIDE
    changes |= {key: 256 for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in changes}
    changes |= {"mlp_only_layers": []} if "mlp_only_layers" in changes else {}
    changes.pop("mlp_layer_types", None)
    changes |= {} if "moe_intermediate_size" in changes else {"intermediate_size": 256}
    return make_model(folder, architecture, **changes | others)


WRITTEN = [name for name in MIXTURES if FAMILIES[f"{name}ForCausalLM"].gguf]


@pytest.fixture(scope="module", params=WRITTEN)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A model and its artifacts."""
    folder = tmp_path_factory.mktemp(request.param)
    model = wide(request.param, folder / "model", loudness=0.4)
    return model, converted(model, OUTPUTS, folder)


@torch.inference_mode()
def test_llama_cpp_computes_what_transformers_does(made: tuple[Path, dict[str, Path]]) -> None:
    """Router, normalisation, stacks, shared experts and their gate: a mistake in any of them moves the distribution.
    Four bits stay close; there llama.cpp rounds inputs to eight bits."""
    model, paths = made
    ids = torch.randint(3, 320, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    positions = list(range(3, 40, 4))
    for name, limit in (("f16", 1e-5), ("q4", 0.05)):
        expected = reference_logprobs(Artifact.open(paths[name]), model, ids)
        found = llama_logprobs(Artifact.open(paths[name]), ids, positions)
        assert abs(divergence(expected[positions], found)) < limit, name
    source = load_model(Checkpoint.open(model).read(), load_config(model), CPU)(torch.tensor([ids])).logits
    p, q = source[0].log_softmax(-1), expected
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.5


def test_every_expert_is_quantized_alone(made: tuple[Path, dict[str, Path]]) -> None:
    """A stack holds, expert after expert, the blocks that ggml's own code makes of each expert's matrix; they verify
    against the source, and every one is in the ledger."""
    import gguf

    model, paths = made
    artifact, source = Artifact.open(paths["q4"]), Checkpoint.open(model)
    decoder = decoder_of(artifact.config)
    mixture = decoder.family.mixture
    assert mixture is not None
    assert artifact.manifest is not None
    assert artifact.gguf is not None
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(artifact.gguf).tensors}
    layer = decoder.shape.sparse.index(True)
    for part, name in (("gate", "gate"), ("up", "up"), ("down", "down")):
        stack = reader[f"blk.{layer}.ffn_{name}_exps.weight"]
        weights = [
            source.tensor(f"{decoder.at(layer)}{mixture.module(e, part)}.weight") for e in range(decoder.shape.experts)
        ]
        assert stack.shape.tolist() == [*reversed(weights[0].shape), len(weights)]
        kind = stack.tensor_type.name
        assert kind in ("Q4_K", "Q6_K")
        expected = torch.cat([quantize_ggml(weight, kind, None).data.flatten() for weight in weights])
        assert torch.equal(torch.from_numpy(stack.data.copy()).flatten(), expected)
    assert reader[f"blk.{layer}.ffn_gate_inp.weight"].tensor_type.name == "F32"
    modules = {
        decoder.at(layer) + one.module for layer in range(decoder.shape.layers) for one in decoder.matrices(layer)
    }
    assert set(artifact.manifest.ledger) == modules
    for path in paths.values():
        result = verify(path, model)
        assert result.sound, [check for check in result.checks if check.status == "fail"]


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        (
            "Qwen3Moe",
            {"mlp_only_layers": [1]},
            "layers have no experts, layer 1 the first; llama.cpp's qwen3moe has them",
        ),
        ("Qwen3Moe", {"norm_topk_prob": False}, "norm_topk_prob is False; llama.cpp's qwen3moe always normalises"),
        ("Qwen2Moe", {"norm_topk_prob": True}, "norm_topk_prob is True; llama.cpp's qwen2moe never normalises"),
        ("Glm4Moe", {"n_group": 2}, "n_group is 2; llama.cpp's glm4moe chooses among all"),
        ("Olmoe", {"norm_topk_prob": True}, "norm_topk_prob is True; llama.cpp's olmoe never normalises"),
        ("Olmoe", {"num_key_value_heads": 2}, "heads share keys and values"),
        ("Olmoe", {"tie_word_embeddings": True}, "llama.cpp's olmoe takes a head of its own alone"),
        ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; llama.cpp's olmoe clips nothing"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    architecture: str, changes: dict[str, Any], said: str, model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_maker(tmp_path / "model", architecture, **MIXTURES[architecture] | changes)
    with pytest.raises(QtoolError, match=said.replace(".", r"\.")):
        check_gguf(json.loads((model / "config.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Qwen2Moe", "Mixtral"])
def test_experts_go_into_k_quants_by_descent(architecture: str, tmp_path: Path) -> None:
    """By default in the output's own stream, or on the source's inputs, where logits are closer to its than with
    ggml's own blocks. On the source's inputs every expert loses less than by these; in a stream, what it makes up for
    counts as lost. Each says its tokens, and has its row in imatrix.gguf."""
    model = wide(architecture, tmp_path / "model", loudness=0.4)  # louder, routing decides and not the weights
    paths = converted(model, WEIGHED, tmp_path)
    kl = {name: _kl(paths[name], model) for name in paths}
    assert kl["grams"] < kl["ggml"]
    assert kl["stream"] < 1.1 * kl["ggml"]  # 288 tokens of noise have no drift to learn: it must do no harm
    for name in ("stream", "grams"):
        artifact = Artifact.open(paths[name])
        assert artifact.manifest is not None
        ledger = artifact.manifest.ledger
        own = {matrix: record for matrix, record in ledger.items() if ".experts." in matrix}
        assert len(own) == 3 * sum(expert_count(model, layer) for layer in range(2))
        for matrix, record in own.items():
            assert name == "stream" or 0 < record["error"] < 0.7 * record["rtn_error"], matrix
            assert record["tokens"] > 0
            assert ("routing" in record) == (name == "stream")
        assert sum(record["tokens"] for record in own.values()) == 3 * 2 * 288 * 2  # matrices, layers, tokens, k
        result = verify(paths[name], model)
        assert result.sound, [check for check in result.checks if check.status == "fail"]
        rows = read_imatrix(paths[name] / "imatrix.gguf")
        kept = load_file(next((paths[name] / "qtool").glob("importance*.safetensors")))
        experts = [kept[matrix] for matrix in sorted(own, key=expert_key) if is_first_up(matrix)]
        torch.testing.assert_close(rows["blk.0.ffn_up_exps.weight"], torch.cat(experts), rtol=1e-5, atol=0)
    ggml = Artifact.open(paths["ggml"]).manifest
    assert ggml is not None
    assert all("rtn_error" not in record for record in ggml.ledger.values())


@torch.inference_mode()
def _kl(path: Path, model: Path) -> float:
    """Of the source's next tokens to the artifact's, on tokens that calibration had not."""
    ids = torch.randint(0, 320, (8, 64), generator=torch.Generator().manual_seed(5))
    read, config = (Checkpoint.open(model).read(), Artifact.open(path).read()), load_config(model)
    p, q = (load_model(one, config, CPU)(ids).logits.log_softmax(-1) for one in read)
    return float((p.exp() * (p - q)).sum(-1).mean())


def expert_count(model: Path, layer: int) -> int:
    shape = decoder_of(json.loads((model / "config.json").read_text())).shape
    return shape.experts * shape.sparse[layer]


def expert_key(matrix: str) -> int:
    return int(matrix.split(".experts.")[1].split(".")[0])


def is_first_up(matrix: str) -> bool:
    return matrix.startswith("model.layers.0.") and matrix.endswith((".up_proj", ".w3"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Qwen2Moe", "Glm4Moe"])
def test_a_mixture_continues_with_the_same_bytes(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams are replayed through layers as the files hold them: each expert alone, norms of a GGUF file left out, a
    router that took a scale in the dtype of its file."""
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 0} if architecture == "Glm4Moe" else {}
    model = make_model(tmp_path / "model", architecture, **MIXTURES[architecture] | layers)
    outputs = [WEIGHED[0], {"method": "awq", "group_size": 32}]
    (tmp_path / "whole").mkdir()
    (tmp_path / "begun").mkdir()
    whole = converted(model, outputs, tmp_path / "whole")
    write = OutputWriter.commit

    def interrupted(self: OutputWriter, result: LayerResult, codes: LayerCodes) -> None:
        if result.index == 1:
            raise KeyboardInterrupt
        write(self, result, codes)

    with monkeypatch.context() as patch:
        patch.setattr(OutputWriter, "commit", interrupted)
        with pytest.raises(Interrupted, match="it continues at layer 2 of 2"):
            converted(model, outputs, tmp_path / "begun")
    again = converted(model, outputs, tmp_path / "begun")
    for name, path in whole.items():
        for file in path.rglob("*"):
            if file.suffix in (".gguf", ".safetensors"):
                assert file.read_bytes() == (again[name] / file.relative_to(path)).read_bytes(), (name, file.name)
