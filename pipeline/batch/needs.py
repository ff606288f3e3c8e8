"""What a model's job takes: by the plan of its outputs, from the headers of its weights, on a card that holds it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qtool import QtoolError
from qtool.batch.engine import Needs, Task
from qtool.batch.models import Asked
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.shape import decoder_of
from qtool.evaluate.engines.facts import CUDA_CONTEXT
from qtool.evaluate.engines.streamed import SHARE
from qtool.make.needs import forecast
from qtool.make.output import plan_output
from qtool.make.peaks import LIBRARIES, Work
from qtool.recipe.sections import Recipe
from qtool.sizing.accelerators import PROCESSOR, Accelerator, choose, load_accelerators
from qtool.sizing.headers import Headers, read_headers

SIDE_BY_SIDE = 8  # models whose headers are read at once: of the Hub it is two requests each
CORES, HOUR = 8, 3600.0
SLACK = 2  # times the longest forecast, and an hour at least: a limit costs nothing, a job that it ends a new start


def tasks_of(asked: Sequence[Asked], runs: Path) -> list[Task]:
    """A job for each. Raises QtoolError saying of every model that cannot be made what is in the way."""

    def task(one: Asked) -> Task | str:
        try:
            return Task(one.name, one.text, needs_of(one, runs))
        except QtoolError as error:
            return f"{one.name}: {error.message}"

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = list(pool.map(task, asked))
    if faults := [one for one in found if isinstance(one, str)]:
        raise QtoolError("\n".join(faults))
    return [one for one in found if isinstance(one, Task)]


def needs_of(asked: Asked, runs: Path) -> Needs:
    """No weight is read. Raises QtoolError where no card that qtool knows holds the job, or the model cannot be made
    into an output."""
    recipe, said, cards = asked.recipe, asked.said, asked.said.gpus or 1
    headers = read_headers(said.shape or recipe.model.id, recipe.model.revision if said.shape is None else None)
    if headers.quantized:
        raise QtoolError("is quantized already; name its source.")
    decoder, text = decoder_of(headers.config), recipe.calibration
    samples = recipe.experts.samples(decoder.shape, text.samples, text.length)
    text = text.model_copy(update={"samples": samples})
    shape, folders = ModelShape(headers.tensors, decoder, headers.config), asked.folders()
    outputs = [plan_output(method, shape, folders[method.name]) for method in recipe.outputs]
    alone = said.card is not None and said.card.lower() == PROCESSOR
    work = Work(text, decoder, headers.tensors, outputs, torch.device("cpu" if alone else "cuda"))
    answering = _answering(recipe, headers)
    peak = 0 if alone else max(*work.device_peaks(cards), answering) + CUDA_CONTEXT
    host = max(work.host_peak(cards), (answering if alone else 0) + LIBRARIES[work.device.type])
    card = None if alone else _card(peak, said.card)
    times = forecast(recipe, outputs, runs, lambda device: _alike(device, card))
    seconds = 3600 * said.hours if said.hours else max(HOUR, SLACK * times[1]) if times else None
    return Needs(
        card=card,
        cards=cards,
        named=said.card is not None,
        processors=said.processors or CORES,
        device_bytes=peak,
        host_bytes=host,
        disk_bytes=sum(output.disk_bytes for output in outputs),
        seconds=None if seconds is None else math.ceil(seconds),
    )


def _answering(recipe: Recipe, headers: Headers) -> int:
    """Bytes of the whole source, where it is asked problems in this process. Texts need no more than a layer."""
    asked = recipe.evaluate
    if not asked.tasks or asked.base_url is not None:
        return 0
    return math.ceil(2 * sum(math.prod(info.shape) for info in headers.tensors.values()) / SHARE)


def _card(need: int, named: str | None) -> Accelerator:
    known = load_accelerators()
    if named is not None:
        card = choose(known, named, "card:")[0]
        if card.memory < need:
            raise QtoolError(f"{card.key} has {card.memory / 1e9:.1f} GB, the job takes {need / 1e9:.1f} GB of a card.")
        return card
    fitting = [card for card in known.values() if card.cuda and card.memory >= need]
    if not fitting:
        raise QtoolError(
            f"takes {need / 1e9:.1f} GB of a card, more than any has that qtool knows; take more `gpus:`, or fewer "
            "calibration tokens (`set: {calibration.samples: 64}`)."
        )
    return min(fitting, key=lambda card: card.memory)


def _alike(device: str, card: Accelerator | None) -> bool:
    """Whether the ledger's name of a device is such a card."""
    words = re.findall(r"[A-Z0-9]+", device.upper())
    return device.startswith("cpu") if card is None else card.key.upper().split("-")[0] in words
