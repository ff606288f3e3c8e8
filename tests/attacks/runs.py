"""Stored runs, damaged or made up, read by check, compare, report and publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import Attack, Bench, edit_json, sign

FILES = (
    "result.json", "lock.json", "scores.json", "recipe.yaml", "questions.json", "manifests/awq.json", "summary.json",
)  # fmt: skip
TEXTS: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("garbage", b"\xff\xfe\x00"),
    ("null", b"null"),
    ("a list", b"[]"),
    ("half", b'{"a": '),
    ("brackets", b"[" * 99_999),
]
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("check", "RUN"),
    ("report", "RUN"),
    ("compare", "RUN:awq", "RUN:nf4"),
    ("publish", "RUN", "--to", "acme", "--dry-run"),
)
EDITS: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("no checks", "result.json", lambda d: d.update(checks={})),
    ("checks of nothing", "result.json", lambda d: d.update(checks={name: [] for name in d["checks"]})),
    ("a failed check", "result.json", lambda d: d["checks"]["awq"][0].update(status="fail")),
    ("a status of none", "result.json", lambda d: d["checks"]["awq"][0].update(status="evil")),
    ("seconds NaN", "result.json", lambda d: d.update(seconds=float("nan"))),
    ("an artifact outside", "lock.json", lambda d: d["artifacts"]["awq"].update(path="../../../../etc")),
    ("an artifact at /dev/zero", "lock.json", lambda d: d["artifacts"]["awq"].update(path="/dev/zero")),
    ("an artifact with a null", "lock.json", lambda d: d["artifacts"]["awq"].update(path="a\0b")),
    ("an artifact called ../x", "lock.json", lambda d: d["artifacts"].update({"../x": d["artifacts"]["awq"]})),
    ("a source of 0 bytes", "lock.json", lambda d: d["source"].update(bytes=0, bits_per_weight=0)),
    ("an artifact of 0 bytes", "manifests/awq.json", lambda d: d.update(tensor_bytes=0)),
    ("scores of nothing", "scores.json", lambda d: d.update(tasks={"awq": {"x": "../../etc/passwd"}})),
    ("a key with a star", "scores.json", lambda d: d.update(fidelity={"awq": "*"})),
    (
        "ledger NaN",
        "manifests/awq.json",
        lambda d: [r.update(frobenius=float("nan")) for r in d["ledger"].values()] and None,
    ),
    ("ledger text", "manifests/awq.json", lambda d: [r.update(frobenius="inf") for r in d["ledger"].values()] and None),
    ("bits NaN", "manifests/awq.json", lambda d: d.update(bits_per_weight=float("nan"))),
]


def _filled(command: tuple[str, ...], run: Path) -> list[str]:
    return [word.replace("RUN", str(run) if word == "RUN" else run.name) for word in command]


def _text(file: str, text: bytes, command: tuple[str, ...]) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        run = bench.run(work)
        (run / file).write_bytes(text)
        return _filled(command, run)

    return build


def _edit(
    file: str, change: Callable[[dict[str, Any]], Any], command: tuple[str, ...]
) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        run = bench.run(work)
        edit_json(run / file, lambda data: change(data) and None)
        return _filled(command, run)

    return build


def _changed(bench: Bench, work: Path) -> list[str]:
    """The artifact changed after the run, and its own manifest says the new sha256."""
    run = bench.run(work)
    lock = json.loads((run / "lock.json").read_text())
    folder = run / lock["artifacts"]["awq"]["path"]
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    sign(folder)
    return ["check", str(run)]


def _ledger(text: bytes) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        bench.run(work)
        (work / "runs" / "ledger.jsonl").write_bytes(text)
        return ["check", "latest"]

    return build


def _baseline(text: bytes) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        run = bench.run(work)
        (work / "baseline.json").write_bytes(text)
        return ["check", str(run), "--baseline", str(work / "baseline.json")]

    return build


def attacks() -> list[Attack]:
    found = []
    for number, file in enumerate(FILES):
        for place, (name, text) in enumerate(TEXTS):
            command = COMMANDS[(number + place) % len(COMMANDS)]
            spared = ("questions.json", "recipe.yaml", "scores.json", "summary.json")
            codes = frozenset({0, 1, 2}) if file in spared else frozenset({2})
            found.append(Attack("run", f"{file} {name}, {command[0]}", _text(file, text, command), codes | {1}))
    for name, file, change in EDITS:
        found.append(Attack("run", f"{name}, check", _edit(file, change, COMMANDS[0]), frozenset({0, 1, 2})))
        found.append(Attack("run", f"{name}, report", _edit(file, change, COMMANDS[1]), frozenset({0, 1, 2})))
    found.append(Attack("run", "an artifact changed since", _changed, frozenset({1}), ("changed",)))
    ledgers = [*TEXTS, ("a million brackets", b"[" * 1_000_000)]
    found += [Attack("run", f"ledger {name}", _ledger(text), frozenset({0, 2})) for name, text in ledgers]
    return found + [
        Attack("run", f"baseline {name}", _baseline(text), names=("baseline.json",)) for name, text in TEXTS
    ]
