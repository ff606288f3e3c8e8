"""`qtool context`: parse, call, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool import QtoolError
from qtool.cli.options import one_number

if TYPE_CHECKING:
    from qtool.context.selection import Count, Selection

LONGEST_QUESTION = 10**6  # characters
METHODS = ("mixed", "lexical", "outline", "recent", "keywords")


@click.command()
@click.argument("repo", type=click.Path(path_type=Path, file_okay=False))
@click.option("--question", required=True, help="What the model is to be asked; `-`: read from standard input.")
@click.option("--budget", default="16k", show_default=True, metavar="TOKENS", help="Of the whole prompt: 8000, 16k.")
@click.option("--model", type=click.Path(path_type=Path, file_okay=False), help="Its tokenizer counts (a folder).")
@click.option("--method", type=click.Choice(METHODS), default="mixed", show_default=True, help="What pieces go by.")
@click.option("--list", "listed", is_flag=True, help="A table of what was chosen, instead of the prompt.")
@click.option("--json", "as_json", is_flag=True, help="Prompt, pieces and counts as one JSON object.")
def context(
    repo: Path, question: str, budget: str, model: Path | None, method: str, listed: bool, as_json: bool
) -> None:
    """Choose what of the repository REPO to put before a model, within a budget of its tokens.

    Files are cut into definitions (tree-sitter) and ranked for the question: by words (`lexical`), by who uses what
    (`outline`: signatures alone), by commits (`recent`), by all three (`mixed`), or by density of words (`keywords`, a
    baseline). The same repository and question give the same prompt. Nothing of REPO is executed, no link followed;
    files that are binary, huge or ignored are left out and counted. What a budget costs: docs/context.md.

    \b
    Examples:
      qtool context . --question "Where is the cache's size computed?" --budget 8k --model ./My-Model
      qtool context ./repo --question "Why does login fail?" --budget 4k --method outline > prompt.txt
      qtool context ./repo --question - --list < question.txt
    """
    from qtool.context.selection import select

    if question == "-":
        question = sys.stdin.read(LONGEST_QUESTION + 1)
    if len(question) > LONGEST_QUESTION:
        raise QtoolError(f"--question: has more than {LONGEST_QUESTION:,} characters.")
    if not question.strip():
        raise QtoolError("--question: is empty.")
    tokens = one_number(budget, "--budget")
    if not tokens:
        raise QtoolError(f"--budget {budget}: a number of tokens is needed.")
    found = select(repo, question, method, tokens, _count(model))
    if as_json:
        click.echo(json.dumps(_plain(found), indent=2))
    elif listed:
        _table(found, model)
    else:
        click.echo(found.prompt, nl=False)
        click.echo(_told(found, model), err=True)


def _count(model: Path | None) -> Count:
    from qtool.context.selection import by_characters

    if model is None:
        return by_characters
    from qtool.convert.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids]

    return count


def _told(found: Selection, model: Path | None) -> str:
    unit = "tokens" if model is not None else "tokens, about (3 characters each; --model counts)"
    left = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items()) or "none"
    return (
        f"{len(found.chosen)} of {found.pieces:,} pieces, {found.tokens:,} {unit} with the question, all pieces "
        f"{found.whole:,}; {found.files:,} files read, left out: {left}."
    )


def _table(found: Selection, model: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=_told(found, model))
    for name, right in (("rank", True), ("file", False), ("lines", True), ("tokens", True), ("defines", False)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for one in sorted(found.chosen, key=lambda one: one.rank):
        piece = one.piece
        row = (str(one.rank), piece.path, f"{piece.start}-{piece.end}", str(one.tokens), ", ".join(piece.names[:4]))
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def _plain(found: Selection) -> dict[str, Any]:
    chosen = [
        {
            "file": one.piece.path, "start": one.piece.start, "end": one.piece.end, "rank": one.rank,
            "tokens": one.tokens, "defines": list(one.piece.names),
        }
        for one in found.chosen
    ]  # fmt: skip
    kept = ("method", "budget", "tokens", "whole", "files", "left_out", "prompt")
    return {**{key: getattr(found, key) for key in kept}, "chosen": chosen}
