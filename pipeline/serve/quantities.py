"""What a running server holds and how fast it is, beside the plan: cache, memory, speed, and what sharing saves."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from qtool.convert.files.proof import Finding
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.engine import Batch
from qtool.evaluate.engines.probe import Probe, complete, metrics
from qtool.evaluate.engines.server import ServedModel
from qtool.measure.measure import TOLERANCE, random_prompt
from qtool.serve.process import Server
from qtool.sizing.bounds import Range
from qtool.sizing.fit import GIB, estimate_of
from qtool.sizing.serving import PlannedServer
from qtool.sizing.sharing import chunked_prefill, shared_prefix

MEMORY_MARGIN = 1.05  # of what was planned
TRIES = 3  # of each time that is compared
TOKENS, ANSWER = 32, 64  # of an answer that is timed alone, and beside a long prompt
SPEED_PROMPT = 256  # tokens, at most
CHANCE = 8  # tokens that random prompts may have in common
MIB = 2**20
Numbers = dict[str, float]


def cache(planned: PlannedServer, server: Server, probe: Probe, numbers: Numbers) -> Finding:
    """What the engine's cache holds, beside what was planned: as much at least, and where it was told the bytes exactly
    that."""
    found = probe.cache(server.url)
    s, facts = planned.serving, planned.facts
    wanted = facts.cells(s.context, None, 0) * s.sequences + facts.block * facts.spare_blocks
    numbers |= {"cache_tokens": found.tokens, "cache_tokens_planned": wanted, "cache_block": found.block}
    numbers["cache_token_bytes_planned"] = planned.token_bytes
    said = f"{found.tokens:,} tokens, {wanted:,} planned"
    if found.blocks is not None and planned.blocks is not None:
        numbers |= {"cache_blocks": found.blocks, "cache_blocks_planned": planned.blocks}
        said = f"{found.blocks:,} blocks of {found.block} tokens, {planned.blocks:,} of {facts.block} planned"
    good = found.tokens >= wanted if facts.takes_all else found.tokens == wanted
    return Finding(what="cache", outcome="pass" if good else "fail", detail=said)


def held(planned: PlannedServer, server: Server, before: int | None) -> int | None:
    """Bytes that the server has taken: of memory, or of the cards, which held ``before`` without it."""
    if planned.setting.card.processor:
        return server.resident()
    now = machine.device_used()
    return None if now is None or before is None else now - before


def memory(planned: PlannedServer, taken: int | None, numbers: Numbers) -> Finding:
    """``taken``: what it holds, None where nobody tells. An engine that takes its share of a card holds that, however
    little the model needs."""
    estimate = planned.estimate
    wanted = estimate.limit if planned.facts.takes_all else estimate.total
    numbers |= {"memory_planned": wanted, "weights_planned": estimate.weights}
    if taken is None:
        return Finding(what="memory", outcome="not asked", detail="this system does not tell what a process holds")
    numbers["memory"] = taken
    detail = f"{taken / GIB:.2f} GiB, {wanted / GIB:.2f} planned"
    return Finding(what="memory", outcome="pass" if taken <= MEMORY_MARGIN * wanted else "fail", detail=detail)


def speed(planned: PlannedServer, served: ServedModel, numbers: Numbers) -> Iterator[Finding]:
    """Prefill and decode beside the plan's bounds, alone and with all users: what beats them together was measured or
    planned wrongly. What is slower than the slowest expected fails nothing: other work may have had the machine."""
    context = min(SPEED_PROMPT, max(8, planned.serving.context - TOKENS - 1))
    for users in sorted({1, planned.serving.sequences}):
        plan, key = estimate_of(planned.setting, context + TOKENS, users), f"_{context}x{users}"
        first, whole = (_seconds(planned, served, context, users, tokens) for tokens in (1, TOKENS))
        step = (whole - first) / (TOKENS - 1)
        least = (TOKENS - 1) * plan.step.best + (plan.first_token.best if plan.first_token else 0.0)
        numbers |= {f"first_token_seconds{key}": first, f"answer_seconds{key}": whole}
        numbers |= {f"decode_seconds{key}": step, f"decode_seconds_least{key}": plan.step.best}
        said = f"{1e3 * step:.3g} ms a token" if step > 0 else "time of a token: lost in the noise of other work"
        detail = (
            f"first token after {1e3 * first:.3g} ms ({_between(plan.first_token)}), {said} ({_between(plan.step)})"
        )
        good = whole >= TOLERANCE * least
        detail += "" if good else f"; {1e3 * whole:.3g} ms for all of it beat the bound of {1e3 * least:.3g}"
        yield Finding(what=f"speed, {context} tokens x {users}", outcome="pass" if good else "fail", detail=detail)


def _seconds(planned: PlannedServer, served: ServedModel, context: int, users: int, tokens: int) -> float:
    """Until all of ``users`` have ``tokens``, the median of some tries, each with prompts that no cache has seen. When
    the pieces of a stream arrive tells nothing where client and server share a processor."""
    source = random.Random(f"speed {users} {tokens}")
    vocabulary = planned.headers.geometry.vocab
    walls = []
    for _ in range(TRIES):
        prompts = tuple(random_prompt(source, context, vocabulary) for _ in range(users))
        walls.append(served.time(Batch(prompts, tokens)).wall)
    return statistics.median(walls)


def _between(bound: Range | None) -> str:
    if bound is None:
        return "no bound is known"
    slow = "" if bound.slow is None else f", {1e3 * bound.slow:.3g} expected at worst"
    return f"{1e3 * bound.best:.2g} at least{slow}"


def shared(planned: PlannedServer, server: Server, probe: Probe, numbers: Numbers) -> Finding:
    """What a beginning that prompts share saves: tokens that the engine took from its cache, and seconds to the first
    token, beside what is planned."""
    context, block = planned.serving.context, planned.facts.block
    tokens, tail = max(block, context // 2 // block * block), min(32, context // 8)
    if tokens + tail >= context:
        return Finding(what="shared prefix", outcome="not asked", detail=f"the context has {context} tokens only")
    plan = shared_prefix(planned.setting, tokens, planned.serving.sequences)
    source, vocabulary = random.Random("shared"), planned.headers.geometry.vocab
    first: list[float] = []
    later: list[float] = []
    hits: list[float] = []
    for _ in range(TRIES):
        beginning = random_prompt(source, tokens, vocabulary)
        for times in (first, later):
            before = metrics(server.url).get(probe.cached, 0.0)
            started = time.perf_counter()
            complete(server.url, planned.serving.name, [*beginning, *random_prompt(source, tail, vocabulary)])
            times.append(time.perf_counter() - started)
            hits.append(metrics(server.url).get(probe.cached, 0.0) - before)
    found, wasted = statistics.median(hits[1::2]), statistics.median(hits[0::2])
    cold, warm = statistics.median(first), statistics.median(later)
    saved = cold - warm
    numbers |= {"shared_blocks": found / block, "shared_blocks_planned": plan.held / block}
    numbers |= {"shared_tokens": found, "shared_tokens_planned": plan.held, "shared_saved_seconds": saved}
    numbers |= {"shared_blocks_saved_planned": plan.blocks, "shared_bytes_saved_planned": plan.nbytes}
    numbers |= {"first_token_cold_seconds": cold, "first_token_warm_seconds": warm}
    expected = ""
    if plan.seconds is not None:
        numbers["shared_saved_seconds_least"] = plan.seconds.best
        expected = f", {1e3 * plan.seconds.best:.2g} at least by the plan"
    size = found * planned.token_bytes / MIB
    detail = (
        f"of {tokens} shared tokens {found:.0f} ({found / block:.0f} blocks, {size:.2f} MiB) "
        f"came from the cache, {plan.held} planned; a first token came "
        f"{1e3 * saved:.3g} ms sooner{expected}; by it {plan.users} users save {plan.blocks:,} blocks, "
        f"{plan.nbytes / MIB:.2f} MiB"
    )
    good = 0 <= found - plan.held < CHANCE and wasted < CHANCE
    return Finding(what="shared prefix", outcome="pass" if good else "fail", detail=detail)


def chunked(planned: PlannedServer, server: Server, probe: Probe, numbers: Numbers) -> Finding:
    """In how many steps a long prompt is taken up, and how much longer an answer takes meanwhile."""
    s = planned.serving
    tokens, made = min(s.context - 2, 4 * s.prefill), min(ANSWER, s.context // 2)
    plan = chunked_prefill(planned.setting, tokens, s.prefill)
    source, vocabulary = random.Random("chunked"), planned.headers.geometry.vocab

    def ask(length: int, answer: int) -> float:
        started = time.perf_counter()
        complete(server.url, s.name, random_prompt(source, length, vocabulary), answer, ignore_eos=True)
        return time.perf_counter() - started

    before = metrics(server.url).get(probe.steps, 0.0)
    taken = ask(tokens, 1)
    numbers |= {"long_prompt_tokens": tokens, "long_prompt_seconds": taken, "long_prompt_steps_planned": plan.steps}
    detail = f"a prompt of {tokens:,} tokens takes {plan.steps} steps of up to {plan.chunk:,} by the plan"
    good = True
    if probe.steps:
        steps = numbers["long_prompt_steps"] = metrics(server.url).get(probe.steps, 0.0) - before
        good = plan.steps <= steps <= plan.steps + 1  # a server may run a step more, of which nothing is asked
        detail += f", {steps:.0f} in the server"
    if (chunk := probe.chunk(server.log())) is not None:
        good = good and chunk == plan.chunk
        detail += f"; the server says {chunk:,}"
    if s.sequences > 1:
        alone = statistics.median(ask(8, made) for _ in range(TRIES))
        with ThreadPoolExecutor(1) as other:
            beside = other.submit(ask, 8, made)
            ask(tokens, 1)
            delay = beside.result() - alone
        numbers |= {"answer_alone_seconds": alone, "answer_delay_seconds": delay}
        detail += f"; beside it an answer of {made} tokens takes {1e3 * delay:+.3g} ms (alone {1e3 * alone:.3g} ms)"
    if plan.pause is not None and plan.whole is not None and plan.steps > 1:
        detail += (
            f"; by the plan others wait {1e3 * plan.pause.best:.2g} ms at least instead of {1e3 * plan.whole.best:.2g}"
        )
    return Finding(what="chunked prefill", outcome="pass" if good else "fail", detail=detail)


def preempted(server: Server, probe: Probe, numbers: Numbers) -> Finding:
    """Whether the cache was too small for what was asked all the while."""
    if not probe.preempted:
        return Finding(what="preemptions", outcome="not asked", detail="the engine never takes back a user's cache")
    count = numbers["preemptions"] = metrics(server.url).get(probe.preempted, 0.0)
    return Finding(what="preemptions", outcome="pass" if count == 0 else "fail", detail=f"{count:.0f}")
