"""Where a text for calibration or evaluation comes from, and how much of it is taken."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SHORTEST = 8  # tokens of a window
CODE = (
    *(".py", ".pyi", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java"),
    *(".kt", ".rb", ".php", ".sh", ".sql", ".cs", ".swift", ".scala", ".lua", ".jl", ".r", ".md", ".rst", ".txt"),
    *(".toml", ".yaml", ".yml", ".html", ".css"),
)
FILE_LIMIT = 2 * 10**6  # bytes: larger ones are data


class TextSource(BaseModel):
    """A text, and the windows that are drawn of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[str, Field(min_length=1)]
    """`qtool-code`, which ships; a file of text or of rows; or a data set of the Hub."""
    split: str = "train"
    """Of a data set of the Hub."""
    revision: str | None = None
    """Of a data set of the Hub: a commit, a tag, a branch."""
    column: str | None = None
    """The key of a row that holds its text or messages, where it has another name than usual."""
    samples: Annotated[int, Field(gt=0, le=10**6, strict=True)] = 128
    """Windows of text."""
    length: Annotated[int, Field(ge=SHORTEST, le=10**7, strict=True)] = 512
    """Tokens of a window."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] = 0
    """Which windows are drawn."""
