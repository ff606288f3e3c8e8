"""How keys and values are kept: a window that rolls, held against a slow loop; types, held against ggml's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import MIXTURES
from small_models import converted
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.models.shape import shape_of
from qtool.convert.skeleton import load_config
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate.engines import cache_types, llama_cpp, reference, server, torch_model, vllm, vllm_model
from qtool.evaluate.engines.cache import make_cache, make_layer
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.engine import Decoding, Model, Request, Use
from qtool.evaluate.engines.layered import Sweep
from qtool.evaluate.engines.streamed import open_streamed
from qtool.evaluate.engines.torch_model import TorchModel, load_model, logits_of
from qtool.sizing.conditions import cache_bytes

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
ROLLING = Condition(sink=4, recent=28)


def loaded(folder: Path) -> Any:
    return load_model(Checkpoint.open(folder).read(), load_config(folder), torch.device("cpu"))


def tokens(length: int) -> Tensor:
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(3))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@torch.inference_mode()
def slow_loop(model: Any, text: Tensor, condition: Condition) -> Tensor:
    """StreamingLLM as its paper has it, a token at a time: keys are cached as they are before rotation, the middle is
    thrown out, and what is left is rotated by its place in the cache."""
    config, body = model.config, model.model
    heads, groups, dim, eps = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
    )
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in body.layers]
    logits = []
    for token in text:
        x = body.embed_tokens(token)
        for layer, pairs in zip(body.layers, kept, strict=True):
            own = layer.self_attn
            h = rms_norm(x, x.shape, layer.input_layernorm.weight, eps)
            pairs.append((own.k_proj(h).view(groups, dim), own.v_proj(h).view(groups, dim)))
            if len(pairs) > condition.sink + condition.recent:
                del pairs[condition.sink]
            cos, sin = body.rotary_emb(x, torch.arange(len(pairs))[None])
            keys = turned(torch.stack([key for key, _ in pairs], 1), cos[0], sin[0])
            query = turned(own.q_proj(h).view(heads, 1, dim), cos[0, -1:], sin[0, -1:])
            values = torch.stack([value for _, value in pairs], 1)
            keys, values = (t.repeat_interleave(heads // groups, 0) for t in (keys, values))
            weights = (query @ keys.transpose(1, 2) * dim**-0.5).softmax(-1)
            x = x + own.o_proj((weights @ values).flatten())
            h = rms_norm(x, x.shape, layer.post_attention_layernorm.weight, eps)
            x = x + layer.mlp.down_proj(silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
        logits.append(model.lm_head(rms_norm(x, x.shape, body.norm.weight, eps)))
    return torch.stack(logits)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, model_maker: Callable[..., Path]) -> Path:
    return model_maker(tmp_path_factory.mktemp("window") / "model", max_position_embeddings=1024, rope_scaling=YARN)


@pytest.mark.parametrize("condition", [ROLLING, Condition(sink=0, recent=40), Condition(sink=7, recent=1)])
def test_a_rolling_window_is_the_slow_loop(condition: Condition, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that end before, at and behind the window's end, with yarn's scaled rotation."""
    monkeypatch.setattr(torch_model, "CHUNK", 32)
    model, text = loaded(llama), tokens(150)
    expected = slow_loop(model, text, condition)
    found = torch.cat(list(logits_of(model, condition)(text)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    whole = torch.cat(list(logits_of(model)(text)))
    fits = condition.sink + condition.recent
    torch.testing.assert_close(found[:fits], whole[:fits], rtol=1e-4, atol=1e-4)
    assert (found[fits:] - whole[fits:]).abs().max() > 1e-2


def test_the_sweep_rolls_alike_whatever_its_chunks(llama: Path, tmp_path: Path) -> None:
    model, text = loaded(llama), tokens(100)
    expected = slow_loop(model, text, ROLLING)
    for chunk in (1, 30, 100):
        read = lambda prefix: Checkpoint.open(llama).read(  # noqa: E731  # as an artifact's reader is called
            [name for name in Checkpoint.open(llama).tensors if name.startswith(prefix)]
        )
        streamed = open_streamed(reference.FACTS, read, load_config(llama), torch.device("cpu"), False)
        sweep = Sweep(streamed, chunk, tmp_path / str(chunk), ROLLING)
        found = torch.cat(list(sweep.logits(sweep.states(text))))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_answers_under_a_window_are_those_of_the_slow_loop(llama: Path) -> None:
    """Several prompts, longer and shorter than the window, greedy."""
    model, tokenizer = loaded(llama), load_tokenizer(llama)
    prompts = ["def f0(a, b):\n    return a * 0 + b\n\n\n" * 3, "def f1(a"]
    engine = TorchModel(reference.FACTS, model, tokenizer, ROLLING)
    requests = [Request(prompt, lambda text: False) for prompt in prompts]
    found = dict(engine.generate(requests, Decoding(6, 8)))
    for number, prompt in enumerate(prompts):
        asked = tokenizer(prompt).input_ids
        ids = list(asked)
        for _ in range(6):
            ids.append(int(slow_loop(model, torch.tensor(ids), ROLLING)[-1].argmax()))
        assert found[number] == tokenizer.decode(ids[len(asked) :], skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ["Glm4Moe", "Qwen3"])
def test_other_rotations_turn_too(architecture: str, model_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Chunks against single steps: a part of each head rotates in one, norms lie before the rotation in the other."""
    model = loaded(model_maker(tmp_path / "m", architecture, **MIXTURES.get(architecture, {})))
    text = tokens(120)
    one, many = make_cache(model, ROLLING), make_cache(model, ROLLING)
    like = next(model.parameters())
    with torch.inference_mode():
        steps = [
            model(token[None, None], attention_mask=one.mask(1, like), past_key_values=one).logits[0] for token in text
        ]
        chunks = [
            model(part[None], attention_mask=many.mask(len(part), like), past_key_values=many).logits[0]
            for part in text.split(50)
        ]
    torch.testing.assert_close(torch.cat(chunks), torch.cat(steps), rtol=1e-4, atol=1e-4)


def test_a_long_prompt_in_parts_answers_as_whole(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch, padded, whatever is taken up at once."""
    from qtool.evaluate.engines import decoding

    engine = TorchModel(reference.FACTS, loaded(llama), load_tokenizer(llama))
    requests = [Request("def f1(a, b):\n" * n, lambda text: False) for n in (9, 1, 5)]
    whole = dict(engine.generate(requests, Decoding(8, 4)))
    monkeypatch.setattr(decoding, "PREFILL", 7)
    assert dict(engine.generate(requests, Decoding(8, 4))) == whole


DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "changes"), [("Lfm2", {"layer_types": ["conv", "full_attention"]}), ("Qwen3_5", DELTA)]
)
def test_states_of_layers_are_kept(
    architecture: str, changes: dict[str, Any], model_maker: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows of a padded batch, in parts or not, answer as each alone does by transformers' own loop; no window rolls
    over states, and no text is taken through one layer alone."""
    from qtool.evaluate.engines import decoding

    folder = model_maker(tmp_path / "m", architecture, **changes)
    model, tokenizer = loaded(folder), load_tokenizer(folder)
    engine = TorchModel(reference.FACTS, model, tokenizer)
    prompts = ["def f1(a, b):\n" * n for n in (9, 1, 5)]
    expected = {}
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        expected[number] = tokenizer.decode(made, skip_special_tokens=True)
    requests = [Request(prompt, lambda text: False) for prompt in prompts]
    for part in (decoding.PREFILL, 7):
        monkeypatch.setattr(decoding, "PREFILL", part)
        assert dict(engine.generate(requests, Decoding(8, 4))) == expected
    with pytest.raises(QtoolError, match="keep states"):
        make_cache(model, ROLLING)
    with pytest.raises(QtoolError, match="keep states"):
        make_layer(model, ROLLING, 40)


@pytest.mark.parametrize("architecture", ["Gemma2", "Mistral"])
def test_a_model_that_slides_rolls_no_window(
    architecture: str, model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"query_pre_attn_scalar": 32} if architecture == "Gemma2" else {"sliding_window": 32}
    model = loaded(model_maker(tmp_path / "m", architecture, **changes))
    with pytest.raises(QtoolError, match="slide by themselves"):
        make_cache(model, ROLLING)


def test_positions_that_depend_on_the_text_cannot_be_turned(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_maker(tmp_path / "m", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(QtoolError, match="positions of LlamaForCausalLM cannot be turned"):
        make_cache(loaded(folder), ROLLING)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_types_are_ggmls_own(name: str) -> None:
    """The gguf package's quantizer, bit for bit: ties, zeros, a single outlier, both signs."""
    quants = pytest.importorskip("gguf.quants")
    gguf = pytest.importorskip("gguf")
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)) * torch.logspace(-4, 3, 64)[:, None]
    x[0] = 0
    x[1, 3], x[2, 5] = 1e4, -1e4
    x[3] = torch.arange(128) / 2
    kind = getattr(gguf.GGMLQuantizationType, name)
    expected = quants.dequantize(quants.quantize(x.numpy(), kind), kind)
    np.testing.assert_array_equal(cache_types.rounding(name.lower())(x).numpy(), expected)


def test_fp8_saturates_and_bf16_rounds() -> None:
    x = torch.tensor([0.0, 1.0, 1.06, 447.0, 1e6, -1e6, 2**-9, 2**-11])
    assert cache_types.rounding("fp8")(x).tolist() == [0.0, 1.0, 1.0, 448.0, 448.0, -448.0, 2**-9, 0.0]
    assert cache_types.rounding("bf16")(torch.tensor([1.001])).tolist() == [1.0]
    assert torch.equal(cache_types.rounding("")(x), x)


def test_a_simulated_cache_is_what_attention_sees(llama: Path) -> None:
    """Keys and values of all positions, the newest too, are rounded before they are used."""
    model, text = loaded(llama), tokens(40)
    cache = make_cache(model, Condition("q4_0"))
    with torch.inference_mode():
        model(input_ids=text[None], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        for kept in (layer.keys, layer.values):
            assert kept.shape[-2] == 40
            torch.testing.assert_close(cache_types.rounding("q4_0")(kept), kept, rtol=0, atol=0)
    whole, rounded = (torch.cat(list(logits_of(model, c)(text))) for c in (PLAIN, Condition("q4_0")))
    assert (whole - rounded).abs().max() > 1e-3


def test_bytes_of_a_condition() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512, "vocab_size": 320,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    shape, numbers = shape_of(config), 3 * 2 * 2 * 64
    assert cache_bytes(shape, PLAIN, 1000) == 1000 * numbers * 2
    assert cache_bytes(shape, Condition("fp8"), 1000) == 1000 * numbers
    assert cache_bytes(shape, Condition("q8_0"), 1000) == 1000 * numbers * 34 // 32
    assert cache_bytes(shape, Condition("q4_0", 4, 96), 1000) == 100 * numbers * 18 // 32
    assert cache_bytes(shape, Condition("", 4, 96), 50) == 50 * numbers * 2
    sliding = config | {"architectures": ["MistralForCausalLM"], "sliding_window": 64}
    assert cache_bytes(shape_of(sliding), PLAIN, 1000) == 64 * numbers * 2


def test_names_and_engines() -> None:
    both = Condition("fp8", 4, 64)
    assert both.name == "fp8 window 4+64"
    assert reference.FACTS.said(both) == "fp8 window 4+64, simulated"
    assert reference.FACTS.said(ROLLING) == "window 4+28"  # nothing of it is simulated
    assert llama_cpp.FACTS.said(Condition("q8_0")) == "q8_0"
    assert "chosen where it is started" in _openai().lacks(Condition("fp8"))
    assert not vllm.FACTS.lacks(Condition("fp8"))


def _openai() -> Any:
    from qtool.evaluate.engines import openai

    return openai.FACTS


def test_native_engines_are_started_with_the_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: dict[str, Any] = {}

    def load(*given: Any) -> Any:
        told["cache"] = given[-1]
        raise QtoolError("enough")

    monkeypatch.setattr(vllm_model, "load", load)
    use = Use("cpu", 1, lambda: 64, condition=Condition("fp8"))
    with pytest.raises(QtoolError, match="enough"), vllm.ENGINE.open(Model("m", path=tmp_path), use):
        pass
    assert told == {"cache": "fp8"}

    @contextmanager
    def serve(*_: Any, **given: Any) -> Iterator[str]:
        told.update(given)
        yield "http://127.0.0.1:1/v1"

    monkeypatch.setattr(llama_cpp, "serve", serve)
    use = Use("cpu", 1, lambda: 64, condition=Condition("q8_0"))
    with llama_cpp.ENGINE.open(Model("m", gguf=tmp_path / "m.gguf"), use):
        assert told == {"cache": "q8_0"}


def test_llama_cpps_own_caches_are_as_simulated(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Its log-probabilities with quantized keys and values are nearer to the simulation than to a whole cache. Heads of
    32: those of a multiple of 64 it rotates before, which is not simulated."""
    pytest.importorskip("xllamacpp")
    folder = model_maker(tmp_path / "model", loudness=2.0)
    made = converted(folder, [{"method": "gguf", "type": "F16"}], tmp_path)["gguf"]
    file = Artifact.open(made).gguf
    assert file is not None
    model = load_model(Artifact.open(made).read(), load_config(folder), torch.device("cpu"))
    text, letter = tokens(48), load_tokenizer(folder)("a").input_ids[0]
    for name, share in (("q8_0", 0.8), ("q4_0", 0.3)):
        expected = torch.cat(list(logits_of(model, Condition(name))(text))).log_softmax(-1)
        whole = torch.cat(list(logits_of(model)(text))).log_softmax(-1)
        apart, moved = [], []
        with llama_cpp.serve(file, 128, cache=name) as url:
            for position in range(20, 48, 3):
                found = torch.full((expected.shape[1],), -30.0)
                for token, value in server.top_logprobs(url, text[: position + 1].tolist(), 320, letter).items():
                    found[token] = value
                apart.append(float((found.exp() * (found - expected[position])).sum()))
                moved.append(float((found.exp() * (found - whole[position])).sum()))
        assert sum(apart) < share * sum(moved)
