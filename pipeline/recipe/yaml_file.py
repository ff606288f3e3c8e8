"""YAML as data: a small file, one document, no key twice, nothing that unfolds; every fault with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qtool import QtoolError
from qtool.convert.files.reading import MB, read_text

SIZE = MB // 10  # the longest recipe that ships has 3,000 bytes
NODES = 10_000  # with what aliases repeat: a bomb of aliases has 10**9
DEPTH = 40


class _Loader(yaml.SafeLoader):
    """Safe YAML whose dates and numbers, where they are none, are faults of a line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            said = f"{node.value!r:.60}: {error}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from error


def read_yaml(path: Path) -> Any:
    """What a YAML file says. Raises QtoolError naming file and line."""
    return parse_yaml(read_text(path, SIZE), path)


def parse_yaml(text: str, path: Path | str) -> Any:
    """What a YAML text says. Raises QtoolError naming ``path``, where it is from, and the line."""
    _check_brackets(path, text)
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        at, control = text.count("\n", 0, error.position) + 1, ord(text[error.position])
        raise QtoolError(f"{path}:{at}: not valid YAML: a control character (0x{control:02x}).") from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(path, node, {}, ())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        said = f"{error.context or ''} {error.problem or ''}".strip()
        if said.startswith("expected a single document"):
            said = "it holds several documents (a line of ---); a recipe is one"
        if "'\\t'" in said:
            said += " (YAML is indented by spaces, not tabs)"
        raise QtoolError(f"{path}{line}: not valid YAML: {said}.") from error
    except yaml.YAMLError as error:
        raise QtoolError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise QtoolError(f"{path}: not valid YAML: nested too deeply.") from error
    finally:
        loader.dispose()


def _check_brackets(path: Path | str, text: str) -> None:
    """The scanner looks at every open bracket for every token: thousands would take minutes."""
    depth = 0
    for mark in text:
        depth += (mark in "[{") - (mark in "]}")
        if depth > DEPTH:
            raise QtoolError(f"{path}: not valid YAML: nested too deeply.")


def _check(path: Path | str, node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """How many nodes there are with every alias written out. Raises QtoolError for too many, and for keys that come
    twice."""
    where = f"{path}:{node.start_mark.line + 1}"
    if id(node) in above:
        raise QtoolError(f"{where}: not valid YAML: an alias refers to what it is a part of.")
    if len(above) > DEPTH:
        raise QtoolError(f"{where}: not valid YAML: nested too deeply.")
    if id(node) in sizes:
        return sizes[id(node)]
    size = 1
    if isinstance(node, yaml.ScalarNode):
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
            raise QtoolError(f"{where}: a text holds a null character or half of a character.")
    elif isinstance(node, yaml.MappingNode):
        _check_keys(where, node)
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    if not isinstance(node, yaml.ScalarNode):
        for part in parts:
            size += _check(path, part, sizes, (*above, id(node)))
    if size > NODES:
        raise QtoolError(f"{where}: more than {NODES:,} values, aliases written out.")
    sizes[id(node)] = size
    return size


def _check_keys(where: str, node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise QtoolError(f"{where}: a key that is a {key.tag.rpartition(':')[2]}, not text.")
        line = key.start_mark.line + 1
        if key.value in lines:
            raise QtoolError(
                f"{where.rpartition(':')[0]}:{line}: key {key.value!r} stands there twice (line {lines[key.value]}); "
                "keep one of them."
            )
        lines[key.value] = line
