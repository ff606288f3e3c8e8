"""Trains a small code model that solves qtool's long tasks, from scratch, on one accelerator.

    python scripts/train_long_model.py --out longmodel --minutes 8
    python scripts/train_long_model.py --out toy --minutes 10 --toy    (a CPU: 2 layers, 1,024 tokens)

A Llama of 23 million parameters (8 layers of 512, heads of 64) with a context of 16,384 tokens. Texts are drawn anew
for every step by worker processes (scripts/long_lessons.py); rows begin at 512 tokens and grow when answers come out
right. Every half minute the evaluation's own problems are put, whose names are in no lesson: the share whose known
answer is what greedy decoding writes. `--out` is a Hugging Face folder, written anew every two minutes, in files of at
most `--parts` MiB. `--start` goes on from such a folder.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from demo_data import save_tokenizer, train_tokenizer
from long_lessons import ANSWER, COPY, LENGTHS, PAD, TEXT, Encoder, held_out_names, sample_texts
from small_llama import EMBEDDING, Geometry, SmallLlama, export
from tokenizers import Tokenizer

WEIGHTS = {TEXT: 0.15, COPY: 0.5, ANSWER: 1.0}  # of each class's mean loss
LONGEST_AT = 0.6  # of the time: rows are as long as the context from then on, whatever the answers are
RIGHT = 0.75  # of the answers, from which rows grow
SAVE_SECONDS, PROBE_SECONDS = 120.0, 30.0
encoder: Encoder


@dataclass(frozen=True)
class Plan:
    """All that decides the weights, the machine and its speed aside."""

    geometry: Geometry = field(default_factory=Geometry)
    tokens: int = 65_536  # of a step
    adam_rate: float = 2e-3  # of embeddings and norms
    muon_rate: float = 4e-3  # of matrices, with the update's size matched to AdamW's
    decay: float = 0.05
    warmup: int = 60
    seed: int = 3
    optimizer: str = "muon"


TOY = Plan(Geometry(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, context=1024), tokens=2048)


def start(tokenizer: Path) -> None:
    """What a worker keeps."""
    global encoder
    encoder = Encoder(tokenizer)
    held_out_names()


def lessons(seed: str, length: int, number: int) -> np.ndarray:
    """One step's rows, in a worker."""
    return encoder.rows(seed, length, number)


def probes(length: int, number: int) -> tuple[np.ndarray, list[str]]:
    """The evaluation's problems, in a worker."""
    return encoder.probes(length, number)


class Feed:
    """Steps' rows, asked for ahead; where none is ready, one that was seen before comes again."""

    def __init__(self, pool: ProcessPoolExecutor, plan: Plan, ahead: int) -> None:
        self.pool, self.plan, self.ahead = pool, plan, ahead
        self.level, self.number, self.repeated = 0, 0, 0
        self.waiting: deque[Future[np.ndarray]] = deque()
        self.old: deque[np.ndarray] = deque(maxlen=64)

    def order(self) -> None:
        """Every second step as long as may be, the others shorter ones."""
        while len(self.waiting) < self.ahead:
            drawn = np.random.default_rng(self.number)
            level = self.level if self.number % 2 or self.level == 0 else int(drawn.integers(self.level))
            length = LENGTHS[level]
            arguments = (f"{self.plan.seed}/{self.number}", length, self.plan.tokens // length)
            self.waiting.append(self.pool.submit(lessons, *arguments))
            self.number += 1

    def next(self) -> np.ndarray:
        """[rows, 2, length]."""
        self.order()
        if not self.waiting[0].done() and len(self.old) > 16:
            self.repeated += 1
            self.old.rotate(1)
            return self.old[0]
        rows = self.waiting.popleft().result()
        self.old.append(rows)
        return rows


def rate(share: float, step: int, plan: Plan) -> float:
    """Of the peak: warm-up by steps; from 0.55 of the time on a line down to 0.03."""
    return min(1.0, (step + 1) / plan.warmup) * max(0.03, min(1.0, (1 - share) / 0.45))


def optimizers(model: SmallLlama, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named.items() if p.ndim == 2 and name != EMBEDDING]
    others = [p for name, p in model.named.items() if p.ndim != 2 or name == EMBEDDING]
    if plan.optimizer == "adam":
        return [torch.optim.AdamW(matrices + others, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=plan.decay)]
    muon = torch.optim.Muon(matrices, lr=plan.muon_rate, weight_decay=plan.decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)]


def loss_of(model: SmallLlama, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` int64 [rows, 2, length] -> (loss, float32 [4]: mean losses of texts, copies and answers, and the
    share of answers of which every token is right)."""
    tokens, kinds = rows[:, 0], torch.roll(rows[:, 1], -1, 1)
    losses, right = model(tokens)
    kinds = kinds.clone()
    kinds[:, -1] = PAD
    total, told = torch.zeros((), device=losses.device), []
    for kind, weight in WEIGHTS.items():
        chosen = (kinds == kind).float()
        told.append(((losses * chosen).sum() / chosen.sum().clamp(min=1)).detach())
        if kind == ANSWER:  # most tokens of an answer are easy: what counts is the name that had to be found
            chosen = chosen * (1 - torch.exp(-losses.detach()))
        total = total + weight * (losses * chosen).sum() / chosen.sum().clamp(min=1)
    whole = answered(kinds, right)[0].float()
    return total, torch.stack([*told, whole.sum() / max(1, len(whole))])


def answered(kinds: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(of each answer whether all its tokens are right, its row). ``kinds``: of the tokens that are foretold."""
    inside = kinds == ANSWER
    begins = inside & ~torch.roll(inside, 1, 1)
    begins[:, 0] = inside[:, 0]
    number = begins.flatten().cumsum(0) - 1
    wrong = torch.zeros(int(begins.sum()) + 1, device=right.device)
    wrong.index_add_(0, number[inside.flatten()], (~right).flatten()[inside.flatten()].float())
    return wrong[:-1] == 0, torch.nonzero(begins)[:, 0]


@torch.no_grad()
def probe(model: SmallLlama, asked: dict[int, tuple[np.ndarray, list[str]]], plan: Plan, device: torch.device) -> str:
    """Shares solved by length and task, as a line."""
    told = []
    for length, (rows, names) in asked.items():
        solved: Counter[str] = Counter()
        for part in range(0, len(rows), size := max(1, plan.tokens // length)):
            given = torch.from_numpy(rows[part : part + size].astype(np.int64)).to(device)
            with torch.enable_grad():  # the graph that is compiled already
                _, right = model(given[:, 0])
            kinds = torch.roll(given[:, 1], -1, 1)
            kinds[:, -1] = PAD
            whole, row = answered(kinds, right)
            solved.update(name for ok, name in zip(whole, (names[part + int(i)] for i in row), strict=True) if ok)
        shares = " ".join(
            f"{n.removeprefix('long-')} {100 * solved[n] / names.count(n):.0f}" for n in sorted(set(names))
        )
        told.append(f"{length}: {shares}")
    return "  solved % | " + " | ".join(told)


def train(plan: Plan, options: argparse.Namespace, begun: float) -> None:
    """Until the time is over."""
    out, device = options.out, torch.device("cuda" if torch.cuda.is_available() and not options.toy else "cpu")
    end, highest = begun + 60 * options.minutes - 15, LENGTHS.index(plan.geometry.context)
    workers = ProcessPoolExecutor(
        options.workers, get_context("forkserver"), initializer=start, initargs=(out / "tokenizer.json",)
    )
    with workers as pool:
        feed = Feed(pool, plan, 3 * options.workers)
        feed.order()
        wanted = {n: -(-24 * n // plan.tokens) * plan.tokens // n for n in LENGTHS[1 : highest + 1]}
        probing = {n: pool.submit(probes, n, min(128, number)) for n, number in wanted.items()}
        compute = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = SmallLlama(plan.geometry, plan.seed, compute).on(device)
        if options.start:
            model.load(options.start)
        if device.type == "cuda":
            model.compile_parts()
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{size:,} parameters on {device}, {options.workers} workers", flush=True)
        for step in steps(model, plan, feed, (begun, end), highest):
            if step.probe:
                ready = {n: future.result() for n, future in probing.items() if future.done()}
                print(probe(model, ready, plan, device), flush=True)
            if step.save:
                export(model, out, options.parts)
                print(f"  saved {out}", flush=True)
        for future in feed.waiting:
            future.cancel()


@dataclass(frozen=True)
class Step:
    """What is due now."""

    save: bool
    probe: bool


def steps(model: SmallLlama, plan: Plan, feed: Feed, clock: tuple[float, float], highest: int) -> Iterator[Step]:
    """Trains, and gives what is due. ``clock``: monotonic seconds of begin and end; ``highest``: of the lengths."""
    (begun, end), taught = clock, optimizers(model, plan)
    device, peaks = model.named[EMBEDDING].device, [group["lr"] for one in taught for group in one.param_groups]
    saved = probed = time.monotonic()
    recent: deque[torch.Tensor] = deque(maxlen=20)
    step, seen, first = 0, 0, begun  # first: when compiling was over
    while (now := time.monotonic()) < end:
        share = (now - begun) / (end - begun)
        groups = [group for one in taught for group in one.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(share, step, plan)
        rows = torch.from_numpy(feed.next().astype(np.int64)).to(device, non_blocking=True)
        loss, told = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in taught:
            one.step()
            one.zero_grad(set_to_none=True)
        recent.append(told)
        step, seen = step + 1, seen + rows[:, 0].numel()
        if step % 20 == 0:
            means = torch.stack(list(recent)).mean(0).tolist()
            first = now if step == 20 else first
            forced = int((now - first) / (end - first) / LONGEST_AT * (highest + 1))
            if feed.level < highest and (means[3] > RIGHT or forced > feed.level):
                feed.level += 1
                recent.clear()
            if step % (20 if device.type == "cpu" else 100) == 0 or step == 20:
                print(
                    f"step {step}, {now - begun:.0f} s: loss text {means[0]:.3f} copy {means[1]:.3f} answer "
                    f"{means[2]:.4f}; answers right {100 * means[3]:.0f} %; rows to {LENGTHS[feed.level]}, "
                    f"{seen / (now - begun) / 1e6:.2f} M tokens/s, {feed.repeated} steps repeated", flush=True,
                )  # fmt: skip
        due = Step(now - saved > SAVE_SECONDS, now - probed > PROBE_SECONDS)
        saved, probed = (now if due.save else saved), (now if due.probe else probed)
        if due.save or due.probe:
            yield due
    yield Step(True, True)


def main() -> None:
    """Tokenizer, then training."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=8.0, help="all in all")
    parser.add_argument("--start", type=Path, help="folder of an earlier run, whose weights and tokenizer go on")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of the lessons: another where a run goes on")
    parser.add_argument("--parts", type=float, default=15.0, help="MiB of the largest file")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--toy", action="store_true", help="2 layers of 256 and rows up to 1,024 tokens, for a CPU")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    chosen = TOY if options.toy else Plan()
    plan = Plan(**{**vars(chosen), "optimizer": options.optimizer, "seed": options.seed})
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "tokenizer.json"
    if options.start:
        path.write_bytes((options.start / path.name).read_bytes())
    elif not path.exists():
        train_tokenizer(list(sample_texts()), plan.geometry.vocabulary).save(str(path))
    save_tokenizer(Tokenizer.from_file(str(path)), options.out, plan.geometry.context)
    print(f"tokenizer after {time.monotonic() - begun:.0f} s", flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_float32_matmul_precision("high")
    train(plan, options, begun)


if __name__ == "__main__":
    main()
