"""What the calibration text reached of a mixture's experts, and what each lost, by an artifact's error ledger."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qtool.convert.models.expert_names import expert_of, stacked

Ledger = Mapping[str, Mapping[str, float]]
Place = tuple[int, int]  # layer, expert
MOST_NAMED = 5
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Coverage:
    """tokens: (layer, expert) -> the calibration tokens that its router sent there, empty where nobody counted;
    blended: what part of its statistics came from all tokens, where some did."""

    tokens: Mapping[Place, int]
    blended: Mapping[Place, float]

    @property
    def unseen(self) -> list[Place]:
        """Experts that no token reached."""
        return [place for place, count in self.tokens.items() if not count]

    @property
    def lost(self) -> str:
        """Those experts, the first few named."""
        named = [f"layer {layer}, expert {expert}" for layer, expert in self.unseen[:MOST_NAMED]]
        more = f" and {len(self.unseen) - MOST_NAMED:,} more" if len(self.unseen) > MOST_NAMED else ""
        return f"{len(self.unseen):,} saw none ({'; '.join(named)}{more})"

    @property
    def sentence(self) -> str:
        """For readers."""
        counts = list(self.tokens.values())
        rare = min(self.tokens, key=lambda place: self.tokens[place])
        said = (
            f"{len(counts):,} experts saw {min(counts):,} to {max(counts):,} calibration tokens each, "
            f"{fmean(counts):,.0f} in the mean; fewest in layer {rare[0]}, expert {rare[1]}"
        )
        said += f"; {self.lost}" if self.unseen else ""
        if self.blended:
            most = max(self.blended.values())
            said += (
                f"; of {len(self.blended):,} a part of the statistics, at most {most:.0%}, is that of all tokens, for "
                "their own were too few"
            )
        return said + "."

    def as_json(self) -> dict[str, Any]:
        """For the ledger of runs."""
        counts = list(self.tokens.values())
        return {
            "experts": len(counts), "fewest": min(counts), "mean": round(fmean(counts), 1), "most": max(counts),
            "unseen": len(self.unseen), "blended": len(self.blended),
        }  # fmt: skip


def place_of(matrix: str) -> Place | None:
    """Of a matrix of a routed expert, by its name; None for all others."""
    layer, expert = _LAYER.search(matrix), expert_of(matrix)
    return None if layer is None or expert is None else (int(layer[1]), expert)


def coverage(ledger: Ledger) -> Coverage | None:
    """None where no expert's tokens were counted: there is no mixture, or it was made without a text."""
    tokens: dict[Place, int] = {}
    blended: dict[Place, float] = {}
    for matrix, record in ledger.items():
        place = place_of(matrix)
        if place is None or "tokens" not in record:
            continue
        tokens[place] = int(record["tokens"])
        if (share := record.get("blended", 0.0)) > 0:
            blended[place] = max(share, blended.get(place, 0.0))
    return Coverage(tokens, blended) if tokens else None


def by_expert(ledger: Ledger, key: str) -> dict[Place, float]:
    """(layer, expert) -> the mean of what its matrices have under ``key``."""
    found: dict[Place, list[float]] = {}
    for matrix, record in ledger.items():
        place = place_of(matrix)
        if place is not None and key in record:
            found.setdefault(place, []).append(record[key])
    return {place: fmean(values) for place, values in sorted(found.items())}


def by_kind(ledger: Ledger, key: str) -> dict[str, float]:
    """Matrix -> what it has under ``key``; of a layer's experts the mean, under the name that they have together."""
    found: dict[str, list[float]] = {}
    for matrix, record in ledger.items():
        if key in record:
            found.setdefault(stacked(matrix), []).append(record[key])
    return {matrix: fmean(values) for matrix, values in found.items()}
