#!/usr/bin/env python3
"""Every kind of output in real servers, as `qtool prove` proves it, and three things that must go wrong.

The demo model (or --model) is converted into AWQ, GPTQ, compressed-tensors, NF4 and Q4_K_M; each is started in vLLM
(the environment of --python or QTOOL_VLLM_PYTHON; docs/vllm.md says how to make one) or llama.cpp, and held against the
reference, the tokenizer and the plan. An artifact with two linears exchanged must fail its log-probabilities; a
cache of one block less than the longest context needs must not start; and when a server is ended, no process of it may
be left. What is not installed is skipped, and said.

Exit codes: 0 all as it must be, 1 something is not, 2 wrong input, 3 no server is here at all.

Examples:
  python scripts/check_serving.py --python vllm-cpu/bin/python --write docs/serving.md
  python scripts/check_serving.py --only Q4_K_M
  python scripts/check_serving.py --model models/SmolLM2-135M --only awq --group 64 --context 2048 --users 2
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from check_vllm import exchanged

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.proof import Proof
from qtool.convert.files.source import resolve
from qtool.evaluate.engines.table import SERVERS
from qtool.report.served import finding_rows, proof_rows, proof_ways
from qtool.report.tables import markdown_table
from qtool.serve import process
from qtool.serve.here import server_here
from qtool.serve.programs import find_program
from qtool.serve.prove import prove
from qtool.serve.running import running
from qtool.sizing.serving import PlannedServer

# name -> section of the recipe, engine, dtypes ("" as the file says)
CASES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "awq": ({"method": "awq"}, "vllm", ("float16", "bfloat16")),
    "gptq": ({"method": "gptq"}, "vllm", ("float16",)),
    "ct": ({"method": "gptq", "format": "compressed-tensors"}, "vllm", ("float16",)),
    "nf4": ({"method": "nf4"}, "vllm", ("float16",)),
    "Q4_K_M": ({"method": "gguf", "type": "Q4_K_M"}, "llama.cpp", ("",)),
}
WRONG = "awq, two linears exchanged"


@dataclass(frozen=True)
class Result:
    """One server: its proof, or what else was seen. ``fault``: why that is not as it must be, empty where it is."""

    label: str
    proof: Proof | None
    seen: str
    fault: str


def convert(model: str, names: list[str], group: int, work: Path) -> dict[str, Path]:
    """Name -> artifact. Raises QtoolError."""
    sections = []
    for name in names:
        section = CASES[name][0] | {"name": name}
        sections.append(section | ({"group_size": group} if section["method"] in ("awq", "gptq") else {}))
    recipe = {
        "model": model, "calibration": {"text": "qtool-code", "samples": 64, "length": 256}, "outputs": sections,
        "output_dir": str(work / "artifacts"),
    }  # fmt: skip
    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "qtool", "run", str(file), "--runs", str(work / "runs")]
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode != 0:
        raise QtoolError(f"{' '.join(command)}: did not end well.")
    return {name: work / "artifacts" / f"{resolve(model).name}-{name}" for name in names}


def proofs_of(name: str, folder: Path, args: argparse.Namespace) -> list[Result]:
    """Of one output, in each of its dtypes."""
    _, engine, dtypes = CASES[name]
    results = []
    for dtype in dtypes:
        planned = plan(folder, engine, dtype, args)
        proof = prove(Artifact.open(folder), planned, args.python if engine == "vllm" else None, say=say)
        fault = "; ".join(f"{finding.what}: {finding.detail}" for finding in proof.failures)
        results.append(Result(name, proof, "", fault))
    return results


def plan(folder: Path, engine: str, dtype: str, args: argparse.Namespace) -> PlannedServer:
    return server_here(
        str(folder), None, engine=engine, dtype=dtype, context=args.context, users=args.users, chunk=args.chunk
    )


def wrong_weights(folder: Path, args: argparse.Namespace, work: Path) -> Result:
    """The exchanged artifact served, the right one as reference."""
    planned = plan(exchanged(folder, work / "exchanged"), "vllm", "float16", args)
    proof = prove(Artifact.open(folder), planned, args.python, say=say)
    (parity,) = [finding for finding in proof.findings if finding.what == "log-probabilities"]
    return Result(WRONG, proof, parity.detail, "" if parity.outcome == "fail" else "the comparison does not see it")


def cache_too_small(folder: Path, args: argparse.Namespace) -> Result:
    """One block less than the longest context of one user needs."""
    planned = plan(folder, "vllm", "float16", args)
    block = planned.token_bytes * planned.facts.block
    needed = -(-planned.serving.context // planned.facts.block)
    s = replace(planned.serving, sequences=1, cache_bytes=(needed - 1) * block, port=process.free_port())
    try:
        with running(replace(planned, serving=s), args.python):
            return Result("cache, one block less", None, "", f"starts with {needed - 1} blocks, {needed} are needed")
    except QtoolError as error:
        said = next((line for line in error.message.splitlines() if "KV cache" in line), "")
        reason = re.sub(r"^.*?\bValueError: ", "", said.strip(" |"))  # without the log's own beginning
        return Result("cache, one block less", None, reason, "" if said else error.message.splitlines()[0])


def nothing_left(folder: Path, args: argparse.Namespace) -> Result:
    """Every process of the group is gone when the block ends."""
    planned = plan(folder, "vllm", "float16", args)
    planned = replace(planned, serving=replace(planned.serving, port=process.free_port()))
    with running(planned, args.python) as server:
        group, before = server.process.pid, process.group_of(server.process.pid)
    left = process.group_of(group)
    fault = "" if len(before) > 1 and not left else f"{len(left)} of {len(before)} processes are left"
    return Result("ended", None, f"{len(before)} processes while it ran, {len(left)} after its end", fault)


def check(args: argparse.Namespace, work: Path) -> int:
    """Convert, prove, print, write."""
    names = args.only or list(CASES)
    here = {name for name, facts in SERVERS.items() if find_program(facts, args.python if name == "vllm" else None)}
    for engine in sorted({CASES[name][1] for name in names} - here):
        say(f"skipped: {engine} is not installed here ({SERVERS[engine].install})")
    names = [name for name in names if CASES[name][1] in here]
    if not names:
        return 3
    folders = convert(args.model, names, args.group, work)
    results: list[Result] = []
    for name in names:
        results += proofs_of(name, folders[name], args)
    if "awq" in names and not args.short:
        results += [wrong_weights(folders["awq"], args, work), cache_too_small(folders["awq"], args)]
        results.append(nothing_left(folders["awq"], args))
    text = report(results, args)
    print(text)
    if args.write:
        write_into(args.write, resolve(args.model).name, text)
    for result in results:
        if result.fault:
            print(f"{result.label}: {result.fault}", file=sys.stderr)
    return 1 if any(result.fault for result in results) else 0


def report(results: list[Result], args: argparse.Namespace) -> str:
    """Markdown: the proofs as a table, what must go wrong, and all findings of one of each engine."""
    proofs: dict[str, list[Proof]] = {}
    for result in results:
        if result.proof is not None:
            proofs.setdefault(result.label, []).append(result.proof)
    lines = [markdown_table(proof_rows(proofs)), "", *(f"- {way}" for way in proof_ways(proofs)), ""]
    lines += [f"- {result.label}: {result.seen}" for result in results if result.seen]
    shown = {proof.engine: (label, proof) for label, found in proofs.items() for proof in found if label != WRONG}
    for label, proof in shown.values():
        rows = [
            {k: v for k, v in row.items() if k not in ("model", "server")} for row in finding_rows({label: [proof]})
        ]
        lines += ["", f"All that was looked at of {label} in {proof.version}, {proof.dtype}:", "", markdown_table(rows)]
    options = "" if args.model == "qtool-demo" else f" --model {Path(args.model).name} --group {args.group}"
    options += "".join(f" --only {name}" for name in args.only)
    options += f" --context {args.context}" if args.context else ""
    return f"    python scripts/check_serving.py --python VLLM/bin/python{options}\n\n" + "\n".join(lines)


def write_into(document: Path, kind: str, text: str) -> None:
    """Between the marks of ``kind``. Raises QtoolError where the document has none."""
    old = document.read_text(encoding="utf-8")
    begin, end = f"<!-- check_serving {kind} -->\n", "<!-- end -->"
    if begin not in old:
        raise QtoolError(f"{document}: has no mark {begin.strip()!r}.")
    head, _, rest = old.partition(begin)
    document.write_text(f"{head}{begin}{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    """Parse the command line and exit with the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="of an environment with vLLM (default: QTOOL_VLLM_PYTHON, PATH)")
    parser.add_argument("--model", default="qtool-demo", help="what to convert (default: %(default)s)")
    parser.add_argument("--group", type=int, default=128, help="group size (default: %(default)s)")
    parser.add_argument("--context", type=int, default=0, help="tokens of each user (default: all that fits)")
    parser.add_argument("--users", type=int, default=4, help="at once (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a step of a prompt (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=list(CASES), default=[], help="this output (repeatable)")
    parser.add_argument("--short", action="store_true", help="leave out what must go wrong")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep all here; outputs that are there are taken")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the tables between its marks")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    try:
        if args.work:
            args.work.mkdir(parents=True, exist_ok=True)
            sys.exit(check(args, args.work))
        with tempfile.TemporaryDirectory(prefix="qtool-serving-") as work:
            sys.exit(check(args, Path(work)))
    except QtoolError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
