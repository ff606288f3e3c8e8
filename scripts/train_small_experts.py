"""Trains a small mixture of experts (Qwen3MoE's architecture) on the demo model's data, on a processor.

    python scripts/train_small_experts.py --work experts-work --out experts-work/model [--minutes 6]

It exists to measure how experts are calibrated (scripts/sweep_experts.py): a model with random weights has experts that
do not differ. Its weights are not kept anywhere. The tokenizer is the demo model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from demo_corpus import forbidden_texts, read_problems
from demo_data import PADDING, ROW, load_rows, prepare
from demo_programs import training_texts
from train_demo_model import Batches, learning_rate, make_optimizer
from train_demo_model import Plan as DemoPlan

DEMO = Path(__file__).parent.parent / "pipeline" / "data" / "demo-model"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Plan(DemoPlan):
    """All that decides the weights, the machine aside."""

    hidden: int = 128
    intermediate: int = 128  # of an expert
    layers: int = 3
    documents: int = 10_000
    steps: int = 500
    rows: int = 8
    warmup: int = 40
    experts: int = 8
    active: int = 2
    balance: float = 0.01  # of the loss that keeps experts in use


def build_model(plan: Plan) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(plan.seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=plan.vocabulary, hidden_size=plan.hidden, intermediate_size=2 * plan.intermediate,
            moe_intermediate_size=plan.intermediate, num_hidden_layers=plan.layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, num_experts=plan.experts, num_experts_per_tok=plan.active,
            norm_topk_prob=True, decoder_sparse_step=1, max_position_embeddings=ROW, tie_word_embeddings=True,
            router_aux_loss_coef=plan.balance, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def main() -> None:
    """Train until the plan is fulfilled or the minutes are over, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for token files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    options = parser.parse_args()
    plan = Plan(steps=options.steps)
    options.work.mkdir(parents=True, exist_ok=True)
    shutil.copy(DEMO / "tokenizer.json", options.work)
    prepare(options.work, plan.documents, plan.vocabulary, 1)
    batches = Batches(load_rows(options.work), plan, torch.device("cpu"))
    model = build_model(plan)
    optimizer, started = make_optimizer(model, plan), time.monotonic()
    for step in range(plan.steps):
        share = (time.monotonic() - started) / (60 * options.minutes)  # slow machines end on time, at a low rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, max(step, round(share * plan.steps)) if step > plan.warmup else step)
        tokens = batches.at(step)
        labels = tokens.masked_fill(tokens == PADDING, -100)
        loss = model(input_ids=tokens.clamp(min=0), labels=labels, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if share > 1:
            break
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(options.out)
    for name in TOKENIZER:
        shutil.copy(DEMO / name, options.out)
    for name in ("calibration", "heldout"):  # programs that the model was not trained on
        texts = islice(training_texts(name, forbidden_texts(read_problems())), 600)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)  # rows, which a seed shuffles
        (options.work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"wrote {options.out}: loss {float(loss.detach()):.3f} after {step + 1} steps")


if __name__ == "__main__":
    main()
