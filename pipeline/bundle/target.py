"""What every file beside an artifact is made of: the planned server, and where the model lies for whom."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.sizing.serving import PlannedServer

MOUNTED = "/model"  # where the artifact lies in a container
PORT = 8000


@dataclass(frozen=True)
class Target:
    """``up``: the artifact's folder as seen from the files'; ``repository``: its Hub id, None where nobody said one;
    ``bytes``: of its files; ``key``: the manifest's, empty without one."""

    artifact: Artifact
    server: PlannedServer
    up: str
    repository: str | None
    bytes: int
    key: str

    @property
    def name(self) -> str:
        """What the server calls the model."""
        return self.server.headers.name

    @property
    def label(self) -> str:
        """The name as Kubernetes and Prometheus take it: lower case, digits and dashes, at most 40 characters."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40].strip("-")
        return plain if plain[:1].isalpha() else f"model-{plain}".strip("-")

    @property
    def planned(self) -> str:
        """The plan in a line."""
        s, cell = self.server.serving, self.server.estimate
        cards = f"{s.cards} x {self.server.setting.card.key}"
        return (
            f"{cards}, {s.context:,} tokens x {s.sequences} users, {s.cache_type} cache: {cell.total / 2**30:.2f} of "
            f"{cell.limit / 2**30:.2f} GiB a card"
        )

    def words(self, place: str = MOUNTED) -> list[str]:
        """The engine's program and arguments where the model lies at ``place`` (a folder or a Hub id), reachable from
        outside its container."""
        serving = self.server.serving
        file = Path(place) / serving.file.name if serving.file else None
        moved = replace(serving, place=place, file=file, revision=None, host="0.0.0.0", port=PORT)
        facts = self.server.facts
        if facts.launch is None or not facts.image:
            raise QtoolError(f"{self.name}: qtool knows no container of {facts.name}.")
        return list(facts.launch(moved).words)

    def arguments(self, place: str = MOUNTED) -> list[str]:
        """What follows the program that the engine's image starts by itself."""
        words, own = self.words(place), self.server.facts.command_in_image
        assert tuple(words[: len(own)]) == own, f"{self.server.facts.name} does not start with {own}"
        return words[len(own) :]

    def flags(self) -> dict[str, str | None]:
        """Flag -> its value, None for a switch, without the model's place."""
        return as_flags([word for word in self.arguments() if word != MOUNTED])


def as_flags(words: list[str]) -> dict[str, str | None]:
    """``["--a", "1", "--b"]`` -> ``{"--a": "1", "--b": None}``."""
    found: dict[str, str | None] = {}
    last = None
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit():
            found[last := word] = None
        elif last is not None:
            found[last] = word
    return found


def as_words(flags: Mapping[str, str | None], without: Collection[str] = ()) -> list[str]:
    """The opposite, ``without`` some."""
    return [
        word for flag, value in flags.items() if flag not in without
        for word in ([flag] if value is None else [flag, value])
    ]  # fmt: skip
