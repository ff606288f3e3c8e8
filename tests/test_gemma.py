"""Gemma, Gemma 2 and Gemma 3 through every output: norms of 1 + weight, windows shorter than the text, two rotary
bases; and what of them cannot be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.folder import EXTRAS
from qtool.convert.files.source import resolve
from qtool.convert.formats.gguf.metadata import add_metadata
from qtool.convert.models.family import SLIDING
from qtool.convert.models.model_config import is_tied, layer_windows, rope_parameters
from qtool.convert.models.shape import read_geometry, tensor_shapes
from qtool.convert.runtimes.vllm import dtype_flag
from qtool.convert.skeleton import load_config
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines import llama_cpp, reference, transformers
from qtool.evaluate.engines.engine import Decoding, Request
from qtool.evaluate.engines.torch_model import TorchModel, load_model
from qtool.evaluate.engines.transformers import load_native
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe.sections import load_recipe
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import read_headers
from qtool.sizing.kv_cache import kv_bytes

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 320, (6, 48), generator=torch.Generator().manual_seed(0))
KINDS = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "Gemma": {}, "Gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 32},
    "Gemma3": {"sliding_window": 24, "query_pre_attn_scalar": 32, "layer_types": KINDS},
}  # fmt: skip
SMALL = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128}  # six outputs are made of each
OUTPUTS = [
    {"method": "awq", "name": "awq-g32", "group_size": 32, "dtype": "bfloat16"},
    {"method": "gptq", "name": "gptq-g32", "group_size": 32, "dtype": "bfloat16"},
    {"method": "gptq", "name": "compressed-tensors-g32", "format": "compressed-tensors", "group_size": 32,
     "scaling": "awq"},
    {"method": "nf4"}, {"method": "gguf", "name": "Q4_K_M"}, {"method": "gguf", "name": "BF16", "type": "BF16"},
]  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=TOKENS).logits.float()
    return found


def divergence(model: Any, source: torch.Tensor) -> float:
    p, q = source.log_softmax(-1), logits(model).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module", params=MODELS)
def made(
    request: pytest.FixtureRequest, model_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Artifact]]:
    import yaml

    folder = tmp_path_factory.mktemp(request.param)
    model = model_maker(folder / "model", request.param, **SMALL, **MODELS[request.param])
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(model), "outputs": OUTPUTS, "output_dir": str(folder / "out")}))
    loaded = load_recipe(recipe)
    job = open_job(loaded, resolve(str(model)), CPU, loaded.outputs)
    return model, make_artifacts(job, CalibrationSet(TOKENS, "test"))


@pytest.fixture(scope="module")
def source(made: tuple[Path, dict[str, Artifact]]) -> Any:
    return load_model(Checkpoint.open(made[0]).read(), load_config(made[0]), CPU)


def test_the_loaded_model_is_transformers_own(made: tuple[Path, dict[str, Artifact]], source: Any) -> None:
    assert torch.equal(logits(source), logits(load_native(made[0], CPU)))


def test_every_output_is_the_model(made: tuple[Path, dict[str, Artifact]], source: Any) -> None:
    model, artifacts = made
    expected, headers = logits(source), read_headers(str(model))
    for name, artifact in artifacts.items():
        found = divergence(load_model(artifact.read(), load_config(model), CPU), expected)
        assert found < (1e-6 if name == "BF16" else 0.5), name
        assert verify(artifact.path, model).sound, name
        assert artifact.manifest is not None
        if name in ("awq-g32", "gptq-g32", "compressed-tensors-g32", "nf4", "Q4_K_M"):
            assert weights_of(headers, name).nbytes == artifact.manifest.tensor_bytes, name


def test_vllm_has_no_float16_for_some(made: tuple[Path, dict[str, Artifact]]) -> None:
    """It takes bfloat16 then, and so do its AWQ kernels: nothing of it fails."""
    model, artifacts = made
    kind = json.loads((model / "config.json").read_text())["model_type"]
    checks = [c for c in verify(artifacts["awq-g32"].path).checks if c.name.startswith("vLLM 0.32: ")]
    assert {c.name: c.status for c in checks}["vLLM 0.32: plain kernel, TP 1"] == "pass"
    assert dtype_flag(artifacts["awq-g32"].config) is None  # it was asked for in bfloat16
    float16 = artifacts["compressed-tensors-g32"].config
    assert dtype_flag(float16) == (None if kind == "gemma" else "bfloat16")


def test_scales_folded_into_the_norms_change_nothing(made: tuple[Path, dict[str, Artifact]], source: Any) -> None:
    """The artifact's norms with the source's linears, scaled but not rounded, compute what the source does."""
    model, artifacts = made
    weights = Checkpoint.open(model)
    for name in ("awq-g32", "compressed-tensors-g32"):
        scales = Checkpoint.open(artifacts[name].path / EXTRAS)
        state = dict(artifacts[name].read())
        for linear in artifacts[name].linears():
            columns, rows = scales.tensor(f"{linear}.columns"), scales.tensor(f"{linear}.rows")
            state[f"{linear}.weight"] = weights.tensor(f"{linear}.weight").float() * columns / rows.unsqueeze(1)
        norms = [key for key in state if "layers" in key and not torch.equal(state[key], weights.tensor(key).float())]
        assert any("layernorm" in key for key in norms)
        folded = load_model(iter(state.items()), load_config(model), CPU)
        torch.testing.assert_close(logits(folded), logits(source), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "package"), [("compressed-tensors-g32", "compressed_tensors"), ("nf4", "bitsandbytes")]
)
def test_transformers_loads_it(made: tuple[Path, dict[str, Artifact]], name: str, package: str) -> None:
    pytest.importorskip(package)
    artifact = made[1][name]
    ours = load_model(artifact.read(), load_config(artifact.path), CPU)
    exact = logits(ours)
    assert divergence(load_native(artifact.path, CPU), exact) < 2 * divergence(ours.to(torch.bfloat16), exact)


def test_batched_greedy_equals_transformers_one_by_one(made: tuple[Path, dict[str, Artifact]], source: Any) -> None:
    """Answers that outgrow the window, in a batch of different lengths."""
    tokenizer = load_tokenizer(made[0], False)
    prompts = ["def f(a, b):\n    return a * 3 + b\n\n\ndef f", "def", "def f31(a, b):"]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = source.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    engine = TorchModel(reference.FACTS, source, tokenizer)
    found = dict(engine.generate([Request(prompt, lambda _: False) for prompt in prompts], Decoding(40, 3)))
    assert [found[index] for index in range(3)] == expected


def config_of(architecture: str, **changes: Any) -> dict[str, Any]:
    """As the Hub's config.json are: neither tied heads nor kinds of layers are said."""
    base = {
        "architectures": [f"{architecture}ForCausalLM"], "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return base | changes


GEMMA_3_1B: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
    "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512, "sliding_window_pattern": 6,
    "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"),
    [  # as their model cards and safetensors headers say
        (config_of("Gemma2"), 2_614_341_888),
        (
            config_of("Gemma2", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
                      num_attention_heads=16, num_key_value_heads=8),
            9_241_705_984,
        ),
        (config_of("Gemma3", **GEMMA_3_1B), 999_885_952),
        (
            config_of("Gemma", hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
                      num_attention_heads=16, num_key_value_heads=16),
            8_537_680_896,
        ),
    ],
)  # fmt: skip
def test_published_sizes(config: dict[str, Any], parameters: int, tmp_path: Path) -> None:
    shapes = tensor_shapes(config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert weights_of(read_headers(str(path)), "source").nbytes == 2 * parameters


def test_a_config_that_leaves_windows_and_bases_to_defaults() -> None:
    two, three = config_of("Gemma2"), config_of("Gemma3", **GEMMA_3_1B)
    assert is_tied(two)
    assert not is_tied(two | {"tie_word_embeddings": False})
    assert layer_windows(two, 4) == (4096, None, 4096, None)
    assert layer_windows(three, 7) == (512, 512, 512, 512, 512, None, 512)
    assert layer_windows(config_of("Gemma"), 2) == (None, None)
    assert rope_parameters(three)["rope_theta"] == 1000000
    assert rope_parameters(three, SLIDING) == {"rope_theta": 10000, "rope_type": "default"}
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    assert rope_parameters(nested, SLIDING) == {"rope_theta": 1e4, "rope_type": "default"}
    geometry = read_geometry(three)
    row = 2 * 256 * 2
    assert kv_bytes(geometry, transformers.FACTS, 8192, 1, "bf16") == (4 * 8192 + 22 * 512) * row
    assert kv_bytes(geometry, llama_cpp.FACTS, 8192, 1, "f16") == (4 * 8192 + 22 * 1024) * row


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is 144; llama.cpp's gemma2 takes 256"),
        ("Gemma2", {"final_logit_softcapping": None}, "a soft cap is null; llama.cpp's gemma2 always has both"),
        ("Gemma2", {"layer_types": ["full_attention"] * 26}, "one layer in so many, and not every one"),
        ("Gemma3", {"layer_types": (KINDS + ["full_attention"] + KINDS * 12)[:26]}, "one layer in so many"),
        (
            "Gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
            "sliding layers with a rotary scaling of their own",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_compute_is_refused(architecture: str, changes: dict[str, Any], message: str) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(None, architecture.lower())
    with pytest.raises(QtoolError, match=message):
        add_metadata(writer, config_of(architecture, **changes), "m", "F16")
    add_metadata(gguf.GGUFWriter(None, architecture.lower()), config_of(architecture), "m", "F16")
