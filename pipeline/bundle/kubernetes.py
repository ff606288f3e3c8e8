"""Values for clusters: production-stack's and llm-d's charts, KServe's LLMInferenceService.

Only what the plan knows is asked for: the cards. How many processors and how much memory a pod gets, the cluster's
owner says.
"""

from __future__ import annotations

import math
from typing import Any

from qtool.bundle.target import Target, as_words

CARD = "nvidia.com/gpu"
OWN = {"--host", "--port", "--served-model-name", "--tensor-parallel-size"}  # what charts say themselves
# Keys of production-stack's vllmConfig and vLLM's flags; the chart turns prefix caching off where nothing is said.
CHART = {
    "maxModelLen": ("--max-model-len", int),
    "dtype": ("--dtype", str),
    "maxNumSeqs": ("--max-num-seqs", int),
    "gpuMemoryUtilization": ("--gpu-memory-utilization", float),
    "tensorParallelSize": ("--tensor-parallel-size", int),
}
SWITCHES = {
    "enablePrefixCaching": "--enable-prefix-caching",
    "enableChunkedPrefill": "--enable-chunked-prefill",
}
MAIN = "main"  # the container that LLMInferenceService's own templates name


def production_stack(target: Target) -> dict[str, Any]:
    """https://github.com/vllm-project/production-stack, helm/values.yaml."""
    flags, s = target.flags(), target.server.serving
    repository, _, tag = target.server.facts.image.rpartition(":")
    config: dict[str, Any] = {
        key: kind(value) for key, (flag, kind) in CHART.items() if (value := flags.get(flag)) is not None
    }
    config |= {key: flag in flags for key, flag in SWITCHES.items()}
    said = OWN | {flag for flag, _ in CHART.values()} | set(SWITCHES.values())
    said |= {flag.replace("--", "--no-", 1) for flag in SWITCHES.values()}
    config["extraArgs"] = as_words(flags, said)
    cards = {CARD: str(s.cards)}
    return {"servingEngineSpec": {"enableEngine": True, "modelSpec": [{
        "name": target.label,
        "repository": repository,
        "tag": tag,
        "modelURL": target.repository,
        "replicaCount": 1,
        "requestGPU": s.cards,
        "resources": {"requests": cards, "limits": cards},
        "pvcStorage": f"{_gibibytes(target)}Gi",
        "vllmConfig": config,
    }]}}  # fmt: skip


def llm_d(target: Target) -> dict[str, Any]:
    """https://github.com/llm-d-incubation/llm-d-modelservice, values.yaml: one pool that prefills and decodes."""
    s = target.server.serving
    return {
        "modelArtifacts": {
            "name": target.repository,
            "uri": f"hf://{target.repository}",
            "size": f"{_gibibytes(target)}Gi",
            "labels": {"llm-d.ai/inference-serving": "true", "llm-d.ai/model": target.label},
        },
        "accelerator": {"type": "nvidia"},
        "routing": {"servicePort": 8000, "proxy": {"enabled": False}},
        "decode": {
            "replicas": 1,
            "parallelism": {"tensor": s.cards},
            "containers": [{
                "name": "vllm",
                "image": target.server.facts.image,
                "modelCommand": "vllmServe",  # it says --port, --tensor-parallel-size and --served-model-name
                "args": as_words(target.flags(), OWN),
                "ports": [{"containerPort": 8000, "protocol": "TCP"}],
                "mountModelVolume": True,
            }],
        },
        "prefill": {"create": False},
    }  # fmt: skip


def kserve(target: Target) -> dict[str, Any]:
    """https://github.com/kserve/kserve, serving.kserve.io/v1alpha2; its template starts `vllm serve /mnt/models` with
    what VLLM_ADDITIONAL_ARGS holds."""
    s = target.server.serving
    cards = {CARD: str(s.cards)}
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": target.label},
        "spec": {
            "model": {"uri": f"hf://{target.repository}", "name": target.repository},
            "replicas": 1,
            "parallelism": {"tensor": s.cards},
            "router": {"route": {}, "gateway": {}, "scheduler": {}},
            "template": {"containers": [{
                "name": MAIN,
                "image": target.server.facts.image,
                "env": [{"name": "VLLM_ADDITIONAL_ARGS", "value": " ".join(as_words(target.flags(), OWN))}],
                "resources": {"requests": cards, "limits": cards},
            }]},
        },
    }  # fmt: skip


def _gibibytes(target: Target) -> int:
    """Of a volume that holds the artifact: a tenth more, whole GiB."""
    return math.ceil(1.1 * target.bytes / 2**30)
