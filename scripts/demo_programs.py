"""Draws small Python functions, each a chain of operations, writes them in many ways and checks every one.

A program's COMPOSITION is the tuple of the names of its operations.  Training and held-out programs are
separated by composition (`is_held_out`), so a held-out task asks for a chain that the model has never been
shown, in any wording, with any constants.  A program is used only if

* every operation matters: leaving one out changes the result on some input;
* the code that was written gives what the operations' reference expressions give, on every input;
* its results vary, and stay small enough to read.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

from demo_operations import ARGUMENTS, NUMBER, NUMBERS, TABLE, TEXT, TRUTH, WORDS, Operation
from demo_rendering import render_body
from demo_snippets import snippets
from demo_text_operations import BY_NAME, OPERATIONS
from demo_wording import Names, describe

HELD_OUT_SHARE = 8  # one composition in eight is held out
LENGTHS = {1: 6, 2: 14, 3: 20, 4: 20, 5: 18, 6: 13, 7: 9}  # how often a chain has this many operations
STARTS = {NUMBERS: 40, WORDS: 22, TEXT: 20, NUMBER: 10, TABLE: 8}
LARGEST_NUMBER, LONGEST_VALUE = 1_000_000, 60

SOME_WORDS = (
    "apple bear cat dog egg fish goat hat ink jam kite lion moon nest owl pear queen rose sun tree "
    "anna level noon Paris Rome Tom Sara green blue red 7 42 100 a I to by sea star tests salad plane"
)
WORD_POOL = SOME_WORDS.split()
LINES = (
    "Hello World",
    "a-b-c",
    "Tea 4 two",
    "never odd",
    "x1y22",
    "one two one",
    "Good-day sir",
    "level",
    "AbC",
)


@dataclass
class Program:
    """A function to be written: its operations with their arguments, its names, its text."""

    operations: tuple[Operation, ...]
    arguments: tuple[object, ...]  # a literal, or None where the operation has none or takes the parameter
    free: int = -1  # index of the operation whose argument is a parameter of the function, or -1
    prompt: str = ""
    body: str = ""
    entry_point: str = ""
    cases: list[tuple[tuple[object, ...], object]] = field(default_factory=list)  # (arguments, result)

    @property
    def composition(self) -> tuple[str, ...]:
        return tuple(operation.name for operation in self.operations)


def is_held_out(composition: tuple[str, ...]) -> bool:
    """Whether tasks with this composition are kept out of training (a stable hash decides)."""
    digest = hashlib.sha256("|".join(composition).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


@cache
def reference(name: str) -> Callable[[object, object], object]:
    """An operation's own meaning, as a function of (value, argument)."""
    operation = BY_NAME[name]
    code = operation.code[0].replace("{v}", "value").replace("{k}", "argument").replace("{i}", "item")
    if operation.shape == "map":
        code = f"[{code} for item in value]"
    elif operation.shape == "filter":
        code = f"[item for item in value if {code}]"
    function: Callable[[object, object], object] = eval(f"lambda value, argument: {code}")
    return function


def within_limits(value: object) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return len(value) <= LONGEST_VALUE and all(map(within_limits, value))
    if isinstance(value, int):
        return -LARGEST_NUMBER <= value <= LARGEST_NUMBER
    return len(value) <= LONGEST_VALUE if isinstance(value, str) else False


def apply(program: Program, inputs: tuple[object, ...], leave_out: int = -1) -> object:
    """What the operations mean on these inputs; OverflowError when a value becomes too large to show."""
    value = inputs[0]
    for index, operation in enumerate(program.operations):
        if index == leave_out:
            continue
        argument = inputs[1] if index == program.free else program.arguments[index]
        value = reference(operation.name)(value, argument)
        if not within_limits(value):
            raise OverflowError(operation.name)
    return value


@cache
def successors(kind: str, last: bool) -> tuple[Operation, ...]:
    return tuple(o for o in OPERATIONS if o.takes == kind and (last or o.gives != TRUTH))


def draw_operations(rng: random.Random, length: int) -> tuple[Operation, ...]:
    kind = rng.choices(list(STARTS), list(STARTS.values()))[0]
    chain: list[Operation] = []
    while len(chain) < length:
        operation = rng.choice(successors(kind, len(chain) == length - 1))
        if all(operation is not used for used in chain):
            chain.append(operation)
            kind = operation.gives
    return tuple(chain)


def draw_value(rng: random.Random, kind: str) -> object:
    """An ordinary input of this type."""
    if kind == NUMBERS:
        low, high = rng.choice(((-9, 9), (0, 12), (-20, 30), (1, 5)))
        return [rng.randint(low, high) for _ in range(rng.randint(3, 7))]
    if kind == WORDS:
        return [rng.choice(WORD_POOL) for _ in range(rng.randint(2, 6))]
    if kind == TEXT:
        return rng.choice(LINES) if rng.random() < 0.4 else " ".join(rng.sample(WORD_POOL, rng.randint(1, 3)))
    if kind == NUMBER:
        return rng.randint(1, 40)
    return {word: rng.randint(-3, 20) for word in rng.sample(WORD_POOL, rng.randint(2, 4))}


EDGES: dict[str, tuple[object, ...]] = {
    NUMBERS: ([], [0], [-3, -1, -2], [5, 5, 5, 2]),
    WORDS: ([], [""], ["a", "a"], ["Level", "noon", "x"]),
    TEXT: ("", "a", "  ", "Aa-1 b"),
    NUMBER: (0, 1, -7, 12),
    TABLE: ({}, {"a": 0}, {"b": -2, "cc": 3}, {"A": 5, "s": 5, "": 1}),
}


def draw_cases(rng: random.Random, program: Program, ordinary: int) -> list[tuple[object, ...]]:
    """Inputs: the type's edge cases, then ordinary ones."""
    kind = program.operations[0].takes
    firsts = [*EDGES[kind], *(draw_value(rng, kind) for _ in range(ordinary))]
    if program.free < 0:
        return [(first,) for first in firsts]
    pool = ARGUMENTS[program.operations[program.free].argument]
    return [(first, rng.choice(pool)) for first in firsts]


def every_operation_matters(program: Program, cases: list[tuple[tuple[object, ...], object]]) -> bool:
    """False if one operation can be left out without any case noticing (only where the types allow it)."""
    for index, operation in enumerate(program.operations):
        if operation.takes != operation.gives:
            continue
        try:
            if all(apply(program, inputs, leave_out=index) == result for inputs, result in cases):
                return False
        except (OverflowError, ValueError, TypeError):
            continue
    return True


def results_vary(program: Program, cases: list[tuple[tuple[object, ...], object]]) -> bool:
    """Enough different results that a constant function, or one that returns its input, is found out."""
    seen = {repr(result) for _, result in cases}
    wanted = 2 if program.operations[-1].gives == TRUTH else 4
    return len(seen) >= wanted and any(result != inputs[0] for inputs, result in cases)


def draw_program(rng: random.Random, chain: tuple[Operation, ...]) -> Program | None:
    """The chain with arguments and cases; None when it turned out pointless or unwieldy."""
    arguments = tuple(rng.choice(ARGUMENTS[o.argument]) if o.argument else None for o in chain)
    with_argument = [index for index, o in enumerate(chain) if o.argument]
    free = rng.choice(with_argument) if with_argument and rng.random() < 0.25 else -1
    program = Program(chain, arguments, free)
    try:
        for inputs in draw_cases(rng, program, ordinary=7):
            program.cases.append((inputs, apply(program, inputs)))
    except (OverflowError, ValueError):
        return None
    if not results_vary(program, program.cases) or not every_operation_matters(program, program.cases):
        return None
    return program


def write_program(rng: random.Random, program: Program) -> bool:
    """Choose names and wording, write prompt and body, run them; False if no example is short enough."""
    names = Names(rng, program.operations, program.free)
    program.entry_point = names.function
    examples = [case for case in program.cases[4:] if len(repr(case)) <= 90]
    if not examples:
        return False
    inputs, result = rng.choice(examples)
    shown = ", ".join(literal(item) for item in inputs)
    arguments = [names.extra if index == program.free else a for index, a in enumerate(program.arguments)]
    program.prompt = (
        f"def {names.function}({names.signature()}) -> {program.operations[-1].gives}:\n"
        f'    """{describe(rng, program.operations, arguments, names)}\n\n'
        f'    >>> {names.function}({shown})\n    {result!r}\n    """\n'
    )
    program.body = render_body(rng, program.operations, arguments, names)
    run_as_written(program)
    return True


def literal(value: object) -> str:
    """A value as source code, in the double quotes that the programs use."""
    text = repr(value)
    return text.replace("'", '"') if '"' not in text and "\\" not in text else text


def run_as_written(program: Program) -> None:
    """Execute the written function on every case; an AssertionError is a mistake in the vocabulary."""
    namespace: dict[str, Callable[..., object]] = {}
    exec(compile(program.prompt + program.body, "<program>", "exec"), namespace)  # our own generator's code
    function = namespace[program.entry_point]
    for inputs, result in program.cases:
        found = function(*inputs)
        if found != result or type(found) is not type(result):
            raise AssertionError(f"{program.composition}: {found!r} is not {result!r}\n{program.prompt}{program.body}")


def programs(seed: str, held_out: bool, lengths: dict[int, int] | None = None) -> Iterator[Program]:
    """An endless, reproducible stream of checked programs from one side of the split."""
    rng = random.Random(seed)
    weights = lengths or LENGTHS
    while True:
        length = rng.choices(list(weights), list(weights.values()))[0]
        program = None
        while program is None or not write_program(rng, program):
            chain = draw_operations(rng, length)
            if is_held_out(tuple(operation.name for operation in chain)) == held_out:
                program = draw_program(rng, chain)
        yield program


def training_texts(seed: str, forbidden: frozenset[str] = frozenset()) -> Iterator[str]:
    """The training stream: programs from one side of the split, and one piece of other code in sixteen.

    `forbidden` holds prompts and bodies that must not occur; other compositions rarely print the same text.
    """
    rng = random.Random(seed + "/snippets")
    other = snippets(rng)
    for program in programs(seed, held_out=False):
        if program.prompt not in forbidden and program.body not in forbidden:
            yield program.prompt + program.body
        if rng.random() < 1 / 16:
            key, text = next(other)
            if not is_held_out(key):
                yield text
