"""Scores the demo model on the held-out problems, as trained and rounded to nearest at 4 and 3 bits.

    python scripts/score_demo_model.py pipeline/data/demo-model [--problems 400]

Greedy decoding; the programs run in worker processes with a time limit.  They come from our own model;
this is not the sandbox that qtool evaluates other models in.
"""

import argparse
import json
import math
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_corpus import HELD_OUT_CODE, read_problems
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

GROUP = 128
MOST_NEW_TOKENS = 110


def round_to_nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric round to nearest, groups of GROUP inputs; scale 2*absmax/(2**bits - 1), zero 2**(bits-1)."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    scale = (2 * groups.abs().amax(2, keepdim=True) / (2**bits - 1)).clamp(min=1e-8)
    zero = 2 ** (bits - 1)
    codes = (torch.round(groups / scale) + zero).clamp(0, 2**bits - 1)
    rounded: torch.Tensor = (codes - zero) * scale
    return rounded.reshape(weight.shape).to(weight.dtype)


def quantize_layers(model: PreTrainedModel, bits: int) -> None:
    """Every linear of the decoder layers; embeddings and head stay."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = round_to_nearest(module.weight.data, bits)


@torch.inference_mode()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch: int = 200
) -> list[str]:
    """Greedy answers, in the order of the prompts."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    tokenizer.padding_side = "left"
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True).to(model.device)
        found = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
            max_new_tokens=MOST_NEW_TOKENS, use_cache=True,
        )  # fmt: skip
        texts = tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def passes(task: tuple[str, str, str, str]) -> bool:
    """Whether (prompt, answer, test, entry_point) runs and every assert holds, within two seconds."""
    prompt, answer, test, entry_point = task
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(2)
    namespace: dict[str, Callable[..., object]] = {}
    try:
        exec(prompt + answer + "\n" + test, namespace)
        namespace["check"](namespace[entry_point])
    except BaseException:
        return False
    finally:
        signal.alarm(0)
    return True


def stop(signum: int, frame: object) -> None:
    raise TimeoutError


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean next-token loss over the held-out code, nats."""
    total, count = 0.0, 0
    for line in HELD_OUT_CODE.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer(text, return_tensors="pt", truncation=True)["input_ids"].to(model.device)
        logits = model(input_ids=ids).logits[0, :-1]
        total += float(cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def paired_p(before: list[bool], after: list[bool]) -> tuple[int, int, float]:
    """(lost, gained, two-sided exact McNemar p)."""
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    return lost, gained, min(1.0, 2 * tail)


def summary(bits: int, problems: list[dict[str, Any]], source: list[bool], right: list[bool], loss: float) -> str:
    """One line: score, score by level, paired test against the source, perplexity."""
    levels = Counter(p["level"] for p in problems)
    solved = Counter(p["level"] for p, ok in zip(problems, right, strict=True) if ok)
    shares = " ".join(f"L{level} {100 * solved[level] / levels[level]:.0f}" for level in levels)
    lost, gained, p_value = paired_p(source, right)
    name = f"int{bits}" if bits else "source"
    return (
        f"{name}: {sum(right)}/{len(right)} = {100 * sum(right) / len(right):.2f} % ({shares}); "
        f"lost {lost} gained {gained} p {p_value:.2g}; loss {loss:.4f} perplexity {math.exp(loss):.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--problems", type=int, default=0, help="evenly spread over the task; default all")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3])
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers")
    options = parser.parse_args()
    problems: list[dict[str, Any]] = read_problems()
    if options.problems:
        problems = problems[:: len(problems) // options.problems][: options.problems]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    source: list[bool] = []
    with multiprocessing.get_context("fork").Pool(min(8, multiprocessing.cpu_count())) as pool:
        for bits in (0, *options.bits):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device).eval()
            if bits:
                quantize_layers(model, bits)
            answers = complete(model, tokenizer, [p["prompt"] for p in problems])
            tasks = [(p["prompt"], a, p["test"], p["entry_point"]) for p, a in zip(problems, answers, strict=True)]
            right = pool.map(passes, tasks, chunksize=8)
            source = source or right
            loss = mean_loss(model, tokenizer)
            print(summary(bits, problems, source, right, loss), flush=True)
            wrong = [(p, a) for p, a, ok in zip(problems, answers, right, strict=True) if not ok and not bits]
            for task, answer in wrong[:: max(1, len(wrong) // max(1, options.show))][: options.show]:
                print(f"--- {task['composition']}\n{task['prompt']}{answer}\n--- meant")
                print(task["canonical_solution"])


if __name__ == "__main__":
    main()
