"""What a file defines and uses, by the tree-sitter grammar of its language and the query that ships with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from qtool.context.files import SourceFile
from qtool.context.packages import required

# suffix -> package of the grammar, what makes the language there, packages whose queries come before its own
_PYTHON, _C = ("tree_sitter_python", "language", ()), ("tree_sitter_c", "language", ())
_JAVASCRIPT, _CPP = ("tree_sitter_javascript", "language", ()), ("tree_sitter_cpp", "language", ())
_TYPESCRIPT = ("tree_sitter_typescript", "language_typescript", ("tree_sitter_javascript",))
_TSX = ("tree_sitter_typescript", "language_tsx", ("tree_sitter_javascript",))
GRAMMARS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    **dict.fromkeys((".py", ".pyi"), _PYTHON),
    **dict.fromkeys((".js", ".jsx"), _JAVASCRIPT),
    ".ts": _TYPESCRIPT,
    ".tsx": _TSX,
    ".java": ("tree_sitter_java", "language", ()),
    ".go": ("tree_sitter_go", "language", ()),
    ".rs": ("tree_sitter_rust", "language", ()),
    ".c": _C,
    **dict.fromkeys((".h", ".cc", ".cpp", ".hpp", ".cu"), _CPP),
}
DOCSTRING = 3  # rows of one that an outline shows
COMMENTS = ("comment", "line_comment", "block_comment")


@dataclass(frozen=True)
class Definition:
    """``start``, ``end``: rows from 0, the end not included; ``outline``: rows of its signature and docstring."""

    name: str
    start: int
    end: int
    outline: tuple[int, ...]


@dataclass(frozen=True)
class Tags:
    """``references``: (row, name) of what is called or made."""

    definitions: tuple[Definition, ...] = ()
    references: tuple[tuple[int, str], ...] = ()


def require_grammars(files: Iterable[SourceFile]) -> None:
    """Raises QtoolError where the parser or a grammar of these files is missing."""
    packages = {GRAMMARS[suffix] for suffix in map(_suffix, files) if suffix in GRAMMARS}
    for package, _, before in sorted(packages):
        for name in ("tree_sitter", package, *before):
            required(name)


def _suffix(file: SourceFile) -> str:
    return PurePosixPath(file.path).suffix.lower()


def tags_of(file: SourceFile) -> Tags:
    """Of a file in a language without a grammar here: none."""
    suffix = _suffix(file)
    if suffix not in GRAMMARS:
        return Tags()
    language, query = _grammar(*GRAMMARS[suffix])
    sitter = required("tree_sitter")
    tree = sitter.Parser(language).parse(file.text.encode())
    definitions: dict[tuple[int, int, str], Definition] = {}
    references = []
    for _, captures in sitter.QueryCursor(query).matches(tree.root_node):
        for name in captures.get("name", ()):
            said = name.text.decode("utf-8", "replace")
            for label, nodes in captures.items():
                if label.startswith("reference."):
                    references.append((name.start_point.row, said))
                elif label.startswith("definition."):
                    one = _definition(said, nodes[0])
                    definitions.setdefault((one.start, one.end, said), one)
    return Tags(tuple(definitions[key] for key in sorted(definitions)), tuple(sorted(references)))


@cache
def _grammar(package: str, maker: str, before: tuple[str, ...]) -> tuple[Any, Any]:
    sitter, module = required("tree_sitter"), required(package)
    language = sitter.Language(getattr(module, maker)())
    query = "\n".join([*(required(name).TAGS_QUERY for name in before), module.TAGS_QUERY])
    return language, sitter.Query(language, query)


def _definition(name: str, node: Any) -> Definition:
    start, end = node.start_point.row, node.end_point.row + (node.end_point.column > 0)
    body = node.child_by_field_name("body")
    if body is None:  # a constant, or a declaration
        return Definition(name, start, end, tuple(range(start, min(end, start + DOCSTRING))))
    rows = list(range(start, max(body.start_point.row, start + 1)))
    first = next((child for child in body.named_children if child.type not in COMMENTS), None)
    if first is not None and first.type == "expression_statement" and first.named_children[:1]:
        text = first.named_children[0]
        if text.type == "string":
            rows += range(text.start_point.row, min(text.end_point.row + 1, text.start_point.row + DOCSTRING))
    return Definition(name, start, end, tuple(rows))
