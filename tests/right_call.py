# ruff: noqa: E501 (a program is a line)
"""Unusual but right programs that a test calls: (program, test) as plain Python in one process would pass them."""

D = "def check(c):\n    assert c(2) == 4\n    assert c(21) == 42\n"
CLASS = "class Node:\n    def __init__(self, v, next=None):\n        self.v = v\n        self.next = next\n"
V = "class P:\n    def __init__(s, x): s.x = x\ndef f(x): return P(x)"
OWN = """from collections import namedtuple
from enum import Flag, IntEnum
Point = namedtuple("Point", "x y")
class Level(IntEnum):
    LOW = 1
    HIGH = 2
class Right(Flag):
    R = 1
    W = 2
class Bag(list):
    def push(self, v): self.append(v)
class Sums(dict):
    def total(self): return sum(self.values())
"""
PROGRAMS: dict[str, tuple[str, str]] = {
    # Around the program.
    "exit is there": ("assert callable(exit) and callable(quit)\ndef f(x): return 2 * x", D),
    "quit in an unused main": ("def f(x): return 2 * x\nif __name__ == '__main__':\n    quit()", D),
    "argv": ("import sys\ndef f(x): return 2 * x if len(sys.argv) == 1 else 0", D),
    "argparse": ("import argparse\nn = argparse.ArgumentParser().parse_args()\ndef f(x): return 2 * x", D),
    "devnull": ("import os\ndef f(x):\n    with open(os.devnull, 'w') as h: h.write('x')\n    return 2 * x", D),
    "urandom": ("def f(x):\n    with open('/dev/urandom', 'rb') as h: assert len(h.read(8)) == 8\n    return 2 * x", D),
    "tempfile": ("import tempfile, os\ndef f(x):\n    with tempfile.TemporaryDirectory() as d:\n"
                 "        open(os.path.join(d, 'a'), 'w').write(str(2 * x))\n        return int(open(d + '/a').read())", D),
    "pool": ("from multiprocessing import Pool\ndef g(x): return x\ndef f(x):\n"
             "    with Pool(2) as p: return sum(p.map(g, [x, x]))", D),
    "thread pool": ("from multiprocessing.pool import ThreadPool\ndef f(x):\n"
                    "    with ThreadPool(2) as p: return sum(p.imap_unordered(int, [x, x]))", D),
    "pool closed and joined": ("import multiprocessing as mp\ndef f(x):\n    p = mp.get_context('spawn').Pool()\n"
                               "    r = p.apply_async(int, (x,))\n    p.close()\n    p.join()\n    return 2 * r.get()", D),
    "process and queue": ("from multiprocessing import Process, Queue, Value\ndef g(q, v, x):\n"
                          "    with v.get_lock(): v.value += x\n    q.put(x)\ndef f(x):\n    q, v = Queue(), Value('i', 0)\n"
                          "    p = Process(target=g, args=(q, v, x))\n    p.start()\n    p.join()\n    return q.get() + v.value", D),
    "manager": ("from multiprocessing import Manager\ndef f(x):\n    with Manager() as m:\n        d = m.dict()\n"
                "        d[1] = x\n        return 2 * d[1]", D),
    "executor of processes": ("from concurrent.futures import ProcessPoolExecutor, as_completed\ndef g(x): return 2 * x\n"
                              "def f(x):\n    with ProcessPoolExecutor(max_workers=2) as e:\n"
                              "        return next(as_completed([e.submit(g, x)])).result()", D),
    "executor of threads": ("import concurrent.futures\ndef f(x):\n"
                            "    with concurrent.futures.ThreadPoolExecutor() as e: return sum(e.map(int, [x, x]))", D),
    "__name__": ("assert __name__ != '__main__'\ndef f(x): return 2 * x", D),
    "getsource": ("import inspect\ndef f(x):\n    return 2 * x if 'return 2 * x' in inspect.getsource(f) else 0", D),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**6)\ndef r(n): return n and 1 + r(n - 1)\n"
                       "def f(x): return r(20000) - 20000 + 2 * x", D),
    "recursion error caught": ("def r(): return r()\ndef f(x):\n    try: r()\n    except RecursionError: return 2 * x", D),
    "larger stack": ("import resource\nresource.setrlimit(resource.RLIMIT_STACK, (-1, -1))\ndef f(x): return 2 * x", D),
    "warnings": ("import warnings\ndef f(x):\n    warnings.warn('old', DeprecationWarning)\n    return 2 * x", D),
    "noise": ("def f(x):\n    print('x' * 10**6)\n    return 2 * x", D),
    "cache": ("from functools import lru_cache\n@lru_cache(None)\ndef f(x): return 2 * x",
              "f(1)\nf(1)\nassert f.cache_info().hits == 1\nf.cache_clear()"),
    "state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert [f(), f(), f()] == [1, 2, 3]"),
    "solution class": ("class Solution:\n    def f(self, x): return 2 * x", D),
    "partial": ("from functools import partial\nf = partial(lambda a, x: a * x, 2)", D),
    "callable object": ("class F:\n    def __call__(self, x): return 2 * x\nf = F()", D),
    "late import": ("def f(x):\n    import xml.etree.ElementTree, csv, ssl, http.client\n    return 2 * x", D),
    # Exceptions as they were raised.
    "text": ("def f(x): raise ValueError('negative')", "try: f(1)\nexcept ValueError as e: assert str(e) == 'negative'\nelse: assert 0"),
    "args": ("def f(x): raise ValueError('a', 5)", "try: f(1)\nexcept ValueError as e: assert e.args == ('a', 5)\nelse: assert 0"),
    "no args": ("def f(x): raise ValueError", "try: f(1)\nexcept ValueError as e: assert e.args == () and str(e) == ''\nelse: assert 0"),
    "key error": ("def f(x): return {}[x]", "try: f('a')\nexcept KeyError as e: assert str(e) == \"'a'\" and e.args[0] == 'a'\nelse: assert 0"),
    "own class": ("class Odd(ValueError):\n    def __init__(s, n):\n        super().__init__(f'odd {n}')\n        s.n = n\ndef f(x): raise Odd(x)",
                  "try: f(3)\nexcept ValueError as e: assert (type(e).__name__, str(e), e.n) == ('Odd', 'odd 3', 3)\nelse: assert 0"),
    "own text": ("class E(Exception):\n    def __str__(s): return 'own'\ndef f(x): raise E(1)",
                 "try: f(1)\nexcept Exception as e: assert str(e) == 'own' and e.args == (1,)\nelse: assert 0"),
    "two bases": ("class E(KeyError, AttributeError): pass\ndef f(x): raise E", "try: f(1)\nexcept AttributeError: pass\nelse: assert 0"),
    "cause": ("def f(x):\n    try: 1 / 0\n    except ZeroDivisionError as e: raise ValueError('v') from e",
              "try: f(1)\nexcept ValueError as e: assert isinstance(e.__cause__, ZeroDivisionError)\nelse: assert 0"),
    "unicode error": ("def f(x): return b'\\xff'.decode()", "try: f(1)\nexcept UnicodeDecodeError as e: assert e.start == 0 and e.object == b'\\xff'\nelse: assert 0"),
    "missing file": ("def f(x): open('nothing')", "import errno\ntry: f(1)\nexcept FileNotFoundError as e: assert e.errno == errno.ENOENT and e.filename == 'nothing'\nelse: assert 0"),
    "system exit": ("import sys\ndef f(x): sys.exit(3)", "try: f(1)\nexcept SystemExit as e: assert e.code == 3\nelse: assert 0"),
    "library's own": ("import json\ndef f(x): return json.loads('{')", "import json\ntry: f(1)\nexcept json.JSONDecodeError as e: assert e.pos == 1\nelse: assert 0"),
    "group": ("def f(x): raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",
              "try: f(1)\nexcept* ValueError as g: assert g.exceptions[0].args == (1,)\nexcept* TypeError: pass"),
    "note": ("def f(x):\n    e = ValueError('v')\n    e.add_note('n')\n    raise e", "try: f(1)\nexcept ValueError as e: assert e.__notes__ == ['n']\nelse: assert 0"),
    "returned, not raised": ("def f(x): return ValueError('v')", "e = f(1)\nassert isinstance(e, ValueError) and str(e) == 'v'"),
    "unittest": ("def f(x):\n    if x < 0: raise ValueError('must be >= 0')\n    return 2 * x",
                 "import unittest\ndef check(c):\n    t = unittest.TestCase()\n    with t.assertRaisesRegex(ValueError, r'^must be >= 0$'): c(-1)\n    t.assertEqual(c(2), 4)"),
    # Values equal by Python's own ==.
    "str enum": ("from enum import Enum\nclass C(str, Enum):\n    RED = 'red'\ndef f(x): return C.RED",
                 "assert f(1) == 'red' and f(1).value == 'red' and f(1).name == 'RED' and {f(1)} == {'red'}"),
    "StrEnum": ("from enum import StrEnum, auto\nclass C(StrEnum):\n    RED = auto()\ndef f(x): return C.RED", "assert f(1) == 'red' and str(f(1)) == 'red' and f'{f(1)}' == 'red'"),
    "int flag": ("from enum import IntFlag\nclass P(IntFlag):\n    R = 4\n    W = 2\ndef f(x): return P.R | P.W", "assert f(1) == 6 and f(1) & 2"),
    "plain enum": ("from enum import Enum\nclass C(Enum):\n    RED = 1\ndef f(x): return C.RED", "assert f(1).value == 1 and f(1).name == 'RED' and f(1) is f(1)"),
    "keys": ("def f(x): return {x: 1, 4: 2}.keys()", "assert f(2) == {2, 4} and list(f(2)) == [2, 4] and 4 in f(2)"),
    "items": ("def f(x): return {x: 1}.items()", "assert f(2) == {(2, 1)} and dict(f(2)) == {2: 1}"),
    "values": ("def f(x): return {x: 1, 3: 1}.values()", "assert list(f(2)) == [1, 1] and len(f(2)) == 2"),
    "decimal": ("from decimal import Decimal\ndef f(x): return Decimal(x) * 2", "assert f(2) == 4 and f('0.1') * 10 == 2"),
    "fraction": ("from fractions import Fraction\ndef f(x): return Fraction(x, 4)", "assert f(2) == 0.5 and f(1).denominator == 4"),
    "chain map": ("from collections import ChainMap\ndef f(x): return ChainMap({'a': x}, {'b': 1})", "assert f(2) == {'a': 2, 'b': 1}"),
    "date": ("import datetime\ndef f(x): return datetime.date(2020, 1, x)", "import datetime\nassert f(2) == datetime.date(2020, 1, 2) and f(2).year == 2020"),
    "aware datetime": ("from datetime import *\ndef f(x): return datetime(2020, 1, 1, tzinfo=timezone.utc) + timedelta(x)",
                       "from datetime import *\nassert f(1) == datetime(2020, 1, 2, 2, tzinfo=timezone(timedelta(hours=2)))\nassert f(1) - f(0) == timedelta(days=1)"),
    "namedtuple": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, [x])",
                   "p = f(2)\nassert p == (2, [2]) and p.x == 2 and p._asdict() == {'x': 2, 'y': [2]}\nx, y = p"),
    "NamedTuple with a method": ("from typing import NamedTuple\nclass P(NamedTuple):\n    x: int = 1\n    def twice(self): return 2 * self.x\ndef f(x): return P(x)",
                                 "assert f(2).twice() == 4 and f(2) == (2,)"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: list\ndef f(x): return P(x, [x])",
                  "assert f(1) == f(1) and f(1) != f(2) and f(1).y == [1] and repr(f(1)) == 'P(x=1, y=[1])'"),
    "list subclass": ("class S(list):\n    def push(self, v): self.append(v)\ndef f(x): return S([x])",
                      "s = f(1)\ns.push(2)\nassert s == [1, 2] and len(s) == 2 and s[1] == 2 and isinstance(s, list)"),
    "dict subclass": ("class D(dict):\n    def __missing__(self, k): return k\ndef f(x): return D(a=x)", "assert f(1)['z'] == 'z' and f(1) == {'a': 1}"),
    "ordered": ("from collections import OrderedDict\ndef f(x): return OrderedDict(a=x, b=1)", "from collections import OrderedDict\nassert f(1) == {'b': 1, 'a': 1} and f(1) != OrderedDict(b=1, a=1)"),
    "counter": ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1} and f('aab').most_common(1) == [('a', 2)] and f('')['q'] == 0"),
    "defaultdict": ("from collections import defaultdict\ndef f(x):\n    d = defaultdict(lambda: [7])\n    d['a'] = x\n    return d", "assert f(1) == {'a': 1} and f(1)['q'] == [7]"),
    "deque": ("from collections import deque\ndef f(x): return deque([1, 2, x], maxlen=2)", "from collections import deque\nd = f(3)\nd.append(9)\nassert d == deque([3, 9])"),
    "bytes kinds": ("def f(x): return [bytearray(b'a'), memoryview(b'b'), b'c']", "a, b, c = f(1)\nassert a == b'a' and b == b'b' and c == b'c'"),
    "array": ("from array import array\ndef f(x): return array('i', [1, x])", "from array import array\nassert f(2) == array('i', [1, 2]) and f(2)[1] == 2"),
    "slice": ("def f(x): return slice(1, x)", "assert f(3) == slice(1, 3) and 'abcd'[f(3)] == 'bc'"),
    "path": ("from pathlib import Path\ndef f(x): return Path('a') / x", "from pathlib import Path\nassert f('b') == Path('a/b')"),
    "uuid": ("import uuid\ndef f(x): return uuid.uuid5(uuid.NAMESPACE_DNS, x)", "import uuid\nassert f('a') == uuid.uuid5(uuid.NAMESPACE_DNS, 'a')"),
    "nan and -0": ("def f(x): return float('nan'), -0.0", "import math\na, b = f(1)\nassert math.isnan(a) and math.copysign(1, b) == -1"),
    "huge int": ("def f(x): return 10**x", "assert f(20000) == 10**20000"),
    "surrogate": ("def f(x): return '\\ud83d' + x", "assert f('a') == '\\ud83da'"),
    "match": ("import re\ndef f(x): return re.match(r'(\\w)(?P<n>\\d+)', x)", "m = f('a12')\nassert m and m.group(1) == 'a' and m['n'] == '12' and m.span() == (0, 3)\nassert f('') is None"),
    "type": ("def f(x): return type(x)", "assert f(1) is int and f('') == str and f(1)('5') == 5"),
    "ellipsis": ("def f(x): return [..., NotImplemented]", "assert f(1) == [..., NotImplemented]"),
    "keys of tuples": ("def f(x): return {(x, (1, 2)): frozenset({x})}", "assert f(1) == {(1, (1, 2)): {1}}"),
    "recursive": ("def f(x):\n    a = [x]\n    a.append(a)\n    return a", "a = f(1)\nassert a[1] is a"),
    "shared": ("def f(x):\n    r = [0]\n    return [r, r]", "a = f(1)\na[0][0] = 5\nassert a == [[5], [5]]"),
    "nested 600 deep": ("def f(x):\n    for _ in range(600): x = [x]\n    return x", "a = f(0)\nfor _ in range(600): a = a[0]\nassert a == 0"),
    "long": ("def f(x): return list(range(x))", "assert sum(f(1_500_000)) == 1_500_000 * 1_499_999 // 2"),
    # Objects of the program, as Python shows them.
    "hashed": ("from dataclasses import dataclass\n@dataclass(frozen=True)\nclass P:\n    x: int\ndef f(x): return P(x)", "assert len({f(1), f(1), f(2)}) == 2 and {f(1): 'a'}[f(1)] == 'a'"),
    "a set of such": ("class P:\n    def __init__(s, x): s.x = x\n    def __eq__(s, o): return s.x == o.x\n    def __hash__(s): return s.x\ndef f(x): return {P(x), P(x)}", "assert f(1) == f(1) and len(f(1)) == 1"),
    "vars and types": (V, "assert vars(f(1)) == {'x': 1} and type(f(1)) is type(f(2)) and isinstance(f(1), type(f(2)))"),
    "copies": (V, "import copy\na = f([1])\nb, c = copy.copy(a), copy.deepcopy(a)\nb.x = 2\ndel c.x\nassert a.x == [1] and b.x == 2 and not hasattr(c, 'x')"),
    "async for": ("async def f(n):\n    for i in range(n): yield i", "import asyncio\nasync def go(): return [v async for v in f(3)]\nassert asyncio.run(go()) == [0, 1, 2]"),
    "async with": ("from contextlib import asynccontextmanager\n@asynccontextmanager\nasync def f(x): yield x * 2", "import asyncio\nasync def go():\n    async with f(2) as v: return v\nassert asyncio.run(go()) == 4"),
    "the function's own": ("def f(a: int, b=5):\n    'Doc.'\n    f.count += 1\n    return f.count\nf.count = 0", "assert f(1) == 1 == f.count\nf.count = 8\nassert f(1) == 9 and f.__doc__ == 'Doc.' and f.__defaults__ == (5,)"),
    "other standard values": ("import ipaddress, re, statistics\nfrom collections import UserString\ndef f(x): return ipaddress.ip_address(x), re.compile('a+'), statistics.NormalDist(1, 2), UserString(x)", "import ipaddress, re, statistics\na, b, c, d = f('1.1.1.1')\nassert a == ipaddress.ip_address('1.1.1.1') and b == re.compile('a+') and b.match('aa') and c == statistics.NormalDist(1, 2) and d == '1.1.1.1'"),
    "context of an exception": ("def f():\n    try: 1 / 0\n    except ZeroDivisionError: raise KeyError('k')", "try: f()\nexcept KeyError as e: assert isinstance(e.__context__, ZeroDivisionError)"),
    # The problem's own classes, whatever they extend.
    "own namedtuple": (OWN + "def f(p): return Point(p.y, p.x)", "p = f(Point(1, 2))\nassert p == Point(2, 1) and isinstance(p, Point) and p.x == 2"),
    "own IntEnum": (OWN + "def f(c): return Level(c + 1)", "assert f(Level.LOW) is Level.HIGH"),
    "own Flag": (OWN + "def f(a, b): return a | b", "assert f(Right.R, Right.W) == Right.R | Right.W"),
    "own list": (OWN + "def f(b):\n    b.push(3)\n    b.name = 'n'\n    return b", "b = Bag([1])\nassert f(b) is b and b == [1, 3] and b.name == 'n' and type(b) is Bag"),
    "own dict": (OWN + "def f(d):\n    d['a'] = 5\n    return d.total()", "d = Sums(b=1)\nassert f(d) == 6 and d == {'a': 5, 'b': 1}"),
    # Larger than a pipe holds, both ways.
    "a large text given": ("def f(x): return x[::-1]", "assert f('ab' * 10**6) == 'ba' * 10**6"),
    "a large matrix given": ("def f(m): return [list(r) for r in zip(*m)]", "m = [[i * j for j in range(300)] for i in range(400)]\nassert f(m) == [[i * j for i in range(400)] for j in range(300)]"),
    # Lazily, by calls, by methods.
    "endless generator": ("def f(x):\n    while True:\n        yield x\n        x += 1", "g = f(2)\nassert [next(g) for _ in range(100)] == list(range(2, 102))"),
    "send": ("def f(x):\n    while True: x += yield x", "g = f(1)\nassert next(g) == 1 and g.send(5) == 6 and g.send(1) == 7"),
    "generator that raises": ("def f(x):\n    yield x\n    raise ValueError('end')", "g = f(1)\nassert next(g) == 1\ntry: next(g)\nexcept ValueError as e: assert str(e) == 'end'\nelse: assert 0"),
    "count": ("import itertools\ndef f(x): return itertools.count(x)", "import itertools\nassert list(itertools.islice(f(5), 3)) == [5, 6, 7]"),
    "is a generator": ("def f(x):\n    yield x", "import types\nassert isinstance(f(1), types.GeneratorType) and iter(g := f(1)) is g"),
    "closure": ("def f(x):\n    def g(y): return x + y\n    return g", "assert f(2)(3) == 5 and callable(f(1))"),
    "decorator": ("def f(g):\n    def wrapped(*a): return g(*a) + 1\n    return wrapped", "@f\ndef g(a, b): return a * b\nassert g(2, 3) == 7"),
    "callback": ("def f(g, a): return [g(v) for v in a]", "assert f(lambda v: v * 2, [1, 2]) == [2, 4] and f(str, [1]) == ['1'] and f(len, ['ab']) == [2]"),
    "key function": ("def f(a, key): return sorted(a, key=key)", "import operator\nassert f([(2, 1), (1, 2)], operator.itemgetter(1)) == [(2, 1), (1, 2)]"),
    "callback that raises": ("def f(g):\n    try: g()\n    except KeyError as e: return e.args[0]", "def g(): raise KeyError('k')\nassert f(g) == 'k'"),
    "callback that calls back": ("def f(n, g): return 1 if n == 0 else n * g(n - 1)", "def g(n): return f(n, g)\nassert f(5, g) == 120"),
    "function given back": ("def f(g): return g", "g = lambda: 1\nassert f(g) is g"),
    "iterator given": ("def f(it): return next(it) + next(it)", "it = iter([1, 2, 3])\nassert f(it) == 3 and next(it) == 3"),
    "methods": ("class f:\n    def __init__(self, x): self.x = x\n    def twice(self): return 2 * self.x", "a = f(2)\nassert a.twice() == 4\na.x = 5\nassert a.twice() == 10 and isinstance(a, f)"),
    "stack": ("class f:\n    def __init__(self): self.a = []\n    def push(self, v): self.a.append(v)\n    def pop(self): return self.a.pop()\n    def __len__(self): return len(self.a)\n    def __iter__(self): return iter(self.a)\n    def __getitem__(self, i): return self.a[i]",
              "s = f()\ns.push(1)\ns.push([2])\nassert len(s) == 2 and list(s) == [1, [2]] and s[1] == [2] and s.pop() == [2] and 1 in s\ntry:\n    s.pop(); s.pop()\nexcept IndexError as e: assert 'empty' in str(e)\nelse: assert 0"),
    "class method and property": ("class f:\n    def __init__(self, x): self._x = x\n    @classmethod\n    def of(cls, t): return cls(int(t))\n    @property\n    def x(self): return self._x\n    @staticmethod\n    def s(): return 's'", "assert f.of('3').x == 3 and f.s() == 's'"),
    "arithmetic of two": ("class f:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return f(self.x + o.x)\n    def __eq__(self, o): return self.x == o.x\n    def __lt__(self, o): return self.x < o.x\n    def __repr__(self): return f'f({self.x})'", "assert (f(1) + f(2)).x == 3 and f(1) + f(2) == f(3) and f(1) < f(2) and repr(f(1)) == 'f(1)' and [i.x for i in sorted([f(2), f(1)])] == [1, 2]"),
    "context manager": ("from contextlib import contextmanager\nlog = []\n@contextmanager\ndef f(x):\n    log.append('in')\n    yield log\n    log.append('out')", "with f(1) as log: assert log == ['in']"),
    "coroutine": ("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return 2 * x", "import asyncio\nassert asyncio.run(f(2)) == 4"),
    "async test": ("async def f(x): return 2 * x", "async def check(c):\n    assert await c(2) == 4"),
    # Changes in place.
    "nested list": ("def f(a): a[0].append(9)", "i = [1]\nf([i])\nassert i == [1, 9]"),
    "inside a tuple": ("def f(t): t[1]['k'].add(3)", "s = {1}\nf((0, {'k': s}))\nassert s == {1, 3}"),
    "keyword": ("def f(*, a): a.sort(reverse=True)", "a = [1, 2]\nassert f(a=a) is None and a == [2, 1]"),
    "deque given": ("def f(d): d.appendleft(0)", "from collections import deque\nd = deque([1])\nf(d)\nassert list(d) == [0, 1]"),
    "counter given": ("def f(c): c['a'] += 1", "from collections import Counter\nc = Counter('a')\nf(c)\nassert c == {'a': 2}"),
    "defaultdict given": ("def f(d, k): d[k].append(1)", "from collections import defaultdict\nd = defaultdict(list)\nf(d, 'x')\nf(d, 'x')\nassert d == {'x': [1, 1]}"),
    "bytearray": ("def f(b): b[0] = 120", "b = bytearray(b'abc')\nf(b)\nassert b == b'xbc'"),
    "matrix": ("def f(m):\n    m[:] = [list(r) for r in zip(*m[::-1])]", "m = [[1, 2], [3, 4]]\nf(m)\nassert m == [[3, 1], [4, 2]]"),
    "same object back": ("def f(a):\n    a.append(1)\n    return a", "a = []\nassert f(a) is a and a == [1]"),
    "aliased": ("def f(a, b): a.append(1)", "a = []\nf(a, a)\nassert a == [1]"),
    "file given": ("def f(out): print('hi', file=out)", "import io\no = io.StringIO()\nf(o)\nassert o.getvalue() == 'hi\\n'"),
    "changed, then raised": ("def f(a):\n    a.clear()\n    raise ValueError", "a = [1]\ntry: f(a)\nexcept ValueError: pass\nassert a == []"),
    "emptied": ("def f(d): d.clear()", "d = {1: [2]}\nf(d)\nassert d == {}"),
    "swapped inner": ("def f(a): a[0], a[1] = a[1], a[0]", "x, y = [1], [2]\na = [x, y]\nf(a)\nassert a[0] is y and a[1] is x"),
    # Classes of the problem itself.
    "linked list": (CLASS + "def f(h):\n    p = None\n    while h: h.next, p, h = p, h, h.next\n    return p",
                    "a = Node(1, Node(2, Node(3)))\nr = f(a)\nassert (r.v, r.next.v, r.next.next.v) == (3, 2, 1) and r.next.next is a and a.next is None and type(r) is Node"),
    "long linked list": (CLASS + "def f(h):\n    n = 0\n    while h: n, h = n + 1, h.next\n    return n", "h = None\nfor i in range(1000): h = Node(i, h)\nassert f(h) == 1000"),
    "typed numbers": ("def f(a, b): return a + b", "from decimal import Decimal\nfrom fractions import Fraction\nimport datetime\nassert f(Decimal('0.1'), Decimal('0.2')) == Decimal('0.3')\nassert f(Fraction(1, 3), 1) == Fraction(4, 3)\nassert f(datetime.date(2020, 2, 28), datetime.timedelta(1)).day == 29"),
}  # fmt: skip
SETUPS = {"linked list": CLASS, "long linked list": CLASS} | {
    n: OWN for n in PROGRAMS if n.startswith("own ") and OWN in PROGRAMS[n][0]
}
ODD = "class Odd{base}:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    __hash__ = None\n    {more}\ndef f(x): return {value}"
# Wrong ones, one at least for each kind above.
WRONG: dict[str, tuple[str, str]] = {
    "another text": ("def f(x): raise ValueError('Negative')", PROGRAMS["text"][1]),
    "text with its class": ("def f(x): raise ValueError('ValueError: negative')", PROGRAMS["text"][1]),
    "another class": ("def f(x): raise TypeError('negative')", PROGRAMS["text"][1]),
    "no base": ("class Odd(Exception): pass\ndef f(x): raise Odd('odd 3')", PROGRAMS["own class"][1]),
    "no exception at all": ("class Stop(BaseException): pass\ndef f(x): raise Stop", "try: f(1)\nexcept Exception: pass"),
    "skips its test": ("import unittest\ndef f(x): raise unittest.SkipTest('no')", "import unittest\ntry: f(1)\nexcept unittest.SkipTest: pass"),
    "enum's name": ("from enum import Enum\nclass C(Enum):\n    RED = 'red'\ndef f(x): return C.RED", "assert f(1) == 'red'"),
    "a tuple for a list": ("def f(x): return 2, [2]", "assert f(1) == [2, [2]]"),
    "keys that lack one": ("def f(x): return {x: 1}.keys()", PROGRAMS["keys"][1]),
    "another decimal": ("def f(x): return float(x) * 2", "from decimal import Decimal\nassert f('0.1') * 3 == Decimal('0.6')"),
    "other dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x, n=[0]):\n    n[0] += 1\n    return P(n[0])", "assert f(1) == f(1)"),
    "other content": ("class S(list): pass\ndef f(x): return S([x, 0])", "assert f(1) == [1]"),
    "yields another": ("def f(x):\n    while True: yield x", PROGRAMS["endless generator"][1]),
    "does not change": ("def f(a): a[0] + [9]", PROGRAMS["nested list"][1]),
    "changes too much": ("def f(a):\n    a.append(3)\n    return sum(a) - 3", "a = [1, 2]\nassert f(a) == 3 and a == [1, 2]"),
    "a copy": ("def f(a): return a + [1]", PROGRAMS["same object back"][1]),
    "ignores its function": ("def f(g, a): return a", PROGRAMS["callback"][1]),
    "equal to all": (ODD.format(base="", more="", value="Odd()"), "assert f(1) == 5"),
    "equal to all, inside": (ODD.format(base="", more="", value="[Odd()]"), "assert f(1) == [5]"),
    "equal to all, a value": (ODD.format(base="", more="", value="{'a': Odd()}"), "assert f(1) == {'a': 5}"),
    "equal to all, a list": (ODD.format(base="(list)", more="", value="Odd()"), "assert f(1) == [5]"),
    "equal to all, a str": (ODD.format(base="(str)", more="", value="Odd()"), "assert f(1) == 'a'"),
    "equal to all, a dict": (ODD.format(base="(dict)", more="", value="Odd()"), "assert f(1) == {1: 2}"),
    "no difference": (ODD.format(base="", more="def __sub__(s, o): return 0", value="Odd()"), "assert abs(f(1) - 5) < 1e-6"),
    "no difference, reflected": (ODD.format(base="", more="def __rsub__(s, o): return 0", value="Odd()"), "assert abs(5 - f(1)) < 1e-6"),
    "holds all": (ODD.format(base="", more="def __contains__(s, o): return True", value="Odd()"), "assert 5 in f(1)"),
    "always less": (ODD.format(base="", more="def __lt__(s, o): return True", value="Odd()"), "assert f(1) < 5"),
    "a dataclass equal to all": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    def __eq__(s, o): return True\ndef f(x): return P(x)", "assert f(1) == 5"),
    "a namedtuple equal to all": ("from typing import NamedTuple\nclass P(NamedTuple):\n    x: int\n    def __eq__(s, o): return True\ndef f(x): return P(x)", "assert f(1) == (5,)"),
    "an enum equal to all": ("from enum import Enum\nclass C(str, Enum):\n    A = 'a'\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(x): return C.A", "assert f(1) == 'b'"),
    "the problem's class, equal to all": (CLASS + "    def __eq__(s, o): return True\ndef f(h): return Node(9)", "assert f(Node(1)) == Node(1) and f(Node(1)).v == 1"),
    "an exception's attribute equal to all": (ODD.format(base="", more="", value="1") + "\nclass E(Exception): pass\ndef f(x):\n    e = E()\n    e.code = Odd()\n    raise e", "try: f(1)\nexcept Exception as e: assert e.code == 5"),
    "a generator of such": (ODD.format(base="", more="", value="iter([Odd()])"), "assert list(f(1)) == [5]"),
    "a lying hash": (ODD.format(base="", more="", value="Odd()").replace("__hash__ = None", "__hash__ = lambda s: hash(5)"), "assert f(1) in {5} and {5: 'a'}[f(1)]"),
    "hashed, not equal": ("class P:\n    def __init__(s, x): s.x = x\n    def __hash__(s): return 1\n    def __eq__(s, o): return s.x == o.x\ndef f(x, n=[0]):\n    n[0] += 1\n    return P(n[0])", "assert len({f(1), f(1)}) == 1"),
    "another point": (OWN + "def f(p): return Point(p.x, p.y)", PROGRAMS["own namedtuple"][1]),
    "a tuple for a point": (OWN + "def f(p): return (p.y, p.x)", PROGRAMS["own namedtuple"][1]),
    "own list unchanged": (OWN + "def f(b):\n    b = Bag(b)\n    b.push(3)\n    return b", PROGRAMS["own list"][1]),
    "point, equal to all": (OWN + "class Point(Point):\n    def __eq__(s, o): return True\ndef f(p): return Point(0, 0)", PROGRAMS["own namedtuple"][1]),
    "an int past its index": (ODD.format(base="(int)", more="def __index__(s): return 5", value="Odd(4)"), "assert f(1) == 5"),
}  # fmt: skip
WRONG_SETUPS = {"the problem's class, equal to all": CLASS} | {n: OWN for n in WRONG if OWN in WRONG[n][0]}
