#!/usr/bin/env python3
"""What vLLM's own loader puts into the experts of a quantized model, in vLLM's environment; knows nothing of qtool.

    python interop_vllm_experts.py MODEL OUT.json

vLLM 0.32 has one kernel for four-bit experts on a processor, and takes it only where that has AMX tiles; elsewhere it
refuses the model before it reads a tensor. What the loader does is asked all the same: the question for AMX is answered
with yes, and in place of the kernel's own repacking every tensor of a layer's experts is hashed as it was loaded.
OUT.json: ``refused``, what vLLM says without that; ``layers``, name -> parameter -> (dtype, shape, sha256).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Enough(Exception):
    """All layers are loaded: the forward that would follow has no kernel."""


def load(path: Path) -> None:
    """As a server would start it."""
    from vllm import LLM

    LLM(
        model=str(path), dtype="bfloat16", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=2**26,
        distributed_executor_backend="uni", skip_tokenizer_init=True,
    )  # fmt: skip


def digest(parameter: Any) -> tuple[str, list[int], str]:
    """Its dtype, shape and the hash of its bytes."""
    import torch

    data = parameter.detach().contiguous()
    held = data.view(torch.uint8) if data.element_size() > 1 else data
    return str(data.dtype), list(data.shape), hashlib.sha256(held.numpy().tobytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as compressed,
    )

    refused = ""
    try:
        load(options.model)
    except Exception as error:  # whatever vLLM raises is its answer
        refused = f"{type(error).__name__}: {error}"
    cleanup_dist_env_and_memory()
    layers: dict[str, Any] = {}

    def hashed(self: Any, layer: Any) -> None:
        found = {name: digest(parameter) for name, parameter in layer.named_parameters(recurse=False)}
        layers[str(getattr(layer, "layer_name", len(layers)))] = found

    def enough(*given: Any, **named: Any) -> None:
        raise Enough

    CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    CPUExpertsInt4._supports_quant_scheme = staticmethod(lambda weight, activation: True)
    methods = (auto_awq.AutoAWQMoEMethod, auto_gptq.AutoGPTQMoEMethod, compressed.CompressedTensorsWNA16MoEMethod)
    for method in methods:
        method.process_weights_after_loading = hashed
        method.apply = enough
    failed = ""
    try:
        load(options.model)
    except Exception as error:  # Enough, or what the loader says
        failed = "" if layers else f"{type(error).__name__}: {error}"
    options.out.write_text(json.dumps({"refused": refused, "failed": failed, "layers": layers}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
