"""Trains the demo model that ships with qtool, from scratch, on one accelerator.

    python scripts/train_demo_model.py --work demo-work --out pipeline/data/demo-model

Everything lands in the work folder as it is made (tokenizer, token files, a checkpoint a minute): a command
that was stopped, or that ran into `--minutes`, is repeated and goes on where it was.  `--smoke` shows all of
it on a CPU within seconds.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_data import END, PADDING, ROW, load_rows, prepare, save_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 512
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """All that decides the weights, the machine aside."""

    hidden: int = 256
    intermediate: int = 768
    layers: int = 2
    vocabulary: int = 1536
    documents: int = 400_000
    steps: int = 4500
    rows: int = 128  # of ROW tokens, in one step
    peak_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 200
    seed: int = 3
    report: int = 50  # steps between two looks at the clock


SMOKE = Plan(hidden=256, intermediate=256, layers=2, documents=200, steps=6, rows=2, warmup=2, report=2)


def build_model(plan: Plan) -> LlamaForCausalLM:
    heads = plan.hidden // 64
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=plan.hidden,
        intermediate_size=plan.intermediate,
        num_hidden_layers=plan.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(config)


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then a cosine down to nothing."""
    if step < plan.warmup:
        return plan.peak_rate * (step + 1) / plan.warmup
    share = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.peak_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class Batches:
    """Rows in an order that depends on the seed and the step alone, so that a resumed run sees the same."""

    def __init__(self, rows: np.ndarray, plan: Plan, device: torch.device) -> None:
        self.rows = torch.from_numpy(rows).to(device)
        self.plan = plan
        self.per_epoch = len(rows) // plan.rows
        self.epoch, self.order = -1, torch.empty(0)

    def at(self, step: int) -> torch.Tensor:
        """int64 tokens [rows, ROW] of this step, PADDING included."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.plan.seed * 1000 + epoch)
            self.order = torch.randperm(len(self.rows), generator=generator).to(self.rows.device)
            self.epoch = epoch
        chosen = self.order[place * self.plan.rows : (place + 1) * self.plan.rows]
        return self.rows[chosen].long()


def loss_of(model: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss, padding left out."""
    with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(input_ids=tokens.clamp(min=0)).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=PADDING)


def make_optimizer(model: torch.nn.Module, plan: Plan) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.95), fused=True)


def train(plan: Plan, work: Path, device: torch.device, deadline: float) -> tuple[LlamaForCausalLM, list[float], bool]:
    """Run until the plan is fulfilled or the monotonic clock passes the deadline: (model, losses, done)."""
    batches = Batches(load_rows(work), plan, device)
    model = build_model(plan).to(device)
    optimizer = make_optimizer(model, plan)
    checkpoint = work / "checkpoint.pt"
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["plan"] != asdict(plan):
            raise SystemExit(f"{checkpoint} belongs to another plan: {state['plan']}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {len(batches.rows):,} rows of {ROW} tokens", flush=True)
    epochs = plan.steps / batches.per_epoch
    print(f"{plan.steps} steps = {epochs:.1f} epochs, from step {len(losses)}", flush=True)
    forward = torch.compile(model) if device.type == "cuda" else model
    recent: list[torch.Tensor] = []
    first, started, saved = len(losses), time.monotonic(), time.monotonic()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        loss = loss_of(forward, batches.at(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if (step + 1) % plan.report and step + 1 < plan.steps:
            continue
        losses += torch.stack(recent).tolist()
        recent.clear()
        now = time.monotonic()
        if len(losses) % 500 == 0 or len(losses) == plan.steps:
            speed = (len(losses) - first) * plan.rows * ROW / (now - started)
            print(f"step {len(losses)}: loss {np.mean(losses[-50:]):.4f}, {speed / 1e6:.2f} M tokens/s, "
                  f"{now - started:.0f} s", flush=True)  # fmt: skip
        if now - saved > CHECKPOINT_SECONDS or now > deadline or len(losses) == plan.steps:
            save_checkpoint(checkpoint, plan, model, optimizer, losses)
            saved = now
        if now > deadline:
            break
    return model, losses, len(losses) >= plan.steps


def save_checkpoint(
    path: Path, plan: Plan, model: torch.nn.Module, optimizer: torch.optim.AdamW, losses: list[float]
) -> None:
    state = {
        "plan": asdict(plan),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
    }
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


def export(model: LlamaForCausalLM, tokenizer: Path, out: Path) -> None:
    """The folder that ships: bfloat16 weights in two shards, settings, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    half = model.config.num_hidden_layers // 2
    late = tuple(f"model.layers.{layer}." for layer in range(half, model.config.num_hidden_layers))
    late = (*late, "model.norm")
    shards = [[n for n in tensors if not n.startswith(late)], [n for n in tensors if n.startswith(late)]]
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
        placed.update(dict.fromkeys(names, file))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
    write_json(out / "model.safetensors.index.json", index)
    config = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "use_cache": True}
    # transformers 4 reads rope_theta and torch_dtype, transformers 5 rope_parameters and dtype
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config |= {key: getattr(model.config, key) for key in ("hidden_act", "head_dim", "rms_norm_eps", "attention_bias")}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0})
    loaded = Tokenizer.from_file(str(tokenizer))
    assert loaded.token_to_id(END) == 0
    save_tokenizer(loaded, out, CONTEXT)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def draw_curve(losses: list[float], path: Path) -> None:
    """The loss curve as an SVG, logarithmic upwards; by hand, so that no plotting library is needed."""
    count = min(200, len(losses))
    means = [float(np.mean(part)) for part in np.array_split(np.array(losses), count)]
    low, high = math.log(min(means) * 0.9), math.log(max(means) * 1.1)
    points = " ".join(
        f"{60 + 520 * i / max(1, count - 1):.1f},{260 - 240 * (math.log(m) - low) / (high - low):.1f}"
        for i, m in enumerate(means)
    )
    marks = ""
    for tick in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 2, 3, 5, 7):
        y = 260 - 240 * (math.log(tick) - low) / (high - low)
        if 20 <= y <= 260:
            marks += f'<text x="52" y="{y + 4:.1f}" text-anchor="end">{tick}</text>'
            marks += f'<line x1="60" x2="580" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>\n'
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="600" height="300" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="600" height="300" fill="white"/>\n{marks}'
        f'<polyline points="{points}" fill="none" stroke="#0b62a4" stroke-width="1.5"/>\n'
        f'<text x="60" y="282">0</text><text x="580" y="282" text-anchor="end">{len(losses)} steps</text>\n'
        '<text x="320" y="296" text-anchor="middle">training loss (nats a token)</text>\n</svg>\n'
    )


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for token files and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop (resumably) after this many")
    parser.add_argument("--workers", type=int, default=torch.multiprocessing.cpu_count())
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model on the CPU")
    plan = Plan()
    for name in ("hidden", "intermediate", "layers", "documents", "steps", "rows", "seed"):
        parser.add_argument(f"--{name}", type=int, help=f"default {getattr(plan, name)}")
    for name in ("peak_rate", "weight_decay"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help=f"default {getattr(plan, name)}")
    options = parser.parse_args(arguments)
    chosen = asdict(SMOKE if options.smoke else plan)
    chosen |= {k: v for k, v in vars(options).items() if k in chosen and v is not None}
    return options, Plan(**chosen)


def main(arguments: list[str] | None = None) -> int:
    options, plan = parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    prepare(options.work, plan.documents, plan.vocabulary, 1 if options.smoke else options.workers)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model, losses, finished = train(plan, options.work, device, deadline)
    if not finished:
        print(f"stopped at step {len(losses)} of {plan.steps}: run the same command again to go on")
        return 3
    export(model, options.work / "tokenizer.json", options.out)
    draw_curve(losses, options.out / "loss.svg")
    print(f"wrote {options.out}: final loss {np.mean(losses[-50:]):.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
