"""Does a model solve the long tasks, do its artifacts, and what do caches and windows cost it? Markdown tables.

    python scripts/check_long_tasks.py MODEL --work work                      on one card `outputs` takes 7 minutes
    python scripts/check_long_tasks.py MODEL --work work --part outputs       source and artifacts
    python scripts/check_long_tasks.py MODEL --work work --part conditions    q8_0, q4_0, a window of 4+2048
    python scripts/check_long_tasks.py MODEL --work work --part stretch       YaRN, twice the context
    python scripts/check_long_tasks.py MODEL --work work --part source --lengths 1024 --quick    on a processor
    python scripts/check_long_tasks.py MODEL --work work --part llama.cpp --lengths 4096 8192 --quick    its own caches

MODEL: a folder, as scripts/train_long_model.py makes one: the names that are asked for are in none of its lessons. What
was made and scored lies in --work and is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from long_lessons import CHECKS

import qtool
from qtool.evaluate.buckets import tokens_text
from qtool.runs.depths import by_depth, by_length
from qtool.runs.summary import Summary, TaskSummary

OUTPUTS: dict[str, dict[str, Any]] = {
    "awq": {"method": "awq", "group_size": 128},
    "gptq": {"method": "gptq", "group_size": 128},
    "Q4_K_M": {"method": "gguf", "type": "Q4_K_M"},
}
WHOLE = {"F16": {"method": "gguf", "type": "F16"}}  # the source as llama.cpp reads it
TASKS = ("long-call", "long-combine", "long-change")
CONDITIONS = [{"cache": "q8_0"}, {"cache": "q4_0"}, {"window": {"sink": 4, "recent": 2048}}]
OWN_CACHES = [{"cache": "q8_0"}, {"cache": "q4_0"}]  # of llama.cpp, not simulated
PARTS = ("source", "outputs", "conditions", "stretch", "llama.cpp")


def asked(options: argparse.Namespace, lengths: list[int], each: int) -> list[dict[str, Any]]:
    """The tasks as a recipe has them; problems are those of `long_lessons.CHECKS`, or the first of them."""
    kept = {"depths": options.depths, "look_alikes": options.look_alikes, "each": each, "seed": CHECKS.seed}
    return [{"task": task, "made": {"lengths": lengths, **kept}} for task in options.tasks]


def scored(
    model: Path, against: Path | None, options: argparse.Namespace, tasks: list[dict[str, Any]], **settings: Any
) -> Summary:
    """Of one model, and of the source, whose scores are read where they exist."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return qtool.score(
        model, against, tasks, runs=options.work / "runs", device=device, prompt=options.prompt, max_new_tokens=64,
        **settings,
    )  # fmt: skip


def share_rows(name: str, tasks: Mapping[str, TaskSummary]) -> Iterator[list[str]]:
    """A row for each task and half: shares by length with 95 % intervals."""
    for task, found in tasks.items():
        shares = by_length(found)
        halves = [alike for alike in (True, False) if any(kind == alike for _, kind in shares)]
        for alike in halves:
            cells = [
                f"{rate.estimate:.0%} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
                for (_, kind), rate in shares.items()
                if kind == alike
            ]
            points = None if found.loss is None else found.loss.difference
            lost = "" if points is None else f"{points.lost} lost, {points.gained} gained, p {points.p:.2g}"
            yield [name, task, "look-alikes" if alike else "control", *cells, lost if alike == halves[0] else ""]


def depth_rows(name: str, tasks: Mapping[str, TaskSummary]) -> Iterator[list[str]]:
    """A row for each task and depth: shares of both halves by length."""
    for task, found in tasks.items():
        shares = by_depth(found)
        for depth in sorted({depth for depth, _ in shares}):
            yield [name, task, f"{depth:.0%}", *(f"{v:.0%}" for (d, _), v in sorted(shares.items()) if d == depth)]


def position_rows(name: str, summary: Summary, model: str) -> Iterator[list[str]]:
    """A row for each condition: KL by position, with 95 % intervals."""
    for condition, along in summary.models[model].along.items():
        cells = [f"{b.kl.estimate:.4f} [{b.kl.low:.4f}, {b.kl.high:.4f}]" for b in along.buckets]
        yield [f"{name} {condition}".strip(), f"{along.cache_bytes / 2**20:.1f}", *cells]


def table(head: list[str], rows: list[list[str]]) -> None:
    """Markdown."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def show(found: dict[str, tuple[Summary, str]], lengths: list[int]) -> None:
    """All tables of these models: (summary, its name there) by the name that is shown."""
    head = [tokens_text(length) for length in lengths]
    tasks = {name: summary.models[model].tasks for name, (summary, model) in found.items()}
    rows = [row for name, of in tasks.items() for row in share_rows(name, of)]
    table(["model", "task", "half", *head, "against the source, both halves"], rows)
    table(["model", "task", "depth", *head], [row for name, of in tasks.items() for row in depth_rows(name, of)])
    along = [row for name, (summary, model) in found.items() for row in position_rows(name, summary, model)]
    if along:
        summary, model = next(iter(found.values()))
        buckets = next(iter(summary.models[model].along.values())).buckets
        table(["model and cache", "cache, MiB", *(bucket.name for bucket in buckets)], along)


def made(options: argparse.Namespace, names: list[str]) -> dict[str, Path]:
    """Artifacts by output; those that exist stay."""
    folder = options.work / "artifacts"
    missing = {name: (OUTPUTS | WHOLE)[name] for name in names if not list(folder.glob(f"*-{name.lower()}"))}
    if missing:
        outputs = [{"name": name.lower(), **output} for name, output in missing.items()]
        calibration = {"text": "qtool-code", "samples": options.samples, "length": 512}
        qtool.convert(options.model, outputs, calibration, folder=folder, device="auto")
    return {name: next(iter(folder.glob(f"*-{name.lower()}"))) for name in names}


def stretched(options: argparse.Namespace, factor: float) -> Path:
    """A copy of the model whose positions YaRN stretches."""
    folder: Path = options.work / f"yarn-{factor:g}"
    shutil.copytree(options.model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    context = config["max_position_embeddings"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    config |= {"rope_parameters": {**rope, "rope_theta": theta}, "rope_scaling": rope}
    config |= {"max_position_embeddings": int(context * factor)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def main() -> None:
    """The parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="several; default: outputs, conditions, stretch")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(CHECKS.lengths[:-1]))
    parser.add_argument("--depths", type=int, default=CHECKS.depths)
    parser.add_argument("--prompt", default="auto", choices=("auto", "completion", "chat"))
    parser.add_argument("--look-alikes", type=int, default=CHECKS.look_alikes, help="0: the control alone")
    parser.add_argument("--each", type=int, default=2, help="problems of a length, depth and half; conditions: half")
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration")
    parser.add_argument("--outputs", nargs="+", default=list(OUTPUTS), choices=tuple(OUTPUTS))
    parser.add_argument("--quick", action="store_true", help="one problem a place, 3 depths, Q4_K_M alone, short text")
    options = parser.parse_args()
    if options.quick:
        options.each, options.depths, options.samples, options.outputs = 1, 3, 8, ["Q4_K_M"]
    longest = max(options.lengths)
    long = {"text": "heldout-code", "length": 2048 if options.quick else min(16384, longest)}
    tasks, parts = asked(options, options.lengths, options.each), options.part or PARTS[1:4]
    for part in parts:
        began = time.monotonic()
        found: dict[str, tuple[Summary, str]] = {}
        lengths = options.lengths
        if part == "source":
            summary = scored(options.model, None, options, tasks)
            found["source"] = (summary, next(iter(summary.models)))
        elif part == "outputs":
            for name, folder in made(options, options.outputs).items():
                summary = scored(folder, options.model, options, tasks, long=long)
                found.setdefault("source", (summary, "source"))
                found[name] = (summary, next(model for model in summary.models if model != "source"))
        elif part == "conditions":
            ((name, folder),) = made(options, options.outputs[-1:]).items()
            fewer = asked(options, lengths, max(1, options.each // 2))
            summary = scored(folder, options.model, options, fewer, long=long, conditions=CONDITIONS)
            found = {"source": (summary, "source"), name: (summary, next(m for m in summary.models if m != "source"))}
        elif part == "llama.cpp":
            ((name, folder),) = made(options, list(WHOLE)).items()
            settings = {"engine": "llama.cpp", "batch_size": 1, "conditions": OWN_CACHES}
            summary = scored(folder, None, options, tasks, **settings)
            found[f"{name} in llama.cpp"] = (summary, next(iter(summary.models)))
        else:
            lengths = [longest, 2 * longest]
            for factor in (2.0, 4.0):
                summary = scored(stretched(options, factor), None, options, asked(options, lengths, 1))
                found[f"source, YaRN {factor:g}"] = (summary, next(iter(summary.models)))
        print(f"\n## {part}: {time.monotonic() - began:.0f} s", flush=True)
        show(found, lengths)


if __name__ == "__main__":
    main()
