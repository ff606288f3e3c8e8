"""Chat templates: loops without end, reaches into Python, errors, odd files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.bench import Attack, Bench, edit_json

LOOP = "{% for a in range(99999) %}"
LOOPS = LOOP * 3 + "x" + "{% endfor %}" * 3
TEMPLATES: list[tuple[str, Any]] = [
    ("nested loops", LOOPS),
    (
        "a growing text",
        "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    ),
    ("multiplied text", "{{ 'x' * 10**11 }}"),
    ("a power", "{{ 9**9**9 }}"),
    ("a width", "{{ '%9999999999d' % 1 }}"),
    ("recursion", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    ("reach: subclasses", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ("reach: globals", "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"),
    ("reach: lipsum", "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}"),
    ("reach: format", "{{ '{0.__class__.__mro__}'.format('') }}"),
    ("reach: a file", "{% include '/etc/passwd' %}"),
    ("reach: an import", "{% import 'os' as os %}{{ os }}"),
    ("reach: the environment", "{{ raise_exception.__globals__ }}"),
    ("a syntax error", "{% for %}"),
    ("an open tag", "{% if messages %}"),
    ("an unknown filter", "{{ messages | evil }}"),
    ("an undefined name", "{{ nothing.at.all }}"),
    ("a division by zero", "{{ 1 / 0 }}"),
    ("a refusal", "{{ raise_exception('no') }}"),
    ("a refusal of 10**6 letters", "{{ raise_exception('n' * 1000000) }}"),
    ("terminal codes", "{{ raise_exception('\x1b]0;x\x07\x1b[2J') }}"),
    ("nothing", ""),
    ("blank", "   \n"),
    ("the prompt left out", "hello"),
    ("NULs", "\x00{{ messages[0].content }}\x00"),
    ("half a surrogate", "{{ messages[0].content }}\ud800"),
    ("10 MB", "{{ messages[0].content }}" + "a" * 10**7),
    ("5000 nested ifs", "{% if true %}" * 5000 + "x" + "{% endif %}" * 5000),
    ("5000 brackets", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    ("a number", 7),
    ("a list of numbers", [1, 2]),
    ("a list without names", [{"template": "x"}]),
    ("an empty list", []),
    ("a map", {"a": "b"}),
]


def _attack(template: Any, in_file: bool, command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        model = bench.model(work)
        said = template.replace("CANARY", str(bench.canary)) if isinstance(template, str) else template
        if in_file:
            (model / "chat_template.jinja").write_bytes(said.encode("utf-8", "surrogatepass"))
        else:
            edit_json(model / "tokenizer_config.json", lambda data: data.update(chat_template=said))
        if command == "evaluate":
            return bench.evaluate(model)
        rows = '{"messages": [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "ho"}]}\n'
        (work / "chat.jsonl").write_text(rows * 200)
        section = {"text": str(work / "chat.jsonl"), "samples": 2, "length": 16}
        return bench.recipe(work, model=str(model), calibration=section, outputs=[{"method": "gptq", "group_size": 32}])

    return build


def attacks() -> list[Attack]:
    found = []
    for number, (name, template) in enumerate(TEMPLATES):
        for command in ("evaluate", "run"):
            build = _attack(template, isinstance(template, str) and number % 2 == 1, command)
            found.append(Attack("template", f"{name}, {command}", build, frozenset({0, 2, 3})))
    return found
