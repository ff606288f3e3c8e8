"""Every key of models.yaml as a JSON schema for editors, out of the sections that check it."""

from __future__ import annotations

import json
from typing import Any

from qtool.batch.models import Batch
from qtool.recipe.reference import WithMeanings, tidy

SCHEMA = "batch.schema.json"


def schema() -> dict[str, Any]:
    """2020-12. It knows the keys of this file; those of `set:` are a recipe's, and checked by `qtool batch` alone."""
    found = Batch.model_json_schema(schema_generator=WithMeanings)
    row = found["properties"]["models"]["items"]
    found["properties"]["models"]["items"] = {"anyOf": [{"type": "string", "minLength": 1}, row]}
    tidy(found)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A list of models of qtool"}
    return head | {key: value for key, value in found.items() if key != "title"}


def schema_text() -> str:
    """As the file that ships beside the recipes."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"
