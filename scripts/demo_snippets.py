"""Short pieces of ordinary code in several languages, written from templates.

They are the part of the corpora that are not demo programs.  A piece is known by (template, noun); the same
hash as for programs keeps one in eight out of training.

Placeholders: ``<noun> <Noun>`` one thing, ``<a> <b> <c>`` names of its fields, ``<verb>`` what is done with
it, ``<n> <m>`` numbers.
"""

import random
from collections.abc import Iterator

NOUNS = (
    "account album answer article badge basket battery book booking branch camera channel client comment "
    "course customer device document driver engine event flight folder garden grade group hotel image "
    "invoice job kitchen ledger lesson letter machine market meeting member message meter movie note "
    "order parcel patient payment player project question queue recipe region report room route sample "
    "sensor session shelf shop signal station student subject supplier table task team ticket token tool "
    "track train user vehicle vendor visit voucher warehouse window"
)
FIELDS = (
    "age amount area balance budget capacity charge cost count delay depth discount distance duration "
    "energy fee goal height level limit load mass offset points power price priority quantity rank rate "
    "rating score share size speed stock tax temperature total units value volume voltage weight width"
)
VERBS = (
    "add apply archive assign check clean collect create export filter find format import load lock merge "
    "move open pack print process queue read refresh register remove rename reset resize save send share "
    "show sort start stop store submit sync track update upload validate verify"
)

DATACLASS = '''@dataclass
class <Noun>:
    """A <noun> with its <a> and <b>."""

    name: str
    <a>: int = <n>
    <b>: float = 0.0

    def <verb>(self, <c>: int) -> "<Noun>":
        if <c> < 0:
            raise ValueError("<c> must not be negative")
        return replace(self, <a>=self.<a> + <c>)
'''
STORE = """class <Noun>Store:
    def __init__(self) -> None:
        self._<noun>s: dict[str, <Noun>] = {}

    def add(self, <noun>: <Noun>) -> None:
        self._<noun>s[<noun>.name] = <noun>

    def get(self, name: str) -> <Noun> | None:
        return self._<noun>s.get(name)

    def total_<a>(self) -> int:
        return sum(<noun>.<a> for <noun> in self._<noun>s.values())
"""
PARSER = '''def parse_<noun>(line: str) -> tuple[str, int, int]:
    """Read 'name;<a>;<b>' and return the three parts."""
    name, <a>, <b> = line.strip().split(";")
    if not name:
        raise ValueError(f"a <noun> needs a name: {line!r}")
    return name, int(<a>), int(<b>)
'''
SEARCH = '''def find_<noun>(<noun>s: list[int], <a>: int) -> int:
    """Index of <a> in the sorted <noun>s, or -1 (binary search)."""
    low, high = 0, len(<noun>s) - 1
    while low <= high:
        middle = (low + high) // 2
        if <noun>s[middle] == <a>:
            return middle
        if <noun>s[middle] < <a>:
            low = middle + 1
        else:
            high = middle - 1
    return -1
'''
GRAPH = """def reachable_<noun>s(links: dict[str, list[str]], start: str, limit: int = <n>) -> set[str]:
    seen = {start}
    waiting = deque([(start, 0)])
    while waiting:
        <noun>, depth = waiting.popleft()
        if depth == limit:
            continue
        for other in links.get(<noun>, []):
            if other not in seen:
                seen.add(other)
                waiting.append((other, depth + 1))
    return seen
"""
MEMO = '''@cache
def best_<a>(<noun>s: tuple[int, ...], <b>: int) -> int:
    """Largest <a> that fits into <b>, each <noun> used at most once."""
    if not <noun>s or <b> <= 0:
        return 0
    first, rest = <noun>s[0], <noun>s[1:]
    without = best_<a>(rest, <b>)
    if first > <b>:
        return without
    return max(without, first + best_<a>(rest, <b> - first))
'''
TEST = """class Test<Noun>:
    def test_<verb>_changes_<a>(self):
        <noun> = <Noun>("first", <a>=<n>)
        <noun>.<verb>(<m>)
        assert <noun>.<a> == <n> + <m>

    def test_negative_<b>_is_refused(self):
        with pytest.raises(ValueError, match="<b>"):
            <Noun>("second", <b>=-1)
"""
COMMAND = """def main() -> int:
    parser = argparse.ArgumentParser(description="<verb> a <noun>")
    parser.add_argument("<noun>", type=Path)
    parser.add_argument("--<a>", type=int, default=<n>)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not options.<noun>.exists():
        print(f"no such <noun>: {options.<noun>}", file=sys.stderr)
        return 2
    <verb>_<noun>(options.<noun>, options.<a>, options.dry_run)
    return 0
"""
CONTEXT = """@contextmanager
def <verb>_<noun>(path: Path, <a>: int = <n>) -> Iterator[IO[str]]:
    handle = path.open("w", encoding="utf-8")
    try:
        handle.write(f"<a>={<a>}\\n")
        yield handle
    finally:
        handle.close()
"""
GENERATOR = '''def <verb>_<noun>s(rows: Iterable[dict[str, str]], <a>: int) -> Iterator[tuple[str, float]]:
    """Yield the name and the <b> of every <noun> whose <a> is large enough."""
    for row in rows:
        try:
            current = int(row["<a>"])
        except (KeyError, ValueError) as error:
            raise <Noun>Error(f"bad <noun>: {row}") from error
        if current >= <a>:
            yield row["name"], float(row.get("<b>", 0))
'''
JS_FUNCTION = """function <verb><Noun>s(<noun>s, <a> = <n>) {
  const kept = <noun>s.filter((<noun>) => <noun>.<a> >= <a>);
  const total = kept.reduce((sum, <noun>) => sum + <noun>.<b>, 0);
  return { count: kept.length, total };
}
"""
JS_CLASS = """export class <Noun>Client {
  constructor(url, <a> = <n>) {
    this.url = url;
    this.<a> = <a>;
  }

  async <verb>(id) {
    const response = await fetch(`${this.url}/<noun>s/${id}`);
    if (!response.ok) {
      throw new Error(`<noun> ${id}: ${response.status}`);
    }
    const { <b>, ...rest } = await response.json();
    return { ...rest, <b>: Number(<b>) };
  }
}
"""
C_FUNCTION = """int <verb>_<noun>(const int *<a>, size_t count, int *<b>)
{
    if (<a> == NULL || count == 0)
        return -1;
    int total = 0;
    for (size_t i = 0; i < count; i++) {
        if (<a>[i] > <n>)
            total += <a>[i] * <m>;
    }
    *<b> = total;
    return 0;
}
"""
C_LIST = """struct <noun> {
    int <a>;
    double <b>;
    struct <noun> *next;
};

struct <noun> *<verb>_<noun>(struct <noun> *head, int <a>)
{
    struct <noun> *node = malloc(sizeof *node);
    if (!node)
        return NULL;
    node-><a> = <a>;
    node-><b> = <n>.0;
    node->next = head;
    return node;
}
"""
SQL_TABLE = """CREATE TABLE <noun>s (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    <a> INTEGER DEFAULT <n>,
    <b> REAL CHECK (<b> >= 0)
);
INSERT INTO <noun>s (name, <a>, <b>) VALUES ('first', <n>, 0.5), ('second', <m>, 1.5);
"""
SQL_QUERY = """SELECT <noun>s.name, SUM(<noun>s.<a>) AS total_<a>, COUNT(*) AS entries
FROM <noun>s
JOIN owners ON owners.id = <noun>s.owner_id
WHERE <noun>s.<b> > <n> AND owners.<c> IS NOT NULL
GROUP BY <noun>s.name
HAVING COUNT(*) >= <m>
ORDER BY total_<a> DESC;
"""
TEMPLATES = {
    "dataclass": DATACLASS, "store": STORE, "parser": PARSER, "search": SEARCH, "graph": GRAPH, "memo":
    MEMO, "test": TEST, "command": COMMAND, "context": CONTEXT, "generator": GENERATOR, "js_function":
    JS_FUNCTION, "js_class": JS_CLASS, "c_function": C_FUNCTION, "c_list": C_LIST, "sql_table":
    SQL_TABLE, "sql_query": SQL_QUERY,
}  # fmt: skip


def fill(rng: random.Random, template: str, noun: str) -> str:
    """The template about this noun."""
    a, b, c = rng.sample(FIELDS.split(), 3)
    values = {"noun": noun, "Noun": noun.capitalize(), "a": a, "b": b, "c": c}
    values["verb"] = rng.choice(VERBS.split())
    values |= {"n": str(rng.randint(2, 50)), "m": str(rng.randint(2, 9))}
    for key, text in values.items():
        template = template.replace(f"<{key}>", text)
    return template


def snippets(rng: random.Random) -> Iterator[tuple[tuple[str, str], str]]:
    """An endless stream of ((template, noun), text), both sides of the split: the key tells which."""
    while True:
        name = rng.choice(list(TEMPLATES))
        noun = rng.choice(NOUNS.split())
        yield (name, noun), fill(rng, TEMPLATES[name], noun)
