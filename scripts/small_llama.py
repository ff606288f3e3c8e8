"""A small Llama for training on rows of any length: all that does not mix tokens sees them as one flat list, so that
torch.compile meets one shape whatever the rows' length, and attention alone (SDPA) is told where rows end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

EPSILON = 1e-5
MATRICES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True)
class Geometry:
    """What config.json says."""

    vocabulary: int = 2048
    hidden: int = 512
    intermediate: int = 1280
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    theta: float = 500_000.0
    context: int = 16384

    @property
    def head_width(self) -> int:
        """Of each."""
        return self.hidden // self.heads


class SmallLlama(torch.nn.Module):
    """Weights under Hugging Face's names, float32; the forward runs in ``compute``."""

    def __init__(self, geometry: Geometry, seed: int, compute: torch.dtype) -> None:
        super().__init__()
        self.geometry, self.compute = geometry, compute
        generator = torch.Generator().manual_seed(seed)
        g, narrow = geometry, 0.02 / math.sqrt(2 * geometry.layers)
        wide = (g.heads * g.head_width, g.kv_heads * g.head_width)
        shapes = {
            MATRICES[0]: (wide[0], g.hidden), MATRICES[1]: (wide[1], g.hidden), MATRICES[2]: (wide[1], g.hidden),
            MATRICES[3]: (g.hidden, wide[0]), MATRICES[4]: (g.intermediate, g.hidden),
            MATRICES[5]: (g.intermediate, g.hidden), MATRICES[6]: (g.hidden, g.intermediate),
        }  # fmt: skip
        tensors = {EMBEDDING: torch.randn(g.vocabulary, g.hidden, generator=generator) * 0.02}
        for layer in range(g.layers):
            for name, shape in shapes.items():
                scale = narrow if name in (MATRICES[3], MATRICES[6]) else 0.02
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator) * scale
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(g.hidden)
        tensors[NORM] = torch.ones(g.hidden)
        self.named = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
        for name, parameter in self.named.items():
            self.register_parameter(name.replace(".", "/"), parameter)
        self.before: Callable[..., Any] = _before
        self.after: Callable[..., Any] = _after
        self.head: Callable[..., Any] = _head

    def compile_parts(self) -> None:
        """Each for one shape."""
        self.before, self.after, self.head = torch.compile(_before), torch.compile(_after), torch.compile(_head)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Weights that `export` wrote."""
        for path in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                self.named[name].copy_(tensor)

    def on(self, device: torch.device) -> SmallLlama:
        """Moved."""
        self.to(device)
        self.named = {name: getattr(self, name.replace(".", "/")) for name in self.named}
        return self

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens`` int64 [rows, length] -> (losses float32, whether the likeliest token is right), each
        [rows, length]: of the token behind each; the last column means nothing."""
        rows, length = tokens.shape
        g, flat = self.geometry, tokens.flatten()
        angles = torch.arange(length, device=tokens.device).repeat(rows)[:, None] * _frequencies(g, tokens.device)
        cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
        x = self.named[EMBEDDING][flat]
        for layer in range(g.layers):
            own = [self.named[f"model.layers.{layer}.{name}.weight"] for name in MATRICES]
            norms = [
                self.named[f"model.layers.{layer}.{n}.weight"] for n in ("input_layernorm", "post_attention_layernorm")
            ]
            parts = self.before(x, norms[0], *own[:3], cos, sin, self.compute)
            q, k, v = (part.view(rows, length, g.heads, g.head_width).transpose(1, 2) for part in _grouped(parts, g))
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self.after(x, mixed.transpose(1, 2).reshape(rows * length, -1), norms[1], *own[3:], self.compute)
        aims = torch.roll(tokens, -1, 1).flatten()
        losses, right = self.head(x, self.named[NORM], self.named[EMBEDDING], aims, self.compute)
        return losses.view(rows, length), right.view(rows, length)


def _grouped(parts: tuple[Tensor, Tensor, Tensor], g: Geometry) -> tuple[Tensor, ...]:
    """Keys and values as often as there are query heads."""
    q, *shared = parts
    return q, *(one.repeat_interleave(g.heads // g.kv_heads, 1) for one in shared)


def _frequencies(g: Geometry, device: torch.device) -> Tensor:
    return g.theta ** (-torch.arange(0, g.head_width, 2, device=device, dtype=torch.float32) / g.head_width)


def _normed(x: Tensor, weight: Tensor, compute: torch.dtype) -> Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight).to(compute)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves against halves as Hugging Face's Llama has them."""
    left, right = x.float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


def _before(
    x: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [tokens, heads, width]."""
    h = _normed(x, norm, compute)
    width = 2 * cos.shape[-1]
    heads = [linear(h, one.to(compute)).unflatten(-1, (-1, width)) for one in (q, k, v)]
    return _turned(heads[0], cos, sin), _turned(heads[1], cos, sin), heads[2]


def _after(
    x: Tensor, mixed: Tensor, norm: Tensor, o: Tensor, gate: Tensor, up: Tensor, down: Tensor, compute: torch.dtype
) -> Tensor:
    x = x + linear(mixed, o.to(compute))
    h = _normed(x, norm, compute)
    fed = silu(linear(h, gate.to(compute))) * linear(h, up.to(compute))
    return x + linear(fed, down.to(compute))


def _head(x: Tensor, norm: Tensor, table: Tensor, aims: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = linear(_normed(x, norm, compute), table.to(compute)).float()
    return cross_entropy(logits, aims, reduction="none"), logits.argmax(-1) == aims


def export(model: SmallLlama, out: Path, part_mib: float) -> None:
    """config.json and bfloat16 weights in files of at most ``part_mib``."""
    g = model.geometry
    out.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in model.named.items():
        tensor = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        if size + tensor.nbytes > part_mib * 2**20 and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    placed = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, out / f"{file}.partial", metadata={"format": "pt"})
        (out / f"{file}.partial").replace(out / file)
        (out / file).chmod(0o644)
        placed.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for part in parts for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    _write(out / "model.safetensors.index.json", index)
    rope = {"rope_type": "default", "rope_theta": g.theta}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
        "hidden_act": "silu", "hidden_size": g.hidden, "intermediate_size": g.intermediate, "head_dim": g.head_width,
        "num_hidden_layers": g.layers, "num_attention_heads": g.heads, "num_key_value_heads": g.kv_heads,
        "max_position_embeddings": g.context, "rms_norm_eps": EPSILON, "vocab_size": g.vocabulary,
        "rope_theta": g.theta, "rope_parameters": rope, "tie_word_embeddings": True, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0, "dtype": "bfloat16", "torch_dtype": "bfloat16", "use_cache": True,
    }  # fmt: skip
    _write(out / "config.json", config)
    _write(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
