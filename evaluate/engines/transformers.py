"""The engine `transformers`: a folder as transformers itself loads it, with the kernels of its format.

Memory follows from what its graphs keep alive (tests compare the figures with it).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qtool import QtoolError
from qtool.convert.files.reading import read_json
from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines.engine import Engine, Model, Running, Use
from qtool.evaluate.engines.facts import (
    BF16,
    CUDA_CONTEXT,
    F16,
    FP8,
    MIB,
    Q4_0,
    Q8_0,
    Download,
    Efficiency,
    EngineFacts,
    Load,
    OffloadRule,
    Overhead,
    Serving,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

ALLOCATOR_SLACK = 0.02  # of activations: rounding of torch's allocator to 2 MiB, segments half used


def activations(geometry: Geometry, context: int, sequences: int) -> int:
    """Peak bytes that a whole prefill keeps alive beside weights and cache (SDPA attention, logits of last positions).

    The gated MLP holds four hidden states (embeddings, the layer's input, the residual, its norm) and three tensors of
    the intermediate's width; a mixture holds these for each of a token's experts, and the input and output of each. The
    rotary step of attention holds three hidden states and four queries; the layer's own keys and values are not in the
    cache yet. Both also hold cos, sin and the positions (int64) of one sequence. Gemma 2's soft cap rules SDPA out. It
    holds the scores of all heads three times (before softmax, after it, and as float32 between), two masks, three
    hidden states, queries, and keys and values repeated for every query head.
    """
    g, tokens = geometry, context * sequences
    queries = g.q_row
    mlp = 3 * g.mlp_width + (4 + 2 * g.active) * g.hidden
    widest = tokens * max(mlp, 3 * g.hidden + 4 * queries) * g.width
    if g.whole_scores:
        scores = tokens * context * (g.heads * (2 * g.width + 4) + 2 * g.width)
        repeated = 2 * queries if g.heads > g.kv_heads else 0
        widest = max(widest, scores + tokens * (3 * g.hidden + queries + repeated) * g.width)
    rotary = context * (2 * g.head_dim * g.width + 8) + 8 * tokens
    return widest + rotary + g.vocab * sequences * g.width


def cublas_workspace(compute: str) -> int:
    """What torch gives cuBLAS: 4096 KiB x 8 on compute capability 9.0, else 8.1 MiB (CUBLAS_WORKSPACE_CONFIG)."""
    return 32 * MIB if compute == "9.0" else 8_519_680


def overhead(load: Load) -> Overhead:
    """Activations with the allocator's slack; the context and cuBLAS' workspace."""
    alive = activations(load.geometry, load.context, load.sequences) + load.expanded
    return Overhead(int(alive * (1 + ALLOCATOR_SLACK)), CUDA_CONTEXT + cublas_workspace(load.card.compute))


def _command(serving: Serving) -> str:
    mapped = 'device_map="auto"' if serving.offload or serving.cards > 1 else 'device_map="cuda"'
    revision = f", revision={json.dumps(serving.revision)}" if serving.revision else ""
    name = json.dumps(serving.place, ensure_ascii=False)
    return f'AutoModelForCausalLM.from_pretrained({name}{revision}, dtype="auto", {mapped})'


def _load(download: Download) -> list[tuple[str, str]]:
    needs = " ".join(("transformers", "accelerate", *download.packages))
    text = f"""# pip install {needs}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = "{download.place}"
tokenizer = AutoTokenizer.from_pretrained(model)
model = AutoModelForCausalLM.from_pretrained(model, device_map="auto")"""
    return [(text, "python")]


FACTS = EngineFacts(
    name="transformers",
    packages=("torch", "transformers", "gptqmodel", "bitsandbytes", "compressed-tensors"),
    logits=True,
    judged_caches=(BF16, FP8, Q8_0, Q4_0),
    simulates=True,
    rolls=True,
    cache_types=(BF16, F16),
    overhead=overhead,
    offload=OffloadRule(flag=lambda units, layers: 'device_map="auto"'),
    # each layer's kernels are launched from Python, and the growing cache is copied at each step
    efficiency=Efficiency(0.45, 0.12, 0.30, 2.5e-3, 20e-3),
    command=_command,
    load=_load,
)


def load_native(
    path: Path, device: torch.device, trust_remote_code: bool = False, as_stored: bool = False
) -> nn.Module:
    """An artifact as transformers itself loads it, with the kernels of its format. ``as_stored``: unquantized weights
    too stay in their own dtype. Raises QtoolError: exit 3 where the package with the kernels is not installed or does
    not run here, exit 2 for a .gguf artifact."""
    if (path / "generation_config.json").exists():
        read_json(path / "generation_config.json")  # transformers takes its own defaults for one that is damaged
    from transformers import AutoModelForCausalLM

    from qtool.convert.formats.table import runtime_of
    from qtool.convert.models.shape import shape_of
    from qtool.evaluate.engines.torch_model import compute_dtype

    if any(path.glob("*.gguf")):
        raise QtoolError(f"{path}: engine transformers runs safetensors only; use engine llama.cpp or reference.")
    config = read_json(path / "config.json")
    if "auto_map" in config and not trust_remote_code:
        raise QtoolError(f"{path}: config.json asks to run the model's own code; read it, then trust_remote_code.")
    section = config.get("quantization_config") or {}
    method, kernels = section.get("quant_method"), runtime_of(section, FACTS.name)
    if kernels and shape_of(config, str(path)).experts and (reasons := list(kernels.refuses_experts(section))):
        raise QtoolError(f"{path.name}: engine transformers: {reasons[0]}.")
    if kernels and kernels.package and find_spec(kernels.package.replace("-", "_")) is None:
        raise QtoolError(
            f"{path.name}: engine transformers needs {kernels.package} for {method}, which is not installed here. Run: "
            f"{kernels.install}; or use engine reference, which needs nothing.",
            exit_code=3,
        )
    dtype = "auto" if method or as_stored else compute_dtype(device)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map={"": str(device)} if method else None, trust_remote_code=trust_remote_code
        )
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QtoolError(f"{path}: transformers cannot load it here ({reason}).", exit_code=3) from error
    return model.to(device).eval() if not method else model.eval()


@contextmanager
def _open(model: Model, use: Use) -> Iterator[Running]:
    import torch

    from qtool.evaluate.engines.torch_model import TorchModel

    if model.path is None:
        raise QtoolError(f"{model.name}: engine transformers runs model folders only.")
    loaded = load_native(model.path, torch.device(use.device), model.trust_remote_code, as_stored=use.timed)
    yield TorchModel(FACTS, loaded, model.tokenizer, use.condition)


ENGINE = Engine(FACTS, _open)
