#!/usr/bin/env python3
"""Every kind of output under the real vLLM: what it loads and refuses, how far its log-probabilities are from qtool's.

The outputs are made here, of the demo model or of --model; vLLM runs in an environment of its own (--python;
docs/vllm.md says how to make one), knows nothing of qtool, and continues held-out prompts greedily. Its answers are
then put to qtool's reference engine (the artifact's codes dequantized, float32): the mean difference of the
log-probabilities of vLLM's five best tokens at every step, and how often both would choose the same token. An artifact
with two linears of its first layer exchanged goes the same way: it must be told from the right one, or the comparison
proves nothing. What vLLM loads and refuses must be what `qtool verify` says of it.

Where vLLM is on another machine, --job writes the question alone; `interop_vllm.py JOB OUT` answers it there, and
--answers reads OUT here.

Exit codes: 0 all agrees, 1 something does not, 2 wrong input, 3 no vLLM.

Examples:
  python scripts/check_vllm.py --python vllm-cpu/bin/python --write docs/vllm.md
  python scripts/check_vllm.py --python vllm/bin/python --model models/SmolLM2-135M --groups 64,32
  python scripts/check_vllm.py --python python3 --llm '{"attention_backend": "TRITON_ATTN"}'
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.source import resolve
from qtool.convert.runtimes import vllm as vllm_rules
from qtool.convert.runtimes.rules import RULES
from qtool.convert.skeleton import load_config
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.verify.checks import subject_of
from qtool.evaluate.engines.machine import machine_name
from qtool.evaluate.engines.torch_model import load_model
from qtool.evaluate.tasks.loading import load_task

HERE = Path(__file__).resolve().parent
PROMPTS, TOKENS, BEST, CONTEXT = 20, 32, 5, 480
LEAST = -8.0  # nats: below this a token says nothing of the weights
# Seen on the demo model: right weights .0021 to .0088 in float16, .016 to .021 in bfloat16 (the source too: it is the
# arithmetic's), wrong ones from .2 on.
FLOAT16_LIMIT, BFLOAT16_LIMIT, TOP1 = 0.03, 0.06, 0.95
BFLOAT16_FACTOR = 2.0  # of what the source's own bfloat16 costs, on models that are deeper


@dataclass(frozen=True)
class Case:
    """A model that vLLM is asked to load in some dtypes. ``truth``: whose reference its answers are held against."""

    label: str
    path: Path
    dtypes: tuple[str, ...]
    truth: Path
    wrong: bool = False

    @property
    def refused(self) -> str:
        """Why qtool says that vLLM loads this on no platform; empty where it does."""
        if any(self.path.glob("*.gguf")):
            return "a folder with a .gguf file"
        return "; ".join(vllm_rules.refusals(json.loads((self.path / "config.json").read_text(encoding="utf-8"))))

    def refused_on_cpu(self) -> str:
        """Why its kernel for the CPU does not take it."""
        artifact = Artifact.open(self.path)
        if artifact.gguf is not None or not artifact.quantization:
            return ""
        rules = [rule for rule in RULES[artifact.quantization["quant_method"]] if rule.name == "CPU kernel"]
        return "; ".join(reason for rule in rules for reason in rule.broken(subject_of(artifact), 1))


@dataclass(frozen=True)
class Row:
    """What became of one case in one dtype. ``distance``: nats; ``top1``: share of steps with the same first token."""

    label: str
    dtype: str
    ran: str
    kernels: str
    distance: float | None
    top1: float | None
    verdict: str
    agrees: bool


def outputs(groups: Sequence[int]) -> list[dict[str, Any]]:
    """The recipe's outputs: name -> section."""
    first, last = groups[0], groups[-1]
    packed = {"method": "gptq", "format": "compressed-tensors", "group_size": first}
    return [
        *({"method": "awq", "name": f"awq-g{size}", "group_size": size} for size in dict.fromkeys((first, last))),
        {"method": "gptq", "name": f"gptq-g{first}", "group_size": first},
        {"method": "gptq", "name": "gptq-rows", "group_size": -1},
        {"method": "gptq", "name": "gptq-act-order", "group_size": first, "desc_act": True},
        packed | {"name": "ct-sym"},
        packed | {"name": "ct-asym", "sym": False},
        packed | {"name": "ct-act-order", "desc_act": True},
        {"method": "nf4", "name": "nf4"},
        {"method": "nf4", "name": "nf4-single", "double_quant": False},
        {"method": "gptq", "name": "gptq-asym", "group_size": first, "sym": False},
        {"method": "gptq", "name": "gptq-8bit", "group_size": first, "bits": 8},
        {"method": "gguf", "name": "gguf", "type": "Q8_0", "imatrix": False},
    ]


def make_cases(model: str, groups: Sequence[int], work: Path) -> list[Case]:
    """Convert, plant the faults, and list everything to ask. Raises QtoolError."""
    sections = outputs(groups)
    recipe = {
        "model": model, "calibration": {"text": "qtool-code", "samples": 128, "length": 256}, "outputs": sections,
        "output_dir": str(work / "artifacts"),
    }  # fmt: skip
    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    source = resolve(model)
    folders = {section["name"]: work / "artifacts" / f"{source.name}-{section['name']}" for section in sections}
    if not all(folder.is_dir() for folder in folders.values()):
        command = [sys.executable, "-P", "-m", "qtool", "run", str(file), "--runs", str(work / "runs")]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode != 0:
            raise QtoolError(f"{' '.join(command)}: did not end well.")
    both = ("float16", "bfloat16")
    cases = [Case("source", source.path, ("float32", *both), source.path)]
    cases += [Case(name, folder, both, folder) for name, folder in folders.items()]
    awq, gptq = folders[f"awq-g{groups[0]}"], folders[f"gptq-g{groups[0]}"]
    cases.append(Case("awq, asked for float32", awq, ("float32",), awq))
    scattered = copy_with(gptq, work / "scattered", {"desc_act": True})
    cases.append(Case("gptq of other tools: desc_act true", scattered, ("float16",), gptq))
    cases.append(Case("two linears exchanged", exchanged(awq, work / "exchanged"), ("float16",), awq, wrong=True))
    return cases


def copy_with(folder: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy whose quantization_config says something else."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (target / "quantize_config.json").write_text(json.dumps(config["quantization_config"]), encoding="utf-8")
    return target


def exchanged(folder: Path, target: Path) -> Path:
    """A copy in which the first layer's gate and up have each other's codes."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if ".0.mlp.gate_proj." in name]:
            other = name.replace("gate_proj", "up_proj")
            tensors[name], tensors[other] = tensors[other], tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def ask(python: str, cases: Sequence[Case], prompts: list[list[int]], options: dict[str, Any], work: Path) -> Path:
    """Let vLLM answer. A model that takes the process down is noted as such, and the others go on."""
    out = work / "answers.jsonl"
    out.unlink(missing_ok=True)
    left = [{"label": c.label, "path": str(c.path.resolve()), "dtype": dtype} for c in cases for dtype in c.dtypes]
    while left:
        job = write_job(work / "job.json", left, prompts, options)
        command = [python, str(HERE / "interop_vllm.py"), str(job), str(out)]
        keep = {"PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR", "CUDA_VISIBLE_DEVICES"}
        given = {name: value for name, value in os.environ.items() if name in keep or name[:5] in ("VLLM_", "OMP_N")}
        with (work / "vllm.log").open("a", encoding="utf-8") as log:
            done = subprocess.run(command, env=given, stdout=log, stderr=log, check=False)
        if done.returncode == 0:
            return out
        answered = [(row["label"], row["dtype"]) for row in read_rows(out)]
        rest = [model for model in left if (model["label"], model["dtype"]) not in answered]
        if not rest or not Path(f"{out}.trying").exists():
            raise QtoolError(f"{python}: vLLM cannot be started; {work / 'vllm.log'} says why.", exit_code=3)
        row = rest[0] | {"error": f"the process died (code {done.returncode})", "vllm": "", "torch": ""}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        left = rest[1:]
    return out


def write_job(file: Path, models: list[dict[str, str]], prompts: list[list[int]], options: dict[str, Any]) -> Path:
    """What interop_vllm.py reads."""
    job = {
        "models": models, "prompts": prompts, "tokens": TOKENS, "best": BEST, "context": CONTEXT, "options": options,
    }  # fmt: skip
    file.write_text(json.dumps(job), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of an answer file; none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def prompts_of(model: str) -> list[list[int]]:
    """Held-out prompts, spread over the task, as token ids of the model's own tokenizer."""
    problems = load_task("heldout").problems
    tokenizer = load_tokenizer(resolve(model).path)
    chosen = problems[:: max(1, len(problems) // PROMPTS)][:PROMPTS]
    ids = [tokenizer(problem.prompt, add_special_tokens=False).input_ids for problem in chosen]
    return [row[: CONTEXT - TOKENS] for row in ids]


def reference_of(folder: Path) -> Any:
    """qtool's own reading of a model, float32 on the CPU."""
    artifact = Artifact.open(folder)
    stream = artifact.read() if artifact.quantization else Checkpoint.open(folder).read()
    return load_model(stream, load_config(folder), torch.device("cpu")).float()


def compare(model: Any, prompts: list[list[int]], answers: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean |difference| of vLLM's best log-probabilities (nats), and the share of steps with the same first token; the
    reference is forced along vLLM's own tokens."""
    differences, same, steps = [], 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer["tokens"]])).logits[0, len(prompt) - 1 : -1].float()
        for row, token, best in zip(logits.log_softmax(-1), answer["tokens"], answer["best"], strict=True):
            same += int(row.argmax()) == token
            steps += 1
            differences += [abs(value - float(row[int(t)])) for t, value in best.items() if value > LEAST]
    return sum(differences) / len(differences), same / steps


def judge(cases: Sequence[Case], prompts: list[list[int]], answers: list[dict[str, Any]]) -> list[Row]:
    """A row for each answer."""
    by_label = {case.label: case for case in cases}
    device = next((row["device"] for row in answers if "device" in row), "cpu")
    rows: list[Row] = []
    models: dict[Path, Any] = {}
    floor = 0.0  # what bfloat16 alone costs this model
    for answer in answers:
        case, dtype = by_label[answer["label"]], answer["dtype"]
        expected = case.refused or (case.refused_on_cpu() if device == "cpu" else "")
        if dtype == "float32" and case.label != "source":
            expected = "float32"
        if "error" in answer:
            said = said_by(answer["error"])
            verdict = "refused, as said" if expected else "REFUSED"
            rows.append(Row(case.label, dtype, "", said, None, None, verdict, bool(expected)))
            continue
        if case.truth not in models:
            models = {case.truth: reference_of(case.truth)}
        distance, top1 = compare(models[case.truth], prompts, answer["answers"])
        if case.label == "source" and answer["dtype"] == "bfloat16":
            floor = distance
        limit = FLOAT16_LIMIT if dtype != "bfloat16" else max(BFLOAT16_LIMIT, BFLOAT16_FACTOR * floor)
        close = distance <= limit and top1 >= TOP1
        good = not expected and close != case.wrong
        verdict = ("told from the right one" if case.wrong else "agrees") if good else "DIFFERS"
        if not good and (expected or case.wrong):
            verdict = "LOADS, said to be refused" if expected else "NOT TOLD from the right one"
        kernels = ", ".join(sorted(answer["kernels"]))
        rows.append(Row(case.label, dtype, answer["dtype"], kernels, distance, top1, verdict, good))
    return rows


def said_by(error: str) -> str:
    """The sentence in vLLM's error."""
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", error, re.DOTALL)
    text = " ".join((found.group(1) if found else error.partition(": ")[2] or error).split())
    text = re.sub(r"`?/\S+/", "…/", text)  # where it was tried is nobody's matter
    return text if len(text) <= 140 else text[:139] + "…"


def table(rows: Sequence[Row], answers: list[dict[str, Any]], command: str) -> str:
    """Markdown: machine and versions, then a line for each output."""
    first = next((row for row in answers if "device" in row), answers[0])
    machine = first.get("card") or machine_name("cpu")
    dtypes = [dtype for dtype in ("float32", "float16", "bfloat16") if any(row.dtype == dtype for row in rows)]
    lines = [
        f"vLLM {first['vllm']}, torch {first['torch']}, {machine}; {PROMPTS} prompts, {TOKENS} tokens each.", "",
        f"    {command}", "",
        f"| output | {' | '.join(dtypes)} | kernel, or what vLLM says |", f"|---|{'---|' * (len(dtypes) + 1)}",
    ]  # fmt: skip
    for label in dict.fromkeys(row.label for row in rows):
        found = {row.dtype: row for row in rows if row.label == label}
        cells = [cell(found.get(dtype)) for dtype in dtypes]
        says = "; ".join(dict.fromkeys(row.kernels for row in found.values()))
        lines.append(f"| {label} | {' | '.join(cells)} | {says} |")
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    """``.0022, 100.0 %``."""
    if row is None:
        return ""
    if row.distance is None or row.top1 is None:
        return row.verdict
    mark = "" if row.agrees and row.verdict == "agrees" else f" ({row.verdict})"
    return f"{row.distance:.4f}, {row.top1:.1%}{mark}".replace("0.", ".", 1)


def write_into(document: Path, kind: str, text: str) -> None:
    """Between the marks of ``kind``. Raises QtoolError where the document has none."""
    old = document.read_text(encoding="utf-8")
    begin, end = f"<!-- check_vllm {kind} -->\n", "<!-- end -->"
    if begin not in old:
        raise QtoolError(f"{document}: has no mark {begin.strip()!r}.")
    head, _, rest = old.partition(begin)
    document.write_text(f"{head}{begin}{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def check(args: argparse.Namespace, work: Path) -> int:
    """Make, ask, compare, write."""
    groups = [int(size) for size in args.groups.split(",")]
    cases, prompts = make_cases(args.model, groups, work), prompts_of(args.model)
    if args.job:
        models = [{"label": c.label, "path": str(c.path), "dtype": dtype} for c in cases for dtype in c.dtypes]
        write_job(args.job, models, prompts, args.llm)
        return 0
    answers = read_rows(args.answers or ask(args.python, cases, prompts, args.llm, work))
    rows = judge(cases, prompts, answers)
    command = "python scripts/check_vllm.py " + (f"--model {args.model} " if args.model != "qtool-demo" else "")
    text = table(rows, answers, f"{command}--groups {args.groups} --python VLLM/bin/python")
    print(text)
    if args.write:
        write_into(args.write, "cuda" if any(row.get("device") == "cuda" for row in answers) else "cpu", text)
    wrong = [row for row in rows if not row.agrees]
    for row in wrong:
        print(f"{row.label}, {row.dtype}: {row.verdict}", file=sys.stderr)
    return 1 if wrong else 0


def main() -> None:
    """Parse the command line and exit with the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3", help="of an environment with vLLM (default: %(default)s)")
    parser.add_argument("--model", default="qtool-demo", help="what to convert (default: %(default)s)")
    parser.add_argument("--groups", default="128,32", help="group sizes, two at most (default: %(default)s)")
    parser.add_argument("--llm", type=json.loads, default={}, metavar="JSON", help="more options of vllm.LLM")
    parser.add_argument("--job", type=Path, help="write the question here and stop")
    parser.add_argument("--answers", type=Path, help="answers that interop_vllm.py gave elsewhere")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep all here; outputs that are there are taken")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table between its marks")
    args = parser.parse_args()
    try:
        if args.work:
            args.work.mkdir(parents=True, exist_ok=True)
            raise SystemExit(check(args, args.work.resolve()))
        with tempfile.TemporaryDirectory() as work:
            raise SystemExit(check(args, Path(work)))
    except QtoolError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
