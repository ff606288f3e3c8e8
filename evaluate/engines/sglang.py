"""SGLang, which qtool does not run: its loading rules are read (convert/runtimes/sglang.py), and cards name it."""

from __future__ import annotations

from qtool.evaluate.engines.facts import EngineFacts, Metrics

FACTS = EngineFacts(
    name="sglang",
    # read, not run: srt/observability/metrics_collector.py
    metrics=Metrics(
        prefix="sglang:",
        since="SGLang 0.5",
        switch="--enable-metrics",
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
    load=lambda download: [(f"python -m sglang.launch_server --model-path {download.place}", "bash")],
)
