"""What Python source binds and reads, found in its syntax. Pure functions; nothing here runs code."""

import ast
import builtins
import re
import warnings


def parses(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            # A model's "\\d" in a plain string is its own business: no warning on our stderr.
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def inside_literal(before: str) -> bool:
    """Whether ``before`` ends inside an open triple-quoted string or bracket."""
    depth, index = 0, 0
    while index < len(before):
        character = before[index]
        if character == "#":
            end = before.find("\n", index)
            index = len(before) if end < 0 else end
        elif character in "\"'":
            quote = character * 3 if before.startswith(character * 3, index) else character
            index += len(quote)
            while not before.startswith(quote, index):
                if index >= len(before):
                    return len(quote) == 3
                if before[index] == "\n" and len(quote) == 1:
                    break
                index += 2 if before[index] == "\\" else 1
            index += len(quote) - 1
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        index += 1
    return depth > 0


def functions(source: str) -> dict[str, ast.stmt]:
    tree = parses(source)
    if tree is None:
        return {}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name: node for node in tree.body if isinstance(node, kinds)}


def names(source: str | ast.AST) -> set[str]:
    tree = parses(source) if isinstance(source, str) else source
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} if tree else set()


def missing(program: str) -> set[str]:
    """Names that the program reads and nothing in it binds."""
    tree = parses(program)
    if tree is None:
        return set()
    bound = set(dir(builtins))
    read: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        else:
            bound |= _bound_by(node)
    return read - bound


def _bound_by(node: ast.AST) -> set[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
            return {name}
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return {(alias.asname or alias.name).split(".")[0] for alias in aliases}
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return {name}
        case ast.MatchMapping(rest=str(name)):
            return {name}
        case ast.Global(names=names):
            return set(names)
    return set()


def _bound_at_top(node: ast.stmt) -> set[str]:
    if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.Try, ast.If)):
        return _bound_by(node)
    inner = list(ast.walk(node))
    stored = {each.id for each in inner if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    return stored.union(*(_bound_by(each) for each in inner if isinstance(each, (ast.Import, ast.ImportFrom))))


def needed(program: str, sources: list[str], entry_point: str) -> list[str]:
    """The statements at the top of ``sources`` that bind what ``program`` reads and lacks, and what those read, in the
    order of their sources; of several that bind a name, the last."""
    offered: dict[str, tuple[int, int, str]] = {}
    for number, source in enumerate(sources):
        tree = parses(source)
        lines = source.split("\n")
        for node in tree.body if tree else ():
            bound = _bound_at_top(node)
            if entry_point in bound or isinstance(node, ast.Expr):
                continue
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            text = "\n".join(lines[first - 1 : node.end_lineno])
            offered |= dict.fromkeys(bound, (number, first, text))
    taken: set[tuple[int, int, str]] = set()
    whole = program
    while fresh := {offered[name] for name in missing(whole) if name in offered} - taken:
        taken |= fresh
        whole = "\n".join([program, *(text for _, _, text in sorted(taken))])
    return [text for _, _, text in sorted(taken)]


def stars(sources: list[str]) -> list[str]:
    """The `from x import *` of ``sources``: what they bind cannot be read off."""
    line = re.compile(r"^from \S+ import \*", re.MULTILINE)
    return [found for source in sources if parses(source) for found in line.findall(source)]
