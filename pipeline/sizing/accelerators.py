"""The cards that plans are made for: memory, bandwidth, rates, each number with its source; users add their own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from qtool import QtoolError
from qtool.convert.files.reading import CONFIG_LIMIT, named, read_text

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One card. ``memory``: bytes a process can allocate; ``bandwidth`` and ``host_link``: bytes/s; ``bf16`` and
    ``fp8``: dense FLOP/s. None where the vendor states no number, ``host_link`` None where memory is unified."""

    key: str
    name: str
    memory: int
    bandwidth: float
    bf16: float | None
    fp8: float | None
    compute: str
    host_link: float | None
    sources: Mapping[str, str]

    @property
    def unified(self) -> bool:
        """Whether the processor's memory is the card's."""
        return self.host_link is None and not self.processor

    @property
    def processor(self) -> bool:
        """Whether there is no card: the machine's processor computes."""
        return self.compute == PROCESSOR

    @property
    def cuda(self) -> bool:
        """Whether it is an NVIDIA card (its compute capability is a number)."""
        return self.compute.replace(".", "").isdigit()


PROCESSOR = "cpu"
DRIVERS = ("/proc/driver/nvidia", "/dev/dxg", "/dev/kfd")  # Linux, WSL, AMD: without one, torch need not be asked
SAME_MEMORY = 0.08
SCALE = {"memory": GIB, "bandwidth": 1e9, "bf16": 1e12, "fp8": 1e12, "host_link": 1e9}


def load_accelerators(own: Path | None = None) -> dict[str, Accelerator]:
    """Shipped cards, then those of ``own``, which may replace them. Raises QtoolError naming file, card and key."""
    shipped = files("qtool").joinpath("data/accelerators.yaml")
    accelerators = _read(shipped.read_text(encoding="utf-8"), "accelerators.yaml")
    if own is not None:
        accelerators |= _read(read_text(named(str(own)), CONFIG_LIMIT), str(own))
    return accelerators


def choose(cards: Mapping[str, Accelerator], names: str, option: str = "--gpu") -> list[Accelerator]:
    """Cards of a comma-separated list, however spelt (case, dashes). Raises QtoolError naming ``option``, and the cards
    known."""
    plain = {_plain(key): card for key, card in cards.items()} | {_plain(c.name): c for c in cards.values()}
    chosen = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        card = plain.get(_plain(name))
        if card is None:
            close = get_close_matches(_plain(name), plain, n=1)
            hint = f" Did you mean {plain[close[0]].key}?" if close else ""
            raise QtoolError(
                f"{option} {name}: not a card qtool knows.{hint} Known: {', '.join(cards)}. `qtool plan` takes another "
                "from a file (--cards; keys: name, memory, bandwidth, bf16, fp8, compute, host_link, sources)."
            )
        chosen.append(card)
    if not chosen:
        raise QtoolError(f"{option}: name a card: {', '.join(cards)}.")
    return chosen


def own_card(known: Mapping[str, Accelerator]) -> str:
    """The card in this machine, where qtool knows it; else one that many have and one that servers have."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        return "RTX4090,H100"
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return recognized(known, str(properties.name), int(properties.total_memory)) or "RTX4090,H100"
    return "RTX4090,H100"


def recognized(known: Mapping[str, Accelerator], name: str, memory: int) -> str | None:
    """The key of a card that its driver calls ``name`` and that has ``memory`` bytes. Whole words decide ("NVIDIA H100
    80GB HBM3" is no M3), then the memory, in which an RTX 4090 of a laptop is another card."""
    words = re.findall(r"[A-Z0-9]+", name.upper())
    joined = {"".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)}
    for key, card in known.items():
        if key.upper().split("-")[0] in joined and abs(memory / card.memory - 1) < SAME_MEMORY:
            return key
    return None


def _plain(name: str) -> str:
    kept = "".join(letter for letter in name.lower() if letter.isalnum())
    return kept.removeprefix("nvidia").removeprefix("geforce")


def _read(text: str, where: str) -> dict[str, Accelerator]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise QtoolError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise QtoolError(f"{where}: cards are a mapping: name of the card -> its numbers.")
    return {str(key): _card(str(key), row, where) for key, row in data.items()}


def _card(key: str, row: Any, where: str) -> Accelerator:
    known = {field.name for field in fields(Accelerator)} - {"key"}
    if not isinstance(row, dict) or set(row) - known:
        wrong = sorted(map(str, set(row) - known)) if isinstance(row, dict) else ["not a mapping"]
        raise QtoolError(f"{where}: {key}: {', '.join(wrong)}; keys are {', '.join(sorted(known))}.")
    numbers: dict[str, Any] = {}
    for name, scale in SCALE.items():
        value = row.get(name)
        needed = name in ("memory", "bandwidth")
        if value is None and not needed:
            numbers[name] = None
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise QtoolError(f"{where}: {key}: {name} is {value!r}; a number above 0 is needed.")
        numbers[name] = value * scale
    numbers["memory"] = int(numbers["memory"])
    sources = row.get("sources") or {}
    if not isinstance(sources, dict):
        raise QtoolError(f"{where}: {key}: sources is {sources!r}; a mapping is needed: key -> where it stands.")
    return Accelerator(
        key=key, name=str(row.get("name") or key), compute=str(row.get("compute") or "unknown"),
        sources={str(k): str(v) for k, v in sources.items()}, **numbers,
    )  # fmt: skip


def one_card(gpu: str | None, here: bool) -> Accelerator | None:
    """The card named, else this machine's where the work is done ``here``; None where qtool knows none, or several are
    named. Raises QtoolError naming those known."""
    known = load_accelerators()
    name = gpu or (own_card(known) if here else "")
    return choose(known, name)[0] if name and "," not in name else None
