"""What a running server holds and how fast it is, beside the plan: cache, memory, speed, and what sharing saves."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

from qtool import QtoolError
from qtool.convert.files.proof import Finding
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.engine import OutOfMemory
from qtool.evaluate.engines.probe import Probe, complete, metrics
from qtool.evaluate.engines.server import ServedModel
from qtool.measure.measure import measure, random_prompt
from qtool.serve.process import Server
from qtool.sizing.fit import GIB, Estimate, estimate_of
from qtool.sizing.serving import PlannedServer
from qtool.sizing.sharing import chunked_prefill, shared_prefix

MEMORY_MARGIN = 1.05  # of what was planned
TRIES = 3  # of each time that is compared
TOKENS = 16  # of an answer that is timed
SPEED_PROMPT = 256  # tokens, at most
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
    """Decode and prefill between the plan's bounds: what beats a bound was measured or planned wrongly; what is slower
    than the slowest expected is said and fails nothing, because other work may have had the machine."""
    context = min(SPEED_PROMPT, max(8, planned.serving.context - TOKENS - 1))

    def predict(prompt: int, sequences: int) -> Estimate:
        return estimate_of(planned.setting, prompt + TOKENS, sequences)

    batches = sorted({1, planned.serving.sequences})
    vocabulary = planned.headers.geometry.vocab
    for row in measure(served.time, (context,), batches, TOKENS, TRIES, predict, vocabulary):
        name = f"{row.context} tokens x {row.sequences}"
        if row.step_seconds is None or row.first_seconds is None or row.step_bound is None:
            yield Finding(what=f"speed, {name}", outcome="fail", detail=f"{row.status}: {row.why}")
            continue
        first = row.first_seconds["p50"]
        key = f"_{row.context}x{row.sequences}"
        numbers |= {f"decode_seconds{key}": row.step_seconds, f"first_token_seconds{key}": first}
        numbers[f"decode_bound_seconds{key}"] = row.step_bound[0]
        detail = f"{1e3 * row.step_seconds:.3g} ms a token ({_between(row.step_bound)}), "
        detail += f"first after {1e3 * first:.3g} ms ({_between(row.first_bound)})"
        detail += f"; {row.why}" if row.why else ""
        yield Finding(what=f"speed, {name}", outcome="fail" if row.status == "rejected" else "pass", detail=detail)


def _between(bound: tuple[float, float | None] | None) -> str:
    if bound is None:
        return "no bound is known"
    slow = "" if bound[1] is None else f", {1e3 * bound[1]:.3g} expected at worst"
    return f"bound {1e3 * bound[0]:.2g}{slow}"


def shared(planned: PlannedServer, server: Server, probe: Probe, numbers: Numbers) -> Finding:
    """What a beginning that prompts share saves: tokens that the engine took from its cache, and seconds to the first
    token, beside what is planned."""
    context, block = planned.serving.context, planned.facts.block
    tokens, tail = max(block, context // 2 // block * block), min(32, context // 8)
    if tokens + tail >= context:
        return Finding(what="shared prefix", outcome="not asked", detail=f"the context has {context} tokens only")
    plan = shared_prefix(planned.setting, tokens, planned.serving.sequences)
    source, vocabulary = random.Random(2), planned.headers.geometry.vocab
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
    numbers |= {"shared_tokens": found, "shared_tokens_planned": plan.held, "shared_saved_seconds": saved}
    numbers |= {"shared_blocks_saved_planned": plan.blocks, "shared_bytes_saved_planned": plan.nbytes}
    numbers |= {"first_token_cold_seconds": cold, "first_token_warm_seconds": warm}
    expected = ""
    if plan.seconds is not None:
        numbers["shared_saved_seconds_least"] = plan.seconds.best
        expected = f", {1e3 * plan.seconds.best:.2g} at least by the plan"
    detail = (
        f"of {tokens} shared tokens {found:.0f} came from the cache, {plan.held} planned; a first token came "
        f"{1e3 * saved:.3g} ms sooner{expected}; {plan.users} users save {plan.blocks:,} blocks, "
        f"{plan.nbytes / 2**20:.1f} MiB"
    )
    good = abs(found - plan.held) <= block and wasted <= block
    return Finding(what="shared prefix", outcome="pass" if good else "fail", detail=detail)


def chunked(planned: PlannedServer, served: ServedModel, numbers: Numbers) -> Finding:
    """How long an answer waits for its next token while a long prompt is taken up."""
    context = planned.serving.context
    if planned.serving.sequences < 2:
        return Finding(what="chunked prefill", outcome="not asked", detail="one user alone waits for nobody")
    tokens = min(context - 2, 4 * max(planned.serving.prefill, 128))
    plan = chunked_prefill(planned.setting, tokens)
    source, vocabulary = random.Random(3), planned.headers.geometry.vocab
    made = min(64, context // 2)
    stamps: list[float] = []
    started = time.perf_counter()
    answer = threading.Thread(
        target=lambda: stamps.extend(_stamps(served, random_prompt(source, 8, vocabulary), made)), daemon=True
    )
    answer.start()
    time.sleep(0.1)
    arrived = time.perf_counter() - started
    _stamps(served, random_prompt(source, tokens, vocabulary), 1)
    taken = time.perf_counter() - started - arrived
    answer.join(60.0)
    gaps = [after - before for before, after in pairwise(stamps)]
    if len(gaps) < 2:
        return Finding(what="chunked prefill", outcome="not asked", detail="the answer came in one piece")
    numbers |= {"longest_pause_seconds": max(gaps), "usual_pause_seconds": statistics.median(gaps)}
    numbers |= {"long_prompt_tokens": tokens, "long_prompt_seconds": taken, "long_prompt_steps_planned": plan.steps}
    detail = f"beside a prompt of {tokens:,} tokens (planned: {plan.steps} x {plan.chunk:,}; {1e3 * taken:.3g} ms) "
    detail += f"a token came after {1e3 * max(gaps):.3g} ms at most, usually after {1e3 * statistics.median(gaps):.3g}"
    return Finding(what="chunked prefill", outcome="pass", detail=detail)


def _stamps(served: ServedModel, ids: Sequence[int], tokens: int) -> list[float]:
    try:
        return served.stamps(list(ids), tokens)[0]
    except (OutOfMemory, QtoolError):
        return []


def preempted(server: Server, probe: Probe, numbers: Numbers) -> Finding:
    """Whether the cache was too small for what was asked all the while."""
    if not probe.preempted:
        return Finding(what="preemptions", outcome="not asked", detail="the engine never takes back a user's cache")
    count = numbers["preemptions"] = metrics(server.url).get(probe.preempted, 0.0)
    return Finding(what="preemptions", outcome="pass" if count == 0 else "fail", detail=f"{count:.0f}")
