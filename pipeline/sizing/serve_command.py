"""What to type so that a planned setting is served: a command that works in the folder where `qtool plan` was typed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.convert.runtimes import vllm as vllm_rules
from qtool.quantize.methods.method import Method
from qtool.sizing.fit import Offload, Setting
from qtool.sizing.formats import method_of
from qtool.sizing.headers import Headers

GGUF_IN_VLLM = (
    "vLLM finds no weights in a folder with a .gguf file; the file alone it takes with vllm-gguf-plugin, on an "
    "accelerator"
)


def command(headers: Headers, setting: Setting, context: int, sequences: int, offload: Offload | None) -> str:
    """An artifact or a source is named as it was typed, what is still to be made as `qtool run` would name it."""
    w = setting.weights
    made = headers.quantized or w.family == "source"
    place = headers.place if made else f"{headers.name}-{w.format}"
    if setting.engine == "llama.cpp":
        return _llama_server(headers, setting, place, context * sequences, sequences, offload)
    if setting.engine == "vllm":
        parts = ["vllm", "serve", place, "--max-model-len", str(context), "--max-num-seqs", str(sequences)]
        parts += ["--revision", headers.revision] if made and headers.revision else []
        dtype = vllm_rules.dtype_flag(config_of(headers, setting))
        parts += ["--dtype", dtype] if dtype else []
        parts += ["--tensor-parallel-size", str(setting.cards)] if setting.cards > 1 else []
        parts += ["--kv-cache-dtype", "fp8"] if setting.kv_dtype == "fp8" else []
        parts += offload.flag.split() if offload else []
        return shlex.join(parts)
    mapped = 'device_map="auto"' if offload or setting.cards > 1 else 'device_map="cuda"'
    revision = f", revision={json.dumps(headers.revision)}" if made and headers.revision else ""
    name = json.dumps(place, ensure_ascii=False)
    return f'AutoModelForCausalLM.from_pretrained({name}{revision}, dtype="auto", {mapped})'


def _llama_server(
    headers: Headers, setting: Setting, place: str, context: int, sequences: int, offload: Offload | None
) -> str:
    file = str(headers.gguf) if headers.gguf else f"{place}/{headers.name}-{setting.weights.format}.gguf"
    parts = ["llama-server", "-m", file, "-c", str(context), "-np", str(sequences)]
    parts += offload.flag.split() if offload else ["-ngl", "99"]
    parts += ["-fa", "on"]
    if setting.kv_dtype != "f16":
        parts += ["-ctk", setting.kv_dtype, "-ctv", setting.kv_dtype]
    modelfile = Path(place) / "Modelfile"
    if offload or (headers.gguf and not modelfile.is_file()):
        return shlex.join(parts)
    named = ["ollama", "create", Path(place).resolve().name.lower(), "-f", str(modelfile)]
    return f"{shlex.join(parts)}   ({shlex.join(named)})"


def config_of(headers: Headers, setting: Setting) -> Mapping[str, Any]:
    """config.json of what is served: the model's own, or that of an output still to be made."""
    method = None if headers.quantized else method_of_weights(setting)
    if method is None:
        return headers.config
    stored = {} if method.stored_dtype is None else {"dtype": str(method.stored_dtype).removeprefix("torch.")}
    return {**headers.config, **stored, "quantization_config": method.container.section}


def method_of_weights(setting: Setting) -> Method | None:
    """The recipe output that the weights stand for; None for the source's own."""
    return None if setting.weights.family == "source" else method_of(setting.weights.format)


def vllm_faults(headers: Headers, setting: Setting) -> list[str]:
    """Why vLLM does not load this at all; empty for other engines, and where it does."""
    return vllm_rules.refusals(config_of(headers, setting)) if setting.engine == "vllm" else []


def notes(headers: Headers, setting: Setting) -> list[str]:
    """What vLLM needs beside itself, or would take instead."""
    w = setting.weights
    if headers.gguf is not None:
        return [f"{w.format}: {GGUF_IN_VLLM}"]
    if w.family == "bitsandbytes":
        plugin = vllm_rules.plugin_of(config_of(headers, setting))
        return [f"{w.format}: vLLM loads it with {plugin} only ({vllm_rules.INSTALL_PLUGIN}, in vLLM's environment)"]
    return []
