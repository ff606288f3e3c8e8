"""IQuest-Coder's Loop: its forward against a slow one, and both passes' inputs in the walk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import converted
from torch import Tensor

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.config_file import read_config
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.shape import decoder_of
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines.cache import make_cache
from qtool.evaluate.engines.torch_model import load_model
from qtool.quantize import source_model as walked
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.memory import peak_bytes
from qtool.quantize.methods import on_grid
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.grid_work import OnGrid
from qtool.quantize.methods.method import LayerCodes, Method
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.walk import Column, Walk

CPU = torch.device("cpu")
WINDOW, LAYERS, HEADS, KV_HEADS, DIM = 16, 2, 4, 2, 32
TOKENS = torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0))
INPUTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def loop(model_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its gates are not all one half: their weights are larger than the maker's."""
    folder = tmp_path_factory.mktemp("loop") / "model"
    model_maker(folder, "IQuestLoopCoder", loop_window_size=WINDOW, rope_theta=5e5, tie_word_embeddings=False)
    return folder


def loaded(folder: Path) -> Any:
    return load_model(Checkpoint.open(folder).read(), load_config(folder), CPU)


def slow_logits(state: dict[str, Tensor], ids: list[int], epsilon: float = 1e-6) -> Tensor:
    """``[length, vocabulary]``, a position and a head at a time, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * w[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        """Of ``[length, heads, dim]``."""
        angles = torch.arange(len(x))[:, None] / 5e5 ** (torch.arange(0, DIM, 2).double() / DIM)
        low, high = x[..., : DIM // 2], x[..., DIM // 2 :]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def attention(query: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        scores = (keys[first:] @ query / DIM**0.5).softmax(0)
        return scores @ values[first:]

    x = w["model.embed_tokens.weight"][ids]
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for turn in (0, 1):
        for layer in range(LAYERS):
            at = f"model.layers.{layer}"
            a = norm(x, f"{at}.input_layernorm")
            q, k, v = (
                (a @ w[f"{at}.self_attn.{name}_proj.weight"].t()).unflatten(1, (heads, DIM))
                for name, heads in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), strict=True)
            )
            q, k = turned(q), turned(k)
            if turn == 0:
                kept[layer] = k, v
            made = torch.zeros_like(q)
            for position in range(len(ids)):
                for head in range(HEADS):
                    shared = head // (HEADS // KV_HEADS)
                    query, upto = q[position, head], position + 1
                    k1, v1 = (each[:upto, shared] for each in kept[layer])
                    made[position, head] = attention(query, k1, v1, 0)
                    if turn == 1:
                        gate = f"model.gate_projections.{layer}"
                        g = (query @ w[f"{gate}.weight"][head] + w[f"{gate}.bias"][head]).sigmoid()
                        near = attention(query, k[:upto, shared], v[:upto, shared], max(0, upto - WINDOW))
                        made[position, head] = g * made[position, head] + (1 - g) * near
            x = x + made.flatten(1) @ w[f"{at}.self_attn.o_proj.weight"].t()
            a = norm(x, f"{at}.post_attention_layernorm")
            gated = torch.nn.functional.silu(a @ w[f"{at}.mlp.gate_proj.weight"].t())
            x = x + (gated * (a @ w[f"{at}.mlp.up_proj.weight"].t())) @ w[f"{at}.mlp.down_proj.weight"].t()
    return norm(x, "model.norm") @ w["lm_head.weight"].t()


def test_the_model_computes_what_a_slow_one_does(loop: Path) -> None:
    ids = TOKENS[0].tolist()
    state = dict(Checkpoint.open(loop).read())
    found = loaded(loop)(torch.tensor([ids])).logits[0].double()
    expected = slow_logits(state, ids)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    # the window and the gates are looked at
    for name, changed in (("gate_projections.1.bias", 3.0), ("gate_projections.0.weight", 1.0)):
        other = slow_logits(state | {f"model.{name}": state[f"model.{name}"] + changed}, ids)
        assert float((found - other).abs().max() / expected.abs().max()) > 1e-3


def test_tokens_one_by_one_and_rows_filled_up_on_the_left(loop: Path) -> None:
    model = loaded(loop)
    expected = model(TOKENS).logits
    cache = make_cache(model)
    assert len(cache.layers) == 2 * LAYERS
    parts = [model(TOKENS[:, :20], past_key_values=cache, use_cache=True).logits]
    parts += [model(TOKENS[:, n : n + 1], past_key_values=cache, use_cache=True).logits for n in range(20, 48)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    filled = torch.cat([torch.zeros(6, 5, dtype=torch.int64), TOKENS], 1)
    mask = torch.ones_like(filled)
    mask[:, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = model(filled, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def walk_of(folder: Path, methods: list[Method]) -> Walk:
    model, checkpoint, config = build_skeleton(load_config(folder)), Checkpoint.open(folder), read_config(folder)
    decoder = decoder_of(config)
    columns = [
        Column(method, method.container.plan(ModelShape(checkpoint.tensors, decoder, config))) for method in methods
    ]
    return Walk(model, decoder, checkpoint, CalibrationSet(TOKENS, "test"), columns, CPU)


def test_statistics_are_sums_over_both_passes(loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against hooks in the whole model, which are called once in each pass. Two batches, the last one smaller."""
    monkeypatch.setattr(walked, "fast_bfloat16", lambda: False)
    monkeypatch.setitem(walked.BATCH_TOKENS, "cpu", 4 * 48 * 2)
    seen: list[dict[str, tuple[int, Tensor]]] = []
    original = on_grid.quantize_layer

    def spy(method: OnGrid, feeds: Any, weights: Any, statistics: Any, *rest: Any) -> LayerCodes:
        seen.append({name: (stats.tokens, stats.gram.clone()) for name, stats in statistics.items()})
        return original(method, feeds, weights, statistics, *rest)

    monkeypatch.setattr(on_grid, "quantize_layer", spy)
    list(walk_of(loop, [AwqMethod(method="awq", group_size=32, rounding="rtn")]).run())
    model, met = loaded(loop), dict[tuple[int, str], list[Tensor]]()
    for index, layer in enumerate(model.model.layers):
        for name in INPUTS:

            def keep(_: Any, args: Any, key: tuple[int, str] = (index, name)) -> None:
                met.setdefault(key, []).append(args[0].flatten(0, 1))

            layer.get_submodule(name).register_forward_pre_hook(keep)
    with torch.inference_mode():
        model(TOKENS)
    for (index, name), (first, second) in met.items():
        tokens, gram = seen[index][name]
        expected = first.t() @ first + second.t() @ second
        assert tokens == 2 * TOKENS.numel()
        torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert not torch.allclose(gram, 2 * first.t() @ first, rtol=0.05)  # the passes differ


def test_a_stopped_walk_goes_on_where_it_was(loop: Path) -> None:
    method = AwqMethod(method="awq", group_size=32, rounding="rtn")
    _, whole = walk_of(loop, [method]).run()
    (rest,) = walk_of(loop, [method]).run(start=1)
    for name, codes in whole.outputs["awq"].codes.items():
        assert rest.outputs["awq"].codes[name].equals(codes)


def test_memory_is_of_both_passes(loop: Path) -> None:
    decoder, methods = decoder_of(read_config(loop)), [AwqMethod(method="awq", group_size=32)]
    config = read_config(loop) | {"architectures": ["LlamaForCausalLM"]}
    shapes = {name: info.shape for name, info in Checkpoint.open(loop).tensors.items()}
    twice, once = (peak_bytes(each, shapes, methods, 2**16, "cpu") for each in (decoder, decoder_of(config)))
    width = 2 if fast_bfloat16() else 4
    assert twice - once == width * 2**16 * 128 * 2  # a stream of the source and one of the output


def test_the_code_that_came_with_it_is_not_run(loop: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in loop.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    code = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    (folder / "config.json").write_text(json.dumps(read_config(loop) | {"auto_map": code}))
    (folder / "hostile.py").write_text("raise SystemExit('it was run')")
    for trusted in (False, True):
        model = build_skeleton(load_config(folder, trusted), trusted)
        assert type(model).__module__ == "qtool.convert.models.loop_code"


def test_gates_are_plain_and_named(loop: Path, tmp_path: Path) -> None:
    """In the spelling that each runtime looks for; what says otherwise is a fault."""
    outputs = [
        {"method": "awq", "group_size": 32, "rounding": "rtn"}, {"method": "gptq", "group_size": 32},
        {"method": "gptq", "name": "ct", "format": "compressed-tensors", "group_size": 32},
    ]  # fmt: skip
    made = converted(loop, outputs, tmp_path)
    said = {name: json.loads((path / "config.json").read_text())["quantization_config"] for name, path in made.items()}
    assert said["awq"]["modules_to_not_convert"] == ["lm_head", "gate_projections"]
    assert said["ct"]["ignore"] == ["lm_head", "re:.*gate_projections.*"]
    assert said["gptq"]["modules_in_block_to_quantize"] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"], ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"], ["mlp.down_proj"],
    ]  # fmt: skip
    assert said["gptq"]["dynamic"] == {"-:.*gate_projections.*": {}}
    source = dict(Checkpoint.open(loop).read())
    for path in made.values():
        stored = dict(Artifact.open(path).read())
        gates = [name for name in source if "gate_projections" in name]
        assert len(gates) == 2 * LAYERS
        assert all(torch.equal(stored[name].float(), source[name].to(stored[name].dtype).float()) for name in gates)
        assert verify(path, loop).sound
    path = made["gptq"] / "config.json"
    section = {key: value for key, value in said["gptq"].items() if key != "modules_in_block_to_quantize"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": section}))
    assert not verify(made["gptq"], loop).sound


def test_it_is_no_gguf(loop: Path, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"cannot be written as GGUF: llama\.cpp has no looped decoder"):
        converted(loop, [{"method": "gguf"}], tmp_path)
