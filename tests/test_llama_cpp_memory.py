"""The cache and the compute buffer that llama.cpp says it allocates, against the prediction for the same file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from qtool.convert.models.geometry import Geometry
from qtool.convert.models.shape import read_geometry, tensor_shapes
from qtool.evaluate.engines.llama_cpp import FACTS, cells, compute_buffer, sliding_cells
from qtool.make.outputs import make_artifacts
from qtool.sizing.headers import read_headers
from qtool.sizing.kv_cache import kv_bytes

gguf: Any = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
MIB = 2**20
LOAD = """
import json, sys
import xllamacpp
path, context, slots, flash, kind = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, context, slots, 5
params.warmup, params.fit_params, params.hostnames, params.port = False, False, ["127.0.0.1"], 0
params.cpuparams.n_threads = 1
params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_" + flash)
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + kind)
server = xllamacpp.Server(params)
sys.stdin.read()  # llama.cpp's log is written by a thread of its own: the reader says when it has seen enough
"""


def allocated(path: Path, context: int, slots: int, flash: bool, kind: str) -> dict[str, float]:
    """MiB of each buffer, from llama.cpp's own log."""
    import json

    asked = json.dumps([str(path), context, slots, "ENABLED" if flash else "DISABLED", kind.upper()])
    found: dict[str, float] = {}
    with subprocess.Popen(
        [sys.executable, "-c", LOAD, asked], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        assert process.stderr is not None
        for line in process.stderr:
            if sizes := re.search(r"CPU +(KV|compute) buffer size = +([\d.]+) MiB", line):
                found[sizes[1]] = found.get(sizes[1], 0.0) + float(sizes[2])  # two caches where some layers slide
            if len(found) == 2:
                break
        timer.cancel()
        process.kill()
    return found


def check(path: Path, geometry: Geometry, context: int, slots: int, flash: bool, kind: str) -> None:
    found = allocated(path, context, slots, flash, kind)
    each = context // slots
    assert found["KV"] == pytest.approx(kv_bytes(geometry, FACTS, each, slots, kind) / MIB, abs=0.011)
    whole, sliding = cells(each, None), sliding_cells(geometry, each)
    predicted = compute_buffer(geometry, whole, context, flash, sliding=sliding) / MIB
    assert abs(predicted - found["compute"]) < 0.5, (predicted, found)  # asked: 10 % or 16 MiB


def empty_file(path: Path, config: dict[str, Any]) -> Geometry:
    """A GGUF file of zeros that take no room on the disk: llama.cpp maps it and reads none."""
    from qtool.convert.formats.gguf.names import gguf_names, stored_shape
    from qtool.convert.formats.gguf.types import tensor_types
    from qtool.convert.models.table import gguf_facts

    geometry = read_geometry(config)
    shapes = tensor_shapes(config)
    names = gguf_names(shapes, config)
    layout = {new: stored_shape(new, shapes[old], geometry.experts) for old, new in names.items()}
    types = tensor_types(layout, "F16", geometry.layers)
    architecture = gguf_facts(config).architecture
    writer = gguf.GGUFWriter(path, architecture)
    if architecture == "gemma2":
        writer.add_sliding_window(config["sliding_window"])
    if geometry.experts:
        writer.add_expert_count(geometry.experts)
        writer.add_expert_used_count(geometry.active)
        writer.add_expert_feed_forward_length(geometry.expert_width)
        writer.add_expert_shared_feed_forward_length(geometry.shared_width)
    writer.add_block_count(geometry.layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(geometry.hidden)
    writer.add_feed_forward_length(geometry.intermediate)
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(geometry.vocab)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(geometry.vocab)])
    writer.add_token_types([1] * geometry.vocab)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    import numpy

    total = 0
    for name, shape in layout.items():
        kind = numpy.dtype("float32" if types[name].type == "F32" else "float16")
        size = int(numpy.prod(shape)) * kind.itemsize
        writer.add_tensor_info(name, shape, kind, size)
        total += -(-size // 32) * 32
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + total)
    return geometry


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        (  # Llama-3.1-8B, but for vocabulary and depth, which no compute buffer depends on
            {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 128},
            [(512, 1, True, "f16"), (4096, 1, False, "f16"), (2048, 4, True, "q8_0")],
        ),
        (  # IQuest-Coder-V1-40B, likewise
            {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 2, "num_attention_heads": 40,
             "num_key_value_heads": 8, "head_dim": 128},
            [(1024, 1, True, "f16"), (1024, 2, False, "f16")],
        ),
        (
            {"hidden_size": 768, "intermediate_size": 1280, "num_hidden_layers": 3, "num_attention_heads": 12,
             "num_key_value_heads": 12, "head_dim": 64},
            [(300, 1, True, "f16"), (512, 1, False, "f16"), (4096, 3, True, "q4_0")],
        ),
        (  # Qwen3-Coder-30B-A3B, likewise, and with fewer experts, of which as many work on a token
            {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
             "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
             "num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            [(512, 1, True, "f16"), (4096, 1, True, "f16"), (1024, 1, False, "f16")],
        ),
        (  # Mixtral 8x7B, likewise
            {"architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
             "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
             "num_local_experts": 4, "num_experts_per_tok": 2},
            [(512, 1, True, "f16")],
        ),
        (  # Qwen1.5-MoE-A2.7B, likewise
            {"architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
             "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128,
             "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
             "shared_expert_intermediate_size": 5632, "tie_word_embeddings": False},
            [(512, 1, True, "f16")],
        ),
        (  # Gemma 2 2B, likewise, with a shorter window
            {"architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "intermediate_size": 9216,
             "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
             "sliding_window": 600},
            [(2048, 1, True, "f16"), (4096, 2, True, "f16"), (512, 1, True, "f16")],
        ),
    ],
)  # fmt: skip
def test_geometries_of_every_size(
    changes: dict[str, Any], settings: list[tuple[int, int, bool, str]], tmp_path: Path
) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 1024, "dtype": "float16", **changes}
    path = tmp_path / "empty.gguf"
    geometry = empty_file(path, config)
    for context, slots, flash, kind in settings:
        check(path, geometry, context, slots, flash, kind)


def test_a_file_that_qtool_wrote(tmp_path: Path) -> None:
    import torch

    from qtool.convert.files.source import resolve
    from qtool.make.job import open_job
    from qtool.preparing import calibrate
    from qtool.recipe.sections import load_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: qtool-demo\noutputs: [{{method: gguf, imatrix: false}}]\noutput_dir: {tmp_path}/out\n")
    loaded = load_recipe(recipe)
    job = open_job(loaded, resolve("qtool-demo"), torch.device("cpu"), loaded.outputs)
    artifact = make_artifacts(job, calibrate(job))["gguf"]
    assert artifact.gguf is not None
    geometry = read_headers(str(artifact.path)).geometry
    check(artifact.gguf, geometry, 512, 1, True, "f16")
    check(artifact.gguf, geometry, 2048, 2, False, "f16")
