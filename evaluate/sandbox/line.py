"""A call between two processes that do not trust each other: one side of the pipe between program and test.

A message is one value (see wire): ``("do", operation, target, args, kwargs)`` asks the other side for something, and
is answered by ``("is", value, changed)``, ``("raised", exception, changed)`` or ``("refused", why, {})``. While it
waits, a side answers what the other asks: a test's function that was passed to the program is called so. ``changed``
holds the containers of the request that are no longer what they were: number -> content.

What is not plain stays where it is and travels as a number, its handle; ``{"x": ["home", n]}`` brings it back.
"""

import threading
from typing import Any

from qtool.evaluate.sandbox import raised
from qtool.evaluate.sandbox import stdlib_values as library
from qtool.evaluate.sandbox.frames import NotPlain, read_frame, write_frame
from qtool.evaluate.sandbox.wire import Reader, Sides, Writer, as_base

# What the test may do to a value that stayed in the program's process, beside reading its attributes: its type's own
# methods.
METHODS = frozenset(
    f"__{name}__"
    for name in (
        *("call", "iter", "next", "reversed", "len", "getitem", "setitem", "delitem", "bool", "str", "repr", "format"),
        *("enter", "exit", "int", "float", "index", "bytes", "neg", "pos", "abs", "invert", "round", "trunc", "floor"),
        *("ceil", "aiter", "anext", "aenter", "aexit"),
    )
)
# And these only with another such value: the argument could be what the test expects, and the class say yes to it.
OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        *("eq", "lt", "le", "gt", "ge", "contains", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
)
_OWN = (list, dict, set)
_BASES: dict[str, Any] = {k.__name__: k for k in (*_OWN, tuple, str, int, float, bytes, frozenset)}
_PLAIN = (bytes, str, int, float)


class Lost(BaseException):
    """The other side ended or broke the rules. Not an Exception: an `except` in the test must not hide it."""


class Line(Sides):
    """One side. ``classes``: those of this side's own that the other has under the same name; their instances travel
    as their fields."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._kept: list[Any] = []
        self._handles: dict[int, int] = {}
        self._lock = threading.RLock()
        self.classes: dict[str, type] = {}
        self.kinds: dict[Any, type] = {}

    def keep(self, value: Any) -> int:
        """The handle of a value that stays on this side."""
        if id(value) not in self._handles:
            self._handles[id(value)] = len(self._kept)
            self._kept.append(value)
        return self._handles[id(value)]

    def kept(self, handle: Any) -> Any:
        """The value that has the handle. Raises NotPlain."""
        if type(handle) is not int or not 0 <= handle < len(self._kept):
            raise NotPlain("not a value (unknown handle)")
        return self._kept[handle]

    def ask(self, operation: str, target: int, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """What the other side's value ``target`` gives. Raises what was raised there; NotPlain for arguments that
        cannot cross; Lost."""
        with self._lock:
            writer = Writer(self)
            self.send(writer.pack(("do", operation, target, args, kwargs or {})))
            while True:
                reader = Reader(self, writer.seen)
                said = self.receive(reader)
                if said[0] != "do":
                    break
                self.answer(said, reader)
        kind, value, changed = said
        if kind == "refused":
            raise self.lost(f"returned {str(value)[:200]}")
        if type(changed) is not dict or kind not in ("is", "raised"):
            raise self.lost("the candidate broke the protocol")
        for number, content in changed.items():
            self._take_over(writer.seen, number, content)
        if kind == "raised":
            raise self.exception(value)
        return value

    def answer(self, said: tuple[Any, ...], reader: Reader) -> None:
        """Do what was asked and say what came of it."""
        before = [(value, elements(value)) for value in reader.seen]
        try:
            made = ("is", self.perform(*said[1:]))
        except Lost:
            raise
        except BaseException as error:
            made = ("raised", error)
        writer = Writer(self, reader.seen)
        try:
            changed = {n: held(value) for n, (value, old) in enumerate(before) if differ(old, elements(value))}
            data = writer.pack((*made, changed))
        except NotPlain as error:
            data = Writer(self).pack(("refused", str(error)[:300], {}))
        except Exception as error:  # reading a program's value runs its own code, which may raise anything
            data = Writer(self).pack(("refused", f"a value that raises {type(error).__name__} when read", {}))
        self.send(data)

    def perform(self, operation: str, target: Any, args: Any, kwargs: Any) -> Any:
        """What this side does for the other. Each of the two sides says it; there is no line without a side."""
        raise NotImplementedError  # both classes of sides say it: never reached

    def exception(self, value: Any) -> BaseException:
        if not isinstance(value, BaseException):
            raise self.lost("the candidate broke the protocol")
        return value

    def send(self, data: bytes) -> None:
        try:
            write_frame(self._outgoing, data)
        except OSError:
            raise self.lost("the candidate's process ended") from None

    def receive(self, reader: Reader) -> tuple[Any, ...]:
        """The next message, a tuple that begins with a word. Raises Lost."""
        try:
            data = read_frame(self._incoming)
            said = None if data is None else reader.unpack(data)
        except (NotPlain, MemoryError) as error:
            raise self.lost(f"the candidate broke the protocol: {error}") from None
        if data is None:
            raise self.lost("the candidate's process ended")
        sizes = {"do": 5, "is": 3, "raised": 3, "refused": 3}
        if type(said) is not tuple or not said or type(said[0]) is not str or sizes.get(said[0]) != len(said):
            raise self.lost("the candidate broke the protocol")
        return said

    def lost(self, reason: str) -> Lost:
        return Lost(reason[:400])

    def _take_over(self, seen: list[Any], number: Any, content: Any) -> None:
        """Change a container as the other side did."""
        value = seen[number] if type(number) is int and 0 <= number < len(seen) else None
        try:
            replace(value, content)
        except (TypeError, ValueError, KeyError, AttributeError):
            raise self.lost("the candidate broke the protocol") from None

    # What both sides spell alike.
    def spell(self, value: Any, writer: Writer) -> Any:
        if isinstance(value, BaseException):
            return ["error", *(writer.node(part) for part in raised.parts(value))]
        kind = type(value)
        if self.classes.get(kind.__name__) is kind:
            how = basis(kind)
            if how == "enum":
                named = value.name in kind.__members__
                return ["member" if named else "flags", kind.__name__, value.name if named else value.value]
            if how in ("list", "dict", "set"):
                return writer.met(value) or ["changing", kind.__name__, *(writer.node(part) for part in held(value))]
            if how != "object":
                content = writer.node(as_base(value, _BASES[how]))
                return ["based", kind.__name__, content, writer.node(fields(value))]
            return writer.met(value) or ["object", kind.__name__, writer.node(fields(value))]
        if isinstance(value, type) and self.classes.get(value.__name__) is value:
            return ["class", value.__name__]
        return self.spell_other(value, writer)

    def spell_other(self, value: Any, writer: Writer) -> Any:
        raise NotPlain(f"a {type(value).__name__}, not a plain value")

    def make(self, node: Any, reader: Reader) -> Any:
        if isinstance(node, dict):
            return reader.value(node)
        tag, *rest = node
        if tag == "home":
            return self.kept(rest[0])
        if tag == "error":
            return raised.made([reader.value(part) for part in rest], self.classes)
        if tag == "class":
            return self.classes[rest[0]]
        if tag == "member":
            return self.classes[rest[0]].__members__[rest[1]]  # type: ignore[attr-defined]  # a member's class is an enum
        if tag == "flags" and type(rest[1]) is int:
            return self.classes[rest[0]](rest[1])
        if tag == "changing":
            own: Any = self.classes[rest[0]]
            made = reader.met(_BASES[basis(own)].__new__(own))
            replace(made, [reader.value(part) for part in rest[1:]])
            return made
        if tag == "based":
            return _based(self.classes[rest[0]], *(reader.value(part) for part in rest[1:]))
        if tag == "object":
            kind: Any = self.classes[rest[0]]
            made = reader.met(kind.__new__(kind))
            replace(made, reader.value(rest[1]))
            return made
        return self.make_other(tag, rest, reader)

    def make_other(self, tag: str, rest: list[Any], reader: Reader) -> Any:
        raise NotPlain("not a value (unknown tag)")


def basis(kind: Any) -> str:
    """What decides how instances of a class of one's own travel: "enum", the builtin type that it extends, "object"."""
    if hasattr(kind, "__members__"):
        return "enum"
    return next((name for name, base in _BASES.items() if issubclass(kind, base)), "object")


def _based(kind: Any, content: Any, attributes: dict[str, Any]) -> Any:
    base = _BASES[basis(kind)]
    if type(content) is not base:
        raise TypeError(kind.__name__)
    made = base.__new__(kind, content)
    for name, item in attributes.items():
        object.__setattr__(made, name, item)
    return made


def fields(value: Any) -> dict[str, Any]:
    """An object's attributes, from its dictionary and its slots."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def held(value: Any) -> Any:
    """The content of a container, in a plain one that ``replace`` takes."""
    kind = type(value)
    if kind in library.CHANGING:
        return library.CHANGING[kind][2](value)
    if kind in _OWN:
        return dict(value) if kind is dict else list(value)
    if not isinstance(value, _OWN):
        return fields(value)
    base: Any = _BASES[basis(kind)]  # a class of the problem's own
    return [tuple(base.items(value) if basis(kind) == "dict" else base.__iter__(value)), fields(value)]


def replace(value: Any, content: Any) -> None:
    """Give a container other content. Raises TypeError and the like where it does not fit."""
    kind = type(value)
    if kind in library.CHANGING:
        library.refill(value, content)
    elif isinstance(value, _OWN) and kind not in _OWN:
        items, attributes = content
        base: Any = _BASES[basis(kind)]
        base.clear(value)
        (base.extend if basis(kind) == "list" else base.update)(value, items)
        _set_fields(value, attributes)
    elif kind is list and type(content) is list:
        value[:] = content
    elif kind in (dict, set) and type(content) is (dict if kind is dict else list):
        value.clear()
        value.update(content)
    elif kind not in _OWN and type(content) is dict:
        _set_fields(value, content)
    else:
        raise TypeError(kind.__name__)


def _set_fields(value: Any, content: dict[str, Any]) -> None:
    for name in set(fields(value)) - set(content):
        object.__delattr__(value, name)
    for name, item in content.items():
        object.__setattr__(value, name, item)


def elements(value: Any) -> list[Any]:
    """What a container holds, for ``differ``."""
    content = held(value)
    if type(content) is list and type(value) not in library.CHANGING and isinstance(value, _OWN):
        if type(value) in _OWN:
            return content
        flat = [each for pair in content[0] for each in pair] if isinstance(value, dict) else content[0]
        return [*flat, *content[1].keys(), *content[1].values()]
    if type(content) is dict:
        return [*content.keys(), *content.values()]
    if type(content) is list and content and type(content[-1]) is dict:
        return [*content, *content[-1].keys(), *content[-1].values()]
    return content if type(content) is list else [content]


def differ(old: list[Any], new: list[Any]) -> bool:
    """Whether a container holds other things than before. Equal numbers and texts are the same; all else is by
    identity, which cannot lie."""
    if len(old) != len(new):
        return True
    pairs = zip(old, new, strict=True)
    return any(a is not b and not (type(a) is type(b) and type(a) in _PLAIN and a == b) for a, b in pairs)
