"""Tables that fit the terminal: one that is wider goes on below itself, so that no cell is cut or broken."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qtool.report.tables import Row, columns

console = Console(emoji=False)  # `:dog:` in a name stays what it is
# a file has room for a grid
wide = console if console.is_terminal else Console(width=max(console.width, 120), emoji=False)


def print_table(
    console: Console, rows: Sequence[Row], title: str = "", lead: int = 1, left: Sequence[str] = ()
) -> None:
    """``lead``: how many columns come first in every part; they and ``left`` are aligned to the left."""
    heads = columns(list(rows))
    wide = {head: 3 + max(len(row.get(head, "")) for row in [*rows, {head: head}]) for head in heads}
    parts: list[list[str]] = [[]]
    for head in heads[lead:]:
        if parts[-1] and sum(wide[one] for one in [*heads[:lead], *parts[-1], head]) + 1 > console.width:
            parts.append([])
        parts[-1].append(head)
    for number, part in enumerate(parts):
        table = Table(title=title if number == 0 else "", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        shown = [*heads[:lead], *part]
        for head in shown:
            table.add_column(head, justify="left" if head in (heads[0], *left) else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(escape(row.get(head, "")) for head in shown))
        show(table, console)


def show(table: Table, console: Console) -> None:
    """A table; without the blanks that fill its lines where it goes into a file."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def say(text: str, hang: int = 2) -> None:
    """One line of markup. A terminal breaks it between words, further lines ``hang`` to the right; a file gets one."""
    line = Text.from_markup(text, emoji=False)
    if not console.is_terminal:
        console.print(line, soft_wrap=True, highlight=False)
        return
    first, *rest = line.wrap(console, console.width) or [Text()]
    console.print(first)
    for part in Text(" ").join(rest).wrap(console, console.width - hang) if rest else []:
        console.print(Text(" " * hang) + part)


def print_list(pairs: Sequence[tuple[str, str]]) -> None:
    """Names, and beside each what it is, in lines that end with the terminal's."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, said in pairs:
        table.add_row(escape(name), escape(said))
    show(table, console)
