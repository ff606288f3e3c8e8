"""Sizes against published figures, real artifacts and transformers' own memory; the search for what fits."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.source import resolve
from qtool.convert.models.shape import read_geometry, tensor_shapes
from qtool.convert.skeleton import build_skeleton, expected_shapes, load_config
from qtool.evaluate.engines.facts import EngineFacts
from qtool.evaluate.engines.llama_cpp import FACTS as LLAMA_CPP
from qtool.evaluate.engines.transformers import FACTS as TRANSFORMERS
from qtool.evaluate.engines.transformers import activations
from qtool.evaluate.engines.vllm import FACTS as VLLM
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.preparing import calibrate
from qtool.recipe.sections import load_recipe
from qtool.sizing.accelerators import load_accelerators
from qtool.sizing.bounds import decode_seconds, prefill_flops
from qtool.sizing.fit import Setting, estimate_of, fits, largest_context, most_sequences, offload_of, split_faults
from qtool.sizing.formats import artifact_weights, method_of, weights_of
from qtool.sizing.headers import Headers, read_headers
from qtool.sizing.kv_cache import check_kv_dtype, kv_bytes

IQUEST = Path(__file__).parent / "data" / "iquest"
CARDS = load_accelerators()
KIB, MIB, GIB = 2**10, 2**20, 2**30


def iquest(size: str) -> Headers:
    return read_headers(str(IQUEST / f"IQuest-Coder-V1-{size}"))


def config_of(**changes: Any) -> dict[str, Any]:
    base = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 512, "dtype": "bfloat16",
        "max_position_embeddings": 8192,
    }  # fmt: skip
    return base | changes


def test_iquest_40b_equals_the_published_sizes() -> None:
    headers = iquest("40B")
    source = weights_of(headers, "source")
    assert source.parameters == 39_794_283_520
    assert source.nbytes == 2 * 39_794_283_520
    for name, expected in (("awq", 20.34), ("gptq", 20.36), ("nf4", 20.21)):
        assert round(weights_of(headers, name).nbytes / GIB, 2) == expected
    for name, mib in (("Q4_K_M", 22915.45), ("Q5_K_M", 26887.32), ("Q6_K", 31134.00), ("Q8_0", 40325.02)):
        assert round(weights_of(headers, name).nbytes / MIB, 2) == mib
    assert kv_bytes(headers.geometry, TRANSFORMERS, 1, 1, "bf16") == 320 * KIB
    assert kv_bytes(headers.geometry, TRANSFORMERS, 131072, 1, "bf16") == 40 * GIB  # linear, no square root


def test_the_loop_reads_its_layers_twice_and_caches_a_window_more() -> None:
    plain, loop = iquest("40B"), iquest("40B-Loop")
    assert weights_of(loop, "source").nbytes - weights_of(plain, "source").nbytes == 2 * 80 * (40 * 128 + 40)
    more = kv_bytes(loop.geometry, TRANSFORMERS, 32768, 1, "bf16")
    assert more - kv_bytes(plain.geometry, TRANSFORMERS, 32768, 1, "bf16") == 64 * 320 * KIB
    assert prefill_flops(loop.geometry, 4096, 1) > 2 * prefill_flops(plain.geometry, 4096, 1) * 0.98
    awq = weights_of(plain, "awq")
    once, twice = (
        decode_seconds(h.geometry, VLLM, CARDS["H200"], awq.layers, awq.head, 0, 1).best for h in (plain, loop)
    )
    assert 1.9 < twice / once < 2


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {}), ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": 64}), ("Qwen2", {}), ("Qwen3", {}), ("Gemma", {}), ("Gemma2", {}),
        ("Gemma3", {"layer_types": ["sliding_attention", "full_attention"]}),
    ],
)  # fmt: skip
def test_shapes_from_config_are_those_of_transformers(
    architecture: str, changes: dict[str, Any], model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model_maker(tmp_path / "m", architecture, **changes)
    shapes, tied = expected_shapes(build_skeleton(load_config(folder)))
    found = tensor_shapes(json.loads((folder / "config.json").read_text()))
    assert found == {name: shape for name, shape in shapes.items() if name not in tied}


@pytest.mark.parametrize("name", ["source", "awq-g32", "nf4", "Q8_0"])
def test_a_tied_head_that_is_stored_too_is_counted_once(name: str, tiny: Path) -> None:
    headers = read_headers(str(tiny))
    embedding = headers.tensors["model.embed_tokens.weight"]
    twice = replace(headers, tensors=dict(headers.tensors) | {"lm_head.weight": embedding})
    plain, stored = weights_of(headers, name), weights_of(twice, name)
    assert (stored.nbytes, stored.parameters) == (plain.nbytes, plain.parameters)
    if name != "Q8_0":  # on the disk it lies twice; llama.cpp's files leave it out
        assert (stored.files or 0) - (plain.files or 0) > 320 * 128 * 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", "8"), ("num_key_value_heads", 0), ("head_dim", -1), ("max_position_embeddings", "4k"),
        ("sliding_window", -3), ("loop_num", 1.5), ("max_window_layers", True),
    ],
)  # fmt: skip
def test_a_number_that_is_none_is_named(key: str, value: object) -> None:
    config = iquest("40B").config | {"sliding_window": 64, "use_sliding_window": True} | {key: value}
    with pytest.raises(QtoolError, match=f"{key} is {value!r}; a positive whole number is needed"):
        read_geometry(config)


def test_architectures_are_a_list() -> None:
    with pytest.raises(QtoolError, match="architectures is 'LlamaForCausalLM'; a list of names is needed"):
        read_geometry(dict(iquest("40B").config) | {"architectures": "LlamaForCausalLM"})


@pytest.mark.slow
def test_every_artifact_has_the_planned_size(tiny: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    outputs = [
        {"method": "awq", "name": "awq-g32", "group_size": 32},
        {"method": "gptq", "name": "gptq-g32", "group_size": 32},
        {"method": "gptq", "name": "gptq-8-g32", "bits": 8, "group_size": 32}, {"method": "nf4"},
        {"method": "gptq", "name": "compressed-tensors-g32", "format": "compressed-tensors", "group_size": 32},
        {"method": "gguf", "name": "Q4_K_M"}, {"method": "gguf", "name": "Q8_0", "type": "Q8_0"},
    ]  # fmt: skip
    loaded = load_recipe(write_recipe(outputs=outputs))
    job = open_job(loaded, resolve(str(tiny)), torch.device("cpu"), loaded.outputs)
    made = make_artifacts(job, calibrate(job))
    headers = read_headers(str(tiny))
    for name, artifact in made.items():
        planned = weights_of(headers, name)
        assert isinstance(artifact, Artifact)
        assert artifact.manifest is not None
        assert planned.nbytes == artifact.manifest.tensor_bytes, name
        found = artifact_weights(read_headers(str(artifact.path)))
        assert (found.nbytes, found.layers, found.head, found.embedding) == (
            planned.nbytes, planned.layers, planned.head, planned.embedding,
        ), name  # fmt: skip
        assert (found.group, found.largest) == (planned.group, planned.largest), name
        if artifact.gguf is None:  # headers included
            assert planned.files == (artifact.path / "model.safetensors").stat().st_size


class Live(TorchDispatchMode):
    """Bytes of storages alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if size and key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.drop, key, size)
        return out

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    ("architecture", "hidden", "intermediate", "heads", "kv_heads", "context", "batch"),
    [
        ("Llama", 256, 896, 8, 2, 1024, 2), ("Llama", 256, 512, 8, 8, 700, 1), ("Llama", 192, 256, 6, 3, 512, 3),
        ("Gemma2", 256, 896, 8, 2, 500, 2), ("Gemma2", 192, 256, 6, 6, 300, 1), ("Gemma3", 256, 896, 8, 2, 1024, 2),
    ],
)  # fmt: skip
def test_transformers_keeps_alive_what_is_predicted(
    architecture: str, hidden: int, intermediate: int, heads: int, kv_heads: int, context: int, batch: int
) -> None:
    """The peak of a whole prefill through transformers' own classes, counted storage by storage."""
    import transformers

    settings = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 32,
    }  # fmt: skip
    geometry = read_geometry(config_of(architectures=[f"{architecture}ForCausalLM"], **settings))
    kind = getattr(transformers, f"{architecture}ForCausalLM")
    model = kind(kind.config_class(num_hidden_layers=4, vocab_size=512, **settings)).to(torch.bfloat16).eval()
    with torch.inference_mode(), Live() as live:
        model(torch.randint(1, 512, (batch, context)), use_cache=True, logits_to_keep=1)
    predicted = kv_bytes(geometry, TRANSFORMERS, context, batch, "bf16")
    predicted += activations(geometry, context, batch)
    assert abs(live.peak - predicted) < 0.01 * live.peak


def test_cache_types_windows_and_blocks() -> None:
    geometry = read_geometry(config_of(head_dim=64, num_hidden_layers=2))
    row = 2 * 64
    tokens = 256 * 2 * row * 2  # layers x (keys and values)
    assert kv_bytes(geometry, LLAMA_CPP, 200, 1, "f16") == 2 * tokens  # padded to 256 cells
    assert kv_bytes(geometry, LLAMA_CPP, 200, 3, "q8_0") == 3 * tokens * 34 // 32
    assert kv_bytes(geometry, LLAMA_CPP, 256, 1, "q4_0") == tokens * 18 // 32
    assert kv_bytes(geometry, VLLM, 17, 1, "fp8") == 32 * 2 * row * 2  # blocks of 16
    assert kv_bytes(geometry, VLLM, 16, 1, "bf16", cards=4) == 16 * 2 * 64 * 2 * 2  # a head is repeated
    mistral = read_geometry(config_of(architectures=["MistralForCausalLM"], sliding_window=100, num_hidden_layers=2))
    assert mistral.windows == (100, 100)
    assert kv_bytes(mistral, TRANSFORMERS, 5000, 1, "bf16") == kv_bytes(mistral, TRANSFORMERS, 100, 1, "bf16")
    assert kv_bytes(mistral, LLAMA_CPP, 5120, 1, "f16") == 5120 * 2 * 2 * 64 * 2 * 2 // 2  # ignores the window
    qwen = config_of(architectures=["Qwen2ForCausalLM"], sliding_window=64, use_sliding_window=False)
    assert read_geometry(qwen).windows == (None,) * 4
    late = qwen | {"use_sliding_window": True, "max_window_layers": 3}
    assert read_geometry(late).windows == (None, None, None, 64)
    for engine, kv_dtype in ((VLLM, "q8_0"), (TRANSFORMERS, "fp8"), (LLAMA_CPP, "fp8")):
        with pytest.raises(QtoolError, match=rf"--kv-dtype {kv_dtype}: {engine.name} keeps its cache in"):
            check_kv_dtype(geometry, engine, kv_dtype)
    with pytest.raises(QtoolError, match="heads of 20 do not divide into blocks of 32"):
        check_kv_dtype(read_geometry(config_of(head_dim=20)), LLAMA_CPP, "q8_0")


@pytest.mark.parametrize("engine", [VLLM, TRANSFORMERS, LLAMA_CPP], ids=lambda engine: engine.name)
def test_the_largest_that_fits_is_the_largest(engine: EngineFacts) -> None:
    headers = iquest("14B")
    weights = weights_of(headers, "Q4_K_M" if engine.gguf else "awq")
    setting = Setting(headers.geometry, weights, engine, CARDS["RTX4090"], 1, engine.cache_types[0].name)
    context = largest_context(setting, 4)
    assert 1000 < context < 131072
    assert fits(setting, context, 4)
    assert not fits(setting, context + 1, 4)
    most = most_sequences(setting, 4096)
    assert fits(setting, 4096, most)
    assert not fits(setting, 4096, most + 1)
    cell = estimate_of(setting, context, 4)
    assert cell.fits
    assert cell.total == cell.weights + cell.cache + cell.overhead.activations + cell.overhead.fixed
    assert cell.step.slow is not None
    assert cell.step.best < cell.step.slow


def test_vllm_on_a_processor_keeps_embedding_and_head_once_more() -> None:
    headers, fixed = iquest("14B"), {}
    assert VLLM.processor is not None
    for tied in (True, False):
        geometry = replace(headers.geometry, tied=tied)
        setting = Setting(geometry, weights_of(headers, "awq"), VLLM.processor, CARDS["H100"], 1, "bf16")
        fixed[tied] = estimate_of(setting, 1024, 1).overhead.fixed
    packed = headers.geometry.vocab * headers.geometry.hidden * 2
    assert fixed == {True: 2 * GIB + packed, False: 2 * GIB + 2 * packed}


def test_tensor_parallel_rules() -> None:
    headers = iquest("40B")
    awq, source = weights_of(headers, "awq"), weights_of(headers, "source")
    four, three = (Setting(headers.geometry, w, VLLM, CARDS["H100"], n) for w, n in ((awq, 4), (source, 3)))
    assert split_faults(four) == []
    assert split_faults(replace(four, facts=TRANSFORMERS, cards=3)) == []  # its cards take turns
    assert any("down_proj: 27648 columns / 16" in fault for fault in split_faults(replace(four, cards=16)))
    assert split_faults(three) == [
        "40 heads do not divide by 3", "8 key/value heads neither divide by 3 nor divide it",
    ]  # fmt: skip
    two = Setting(headers.geometry, source, VLLM, CARDS["H100"], 2)
    assert two.resident < 0.51 * source.nbytes
    assert fits(two, 32768, 1)


def test_decode_bound_is_bytes_over_bandwidth() -> None:
    headers = iquest("40B")
    weights = weights_of(headers, "source")
    cell = estimate_of(Setting(headers.geometry, weights, TRANSFORMERS, CARDS["H200"]), 8192, 1)
    read = weights.layers + weights.head + 8192 * 320 * KIB  # of the embedding, a row
    assert cell.step.best == pytest.approx(read / 4800e9)
    assert cell.step.per_second(1).best < 63  # nobody decodes this model in 16 bits faster on this card
    assert cell.first_token is not None
    flops = 2 * 8192 * (39_794_283_520 - 2 * 76800 * 5120) + 4 * 5120 * 80 * 8192 * 8193 / 2
    assert cell.first_token.best == pytest.approx(flops / (989.5e12 * 1.05), rel=2e-3)


def test_what_does_not_fit_goes_elsewhere_at_its_price() -> None:
    headers = iquest("40B")
    card = CARDS["RTX4090"]
    llama = offload_of(Setting(headers.geometry, weights_of(headers, "Q4_K_M"), LLAMA_CPP, card, 1, "f16"), 8192, 1)
    assert llama is not None
    assert llama.flag.startswith("-ngl ")
    assert llama.step.best > llama.moved / 80e9
    vllm = offload_of(Setting(headers.geometry, weights_of(headers, "awq"), VLLM, card), 2048, 1)
    assert vllm is not None
    assert vllm.flag == "--cpu-offload-gb 1"
    assert vllm.step.best > GIB / 32e9
    assert offload_of(Setting(headers.geometry, weights_of(headers, "awq"), VLLM, CARDS["H200"]), 2048, 1) is None


def test_what_config_json_does_not_say_is_said() -> None:
    with pytest.raises(QtoolError, match="lacks hidden_size, num_hidden_layers; memory and speed cannot be told"):
        read_geometry({k: v for k, v in config_of().items() if k not in ("hidden_size", "num_hidden_layers")})
    with pytest.raises(QtoolError, match="nested section"):
        read_geometry({"text_config": {}})
    with pytest.raises(QtoolError, match="num_hidden_layers is -1; a positive whole number"):
        read_geometry(config_of(num_hidden_layers=-1))
    with pytest.raises(QtoolError, match="dtype 'float8'"):
        read_geometry(config_of(dtype="float8"))
    with pytest.raises(QtoolError, match="NewForCausalLM is not known to qtool"):
        tensor_shapes(config_of(architectures=["NewForCausalLM"]))
    bare = {
        k: v for k, v in config_of().items() if k not in ("dtype", "num_key_value_heads", "max_position_embeddings")
    }
    assumed = read_geometry(bare | {"architectures": ["NewForCausalLM"]}).assumed
    for said in ("num_key_value_heads", "max_position_embeddings", "NewForCausalLM is not known", "dtype is missing"):
        assert any(said in text for text in assumed)
    with pytest.raises(QtoolError, match=r"--format q4: not a format qtool writes\. Known: source, awq"):
        method_of("q4")


def test_an_unknown_architecture_is_planned_in_its_own_dtype(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    other = config_of(architectures=["HeliumForCausalLM"], model_type="helium", head_dim=32, pad_token_id=0)
    path.write_text(json.dumps(other))
    headers = read_headers(str(path))
    assert any("transformers' own model class" in text for text in headers.assumed)
    assert weights_of(headers, "source").nbytes > 0
    with pytest.raises(QtoolError, match="HeliumForCausalLM is not known to qtool: only its own dtype"):
        weights_of(headers, "awq")
    path.write_text(json.dumps(config_of(architectures=["NewForCausalLM"], model_type="new")))
    with pytest.raises(QtoolError, match="NewForCausalLM is neither known to qtool"):
        read_headers(str(path))
    with pytest.raises(QtoolError, match="no such folder or file, and not a Hub id"):
        read_headers(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(QtoolError, match=r"name a model's folder, its config\.json"):
        read_headers(str(tmp_path / "notes.txt"))
