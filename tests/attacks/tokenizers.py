"""tokenizer.json, tokenizer_config.json and what lies beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import TAKEN_OR_REFUSED, Attack, Bench, edit_json

JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
Damage = Callable[[Path, Bench], Any]


def _text(file: str, text: bytes) -> Damage:
    return lambda model, _: (model / file).write_bytes(text)


def _edit(file: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda model, _: edit_json(model / file, lambda data: change(data) and None)


def _growing(data: dict[str, Any]) -> None:
    """Forty rules, each of which makes two letters of one."""
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [rule] * 40}


def _slow(data: dict[str, Any]) -> None:
    data["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }


def _code(model: Path, bench: Bench) -> None:
    (model / "evil.py").write_text(f"open({str(bench.canary)!r}, 'w')\nclass T: pass\n")
    edit_json(model / CONFIG, lambda data: data.update(auto_map={"AutoTokenizer": ["evil.T", None]}))


def _nothing(model: Path, _: Bench) -> None:
    (model / JSON).unlink()
    (model / CONFIG).unlink()


BROKEN: list[tuple[str, Damage]] = [
    *(
        (f"{file} {name}", _text(file, text))
        for file in (JSON, CONFIG)
        for name, text in (
            ("empty", b""),
            ("a list", b"[]"),
            ("null", b"null"),
            ("half", b'{"version": "1'),
            ("not UTF-8", b'{"\xff": 1}'),
            ("100000 brackets", b"[" * 100_000),
            ("NULs", bytes(100)),
            ("HTML", b"<html>"),
        )
    ),
    ("a model of a newer release", _edit(JSON, lambda d: d["model"].update(type="BPE9"))),
    ("no model", _edit(JSON, lambda d: d.pop("model") and None)),
    ("vocabulary a list", _edit(JSON, lambda d: d["model"].update(vocab=[]))),
    ("vocabulary with negative ids", _edit(JSON, lambda d: d["model"]["vocab"].update(x=-1))),
    ("merges of three", _edit(JSON, lambda d: d["model"].update(merges=[["a", "b", "c"]]))),
    ("merges of unknown tokens", _edit(JSON, lambda d: d["model"].update(merges=["qqq www"]))),
    ("added token without id", _edit(JSON, lambda d: d.update(added_tokens=[{"content": "x"}]))),
    ("unknown normalizer", _edit(JSON, lambda d: d.update(normalizer={"type": "Evil"}))),
    ("unknown decoder", _edit(JSON, lambda d: d.update(decoder={"type": "Evil"}))),
    (
        "a regular expression that is none",
        _edit(
            JSON,
            lambda d: d.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
            ),
        ),
    ),
    ("no tokenizer at all", _nothing),
    (
        "tokenizer.model alone, garbage",
        lambda m, b: ((m / JSON).unlink(), (m / "tokenizer.model").write_bytes(b"x" * 99)),
    ),
    ("class a number", _edit(CONFIG, lambda d: d.update(tokenizer_class=7))),
]
ODD: list[tuple[str, Damage]] = [
    ("class unknown", _edit(CONFIG, lambda d: d.update(tokenizer_class="EvilTokenizer"))),
    ("normalizer that grows text", _edit(JSON, _growing)),
    ("a slow regular expression", _edit(JSON, _slow)),
    ("code in auto_map", _code),
    ("ids beyond the embedding", _edit(JSON, lambda d: d["model"]["vocab"].update(a=10**6))),
    ("an empty vocabulary", _edit(JSON, lambda d: d["model"].update(vocab={}, merges=[]))),
    (
        "an added token of 10**6 letters",
        _edit(
            JSON,
            lambda d: d["added_tokens"].append(
                {
                    "id": 320,
                    "content": "x" * 10**6,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ),
        ),
    ),
    (
        "an empty added token",
        _edit(
            JSON,
            lambda d: d["added_tokens"].append(
                {
                    "id": 320,
                    "content": "",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            ),
        ),
    ),
    ("eos_token of another vocabulary", _edit(CONFIG, lambda d: d.update(eos_token="<|evil|>"))),
    ("eos_token a number", _edit(CONFIG, lambda d: d.update(eos_token=7))),
    ("model_max_length 1e999", _text(CONFIG, b'{"model_max_length": 1e999, "eos_token": "<eos>"}')),
    ("model_max_length -1", _edit(CONFIG, lambda d: d.update(model_max_length=-1))),
    ("added_tokens_decoder text", _edit(CONFIG, lambda d: d.update(added_tokens_decoder={"x": "y"}))),
    ("special_tokens_map a list", _text("special_tokens_map.json", b"[]")),
    ("added_tokens.json garbage", _text("added_tokens.json", b"{")),
    (
        "truncation of -1",
        _edit(
            JSON,
            lambda d: d.update(
                truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
            ),
        ),
    ),
]


def _attack(damage: Damage, command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        model = bench.model(work)
        damage(model, bench)
        if command == "evaluate":
            return bench.evaluate(model)
        kind = {"method": "awq", "group_size": 32} if command == "run" else {"method": "gguf", "type": "Q8_0"}
        return bench.recipe(work, model=str(model), outputs=[kind])

    return build


def attacks() -> list[Attack]:
    commands = ("run", "gguf", "evaluate")
    found = []
    for number, (name, damage) in enumerate(BROKEN):
        command = commands[number % 3]
        codes = TAKEN_OR_REFUSED if CONFIG in name or "merges" in name or "ids" in name else frozenset({2})
        found.append(Attack("tokenizer", f"{name}, {command}", _attack(damage, command), codes))
    for name, damage in ODD:
        for command in commands[:2]:
            found.append(Attack("tokenizer", f"{name}, {command}", _attack(damage, command), frozenset({0, 2, 3})))
    return found
