"""The process that runs the model's program: nothing it says is believed, its return values are compared.

It holds two pipe ends and no secret: it was forked before the job was read, so the tests were never in its
memory.
"""

import copy
import json
import linecache
import os
import sys
import types
from collections.abc import Iterator
from typing import Any, Self

from qtool.evaluate.sandbox import habits, script
from qtool.evaluate.sandbox.frames import MAX_JOB, NotPlain, read_frame, write_frame
from qtool.evaluate.sandbox.line import METHODS, OPERATORS, Line, Lost, basis, fields
from qtool.evaluate.sandbox.wire import Reader, Writer, as_base

_FIXED_BASES: tuple[Any, ...] = (int, float, str, bytes, tuple, frozenset, complex)
_CHANGING_BASES: tuple[Any, ...] = (list, dict, set, bytearray)
_exit = os._exit


class ProgramSide(Line):
    """The program's end: it does whatever the test asks of its values, and keeps those that are not plain."""

    def __init__(self, calls: int, replies: int) -> None:
        super().__init__(calls, replies)
        self._module: types.ModuleType | None = None
        self._loop: Any = None
        self._given: dict[int, Any] = {}

    def load(self, job: dict[str, Any]) -> Any:
        """The program's function, handle 0. Raises whatever the program raises."""
        if job["run"] == "stdin":
            function: Any = script.as_function(job["program"])
        else:
            self._module = types.ModuleType("candidate")
            function = _load(self._module, job["program"], job["entry_point"])
        self.keep(function)

    def perform(self, operation: str, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.kept(target)
        if operation == "__call__":
            return value(*args, **kwargs)
        if operation in METHODS | OPERATORS:
            return getattr(type(value), operation)(value, *args)
        match operation:
            case "get":
                return getattr(value, *args)
            case "set":
                return setattr(value, *args)
            case "del":
                return delattr(value, *args)
            case "next":
                return _some(value, *args)
            case "copy" | "deepcopy":
                return getattr(copy, operation)(value)
            case "await":
                import asyncio

                self._loop = self._loop or asyncio.new_event_loop()
                return self._loop.run_until_complete(_awaited(value))
            case "plain":
                return _plain(value)
            case "is a":
                return isinstance(args[0], value)
            case "classes":
                space = vars(self._module) if self._module else {}
                known = {name: space.get(name) for name in args[0]}
                fit = {name: kind for name, kind in known.items() if isinstance(kind, type)}
                self.classes = {name: kind for name, kind in fit.items() if basis(kind) == args[0][name]}
                return sorted(self.classes)
        raise NotPlain("not something to ask for")

    def spell_other(self, value: Any, writer: Writer) -> Any:
        kind: Any = type(value)
        if kind is _Items or (kind is types.FunctionType and hasattr(value, "_home")):
            return ["home", value._home]
        traits: dict[str, Any] = {"name": kind.__name__, "has": sorted(n for n in METHODS if _has(kind, n))}
        traits["has"] += [name for name in OPERATORS if isinstance(getattr(kind, name, None), types.FunctionType)]
        traits["equal"] = kind.__eq__ is not object.__eq__
        traits["type"] = self.keep(kind)
        if traits["equal"]:
            traits["hash"] = _hash(value)
        if hasattr(kind, "__await__"):
            traits["awaits"] = True
        if isinstance(value, types.GeneratorType):
            traits["is"] = "generator"
        for base in (*_FIXED_BASES, *_CHANGING_BASES):
            if isinstance(value, base):
                traits["is"] = base.__name__
                if base in _FIXED_BASES and kind.__eq__ is base.__eq__:
                    traits["content"] = as_base(value, base)
                    if base is tuple and isinstance(names := getattr(kind, "_fields", None), tuple):
                        traits["fields"] = list(names)
                elif kind.__eq__ is base.__eq__:
                    traits["equal"] = "content"
                break
        if hasattr(kind, "__dataclass_params__") and _made_equal(kind):
            traits["equal"] = "fields"
        return ["kept", self.keep(value), writer.node(traits)]

    def make_other(self, tag: str, rest: list[Any], reader: Reader) -> Any:
        if tag not in ("function", "iterator"):
            raise NotPlain("not a value (unknown tag)")
        if rest[0] not in self._given:
            self._given[rest[0]] = (_function if tag == "function" else _Items)(self, rest[0])
        return self._given[rest[0]]


def _function(line: ProgramSide, handle: int) -> Any:
    """A function of the test."""

    def given(*args: Any, **kwargs: Any) -> Any:
        return line.ask("__call__", handle, args, kwargs)

    given._home = handle  # type: ignore[attr-defined]  # a function takes any attribute
    return given


class _Items:
    """An iterator of the test."""

    def __init__(self, line: ProgramSide, handle: int) -> None:
        self._line = line
        self._home = handle

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self._line.ask("__next__", self._home)


def _has(kind: Any, name: str) -> bool:
    if name in ("__str__", "__repr__", "__format__"):
        return bool(getattr(kind, name) != getattr(object, name))
    return getattr(kind, name, None) is not None


def _hash(value: Any) -> int | None:
    try:
        return hash(value)
    except Exception:  # the program's own __hash__ may raise anything: such a value has none
        return None


def _made_equal(kind: Any) -> bool:
    """Whether a dataclass compares as ``dataclass`` made it."""
    written = getattr(getattr(kind.__eq__, "__code__", None), "co_filename", "") == "candidate.py"
    return kind.__dataclass_params__.eq and not written


def _plain(value: Any) -> Any:
    """What ``value`` is compared by: [its class's handle, fields] of a dataclass, the content of a container."""
    for base in _CHANGING_BASES:
        if isinstance(value, base):
            return as_base(value, base)
    held = fields(value)
    return [id(type(value)), *(held[name] for name, f in type(value).__dataclass_fields__.items() if f.compare)]


def _some(iterator: Iterator[Any], count: int) -> list[Any]:
    """[items, what ended it: None, True for its end, or an exception]: at most ``count`` items."""
    items: list[Any] = []
    try:
        while len(items) < count:
            items.append(next(iterator))
    except StopIteration:
        return [items, True]
    except Exception as error:  # the program's own iterator: what it raises is its answer
        return [items, error]
    return [items, None]


async def _awaited(value: Any) -> Any:
    return await value


def _load(module: types.ModuleType, program: str, entry_point: str) -> Any:
    # A real module: dataclasses and typing look theirs up in sys.modules.
    sys.modules["candidate"] = module
    module.__file__ = os.path.join(os.getcwd(), "candidate.py")
    linecache.cache["candidate.py"] = (len(program), None, program.splitlines(True), "candidate.py")
    exec(compile(program, "candidate.py", "exec"), module.__dict__)
    return defined(module.__dict__, entry_point)


def defined(space: dict[str, Any], entry_point: str) -> Any:
    """What a program that ran in ``space`` defines under that name. Raises NameError, and what its class raises."""
    function = space.get(entry_point)
    if function is None and isinstance(solution := space.get("Solution"), type):
        # Contest sites ask for a method of a class of that name.
        function = getattr(solution(), entry_point, None)
    if not callable(function):
        raise NameError(f"the program does not define {entry_point}")
    return function


def serve(calls: int, replies: int) -> None:
    """Load the program in the first frame of ``calls``, say whether it could be, then answer until the pipe closes."""
    line = ProgramSide(calls, replies)
    write_frame(replies, line_word("alive"))
    data = read_frame(calls, MAX_JOB)
    if data is None:
        return
    job = json.loads(data)
    habits.settle()
    try:
        line.load(job)
    except BaseException as error:
        write_frame(replies, line_word(f"while loading, {type(error).__name__}: {_text(error)}"))
        return
    write_frame(replies, line_word("ready"))
    while True:
        reader = Reader(line)
        line.answer(line.receive(reader), reader)


def line_word(text: str) -> bytes:
    return json.dumps(text).encode("ascii")


def _text(error: BaseException) -> str:
    try:
        return str(error)[:300]
    except BaseException:
        return "?"


def main(calls: int, replies: int) -> None:
    """``serve``, then leave without running what the program registered for exit."""
    try:
        serve(calls, replies)
    except Lost:
        _exit(0)
    except BaseException:
        _exit(1)
    _exit(0)
