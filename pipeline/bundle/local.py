"""Files for one machine: docker compose, llama-server's preset, Ollama's Modelfile, the load to put on it."""

from __future__ import annotations

import shlex
from typing import Any

from qtool import QtoolError
from qtool.bundle.target import MOUNTED, PORT, Target
from qtool.convert.files.reading import CONFIG_LIMIT, read_text

MODELFILE = "Modelfile"
HEALTH = "/health"
QUOTED = 0.5  # of the planned context: the prompt of the load; an answer is an eighth


def compose(target: Target) -> dict[str, Any]:
    """https://github.com/compose-spec/compose-spec: the engine's pinned image, the artifact read-only, the cards."""
    s = target.server.serving
    card = {"driver": "nvidia", "count": s.cards, "capabilities": ["gpu"]}
    service: dict[str, Any] = {
        "image": target.server.facts.image,
        "command": [word.replace("$", "$$") for word in target.arguments()],
        "volumes": [{"type": "bind", "source": target.up, "target": MOUNTED, "read_only": True}],
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "ipc": "host",  # tensor parallel ranks and worker processes share memory
        "deploy": {"resources": {"reservations": {"devices": [card]}}},
        "healthcheck": {
            "test": ["CMD", "curl", "-fsS", f"http://127.0.0.1:{PORT}{HEALTH}"],
            "interval": "10s", "timeout": "5s", "retries": 5, "start_period": "10m",
        },
        "restart": "unless-stopped",
    }  # fmt: skip
    return {"name": target.label, "services": {"engine": service}}


def preset(target: Target) -> str:
    """https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md, `--models-preset`: an INI file, flags
    without their dashes."""
    folder = target.artifact.path.resolve()
    words = target.words(str(folder))[1:]
    lines, own = ["version = 1", f"[{target.name}]"], {"--host", "--port", "--alias"}  # the router's, or the section's
    for index, word in enumerate(words):
        if not word.startswith("-") or word[1:2].isdigit() or word in own:
            continue
        following = words[index + 1] if index + 1 < len(words) else "-"
        value = "true" if following.startswith("-") and not following[1:2].isdigit() else following
        lines.append(f"{LONG.get(word, word.lstrip('-'))} = {value}")
    return "\n".join(lines) + "\n"


LONG = {
    "-m": "model", "-c": "ctx-size", "-np": "parallel", "-ngl": "n-gpu-layers", "-fa": "flash-attn", "-b": "batch-size",
    "-ub": "ubatch-size", "-ctk": "cache-type-k", "-ctv": "cache-type-v",
}  # fmt: skip


def modelfile(target: Target) -> str:
    """The artifact's own, from where this file lies, with the planned context."""
    gguf = target.artifact.gguf
    if gguf is None:
        raise QtoolError(f"{target.name}: no .gguf file, and so no Modelfile.")
    own = target.artifact.path / MODELFILE
    rest = read_text(own, CONFIG_LIMIT).splitlines() if own.is_file() else []
    rest = [line for line in rest if not line.startswith(("FROM ", "PARAMETER num_ctx"))]
    return (
        "\n".join([f"FROM {target.up}/{gguf.name}", *rest, f"PARAMETER num_ctx {target.server.serving.context}"]) + "\n"
    )


def load(target: Target) -> str:
    """A shell script: qtool's own load, and the engine's bench where it has one."""
    s, cell = target.server.serving, target.server.estimate
    prompt, answer = max(1, round(s.context * QUOTED)), max(2, s.context // 8)
    users = sorted({1, max(1, s.sequences // 2), s.sequences, 2 * s.sequences})
    own = ["qtool", "measure", '"$URL/v1"', "--name", shlex.quote(target.name), "--context", str(prompt)]
    own += ["--tokens", str(answer), "--concurrency", ",".join(map(str, users)), "--prefix", "shared"]
    own += ["--requests", str(max(64, 4 * users[-1]))]
    slow = (cell.first_token.slow if cell.first_token else None, cell.step.slow)
    goals = [f"{1e3 * value:.0f}" if value is not None else None for value in slow]
    own += [word for flag, goal in zip(("--ttft", "--tpot"), goals, strict=True) if goal for word in (flag, goal)]
    lines = ["set -eu", f"URL=${{URL:-http://127.0.0.1:{PORT}}}", " ".join(own)]
    bench = target.server.facts.bench
    if bench:
        lengths = ["--random-input-len", str(prompt), "--random-output-len", str(answer)]
        number = ["--num-prompts", str(max(64, 4 * s.sequences)), "--max-concurrency", str(s.sequences)]
        shown = ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,95,99"]
        words = [
            shlex.join(bench), "--base-url", '"$URL"', "--model", shlex.quote(target.name), "--tokenizer",
            f'"$(dirname "$0")"/{shlex.quote(target.up)}', "--dataset-name", "random", *lengths, *number,
            "--ignore-eos", *shown,
        ]  # fmt: skip
        told = [f"{name}:{goal}" for name, goal in zip(("ttft", "tpot"), goals, strict=True) if goal]
        lines.append(" ".join([*words, *(["--goodput", *told] if told else [])]))
    return "\n".join(lines) + "\n"
