"""What there is to serve with on this machine: its card, or its processor with rates that are measured in a moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from qtool import QtoolError
from qtool.make.needs import host_memory
from qtool.sizing.accelerators import PROCESSOR, Accelerator, choose, load_accelerators, own_card
from qtool.sizing.formats import SOURCE, artifact_weights, weights_of
from qtool.sizing.headers import read_headers
from qtool.sizing.serving import PlannedServer, Wish, plan_server

MARGIN = 2.0  # what a bound that must hold takes on top of rates measured beside other work
LEAST, MOST = 2**20, 2**24  # bytes that are read to measure: as many as the model has, whose caches it then meets
SIDE, TRIES = 256, 40


def server_here(model: str, card: str | None, **asked: Any) -> PlannedServer:
    """``model`` as it would be served with this machine's card, or the one named; ``asked``: of a `Wish`. Raises
    QtoolError."""
    headers = read_headers(model)
    working = (artifact_weights(headers) if headers.quantized else weights_of(headers, SOURCE)).nbytes
    return plan_server(headers, Wish(card_here(card, working), **asked))


def card_here(name: str | None, working: int) -> Accelerator:
    """The card named, `cpu` for this machine's processor; without a name this machine's card, else its processor.
    ``working``: bytes that a step reads. Raises QtoolError for an unknown card."""
    known = load_accelerators()
    if name is None:
        own = own_card(known)
        name = PROCESSOR if "," in own else own
        if name == PROCESSOR and (there := _unknown_card()):
            raise QtoolError(
                f"this machine's card, {there}, is none qtool knows: name one that is like it with --card."
            )
    if name.lower() == PROCESSOR:
        return processor(working)
    found = choose(known, name, "--card")
    if len(found) > 1:
        raise QtoolError(f"--card {name}: name one; --gpus says how many of it.")
    return found[0]


def processor(working: int) -> Accelerator:
    """This machine's processor as a card. Its rates are those of one thread in the best of many tries, each shorter
    than what a busy system lets run in one piece, times the cores, doubled: bounds follow from them, and must hold."""
    import torch

    memory = host_memory()
    if memory is None:
        raise QtoolError("this system does not say how much memory is free: name a card with --card.", exit_code=3)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    torch.set_num_threads(1)
    try:
        read = torch.ones(min(max(working, LEAST), MOST) // 4)
        bandwidth = read.nbytes / _best(read.sum)
        flops = 0.0
        for dtype in (torch.float32, torch.bfloat16):
            square = torch.ones(SIDE, SIDE, dtype=dtype)
            flops = max(flops, 2 * SIDE**3 / _best(square.mm, square))
    finally:
        torch.set_num_threads(threads)
    return Accelerator(
        PROCESSOR, "this machine's processor", memory, MARGIN * cores * bandwidth, MARGIN * cores * flops, None,
        PROCESSOR, None, dict.fromkeys(("memory", "bandwidth", "bf16"), "measured here"),
    )  # fmt: skip


def _best(work: Callable[..., object], *arguments: object) -> float:
    """Seconds of the quickest of many tries."""
    work(*arguments)
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        work(*arguments)
        times.append(time.perf_counter() - started)
    return min(times)


def _unknown_card() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""
