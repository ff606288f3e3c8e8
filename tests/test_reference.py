"""docs/recipe.md and the JSON schema say what the code checks: each key, with a meaning and a value that it takes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel, TypeAdapter, ValidationError

from qtool.cli import main
from qtool.quantize.methods.table import METHODS
from qtool.recipe import reference
from qtool.recipe.faults import _models
from qtool.recipe.paths import EDITORS
from qtool.recipe.sections import Recipe, checked_recipe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")


def sections(model: type[BaseModel], found: dict[str, type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """Name -> section, the recipe's own and all below it."""
    if model.__name__ not in found:
        found[model.__name__] = model
        for field in model.model_fields.values():
            for below in _models(field.annotation):
                sections(below, found)
    return found


ALL = sections(Recipe, {})
KEYS = [(name, key) for name, section in ALL.items() for key in section.model_fields]


def test_what_is_committed_is_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for path, make in script.WRITTEN.items():
        assert path.read_text(encoding="utf-8") == make(), f"{path.name}: run scripts/write_reference.py"


def test_every_section_has_a_table() -> None:
    assert set(reference.SECTIONS.values()) == set(ALL)
    assert {METHODS[name].__name__ for name in METHODS} <= set(ALL)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return reference.schema()


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_key_has_a_meaning_and_an_example_that_it_takes(section: str, key: str, schema: dict[str, Any]) -> None:
    field = ALL[section].model_fields[key]
    assert reference.meanings(ALL[section])[key], "say what it means, below the key"
    table = PAGE.split(f"### {next(title for title, name in reference.SECTIONS.items() if name == section)}\n")[1]
    assert f"\n| `{key}` | " in table.partition("\n### ")[0]
    about = schema if section == "Recipe" else schema["$defs"][section]
    value = reference.example(section, key, about["properties"][key])
    if value is None or (isinstance(value, dict) and key not in reference.EXAMPLES):
        return
    if (section, key) == ("Recipe", "model"):
        return  # short for a section, as the page's recipes are read below
    TypeAdapter[Any](field.annotation).validate_python(value)  # type: ignore[arg-type]  # every key has one
    methods = [name for name, one in METHODS.items() if one is ALL[section]]
    whole = {"method": methods[0]} if methods else {}
    assert (key,) not in places_of_faults(ALL[section], {**whole, key: value}), "wrong with its limits"


def places_of_faults(section: type[BaseModel], data: dict[str, Any]) -> list[tuple[int | str, ...]]:
    """Where ``data`` is wrong; another key may be missing, or may not go with this one."""
    try:
        section.model_validate(data)
    except ValidationError as error:
        return [fault["loc"] for fault in error.errors()]
    return []


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_recipes_on_the_page_are_recipes(block: str) -> None:
    checked_recipe(yaml.safe_load(block), "docs/recipe.md")


@pytest.mark.parametrize("row", re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0].splitlines())
def test_rows_on_the_page_are_rows(row: str) -> None:
    import json

    from qtool.convert.text.shapes import row_of

    assert "add" in str(row_of(json.loads(row), None, "docs/recipe.md")).lower()


def test_recipes_that_ship_name_the_schema_beside_them() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == f"{EDITORS} $schema={reference.SCHEMA}"
        assert (path.parent / first.partition("$schema=")[2]).is_file()


def resolved(schema: dict[str, Any], *path: str) -> Any:
    found: Any = schema
    for part in path:
        found = found[part]
    return found


def test_the_schema_says_limits_values_and_that_nothing_else_may_stand_there() -> None:
    schema = reference.schema()
    assert schema["additionalProperties"] is False
    assert resolved(schema, "$defs", "AwqMethod", "properties", "group_size", "enum") == [32, 64, 128]
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())
    drop = resolved(schema, "$defs", "GateSection", "properties", "max_drop", "anyOf")[0]
    assert (drop["minimum"], drop["maximum"]) == (0, 100)
    above = resolved(schema, "$defs", "GateSection", "properties", "max_kld", "anyOf")[0]
    assert above["exclusiveMinimum"] == 0
    assert {kind.get("type") for kind in schema["properties"]["model"]["anyOf"]} == {"string", None}


def test_meanings_are_those_below_the_keys_and_cost_no_start() -> None:
    class Upper(BaseModel):
        one: int = 1
        """The first.

        Of two."""
        two: int = 2

    class Lower(Upper):
        two: int = 3
        """Said here."""

    assert reference.meanings(Lower) == {"one": "The first.\n\nOf two.", "two": "Said here."}
    made = Lower.model_json_schema(schema_generator=reference.WithMeanings)
    assert [made["properties"][key]["description"] for key in ("one", "two")] == ["The first.\n\nOf two.", "Said here."]
    assert not [name for name, section in ALL.items() if section.model_config.get("use_attribute_docstrings")]


def test_the_command_prints_both() -> None:
    run = CliRunner()
    assert run.invoke(main, ["recipes", "--schema"]).output == (ROOT / "recipes" / reference.SCHEMA).read_text()
    assert run.invoke(main, ["recipes", "--keys"]).output == PAGE
