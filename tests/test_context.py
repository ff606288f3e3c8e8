"""`qtool context`: what is read of a repository, how it is cut and ranked, and that no prompt breaks its budget."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from qtool import QtoolError
from qtool.cli import context as cli_context
from qtool.cli import main
from qtool.context.files import SourceFile, read_tree
from qtool.context.grammars import GRAMMARS, tags_of
from qtool.context.pieces import Piece, cut, pieces_of
from qtool.context.ranking import METHODS, Repository, words
from qtool.context.selection import by_characters, select
from qtool.convert.text.source import FILE_LIMIT

BILLING = '''"""Bills."""

RATE = 7


# What a customer owes.
def total(order):
    """Sum of an order's lines, with tax."""
    lines = order["lines"]
    return with_tax(sum(lines))


def with_tax(amount):
    return amount * RATE
'''
PARSER = '''class Parser:
    """Reads orders."""

    def parse(self, text):
        """An order out of a text."""
        return {"lines": [int(part) for part in text.split()]}
'''


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    (root / "shop").mkdir(parents=True)
    (root / "shop" / "billing.py").write_text(BILLING)
    (root / "shop" / "parser.py").write_text(PARSER)
    (root / "README.md").write_text("# Shop\n\nParses orders and bills them.\n")
    return root


def chosen(root: Path, question: str, method: str, budget: int = 1000) -> list[str]:
    found = select(root, question, method, budget)
    return [one.piece.place for one in sorted(found.chosen, key=lambda one: one.rank)]


def test_what_cannot_be_trusted_is_left_out_and_counted(repository: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.py"
    secret.write_text("PASSWORD = 1\n")
    os.symlink(secret, repository / "link.py")
    os.symlink(tmp_path, repository / "outside")
    os.mkfifo(repository / "pipe.py")
    (repository / "binary.py").write_bytes(b"a = 1\0")
    (repository / "latin.py").write_bytes("# Käse\n".encode("latin-1"))
    (repository / "long.py").write_text("a = '" + "x" * 10_000 + "'\n")
    with (repository / "huge.py").open("wb") as file:
        file.truncate(FILE_LIMIT + 1)
    (repository / ".gitignore").write_text("build/\n*.js\n!kept.js\n" + "*a" * 30 + "\n")
    (repository / "build").mkdir()
    (repository / "build" / "made.py").write_text("x = 1\n")
    (repository / "lost.js").write_text("let a = 1\n")
    (repository / "kept.js").write_text("let a = 1\n")
    (repository / "shop" / ".gitignore").write_text("/parser.py\n")
    (repository / "photo.png").write_bytes(b"\x89PNG")
    (repository / "bell.py").write_text("a = 1  # \x1b[31m\n")
    tree = read_tree(repository)
    assert [file.path for file in tree.files] == ["README.md", "bell.py", "kept.js", "shop/billing.py"]
    assert "\x1b" not in tree.files[1].text
    assert tree.left_out == {
        "binary": 1, "hidden": 2, "huge": 1, "ignored": 2, "ignored folders": 1, "links": 2,
        "neither code nor prose": 1, "no regular files": 1, "not UTF-8": 1, "with lines that no one wrote": 1,
    }  # fmt: skip


def test_a_folder_with_nothing_to_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(QtoolError, match="no file of code or prose that can be read \\(1 neither code nor prose\\)"):
        read_tree(tmp_path)
    with pytest.raises(QtoolError, match="no folder"):
        read_tree(tmp_path / "a.png")


def test_pieces_are_definitions_with_what_stands_above(repository: Path) -> None:
    pieces = cut(read_tree(repository).files)
    billing = [piece for piece in pieces if piece.path == "shop/billing.py"]
    assert [(p.start, p.end, p.names) for p in billing] == [
        (1, 1, ()), (3, 3, ("RATE",)), (6, 10, ("total",)), (13, 14, ("with_tax",)),
    ]  # fmt: skip
    total = billing[2]
    assert total.text.startswith("# What a customer owes.\ndef total")
    head = 'def total(order):\n    """Sum of an order\'s lines, with tax."""'
    assert total.outline == f"# What a customer owes.\n{head}"
    assert total.uses == {"sum": 1, "with_tax": 1}
    (parser,) = (piece for piece in pieces if piece.path == "shop/parser.py")
    assert parser.names == ("Parser", "parse")
    assert parser.outline.splitlines()[0] == "class Parser:"


def test_every_line_with_text_is_in_exactly_one_piece() -> None:
    body = "\n".join(f"    def method_{i}(self):\n        return {i}\n" for i in range(40))
    file = SourceFile("a.py", f"import os\n\n\nclass Large:\n    size = 1\n\n{body}\n\nprint(os)\n")
    pieces = list(pieces_of(file, tags_of(file)))
    covered = sorted(row for piece in pieces for row in range(piece.start, piece.end + 1))
    wanted = [row for row, line in enumerate(file.text.split("\n"), 1) if line.strip()]
    assert len(covered) == len(set(covered))
    assert set(wanted) <= set(covered)
    assert ("method_7",) in [piece.names for piece in pieces]  # a class of 120 lines is cut into its methods


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".js", "function ask(a) {\n  return tell(a)\n}\n"),
        (".ts", "function ask(a: number): number {\n  return tell(a)\n}\n"),
        (".tsx", "function ask(a: number): number {\n  return tell(a)\n}\n"),
        (".java", "class A {\n  int ask(int a) {\n    return tell(a);\n  }\n}\n"),
        (".go", "package a\n\nfunc ask(a int) int {\n\treturn tell(a)\n}\n"),
        (".rs", "fn ask(a: i32) -> i32 {\n    tell(a)\n}\n"),
        (".c", "int ask(int a) {\n  return tell(a);\n}\n"),
        (".cpp", "int ask(int a) {\n  return tell(a);\n}\n"),
    ],
)
def test_languages(suffix: str, text: str) -> None:
    assert suffix in GRAMMARS
    found = tags_of(SourceFile(f"a{suffix}", text))
    assert "ask" in [one.name for one in found.definitions]


def test_words() -> None:
    assert words("readHTTPLine the_cache Q7-LIMA") == [
        *("read", "http", "line", "readhttpline", "the", "cache", "the_cache", "q", "7", "q7", "lima"),
    ]  # fmt: skip


def test_methods_find_what_they_go_by(repository: Path) -> None:
    assert tuple(METHODS) == cli_context.METHODS
    question = "What does a customer owe for an order, with tax?"
    assert chosen(repository, question, "lexical")[0] == "shop/billing.py:6-10"
    # `total` calls with_tax, whose own words are not asked for: references lead there
    ranks = METHODS["outline"].score("customer owes", Repository(repository, cut(read_tree(repository).files)))
    pieces = cut(read_tree(repository).files)
    by_name = {piece.names[0]: rank for piece, rank in zip(pieces, ranks, strict=True) if piece.names}
    assert by_name["total"] > by_name["with_tax"] > by_name["Parser"]
    with pytest.raises(QtoolError, match="no git history"):
        chosen(repository, question, "recent")


def test_recent_goes_by_commits(repository: Path) -> None:
    from dulwich import porcelain

    porcelain.init(str(repository))
    for path in ("shop/billing.py", "shop/parser.py"):
        porcelain.add(str(repository), [str(repository / path)])
        porcelain.commit(str(repository), message=b"x", author=b"a <a@b>", committer=b"a <a@b>")
    settings, run = repository / ".git" / "config", f"touch {repository}/run"
    settings.write_text(f"{settings.read_text()}[core]\n\tfsmonitor = {run}\n[gpg]\n\tprogram = {run}\n")
    assert chosen(repository, "anything", "recent")[0].startswith("shop/parser.py")
    assert chosen(repository / "shop", "anything", "recent")[0].startswith("parser.py")
    assert not (repository / "run").exists()


@pytest.mark.parametrize("method", ["mixed", "lexical", "outline", "keywords"])
@pytest.mark.parametrize("budget", [30, 60, 120])
def test_no_prompt_breaks_its_budget(repository: Path, method: str, budget: int) -> None:
    question = "What does a customer owe for an order?"
    first, again = (select(repository, question, method, budget) for _ in range(2))
    assert first == again
    assert by_characters([first.prompt])[0] == first.tokens <= budget
    assert first.prompt.endswith(question + "\n")
    assert all(line in first.prompt for one in first.chosen for line in one.shown.splitlines())


def test_a_question_beyond_the_budget_is_refused(repository: Path) -> None:
    with pytest.raises(QtoolError, match="the question alone takes"):
        select(repository, "word " * 100, "lexical", 50)


def test_a_missing_package_is_one_line(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    (repository / ".gitignore").write_text("x\n")
    result = CliRunner().invoke(main, ["context", str(repository), "--question", "a"])
    assert result.exit_code == 3
    assert "Run: pip install 'qtool-llm[context]'" in result.output


def test_command(repository: Path) -> None:
    words_ = ["context", str(repository), "--question", "-", "--budget", "1k"]
    plain = CliRunner().invoke(main, words_, input="customer owes tax\n")
    assert plain.exit_code == 0, plain.output
    told = json.loads(CliRunner().invoke(main, [*words_, "--json"], input="customer owes tax\n").stdout)
    assert plain.stdout == told["prompt"]
    assert told["tokens"] <= 1024
    assert {"file": "shop/billing.py", "start": 6, "end": 10}.items() <= next(
        one for one in told["chosen"] if one["defines"] == ["total"]
    ).items()
    table = CliRunner().invoke(main, [*words_, "--list"], input="customer owes tax\n")
    assert "shop/billing.py" in table.output


def test_piece_place() -> None:
    assert Piece("a.py", 3, 9, "x").place == "a.py:3-9"
