"""One of four processes that make artifacts together, for test_ranks.py: `python ranked.py FOLDER`, its rank in RANK.

Rank 2 makes alone what ranks 0 and 1 make together; then three, or all, make it once more. Ports, one for each meeting,
are in FOLDER/ports.json. What is refused goes to FOLDER/said-N.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from small_models import converted

from qtool import QtoolError
from qtool.quantize import crew, source_model
from qtool.quantize.ranks import joined
from qtool.quantize.walk import Walk

GRID = {"group_size": 32, "dtype": "bfloat16"}
DENSE: list[dict[str, Any]] = [
    {"method": "awq", **GRID}, {"method": "gptq", **GRID}, {"method": "nf4"}, {"method": "gguf"},
    {"method": "gguf", "name": "ggml", "rounding": "ggml"},
    {"method": "awq", "name": "source", "propagate_error": False, **GRID},
    {"method": "nf4", "name": "absmax", "rounding": "absmax"},
]  # fmt: skip
EXPERTS: list[dict[str, Any]] = [DENSE[0], DENSE[1], DENSE[4], DENSE[5]]
CREWS: dict[str, list[dict[str, Any]]] = {  # fewer outputs than ranks: matrices are in pieces, whoever rounds them
    "awq": [DENSE[0]], "pairs": DENSE[1:3], "gguf": [DENSE[3]], "source": [DENSE[5]], "beside": [DENSE[0], DENSE[4]],
    "mixture": [DENSE[0]],
}  # fmt: skip
NUMBERS = {"dense": (1, 2, 3), "experts": (1, 2, 3), "resumed": (2, 3), "rejoined": (4, 2)}  # of others: 1 and 3
NUMBERS |= {"awq": (1, 2, 4), "pairs": (1, 4), "gguf": (1, 2), "source": (1, 3), "beside": (1, 2), "mixture": (1, 2)}
BATCHES = {"dense": 2, "experts": 4, "fewer": 4}  # sequences in each: 3 batches of 2 sequences, or 4 and 2


def stopped(walk: Walk, start: int = 0) -> Iterator[Any]:
    """A walk that ends after its first layer."""
    yield next(RUN(walk, start))
    raise QtoolError("stopped")


RUN = Walk.run
WHOLE = crew.LEAST, crew.ALIGNED


def attempt(folder: Path, case: str, number: int, rank: int) -> str:
    """What was refused, else nothing."""
    sparse = case in ("experts", "mixture")
    model = folder / ("experts" if sparse else case if case in ("nan", "loud") else "dense")
    outputs = {"experts": EXPERTS, "dense": DENSE, "rejoined": DENSE[:1], **CREWS}.get(case, DENSE[:2])
    in_pieces = case in CREWS or case == "rejoined"
    crew.LEAST, crew.ALIGNED = (1, 8) if in_pieces else WHOLE
    if case == "loud":  # only the second output cannot hold it
        outputs = [DENSE[2], {"method": "gptq", "group_size": 32}]
    source_model.BATCH_TOKENS["cpu"] = 48 * BATCHES.get(case, 2)
    target = folder / f"{case}-{number}"
    if case in ("resumed", "rejoined"):  # begun by another number than goes on
        target = folder / case
        Walk.run = stopped if number == NUMBERS[case][0] else RUN  # type: ignore[assignment, method-assign]
    target.mkdir(exist_ok=True)
    with joined(rank, number, torch.device("cpu")) as ranks:
        try:
            converted(model, outputs, target, ranks if number > 1 else None)
            return ""
        except QtoolError as error:
            return error.message
        finally:
            Walk.run = RUN  # type: ignore[method-assign]  # as it was


def main() -> None:
    """The cases for 1 to 4 ranks."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    ports = iter(json.loads((folder / "ports.json").read_text()))
    for case in ("dense", "experts", "fewer", "nan", "loud", "resumed", "rejoined", *CREWS):
        for number in NUMBERS.get(case, (1, 3)):
            os.environ["MASTER_PORT"] = str(next(ports))
            members = (2,) if number == 1 else tuple(range(number))
            if rank in members:
                said = attempt(folder, case, number, members.index(rank))
                (folder / f"said-{case}-{number}-{members.index(rank)}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
