"""`qtool measure URL --concurrency … --rate …`: a server's levels of load, one after another, beside its plan."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qtool import QtoolError
from qtool.evaluate.engines.engine import OutOfMemory
from qtool.evaluate.engines.facts import EngineFacts, Metrics
from qtool.evaluate.engines.openai import only_model
from qtool.evaluate.engines.scrape import Page, engine_of, metrics_url, scrape
from qtool.evaluate.engines.server import KEY_VARIABLE, ServedModel
from qtool.evaluate.engines.table import SERVERS
from qtool.measure.levels import level_of
from qtool.measure.load import MOST_THREADS, Answered, Prompts, arrivals, closed_loop, open_loop
from qtool.measure.run import SERVED_AS, UNKNOWN_VOCABULARY, check_contexts
from qtool.observe.window import Observation, observe
from qtool.runs.loads import Level, Load, Slo
from qtool.sizing.accelerators import Accelerator
from qtool.sizing.fit import Setting, estimate_of
from qtool.sizing.formats import SOURCE, artifact_weights, weights_of
from qtool.sizing.headers import Headers, read_headers

PATIENCE = 300.0  # seconds without a byte, after which a request has failed


@dataclass(frozen=True)
class Ask:
    """``requests`` prompts of ``prompt`` tokens at every level, the first ``shared`` of them the same in all, each
    answered with ``tokens``; ``users`` at once (closed loops), then ``rates`` a second (open loops). ``name``: what the
    server calls its model; ``shape``: folder or config.json of it, ``card``: where it runs (without them nothing is
    predicted)."""

    url: str
    name: str | None
    prompt: int
    shared: int
    tokens: int
    requests: int
    users: tuple[int, ...]
    rates: tuple[float, ...]
    slo: Slo
    seed: int = 0
    shape: str | None = None
    card: Accelerator | None = None


def put_under_load(ask: Ask, done: Callable[[Level], None] = lambda level: None) -> Load:
    """``done`` is called with each level. Raises QtoolError: exit 2 for what makes no sense, exit 3 where the server
    answers not even one request."""
    _check(ask)
    headers = read_headers(ask.shape) if ask.shape else None
    if headers is not None:
        check_contexts("--context", (ask.prompt,), ask.tokens, headers.geometry.max_context, headers.name)
    key = os.environ.get(KEY_VARIABLE) or None
    model = ServedModel(ask.url, ask.name or only_model(ask.url), api_key=key)
    prompts = Prompts(ask.prompt, ask.shared, headers.geometry.vocab if headers else UNKNOWN_VOCABULARY, ask.seed)
    try:  # warm: a server that cannot answer says so here
        model.stamps(prompts.take(1, -1)[0], 2, ask.shared > 0, PATIENCE)
    except OutOfMemory as error:
        raise QtoolError(
            f"{ask.url}: one prompt of {ask.prompt:,} tokens is {error.status} for the server ({error}). Take a "
            "smaller --context.", 3
        ) from error  # fmt: skip
    page = _page(ask.url, key)
    facts, metrics = engine_of(page, ask.url) if page else (SERVERS[SERVED_AS], None)
    setting = _setting(headers, facts, ask.card) if headers and ask.card else None
    send = partial(model.stamps, tokens=ask.tokens, reuse=ask.shared > 0, timeout=PATIENCE)
    levels = []
    loads: list[tuple[int | None, float | None]] = [*((n, None) for n in ask.users), *((None, r) for r in ask.rates)]
    for number, (users, rate) in enumerate(loads):
        put = prompts.take(ask.requests, number)
        before = _page(ask.url, key) if metrics else None
        if users is not None:
            answered = closed_loop(send, put, users)
        else:
            assert rate is not None
            answered = open_loop(send, put, arrivals(rate, len(put), ask.seed))
        seen = _seen(before, _page(ask.url, key), metrics) if metrics else None
        levels.append(_level(ask, answered, users, rate, seen, setting))
        done(levels[-1])
    named = facts.name if metrics else "server"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Load(ask.url, model.model, named, ask.prompt, ask.shared, ask.tokens, ask.seed, ask.slo, now, tuple(levels))


def _level(
    ask: Ask, answered: list[Answered], users: int | None, rate: float | None, seen: Observation | None,
    setting: Setting | None,
) -> Level:  # fmt: skip
    longest = ask.prompt + ask.tokens
    if setting is None:
        return level_of(answered, users, rate, ask.slo, ask.prompt, seen)
    at_once = users
    if at_once is None:
        wall = max(one.ended for one in answered)
        at_once = max(1, math.ceil(sum(one.ended - one.planned for one in answered) / wall))
    predicted, alone = estimate_of(setting, longest, at_once), estimate_of(setting, ask.prompt, 1)
    return level_of(answered, users, rate, ask.slo, ask.prompt, seen, predicted, alone)


def _check(ask: Ask) -> None:
    if not ask.url.startswith(("http://", "https://")):
        raise QtoolError(f"{ask.url}: --concurrency and --rate load a server: give its URL, http://host:8000/v1.")
    if "@" in ask.url:
        raise QtoolError("a URL with a password in it would end in the log: put the server's key into OPENAI_API_KEY.")
    if ask.users and max(ask.users) > MOST_THREADS:
        raise QtoolError(f"--concurrency {max(ask.users)}: one machine loads with {MOST_THREADS} users at most.")
    if ask.shared >= ask.prompt:
        raise QtoolError(f"--prefix-tokens {ask.shared}: a prompt has {ask.prompt} (--context); share fewer of them.")
    if ask.users and max(ask.users) > ask.requests:
        raise QtoolError(f"--requests {ask.requests}: fewer than the {max(ask.users)} users of --concurrency.")


def _page(url: str, key: str | None) -> Page | None:
    """None for a server without metrics, or one that breaks off: they are beside the point here."""
    try:
        page = scrape(metrics_url(url), key)
        engine_of(page, url)
    except QtoolError:
        return None
    return page


def _seen(before: Page | None, after: Page | None, metrics: Metrics) -> Observation | None:
    return observe(before, after, metrics) if before and after else None


def _setting(headers: Headers, facts: EngineFacts, card: Accelerator) -> Setting | None:
    """None for a processor, whose rates are measured: they are no bound where other work goes on beside."""
    if card.processor:
        return None
    weights = artifact_weights(headers) if headers.quantized else weights_of(headers, SOURCE)
    return Setting(headers.geometry, weights, facts.on(card), card, 1, facts.cache_types[0].name)
