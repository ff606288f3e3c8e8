"""What a recipe says of long texts, and of how keys and values are kept meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from qtool.convert.text.source import TextSource
from qtool.evaluate.buckets import BLOCK, foretold
from qtool.evaluate.engines.condition import Condition
from qtool.evaluate.engines.table import ENGINES
from qtool.recipe.section import Length, Section, Text, TextSection

Tokens = Annotated[int, Field(ge=1, le=10**7, strict=True)]

if TYPE_CHECKING:  # a Literal, whose faults `recipe.faults` tells, but mypy wants its values spelt out
    CacheName = str
else:
    CacheName = Literal[
        tuple(dict.fromkeys(kind.name for engine in ENGINES.values() for kind in engine.facts.judged_caches))
    ]


class MadeSection(Section):
    """`made:` of a task whose problems are made here (`long-call`, `long-combine`, `long-change`)."""

    lengths: Annotated[tuple[Annotated[int, Field(ge=512, le=10**7, strict=True)], ...], Field(min_length=1)] = (
        2048, 8192,
    )  # fmt: skip
    """Tokens of a prompt, in the model's own."""
    depths: Annotated[int, Field(ge=1, le=21, strict=True)] = 3
    """How many places of a file are tried, from its beginning to its end."""
    look_alikes: Annotated[int, Field(ge=0, le=100, strict=True)] = 6
    """Of what is asked for; as many problems are made without any, for control."""
    each: Annotated[int, Field(ge=1, le=1000, strict=True)] = 2
    """Problems of each length and depth, with look-alikes and without."""
    seed: int = 0
    """Which problems are made."""


class LongSection(TextSection):
    """`long:` one long text, along which KL, agreement and perplexity are told by position."""

    text: Text
    """A folder (its files of code and prose, in the order of their paths), a file, `heldout-code`, or a data set."""
    length: Length = 32768
    """Tokens, from the text's beginning."""

    @model_validator(mode="after")
    def _foretold(self) -> LongSection:
        if (fits := foretold(self.length)) != self.length:
            raise ValueError(
                f"length: {self.length} leaves one token to its last block of {BLOCK}, behind which nothing comes that "
                f"it could foretell; set `length: {fits}`"
            )
        return self

    @property
    def source(self) -> TextSource:
        """Its one window."""
        return TextSource(
            text=self.text, split=self.split, revision=self.revision, column=self.column, samples=1, length=self.length
        )


class WindowSection(Section):
    """`window:` a rolling cache with sinks (StreamingLLM)."""

    sink: Annotated[int, Field(ge=0, le=64, strict=True)] = 4
    """First tokens that stay."""
    recent: Tokens = 4096
    """Last tokens that stay."""


class LongGate(Section):
    """`long:` of a gate: which part of the long text, and under which condition."""

    bucket: Text | None = None
    """Its positions, as reports name them; left out: the whole text."""
    cache: CacheName | None = None
    """Of the condition: one that `conditions:` has; left out with `window:`: the model's own cache."""
    window: WindowSection | None = None
    """Of the condition, too."""

    @property
    def condition(self) -> Condition:
        """As engines take it."""
        return condition_of(self.cache, self.window)


class ConditionSection(Section):
    """One way to keep keys and values. Scores under it are compared with none of another."""

    cache: CacheName | None = None
    """Type of the cache. llama.cpp and vLLM keep it so; reference and transformers simulate it, and say so."""
    window: WindowSection | None = None
    """Let go of all but the first and the last tokens."""

    @model_validator(mode="after")
    def _something(self) -> ConditionSection:
        if self.cache is None and self.window is None:
            raise ValueError("a condition names a `cache:`, a `window:` or both")
        return self

    @property
    def condition(self) -> Condition:
        """As engines take it."""
        return condition_of(self.cache, self.window)


def condition_of(cache: str | None, window: WindowSection | None) -> Condition:
    """As engines take what a recipe says."""
    return Condition(cache or "", *((window.sink, window.recent) if window else ()))
