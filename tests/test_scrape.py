"""An engine's /metrics page: what real ones say (as captured), and what a hostile or broken server sends."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from engine_server import LLAMA, VLLM, FakeEngine, fake_engine

from qtool import QtoolError
from qtool.evaluate.engines import scrape as scraping
from qtool.evaluate.engines.scrape import engine_of, known_metrics, metrics_url, parse, quantile, scrape
from qtool.evaluate.engines.table import SERVERS

KEY = "sk-secret-0123456789"


@pytest.fixture
def server() -> Iterator[FakeEngine]:
    with fake_engine() as found:
        yield found


@pytest.mark.parametrize(("text", "name"), [(VLLM, "vllm"), (LLAMA, "llama.cpp")])
def test_captured_pages_have_every_stated_name(text: str, name: str) -> None:
    """Of vLLM 0.32.0 and of llama.cpp's server b11549, each after some requests."""
    page = parse(text.splitlines())
    facts, metrics = engine_of(page, "x")
    assert facts.name == name
    assert page.missing(metrics) == {}
    assert page.values[metrics.prompt] > 0
    assert page.values[metrics.generated] > 0


def test_every_stated_name_begins_as_its_engine_says() -> None:
    for facts, metrics in known_metrics():
        for names in metrics.names().values():
            assert all(name.startswith(metrics.prefix) for name in names), facts.name
    assert SERVERS["ollama"].metrics is None


def test_values_are_summed_over_labels_and_nan_is_unknown() -> None:
    page = parse(
        [
            "# HELP x y", "", 'a:x{engine="0",model="a}b \\" c"} 2', 'a:x{engine="1"} 3.5 1700000000',
            "a:n NaN", "a:i +Inf",
            'a:h_bucket{le="0.5",e="0"} 1', 'a:h_bucket{e="1",le="0.5"} 2', 'a:h_bucket{le="+Inf"} 3', "a:h_count 3",
        ]
    )  # fmt: skip
    assert page.values == {"a:x": 5.5, "a:i": math.inf, "a:h_count": 3}
    assert page.buckets == {"a:h": {0.5: 3.0, math.inf: 3.0}}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["<html><body>"], "line 1: '<html><body>'"), (["a:x 1", "a:y one"], "could not convert"),
        (["a:x"], "line 1"), ([], "no sample"), (["# only comments"], "no sample"), (['a:x{le="1} 2'], "line 1"),
    ],
)  # fmt: skip
def test_what_is_no_page_is_refused(lines: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(lines)


def test_quantile_is_that_of_prometheus() -> None:
    """The example of its documentation of histogram_quantile: linear within the bucket."""
    buckets = {0.1: 0.0, 0.2: 10.0, 0.5: 30.0, math.inf: 40.0}
    assert quantile(buckets, 0.25) == pytest.approx(0.2)
    assert quantile(buckets, 0.5) == pytest.approx(0.35)
    assert quantile(buckets, 0.05) == pytest.approx(0.12)
    assert quantile(buckets, 0.99) == math.inf
    assert quantile({0.1: 0.0, math.inf: 0.0}, 0.5) is None
    assert quantile({}, 0.5) is None


def test_quantile_lies_in_the_bucket_of_the_true_one() -> None:
    source = random.Random(3)
    bounds = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, math.inf]
    for _ in range(50):
        values = sorted(source.lognormvariate(-2, 1) for _ in range(source.randrange(1, 300)))
        buckets = {bound: float(sum(value <= bound for value in values)) for bound in bounds}
        for share in (0.5, 0.95, 0.99):
            true = values[max(0, math.ceil(share * len(values)) - 1)]
            upper = min(bound for bound in bounds if bound >= true)
            lower = max([0.0, *(bound for bound in bounds if bound < true)])
            found = quantile(buckets, share)
            assert found is not None
            assert lower <= found <= upper


@pytest.mark.parametrize(
    ("url", "page"),
    [
        ("http://h:8000", "http://h:8000/metrics"), ("http://h:8000/v1/", "http://h:8000/metrics"),
        ("https://h/metrics", "https://h/metrics"),
        ("http://h:8080/metrics?model=a%2Fb", "http://h:8080/metrics?model=a%2Fb"),
    ],
)  # fmt: skip
def test_the_pages_address(url: str, page: str) -> None:
    assert metrics_url(url) == page


@pytest.mark.parametrize("url", ["h:8000", "ftp://h", "file:///etc/passwd", "http://user:key@h"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(QtoolError):
        metrics_url(url)


def test_a_page_is_fetched_with_the_key(server: FakeEngine) -> None:
    page = scrape(f"{server.url}/metrics", KEY)
    assert engine_of(page, server.url)[0].name == "vllm"
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (b"<html>\n", "not a page of Prometheus metrics"), (b"", "no sample"), (b"\xff\xfe\x00", "not a page"),
        (b"a:x 1\n" * 2_000_000, "more than 8 MiB"),
    ],
)  # fmt: skip
def test_garbage_is_one_line(server: FakeEngine, page: bytes, said: str) -> None:
    server.pages = [page]
    with pytest.raises(QtoolError, match=said) as caught:
        scrape(f"{server.url}/metrics")
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message


def test_a_torn_page_is_no_page(server: FakeEngine) -> None:
    """Half the counters would look like a restart."""
    server.page_fault = "torn"
    with pytest.raises(QtoolError, match="broke off"):
        scrape(f"{server.url}/metrics")


def test_a_page_that_trickles_ends(server: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scraping, "LONGEST", 0.3)
    server.page_fault = "trickle"
    with pytest.raises(QtoolError, match="broke off"):
        scrape(f"{server.url}/metrics")


def test_a_server_without_the_page_says_what_switches_it_on(server: FakeEngine) -> None:
    server.page_fault = "missing"
    with pytest.raises(QtoolError, match=r"llama\.cpp: --metrics") as caught:
        scrape(f"{server.url}/metrics", KEY)
    assert KEY not in caught.value.message


def test_nobody_there_and_nobody_known(server: FakeEngine) -> None:
    with pytest.raises(QtoolError, match="Is the server running"):
        scrape("http://127.0.0.1:9/metrics")
    server.pages = ["node_cpu_seconds_total 4\nnode_load1 2\n"]
    with pytest.raises(QtoolError, match="node_cpu_seconds_total and 1 more, but nothing of vllm:"):
        engine_of(scrape(f"{server.url}/metrics"), server.url)
