"""What an output may take, where its types are chosen for that: a section of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qtool.quantize.methods.number import Number

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_TOKENS = re.compile(r"(\d+)\s*[kK]")


def _bytes(value: Any) -> Any:
    """`22 GB`, `900 MB`, `20.5 GiB` -> bytes."""
    said = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if said is None or said[2].upper() not in UNITS:
        raise ValueError("a size is needed, as `22 GB`, `900 MB` or `20.5 GiB`")
    return int(float(said[1]) * UNITS[said[2].upper()])


def _tokens(value: Any) -> Any:
    """`32k` -> 32768."""
    said = _TOKENS.fullmatch(value) if isinstance(value, str) else None
    return int(said[1]) * 1024 if said else value


class Fits(BaseModel):
    """`fits:` a card, and what it is to hold beside the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    card: Annotated[str, Field(min_length=1)]
    """As `qtool plan --gpu` names it."""
    context: Annotated[int, BeforeValidator(_tokens), Field(gt=0, le=2**22)]
    """Tokens of each user: 32768, or `32k`."""
    users: Annotated[int, Field(gt=0, le=4096, strict=True)] = 1
    """At once."""


class Budget(BaseModel):
    """`budget:` one of four ways to say how large a file may be; each matrix then gets the type that serves the whole
    model best."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_bpw: Annotated[Number, Field(gt=0, le=16)] | None = None
    """Bits of all tensors over the model's weights."""
    max_size: Annotated[str, Field(min_length=1)] | None = None
    """Of the file on the disk: `22 GB`."""
    fits: Fits | None = None
    """A card that must hold the model, its cache and what the engine needs."""
    max_kld: Annotated[Number, Field(gt=0)] | None = None
    """The smallest file that is expected to keep this, in nats a token."""

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"one of target_bpw, max_size, fits and max_kld is needed; {said}")
        if self.max_size is not None:
            _bytes(self.max_size)
        return self

    @property
    def max_bytes(self) -> int | None:
        """Of `max_size`."""
        return None if self.max_size is None else int(_bytes(self.max_size))

    def __str__(self) -> str:
        """As a recipe says it."""
        (name,) = (name for name in type(self).model_fields if getattr(self, name) is not None)
        value = getattr(self, name)
        if isinstance(value, Fits):
            return f"fits {value.card} with {value.context:,} tokens for {value.users}"
        return f"{name} {value}"
