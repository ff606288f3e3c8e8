"""Names of folders, models, outputs and repositories as nobody would choose them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attacks.bench import Attack, Bench

FOLDERS = (
    "with blank",
    "größe",
    "日本",
    "a'b",
    'a"b',
    "$(touch CANARY)",
    "`x`",
    "-rf",
    "--help",
    "a;b",
    "a&b",
    "a%s",
    "{x}",
    "[red]x",
    "a:b",
    "\x1b[2J",
    "a\nb",
    "x" * 200,
    ".hidden",
    "a.partial",
    "nan",
    "model.safetensors",
    "*",
    "~",
    "#x",
)
WORDS = (
    "",
    " ",
    ".",
    "..",
    "/",
    "~",
    "nothing",
    "a/b/c",
    "-",
    "\x1b[2J",
    "x" * 5000,
    "file:///etc",
    "http://127.0.0.1:9/x",
    "/etc/passwd",
    "/dev/null",
    "../../..",
    "a\nb",
    "%s",
    "{x}",
    "[red]",
)
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("run",),
    ("plan",),
    ("verify",),
    ("check",),
    ("report",),
    ("pull",),
    ("compare", "x"),
    ("evaluate", "--task", "handwritten"),
    ("publish", "--to", "acme", "--dry-run"),
)


def _folder(name: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        name_ = name.replace("CANARY", "canary")
        model = bench.model(work)
        model = model.rename(work / name_)
        return bench.recipe(work, model=str(model), outputs=[{"method": "nf4", "name": "out"}])

    return build


def _word(command: tuple[str, ...], word: str) -> Callable[[Bench, Path], list[str]]:
    return lambda bench, work: [command[0], *command[1:], "--", word]


def attacks() -> list[Attack]:
    found = [Attack("name", f"a model's folder {name[:20]!r}", _folder(name), frozenset({0, 2, 3})) for name in FOLDERS]
    for number, word in enumerate(WORDS):
        for place, command in enumerate(COMMANDS):
            if (number + place) % 3 == 0:
                label = f"{command[0]} {word[:20]!r}"
                found.append(
                    Attack(
                        "name",
                        label,
                        _word(command, word),
                        frozenset({1, 2, 3}) if command[0] == "publish" else frozenset({2, 3}),
                    )
                )
    return found
