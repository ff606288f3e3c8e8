"""config.json: values of the wrong type, absurd sizes, facts of another model, code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import TAKEN_OR_REFUSED, Attack, Bench, edit_json

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
ABSURD: list[tuple[str, Any]] = [
    ("0", 0),
    ("-1", -1),
    ("10**12", 10**12),
    ("text", "many"),
    ("1.5", 1.5),
    ("a list", [1]),
]
VALUES: list[tuple[str, str, Any]] = [
    ("architectures", "empty", []),
    ("architectures", "null", None),
    ("architectures", "unknown", ["EvilForCausalLM"]),
    ("architectures", "numbers", [7]),
    ("architectures", "text", "LlamaForCausalLM"),
    ("model_type", "unknown", "evil"),
    ("model_type", "null", None),
    ("model_type", "number", 7),
    ("model_type", "../../x", "../../x"),
    ("hidden_act", "unknown", "evil"),
    ("hidden_act", "number", 7),
    ("rms_norm_eps", "text", "small"),
    ("rms_norm_eps", "null", None),
    ("rope_theta", "text", "high"),
    ("rope_parameters", "text", "yarn"),
    ("rope_parameters", "unknown type", {"rope_type": "evil", "rope_theta": 10000.0}),
    ("rope_parameters", "no factor", {"rope_type": "yarn", "rope_theta": 10000.0}),
    ("rope_parameters", "factor 0", {"rope_type": "linear", "factor": 0, "rope_theta": 10000.0}),
    ("rope_parameters", "theta text", {"rope_type": "default", "rope_theta": "x"}),
    ("rope_scaling", "a number", 4),
    ("tie_word_embeddings", "false without a head", False),
    ("torch_dtype", "evil", "os.system"),
    ("dtype", "a number", 16),
    ("quantization_config", "text", "awq"),
    ("quantization_config", "a list", []),
    ("quantization_config", "unknown", {"quant_method": "evil"}),
    ("quantization_config", "of AWQ beside plain weights", {"quant_method": "awq", "bits": 4, "group_size": 128}),
    ("attention_bias", "true without biases", True),
    ("mlp_bias", "true without biases", True),
    ("num_attention_heads", "does not divide", 3),
    ("num_key_value_heads", "does not divide", 3),
    ("layer_types", "of an unknown kind", ["evil", "evil"]),
]
TOLERATED: list[tuple[str, str, Any]] = [
    ("max_position_embeddings", "null", None),
    ("max_position_embeddings", "-1", -1),
    ("max_position_embeddings", "text", "long"),
    ("max_position_embeddings", "10**30", 10**30),
    ("eos_token_id", "text", "</s>"),
    ("eos_token_id", "beyond the vocabulary", 10**9),
    ("bos_token_id", "a list", [[]]),
    ("pad_token_id", "-5", -5),
    ("_name_or_path", "a path", "/home/someone/private"),
    ("transformers_version", "a number", 99),
    ("use_cache", "text", "no"),
    ("rope_theta", "0", 0),
    ("rms_norm_eps", "negative", -1.0),
    ("attention_dropout", "NaN", float("nan")),
    ("initializer_range", "Infinity", float("inf")),
]
TEXTS: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("null", b"null"),
    ("a list", b"[]"),
    ("a number", b"1e999"),
    ("half", b'{"model_type": "lla'),
    ("not UTF-8", b'{"a": "\xff"}'),
    ("UTF-16", '{"a": 1}'.encode("utf-16")),
    ("NULs", bytes(1000)),
    ("100000 brackets", b"[" * 100_000),
    ("100000 maps", b'{"a":' * 100_000),
    ("an HTML page", b"<html></html>"),
    ("a number of 10000 digits", b'{"hidden_size": ' + b"9" * 10_000 + b"}"),
    ("no key at all", b"{}"),
    ("comments", b'{"model_type": "llama" // yes\n}'),
]
EVIL = "open({!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


def _value(key: str, value: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", lambda data: data.update({key: value}))


def _attack(damage: Callable[[Path], Any], command: str = "run") -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        model = bench.model(work)
        damage(model)
        if command == "evaluate":
            return bench.evaluate(model)
        if command == "plan":
            return ["plan", str(model)]
        return [*bench.recipe(work, model=str(model)), "--dry-run"]

    return build


def _code(command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        model = bench.model(work)
        (model / "evil.py").write_text(EVIL.format(str(bench.canary)))
        maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        edit_json(model / "config.json", lambda data: data.update(model_type="evil", auto_map=maps))
        if command == "evaluate":
            return bench.evaluate(model)
        return ["plan", str(model)] if command == "plan" else bench.recipe(work, model=str(model))

    return build


def attacks() -> list[Attack]:
    found = []
    for number, key in enumerate(SIZES):
        for name, value in ABSURD:
            command = ("run", "evaluate", "plan")[number % 3]
            codes = frozenset({0, 2}) if command == "plan" else frozenset({2})
            found.append(Attack("config", f"{key} {name}, {command}", _attack(_value(key, value), command), codes))
    found += [Attack("config", f"{key}: {name}", _attack(_value(key, value))) for key, name, value in VALUES]
    for key, name, value in TOLERATED:
        found.append(Attack("config", f"{key}: {name}", _attack(_value(key, value), "evaluate"), TAKEN_OR_REFUSED))
    for number, (name, text) in enumerate(TEXTS):
        command = ("run", "evaluate", "plan")[number % 3]
        found.append(
            Attack("config", f"file: {name}, {command}", _attack(_write(text), command), names=("config.json",))
        )
    found += [Attack("config", f"code, {command}", _code(command)) for command in ("run", "evaluate")]
    found.append(Attack("config", "code, plan", _code("plan"), TAKEN_OR_REFUSED))
    missing = _attack(lambda model: (model / "config.json").unlink())
    return [
        *found,
        Attack("config", "missing", missing, names=("config.json", "Hugging Face model")),
        Attack("config", "twice", _attack(_twice), TAKEN_OR_REFUSED),
    ]


def _write(text: bytes) -> Callable[[Path], None]:
    return lambda model: (model / "config.json").write_bytes(text) and None


def _twice(model: Path) -> None:
    text = json.dumps(json.loads((model / "config.json").read_text()))
    (model / "config.json").write_text('{"num_hidden_layers": 99, ' + text[1:])
