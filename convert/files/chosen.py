"""`budget.json`, beside an artifact whose types were chosen for a budget: what every type of every matrix was expected
to cost the model, what was chosen, and what other sizes would have given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qtool import QtoolError
from qtool.convert.files.reading import MB, read_bytes, shown

CHOSEN = "budget.json"
LIMIT = 64 * MB  # a mixture of 340 stacks with eight types each takes 100 KB
Cost = Annotated[float, Field(ge=0)]


class Chosen(BaseModel):
    """``budget``: as the recipe has it; ``mix``: module -> type; ``sizes, costs``: module -> type -> bytes, nats a
    token; ``beside``: bytes of tensors that have no choice; ``parameters``: of the source; ``curve``: (bytes of all
    tensors, expected KL) of the best mixes, the smallest first; ``alike``: groups of modules that had to get one
    type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    budget: dict[str, Any]
    mix: dict[str, str]
    sizes: dict[str, dict[str, int]]
    costs: dict[str, dict[str, Cost]]
    beside: int
    parameters: Annotated[int, Field(gt=0)]
    curve: list[tuple[int, Cost]]
    alike: list[list[str]] = []

    @model_validator(mode="after")
    def _whole(self) -> Chosen:
        for module, kind in self.mix.items():
            if kind not in self.sizes.get(module, {}) or kind not in self.costs.get(module, {}):
                raise ValueError(f"{module} has a type without a size or a cost")
        return self

    @property
    def bits(self) -> dict[str, float]:
        """Module -> bits of a weight; the largest type that each was offered has sixteen."""
        return {
            module: 16 * self.sizes[module][kind] / max(1, *self.sizes[module].values())
            for module, kind in self.mix.items()
        }

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.beside + sum(self.sizes[module][kind] for module, kind in self.mix.items())

    @property
    def expected(self) -> float:
        """KL in nats a token, to second order."""
        return sum(self.costs[module][kind] for module, kind in self.mix.items())

    @property
    def said(self) -> str:
        """In one line."""
        (budget,) = self.budget.items()
        bits = 8 * self.nbytes / self.parameters
        return f"types by budget ({budget[0]} {budget[1]}): {bits:.3f} bits a weight, expected KL {self.expected:.2g}"


def read_chosen(folder: Path) -> Chosen | None:
    """Of an artifact; None where its types were not chosen for a budget. Raises QtoolError for what is no such file."""
    path = folder / CHOSEN
    if not path.is_file():
        return None
    try:
        return Chosen.model_validate_json(read_bytes(path, LIMIT))
    except ValidationError as error:
        fault = error.errors()[0]
        place = shown(".".join(map(str, fault["loc"])))
        raise QtoolError(f"{path}: does not say how types were chosen ({place}: {fault['msg']}).") from error
