"""Rows of a task's file (.jsonl, .jsonl.gz, a .json list, .parquet), each with the place to name when it is wrong."""

import ast
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qtool import QtoolError
from qtool.convert.text.records import parse_records, read_records
from qtool.evaluate.tasks.problems import Problem

Row = dict[str, Any]
LONGEST_TEXT = 1_000_000  # characters; the longest published prompt has 20,000


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """("file:line", row) of one file. Raises QtoolError (exit 2) naming the line that cannot be read."""
    for where, value in read_records(path):
        yield where, _object(where, value)


def parse_rows(source: str, data: bytes) -> Iterator[tuple[str, Row]]:
    """The same for a JSONL file's bytes, gzip or not."""
    for where, value in parse_records(source, io.BytesIO(data)):
        yield where, _object(where, value)


def problem(where: str, fields: Row) -> Problem:
    """The fields as a Problem. Raises QtoolError (exit 2) naming every key at fault."""
    _require_sizes(where, fields)
    try:
        return Problem.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(
            f"key {'.'.join(str(part) for part in fault['loc'])!r}: {fault['msg']}" for fault in error.errors()
        )
        keys = "task_id, prompt, entry_point, canonical_solution, test, level"
        raise QtoolError(f"{where}: {faults}. A problem has the keys {keys} (level is optional).") from error


def text_of(where: str, row: Row, key: str) -> str:
    """``row[key]``, which must be text. Raises QtoolError naming the place, the key, and the keys that are there."""
    value = row.get(key)
    if isinstance(value, str):
        return value
    there = ", ".join(sorted(row))
    what = "is missing" if key not in row else f"is a {type(value).__name__}, not text"
    raise QtoolError(f"{where}: key {key!r} {what}. The row has {there}: is it this benchmark's own file?")


def texts_of(where: str, row: Row, key: str) -> list[str]:
    """``row[key]``, which must be a list of texts (absent or null: none)."""
    value = row.get(key)
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise QtoolError(f"{where}: key {key!r} is not a list of texts.")


def third_party(sources: Iterable[str]) -> tuple[str, ...]:
    """Top-level names of the modules that the Python sources import and the standard library lacks, sorted."""
    found: set[str] = set()
    for source in sources:
        if "import" not in source:  # most have none; to parse a thousand takes seconds
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the sandbox, or `problem`, says so
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return tuple(sorted(found - sys.stdlib_module_names - {"qtool"}))


def humaneval_keys(row: Row) -> Row:
    """HumanEval's keys. Others, were they named like a Problem's, would change how it is judged."""
    wanted = ("task_id", "prompt", "entry_point", "canonical_solution", "test", "level")
    return {key: row[key] for key in wanted if key in row}


def _require_sizes(where: str, fields: Row) -> None:
    """A prompt is read by a model, a solution by Python's compiler: neither takes any length or any depth."""
    for key in ("prompt", "instruction", "canonical_solution", "setup"):
        value = fields.get(key)
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise QtoolError(f"{where}: key {key!r} has {len(value):,} characters; at most {LONGEST_TEXT:,} are asked.")
    texts = [fields.get(key) for key in ("prompt", "canonical_solution")]
    if fields.get("language", "python") == "python" and all(isinstance(text, str) for text in texts):
        syntax_tree("".join(map(str, texts)), f"{where}: key 'canonical_solution'")


def syntax_tree(program: str, where: str) -> ast.Module | None:
    """Python's own tree of a program, None for what is no Python. Raises QtoolError for one that is nested deeper than
    Python's compiler goes."""
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError):
        return None
    except (RecursionError, MemoryError) as error:
        raise QtoolError(f"{where} is nested deeper than Python's own compiler goes.") from error


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise QtoolError(f"{where}: a JSON {type(row).__name__}, not an object with the keys of a problem.")
    return row
