"""Python values as bytes: what crosses between a hostile candidate and the checker that judges it.

A value is JSON; those that JSON lacks are one-key objects:

    {"t": [..]} tuple      {"s": [..]} set     {"z": [..]} frozenset    {"d": [[k, v], ..]} dict
    {"b": hex} bytes       {"c": [re, im]} complex   {"r": [start, stop, step]} range   {"g": [..]} iterator
    {"i": hex} int beyond 64 bits   {"f": "nan"} float JSON cannot spell   {"@": n} a container met before
    {"o": [name, parts]} a value, {"m": [name, parts, content]} a container of the standard library
    {"T": [module, name]} a class of it    {"n": [dtype, shape, bytes]} a numpy array

Everything else is up to the two ends' `Sides` (see line): {"x": ..}. Decoding builds values of builtin and standard
types and nothing else, whatever the bytes say: an object with its own ``__eq__`` cannot reach the checker.
Never pickle.

Containers that can change are counted as they come, on both sides alike, so that one met twice arrives as one.
"""

import contextlib
import json
import math
import sys
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from qtool.evaluate.sandbox import arrays
from qtool.evaluate.sandbox import stdlib_values as library
from qtool.evaluate.sandbox.frames import MAX_FRAME, NotPlain

# What the tests of EvalPlus's releases import this module as. Digests of tasks cover the tests' text, and scores and
# baselines are compared by digest: so this name stays, wherever the module lies.
NAME_IN_TESTS = "qtool.evaluate.wire"

MAX_ITEMS = 100_000
MAX_DEPTH = 10_000  # calls of the functions below, some for each value inside another

_PLAIN_BASES: tuple[Any, ...] = (bool, int, float, str, bytes, list, tuple, dict, set, frozenset)
_WORDS = frozenset({type(None), bool, str})
_NUMBERS = frozenset({int, float})
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


class Sides:
    """What the two ends of a pipe know beyond plain values; this one knows nothing. ``own_side``: the test's."""

    own_side = False

    def spell(self, value: Any, writer: "Writer") -> Any:
        """A node for a value that is not plain. Raises NotPlain."""
        raise NotPlain(f"a {type(value).__name__}, not a plain value")

    def make(self, node: Any, reader: "Reader") -> Any:
        """The value of a node that ``spell`` of the other side made. Raises NotPlain."""
        raise NotPlain("not a value (unknown tag)")


def pack(value: Any, limit: int = MAX_FRAME) -> bytes:
    """``value`` as the bytes of a frame's content. Raises NotPlain, also above ``limit`` bytes."""
    return Writer(Sides()).pack(value, limit)


def unpack(data: bytes) -> Any:
    """The value that ``pack`` was given. Raises NotPlain for every other byte string."""
    return Reader(Sides()).unpack(data)


@contextlib.contextmanager
def _deep() -> Iterator[None]:
    """Values may lie deeper in each other than the program's calls."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, MAX_DEPTH))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


class Writer:
    """Spells one message. ``seen`` holds the containers in the order they were met, after those given to it."""

    def __init__(self, sides: Sides, known: list[Any] | None = None) -> None:
        self.sides = sides
        self.seen: list[Any] = list(known or [])
        self._numbers = {id(value): number for number, value in enumerate(self.seen)}

    def pack(self, value: Any, limit: int = MAX_FRAME) -> bytes:
        """The bytes of ``value``. Raises NotPlain."""
        try:
            with _deep():
                data = _ENCODER.encode(self.node(value)).encode("ascii")
        except RecursionError as error:
            raise NotPlain("a value nested too deeply") from error
        if len(data) > limit:
            raise NotPlain(f"a value of {len(data)} bytes (limit {limit})")
        return data

    def met(self, value: Any) -> dict[str, int] | None:
        """The node of a container that was met before; else it is now."""
        number = self._numbers.get(id(value))
        if number is not None:
            return {"@": number}
        self._numbers[id(value)] = len(self.seen)
        self.seen.append(value)
        return None

    def node(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else {"i": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"f": repr(value)}
        if kind is tuple:
            return {"t": self._items(value)}
        if kind in (list, dict, set):
            return self.met(value) or self.content(value)
        if kind is frozenset:
            return {"z": self._items(value)}
        if kind is bytes:
            return {"b": value.hex()}
        if kind is complex:
            return {"c": [self.node(value.real), self.node(value.imag)]}
        if kind is range:
            return {"r": [self.node(value.start), self.node(value.stop), self.node(value.step)]}
        return self._other(value, kind)

    def content(self, value: Any) -> Any:
        """The node of a container that was counted already."""
        kind = type(value)
        if kind is list:
            return self._items(value)
        if kind is dict:
            return {"d": [[self.node(key), self.node(item)] for key, item in value.items()]}
        if kind is set:
            return {"s": self._items(value)}
        if kind in library.CHANGING:
            parts, _, read, _ = library.CHANGING[kind]
            return {"m": [kind.__name__, self.node(tuple(parts(value))), self.node(read(value))]}
        return {"x": self.sides.spell(value, self)}

    def _items(self, values: Any) -> list[Any]:
        kinds = set(map(type, values))
        # Long lists of numbers or words are their own spelling.
        if kinds <= _WORDS or (kinds <= _NUMBERS and _fits(values)):
            return list(values)
        return [self.node(item) for item in values]

    def _other(self, value: Any, kind: type) -> Any:
        if kind in library.CHANGING:
            return self.met(value) or self.content(value)
        if (fixed := library.fixed(kind)) is not None:
            return {"o": [kind.__name__, [self.node(part) for part in fixed[0](value)]]}
        if (names := library.spelt(value, self.sides.own_side)) is not None:
            return {"T": names}
        if kind.__module__ == "numpy" and arrays.number(value):
            return self.node(value.item())
        if kind.__module__ == "numpy" and (node := arrays.parts(value)) is not None:
            return node
        if type(self.sides) is not Sides:
            return {"x": self.sides.spell(value, self)}
        # A subclass that compares as its base does (a namedtuple, an IntEnum) travels as the base.
        for base in _PLAIN_BASES:
            if isinstance(value, base) and kind.__eq__ is base.__eq__:
                return self.node(as_base(value, base))
        if isinstance(value, (Iterator, KeysView, ValuesView, ItemsView)):
            items = []
            for item in value:
                items.append(self.node(item))
                if len(items) > MAX_ITEMS:
                    raise NotPlain(f"an iterator of more than {MAX_ITEMS} items")
            return {"g": items}
        return self.sides.spell(value, self)


def as_base(value: Any, base: Any) -> Any:
    """What ``value``, of a subclass, is as ``base`` itself: its content, not what its own methods say."""
    if base is dict:
        return dict(dict.items(value))
    if base in (list, tuple, set, frozenset):
        return base(base.__iter__(value))
    if base is str:
        return str.__str__(value)
    if base in (int, float):
        return base.__int__(value) if base is int else base.__float__(value)
    return complex.__pos__(value) if base is complex else base.__getitem__(value, slice(None))


def _fits(values: Any) -> bool:
    try:
        return all(map(math.isfinite, values)) and (not values or -(2**63) <= min(values) <= max(values) < 2**63)
    except OverflowError:
        return False


class Reader:
    """Makes the values of one message. ``seen`` as in a Writer."""

    def __init__(self, sides: Sides, known: list[Any] | None = None) -> None:
        self.sides = sides
        self.seen: list[Any] = list(known or [])

    def unpack(self, data: bytes) -> Any:
        """The value. Raises NotPlain for bytes that spell none, or one too large for this process."""
        try:
            with _deep():
                return self.value(json.loads(data.decode()))
        except NotPlain:
            raise
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise NotPlain(f"not a value ({type(error).__name__})") from None

    def met(self, value: Any) -> Any:
        self.seen.append(value)
        return value

    def value(self, node: Any) -> Any:
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, list):
            made: list[Any] = self.met([])
            made[:] = self._items(node)
            return made
        if not isinstance(node, dict) or len(node) != 1:
            raise NotPlain("not a value (untagged object)")
        ((tag, content),) = node.items()
        if tag in ("i", "f", "b"):
            return _decode_text(tag, content)
        if tag == "@":
            return self.seen[content if content >= 0 else len(self.seen)]
        if tag == "x":
            return self.sides.make(content, self)
        if not isinstance(content, list):
            raise NotPlain("not a value (tag without a list)")
        if tag in ("d", "s", "m"):
            return self._container(tag, content)
        if tag == "T":
            module, name = content
            return library.named(module, name, not self.sides.own_side)
        if tag == "o":
            name, parts = content
            return library.fixed_named(name)[1](*self._items(parts))
        if tag == "n":
            return arrays.made(*content)
        return _decode_items(tag, self._items(content))

    def _items(self, nodes: list[Any]) -> list[Any]:
        if set(map(type, nodes)) <= _WORDS | _NUMBERS:
            return nodes
        return [self.value(node) for node in nodes]

    def _container(self, tag: str, content: list[Any]) -> Any:
        if tag == "d":
            mapping: dict[Any, Any] = self.met({})
            for key, item in content:
                made = self.value(key)
                mapping[made] = self.value(item)
            return mapping
        if tag == "s":
            bag: set[Any] = self.met(set())
            bag.update(self._items(content))
            return bag
        name, parts, inner = content
        made = self.met(library.CHANGING[library.CHANGING_NAMES[name]][1](*self.value(parts)))
        library.refill(made, self.value(inner))
        return made


def _decode_items(tag: str, items: list[Any]) -> Any:
    if tag == "t":
        return tuple(items)
    if tag == "z":
        return frozenset(items)
    if tag == "g":
        return iter(items)
    if tag == "c" and len(items) == 2 and all(type(item) is float for item in items):
        return complex(items[0], items[1])
    if tag == "r" and len(items) == 3 and all(type(item) is int for item in items):
        return range(*items)
    raise NotPlain("not a value (unknown tag)")


def _decode_text(tag: str, content: Any) -> Any:
    if not isinstance(content, str):
        raise NotPlain("not a value (tag without text)")
    if tag == "i":
        return int(content, 16)
    if tag == "f":
        return {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}[content]
    return bytes.fromhex(content)
