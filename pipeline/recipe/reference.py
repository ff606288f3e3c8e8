"""Every key of a recipe, out of the very sections that check it: as a JSON schema for editors, as a page for people."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema

from qtool.quantize.methods.table import METHODS
from qtool.recipe.sections import Recipe

SCHEMA = "recipe.schema.json"
LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
EXAMPLES: dict[str, Any] = {  # of keys whose values cannot be listed; by section, where the key alone does not tell
    "ModelSection.id": "./My-Model", "model": "./My-Model", "ModelSection.revision": "main",
    "output_dir": "/data/artifacts", "outputs": [{"method": "awq"}],
    "tasks": [{"task": "humaneval+"}], "gates": [{"max_kld": 0.05}], "task": "humaneval+",
    "TextSource.text": "tickets.jsonl", "FidelitySection.text": "heldout-code",
    "LongSection.text": "./my-repository", "LongSection.length": 131072,
    "conditions": [{"cache": "q8_0"}, {"window": {"sink": 4, "recent": 4096}}], "sink": 8,
    "lengths": [4096, 32768, 131072], "depths": 5, "look_alikes": 12, "each": 4,
    "recent": 2048, "GateSection.long": {"bucket": "64K-128K", "cache": "q8_0"}, "bucket": "64K-128K",
    "split": "train", "revision": "v1.0",
    "column": "prompt", "samples": 64, "TextSource.length": 1024, "FidelitySection.length": [512, 4096], "seed": 7,
    "exponent": 1, "blend": 2.0, "min_tokens": 4096, "damp_percent": 0.05, "propagate_strength": 0.25, "name": "mine",
    "imatrix": "imatrix.gguf", "ignore": ["down_proj", "model.layers.0.*"],
    "GptqMethod.modules": {"down_proj": {"group_size": 32}}, "GgufMethod.modules": {"v_proj": {"type": "Q8_0"}},
    "LinearSettings.bits": 8, "LinearSettings.group_size": 32,
    "budget": {"target_bpw": 4.5}, "mix": {"model.embed_tokens": "Q6_K", "model.layers.0.mlp.up_proj": "Q4_K"},
    "target_bpw": 4.5, "Budget.max_size": "22 GB", "card": "RTX4090", "Fits.context": 32768,
    "fits": {"card": "RTX4090", "context": 32768, "users": 2},
    "pre_tokenizer": "qwen2", "file": "HumanEvalPlus.jsonl.gz", "after": "2025-01-31",
    "before": "2025-06-30", "limit": 100, "base_url": "http://127.0.0.1:8000/v1", "models": {"awq": "my-model-awq"},
    "EvaluateSection.samples": 10, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 1024, "batch_size": 64,
    "timeout": 10.0, "output": "awq", "max_drop": 2, "min_recovery": 0.98, "max_kld": 0.05, "max_size": 5.5,
    "min_bits_saved": 11, "context": [2048, 8192], "ServeSection.context": 8192, "batch": [1, 8], "tokens": 128,
    "repeats": 5, "price": 2.5, "prove": ["vllm"], "users": 8, "dataset": "openai/openai_humaneval",
    "BenchmarkSection.task": "humaneval", "to": "my-org/{model}-{format}", "PublishSection.revision": "v2",
    "license": "apache-2.0", "license_name": "my-licence", "license_link": "LICENSE", "base_model": "my-org/My-Model",
    "benchmarks": {"humaneval": {"dataset": "openai/openai_humaneval", "task": "humaneval"}},
}  # fmt: skip
EVERYWHERE = 2**40  # limits beyond it are those of the machine's numbers, and nobody's business
SECTIONS = {
    "The recipe": "Recipe", "model": "ModelSection", "calibration": "TextSource", "experts": "ExpertSettings",
    **{f"outputs, method {name}": method.__name__ for name, method in METHODS.items()},
    "outputs.modules, method gptq": "LinearSettings", "outputs.modules, method gguf": "TensorSettings",
    "budget": "Budget", "budget.fits": "Fits",
    "evaluate": "EvaluateSection", "evaluate.tasks": "TaskSection", "evaluate.text": "FidelitySection",
    "evaluate.tasks.made": "MadeSection", "evaluate.long": "LongSection", "evaluate.conditions": "ConditionSection",
    "evaluate.conditions.window": "WindowSection",
    "measure": "MeasureSection", "serve": "ServeSection", "gates": "GateSection", "gates.long": "LongGate",
    "publish": "PublishSection",
    "publish.benchmarks": "BenchmarkSection",
}  # fmt: skip


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """Key -> the text below it, out of the source of the class and of those it inherits from. pydantic can collect
    them, but does it whenever a class is made: at every start of qtool, for what only this module reads."""
    found: dict[str, str] = {}
    for one in reversed(section.__mro__):
        if not issubclass(one, BaseModel) or one.__module__.startswith("pydantic"):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        except OSError:  # made while qtool runs, of sections that have one
            continue
        assert isinstance(tree, ast.ClassDef)
        for key, below in pairwise(tree.body):
            match key, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return {key: found[key] for key in section.model_fields if key in found}


class WithMeanings(GenerateJsonSchema):
    """A JSON schema whose keys have their meanings as descriptions."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        """As pydantic makes it, each property described."""
        made = super().model_schema(schema)
        for key, text in meanings(schema["cls"]).items():
            made["properties"][key].setdefault("description", text)
        return made


def schema() -> dict[str, Any]:
    """The JSON schema of recipes (2020-12). It knows keys, types, values and limits of each key; what keys have to do
    with one another is checked by `qtool run --dry-run` alone."""
    found = Recipe.model_json_schema(schema_generator=WithMeanings)
    found["properties"]["model"]["anyOf"] = [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/ModelSection"}]
    found["properties"]["model"].pop("$ref")
    tidy(found)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A recipe of qtool"}
    return head | {key: value for key, value in found.items() if key != "title"}


def schema_text() -> str:
    """As the file that ships beside the recipes."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def tidy(node: Any) -> None:
    """Limits under the names that JSON schema has for them, texts in one line, no titles."""
    if isinstance(node, list):
        for part in node:
            tidy(part)
    if not isinstance(node, dict):
        return
    for ours, name in LIMITS.items():
        if isinstance(node.get(ours), int | float):
            node[name] = node.pop(ours)
    if isinstance(node.get("title"), str):
        node.pop("title")
    if isinstance(node.get("description"), str):
        node["description"] = " ".join(node["description"].replace("``", "`").split())
    for part in node.values():
        tidy(part)


def markdown() -> str:
    """`docs/recipe.md`: what a person writes by hand, then a table for each section."""
    page = files("qtool.recipe").joinpath("data/recipe.md").read_text(encoding="utf-8")
    return page.replace("<!-- keys -->\n", "\n".join(_tables(schema())))


def _tables(found: dict[str, Any]) -> Iterator[str]:
    for title, name in SECTIONS.items():
        section = found if name == "Recipe" else found["$defs"][name]
        about = "" if name == "Recipe" else re.sub(r"^`[a-z]+:` ", "", section.get("description", ""))
        yield f"### {title}\n"
        if about:
            yield f"{about[0].upper()}{about[1:]}\n"
        yield "| key | type | default | meaning | example |\n|---|---|---|---|---|"
        keys = section["properties"]
        for key in sorted(keys, key=lambda key: key not in ("method", "name")):
            needed = key in section.get("required", ())
            default = "required" if needed else _default(keys[key].get("default"), keys[key])
            shown = (f"`{key}`", _type(keys[key], found), default, _cell(_meaning(keys[key], found)))
            yield f"| {' | '.join(shown)} | {_example(name, key, keys[key])} |"
        yield ""


def _meaning(about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Of a section without words of its own here, the section's."""
    at = str(about.get("$ref", "")).rpartition("/")[2]
    return str(about.get("description") or found["$defs"].get(at, {}).get("description", ""))


def example(section: str, key: str, about: Mapping[str, Any]) -> Any:
    """A value for a key: of those that can be listed another than the default. None for a section of its own."""
    told = EXAMPLES.get(f"{section}.{key}", EXAMPLES.get(key))
    if told is not None:
        return told
    if "anyOf" in about:
        return example(section, key, about["anyOf"][0])
    if about.get("type") == "boolean" and "const" not in about:
        return not about.get("default")
    values = about.get("enum", [about["const"]] if "const" in about else [about.get("default")])
    return next((value for value in values if value != about.get("default")), values[0])


def _example(section: str, key: str, about: Mapping[str, Any]) -> str:
    value = example(section, key, about)
    if value is None or (isinstance(value, dict) and not {key, f"{section}.{key}"} & set(EXAMPLES)):
        return ""
    said = str(value) if isinstance(value, str) else json.dumps(value)
    return f"`{key}: {_cell(said)}`"


def _default(value: Any, about: dict[str, Any]) -> str:
    if value is None or (value in ([], {}) and "$ref" not in about):
        return ""
    return "its own" if isinstance(value, dict) else f"`{json.dumps(value).strip(chr(34))}`"


def _type(about: dict[str, Any], whole: dict[str, Any]) -> str:
    """`whole number, 8 to 10,000,000`; of several kinds each."""
    if "const" in about or "enum" in about:
        return _cell(
            ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in about.get("enum", [about.get("const")]))
        )
    if "$ref" in about:
        return "keys (below)"
    if "anyOf" in about or "oneOf" in about:
        kinds = [part for part in about.get("anyOf", about.get("oneOf", [])) if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(_type(part, whole) for part in kinds))
    kind = about.get("type", "")
    if kind == "array":
        return f"list of {_type(about['items'], whole)}"
    if kind == "object":
        return f"name: {_type(about['additionalProperties'], whole)}"
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + _limits(about)
    return {"boolean": "`true`, `false`", "string": "day" if about.get("format") == "date" else "text"}[kind]


def _limits(about: dict[str, Any]) -> str:
    low, high = about.get("minimum"), about.get("maximum")
    above, below = about.get("exclusiveMinimum"), about.get("exclusiveMaximum")
    if low is not None and abs(low) > EVERYWHERE:
        low = high = above = below = None
    numbers = (f"{n:,.0f}" if n is not None and n == int(n) else str(n) for n in (low, high, above, below))
    from_, to, over, under = numbers
    said = [f"from {from_}" if low is not None else f"above {over}" if above is not None else ""]
    said += [f"to {to}" if high is not None else f"below {under}" if below is not None else ""]
    told = " ".join(filter(None, said))
    return f", {told}" if told else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
