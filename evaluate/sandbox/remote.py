"""A value that stayed in the program's process, as the test sees it. What its methods give comes as plain values.

It never says itself whether it equals a value of the test: its class may say so of everything. Where its class compares
as Python does (by identity, as a container, as a dataclass), that is done here; else the comparison ends the job, with
the reason. Two values of the program may be compared by its own class.
"""

import collections
import types
from typing import Any

from qtool.evaluate.sandbox.frames import NotPlain
from qtool.evaluate.sandbox.line import METHODS, OPERATORS, Line

_BASES: dict[str, type] = {
    kind.__name__: kind for kind in (int, float, complex, str, bytes, tuple, frozenset, list, dict, set, bytearray)
} | {"generator": types.GeneratorType}
_CHANGING = (list, dict, set, bytearray)
_MOST_AHEAD = 1024
_REFLECTED = OPERATORS - {"__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__"}


class Remote:
    """Base of such values: the line, the handle, the traits that the program's side told of the class."""

    # No dictionary: `vars` of it are the value's own.
    __slots__ = ("_ahead", "_handle", "_line", "_traits")
    _ahead: "_Ahead"
    _line: Line
    _handle: int
    _traits: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__qualname__", "__doc__", "__wrapped__"):
            raise AttributeError(name)
        return self._line.ask("get", self._handle, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._line.ask("set", self._handle, (name, value))

    def __delattr__(self, name: str) -> None:
        self._line.ask("del", self._handle, (name,))

    def __copy__(self) -> Any:
        return self._line.ask("copy", self._handle)

    def __deepcopy__(self, memo: Any) -> Any:
        return self._line.ask("deepcopy", self._handle)

    @property
    def __dict__(self) -> Any:  # type: ignore[override]  # asked for from the other process
        return self._line.ask("get", self._handle, ("__dict__",))

    @property
    def __class__(self) -> Any:
        return _BASES.get(self._traits.get("is", ""), type(self))

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("__class__ of a value in another process")

    def __eq__(self, other: object) -> Any:
        if self is other:
            return True
        how = self._traits["equal"]
        if how == "content":
            return _content(self) == _content(other)
        if how == "fields":
            fields = isinstance(other, Remote) and other._traits["equal"] == "fields"
            return _content(self) == _content(other) if fields else NotImplemented
        if how is False:
            return NotImplemented
        if isinstance(other, Remote):
            return self._line.ask("__eq__", self._handle, (other,))
        raise self._undecided()

    def __ne__(self, other: object) -> Any:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    def __hash__(self) -> int:
        # As its class has it: equal ones are one item of a set. That decides nothing, equality does.
        own = self._traits.get("hash", False)
        if own is None:
            raise TypeError(f"unhashable type: '{self._traits['name']}'")
        return object.__hash__(self) if own is False else hash(own)

    def _undecided(self) -> BaseException:
        name = self._traits["name"]
        return self._line.lost(f"not decided: returned a {name}, and only its own class could compare it")


def _operator(name: str) -> Any:
    def operator(self: Remote, other: Any) -> Any:
        if not isinstance(other, Remote):
            raise self._undecided()
        return self._line.ask(name, self._handle, (other,))

    return operator


def _content(value: Any) -> Any:
    if not isinstance(value, Remote):
        return value
    found = value._line.ask("plain", value._handle)
    if type(found) not in _CHANGING:
        raise value._undecided()
    return found


def _method(name: str) -> Any:
    def method(self: Remote, *args: Any, **kwargs: Any) -> Any:
        return self._line.ask(name, self._handle, args, kwargs)

    return method


class _Ahead:
    """The items of an iterator that were fetched ahead: more at a time the more are asked for."""

    def __init__(self) -> None:
        self.items: collections.deque[Any] = collections.deque()
        self.count = 1
        self.asked = 0
        self.end: Any = None

    def next(self, remote: Remote) -> Any:
        if not self.items and self.end is None:
            items, self.end = remote._line.ask("next", remote._handle, (self.count,))
            self.items.extend(items)
            self.asked += 1
            if self.asked > 2:
                self.count = min(2 * self.count, _MOST_AHEAD)
        if self.items:
            return self.items.popleft()
        if isinstance(self.end, BaseException):
            error, self.end = self.end, True
            raise error
        raise StopIteration


def _next(self: Remote) -> Any:
    return self._ahead.next(self)


def remote(line: Line, handle: int, traits: dict[str, Any]) -> Any:
    """The value with the handle. Raises NotPlain, KeyError or TypeError for traits that are none."""
    name, has = traits["name"], traits["has"]
    if type(name) is not str or type(has) is not list or not set(has) <= METHODS | OPERATORS:
        raise NotPlain("not a value (traits)")
    if type(traits["type"]) is not int or type(traits.get("hash")) not in (int, type(None)):
        raise NotPlain("not a value (traits)")
    if "content" in traits:
        return _subclass(line, handle, traits)
    made: Any = object.__new__(_kind(line, name, traits["type"], frozenset(has)))
    for slot, held in (("_line", line), ("_handle", handle), ("_traits", traits), ("_ahead", _Ahead())):
        object.__setattr__(made, slot, held)
    return _awaitable(line, handle) if traits.get("awaits") else made


def _kind(line: Line, name: str, number: Any, has: frozenset[str]) -> type:
    """The class of the values whose class in the program has that number: one for all of them."""
    if (number, name, has) in line.kinds:
        return line.kinds[number, name, has]
    space: dict[str, Any] = {each: _method(each) for each in METHODS & has}
    space |= {each: _operator(each) for each in OPERATORS & has - {"__eq__"}}
    space |= {f"__r{each[2:]}": _operator(each) for each in set(space) & _REFLECTED}
    if "__next__" in space:
        space |= {"__next__": _next, "__iter__": lambda self: self}
    return line.kinds.setdefault((number, name, has), type(name, (Remote,), space | {"__slots__": ()}))


def _awaitable(line: Line, handle: int) -> Any:
    async def awaited() -> Any:
        return line.ask("await", handle)

    return awaited()


def _subclass(line: Line, handle: int, traits: dict[str, Any]) -> Any:
    """A value of a subclass of a builtin type that compares as that: a namedtuple, a str that is an Enum."""
    content, base = traits["content"], _BASES[traits["is"]]
    if type(content) is not base:
        raise NotPlain("not a value (content of another type)")

    def attribute(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return line.ask("get", handle, (name,))

    space: dict[str, Any] = {"__getattr__": attribute, "_handle": handle}
    for each in ("__str__", "__repr__", "__format__"):
        if each in traits["has"] and base is not tuple:
            space[each] = lambda self, *args, each=each: line.ask(each, handle, args)
    if "fields" in traits:
        make: Any = collections.namedtuple
        point = make(traits["name"], traits["fields"])
        own: Any = type(traits["name"], (point,), {"__getattr__": attribute})
        return own._make(content)
    kind: Any = type(traits["name"], (base,), space)
    return kind(content)
