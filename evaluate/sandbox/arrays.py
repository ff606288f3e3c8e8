"""numpy's arrays, where a task brings numpy: as bytes, and made again. Arrays of objects are refused."""

import re
import sys
from typing import Any

from qtool.evaluate.sandbox.frames import NotPlain

_DTYPE = re.compile(r"[<>|=][biufcSU]\d{1,6}")


def number(value: Any) -> bool:
    """Whether ``value`` is a single number or text of numpy's, which travels as Python's own."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic) and bool(_DTYPE.fullmatch(value.dtype.str))


def parts(value: Any) -> dict[str, Any] | None:
    """The node of an array of plain numbers or texts; None for what only looks like one."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray or not _DTYPE.fullmatch(value.dtype.str):
        return None
    return {"n": [value.dtype.str, list(value.shape), value.tobytes().hex()]}


def made(dtype: Any, shape: Any, data: Any) -> Any:
    """The array of a node. Raises NotPlain, KeyError, TypeError or ValueError for what is none."""
    if not _DTYPE.fullmatch(dtype):
        raise NotPlain("not a value (an array of objects)")
    return sys.modules["numpy"].frombuffer(bytes.fromhex(data), dtype=dtype).reshape(shape).copy()
