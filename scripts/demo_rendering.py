"""How a demo program is named, described in English and written in Python (see demo_programs)."""

import builtins
import random
import re

from demo_operations import NUMBER, NUMBERS, TABLE, TEXT, TRUTH, WORDS, Operation

SOURCES = {
    NUMBERS: ("numbers", "values", "nums", "data", "xs", "items", "scores"),
    WORDS: ("words", "names", "strings", "tokens", "texts", "labels"),
    TEXT: ("text", "line", "phrase", "string", "message", "sentence"),
    NUMBER: ("number", "num", "value", "m", "start"),
    TABLE: ("table", "counts", "mapping", "scores", "prices", "stock"),
}
RESULTS = {
    NUMBERS: ("result", "found", "chosen", "output"),
    WORDS: ("parts", "result", "pieces", "found"),
    TEXT: ("joined", "out", "result", "answer"),
    NUMBER: ("total", "result", "answer", "amount"),
    TABLE: ("lookup", "result", "pairs", "answer"),
    TRUTH: ("ok", "flag", "answer", "check"),
}
ITEMS = {NUMBERS: ("x", "y", "v", "z"), WORDS: ("w", "word", "t", "name")}
EXTRAS = {
    "bound": ("limit", "bound", "threshold"),
    "amount": ("amount", "step", "delta"),
    "factor": ("factor", "divisor", "base"),
    "count": ("size", "width", "many"),
    "length": ("size", "width", "length"),
    "letter": ("letter", "char", "mark"),
}
FUNCTIONS = ("solve", "compute", "process", "transform", "f", "run", "convert", "evaluate", "answer", "task", "build")
SPELLED = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
WHOLE = {
    TEXT: ("the text", "the string"),
    NUMBER: ("the number", "the value"),
    TABLE: ("the dictionary", "the table"),
    NUMBERS: ("the list",),
    WORDS: ("the list",),
}
MOST_CHARACTERS = 96  # of one line


class Names:
    """The names one program uses; none of them clashes with those inside the operations' expressions."""

    def __init__(self, rng: random.Random, operations: tuple[Operation, ...], free: int) -> None:
        kind = operations[0].takes
        self.kind = kind
        self.source = rng.choice(SOURCES[kind])
        taken = {self.source}
        self.extra, self.extra_kind = "", ""
        if free >= 0:
            argument = operations[free].argument
            self.extra = pick(rng, EXTRAS[argument], taken)
            self.extra_kind = TEXT if argument == "letter" else NUMBER
        # a number that was computed may be stored under the parameter's name, if the types agree
        self.reuse = rng.random() < 0.5
        self.results = {k: pick(rng, pool, taken) for k, pool in RESULTS.items()}
        self.items = {k: pick(rng, pool, taken) for k, pool in ITEMS.items()}
        self.singular = {
            NUMBERS: rng.choice(("number", "value", "element", "integer")),
            WORDS: rng.choice(("word", "string", "item")),
        }
        self.whole = {k: rng.choice(pool) for k, pool in WHOLE.items()}
        if rng.random() < 0.45:
            self.function = rng.choice(FUNCTIONS)
        else:
            chosen = sorted(rng.sample(range(len(operations)), min(2, len(operations))))
            self.function = "_".join(operations[index].short for index in chosen)
        if hasattr(builtins, self.function):
            self.function += "_" + self.source  # a function called sum would call itself

    def signature(self) -> str:
        extra = f", {self.extra}: {self.extra_kind}" if self.extra else ""
        return f"{self.source}: {self.kind}{extra}"

    def stored(self, kind: str) -> str:
        """The name for an intermediate value of this type."""
        return self.source if self.reuse and kind == self.kind else self.results[kind]


def pick(rng: random.Random, pool: tuple[str, ...], taken: set[str]) -> str:
    """A name that is still free; remembers it."""
    name = rng.choice([name for name in pool if name not in taken])
    taken.add(name)
    return name


# ---------------------------------------------------------------- English


def phrase(rng: random.Random, template: str, operation: Operation, argument: object, names: Names) -> str:
    """A template with its placeholders filled."""
    singular = names.singular.get(operation.takes, "character")
    shown = str(argument)
    if operation.argument == "letter" and argument != names.extra:
        shown = f"'{argument}'"
    elif operation.argument in ("count", "length") and argument in SPELLED and rng.random() < 0.3:
        shown = SPELLED[argument]  # type: ignore[index]
    text = template.replace("{items}", singular + "s").replace("{item}", singular)
    return text.replace("{it}", names.whole.get(operation.takes, "it")).replace("{k}", shown)


def describe(rng: random.Random, operations: tuple[Operation, ...], arguments: list[object], names: Names) -> str:
    """What the function does, in one or two sentences."""
    if len(operations) <= 3 and rng.random() < 0.35:
        nested = describe_nested(rng, operations, arguments, names)
        if nested:
            return nested
    steps = [phrase(rng, rng.choice(o.verbs), o, a, names) for o, a in zip(operations, arguments, strict=True)]
    last = operations[-1]
    closing = ""
    if last.final and (last.gives == TRUTH or rng.random() < 0.6):
        closing = "return " + phrase(rng, rng.choice(last.final), last, arguments[-1], names)
        steps.pop()
    elif rng.random() < 0.4:
        closing = "return the result"
    return join_steps(rng, steps, closing)


def join_steps(rng: random.Random, steps: list[str], closing: str) -> str:
    """Several imperative phrases as one text."""
    parts = [*steps, closing] if closing else steps
    if len(parts) == 1:
        return f"{capital(parts[0])}."
    style = rng.randrange(5)
    if style == 0:
        return capital(", ".join(parts[:-1])) + f" and {parts[-1]}."
    if style == 1:
        return capital(", then ".join(parts)) + "."
    if style == 2:
        return f"First {parts[0]}, " + "".join(f"next {part}, " for part in parts[1:-1]) + f"finally {parts[-1]}."
    if style == 3:
        return ". ".join(capital(part) for part in parts) + "."
    return capital(parts[0]) + "; " + "; ".join(parts[1:]) + "."


def describe_nested(
    rng: random.Random, operations: tuple[Operation, ...], arguments: list[object], names: Names
) -> str:
    """'Return the sum of the squares of the numbers above 3.', or nothing where that would be ambiguous."""
    kind = operations[0].takes
    text = f"the {names.singular[kind]}s in {names.source}" if kind in names.singular else names.source
    for index, (operation, argument) in enumerate(zip(operations, arguments, strict=True)):
        # a clause after "the squares of the numbers" could belong to either noun, so filters only come first
        if not operation.noun or (index and not operation.noun.startswith(("the ", "a "))):
            return ""
        if operation.shape == "filter":
            text = f"the {names.singular[kind]}s {operation.noun[4:]}"
        else:
            text = operation.noun.replace("{x}", text)
        text = phrase(rng, text, operation, argument, names)
    return f"{rng.choice(('Return', 'Compute', 'Give', 'Find'))} {text}."


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- Python


def source_of(argument: object, names: Names) -> str:
    if isinstance(argument, str) and argument != names.extra:
        return f'"{argument}"'
    return str(argument)


def render_body(
    rng: random.Random, operations: tuple[Operation, ...], arguments: list[object], names: Names
) -> str:
    """The function's body, four spaces deep, ending in a newline."""
    units = make_units(rng, operations, arguments, names)
    loop = loop_body(rng, operations, units, names) if len(operations) <= 3 and rng.random() < 0.3 else ""
    if loop:
        return loop
    # short programs in every style; long ones nested where possible, which keeps them short and is the harder way
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
    """(expression of ``{v}``, type in, type out) with neighbouring filters and a map made one comprehension."""
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
