"""Recipes: YAML that expands, constructs objects or says nonsense."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attacks.bench import LACKS, TAKEN_OR_REFUSED, Attack, Bench

HEAD = "model: MODEL\noutputs: [{method: nf4}]\n"
CALIBRATED = HEAD + "calibration: {text: TEXT, samples: 2, length: 16}\n"
JUDGED = CALIBRATED + "evaluate: {tasks: [{task: TASK}], max_new_tokens: 2"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
REFUSED: list[tuple[str, str | bytes]] = [
    ("empty", ""),
    ("blank", " \n\n"),
    ("null", "null"),
    ("a list", "- a"),
    ("a text", "model"),
    ("a number", "7"),
    ("two documents", HEAD + "---\n" + HEAD),
    ("a tab", "model:\t- x\n\t- y"),
    ("an open quote", 'model: "x'),
    ("not UTF-8", b"model: \xff\xfe"),
    ("NULs", bytes(100)),
    ("a control character", "model: a\x01b\noutputs: []"),
    ("5000 brackets", "[" * 5000),
    ("5000 maps", "{a: " * 5000),
    ("billion laughs", LAUGHS + "model: *a9\noutputs: *a9\n"),
    ("laughs as a folder", HEAD + LAUGHS + "output_dir: *a9\n"),
    ("a map in itself", "model: &m {id: x, y: *m}\noutputs: [*m]"),
    ("an unknown anchor", "model: *nothing"),
    ("merge keys of laughs", LAUGHS + "<<: *a3\n" + HEAD),
    ("python/name", "model: !!python/name:os.system\noutputs: []"),
    ("python/object/apply", "model: !!python/object/apply:os.system ['touch CANARY']\noutputs: []"),
    ("python/module", "model: !!python/module:evil\noutputs: []"),
    ("a tag of its own", "model: !evil x\noutputs: []"),
    ("binary", "model: !!binary AAAA\noutputs: [{method: nf4}]"),
    ("a set", "model: !!set {a, b}\noutputs: [{method: nf4}]"),
    ("a key twice", "model: MODEL\nmodel: /etc\noutputs: [{method: nf4}]"),
    ("a numeric key", "1: x\n" + HEAD),
    ("a null key", "~: x\n" + HEAD),
    ("a list as key", "? [a]\n: b\n" + HEAD),
    ("a misspelt key", "modle: x\noutputs: []"),
    ("no outputs", "model: MODEL"),
    ("outputs empty", "model: MODEL\noutputs: []"),
    ("outputs a map", "model: MODEL\noutputs: {}"),
    ("outputs null", "model: MODEL\noutputs: ~"),
    ("an unknown method", "model: MODEL\noutputs: [{method: awk}]"),
    ("a method that is a list", "model: MODEL\noutputs: [{method: [awq]}]"),
    ("no method", "model: MODEL\noutputs: [{}]"),
    ("two of one name", "model: MODEL\noutputs: [{method: nf4}, {method: nf4}]"),
    ("a name that leaves", "model: MODEL\noutputs: [{method: nf4, name: ../../x}]"),
    ("a name with a null", 'model: MODEL\noutputs: [{method: nf4, name: "a\\0b"}]'),
    ("a name of 5000 letters", f"model: MODEL\noutputs: [{{method: nf4, name: {'a' * 5000}}}]"),
    ("an empty name", 'model: MODEL\noutputs: [{method: nf4, name: ""}]'),
    ("group_size 7", "model: MODEL\noutputs: [{method: awq, group_size: 7}]"),
    ("group_size text", "model: MODEL\noutputs: [{method: awq, group_size: big}]"),
    ("group_size that does not divide", "model: MODEL\noutputs: [{method: gptq, group_size: 96}]"),
    ("bits 3", "model: MODEL\noutputs: [{method: gptq, bits: 3}]"),
    ("damp NaN", "model: MODEL\noutputs: [{method: gptq, group_size: 32, damp_percent: .nan}]"),
    ("damp -1", "model: MODEL\noutputs: [{method: gptq, group_size: 32, damp_percent: -1}]"),
    ("a type of none", "model: MODEL\noutputs: [{method: gguf, type: Q9_Z}]"),
    ("model null", "model: ~\noutputs: [{method: nf4}]"),
    ("model empty", 'model: ""\noutputs: [{method: nf4}]'),
    ("model a number", "model: 7\noutputs: [{method: nf4}]"),
    ("model with a null", 'model: "a\\0b"\noutputs: [{method: nf4}]'),
    ("model of nobody's home", "model: ~nouser_x/y\noutputs: [{method: nf4}]"),
    ("model of 5000 letters", f"model: {'a' * 5000}\noutputs: [{{method: nf4}}]"),
    ("model /dev/null", "model: /dev/null\noutputs: [{method: nf4}]"),
    ("model a file", "model: TEXT\noutputs: [{method: nf4}]"),
    ("model /", "model: /\noutputs: [{method: nf4}]"),
    ("model a URL", "model: file:///etc\noutputs: [{method: nf4}]"),
    ("samples 0", HEAD + "calibration: {text: TEXT, samples: 0}"),
    ("samples -1", HEAD + "calibration: {text: TEXT, samples: -1}"),
    ("samples 10**18", CALIBRATED.replace("samples: 2", f"samples: {10**18}").replace("nf4", "gptq, group_size: 32")),
    ("length 10**18", HEAD.replace("nf4", "gptq, group_size: 32") + f"calibration: {{text: TEXT, length: {10**18}}}"),
    ("length 0", HEAD + "calibration: {text: TEXT, length: 0}"),
    ("length NaN", HEAD + "calibration: {text: TEXT, length: .nan}"),
    ("text a list", HEAD + "calibration: {text: [a, b]}"),
    ("a date of none", CALIBRATED + "evaluate: {tasks: [{task: livecodebench, after: 2025-02-30}]}"),
    ("timeout 0", JUDGED + ", timeout: 0}"),
    ("timeout NaN", JUDGED + ", timeout: .nan}"),
    ("timeout -1", JUDGED + ", timeout: -1}"),
    ("temperature -1", JUDGED + ", temperature: -1}"),
    ("temperature NaN", JUDGED + ", temperature: .nan}"),
    ("max_new_tokens 0", JUDGED.replace("tokens: 2", "tokens: 0") + "}"),
    ("an engine of none", JUDGED + ", engine: evil}"),
    ("a sandbox of none", JUDGED + ", sandbox: nothing}"),
    ("gate unknown", CALIBRATED + "gates: [{max_evil: 1}]"),
    ("gate NaN", CALIBRATED + "gates: [{max_kld: .nan}]"),
    ("gate text", CALIBRATED + "gates: [{max_size: small}]"),
    ("gates a map", CALIBRATED + "gates: {max_size: 1}"),
    ("publish to a path", CALIBRATED + "publish: {to: ../../x/y}"),
    ("10 MB of one key", "a" * 10**7 + ": 1"),
]
TAKEN: list[tuple[str, str]] = [
    ("timeout infinite", JUDGED + ", timeout: .inf}"),
    ("timeout of 58 days", JUDGED + ", timeout: 5000000}"),
    ("temperature 1e-300", JUDGED + ", temperature: 1.0e-300}"),
    ("a number in base 60", CALIBRATED.replace("samples: 2", "samples: 1:30")),
    ("a byte order mark", "\ufeff" + CALIBRATED),
    ("Windows lines", CALIBRATED.replace("\n", "\r\n")),
    ("10 MB of blanks", CALIBRATED + " " * 10**7),
    ("a comment of 10 MB", CALIBRATED + "#" + "x" * 10**7),
    ("seed 10**30", CALIBRATED.replace("length", f"seed: {10**30}, length")),
    ("max_size infinite", CALIBRATED + "gates: [{max_size: .inf}]"),
]
PLACES: list[tuple[str, str]] = [
    ("output_dir below a file", CALIBRATED + "output_dir: /etc/passwd/x"),
    ("output_dir of 5000 letters", CALIBRATED + f"output_dir: {'a' * 5000}"),
    ("output_dir /dev/null", CALIBRATED + "output_dir: /dev/null"),
    ("output_dir with a null", CALIBRATED + 'output_dir: "a\\0b"'),
    ("output_dir /proc", CALIBRATED + "output_dir: /proc/self/x"),
    ("a server that is a file", JUDGED + ", engine: openai, base_url: 'file:///etc/passwd'}"),
    ("a server at port 99999", JUDGED + ", engine: openai, base_url: 'http://127.0.0.1:99999/v1'}"),
    ("a server that nobody runs", JUDGED + ", engine: openai, base_url: 'http://127.0.0.1:9/v1'}"),
    ("a server that is code", JUDGED + ", engine: openai, base_url: 'javascript:alert(1)'}"),
]


def _attack(text: str | bytes, *more: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        words = {"MODEL": bench.root / "model", "TEXT": bench.root / "text.txt", "TASK": bench.root / "task.jsonl"}
        said = text if isinstance(text, bytes) else text.encode("utf-8")
        for word, path in [*words.items(), ("CANARY", bench.canary)]:
            said = said.replace(word.encode(), str(path).encode())
        (work / "recipe.yaml").write_bytes(said)
        return ["run", "recipe.yaml", *more]

    return build


def attacks() -> list[Attack]:
    found = []
    for number, (name, text) in enumerate(REFUSED):
        more = ("--dry-run",) if number % 2 and "10**18" not in name and "date" not in name else ()
        codes = TAKEN_OR_REFUSED if "10**18" in name else frozenset({2})
        found.append(Attack("recipe", name, _attack(text, *more), codes))
    found += [Attack("recipe", name, _attack(text), TAKEN_OR_REFUSED) for name, text in TAKEN]
    found += [Attack("recipe", name, _attack(text), LACKS) for name, text in PLACES]
    return [*found, Attack("recipe", "--only of none", _attack(HEAD, "--only", "x\x1b[2J"))]
