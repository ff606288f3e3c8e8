"""An engine's /metrics page: fetched, read, and recognized. A server is hostile: sizes are bounded, garbage is refused.

Format: https://prometheus.io/docs/instrumenting/exposition_formats (text, version 0.0.4).
"""

from __future__ import annotations

import http.client
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qtool import QtoolError
from qtool.evaluate.engines.facts import EngineFacts, Metrics
from qtool.evaluate.engines.server import KEY_VARIABLE, Broken, open_url
from qtool.evaluate.engines.table import SERVERS

LARGEST, PATIENCE, LONGEST = 8 * 2**20, 10.0, 20.0  # bytes of a page; seconds without a byte; seconds of a page
_SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?\s+(\S+)(?:\s+-?\d+)?\s*')
_LE = re.compile(r'[{,]\s*le="([^"]*)"')


@dataclass(frozen=True)
class Page:
    """A page as it was at ``time`` (seconds of a monotonic clock). ``values``: name -> the sum over all labels (several
    engines behind one address are one); ``most``: the largest of them, for shares; ``buckets``: histogram -> upper
    bound -> how many were not above it."""

    time: float
    values: Mapping[str, float]
    most: Mapping[str, float]
    buckets: Mapping[str, Mapping[float, float]]

    def missing(self, metrics: Metrics) -> dict[str, list[str]]:
        """What the page does not say that its engine should -> the names it lacks."""
        known = set(self.values) | {f"{name}_bucket" for name in self.buckets}
        found = {field: [name for name in names if name not in known] for field, names in metrics.names().items()}
        return {field: names for field, names in found.items() if names}


def metrics_url(url: str) -> str:
    """Of the address that a user knows: `http://host:8000/v1`, or already the page's own. Raises QtoolError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise QtoolError(f"{url!r}: give the server's address, http://host:8000.")
    if parts.username or parts.password:
        raise QtoolError(f"a key does not belong into the address. Set {KEY_VARIABLE} instead.")
    place, mark, query = url.partition("?")  # llama-server's router asks for ?model=NAME
    root = place.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
    return f"{root}/metrics{mark}{query}"


def scrape(url: str, api_key: str | None = None) -> Page:
    """Fetch and read the page at ``url``. Raises QtoolError (exit 3) for a server that is not there, answers something
    else, or breaks off."""
    try:
        with open_url(url, None, api_key, PATIENCE) as answer:
            taken = time.perf_counter()
            body = _body(answer, taken + LONGEST)
            promised = answer.headers.get("Content-Length")
    except Broken as error:
        raise QtoolError(f"{url}: {error}. Is the server running?", exit_code=3) from error
    except QtoolError as error:
        switches = ", ".join(f"{m.since.split()[0]}: {m.switch}" for _, m in known_metrics() if m.switch)
        raise QtoolError(
            f"{error.message.rstrip('.')}. Some engines must be told to have it ({switches}).", 3
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise QtoolError(f"{url}: the answer broke off ({type(error).__name__}).", exit_code=3) from error
    if len(body) > LARGEST:
        raise QtoolError(f"{url}: more than {LARGEST >> 20} MiB; no engine's metrics.", exit_code=3)
    if promised is not None and promised.isdigit() and len(body) < int(promised):
        raise QtoolError(f"{url}: the answer broke off after {len(body)} of {promised} bytes.", exit_code=3)
    try:
        return parse(body.decode("utf-8").splitlines(), taken)
    except ValueError as error:
        raise QtoolError(f"{url}: not a page of Prometheus metrics ({error}).", exit_code=3) from error


def _body(answer: Any, until: float) -> bytes:
    """At most one byte more than a page may have. Raises OSError where it is not there in time."""
    body = b""
    while len(body) <= LARGEST and (piece := answer.read1(min(65536, LARGEST + 1 - len(body)))):
        body += piece
        if time.perf_counter() > until:
            raise TimeoutError
    return body


def parse(lines: Iterable[str], taken: float = 0.0) -> Page:
    """Raises ValueError naming the line that is no sample."""
    values: dict[str, float] = {}
    most: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _SAMPLE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number}: {line[:60]!r}")
        name, labels, value = match[1], match[2] or "", float(match[3])
        if math.isnan(value):  # the engine does not know it
            continue
        if name.endswith("_bucket") and (bound := _LE.search(labels)):
            of = buckets.setdefault(name.removesuffix("_bucket"), {})
            upper = float(bound[1])
            of[upper] = of.get(upper, 0.0) + value
        else:
            values[name] = values.get(name, 0.0) + value
            most[name] = max(most.get(name, value), value)
    if not values and not buckets:
        raise ValueError("it holds no sample")
    return Page(taken, values, most, buckets)


def known_metrics() -> list[tuple[EngineFacts, Metrics]]:
    """Every engine that has such a page."""
    return [(facts, facts.metrics) for facts in SERVERS.values() if facts.metrics is not None]


def engine_of(page: Page, url: str) -> tuple[EngineFacts, Metrics]:
    """Whose page it is, by the prefix of its names. Raises QtoolError (exit 3) for nobody's."""
    names = [*page.values, *page.buckets]
    for facts, metrics in known_metrics():
        if any(name.startswith(metrics.prefix) for name in names):
            return facts, metrics
    known = ", ".join(f"{metrics.prefix}…" for _, metrics in known_metrics())
    raise QtoolError(f"{url}: {names[0]} and {len(names) - 1} more, but nothing of {known}.", exit_code=3)


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """The value that ``share`` of the observations do not exceed, linear within its bucket as Prometheus'
    histogram_quantile has it; infinite above the last finite bound; None without observations."""
    bounds = sorted(buckets)
    if not bounds or not (total := buckets[bounds[-1]]) > 0:
        return None
    rank, below, lower = share * total, 0.0, 0.0
    for upper in bounds:
        count = buckets[upper]
        if count >= rank and count > below:
            return math.inf if math.isinf(upper) else lower + (upper - lower) * (rank - below) / (count - below)
        below, lower = count, upper
    return math.inf
