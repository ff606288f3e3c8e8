"""Values of the standard library that mean the same in every process: how each is spelt in plain ones and made again.

Only these types can be made from what a judged program sent, whatever it says they are. A subclass is none of them: its
own ``__eq__`` would decide.
"""

import array
import collections
import contextlib
import datetime
import decimal
import fractions
import importlib
import io
import ipaddress
import pathlib
import re
import statistics
import sys
import types
from collections.abc import Callable
from typing import Any

_EMPTY: dict[Any, Any] = {}
_ORDERED: collections.OrderedDict[Any, Any] = collections.OrderedDict()
_KEYS, _ITEMS, _VALUES = type(_EMPTY.keys()), type(_EMPTY.items()), type(_EMPTY.values())
_ODD_KEYS = type(_ORDERED.keys())
_ODD_ITEMS = type(_ORDERED.items())
_ODD_VALUES = type(_ORDERED.values())


def _zone(value: Any) -> datetime.timezone | None:
    """The time zone as what equality sees of it: its offset at that moment."""
    offset = value.utcoffset()
    if offset is None:
        return None
    zone = value.tzinfo
    return zone if type(zone) is datetime.timezone else datetime.timezone(offset, zone.tzname(value))


def _moment(value: datetime.datetime) -> list[Any]:
    parts = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
    return [*parts, _zone(value), value.fold]


def _time(value: datetime.time) -> list[Any]:
    return [value.hour, value.minute, value.second, value.microsecond, _zone(value), value.fold]


def _datetime(*parts: Any) -> datetime.datetime:
    return datetime.datetime(*parts[:-1], fold=parts[-1])


def _clock(*parts: Any) -> datetime.time:
    return datetime.time(*parts[:-1], fold=parts[-1])


def _pattern(text: Any, flags: int) -> Any:
    try:
        return re.compile(text, flags)
    except re.error as error:
        raise ValueError(str(error)) from None


# Values that never change: type -> (its parts, how it is made of them).
Fixed = tuple[Callable[[Any], list[Any]], Callable[..., Any]]
_FIXED: dict[type, Fixed] = {
    decimal.Decimal: (lambda value: [str(value)], decimal.Decimal),
    fractions.Fraction: (lambda value: [value.numerator, value.denominator], fractions.Fraction),
    datetime.date: (lambda value: [value.year, value.month, value.day], datetime.date),
    datetime.datetime: (_moment, _datetime),
    datetime.time: (_time, _clock),
    datetime.timedelta: (lambda value: [value.days, value.seconds, value.microseconds], datetime.timedelta),
    datetime.timezone: (lambda value: [value.utcoffset(None), value.tzname(None)], datetime.timezone),
    **{
        kind: (lambda value: [str(value)], kind)
        for name in ("Address", "Network", "Interface")
        for kind in (getattr(ipaddress, f"IPv4{name}"), getattr(ipaddress, f"IPv6{name}"))
    },
    statistics.NormalDist: (lambda value: [value.mean, value.stdev], statistics.NormalDist),
    collections.UserString: (lambda value: [value.data], collections.UserString),
    re.Pattern: (lambda value: [value.pattern, value.flags], _pattern),
    slice: (lambda value: [value.start, value.stop, value.step], slice),
    memoryview: (lambda value: [value.tobytes()], memoryview),
    pathlib.PurePosixPath: (lambda value: [str(value)], pathlib.PurePosixPath),
    pathlib.PosixPath: (lambda value: [str(value)], pathlib.PosixPath),
    type(...): (lambda value: [], lambda: ...),
    type(NotImplemented): (lambda value: [], lambda: NotImplemented),
    types.MappingProxyType: (lambda value: [dict(value)], types.MappingProxyType),
    _KEYS: (lambda value: [list(value)], lambda items: dict.fromkeys(items).keys()),
    _ODD_KEYS: (lambda value: [list(value)], lambda items: dict.fromkeys(items).keys()),
    _ITEMS: (lambda value: [dict(value)], lambda items: items.items()),
    _ODD_ITEMS: (lambda value: [dict(value)], lambda items: items.items()),
    _VALUES: (lambda value: [list(value)], lambda items: dict(enumerate(items)).values()),
    _ODD_VALUES: (lambda value: [list(value)], lambda items: dict(enumerate(items)).values()),
}
# `uuid` is loaded where one is met: a worker's every process would carry what it imports.
_UUID: Fixed = (lambda value: [value.hex], lambda text: importlib.import_module("uuid").UUID(text))
_FIXED_NAMES = {kind.__name__: how for kind, how in _FIXED.items()} | {"UUID": _UUID}


def fixed(kind: type) -> Fixed | None:
    """How values of the type are spelt, which never change; None for any other type."""
    return _FIXED.get(kind) or (_UUID if kind is getattr(sys.modules.get("uuid"), "UUID", None) else None)


def fixed_named(name: str) -> Fixed:
    """The same for the name of a type. Raises KeyError."""
    return _FIXED_NAMES[name]


def _refill(value: Any, content: Any) -> None:
    value.clear()
    value.update(content)


def _renew(value: Any, content: list[Any]) -> None:
    value[:] = content


def _refill_defaults(value: Any, content: list[Any]) -> None:
    value.default_factory = content[0]
    _refill(value, content[1])


def _refill_chain(value: Any, content: list[Any]) -> None:
    value.maps = content


def _refill_deque(value: Any, content: list[Any]) -> None:
    value.clear()
    value.extend(content)


def _refill_array(value: Any, content: list[Any]) -> None:
    value[:] = array.array(value.typecode, content)


def _refill_space(value: Any, content: dict[str, Any]) -> None:
    _refill(vars(value), content)


def _refill_file(value: Any, content: list[Any]) -> None:
    value.seek(0)
    value.truncate()
    value.write(content[0])
    value.seek(content[1])


# Containers, which are changed in place: type -> (what the empty one needs, its content, how the content is replaced).
Changing = tuple[Callable[[Any], list[Any]], Callable[..., Any], Callable[[Any], Any], Callable[[Any, Any], None]]
CHANGING: dict[type, Changing] = {
    bytearray: (lambda v: [], bytearray, bytes, _renew),
    collections.Counter: (lambda v: [], collections.Counter, dict, lambda v, c: (dict.clear(v), dict.update(v, c))[0]),
    collections.OrderedDict: (lambda v: [], collections.OrderedDict, dict, _refill),
    collections.defaultdict: (
        lambda v: [], collections.defaultdict, lambda v: [v.default_factory, dict(v)], _refill_defaults,
    ),
    collections.deque: (lambda v: [v.maxlen], lambda size: collections.deque(maxlen=size), list, _refill_deque),
    collections.ChainMap: (lambda v: [], collections.ChainMap, lambda v: v.maps, _refill_chain),
    collections.UserDict: (lambda v: [], collections.UserDict, lambda v: v.data, lambda v, c: setattr(v, "data", c)),
    collections.UserList: (lambda v: [], collections.UserList, lambda v: v.data, lambda v, c: setattr(v, "data", c)),
    array.array: (lambda v: [v.typecode], array.array, list, _refill_array),
    io.StringIO: (lambda v: [], lambda: io.StringIO(newline=""), lambda v: [v.getvalue(), v.tell()], _refill_file),
    io.BytesIO: (lambda v: [], io.BytesIO, lambda v: [v.getvalue(), v.tell()], _refill_file),
    types.SimpleNamespace: (lambda v: [], types.SimpleNamespace, lambda v: dict(vars(v)), _refill_space),
}  # fmt: skip
_HOLD_DICTS = (collections.Counter, collections.OrderedDict, collections.UserDict, types.SimpleNamespace)
CHANGING_NAMES = {kind.__name__: kind for kind in CHANGING}


def refill(value: Any, content: Any) -> None:
    """Replace the content of a container of CHANGING, or of a list, dict or set. Raises TypeError for content that is
    none."""
    kind = type(value)
    if type(content) is not (dict if kind in _HOLD_DICTS else bytes if kind is bytearray else list):
        raise TypeError(kind.__name__)
    CHANGING[kind][3](value, content)


# Classes that may cross both ways: none does anything when it is called but make such a value.
_DATA = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, object, type(None))
_CLASSES = frozenset({*_DATA, *_FIXED, *CHANGING})
# Modules with exceptions of their own that a worker does without until one of them is named by the other process.
_LATE = frozenset(
    [
        "asyncio.exceptions",
        "asyncio.queues",
        "binascii",
        "concurrent.futures._base",
        "locale",
        "socket",
        "ssl",
        "subprocess",
        "uuid",
    ]
)
# Raised in a test, these would not be a failure but an end of it.
_NOT_RAISED = frozenset({"unittest", "test", "doctest"})


def spelt(value: Any, own_side: bool) -> list[str] | None:
    """[module, name] of a class that both sides have. ``own_side``: this is the test's side, which may name any
    class or built-in function of the standard library: the program's process finds its own."""
    if not isinstance(value, type | types.BuiltinFunctionType):
        return None
    module, name = value.__module__, value.__qualname__
    plain = isinstance(value, type) and (_data(value) or exception_type(module, name) is value)
    if not plain and not (own_side and _found(module, name) is value):
        return None
    return [module, name]


def named(module: Any, name: Any, own_side: bool) -> Any:
    """The class that ``spelt`` named. ``own_side``: this is the program's side, where any name is its own business.
    Raises KeyError for what may not cross."""
    found = _found(module, name, own_side)
    plain = isinstance(found, type) and (_data(found) or exception_type(module, name) is found)
    if found is None or not (plain or own_side):
        raise KeyError(name)
    return found


def _data(kind: type) -> bool:
    return kind in _CLASSES or fixed(kind) is not None


def _found(module: Any, name: Any, bring: bool = False) -> Any:
    """The standard library's class or function. ``bring``: this is the program's side, whose own business it is what
    is imported for the test; the test's side imports nothing for the program but what defines and does no more."""
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    if module.split(".")[0] not in sys.stdlib_module_names:
        return None
    if module not in sys.modules:
        if not bring and module not in _LATE:
            return None
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    if module not in sys.modules:
        return None
    found = vars(sys.modules[module]).get(name)
    return found if isinstance(found, type | types.BuiltinFunctionType) else None


def exception_type(module: Any, name: Any) -> type[BaseException] | None:
    """An exception of the standard library that a program may raise in a test; None for any other."""
    found = _found(module, name)
    if not isinstance(found, type) or not issubclass(found, BaseException) or module.split(".")[0] in _NOT_RAISED:
        return None
    return found if issubclass(found, (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)) else None
