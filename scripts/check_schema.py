"""Hold the recipes' JSON schema against a validator of others: what ships is valid, mistakes are not. Needs `pip
install jsonschema PyYAML` and nothing of qtool; ends with 1 where an editor would be told something wrong."""

from __future__ import annotations

import argparse
import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent.parent / "recipes"
BASE = {"model": "x", "outputs": [{"method": "awq"}]}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("a misspelt key", {"modle": "x"}),
    ("a misspelt key of an output", {"outputs": [{"method": "awq", "groupsize": 64}]}),
    ("a method that is none", {"outputs": [{"method": "awk"}]}),
    ("a size of groups that is none", {"outputs": [{"method": "awq", "group_size": 48}]}),
    ("text for a number", {"calibration": {"text": "a.txt", "samples": "many"}}),
    ("a number out of its limits", {"gates": [{"max_drop": 101}]}),
    ("a gate of no number", {"gates": [{"max_kld": 0}]}),
    ("a model without a name", {"model": {"revision": "main"}}),
]


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    import jsonschema

    schema = json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    faults = []
    shipped = sorted(RECIPES.glob("*.yaml"))
    for path in shipped:
        data = json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), default=str))
        faults += [f"{path.name}: {error.json_path}: {error.message}" for error in validator(schema).iter_errors(data)]
    for what, change in WRONG:
        if validator(schema).is_valid({**deepcopy(BASE), **change}):
            faults.append(f"{what} is valid: {change}")
    print(*faults, sep="\n")
    print(f"{len(shipped)} recipes that ship, {len(WRONG)} mistakes: {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
