"""What two readings say of the time between them, which limit binds, and `qtool watch` as it is typed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from engine_server import LLAMA, VLLM, FakeEngine, fake_engine, with_values

from qtool.cli import main
from qtool.evaluate.engines.scrape import Page, engine_of, parse
from qtool.observe.limit import binding, shares
from qtool.observe.window import Observation, observe
from qtool.sizing.accelerators import load_accelerators
from qtool.sizing.headers import read_headers
from qtool.sizing.serving import PlannedServer, Wish, plan_server

IDLE = Observation(2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, None, None, None)


def page(text: str, at: float = 0.0) -> Page:
    return parse(text.splitlines(), at)


@pytest.fixture(scope="module")
def plan() -> PlannedServer:
    return plan_server(read_headers("qtool-demo"), Wish(load_accelerators()["L40S"], users=8))


@pytest.fixture
def server() -> Iterator[FakeEngine]:
    with fake_engine() as found:
        yield found


def test_a_window_is_what_grew_in_it() -> None:
    before = page(VLLM, 10.0)
    metrics = engine_of(before, "")[1]
    prompt, made = before.values[metrics.prompt], before.values[metrics.generated]
    asked, hits = before.values[metrics.asked[0]], before.values[metrics.hits]
    more = {"prompt_tokens_total": prompt + 300, "generation_tokens_total": made + 50}
    more |= {"prefix_cache_queries_total": asked + 300, "prefix_cache_hits_total": hits + 60}
    gauges = {"num_preemptions_total": 7, "kv_cache_usage_perc": 0.5, "num_requests_waiting": 3}
    text = with_values(VLLM, **more, **gauges)
    seen = observe(before, page(text, 12.5), metrics)
    assert (seen.seconds, seen.prompt_rate, seen.generated_rate, seen.hits) == (2.5, 120.0, 20.0, 0.2)
    assert (seen.preempted, seen.cache, seen.waiting) == (7.0, 0.5, 3.0)
    assert seen.first is None  # no request came in the window
    assert not seen.restarted


def test_since_the_start_has_no_rate_but_all_quantiles() -> None:
    now = page(VLLM, 10.0)
    metrics = engine_of(now, "")[1]
    seen = observe(None, now, metrics)
    assert seen.prompt_rate is None
    assert seen.seconds is None
    assert seen.first is not None
    assert 0 < seen.first["p50"] <= seen.first["p95"] <= seen.first["p99"]
    assert seen.hits == pytest.approx(now.values[metrics.hits] / now.values[metrics.asked[0]])


def test_two_engines_behind_one_address() -> None:
    """Requests add up; a share of the cache does not: the fullest one decides."""
    second = VLLM.replace('engine="0"', 'engine="1"')
    first = with_values(VLLM, kv_cache_usage_perc=0.4, num_requests_running=3)
    both = page(first + with_values(second, kv_cache_usage_perc=0.7, num_requests_running=2), 1.0)
    seen = observe(None, both, engine_of(both, "")[1])
    assert (seen.cache, seen.running) == (0.7, 5.0)


def test_a_restart_is_no_negative_rate() -> None:
    before = page(VLLM, 0.0)
    metrics = engine_of(before, "")[1]
    text = with_values(VLLM, prompt_tokens_total=10, generation_tokens_total=4)
    seen = observe(before, page(text, 2.0), metrics)
    assert seen.restarted
    assert (seen.prompt_rate, seen.generated_rate) == (5.0, 2.0)


def test_llama_cpp_has_means_where_it_has_no_histograms() -> None:
    before = page(LLAMA, 0.0)
    metrics = engine_of(before, "")[1]
    text = with_values(
        LLAMA, tokens_predicted_total=before.values["llamacpp:tokens_predicted_total"] + 40,
        tokens_predicted_seconds_total=before.values["llamacpp:tokens_predicted_seconds_total"] + 2,
        prompt_tokens_cached_total=30, prompt_tokens_total=before.values["llamacpp:prompt_tokens_total"] + 10,
    )  # fmt: skip
    seen = observe(before, page(text, 4.0), metrics)
    assert seen.step_seconds == pytest.approx(0.05)
    assert seen.hits == pytest.approx(0.75)  # of those looked up, cached and computed
    assert seen.first is None
    assert seen.preempted is None


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [
        ({}, "idle", "no request runs, none ran"),
        ({"generated_rate": 9.0}, "unknown", "--artifact and --card"),  # between two requests at this very moment
        ({"running": 4, "preempted": 3, "cache": 0.4}, "cache", "pseudo-OOM: the cache ran full; 3 preemptions"),
        ({"running": 4, "waiting": 2, "cache": 0.97}, "cache", "2 wait and the cache is 97% full"),
        ({"running": 4, "waiting": 2, "cache": 0.3}, "queue", "2 wait for a slot while 4 run"),
        ({"running": 4, "waiting": 2, "cache": None}, "queue", "2 wait for a slot"),
        ({"running": 4, "cache": 0.99}, "unknown", "--artifact and --card"),
    ],
)  # fmt: skip
def test_the_limit_that_binds(changes: dict[str, Any], limit: str, said: str) -> None:
    verdict = binding(replace(IDLE, **changes), None)
    assert verdict.limit == limit
    assert said in verdict.why
    assert verdict.pseudo_oom == ("preempted" in changes)


def test_bandwidth_and_compute_are_told_by_the_plan(plan: PlannedServer) -> None:
    """At the rate that the bound allows, decoding takes all of the time."""
    from qtool.sizing.fit import estimate_of

    best = estimate_of(plan.setting, 1, 8).step.best
    full = replace(IDLE, running=8, generated_rate=8 / best, prompt_rate=0.0)
    found = shares(full, plan)
    assert found is not None
    assert found.decode == pytest.approx(1.0)
    assert binding(full, plan).limit == "bandwidth"
    assert binding(replace(full, generated_rate=0.1 / best), plan).limit == "none"
    geometry, card = plan.setting.geometry, plan.setting.card
    assert card.bf16 is not None
    fastest = 1.05 * card.bf16 / (2 * geometry.linears)
    prompts = replace(IDLE, running=1, generated_rate=1.0, prompt_rate=fastest)
    assert binding(prompts, plan).limit == "compute"
    assert binding(replace(prompts, hits=0.9), plan).limit == "none"  # what the cache served was not computed


def test_no_bound_is_told_of_a_processor_beside_its_server(plan: PlannedServer) -> None:
    card = replace(plan.setting.card, compute="cpu", host_link=None)
    busy = replace(IDLE, running=2, generated_rate=1e9, prompt_rate=0.0)
    verdict = binding(busy, replace(plan, setting=replace(plan.setting, card=card)))
    assert verdict.limit == "unknown"


def watch(server: FakeEngine, *words: str) -> tuple[int, str]:
    found = CliRunner().invoke(main, ["watch", server.url, "--every", "0.1", *words])
    return found.exit_code, found.output


def test_watch_once(server: FakeEngine) -> None:
    code, text = watch(server, "--once")
    assert code == 0
    assert f"{server.url} (vllm)" in text
    assert "first token, p95" in text


def test_watch_makes_the_pseudo_oom_visible(server: FakeEngine) -> None:
    busy = with_values(VLLM, num_preemptions_total=9, kv_cache_usage_perc=0.99, num_requests_running=3)
    server.pages = [VLLM, busy]
    code, text = watch(server, "--once")
    assert code == 1
    assert "limit: cache. pseudo-OOM: the cache ran full (99% now); 9 preemptions" in " ".join(text.split())
    assert "helps: fewer sequences" in text


def test_watch_says_lines_without_a_terminal(server: FakeEngine) -> None:
    code, text = watch(server, "--for", "0.35")
    lines = text.splitlines()
    assert code == 0
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("cache ") and "| limit: " in line for line in lines)


def test_watch_stands_the_plan_beside(server: FakeEngine) -> None:
    code, text = watch(server, "--once", "--artifact", "qtool-demo", "--card", "L40S", "--users", "8")
    assert code == 0
    assert "planned: qtool-demo on 1 x L40S, 512 tokens x 8" in text
    assert "at most 8" in text


def test_a_metric_that_an_older_engine_lacks_is_one_clear_line(server: FakeEngine) -> None:
    kept = [line for line in VLLM.splitlines() if "kv_cache_usage_perc" not in line and "inter_token" not in line]
    server.pages = ["\n".join(kept) + "\n"]
    code, text = watch(server, "--once")
    lines = [line for line in " ".join(text.split()).split("this server's ") if line.startswith("/metrics lacks")]
    assert code == 0
    assert lines == [
        "/metrics lacks vllm:kv_cache_usage_perc, vllm:inter_token_latency_seconds_bucket, "
        "vllm:inter_token_latency_seconds_count; vLLM 0.32 has them. They count as not said."
    ]


def test_names_that_come_late_are_said_so(server: FakeEngine) -> None:
    """SGLang lists a metric once it was used."""
    server.pages = ["sglang:num_running_reqs 0\nsglang:num_queue_reqs 0\nsglang:token_usage 0.0\n"]
    code, text = watch(server, "--once")
    assert code == 0
    assert "SGLang 0.5 has them, once they were used" in " ".join(text.split())


@pytest.mark.parametrize("fault", ["torn", "missing"])
def test_watch_ends_in_one_line(server: FakeEngine, fault: str) -> None:
    server.page_fault = fault
    code, text = watch(server, "--once")
    assert code == 3
    assert text.startswith("Error: ")
    assert len(text.strip().splitlines()) == 1


def test_a_quantile_beyond_the_last_bucket_is_said_so() -> None:
    from qtool.report.observed import _seconds

    assert _seconds(math.inf) == "beyond the last bucket"
    assert (_seconds(0.0123), _seconds(2.5), _seconds(None)) == ("12.3 ms", "2.5 s", "-")
