"""Load in closed and open loops: arrivals, latency from the planned arrival, failures that count, goodput."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from engine_server import VLLM, FakeEngine, fake_engine, with_values

from qtool import QtoolError
from qtool.cli import main
from qtool.evaluate.engines.engine import OutOfMemory
from qtool.measure.levels import level_of
from qtool.measure.load import Answered, Prompt, Prompts, Stamps, arrivals, closed_loop, open_loop
from qtool.report.load_figure import under_load
from qtool.runs import ledger
from qtool.runs.loads import Level, Load, Slo, from_json
from qtool.sizing.accelerators import load_accelerators
from qtool.sizing.fit import estimate_of
from qtool.sizing.headers import read_headers
from qtool.sizing.serving import Wish, plan_server


@pytest.fixture
def server() -> Iterator[FakeEngine]:
    with fake_engine() as found:
        yield found


def answered(first: float, step: float, tokens: int = 11, planned: float = 0.0, late: float = 0.0) -> Answered:
    at = planned + first
    last = at + step * (tokens - 1)
    return Answered(planned, planned + late, last, at, last, tokens)


def failed(planned: float = 0.0, ended: float = 1.0, fault: str = "broken") -> Answered:
    return Answered(planned, planned, ended, fault=fault)


def test_arrivals_are_a_poisson_process_of_its_seed() -> None:
    """Independent exponential gaps: their mean and their deviation are both one over the rate."""
    planned = arrivals(5.0, 4000, seed=1)
    gaps = [b - a for a, b in zip([0.0, *planned], planned, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.2, rel=0.05)
    assert deviation == pytest.approx(0.2, rel=0.07)
    assert planned == arrivals(5.0, 4000, seed=1)
    assert planned != arrivals(5.0, 4000, seed=2)


def test_prompts_share_their_beginning_and_nothing_else() -> None:
    prompts = Prompts(32, 20, 500, seed=3)
    one, two = prompts.take(3, 0), prompts.take(3, 1)
    every = [*one, *two]
    assert {len(prompt) for prompt in every} == {32}
    assert len({prompt[:20] for prompt in every}) == 1
    assert len({prompt[20:] for prompt in every}) == 6  # no level finds an earlier one's in a cache
    assert prompts.take(3, 0) == one
    assert len({prompt[:4] for prompt in Prompts(32, 0, 500, seed=3).take(5, 0)}) == 5


def test_an_open_loop_counts_from_the_planned_arrival() -> None:
    """A server that answers one at a time and stalls once: everybody planned meanwhile has waited, too. A client that
    counts from its sending would see one slow request (coordinated omission)."""
    import threading

    one_at_a_time, stalled = threading.Lock(), [0.4]

    def send(prompt: Prompt) -> Stamps:
        started = time.perf_counter()
        with one_at_a_time:
            time.sleep(stalled.pop() if stalled else 0.001)
        return [time.perf_counter() - started], 1, None

    found = open_loop(send, [(1,)] * 10, [0.02 * i for i in range(10)])
    waits = [one.first_seconds or 0.0 for one in found]
    assert all(wait == pytest.approx(0.4 - 0.02 * i, abs=0.08) for i, wait in enumerate(waits))
    level = level_of(found, None, 50.0, Slo(0.1), 1)
    assert level.first["p50"] == pytest.approx(0.32, abs=0.08)
    assert level.good < 0.4 * level.requests_per_second


def test_a_request_that_is_sent_late_has_waited() -> None:
    late = answered(0.3, 0.01, planned=1.0, late=0.2)
    assert late.first_seconds == pytest.approx(0.3)  # 0.1 of them after it was sent
    assert level_of([late], None, 1.0, Slo(), 1).late == pytest.approx(0.2)


def test_a_closed_loop_never_has_more_than_its_users(server: FakeEngine) -> None:
    from qtool.evaluate.engines.server import ServedModel

    server.step = 0.005
    model = ServedModel(f"{server.url}/v1", "coder")
    found = closed_loop(lambda prompt: model.stamps(prompt, 4), [(1, 2)] * 20, 3)
    assert server.most == 3
    assert len(found) == 20
    assert {one.tokens for one in found} == {4}
    steps = [one.step_seconds or 0.0 for one in found]
    assert sum(steps) / len(steps) == pytest.approx(0.006, abs=0.002)


@pytest.mark.parametrize("error", [QtoolError("it broke"), OutOfMemory("too long")])
def test_a_failure_is_an_answer(error: Exception) -> None:
    def send(prompt: Prompt) -> Stamps:
        raise error

    (one,) = closed_loop(send, [(1,)], 1)
    assert one.fault in ("it broke", "out of memory: too long")
    assert one.first_seconds is None


def test_what_a_server_says_is_shown_as_it_is(server: FakeEngine, tmp_path: Path) -> None:
    """No markup of ours, no control characters."""
    server.refusal = b"[/red] \x1b[2J [bold]no\r\nsuch thing"
    server.faults = ["", "refused"]
    code, text = measure(server, tmp_path, "--concurrency", "1")
    assert code == 1
    assert "[/red] ?[2J [bold]no such thing" in text


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_ctrl_c_asks_nothing_new(loop: str) -> None:
    """What is under way ends; of a thousand prompts a few were put."""
    put: list[Prompt] = []

    def send(prompt: Prompt) -> Stamps:
        put.append(prompt)
        if len(put) == 5:
            raise KeyboardInterrupt
        time.sleep(0.01)
        return [0.01], 1, None

    prompts = [(i,) for i in range(1000)]
    with pytest.raises(KeyboardInterrupt):
        _ = closed_loop(send, prompts, 2) if loop == "closed" else open_loop(send, prompts, [0.0] * 1000)
    time.sleep(0.1)
    after = len(put)
    time.sleep(0.1)
    assert len(put) == after <= (40 if loop == "closed" else 1000)


def test_failures_lie_at_the_slow_end_of_the_percentiles() -> None:
    """9 of 10 answered: the median is known, the 95th percentile is a request that failed."""
    level = level_of([*(answered(0.1, 0.01) for _ in range(9)), failed()], 4, None, Slo(1.0, 1.0), 8)
    assert level.first == {"p50": pytest.approx(0.1), "p95": None, "p99": None}
    assert level.step["p95"] is None
    assert level.whole == {"p50": pytest.approx(0.2), "p95": None, "p99": None}
    assert (level.requests, level.failed, level.faults) == (10, 1, {"broken": 1})
    assert level.keeps is False
    assert level.good * level.wall == pytest.approx(9)
    few = level_of([*(answered(0.1, 0.01) for _ in range(39)), failed()], 4, None, Slo(1.0, 1.0), 8)
    assert few.keeps is True  # one of forty lies above the 95th percentile
    assert level_of([failed()] * 3, 1, None, Slo(1.0), 8).keeps is False
    json.dumps(level.first, allow_nan=False)


def test_goodput_counts_what_keeps_both() -> None:
    found = [answered(0.1, 0.01), answered(0.1, 0.2), answered(0.9, 0.01), failed()]
    level = level_of(found, 2, None, Slo(0.5, 0.05), 8)
    assert level.good * level.wall == pytest.approx(1)
    assert level_of(found, 2, None, Slo(0.5), 8).good * level.wall == pytest.approx(2)
    assert level_of(found, 2, None, Slo(), 8).keeps is None


def test_a_step_that_beats_its_bound_is_not_believed() -> None:
    plan = plan_server(read_headers("qtool-demo"), Wish(load_accelerators()["L40S"]))
    alone = estimate_of(plan.setting, 64, 1)
    fast = [answered(0.1, alone.step.best / 2)]
    assert "beats the bound" in level_of(fast, 1, None, Slo(), 64, None, alone, alone).wrong
    fine = level_of([answered(0.1, alone.step.best * 2)], 1, None, Slo(), 64, None, alone, alone)
    assert fine.wrong == ""
    assert fine.step_bound == (alone.step.best, alone.step.slow)


def levels(*kept: bool) -> tuple[Level, ...]:
    return tuple(
        level_of([answered(0.1 if keeps else 9.0, 0.01)], users, None, Slo(1.0), 8)
        for users, keeps in zip((1, 4, 8, 16), kept, strict=False)
    )


def load_of(*found: Level) -> Load:
    return Load("http://h/v1", "m", "vllm", 8, 4, 11, 0, Slo(1.0), "2026-01-01T00:00:00+00:00", found)


def test_the_largest_concurrency_has_no_failing_one_below_it() -> None:
    assert (best := load_of(*levels(True, True, False, True)).largest) is not None
    assert best.users == 4
    assert load_of(*levels(False, True)).largest is None


def test_a_load_is_kept_as_it_was(tmp_path: Path) -> None:
    load = load_of(*levels(True, False))
    assert from_json(json.loads(json.dumps(load.as_json(), allow_nan=False))) == load


def test_the_picture_is_drawn_with_failures_in_it() -> None:
    load = load_of(*levels(True, False), level_of([answered(0.1, 0.01), failed()], None, 2.5, Slo(1.0), 8))
    svg = under_load(load)
    root = ElementTree.fromstring(svg)
    text = "".join(root.itertext())
    assert "4 users" in text
    assert "2.5 /s" in text
    assert "1 failed" in text
    assert svg.count('class="slo"') == 1  # of the first token; none of the further ones


def measure(server: FakeEngine, runs: Path, *words: str) -> tuple[int, str]:
    given = ["measure", f"{server.url}/v1", "--runs", str(runs), "--context", "16", "--tokens", "4", "--requests", "8"]
    found = CliRunner().invoke(main, [*given, *words])
    return found.exit_code, found.output


def test_measure_under_load(server: FakeEngine, tmp_path: Path) -> None:
    server.step = 0.002
    code, text = measure(
        server, tmp_path, "--concurrency", "1,4", "--rate", "100", "--prefix", "shared", "--ttft", "1000", "--tpot",
        "500", "--svg", str(tmp_path / "load.svg"),
    )  # fmt: skip
    assert code == 0, text
    assert "16 tokens a prompt, the first 8 of them shared" in text
    assert "p95 is kept with 4 users" in text
    assert "p95 is kept at 100 requests/s" in text
    assert ElementTree.parse(tmp_path / "load.svg").getroot() is not None
    (entry,) = ledger.read(tmp_path)
    load = from_json(entry)
    assert [(level.users, level.rate, level.requests) for level in load.levels] == [
        (1, None, 8), (4, None, 8), (None, 100.0, 8)
    ]  # fmt: skip
    asked = server.seen[1:]  # the first one warms it
    assert len(asked) == 24
    assert {tuple(one["prompt"][:8]) for one in asked} == {tuple(asked[0]["prompt"][:8])}
    assert len({tuple(one["prompt"][8:]) for one in asked}) == 24
    assert {(one["max_tokens"], one["ignore_eos"], one["cache_prompt"]) for one in asked} == {(4, True, True)}
    assert load.levels[0].cached == 0.25  # 4 of 16 tokens, as the server said


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("torn", "the answer broke off"), ("garbage", "answered what no OpenAI-compatible server does"),
        ("refused", "this model takes no such thing"), ("error", "engine died"),
    ],
)  # fmt: skip
def test_requests_that_fail_are_counted(server: FakeEngine, tmp_path: Path, fault: str, said: str) -> None:
    server.faults = ["", "", fault, "", fault]
    code, text = measure(server, tmp_path, "--concurrency", "2", "--ttft", "1000")
    assert code == 1
    assert "2 users: 2 failed: " in text
    assert said in text
    (level,) = from_json(ledger.read(tmp_path)[0]).levels
    assert (level.requests, level.failed, level.keeps) == (8, 2, False)


def test_the_servers_own_counters_stand_beside(server: FakeEngine, tmp_path: Path) -> None:
    later = with_values(VLLM, num_preemptions_total=5, num_requests_running=0)
    server.pages = [VLLM, VLLM, later]
    code, text = measure(server, tmp_path, "--concurrency", "2", "--json")
    assert code == 0
    assert json.loads(text[text.index("{") :])["levels"][0]["preempted"] == 5.0


def test_a_server_without_metrics_is_loaded_all_the_same(server: FakeEngine, tmp_path: Path) -> None:
    server.page_fault = "missing"
    code, text = measure(server, tmp_path, "--rate", "200")
    assert code == 0
    assert "(server)" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "fast"], "--rate fast: a number above 0"), (["--rate", "-1"], "a number above 0"),
        (["--concurrency", "0"], "--concurrency 0: a whole number"), (["--concurrency", "9"], "--requests 8: fewer"),
        (["--concurrency", "2", "--prefix", "shared", "--prefix-tokens", "16"], "a prompt has 16"),
        (["--concurrency", "2", "--context", "16,32"], "all prompts have one length"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(server: FakeEngine, tmp_path: Path, words: list[str], said: str) -> None:
    code, text = measure(server, tmp_path, *words)
    assert code == 2
    assert said in text
    assert server.seen == []


def test_a_folder_is_not_put_under_load(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["measure", "qtool-demo", "--no-log", "--concurrency", "2"])
    assert found.exit_code == 2
    assert "give its URL" in found.output


def test_nobody_there(tmp_path: Path) -> None:
    words: list[Any] = ["measure", "http://127.0.0.1:9/v1", "--runs", tmp_path, "--rate", "2", "--context", "16"]
    found = CliRunner().invoke(main, [str(word) for word in words])
    assert found.exit_code == 3
    assert "Is the server running?" in found.output
