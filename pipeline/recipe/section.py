"""What all sections of a recipe are, and the kinds of values that many of them have."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from qtool.convert.text.source import SHORTEST

# strict: YAML knows numbers, so that `samples: yes` and "64" are mistakes, not 1 and 64
Length = Annotated[int, Field(ge=SHORTEST, le=10**7, strict=True)]
Positive = Annotated[int, Field(gt=0, le=10**6, strict=True)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Text = Annotated[str, Field(min_length=1, max_length=4000)]  # a path, a name, an address


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    later: ClassVar[frozenset[str]] = frozenset()
    """Keys that came after runs were known by this section: where they say nothing, it reads as before."""

    @model_serializer(mode="wrap")
    def _as_asked(self, others: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in self.later}
        unsaid = {name for name, value in plain.items() if getattr(self, name) == value}
        return {name: value for name, value in others(self).items() if name not in unsaid}


class TextSection(Section):
    """A text, by name."""

    text: Text
    """A file, or a data set of the Hub."""
    split: str = "train"
    """Of a data set of the Hub."""
    revision: str | None = None
    """Of a data set of the Hub: a commit, a tag, a branch."""
    column: str | None = None
    """The key of a row that holds its text, where it has another name than usual."""
