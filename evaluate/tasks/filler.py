"""Code that nobody has seen and nobody needs: the filler of long problems, out of templates."""

from __future__ import annotations

import random

NOUNS = (
    *("anchor", "barrel", "beacon", "bottle", "bridge", "bucket", "candle", "canvas", "carton", "copper", "cradle"),
    *("engine", "fabric", "flask", "garden", "gasket", "girder", "hammer", "harbor", "kettle", "ladder", "lantern"),
    *("magnet", "marble", "needle", "oyster", "packet", "paddle", "pebble", "pillar", "planks", "pulley", "ribbon"),
    *("saddle", "signal", "socket", "spring", "tablet", "tunnel", "turbine", "valley", "vessel", "window", "zipper"),
)
VERBS = (
    *("adjust", "arrange", "balance", "blend", "collect", "combine", "compare", "count", "divide", "filter", "fold"),
    *("gather", "limit", "measure", "merge", "order", "pick", "reduce", "scale", "shift", "split", "trim", "weigh"),
)
_TEMPLATES = (
    '''def {verb}_{noun}_{n}(values, step={a}):
    """{Verb} every {noun} by its place, {b} at most."""
    total = 0
    for place, value in enumerate(values):
        total += min(value * step + place, {b})
    return total''',
    '''def {verb}_{noun}_{n}(text):
    """{Verb} the words of a {noun} that are longer than {c}."""
    words = [word.strip(".,;") for word in text.split()]
    kept = [word for word in words if len(word) > {c}]
    return {{word: kept.count(word) for word in kept}}''',
    '''class {Noun}{n}:
    """A {noun} that holds {b} at most."""

    def __init__(self, size={a}):
        self.size = size
        self.items = []

    def {verb}(self, item):
        if len(self.items) >= {b}:
            self.items.pop({c} % len(self.items))
        self.items.append((item, self.size))
        return len(self.items)''',
    '''def {verb}_{noun}_{n}(left, right):
    """{Verb} two lists of a {noun}; the longer one wins."""
    pairs = list(zip(left, right))
    rest = left[len(pairs):] or right[len(pairs):]
    return [a * {a} - b * {c} for a, b in pairs] + list(rest)''',
    """{NOUN}_{n} = {{
    "{other}": ({a}, {b}),
    "{noun}": ({c}, {a}),
    "{verb}": ({b}, {c}),
}}""",
    '''def {verb}_{noun}_{n}(table, key, default={c}):
    """Look up a {noun} and {verb} it; {b} where it is missing twice."""
    try:
        return table[key] // {a}
    except KeyError:
        return table.get("{other}", default) + {b}''',
    '''def {verb}_{noun}_{n}(number):
    """{Verb} the digits of a {noun}'s number."""
    digits = []
    while number > {c}:
        number, digit = divmod(number, {d})
        digits.append(digit * {a})
    return digits[::-1]''',
    '''def {verb}_{noun}_{n}(rows):
    """{Verb} rows of ({noun}, {other}) by the first of them."""
    groups = {{}}
    for first, second in rows:
        groups.setdefault(first % {d}, []).append(second - {a})
    return sorted(groups.items(), key=lambda pair: (len(pair[1]), {b} - pair[0]))''',
)


def filler_block(drawn: random.Random) -> str:
    """A function, a class or a table."""
    noun, other, verb = drawn.choice(NOUNS), drawn.choice(NOUNS), drawn.choice(VERBS)
    return drawn.choice(_TEMPLATES).format(
        noun=noun, other=other, verb=verb, Verb=verb.capitalize(), Noun=noun.capitalize(), NOUN=noun.upper(),
        n=drawn.randrange(100, 10_000), a=drawn.randrange(2, 100), b=drawn.randrange(100, 1000),
        c=drawn.randrange(3, 10), d=drawn.randrange(7, 17),
    )  # fmt: skip
