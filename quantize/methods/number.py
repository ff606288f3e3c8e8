"""A number as recipes write it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


Number = Annotated[float, BeforeValidator(_no_switch)]  # not strict: YAML takes 1e-3 for text
