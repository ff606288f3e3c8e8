"""An exception as plain values, and made again on the other side of the pipe: its type, arguments, text, attributes."""

import contextlib
from typing import Any

from qtool.evaluate.sandbox import stdlib_values as library

MAX_TEXT = 100_000
_DEPTH = 4
# Attributes that some of Python's own exceptions keep outside their dictionary.
_OWN = {
    OSError: ("filename", "filename2"),
    ImportError: ("name", "path"),
    AttributeError: ("name", "obj"),
    NameError: ("name",),
    SyntaxError: ("filename", "lineno", "offset", "text", "msg"),
    SystemExit: ("code",),
}


def parts(error: BaseException, depth: int = 0) -> list[Any]:
    """[class's name, its bases as [module, name], args, text, attributes, cause, context] of an exception."""
    kind = type(error)
    lines = [(each, [each.__module__, each.__qualname__]) for each in kind.__mro__]
    bases = [name for each, name in lines if library.exception_type(*name) is each]
    try:
        text = str(error)[:MAX_TEXT]
    except BaseException:
        text = "?"
    attributes = {name: value for name, value in vars(error).items() if isinstance(name, str)}
    for base, names in _OWN.items():
        if isinstance(error, base):
            attributes |= {name: value for name in names if (value := getattr(error, name, None)) is not None}
    attributes = {name: value for name, value in attributes.items() if name != "obj"}
    before = (error.__cause__, error.__context__ if error.__cause__ is None else None)
    spelt = [None if each is None or depth >= _DEPTH else parts(each, depth + 1) for each in before]
    return [kind.__name__, bases, tuple(error.args), text, attributes, *spelt]


def made(given: list[Any], classes: dict[str, type]) -> BaseException:
    """The exception of ``parts``: of the class in ``classes`` that has its name, else of its nearest standard types.
    Raises TypeError and the like for parts that are none."""
    name, bases, args, text, attributes, cause, context = given
    if type(name) is not str or type(text) is not str or type(args) is not tuple:
        raise TypeError("not an exception")
    kinds = [each for base in bases if (each := library.exception_type(*base)) is not None]
    own = classes.get(name)
    if isinstance(own, type) and issubclass(own, Exception):
        kind: type[BaseException] = own
    else:
        # What is no Exception there is none here: a test's `except Exception` must not take it.
        kind = _kind(name, kinds or [GeneratorExit])
    error = _filled(kind, args, attributes)
    if _text(error) != text:
        # A __str__ of the program's own: its text stands for it.
        said = {"__str__": lambda self: text, "__module__": kind.__module__}
        error = _filled(type(kind.__name__, (kind,), said), args, attributes)
    if cause is not None:
        error.__cause__ = made(cause, classes)
    if context is not None:
        error.__context__ = made(context, classes)
    return error


def _text(error: BaseException) -> str | None:
    try:
        return str(error)
    except Exception:  # a __str__ of the program's own: it has no text then
        return None


def _filled(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    error = _new(kind, args)
    for key, value in attributes.items():
        if (type(key) is str and not key.startswith("__")) or key == "__notes__":
            with contextlib.suppress(AttributeError, TypeError, ValueError):
                setattr(error, key, value)
    return error


def _kind(name: str, kinds: list[type[BaseException]]) -> type[BaseException]:
    first = kinds[0]
    if first.__name__ == name:
        return first
    # Only the nearest of each line: an exception may have two.
    bases = [kind for kind in kinds if not any(other is not kind and issubclass(other, kind) for other in kinds)]
    try:
        return type(name, tuple(bases), {"__module__": "candidate"})
    except TypeError:
        return type(name, (first,), {"__module__": "candidate"})


def _new(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    try:
        error = kind(*args)
    except Exception:  # an __init__ of anybody's own
        # Some want other arguments than they keep (UnicodeDecodeError, one's own).
        error = kind.__new__(kind, *args)
    try:
        if error.args != args:
            error.args = args
    except Exception:  # args may be a property without a setter
        error.args = args
    return error
