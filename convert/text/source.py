"""Where a text for calibration or evaluation comes from, and how much of it is taken."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class TextSource(BaseModel):
    """``text``: a name in SHIPPED, a file of text or of rows, or a Hub data set with its ``split`` and
    ``revision``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[str, Field(min_length=1)]
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    samples: Annotated[int, Field(gt=0, le=10**6, strict=True)] = 128
    length: Annotated[int, Field(ge=8, le=10**7, strict=True)] = 512
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] = 0
