"""models.yaml: a list of models, each with a recipe and what is set in it; checked whole, every fault at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, create_model, model_validator

from qtool import QtoolError
from qtool.batch.engine import label_of
from qtool.batch.table import ENGINES
from qtool.convert.files.reading import named, read_text
from qtool.convert.files.source import SHIPPED, name_of
from qtool.quantize.methods.number import Number
from qtool.recipe.checking import checked, read
from qtool.recipe.overrides import path_of, text_of
from qtool.recipe.paths import locate
from qtool.recipe.section import Positive, Section, Text
from qtool.recipe.sections import Recipe, checked_recipe
from qtool.recipe.yaml_file import read_yaml

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")]
Hours = Annotated[Number, Field(gt=0, le=10_000)]
DEFAULT = "awq"
RECIPES = ("name", "model", "recipe", "set")  # keys that say what a model's recipe is


class Settings(Section):
    """What models.yaml says of all models, and any model of itself."""

    recipe: Text | None = None
    """A recipe that ships, by name, or a file."""
    set: Mapping[str, Any] = {}
    """Values put into the recipe, by path, as `--set` does; a model's own come on top of all models'."""
    card: Text | None = None
    """The card, as `qtool plan --gpu` names it, or `cpu`; the smallest that holds the job otherwise."""
    gpus: Annotated[int, Field(ge=1, le=64, strict=True)] | None = None
    """Cards that make a model's artifacts together."""
    processors: Positive | None = None
    """Processor cores of a job, 8 where nobody says it. On `card: cpu` their number decides bytes."""
    hours: Hours | None = None
    """After which an engine may end a job; twice what past runs took otherwise, an hour at least; no limit where there
    are none."""


class Model(Settings):
    """A model of the list; a text is short for `model:`."""

    name: Name | None = None
    """What its run and its job are called; the model's name otherwise."""
    model: Text | None = None
    """The source: short for `set: {model: …}`."""
    shape: Text | None = None
    """Folder or config.json of the same shape, where the model is not on this machine."""


class Models(Settings):
    """models.yaml."""

    models: Annotated[tuple[Model, ...], Field(min_length=1, max_length=10_000)]
    """The models."""
    image: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}$")] | None = None
    """Of containers: one in which qtool is."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("models"), list):
            return value | {"models": [{"model": one} if isinstance(one, str) else one for one in value["models"]]}
        return value

    def of(self, engine: str) -> Section:
        """The engine's own section."""
        section = getattr(self, engine)
        assert isinstance(section, Section)
        return section


_OWN: dict[str, Any] = {name: (engine.section, engine.section()) for name, engine in ENGINES.items()}
Batch = create_model("Batch", __base__=Models, __doc__=Models.__doc__, **_OWN)


@dataclass(frozen=True)
class Asked:
    """A model of the list with its checked recipe. ``text``: of the recipe, with what is set in it; ``said``: the
    model's settings, those of all models where it has none."""

    name: str
    recipe: Recipe
    text: str
    said: Model

    @property
    def model_name(self) -> str:
        """What its artifacts are called after."""
        return _model_name(self.recipe.model.id)

    def folders(self) -> dict[str, Path]:
        """Output -> where its artifact goes."""
        made = named(self.recipe.output_dir)
        return {output.name: made / f"{self.model_name}-{output.name}" for output in self.recipe.outputs}


def load_batch(path: Path) -> tuple[Models, list[Asked]]:
    """The file and every model's recipe, checked. Raises QtoolError listing the faults of all."""
    if not path.exists():
        raise QtoolError(f"{path}: No such file or directory. docs/batch.md has one to begin with.")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise QtoolError(f"{path}: a mapping with `models:` is needed.")
    faults: list[str] = []
    found: Models | None = None
    try:
        found = checked(data, str(path), Batch, "list of models")
    except QtoolError as error:
        faults.append(error.message)
    asked = []
    for number, model in _readable(data, found):
        try:
            asked.append(_asked(model))
        except QtoolError as error:
            faults.append(f"{path}: models[{number}]: {error.message}")
    faults += [f"{path}: {fault}" for fault in _clashes(asked)]
    if faults or found is None:
        raise QtoolError("\n".join(faults))
    return found, asked


def _readable(data: Mapping[str, Any], found: Models | None) -> list[tuple[int, Model]]:
    """Models with the settings of all in them; of a file with faults those whose recipe can be told."""
    common = {key: value for key, value in data.items() if key in Settings.model_fields}
    listed = data.get("models")
    models = []
    for number, row in enumerate(listed if isinstance(listed, list) else []):
        own = {"model": row} if isinstance(row, str) else row
        if not isinstance(own, dict):
            continue
        put = [some for some in (common.get("set"), own.get("set")) if isinstance(some, dict)]
        whole = common | own | {"set": {key: value for some in put for key, value in some.items()}}
        if found is None:
            whole = {key: value for key, value in whole.items() if key in RECIPES}
        try:
            models.append((number, checked(whole, "", Model)))
        except QtoolError:
            if found is not None:
                raise
    return models


def _asked(model: Model) -> Asked:
    path = locate(Path(model.recipe or DEFAULT))
    typed = dict(model.set) | ({"model": model.model} if model.model else {})
    overrides = {path_of(key, f"{key}={value}"): value for key, value in typed.items()}
    data = read(path, overrides)
    text = text_of(read_text(path), overrides, data)
    recipe = checked_recipe(data, f"{path.name} with {', '.join(overrides)} set" if overrides else str(path))
    return Asked(model.name or _slug(_model_name(recipe.model.id)), recipe, text, model)


def _model_name(model: str) -> str:
    if model in SHIPPED:
        return model
    path = named(model)
    return name_of(path) if path.is_dir() or model.count("/") != 1 else name_of(Path(model.split("/")[1]))


def _slug(name: str) -> str:
    """A run's name out of a model's."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).strip("._-")[:60]
    return plain or "model"


def _clashes(asked: Sequence[Asked]) -> list[str]:
    """Two models with one name, or two that would be made in one folder."""
    labels = Counter(label_of(one.name) for one in asked)
    faults = [
        f"several models are called {name!r} (capitals and dots aside); give each its own `name:`"
        for name, count in labels.items()
        if count > 1
    ]
    folders = Counter(folder for one in asked for folder in one.folders().values())
    return faults + [
        f"several models are made in {folder}; give their outputs names (`set: {{outputs.0.name: mine}}`), or another "
        "`output_dir`"
        for folder, count in folders.items()
        if count > 1
    ]
