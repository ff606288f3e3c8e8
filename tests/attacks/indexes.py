"""The index of a model in several shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import EMBEDDING, Attack, Bench, edit_json

INDEX = "model.safetensors.index.json"


def _map(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return lambda model: edit_json(model / INDEX, lambda data: change(data["weight_map"]) and None)


def _text(text: bytes) -> Callable[[Path], None]:
    return lambda model: (model / INDEX).write_bytes(text) and None


def _first(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def _every(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda places: places.update(dict.fromkeys(places, value))


TABLE: list[tuple[str, Callable[[Path], Any]]] = [
    ("a shard outside", _map(lambda m: m.update({EMBEDDING: "../x.safetensors"}))),
    ("an absolute shard", _map(lambda m: m.update({EMBEDDING: "/etc/passwd"}))),
    ("a shard in a subfolder", _map(lambda m: m.update({EMBEDDING: "sub/x.safetensors"}))),
    ("a shard that is no safetensors", _map(lambda m: m.update({EMBEDDING: "pytorch_model.bin"}))),
    ("a shard that is a number", _map(lambda m: m.update({EMBEDDING: 7}))),
    ("a shard that is null", _map(lambda m: m.update({EMBEDDING: None}))),
    ("a shard that is a list", _map(lambda m: m.update({EMBEDDING: ["a.safetensors"]}))),
    ("a shard with a null character", _map(lambda m: m.update({EMBEDDING: "a\0.safetensors"}))),
    ("a shard of 5000 letters", _map(lambda m: m.update({EMBEDDING: "a" * 5000 + ".safetensors"}))),
    ("a shard that is missing", lambda model: _first(model).unlink()),
    ("a shard that is empty", lambda model: _first(model).write_bytes(b"")),
    ("a shard that is a folder", lambda model: _folder(model)),
    ("a tensor that no shard has", _map(lambda m: m.update({"model.layers.0.ghost": m[EMBEDDING]}))),
    ("a tensor left out", lambda model: _drop(model)),
    ("every tensor in one shard", _map(lambda m: _every(m[EMBEDDING])(m))),
    ("every tensor in no shard", _map(_every(""))),
    ("no weight_map", lambda model: edit_json(model / INDEX, lambda data: {"metadata": {}})),
    (
        "weight_map a list",
        lambda model: edit_json(model / INDEX, lambda data: {"weight_map": list(data["weight_map"])}),
    ),
    ("weight_map empty", lambda model: edit_json(model / INDEX, lambda data: {"weight_map": {}})),
    ("weight_map null", lambda model: edit_json(model / INDEX, lambda data: {"weight_map": None})),
    ("not JSON", _text(b"{")),
    ("a list", _text(b"[]")),
    ("not UTF-8", _text(b'{"weight_map": {"\xff": "a"}}')),
    ("100000 brackets", _text(b"[" * 100_000)),
    ("UTF-16", _text('{"weight_map": {}}'.encode("utf-16"))),
]


def _folder(model: Path) -> None:
    shard = _first(model)
    shard.unlink()
    shard.mkdir()


def _drop(model: Path) -> None:
    """A shard that the index names for one tensor only is cut off from the rest."""
    data = json.loads((model / INDEX).read_text())
    shard = data["weight_map"]["model.norm.weight"]
    data["weight_map"] = {name: place for name, place in data["weight_map"].items() if place != shard}
    (model / INDEX).write_text(json.dumps(data))


def _attack(damage: Callable[[Path], Any], dry: bool) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        model = bench.model(work, "shards")
        damage(model)
        return [*bench.recipe(work, model=str(model)), "--dry-run"] if dry else bench.evaluate(model)

    return build


def attacks() -> list[Attack]:
    found = [Attack("index", name, _attack(damage, True)) for name, damage in TABLE]
    return found + [Attack("index", f"{name}, evaluate", _attack(damage, False)) for name, damage in TABLE[::2]]
