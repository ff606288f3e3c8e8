"""What is wrong with a recipe, in a user's words: every fault with its path, what is allowed there, what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Loc = tuple[int | str, ...]
_KINDS = {str: "text", dict: "a mapping", list: "a list", bool: "true or false", type(None): "empty", int: "a number",
          float: "a number"}  # fmt: skip


def sentences(error: ValidationError, recipe: type[BaseModel]) -> list[str]:
    """One line for each fault; of a value that may be one of several kinds, the first."""
    faults: dict[str, str] = {}
    for fault in error.errors():
        if _miscounted(fault):
            continue
        faults.setdefault(place(fault["loc"], recipe), _say(fault, recipe))
    return [f"  {where}: {said}" for where, said in faults.items()]


def _miscounted(fault: Any) -> bool:
    """Whether a list is called too short because pydantic leaves out its values that are at fault themselves."""
    given = fault["input"]
    return fault["type"] == "too_short" and isinstance(given, list | tuple) and len(given) >= fault["ctx"]["min_length"]


def other_case(error: ValidationError, recipe: type[BaseModel]) -> list[tuple[Loc, Any]]:
    """(path, value) of what is right but for capitals: `q4_k_m`, `AWQ`."""
    found = []
    for fault in error.errors():
        loc = _data_path(fault["loc"], recipe)
        given = fault.get("input")
        if fault["type"] == "union_tag_invalid":
            loc, given = (*loc, "method"), fault["ctx"]["tag"]
        elif fault["type"] != "literal_error":
            continue
        same = [value for value in _allowed(fault) if isinstance(given, str) and value.lower() == given.lower()]
        if same and same[0] != given:  # a number between quotes is the same text and stays wrong
            found.append((loc, same[0]))
    return found


def place(loc: Loc, recipe: type[BaseModel]) -> str:
    """`outputs[0].bits`."""
    text = ""
    for part in _data_path(loc, recipe):
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".") or "recipe"


def _say(fault: Any, recipe: type[BaseModel]) -> str:
    fault_type, given = fault["type"], fault.get("input")
    if fault_type == "extra_forbidden":
        return _unknown_key(str(fault["loc"][-1]), fault["loc"], recipe)
    if fault_type == "missing":
        return "is missing"
    if fault_type in ("model_type", "dict_type", "tuple_type", "model_attributes_type"):
        models = _below(fault["loc"], recipe)
        keys = ", ".join(models[0].model_fields) if len(models) == 1 else ""
        wanted = "a list" if fault_type == "tuple_type" else f"keys of {keys}" if keys else "keys with values"
        return f"is {_KINDS.get(type(given), type(given).__name__)}; it has to be {wanted}"
    if fault_type == "invalid_key":
        return "a key that is no text"
    if fault_type == "union_tag_not_found":
        return f"`method:` is missing; it is one of {', '.join(_allowed(fault))}"
    if fault_type in ("union_tag_invalid", "literal_error"):
        given = fault["ctx"]["tag"] if fault_type == "union_tag_invalid" else given
        allowed = _allowed(fault)
        if isinstance(given, str) and given in allowed:
            return f"{given!r:.80} is text; write {given:.80} without quotes"
        what = "no such method" if fault_type == "union_tag_invalid" else "not possible"
        one = f"one of {', '.join(allowed)}" if len(allowed) > 1 else allowed[0]
        meant = _meant(str(given), allowed)
        return f"{given!r:.80} is {what}{meant} It is {one}" if meant else f"{given!r:.80} is {what}; it is {one}"
    if fault_type == "int_type":
        return f"{given!r:.80} is no whole number"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return message if isinstance(given, dict | list) else f"{message} (got {given!r:.80})"


def _unknown_key(key: str, loc: Loc, recipe: type[BaseModel]) -> str:
    section = _below(loc[:-1], recipe)
    keys = [name for model in section for name in model.model_fields]
    meant = _meant(key, keys)
    if not meant:
        homes = [where for where, model in _sections(recipe, "") if key in model.model_fields and model not in section]
        meant = f"; it belongs under {homes[0]}." if homes else ""
    here = ", ".join(keys)
    return f"unknown key{meant} The keys here are {here}" if meant else f"unknown key; the keys here are {here}"


def _meant(given: str, allowed: Sequence[str]) -> str:
    by_letters = {re.sub(r"[\W_]", "", name.lower()): name for name in allowed}
    near = difflib.get_close_matches(re.sub(r"[\W_]", "", given.lower()), by_letters, 1, 0.6)
    return f"; did you mean {by_letters[near[0]]!r}?" if near else ""


def _allowed(fault: Any) -> list[str]:
    """The values of a Literal or the tags of a union, from the list in words that pydantic makes."""
    said = str(fault["ctx"].get("expected_tags") or fault["ctx"].get("expected") or "'awq', 'gptq', 'nf4', 'gguf'")
    return [quoted or plain for quoted, plain in re.findall(r"'([^']*)'|(-?[\w.]+)(?=,| or |$)", said) if plain != "or"]


def _data_path(loc: Loc, recipe: type[BaseModel]) -> Loc:
    """``loc`` without the parts that name a kind of value, not a place in the file."""
    return tuple(part for part, _, in_file in _walk(loc, recipe) if in_file)


def _below(loc: Loc, recipe: type[BaseModel]) -> list[type[BaseModel]]:
    """The sections that may stand below ``loc``."""
    return [[recipe], *(models for _, models, _ in _walk(loc, recipe))][-1]


def _walk(loc: Loc, recipe: type[BaseModel]) -> Iterator[tuple[int | str, list[type[BaseModel]], bool]]:
    """Each part of ``loc``, the sections that may stand below it, and whether the part stands in the file."""
    here, table = [recipe], False
    for number, part in enumerate(loc):
        fields = [model.model_fields[part] for model in here if isinstance(part, str) and part in model.model_fields]
        chosen = [m for m in here if part in get_args(getattr(m.model_fields.get("method"), "annotation", None))]
        in_file = bool(fields) or isinstance(part, int) or (number == len(loc) - 1 and bool(here) and not chosen)
        in_file = in_file or table
        table = bool(fields) and str(fields[0].annotation).startswith("dict[")  # its keys are a user's own
        if fields:
            here = list(_models(fields[0].annotation))
        elif chosen:
            here = chosen  # the method, which pydantic names between an output's number and its key
        yield part, here, in_file


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _sections(recipe: type[BaseModel], above: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """("evaluate.tasks", its section) of every section, however deep."""
    for name, field in recipe.model_fields.items():
        for model in _models(field.annotation):
            method = get_args(getattr(model.model_fields.get("method"), "annotation", None))
            yield f"`{above}{name}:`" + (f" with method {method[0]}" if method else ""), model
            yield from _sections(model, f"{above}{name}.")
