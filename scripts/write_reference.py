"""Write what is told of a recipe's keys out of the code that checks them: docs/recipe.md, and the JSON schemas of
recipes and of models.yaml that ship beside the recipes. tests/test_reference.py fails where they are not current."""

from __future__ import annotations

import argparse
from pathlib import Path

from qtool.batch import reference as batch
from qtool.recipe.reference import SCHEMA, markdown, schema_text

ROOT = Path(__file__).parent.parent
WRITTEN = {
    ROOT / "docs" / "recipe.md": markdown,
    ROOT / "recipes" / SCHEMA: schema_text,
    ROOT / "recipes" / batch.SCHEMA: batch.schema_text,
}

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path, make in WRITTEN.items():
        path.write_text(make(), encoding="utf-8")
        print(path.relative_to(ROOT))
