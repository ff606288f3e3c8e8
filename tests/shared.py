"""One of three processes that take one long text up together, for test_shared.py: `python shared.py FOLDER`, its rank
in RANK.

Rank 2 does alone what ranks 0 and 1 do together; then all three do it. Ports, one for each meeting, are in
FOLDER/ports.json. Logits go to FOLDER/CASE-NUMBER-RANK.safetensors, with where each chunk of them begins.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qtool.convert.artifact import Artifact
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines import layered, reference
from qtool.evaluate.engines.condition import PLAIN, Condition
from qtool.evaluate.engines.layered import Sweep
from qtool.evaluate.engines.share import Share
from qtool.evaluate.engines.streamed import StreamedModel, open_streamed
from qtool.quantize.ranks import joined

CHUNK = 32  # positions of which there are logits at a time
CASES: dict[str, tuple[str, int, int, Condition]] = {  # model, tokens, queries at a time, condition
    "plain": ("dense", 640, 96, PLAIN),  # seven chunks, the last one short
    "few": ("dense", 70, 96, PLAIN),  # fewer than one chunk for each
    "q8_0": ("dense", 640, 64, Condition("q8_0")),
    "window": ("dense", 640, 96, Condition("", 4, 100)),
    "both": ("dense", 640, 50, Condition("q4_0", 3, 61)),
    "sliding": ("sliding", 300, 48, PLAIN),
    "experts": ("experts", 200, 48, PLAIN),
}


class Ended(Exception):
    """A kill between two layers."""


def ending(model: StreamedModel, number: int) -> Any:
    """Reads two layers and no more."""
    if number == 2:
        raise Ended
    return FILL(model, number)


FILL = StreamedModel.fill


def swept(folder: Path, name: str, share: Share, states: Path, every: float = 1e9) -> Iterator[tuple[int, Any]]:
    """(start, logits) of each chunk that is this rank's."""
    model, length, queries, condition = CASES[name]
    place = folder / model
    streamed = open_streamed(
        reference.FACTS, Artifact.open(place).read, load_config(place), torch.device("cpu"), False
    )  # fmt: skip
    window = torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(2))
    sweep = Sweep(streamed, queries, states, condition, every=every, share=share)
    yield from zip(share.starts(length), sweep.logits(sweep.states(window)), strict=True)


def attempt(folder: Path, name: str, share: Share) -> None:
    """A case, or the two parts of a resume: two ranks begin, three and one go on."""
    target = folder / f"{name}-{share.number}-{share.rank}.safetensors"
    if name != "resumed":
        found = swept(folder, name, share, folder / f"{name}-{share.number}.states")
    elif share.number == 2:
        StreamedModel.fill = ending  # type: ignore[method-assign, assignment]
        try:
            list(swept(folder, "plain", share, folder / "resumed.states", every=0.0))
        except Ended:
            return
        finally:
            StreamedModel.fill = FILL  # type: ignore[method-assign]
        raise AssertionError("was not ended")
    else:
        read: list[int] = []
        StreamedModel.fill = lambda model, number: read.append(number) or FILL(model, number)  # type: ignore
        found = iter(list(swept(folder, "plain", share, folder / "resumed.states")))
        StreamedModel.fill = FILL  # type: ignore[method-assign]
        (folder / f"read-{share.number}-{share.rank}.json").write_text(json.dumps(read))
    save_file({str(start): logits.contiguous() for start, logits in found}, target)


def main() -> None:
    """The cases for 1, 2 and 3 ranks."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    for module in (layered, sys.modules[Share.__module__]):
        module.CHUNK = CHUNK  # type: ignore[attr-defined]
    ports = iter(json.loads((folder / "ports.json").read_text()))
    for case in (*CASES, "resumed"):
        for number, members in ((1, (2,)), (2, (0, 1)), (3, (0, 1, 2))):
            os.environ["MASTER_PORT"] = str(next(ports))
            if rank not in members or (case == "resumed" and number == 1):
                continue
            with joined(members.index(rank), number, torch.device("cpu")) as ranks:
                attempt(folder, case, Share(ranks.rank, ranks.number, ranks.gathered, ranks.tell))


if __name__ == "__main__":
    main()
