"""How a demo program is named and described in English (see demo_programs)."""

import builtins
import random

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
FUNCTIONS = (
    "solve",
    "compute",
    "process",
    "transform",
    "f",
    "run",
    "convert",
    "evaluate",
    "answer",
    "task",
    "build",
)
SPELLED: dict[object, str] = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
WHOLE = {
    TEXT: ("the text", "the string"),
    NUMBER: ("the number", "the value"),
    TABLE: ("the dictionary", "the table"),
    NUMBERS: ("the list",),
    WORDS: ("the list",),
}


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


def phrase(rng: random.Random, template: str, operation: Operation, argument: object, names: Names) -> str:
    """A template with its placeholders filled."""
    singular = names.singular.get(operation.takes, "character")
    shown = str(argument)
    if operation.argument == "letter" and argument != names.extra:
        shown = f"'{argument}'"
    elif operation.argument in ("count", "length") and argument in SPELLED and rng.random() < 0.3:
        shown = SPELLED[argument]
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
