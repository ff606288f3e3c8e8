# ruff: noqa: E501 (a program is a line)
"""Unusual but right contest programs: each reads numbers and prints their sum, as `python prog.py < input` runs it."""

import textwrap

_PROGRAMS = {
    "input": "n = int(input())\nprint(sum(map(int, input().split())))",
    "read": "import sys\nd = sys.stdin.read().split()\nprint(sum(map(int, d[1:])))",
    "readline": "import sys\ninput = sys.stdin.readline\nn = int(input())\nprint(sum(map(int, input().split())))",
    "buffer": "import sys\nd = sys.stdin.buffer.read().split()\nsys.stdout.buffer.write(str(sum(map(int, d[1:]))).encode())",
    "buffer readline": "import sys\ninput = sys.stdin.buffer.readline\ninput()\nprint(sum(map(int, input().split())))",
    "readlines": "import sys\nprint(sum(map(int, sys.stdin.readlines()[1].split())))",
    "for line": "import sys\nfor i, line in enumerate(sys.stdin):\n    if i == 1: print(sum(map(int, line.split())))",
    "iter input": """
        lines = []
        try:
            for line in iter(input, None):
                lines.append(line)
        except EOFError:
            pass
        print(sum(map(int, lines[1].split())))
    """,
    "until EOF": """
        lines = []
        while True:
            try:
                lines.append(input())
            except EOFError:
                break
        print(sum(map(int, ' '.join(lines[1:]).split())))
    """,
    "os.read": "import os\nd = os.read(0, 10**6).split()\nprint(sum(map(int, d[1:])))",
    "os.fstat": "import os\nd = os.read(0, os.fstat(0).st_size).split()\nprint(sum(map(int, d[1:])))",
    "open(0)": "d = open(0).read().split()\nprint(sum(map(int, d[1:])))",
    "with open(0)": "with open(0, 'rb') as f:\n    d = f.read().split()\nprint(sum(map(int, d[1:])))",
    "a file kept open": "f = open(0)\ndef g(): return f\nd = g().read().split()\nprint(sum(map(int, d[1:])))",
    "/dev/stdin": "d = open('/dev/stdin').read().split()\nprint(sum(map(int, d[1:])))",
    "os.fdopen": "import os\nd = os.fdopen(0).read().split()\nprint(sum(map(int, d[1:])))",
    "io.open": "import io\nd = io.open(0).read().split()\nprint(sum(map(int, d[1:])))",
    "fileinput": "import fileinput\nd = ''.join(fileinput.input()).split()\nprint(sum(map(int, d[1:])))",
    "BytesIO": """
        import os, sys
        from io import BytesIO, IOBase
        sys.stdin = BytesIO(os.read(0, os.fstat(0).st_size))
        input = lambda: sys.stdin.readline().rstrip(b'\\r\\n').decode()
        input()
        print(sum(map(int, input().split())))
    """,
    "FastIO": """
        import os, sys
        from io import BytesIO, IOBase
        class FastIO(IOBase):
            newlines = 0
            def __init__(self, file):
                self._fd = file.fileno()
                self.buffer = BytesIO()
                self.writable = 'x' in file.mode or 'r' not in file.mode
                self.write = self.buffer.write if self.writable else None
            def readline(self):
                while self.newlines == 0:
                    b = os.read(self._fd, max(os.fstat(self._fd).st_size, 8192))
                    self.newlines = b.count(b'\\n') + (not b)
                    ptr = self.buffer.tell()
                    self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
                self.newlines -= 1
                return self.buffer.readline()
            def flush(self):
                if self.writable:
                    os.write(self._fd, self.buffer.getvalue())
                    self.buffer.truncate(0), self.buffer.seek(0)
        class IOWrapper(IOBase):
            def __init__(self, file):
                self.buffer = FastIO(file)
                self.flush = self.buffer.flush
                self.writable = self.buffer.writable
                self.write = lambda s: self.buffer.write(s.encode('ascii'))
                self.readline = lambda: self.buffer.readline().decode('ascii')
        sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
        input = lambda: sys.stdin.readline().rstrip('\\r\\n')
        input()
        print(sum(map(int, input().split())))
    """,
    "StringIO output": """
        import io, sys
        input()
        out = sys.stdout
        sys.stdout = io.StringIO()
        print(sum(map(int, input().split())))
        out.write(sys.stdout.getvalue())
    """,
    "atexit": """
        import atexit, io, sys
        buffer = io.BytesIO()
        sys.stdout = io.TextIOWrapper(buffer, write_through=True)
        @atexit.register
        def write():
            sys.__stdout__.write(buffer.getvalue().decode())
        input()
        print(sum(map(int, input().split())))
    """,
    "atexit print": "import atexit\nd = open(0).read().split()\natexit.register(lambda: print(sum(map(int, d[1:]))))",
    "__stdout__": "import sys\ninput()\nsys.__stdout__.write(str(sum(map(int, input().split()))))",
    "__stdin__": "import sys\nd = sys.__stdin__.read().split()\nprint(sum(map(int, d[1:])))",
    "os.write": "import os\ninput()\nos.write(1, str(sum(map(int, input().split()))).encode())",
    "exit": "input()\nprint(sum(map(int, input().split())))\nexit()",
    "exit(0) early": "if True:\n    input()\n    print(sum(map(int, input().split())))\n    exit(0)\nprint('no')",
    "quit": "input()\nprint(sum(map(int, input().split())))\nquit()",
    "sys.exit": "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.exit(0)\nprint('no')",
    "raise SystemExit": "input()\nprint(sum(map(int, input().split())))\nraise SystemExit",
    "os._exit": "import os\ninput()\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)\nprint('no')",
    "os._exit in a thread": """
        import os, sys, threading
        def main():
            input()
            print(sum(map(int, input().split())))
            sys.stdout.flush()
            os._exit(0)
        threading.Thread(target=main).start()
    """,
    "main guard": "def main():\n    input()\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "thread with a stack": """
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(2**27)
        def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
        def main():
            input()
            print(sum(map(int, input().split())) + deep(50000) - 50000)
        t = threading.Thread(target=main)
        t.start()
        t.join()
    """,
    "larger stack": """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.setrecursionlimit(10**7)
        input()
        print(sum(map(int, input().split())))
    """,
    "larger stack, 2": """
        from resource import *
        import sys
        setrlimit(RLIMIT_STACK, (2**29, 2**29))
        input()
        print(sum(map(int, input().split())))
    """,
    "bootstrap": """
        from types import GeneratorType
        def bootstrap(f, stack=[]):
            def wrapped(*args, **kwargs):
                if stack: return f(*args, **kwargs)
                to = f(*args, **kwargs)
                while True:
                    if type(to) is GeneratorType:
                        stack.append(to)
                        to = next(to)
                    else:
                        stack.pop()
                        if not stack: break
                        to = stack[-1].send(to)
                return to
            return wrapped
        @bootstrap
        def total(a, i):
            if i == len(a): yield 0
            yield a[i] + (yield total(a, i + 1))
        input()
        print(total(list(map(int, input().split())), 0))
    """,
    "end and flush": "input()\nfor c in str(sum(map(int, input().split()))): print(c, end='', flush=True)\nprint()",
    "sep and file": "import sys\ninput()\nprint(sum(map(int, input().split())), file=sys.stdout, sep='')",
    "noise on stderr": "import sys\nprint('debug', file=sys.stderr)\ninput()\nprint(sum(map(int, input().split())))",
    "argv": "import sys\ninput()\nprint(sum(map(int, input().split())) if len(sys.argv) == 1 else -1)",
    "local judge flag": "import os, sys\nif os.path.exists('input.txt'): sys.stdin = open('input.txt')\ninput()\n"
    "print(sum(map(int, input().split())))",
    "redirect by argv": "import sys\nif len(sys.argv) > 1: sys.stdin = open(sys.argv[1])\ninput()\n"
    "print(sum(map(int, input().split())))",
    "future": "from __future__ import annotations\ndef f(x: List[int]) -> Nope: return sum(x)\ninput()\n"
    "print(f(map(int, input().split())))",
    "lambda recursion": "f = lambda a: a[0] + f(a[1:]) if a else 0\ninput()\nprint(f([*map(int, input().split())]))",
    "Y combinator": "input()\nprint((lambda g: g(g))(lambda g: lambda a: a[0] + g(g)(a[1:]) if a else 0)"
    "([*map(int, input().split())]))",
    "one line": "print(sum(map(int, [*open(0)][1].split())))",
    "exec": "exec('input()\\nprint(sum(map(int, input().split())))')",
    "eval": "input()\nprint(eval('+'.join(input().split())))",
    "reduce": "from functools import *\nfrom operator import *\ninput()\nprint(reduce(add, map(int, input().split())))",
    "accumulate": "from itertools import *\ninput()\n*_, last = accumulate(map(int, input().split()))\nprint(last)",
    "decimal": "from decimal import *\ngetcontext().prec = 50\ninput()\nprint(sum(map(Decimal, input().split())))",
    "fraction": "from fractions import Fraction\ninput()\nprint(sum(map(Fraction, input().split())))",
    "typing and dataclass": """
        from dataclasses import dataclass, field
        from typing import List
        @dataclass(order=True)
        class Item:
            v: int
            seen: List[int] = field(default_factory=list, compare=False)
        input()
        print(sum(i.v for i in sorted(map(Item, map(int, input().split())))))
    """,
    "class Main": "class Main:\n    def run(self):\n        input()\n        print(sum(map(int, input().split())))\nMain().run()",
    "trailing spaces": "input()\nprint(*[sum(map(int, input().split()))], end=' \\n\\n')",
    "walrus": "input()\nif (s := sum(map(int, input().split()))) is not None: print(s)",
    "match": "input()\nmatch [*map(int, input().split())]:\n    case [a, b, c]: print(a + b + c)",
    "gc and random": "import gc, random\ngc.disable()\nrandom.seed(1)\ninput()\na = [*map(int, input().split())]\n"
    "random.shuffle(a)\nprint(sum(a))",
    "signal alarm": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.alarm(9)\ninput()\n"
    "print(sum(map(int, input().split())))\nsignal.alarm(0)",
    "faulthandler": "import faulthandler\nfaulthandler.enable()\ninput()\nprint(sum(map(int, input().split())))",
    "multiprocessing": "from multiprocessing import Pool\ndef g(x): return x\nif __name__ == '__main__':\n    input()\n"
    "    with Pool(2) as p: print(sum(p.map(g, map(int, input().split()))))",
    "executor": "from concurrent.futures import ProcessPoolExecutor as E\ndef g(x): return x\ninput()\n"
    "with E(2) as e: print(sum(e.map(g, map(int, input().split()), chunksize=2)))",
    "pickle of one's own class": "import pickle\nclass A: pass\na = pickle.loads(pickle.dumps(A()))\ninput()\n"
    "print(sum(map(int, input().split())))",
    "__main__": "import __main__\nx = 5\nassert __main__.x == 5\ninput()\nprint(sum(map(int, input().split())))",
    "__file__": "import os\nos.chdir(os.path.dirname(os.path.abspath(__file__)))\ninput()\nprint(sum(map(int, input().split())))",
    "inspect": "import inspect\ndef g(): return 1\nassert 'return 1' in inspect.getsource(g)\ninput()\n"
    "print(sum(map(int, input().split())))",
    "logging": "import logging\nlogging.basicConfig(level=10)\nlogging.debug('x')\ninput()\nprint(sum(map(int, input().split())))",
    "tempfile": "import tempfile\ninput()\nwith tempfile.TemporaryFile('w+') as f:\n    f.write(input()); f.seek(0)\n"
    "    print(sum(map(int, f.read().split())))",
    "devnull": "import os, sys\nsys.stderr = open(os.devnull, 'w')\nprint('x', file=sys.stderr)\ninput()\n"
    "print(sum(map(int, input().split())))",
    "mmap": "import mmap\nm = mmap.mmap(0, 0, prot=mmap.PROT_READ)\nprint(sum(map(int, m.read().split()[1:])))",
    "seek back": "import sys\nsys.stdin.read()\nsys.stdin.seek(0)\ninput()\nprint(sum(map(int, input().split())))",
    "reconfigure": "import sys\nsys.stdout.reconfigure(line_buffering=True)\ninput()\nprint(sum(map(int, input().split())))",
    "asyncio": "import asyncio\nasync def main():\n    input()\n    print(sum(map(int, input().split())))\nasyncio.run(main())",
    "threads": "from threading import Thread\nr = []\ninput()\na = input().split()\n"
    "t = [Thread(target=lambda v=v: r.append(int(v))) for v in a]\n[x.start() for x in t]\n[x.join() for x in t]\nprint(sum(r))",
    # What one call leaves behind must not reach the next.
    "a file on 0 that is collected": "import io\nb = io.BufferedReader(io.FileIO(0))\nb.readline()\nprint(sum(map(int, b.readline().split())))",
    "builtins bound to a stream": "import builtins, sys\nn = int(builtins.input())\nbuiltins.input = sys.stdin.readline\nprint(sum(map(int, input().split())))",
    "prints when deleted": "class A:\n    def __del__(self): print(self.v)\na = A()\ninput()\na.v = sum(map(int, input().split()))",
    "finalizer": "import weakref\nclass A: pass\na = A()\ninput()\nv = sum(map(int, input().split()))\nweakref.finalize(a, lambda: print(v))",
    "executor not shut down": "from concurrent.futures import ThreadPoolExecutor\ne = ThreadPoolExecutor(2)\ninput()\nprint(sum(e.map(int, input().split())))",
    "names of the streams": "import sys\nassert (sys.stdin.name, sys.stdout.name) == ('<stdin>', '<stdout>')\ninput()\nprint(sum(map(int, input().split())))",
    "builtins as a module": "assert 'input' in dir(__builtins__)\ninput()\nprint(sum(map(int, input().split())))",
    "source of a class": "import inspect\nclass A:\n    x = 1\nassert 'x = 1' in inspect.getsource(A)\ninput()\nprint(sum(map(int, input().split())))",
    "half a GiB of stack": """
        import sys, threading
        sys.setrecursionlimit(1 << 30)
        threading.stack_size(1 << 29)
        def main():
            input()
            print(sum(map(int, input().split())))
        t = threading.Thread(target=main)
        t.start()
        t.join()
    """,
    "deep calls through C": """
        import resource, sys
        from functools import lru_cache
        resource.setrlimit(resource.RLIMIT_STACK, (2**29, resource.getrlimit(resource.RLIMIT_STACK)[1]))
        sys.setrecursionlimit(10**6)
        @lru_cache(None)
        def r(n): return 0 if n == 0 else 1 + r(n - 1)
        input()
        print(sum(map(int, input().split())) + r(60000) - 60000)
    """,
    "prompt to nobody": "input('')\nprint(sum(map(int, input('').split())))",
    "unicode": "input()\n合計 = sum(map(int, input().split()))\nprint(合計)",
    "closes stdin": "import sys\nd = sys.stdin.read().split()\nsys.stdin.close()\nprint(sum(map(int, d[1:])))",
    "closes stdout": "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.stdout.close()",
}
PROGRAMS = {name: textwrap.dedent(program) for name, program in _PROGRAMS.items()}
# Twins that are wrong: by the answer, by what they print around it, by not getting there.
WRONG = {
    "another answer": "input()\nprint(sum(map(int, input().split())) + 1)",
    "a prompt is output": "input('n? ')\nprint(sum(map(int, input().split())))",
    "noise": "print('debug')\ninput()\nprint(sum(map(int, input().split())))",
    "exit before": "exit()\nprint(6)",
    "os._exit before it is written": "import os\ninput()\nprint(sum(map(int, input().split())))\nos._exit(0)",
    "raises after": "input()\nprint(sum(map(int, input().split())))\nraise ValueError",
    "nothing": "",
    "remembers": "import sys\nsys.seen = getattr(sys, 'seen', 0) + 1\nprint(6 if sys.seen == 1 else 0)",
}
# Inputs as judges have them: Windows line ends, no line end, spaces, a sum that is another.
CASES = [
    ("3\n1 2 3\n", "6\n"),
    ("3\r\n1 2 3\r\n", "6"),
    ("3\n1 2 3", "6"),
    ("3\n1  2   3 \n\n", "6\n"),
    ("3\n-5 0 105\n", "100\n"),
    # Larger than a pipe holds; the third number is still the last.
    (f"3\n{' ' * 100_000}1 2 3\n", "6\n"),
]
