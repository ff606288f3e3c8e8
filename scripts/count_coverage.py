#!/usr/bin/env python3
"""How many of the models that vLLM publishes recipes for qtool quantizes, and what is missing for the others.

tests/data/coverage/vllm-recipes.yaml names the class of each; whether it is known is asked as `qtool run` asks it, and
the refusal is what a user would read.

Example:
  python scripts/count_coverage.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from qtool import QtoolError
from qtool.convert.files.wrappers import WRAPPERS, text_part
from qtool.convert.models.refusals import refuse_architecture

LIST = Path(__file__).resolve().parent.parent / "tests" / "data" / "coverage" / "vllm-recipes.yaml"
UNTOLD = "("  # how headings begin that name no class


def why_refused(name: str) -> str:
    """Of a class of the list; empty where it is quantized."""
    if name.startswith(UNTOLD):
        return name.strip("()")
    architecture, _, kind = name.partition("/")
    config: dict[str, Any] = {"architectures": [architecture]}
    if kind:  # without one a text's settings stand at the top
        wrapper = WRAPPERS.get(architecture)
        config |= {wrapper.section if wrapper else "text_config": {"model_type": kind}}
    try:
        refuse_architecture(Path(), text_part(config))
    except QtoolError as error:
        return error.message.partition(" is ")[2].partition(" Known: ")[0].rstrip(".")
    return ""


def main() -> int:
    """Print a line for each class, and the share."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    models: dict[str, list[str]] = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    refused = {name: why_refused(name) for name in models}
    total = sum(map(len, models.values()))
    done = sum(len(held) for name, held in models.items() if not refused[name])
    silent = sum(len(held) for name, held in models.items() if name.startswith("(makes"))
    for name, held in sorted(models.items(), key=lambda item: (bool(refused[item[0]]), -len(item[1]))):
        print(f"{len(held):4} {name.strip('()')}: {refused[name] or 'quantized'}")
    print(f"{done} of {total} models are quantized ({done / total:.0%}); of the {total - silent} that write text "
          f"{done / (total - silent):.0%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
