"""`qtool context`: what is read of a repository, how it is cut and ranked, and that no prompt breaks its budget."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qtool import QtoolError
from qtool.cli import context as cli_context
from qtool.cli import main
from qtool.context import history
from qtool.context.files import SourceFile, read_tree
from qtool.context.grammars import GRAMMARS, tags_of
from qtool.context.pieces import Piece, cut, pieces_of
from qtool.context.ranking import METHODS, Repository, words
from qtool.context.selection import by_characters, select
from qtool.convert.text.bounded import Overrun, bounded
from qtool.convert.text.source import FILE_LIMIT
from qtool.convert.text.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[1] / "pipeline" / "data" / "demo-model"

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


def test_no_folder_smuggles_its_name_into_a_prompt(repository: Path) -> None:
    for name in (b"d\x1b]0;owned\x07", b"n\n### shop", b"bad\xff", "turned\u202e".encode()):
        folder = os.fsencode(repository) + b"/" + name
        os.mkdir(folder)
        with open(folder + b"/billing.py", "w", encoding="utf-8") as file:
            file.write(BILLING)
    tree = read_tree(repository)
    assert [file.path for file in tree.files] == ["README.md", "shop/billing.py", "shop/parser.py"]
    assert tree.left_out == {"folders with a name that cannot be shown": 4}


def test_a_folder_that_goes_meanwhile_is_counted(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def gone(path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        if path == "shop" and not follow_symlinks:
            raise FileNotFoundError(path)
        return real(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "stat", gone)
    assert read_tree(repository).left_out == {"unreadable": 1}


def test_a_link_that_the_user_names_is_followed(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(repository)
    assert read_tree(tmp_path / "link") == read_tree(repository)


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


def test_many_definitions_take_no_square_of_their_time() -> None:
    """20,000 took 16 s of the 30 that so many bytes are given; in order, a fraction of one."""
    file = SourceFile("a.py", "".join(f"NAME_{i} = {i}\n" for i in range(20_000)))
    tags = tags_of(file)
    begun = time.process_time()
    pieces = list(pieces_of(file, tags))
    assert time.process_time() - begun < 5
    assert [piece.names for piece in pieces[:2]] == [("NAME_0",), ("NAME_1",)]
    assert len(pieces) == 20_000


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


@pytest.mark.parametrize("name", ["HEAD", "config", "refs/heads/master"])
def test_a_history_of_pipes_is_none(repository: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As an archive of somebody's repository may hold one: refused, not waited for."""
    from dulwich import porcelain

    porcelain.init(str(repository))
    porcelain.add(str(repository), [str(repository / "shop/billing.py")])
    porcelain.commit(str(repository), message=b"x", author=b"a <a@b>", committer=b"a <a@b>")
    place, reasons = repository / ".git" / name, list[str]()
    place.unlink()
    os.mkfifo(place)

    def told(*limits: Any) -> list[Any]:
        try:
            return bounded(*limits)
        except Overrun as error:
            reasons.append(error.reason)
            raise

    monkeypatch.setattr(history, "bounded", told)
    assert history.changed_paths(repository) == []
    assert reasons == [f"ended in QtoolError: {place}: is a pipe, not a file."]


@pytest.mark.parametrize("method", ["mixed", "lexical", "outline", "keywords"])
@pytest.mark.parametrize("budget", [30, 60, 120])
def test_no_prompt_breaks_its_budget(repository: Path, method: str, budget: int) -> None:
    question = "What does a customer owe for an order?"
    first, again = (select(repository, question, method, budget) for _ in range(2))
    assert first == again
    assert by_characters([first.prompt])[0] == first.tokens <= budget
    assert first.prompt.endswith(question + "\n")
    assert all(line in first.prompt for one in first.chosen for line in one.shown.splitlines())


def test_what_a_tokenizer_puts_around_a_text_counts_once(repository: Path) -> None:
    def count(texts: Sequence[str]) -> list[int]:
        return [tokens + 7 for tokens in by_characters(texts)]

    question = "What does a customer owe for an order?"
    plain, around = select(repository, question, "lexical", 300), select(repository, question, "lexical", 307, count)
    assert around.prompt == plain.prompt
    assert around.tokens == plain.tokens + 7
    assert around.chosen == plain.chosen
    assert around.whole == plain.whole


def test_a_model_whose_texts_begin_with_a_token_keeps_the_budget(repository: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    first = tokenizer["added_tokens"][0]
    name = first["content"]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [first["id"]], "tokens": [name]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    words_ = ["context", str(repository), "--question", "customer owes tax", "--json", "--model", str(model)]
    told = json.loads(CliRunner().invoke(main, [*words_, "--budget", "100"]).stdout)
    assert told["tokens"] == len(load_tokenizer(model)(told["prompt"]).input_ids) <= 100


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


@pytest.mark.parametrize("package", ["tree_sitter", "tree_sitter_python", "bm25s", "networkx", "scipy", "dulwich"])
def test_each_missing_package_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Also the parser, which works in a child, and what a ranker asks for only while it ranks."""
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(main, ["context", str(repository), "--question", "a customer"])
    assert result.exit_code == 3
    assert result.output.startswith(f"Error: `qtool context` needs {package}, which is not here. Run: pip install")


def test_a_question_that_is_too_long_is_not_cut(repository: Path) -> None:
    words_ = ["context", str(repository), "--budget", "1000k", "--question", "-"]
    result = CliRunner().invoke(main, words_, input="a" * (cli_context.LONGEST_QUESTION + 1))
    assert (result.exit_code, result.output) == (2, "Error: --question: has more than 1,000,000 characters.\n")


def test_a_table_without_a_model_says_that_it_guesses(repository: Path) -> None:
    words_ = ["context", str(repository), "--question", "customer owes tax", "--list"]
    table = CliRunner().invoke(main, words_).output
    assert "(3 characters each; --model counts)" in " ".join(table.split())


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
