"""How a demo program is written in Python (see demo_programs)."""

import random
import re

from demo_operations import NUMBER, Operation
from demo_wording import Names

MOST_CHARACTERS = 96  # of one line


def source_of(argument: object, names: Names) -> str:
    if isinstance(argument, str) and argument != names.extra:
        return f'"{argument}"'
    return str(argument)


def render_body(rng: random.Random, operations: tuple[Operation, ...], arguments: list[object], names: Names) -> str:
    """The function's body, four spaces deep, ending in a newline."""
    units = make_units(rng, operations, arguments, names)
    loop = loop_body(rng, operations, units, names) if len(operations) <= 3 and rng.random() < 0.3 else ""
    if loop:
        return loop
    # short programs in every style; long ones mostly nested, which is the harder way and needs fewer tokens
    nesting = rng.choice((0.0, 0.5, 1.0) if len(operations) <= 2 else (0.5, 1.0, 1.0, 1.0, 1.0))
    lines, current, variable = [], "", names.source
    for template, takes, _ in units:
        if current:
            nested = nest(rng, template, current)
            if nested and rng.random() < nesting:
                current = nested
                continue
            variable = names.stored(takes)
            lines.append(f"    {variable} = {current}")
        current = template.replace("{v}", variable)
    if not lines and rng.random() < 0.1:
        result = names.results[operations[-1].gives]
        return f"    {result} = {current}\n    return {result}\n"
    return "\n".join([*lines, f"    return {current}"]) + "\n"


def make_units(
    rng: random.Random, operations: tuple[Operation, ...], arguments: list[object], names: Names
) -> list[tuple[str, str, str]]:
    """(expression of ``{v}``, type in, type out); neighbouring filters and a map become one comprehension."""
    units: list[tuple[str, str, str]] = []
    fuse = rng.random() < 0.75
    conditions: list[str] = []
    for index, (operation, argument) in enumerate(zip(operations, arguments, strict=True)):
        code = rng.choice(operation.code).replace("{k}", source_of(argument, names))
        if operation.shape == "value":
            units.append((code, operation.takes, operation.gives))
            continue
        item = names.items[operation.takes]
        code = code.replace("{i}", item)
        if operation.shape == "filter":
            conditions.append(code)
            following = operations[index + 1] if index + 1 < len(operations) else None
            if fuse and following and following.shape != "value":
                continue  # the next filter or map takes this condition along
        element = code if operation.shape == "map" else item
        clause = f" if {' and '.join(conditions)}" if conditions else ""
        units.append((f"[{element} for {item} in {{v}}{clause}]", operation.takes, operation.gives))
        conditions = []
    return units


def nest(rng: random.Random, template: str, inner: str) -> str:
    """The inner expression put into the template, or nothing where a variable reads better."""
    if template.count("{v}") != 1 or len(template) + len(inner) > MOST_CHARACTERS:
        return ""
    if inner.count(" for ") and " for " in template:
        return ""  # comprehensions inside comprehensions are hard to read
    if template in ("sum({v})", '"".join({v})', '" ".join({v})') and is_comprehension(inner) and rng.random() < 0.6:
        inner = inner[1:-1]
    if re.search(r"\w\({v}[,)]", template) or is_atomic(inner):
        return template.replace("{v}", inner)
    return template.replace("{v}", f"({inner})")


def is_comprehension(expression: str) -> bool:
    """Whether the whole expression is one list comprehension."""
    if not expression.startswith("[") or " for " not in expression:
        return False
    depth = 0
    for position, character in enumerate(expression):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth == 0:
            return position == len(expression) - 1
    return False


def is_atomic(expression: str) -> bool:
    """Whether a method, an index or an operator can follow without brackets around the expression."""
    depth, quoted = 0, False
    for position, character in enumerate(expression):
        if character == '"':
            quoted = not quoted
        if quoted:
            continue
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and (character == " " or (character == "-" and position == 0)):
            return False
    return True


def loop_body(
    rng: random.Random, operations: tuple[Operation, ...], units: list[tuple[str, str, str]], names: Names
) -> str:
    """A for loop with an accumulator, for a comprehension that comes first; nothing where it does not fit."""
    match = re.fullmatch(r"\[(.+) for (\w+) in {v}(?: if (.+))?\]", units[0][0])
    if not match or len(units) > 2 or operations[0].shape == "value":
        return ""
    element, item, condition = match.groups()
    kind = units[0][2]
    tail = units[1][0] if len(units) == 2 else "{v}"
    total = names.results[NUMBER] if tail in ("sum({v})", "len({v})") else names.results[kind]
    add = {"sum({v})": f"{total} += {element}", "len({v})": f"{total} += 1"}.get(tail, f"{total}.append({element})")
    start = "0" if tail in ("sum({v})", "len({v})") else "[]"
    lines = [f"    {total} = {start}", f"    for {item} in {names.source}:"]
    lines += [f"        if {condition}:", f"            {add}"] if condition else [f"        {add}"]
    returned = total if start == "0" else tail.replace("{v}", total)
    return "\n".join([*lines, f"    return {returned}"]) + "\n"
