#!/usr/bin/env python3
"""Prove that an artifact means the same to other people's software as it does to qtool.

Each peer runs in a virtual environment of its own (made under --peers when it is missing: 1.7 GB, a few
minutes), as a child process that knows nothing of qtool. Logits must agree with those of qtool's reference engine,
which dequantizes the artifact into transformers' float32 model:

- AWQ and GPTQ (v1, v2, 4 and 8 bits, act-order): transformers with GPTQModel loads the folder on the CPU; for AWQ,
  AutoAWQ's own unpacking code also turns every quantized linear into float16 weights, which must equal qtool's; for
  GPTQ version 1, AutoGPTQ's own code into float32 weights, likewise;
- compressed-tensors and NF4: transformers with compressed-tensors or bitsandbytes, in qtool's own environment.

Exit codes: 0 all agree, 1 something disagrees, 2 wrong input, 3 an environment could not be made.

Examples:
  python scripts/check_interop.py artifacts/awq
  python scripts/check_interop.py artifacts/awq --source models/smollm2 --peers ~/.cache/qtool-peers
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file, save_file

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.skeleton import load_config
from qtool.evaluate.engines.torch_model import load_model

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"  # installed first; the constraint for everything else
BATCH, LENGTH = 4, 128

# An exact kernel multiplies by the very float16 weights that the codes stand for, with activations rounded to
# float16 (11 bits) in each linear. Seen on SmolLM2-135M: 8e-4 after 30 layers, 2.5e-4 after 2; 0.4 when zero
# points are read one too high in one group of each row, 2 with a wrong nibble order.
MAX_RELATIVE_ERROR = 1e-2
# The same next token, wherever the reference prefers it by more than the error allowed above (of the logits'
# root mean square): a flip between two tokens closer than that says nothing (seen: 1 in 512).
MIN_TOP1 = 0.995
# GPTQModel's default CPU kernel rounds scales, zero offsets and activations to bfloat16 (8 bits). What that
# costs depends on the model, so it is measured: the reference engine runs in bfloat16 too, and the kernel may
# be at most this many times as far from the float32 logits (it rounds scales as well; seen: 1.1 to 2 times).
BFLOAT16_FACTOR = 3.0
BFLOAT16_TOP1_LOSS = 0.03


@dataclass(frozen=True)
class Environment:
    """A virtual environment: distribution -> version prefix that must be there; what pip installs for it."""

    needs: dict[str, str]
    installs: tuple[tuple[str, ...], ...]


ENVIRONMENTS = {
    "gptqmodel": Environment(
        {"torch": "2.13.0", "gptqmodel": "7.6", "transformers": "5.", "optimum": "2."},
        (("gptqmodel==7.6.*", "optimum==2.3.0", "transformers==5.23.0"),),
    ),
    # AutoAWQ without its dependencies: they ask for triton (1 GB), and its unpacking code needs torch only.
    "autoawq": Environment(
        {"torch": "2.13.0", "autoawq": "0.2.9", "safetensors": "0."},
        (("numpy", "safetensors"), ("--no-deps", "autoawq==0.2.9")),
    ),
    # AutoGPTQ likewise; the modules that unpack import transformers, of any version.
    "autogptq": Environment(
        {"torch": "2.13.0", "auto-gptq": "0.7.1", "transformers": "5."},
        (("numpy", "safetensors", "transformers==5.23.0"), ("--no-deps", "auto-gptq==0.7.1")),
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: what was compared, what was found, what was asked for, whether it agrees."""

    peer: str
    what: str
    found: str
    wanted: str
    agrees: bool


@dataclass(frozen=True)
class Context:
    """What every check gets: the artifact, the folder of environments, a scratch folder."""

    artifact: Artifact
    peers: Path
    scratch: Path


def run_child(python: Path, script: str, *arguments: str | Path, scratch: Path) -> Any:
    """Run a script of this folder in a peer's Python, isolated from ours; return the JSON that it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(python), "-I", str(HERE / script), *map(str, arguments)]
    log = scratch / f"{Path(script).stem}.log"
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=scratch, check=False)
    if done.returncode != 0:
        tail = "\n".join(re.split(r"[\r\n]+", log.read_text(errors="replace"))[-15:])
        raise ChildProcessError(f"{script} ended with {done.returncode}:\n{tail}")
    return json.loads(done.stdout)


def has_packages(python: Path, needs: dict[str, str]) -> bool:
    """Tell whether `python` exists and sees every distribution of `needs` at a version with that prefix."""
    if not python.is_file():
        return False
    code = (
        "import importlib.metadata as m, json, sys; needs = json.loads(sys.argv[1])\n"
        "sys.exit(not all(m.version(name).startswith(needs[name]) for name in needs))"
    )
    command = [str(python), "-I", "-c", code, json.dumps(needs)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def prepare_environment(name: str, peers: Path, torch_index: str | None) -> None:
    """Make the environment `name` under `peers` unless it is there already. Raises CalledProcessError."""
    environment = ENVIRONMENTS[name]
    folder = peers / name
    python = folder / "bin" / "python"
    if has_packages(python, environment.needs):
        return
    print(f"making the environment {folder} ...", file=sys.stderr)
    venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = ["--index-url", torch_index] if torch_index else []
    subprocess.run([*pip, *index, TORCH], check=True)
    for packages in environment.installs:
        subprocess.run([*pip, "--constraint", str(constraints), *packages], check=True)
    if not has_packages(python, environment.needs):
        raise RuntimeError(f"{folder} still lacks one of {environment.needs}")


def make_tokens(folder: Path) -> torch.Tensor:
    """Return a fixed batch [BATCH, LENGTH] of code: this file, as the artifact's own tokenizer reads it."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(Path(__file__).read_text()).input_ids[: BATCH * LENGTH]
    return torch.tensor(ids, dtype=torch.int64).view(BATCH, LENGTH)


def compute_reference(artifact: Artifact, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits [batch, length, vocabulary] of the reference engine; float32 is what it evaluates with."""
    model = load_model(artifact.read(), load_config(artifact.path), torch.device("cpu")).to(dtype)
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens, use_cache=False).logits.float()
    return logits


@dataclass(frozen=True)
class Distance:
    """How far logits are from the reference: largest difference, relative error (Frobenius), same top-1."""

    largest: float
    relative: float
    top1: float

    @classmethod
    def between(cls, logits: torch.Tensor, reference: torch.Tensor) -> Distance:
        """Compare [batch, length, vocabulary] with its reference; near ties count as the same top-1."""
        difference = logits - reference
        loss = reference.amax(-1) - reference.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
        tie = MAX_RELATIVE_ERROR * reference.square().mean().sqrt()
        relative = difference.norm() / reference.norm()
        return cls(float(difference.abs().max()), float(relative), float((loss <= tie).double().mean()))

    def __str__(self) -> str:
        return f"relative {self.relative:.1e}, largest {self.largest:.3f}, top-1 {self.top1:.2%}"


def check_gptqmodel(context: Context) -> list[Row]:
    """Load in transformers with GPTQModel: nothing missing, all linears quantized, the reference's logits."""
    method = context.artifact.quantization["quant_method"]
    exact, default = ("torch_awq:float32" if method == "awq" else "torch:float32"), "auto:auto"
    tokens, out = context.scratch / "tokens.safetensors", context.scratch / "logits.safetensors"
    save_file({"tokens": make_tokens(context.artifact.path)}, tokens)
    arguments = (context.artifact.path, "--tokens", tokens, "--out", out, "--run", exact, "--run", default)
    python = context.peers / "gptqmodel" / "bin" / "python"
    report = run_child(python, "interop_gptqmodel.py", *arguments, scratch=context.scratch)
    logits = load_file(out)
    batch = load_file(tokens)["tokens"]
    reference = compute_reference(context.artifact, batch, torch.float32)
    plain = Distance.between(compute_reference(context.artifact, batch, torch.bfloat16), reference)
    versions = report["versions"]
    peer = f"transformers {versions['transformers']}, GPTQModel {versions['gptqmodel']}"
    rows, linears = [], len(context.artifact.linears())
    for run, described in report["runs"].items():
        kernels = described["kernels"]
        complete = not described["loading"] and sum(kernels.values()) == linears
        found = f"{kernels}" + (f", faults {described['loading']}" if described["loading"] else "")
        rows.append(Row(peer, f"{run} loads", found, f"{linears} linears, no fault", complete))
        distance = Distance.between(logits[run], reference)
        limit, top1 = MAX_RELATIVE_ERROR, MIN_TOP1
        if run == default:
            limit, top1 = max(limit, BFLOAT16_FACTOR * plain.relative), plain.top1 - BFLOAT16_TOP1_LOSS
        agrees = distance.relative <= limit and distance.top1 >= top1
        wanted = f"relative <= {limit:.1e}, top-1 >= {top1:.2%}"
        rows.append(Row(peer, f"{run} logits", str(distance), wanted, agrees))
    rows.append(Row("reference engine", "bfloat16 logits", str(plain), "for comparison", True))
    return rows


def check_autoawq(context: Context) -> list[Row]:
    """Compare AutoAWQ's unpacked float16 weights with qtool's, bit for bit.

    Tolerance 0: (q - z) * s has at most 4 + 11 significant bits, exact in float32, so that both sides round
    the same number to float16 once.
    """
    return compare_unpacked(context, "autoawq", "AutoAWQ 0.2.9", torch.float16)


def check_autogptq(context: Context) -> list[Row]:
    """Compare AutoGPTQ's unpacked float32 weights with qtool's, bit for bit (the products are exact)."""
    if context.artifact.quantization.get("checkpoint_format") != "gptq":
        return []  # it knows version 1 alone, and reads another's zeros one too high
    return compare_unpacked(context, "autogptq", "AutoGPTQ 0.7.1", torch.float32)


def compare_unpacked(context: Context, environment: str, peer: str, dtype: torch.dtype) -> list[Row]:
    """Digests of every linear's weight as a peer's own code unpacks it, against qtool's."""
    python = context.peers / environment / "bin" / "python"
    script = f"interop_{environment}.py"
    theirs = run_child(python, script, context.artifact.path, scratch=context.scratch)
    linears = context.artifact.linears()
    different = []
    for name in linears:
        ours = context.artifact.codes(name).dequantize(dtype) + 0.0
        digest = hashlib.sha256(ours.contiguous().numpy().tobytes()).hexdigest()
        if theirs.get(name) != {"shape": list(ours.shape), "sha256": digest}:
            different.append(name)
    found = f"{len(linears) - len(different)} of {len(linears)} equal"
    if different:
        found += f"; {different[0]}: {measure_difference(context, python, script, different[0])}"
    agrees = bool(linears) and not different and set(theirs) == set(linears)
    kind = str(dtype).removeprefix("torch.")
    return [Row(peer, f"unpacked {kind} weights", found, f"{len(linears)} equal, bit for bit", agrees)]


def measure_difference(context: Context, python: Path, script: str, name: str) -> str:
    """Say how a peer's weight of one linear differs from qtool's."""
    dump = context.scratch / "weight.safetensors"
    run_child(python, script, context.artifact.path, "--only", name, "--dump", dump, scratch=context.scratch)
    theirs = load_file(dump).get(name) if dump.exists() else None
    ours = context.artifact.codes(name).dequantize()
    if theirs is None or theirs.shape != ours.shape:
        return f"shape {None if theirs is None else list(theirs.shape)}, qtool's {list(ours.shape)}"
    return f"largest difference {(theirs.float() - ours).abs().max():.3e}, largest weight {ours.abs().max():.3e}"


def check_transformers(context: Context) -> list[Row]:
    """Load in transformers, in this very environment: nothing missing, all linears quantized, the reference's logits.

    compressed-tensors decompresses to the weights that the codes stand for, in float32. bitsandbytes computes in
    bfloat16, so it may be as far from the float32 logits as a few times the reference engine in bfloat16 is.
    """
    from transformers import AutoModelForCausalLM

    artifact, tokens = context.artifact, make_tokens(context.artifact.path)
    method = artifact.quantization["quant_method"]
    exact = method == "compressed-tensors"
    options = {"dtype": torch.float32} if exact else {}
    model, info = AutoModelForCausalLM.from_pretrained(artifact.path, output_loading_info=True, **options)
    kind = ("weight_packed", None) if exact else (None, "Linear4bit")
    packed = [m for m in model.modules() if (kind[0] and hasattr(m, kind[0])) or type(m).__name__ == kind[1]]
    faults = {key: sorted(map(str, value)) for key, value in info.items() if value}
    with torch.inference_mode():
        logits = model.eval()(tokens, use_cache=False).logits.float()
    reference = compute_reference(artifact, tokens, torch.float32)
    plain = Distance.between(compute_reference(artifact, tokens, torch.bfloat16), reference)
    distance = Distance.between(logits, reference)
    limit = MAX_RELATIVE_ERROR if exact else max(MAX_RELATIVE_ERROR, BFLOAT16_FACTOR * plain.relative)
    top1 = MIN_TOP1 if exact else plain.top1 - BFLOAT16_TOP1_LOSS
    linears = len(artifact.linears())
    package = "compressed-tensors" if exact else "bitsandbytes"
    peer = f"transformers {metadata.version('transformers')}, {package} {metadata.version(package)}"
    found = f"{len(packed)} packed" + (f", faults {faults}" if faults else "")
    wanted = f"relative <= {limit:.1e}, top-1 >= {top1:.2%}"
    return [
        Row(peer, "loads", found, f"{linears} linears, no fault", not faults and len(packed) == linears),
        Row(peer, "logits", str(distance), wanted, distance.relative <= limit and distance.top1 >= top1),
        Row("reference engine", "bfloat16 logits", str(plain), "for comparison", True),
    ]


@dataclass(frozen=True)
class Check:
    """A comparison and the environment that it needs (None: qtool's own, with the extras `nf4` and `test`)."""

    environment: str | None
    compare: Callable[[Context], list[Row]]


# quant_method in config.json -> what is checked. Other formats join here.
CHECKS: dict[str, tuple[Check, ...]] = {
    "awq": (Check("autoawq", check_autoawq), Check("gptqmodel", check_gptqmodel)),
    "gptq": (Check("autogptq", check_autogptq), Check("gptqmodel", check_gptqmodel)),
    "compressed-tensors": (Check(None, check_transformers),),
    "bitsandbytes": (Check(None, check_transformers),),
}


def check_config(artifact: Artifact, source: Path) -> Row:
    """config.json must be the source's own, but for quantization_config and the stored dtype."""
    theirs: dict[str, Any] = json.loads((source / "config.json").read_text())
    free = {"quantization_config", "torch_dtype", "dtype"}
    keys = (set(theirs) | set(artifact.config)) - free
    changed = sorted(key for key in keys if theirs.get(key, free) != artifact.config.get(key, free))
    return Row("source", "config.json", f"changed: {', '.join(changed) or 'nothing'}", "nothing", not changed)


def print_table(title: str, rows: list[Row]) -> None:
    """Print the result for people."""
    table = Table("peer", "what", "found", "wanted", "", title=title)
    for row in rows:
        verdict = "[green]agrees[/]" if row.agrees else "[red]DISAGREES[/]"
        table.add_row(*map(escape, (row.peer, row.what, row.found, row.wanted)), verdict)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def check_artifact(args: argparse.Namespace) -> int:
    """Run every check that the artifact's kind has; return the exit code."""
    artifact = Artifact.open(args.artifact.resolve())
    kind = artifact.quantization.get("quant_method")
    if kind not in CHECKS:
        raise QtoolError(f"{args.artifact}: quant_method is {kind!r}; checked are: {', '.join(CHECKS)}.")
    peers = args.peers.expanduser().resolve()
    rows = [check_config(artifact, args.source)] if args.source else []
    for check in CHECKS[kind]:
        if check.environment is None:
            continue
        try:
            prepare_environment(check.environment, peers, args.torch_index)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{peers / check.environment}: cannot be made: {error}", file=sys.stderr)
            return 3
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(artifact, peers, Path(scratch))
        for check in CHECKS[kind]:
            try:
                rows += check.compare(context)
            except ChildProcessError as error:
                rows.append(Row(str(check.environment), "runs", str(error), "a result", False))
    print_table(f"{args.artifact} ({kind})", rows)
    return 0 if all(row.agrees for row in rows) else 1


def main() -> None:
    """Parse the command line and exit with the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of the artifact")
    parser.add_argument("--source", type=Path, help="the model that it was made from: compares config.json too")
    parser.add_argument("--peers", type=Path, default=Path("~/.cache/qtool-peers"), help="default: %(default)s")
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        help="index to take torch from, as https://download.pytorch.org/whl/cpu (default: pip's own choice)",
    )
    try:
        raise SystemExit(check_artifact(parser.parse_args()))
    except QtoolError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
