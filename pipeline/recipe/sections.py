"""Recipes: YAML in, one checked object out; every error at once, each with its path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, field_validator, model_validator

from qtool.convert.files.folder import PARTIAL
from qtool.convert.text.source import TextSource
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.table import METHODS
from qtool.quantize.routed import ExpertSettings
from qtool.recipe.checking import checked, digest_of, load
from qtool.recipe.judging import (
    EvaluateSection,
    GateSection,
    MeasureSection,
    PublishSection,
    ServeSection,
)
from qtool.recipe.overrides import NONE, Overrides
from qtool.recipe.section import Section, Text

if TYPE_CHECKING:
    OutputSection = Method
else:  # what pydantic reads a section with: the method that its key `method` names
    OutputSection = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007  # `|` takes no tuple


class ModelSection(Section):
    """`model:` a local folder or Hub id; as a string, or with a revision and leave to run the model's own code."""

    id: Text
    """A folder of safetensors, a Hub id (org/name), or `qtool-demo`, which ships. `model: NAME` is short for it."""
    revision: str | None = None
    """Of the Hub: a commit, a tag, a branch. The run's lock.json has the commit."""
    trust_remote_code: bool = False
    """Let Python code that the model brings along run here."""


class Recipe(Section):
    """One conversion: source, calibration, outputs, evaluation, measurement, servers, gates, where it is published."""

    model: ModelSection
    """The unquantized source."""
    calibration: TextSource = TextSource(text="qtool-code")
    """The text that methods look at."""
    experts: ExpertSettings = ExpertSettings()
    """How the experts of a mixture are calibrated."""
    outputs: tuple[OutputSection, ...]
    """What is made, all of it from one read of the weights."""
    evaluate: EvaluateSection = EvaluateSection()
    """What source and outputs are asked, alike."""
    measure: MeasureSection | None = None
    """Memory and speed of source and outputs on this machine."""
    serve: ServeSection | None = None
    """Real servers that each output is proved in."""
    gates: tuple[GateSection, ...] = ()
    """What outputs must keep; `qtool run` and `qtool check` end with 1 where one fails."""
    publish: PublishSection | None = None
    """Where `qtool publish` takes what passed."""
    output_dir: Text = "artifacts"
    """The folder in which artifacts are made, each called MODEL-OUTPUT."""

    @field_validator("model", mode="before")
    @classmethod
    def _plain_id(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value

    @field_validator("output_dir")
    @classmethod
    def _possible(cls, value: str) -> str:
        long = [part for part in Path(value).parts if len(part.encode("utf-8", "replace")) > 200]
        if long:
            raise ValueError(f"a folder's name has {len(long[0])} characters; file systems take 255 bytes")
        return value

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        names = [output.name for output in self.outputs]
        if not names:
            raise ValueError("`outputs:` is empty; name at least one, for example `- method: awq`")
        for name in names:
            if name.endswith(PARTIAL):
                raise ValueError(f"an output is named {name!r}, as the folder is in which another grows; rename it")
            if names.count(name) > 1:
                raise ValueError(f"two outputs are named {name!r}; give each its own `name:`")
        for gate in self.gates:
            if gate.output not in (None, *names):
                raise ValueError(f"a gate names output {gate.output!r}; the recipe has {', '.join(names)}")
            if fault := gate.fault(self.evaluate):
                raise ValueError(fault)
        return self

    @property
    def digest(self) -> str:
        """Identifies the work: everything but measurements, which the ledger has, proofs, which artifacts have, the
        gates, which only judge it, and where it is published."""
        return digest_of(self.model_dump(mode="json", exclude={"measure", "serve", "gates", "publish"}))


def load_recipe(path: Path, overrides: Overrides = NONE) -> Recipe:
    """Read a recipe, with ``overrides`` in it. Raises QtoolError listing every fault with its path in the file."""
    return load(path, Recipe, overrides)


def checked_recipe(data: dict[str, Any], where: str) -> Recipe:
    """``data`` as a recipe. Raises QtoolError listing every fault, ``where`` in front."""
    return checked(data, where, Recipe)
