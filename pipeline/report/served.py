"""Proofs as people read them: what `qtool prove` prints, and the rows of report and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtool.convert.files.proof import Proof
from qtool.report.columns import wide

PROVED = (
    "Started as planned, and asked for log-probabilities on 64 fixed pieces of code. KL is that of the reference (the "
    "file's codes, dequantized, float32) to the server, in nats a token."
)
MARKS = {"pass": "pass", "fail": "FAIL", "not asked": "not asked"}


def print_proof(proof: Proof) -> None:
    """Every finding, a line each, then what was proved where."""
    for finding in proof.findings:
        wide.print(f"{MARKS[finding.outcome]:<9}  {finding.what}: {finding.detail}", highlight=False, markup=False,
                   soft_wrap=True)  # fmt: skip
    wide.print(proof_line(proof), highlight=False, markup=False, soft_wrap=True)


def proof_line(proof: Proof) -> str:
    """`proved in vllm 0.32.0 …`, or what failed there."""
    kernels = f" with {', '.join(proof.kernels[:4])}" if proof.kernels else ""
    where = (
        f"{proof.version} ({proof.dtype}{kernels}) on {proof.machine}, {proof.users} users of {proof.context:,} tokens"
    )
    if proof.passed:
        return f"proved in {where}"
    return f"not proved in {where}: {', '.join(finding.what for finding in proof.failures)} failed"


def proof_rows(proofs: Mapping[str, Sequence[Proof]]) -> list[dict[str, str]]:
    """A row for each proof of each model, for report and card."""
    rows = []
    for name, found in proofs.items():
        for proof in found:
            n = proof.numbers
            row = {"model": name, "server": proof.version, "dtype": proof.dtype}
            row["result"] = "pass" if proof.passed else f"FAIL: {', '.join(f.what for f in proof.failures)}"
            if "kl" in n:
                row |= {"KL to the reference": f"{n['kl']:.2g}", "top-1": f"{n['top1']:.2%}"}
            if "kl_floor" in n:
                row["bf16 alone"] = f"{n['kl_floor']:.2g}"
            row |= {"users x tokens": f"{proof.users} x {proof.context:,}"}
            if "cache_blocks" in n:
                row["blocks (planned)"] = f"{n['cache_blocks']:,.0f} ({n['cache_blocks_planned']:,.0f})"
            if "memory" in n:
                row["GiB (planned)"] = f"{n['memory'] / 2**30:.2f} ({n['memory_planned'] / 2**30:.2f})"
            if "shared_saved_seconds" in n:
                row["shared prefix"] = f"{n['shared_tokens']:.0f} tokens, {1e3 * n['shared_saved_seconds']:.3g} ms"
            rows.append(row)
    return rows


def finding_rows(proofs: Mapping[str, Sequence[Proof]]) -> list[dict[str, str]]:
    """A row for each thing that was looked at."""
    return [
        {"model": name, "server": proof.version, "what": f.what, "outcome": MARKS[f.outcome], "detail": f.detail}
        for name, found in proofs.items() for proof in found for f in proof.findings
    ]  # fmt: skip


def proof_ways(proofs: Mapping[str, Sequence[Proof]]) -> list[str]:
    """How the rows came about: kernels and machine of each server."""
    return list(dict.fromkeys(
        f"{proof.version} on {proof.machine}" + (f": {', '.join(proof.kernels)}." if proof.kernels else ".")
        for found in proofs.values() for proof in found
    ))  # fmt: skip
