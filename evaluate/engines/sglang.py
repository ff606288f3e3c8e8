"""SGLang, which qtool does not run: its loading rules are read (convert/runtimes/sglang.py), its memory is planned as
vLLM's, and the flags of its server are those that https://docs.sglang.ai/advanced_features/server_arguments.html names.
"""

from __future__ import annotations

from fractions import Fraction

from qtool.evaluate.engines import vllm
from qtool.evaluate.engines.facts import BF16, F16, CacheType, EngineFacts, Launch, Metrics, Serving, whole_context

SHARE = 0.88  # --mem-fraction-static: weights and cache; what is left is for activations and graphs


def _launch(serving: Serving) -> Launch:
    words = ["python3", "-m", MODULE, "--model-path", serving.place, "--context-length", str(serving.context)]
    words += ["--max-running-requests", str(serving.sequences)]
    words += ["--revision", serving.revision] if serving.revision else []
    dtype = serving.served_dtype
    words += ["--dtype", dtype] if dtype else []
    words += ["--tp-size", str(serving.cards)] if serving.cards > 1 else []
    words += ["--kv-cache-dtype", "fp8_e4m3"] if serving.cache_type == "fp8" else []
    words += ["--chunked-prefill-size", str(serving.prefill)]
    words += [] if serving.prefix_cache else ["--disable-radix-cache"]
    words += ["--mem-fraction-static", f"{serving.share:g}", *serving.offload.split()]
    words += ["--served-model-name", serving.name] if serving.name else []
    return Launch((*words, "--enable-metrics", "--host", serving.host, "--port", str(serving.port)))


MODULE = "sglang.launch_server"
FACTS = EngineFacts(
    name="sglang",
    # read, not run: srt/observability/metrics_collector.py
    metrics=Metrics(
        prefix="sglang:",
        since="SGLang 0.5",
        switch="--enable-metrics",
        late=True,
        label="model_name",
        cache="sglang:token_usage",
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        preempted="sglang:num_retracted_requests_total",
        prompt="sglang:prompt_tokens_total",
        generated="sglang:generation_tokens_total",
        hits="sglang:cached_tokens_total",
        asked=("sglang:prompt_tokens_total",),
        first="sglang:time_to_first_token_seconds",
        step="sglang:inter_token_latency_seconds",
    ),
    packages=("sglang",),
    install="pip install sglang (in an environment of its own)",
    cache_types=(BF16, F16, CacheType("fp8", Fraction(1))),
    cells=whole_context,
    prefill_tokens=vllm.prefill_tokens,
    overhead=vllm.overhead,
    memory_share=SHARE,
    takes_all=True,
    split_faults=vllm.split_faults,
    efficiency=vllm.FACTS.efficiency,
    launch=_launch,
    module=MODULE,
    package="sglang",
    load=lambda download: [(f"python -m sglang.launch_server --model-path {download.place}", "bash")],
    refuses_card=lambda card: f"SGLang is not planned for {card.key}" if card.unified or card.processor else "",
    untried="SGLang's flags are those that it documents; qtool has not run it",
)
