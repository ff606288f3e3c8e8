"""numpy's arrays and numbers, where a task brings numpy: as bytes, and made again. Objects inside are refused."""

import re
import sys
from typing import Any

from qtool.evaluate.frames import NotPlain

_DTYPE = re.compile(r"[<>|=][biufcSU]\d{1,6}")


def parts(value: Any) -> Any:
    """A numpy array or scalar of plain numbers or texts; None for what only looks like one."""
    numpy = sys.modules.get("numpy")
    if numpy is None or (type(value) is not numpy.ndarray and not isinstance(value, numpy.generic)):
        return None
    held = numpy.asarray(value)
    if not _DTYPE.fullmatch(held.dtype.str):
        return None
    shape = None if isinstance(value, numpy.generic) else list(held.shape)
    return {"n": [held.dtype.str, shape, held.tobytes().hex()]}


def made(dtype: Any, shape: Any, data: Any) -> Any:
    numpy = sys.modules["numpy"]
    if not _DTYPE.fullmatch(dtype):
        raise NotPlain("not a value (an array of objects)")
    values = numpy.frombuffer(bytes.fromhex(data), dtype=dtype)
    return values.reshape(shape).copy() if shape is not None else values[0]
