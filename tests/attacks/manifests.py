"""qtool.json and the sections of artifacts: what verify, evaluate and publish are told by whoever made the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import Attack, Bench, edit_json, sign

Change = Callable[[dict[str, Any]], Any]
EMPTY = {"bytes": 0, "sha256": "0" * 64}
KEYS = (
    "qtool",
    "key",
    "output",
    "source",
    "calibration",
    "device",
    "versions",
    "parameters",
    "tensor_bytes",
    "bits_per_weight",
    "ledger",
    "files",
)
NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "..\\..\\x",
    "C:\\x",
    "C:x",
    ".",
    "..",
    "",
    "a/",
    "./a",
    "a//b",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "a" * 5000,
    "a/../../b",
    "qtool.json",
    "~/x",
    "\ud800",
)


def _ledger(**record: Any) -> Change:
    return lambda data: [found.update(record) for found in data["ledger"].values()] and None


def _output(**said: Any) -> Change:
    return lambda data: data["output"].update(said)


EDITS: list[tuple[str, Change]] = [
    *((f"{key} missing", lambda data, k=key: data.pop(k) and None) for key in KEYS),
    *((f"{key} a number", lambda data, k=key: data.update({k: -7})) for key in KEYS),
    *((f"{key} null", lambda data, k=key: data.update({k: None})) for key in KEYS[::3]),
    ("an unknown key", lambda data: data.update(evil=1)),
    ("parameters 10**400", lambda data: data.update(parameters=10**400)),
    ("bits_per_weight NaN", lambda data: data.update(bits_per_weight=float("nan"))),
    ("bits_per_weight text", lambda data: data.update(bits_per_weight="Infinity")),
    ("tensor_bytes of another", lambda data: data.update(tensor_bytes=1)),
    ("ledger empty", lambda data: data.update(ledger={})),
    ("ledger of others", lambda data: data.update(ledger={"../../x": {"frobenius": 0.1}})),
    ("ledger of one too many", lambda data: data["ledger"].update({"model.layers.0.evil": {"frobenius": 0.1}})),
    ("ledger without error", lambda data: data.update(ledger={name: {} for name in data["ledger"]})),
    ("ledger NaN", _ledger(frobenius=float("nan"))),
    ("ledger Infinity", _ledger(frobenius=float("inf"))),
    ("ledger as text", _ledger(frobenius="Infinity")),
    ("ledger -1", _ledger(frobenius=-1)),
    ("ledger 1", _ledger(frobenius=1.0)),
    ("ledger 1e300", _ledger(frobenius=1e300)),
    ("ledger true", _ledger(frobenius=True)),
    ("output dtype of none", _output(dtype="os.system")),
    ("output of NaN", _output(damp_percent=float("nan"))),
    ("output of text NaN", _output(damp_percent="NaN")),
    ("output of another group size", _output(group_size=64)),
    ("files: sha256 of another", lambda data: data["files"]["config.json"].update(sha256="0" * 64)),
    ("files: bytes -1", lambda data: data["files"]["config.json"].update(bytes=-1)),
    ("files: bytes 10**30", lambda data: data["files"]["config.json"].update(bytes=10**30)),
    ("files: bytes text", lambda data: data["files"]["config.json"].update(bytes="9")),
    ("files: none", lambda data: data.update(files={})),
    ("files: 10**5 that are missing", lambda data: data["files"].update({f"f{i}": EMPTY for i in range(10**5)})),
    *((f"files: {name[:30]!r}", lambda data, n=name: data["files"].update({n: EMPTY})) for name in NAMES),
]
TEXTS: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("null", b"null"),
    ("a list", b"[]"),
    ("half", b'{"qtool": "0'),
    ("not UTF-8", b"\xff"),
    ("200000 brackets", b"[" * 200_000),
    ("UTF-16", "{}".encode("utf-16")),
    ("NULs", bytes(99)),
    ("1e999", b"1e999"),
    ("a number of 10000 digits", b'{"parameters": ' + b"9" * 10_000 + b"}"),
    ("70 MB", b" " * 70_000_000 + b"{}"),
]
SECTIONS: list[tuple[str, str, Change]] = [
    *(
        (output, f"group_size {value!r}", lambda q, v=value: q.update(group_size=v))
        for output in ("awq", "gptq")
        for value in (0, -7, 10**12, "x", None, True, 1.5)
    ),
    *(
        (output, f"bits {value!r}", lambda q, v=value: q.update(bits=v))
        for output in ("awq", "gptq")
        for value in (0, 3, 64, "4", None)
    ),
    ("awq", "quant_method of none", lambda q: q.update(quant_method="evil")),
    ("awq", "quant_method of another", lambda q: q.update(quant_method="gptq")),
    ("awq", "quant_method a list", lambda q: q.update(quant_method=["awq"])),
    ("awq", "version gemv", lambda q: q.update(version="gemv")),
    ("awq", "everything left out", lambda q: q.clear()),
    ("awq", "skips all", lambda q: q.update(modules_to_not_convert=["model"])),
    ("awq", "skips a number", lambda q: q.update(modules_to_not_convert=7)),
    ("gptq", "checkpoint_format of none", lambda q: q.update(checkpoint_format="evil", format="evil")),
    ("gptq", "dynamic", lambda q: q.update(dynamic={"-:.*": {}})),
    ("ct", "config_groups a list", lambda q: q.update(config_groups=[])),
    ("ct", "config_groups of text", lambda q: q.update(config_groups={"group_0": "x"})),
    ("ct", "two groups", lambda q: q["config_groups"].update(group_1=q["config_groups"]["group_0"])),
    ("ct", "weights null", lambda q: q["config_groups"]["group_0"].update(weights=None)),
    ("ct", "weights of floats", lambda q: q["config_groups"]["group_0"]["weights"].update(type="float")),
    ("ct", "targets nothing", lambda q: q["config_groups"]["group_0"].update(targets=[])),
    ("ct", "ignores all", lambda q: q.update(ignore=["re:.*"])),
    ("ct", "a pattern that is none", lambda q: q.update(ignore=["re:("])),
    ("nf4", "fp4", lambda q: q.update(bnb_4bit_quant_type="fp4")),
    ("nf4", "storage of floats", lambda q: q.update(bnb_4bit_quant_storage="float32")),
    ("nf4", "8 bits", lambda q: q.update(load_in_4bit=False, load_in_8bit=True)),
]
STATES: list[tuple[str, bytes]] = [
    ("sizes of none", b'{"blocksize":-1,"shape":[1e999],"quant_type":"evil","dtype":"os.system"}'),
    ("sizes too large", b'{"blocksize":64,"shape":[1000000000,1000000000],"quant_type":"nf4","dtype":"bfloat16"}'),
    ("block of 0", b'{"blocksize":0,"shape":[128,128],"quant_type":"nf4","dtype":"bfloat16"}'),
    ("dtype of none", b'{"blocksize":64,"shape":[128,128],"quant_type":"nf4","dtype":"__class__"}'),
    ("fp4", b'{"blocksize":64,"shape":[128,128],"quant_type":"fp4","dtype":"bfloat16"}'),
    ("NaN", b'{"blocksize":NaN,"shape":[128,128],"dtype":"bfloat16"}'),
    ("brackets", b"[" * 3000),
    ("not UTF-8", b"\xff\xfe"),
    ("empty", b""),
    ("a nested block of text", b'{"blocksize":64,"shape":[128,128],"dtype":"bfloat16","nested_offset":"x"}'),
]
SOURCES: list[tuple[str, str]] = [
    ("the artifact itself", "model-awq"),
    ("another artifact", "nf4"),
    ("a missing folder", "nothing"),
    ("a file", "text.txt"),
    ("/dev/null", "/dev/null"),
]


def _manifest(change: Change) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        folder = bench.artifact(work)
        edit_json(folder / "qtool.json", lambda data: change(data) and None)
        return ["verify", str(folder), "--source", str(bench.root / "model")]

    return build


def _text(text: bytes, command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        folder = bench.artifact(work)
        (folder / "qtool.json").write_bytes(text)
        if command == "evaluate":
            return bench.evaluate(folder)
        return ["verify", str(folder)] if command == "verify" else _publish(folder)

    return build


def _publish(folder: Path) -> list[str]:
    return ["publish", str(folder), "--to", "acme", "--license", "mit", "--dry-run"]


def _section(output: str, change: Change, command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        folder = bench.artifact(work, output)
        edit_json(folder / "config.json", lambda data: change(data["quantization_config"]) and None)
        sign(folder)
        return ["verify", str(folder)] if command == "verify" else bench.evaluate(folder)

    return build


def _state(state: bytes, command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        import torch
        from safetensors.torch import load_file, save_file

        folder = bench.artifact(work, "nf4")
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "quant_state" in name)
        tensors[name] = torch.tensor(list(state), dtype=torch.uint8)
        save_file(tensors, file, metadata={"format": "pt"})
        sign(folder)
        return ["verify", str(folder)] if command == "verify" else bench.evaluate(folder)

    return build


def _source(place: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        folder = bench.artifact(work)
        other = {"model-awq": folder, "nf4": bench.root / "artifacts" / "model-nf4"}.get(place, bench.root / place)
        return ["verify", str(folder), "--source", str(other)]

    return build


def _notes(bench: Bench, work: Path) -> list[str]:
    folder = bench.artifact(work)
    edit_json(folder / "qtool.json", lambda data: data.update(notes=["\x1b]0;x\x07\x1b[2J"] * 10))
    return ["verify", str(folder)]


def _twice(bench: Bench, work: Path) -> list[str]:
    folder = bench.artifact(work)
    text = json.dumps(json.loads((folder / "qtool.json").read_text()))
    (folder / "qtool.json").write_text('{"ledger": {}, ' + text[1:])
    return ["verify", str(folder)]


def attacks() -> list[Attack]:
    checked, refused = frozenset({1, 2}), frozenset({2})
    found = [Attack("manifest", name, _manifest(change), checked) for name, change in EDITS]
    for number, (name, text) in enumerate(TEXTS):
        command = ("verify", "evaluate", "publish")[number % 3]
        found.append(Attack("manifest", f"file: {name}, {command}", _text(text, command), checked, ("qtool.json",)))
    for number, (output, name, change) in enumerate(SECTIONS):
        command = ("verify", "evaluate")[number % 2]
        harmless = command == "evaluate" and name in (
            "skips all",
            "skips a number",
            "ignores all",
            "a pattern that is none",
        )
        codes = (
            checked
            if command == "verify"
            else refused | ({0} if harmless or "bits" in name or output == "nf4" else set())
        )
        found.append(
            Attack("manifest", f"section of {output}: {name}, {command}", _section(output, change, command), codes)
        )
    for name, state in STATES:
        found.append(Attack("manifest", f"quant state: {name}, verify", _state(state, "verify"), checked))
        found.append(Attack("manifest", f"quant state: {name}, evaluate", _state(state, "evaluate"), refused))
    found += [Attack("manifest", f"source: {name}", _source(place), checked) for name, place in SOURCES]
    return [
        *found,
        Attack("manifest", "notes of terminal codes", _notes, frozenset({0, 1, 2})),
        Attack("manifest", "a key twice", _twice, checked),
    ]
