"""A number as recipes write it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


# not strict: YAML takes 1e-3 for text
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_switch)]
