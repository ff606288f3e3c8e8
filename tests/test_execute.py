"""Judging untrusted programs: right ones pass, wrong ones fail, hostile ones are held and never pass."""

import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiers import HERE

from qtool import QtoolError
from qtool.evaluate.sandbox import execute, seccomp
from qtool.evaluate.sandbox.execute import Job, detect_sandbox, run_programs
from qtool.evaluate.sandbox.process import Outcome, Worker, WorkerLost

SECRET = "only the test knows 9731"
TEST = f'''
def check(candidate):
    """{SECRET}"""
    assert candidate(2) == 4
    assert candidate(21) == 42
    assert candidate(-3) == -6
'''


pytestmark = pytest.mark.skipif(not HERE, reason="no sandbox on this machine")


def job(program: str, test: str = TEST, name: str = "job", setup: str = "") -> Job:
    return Job(name, textwrap.dedent(program), textwrap.dedent(test), "f", setup)


def judge(program: str, test: str = TEST, setup: str = "") -> Outcome:
    return run_programs([job(program, test, setup=setup)], timeout=20.0, workers=1)[0]


# A message of the program's own instead of its answers, and then the right answer.
FORGED = """
    import qtool.evaluate.sandbox.wire as w
    def pack(self, value, limit=0):
        if value[0] != 'is':
            return really(self, value)
        w.Writer.pack = really
        return b'DATA'
    really, w.Writer.pack = w.Writer.pack, pack
    def f(x):
        return 0
"""
# Programs that are right only if the attack worked: {free} names a folder outside, {port} a listening socket.
ATTACKS = {
    "fork bomb": """
        import os
        def f(x):
            while True:
                os.fork()
    """,
    "fork": """
        import os
        def f(x):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            return 2 * x
    """,
    "thread bomb": """
        import threading, time
        def f(x):
            for _ in range(2000):
                threading.Thread(target=time.sleep, args=(100,)).start()
            return 2 * x
    """,
    "10 GB": "def f(x):\n    block = bytearray(10 * 2**30)\n    return 2 * x",
    "10 GB in pieces": "def f(x):\n    blocks = [bytearray(2**24) for _ in range(640)]\n    return 2 * x",
    "infinite loop": "def f(x):\n    while True:\n        pass",
    "infinite loop while loading": "while True:\n    pass\ndef f(x):\n    return 2 * x",
    "loop in C": "def f(x):\n    return 9 ** 9 ** 9",
    "infinite output": "def f(x):\n    while True:\n        print('x' * 10000)",
    "infinite output to every descriptor": """
        import os
        def f(x):
            while True:
                for fd in range(256):
                    try:
                        os.write(fd, b'x' * 65536)
                    except OSError:
                        pass
    """,
    "infinite answer": "def f(x):\n    n = 0\n    while True:\n        yield n",
    "huge answer": "def f(x):\n    return 'x' * 10**8",
    "deep answer": "def f(x):\n    a = []\n    for _ in range(10**5):\n        a = [a]\n    return a",
    "cyclic answer": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "token": "import os\ndef f(x):\n    return 2 * x if os.environ else None",
    "token in memory": """
        def f(x):
            return 2 * x if b'HF_TOKEN' in open('/proc/self/environ', 'rb').read() else None
    """,
    "parent's environment": """
        import os
        def f(x):
            return 2 * x if open(f'/proc/{os.getppid()}/environ', 'rb').read() else None
    """,
    "ssh": """
        import os, pathlib
        def f(x):
            homes = [pathlib.Path(os.path.expanduser(name)) for name in ('~', '{home}', '/root', '{free}')]
            return 2 * x if [key for home in homes for key in home.glob('.ssh/*')] else None
    """,
    "read outside": "def f(x):\n    return 2 * x if open('{free}/private').read() else None",
    "list outside": "import os\ndef f(x):\n    return 2 * x if os.listdir('{free}') else None",
    "read passwd": "def f(x):\n    return 2 * x if open('/etc/passwd').read() else None",
    "write outside": "def f(x):\n    open('{free}/written', 'w').write('x')\n    return 2 * x",
    "overwrite the standard library": "import os\ndef f(x):\n    open(os.__file__, 'a')\n    return 2 * x",
    "remove outside": "import os\ndef f(x):\n    os.unlink('{free}/private')\n    return 2 * x",
    "link outside": """
        import os
        def f(x):
            os.symlink('{free}', 'd')
            open('d/written', 'w')
            return 2 * x
    """,
    "big file": "def f(x):\n    open('big', 'wb').write(bytes(2**26))\n    return 2 * x",
    "fill the disk": """
        def f(x):
            for i in range(40):
                with open(f'file{i}', 'wb', buffering=0) as file:
                    assert file.write(bytes(2**24)) == 2**24
            raise SystemExit
    """,
    "connect": """
        import socket
        def f(x):
            socket.create_connection(('127.0.0.1', {port}), 1)
            return 2 * x
    """,
    "udp": """
        import socket
        def f(x):
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))
            return 2 * x
    """,
    "listen": "import socket\ndef f(x):\n    socket.create_server(('127.0.0.1', 0))\n    return 2 * x",
    "abstract socket": """
        import socket
        def f(x):
            socket.socket(socket.AF_UNIX).bind(chr(0) + 'q')
            return 2 * x
    """,
    "shell": "import os\ndef f(x):\n    return 2 * x if os.system('true') == 0 else None",
    "subprocess": """
        import subprocess, sys
        def f(x):
            subprocess.run([sys.executable, '-c', ''], check=True)
            return 2 * x
    """,
    "exec": "import os, sys\ndef f(x):\n    os.execv('/bin/sh', ['sh', '-c', 'echo passed'])",
    "kill the parent": "import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    while True: pass",
    "kill everybody": "import os\ndef f(x):\n    os.kill(-1, 9)\n    return 0",
    "kill the group": "import os\ndef f(x):\n    os.killpg(0, 9)\n    return 0",
    "stop": "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)\n    return 0",
    "exit": "import sys\ndef f(x):\n    sys.exit(0)",
    "exit while loading": "import sys\ndef f(x):\n    return 2 * x\nsys.exit(0)",
    "os._exit": "import os\ndef f(x):\n    os._exit(0)",
    "os._exit while loading": "import os\nos._exit(0)",
    "exit at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    raise SystemExit(0)",
    "crash": "import ctypes\ndef f(x):\n    return ctypes.string_at(0)",
    "recursion": "def f(x):\n    return f(x)",
    "forge": """
        import os, json
        def frames():
            for value in (["passed", ""], ["g", "passed"], {"ready": True}, {"outcome": "passed"}):
                data = json.dumps(value).encode()
                yield len(data).to_bytes(4, "big") + data
                yield data + b"\\n"
        for fd in range(256):
            for frame in frames():
                try:
                    os.write(fd, frame)
                except OSError:
                    pass
        def f(x):
            os._exit(0)
    """,
    "forge while called": """
        import os
        def f(x):
            for fd in range(256):
                try:
                    os.write(fd, b'\\0\\0\\0\\x0d["passed",""]')
                except OSError:
                    pass
            return 0
    """,
    "answer nonsense": FORGED.replace("DATA", '{"t":["is",{"x":[]},{"d":[]}]}'),
    "answer no value": FORGED.replace("DATA", '["passed",""]'),
    "answer a class": FORGED.replace("DATA", '{"t":["is",{"T":["builtins","eval"]},{"d":[]}]}'),
    "answer a function": FORGED.replace("DATA", '{"t":["is",{"T":["posix","system"]},{"d":[]}]}'),
    "answer what it never got": FORGED.replace("DATA", '{"t":["is",{"x":["home",0]},{"d":[]}]}'),
    "answer a value never met": FORGED.replace("DATA", '{"t":["is",{"@":7},{"d":[]}]}'),
    "answer with other arguments": FORGED.replace("DATA", '{"t":["is",null,{"d":[[0,[4]],[-1,[4]],["a",4]]}]}'),
    "answer every exception": FORGED.replace(
        "DATA", '{"t":["raised",{"x":["error","X",[["unittest.case","SkipTest"]],{"t":[]},"",{"d":[]},null]},{"d":[]}]}'
    ),
    "answer no exception": FORGED.replace("DATA", '{"t":["raised",4,{"d":[]}]}'),
    "answer a base of all": FORGED.replace(
        "DATA", '{"t":["raised",{"x":["error","X",[["builtins","BaseException"]],{"t":[]},"",{"d":[]},null]},{"d":[]}]}'
    ),
    "answer odd traits": FORGED.replace(
        "DATA",
        '{"t":["is",{"x":["kept",1,{"d":[["name","int"],["has",["__class__","__hash__"]],["equal",false]]}]},{"d":[]}]}',
    ),
    "answer content of another type": FORGED.replace(
        "DATA",
        '{"t":["is",{"x":["kept",1,{"d":[["name","int"],["has",[]],["equal",false],["is","int"],["content",[4]]]}]},{"d":[]}]}',
    ),
    "ask for an attribute": FORGED.replace("DATA", '{"t":["do","get",0,{"t":["__globals__"]},{"d":[]}]}'),
    "ask the test to call": FORGED.replace("DATA", '{"t":["do","__call__",0,{"t":[]},{"d":[]}]}'),
    "ask the test to call by name": FORGED.replace(
        "DATA", '{"t":["do","__call__",{"T":["builtins","exec"]},{"t":["1"]},{"d":[]}]}'
    ),
    "close everything": "import os\ndef f(x):\n    os.closerange(0, 256)\n    return 2 * x",
    "patch builtins": """
        import builtins
        class Quiet(AssertionError):
            def __new__(cls, *a): raise SystemExit(0)
        builtins.AssertionError = Quiet
        builtins.abs = builtins.len = builtins.isinstance = lambda *a: True
        def f(x):
            return 0
    """,
    "patch the checker": """
        import sys
        for name, module in list(sys.modules.items()):
            for key in ("judge", "main", "wait_ready"):
                if hasattr(module, key):
                    setattr(module, key, lambda *a: ("passed", ""))
        import qtool.evaluate.sandbox.checker as k
        k.Candidate.__call__ = lambda self, x: 2 * x
        def f(x):
            return 0
    """,
    "patch numbers": """
        import ctypes
        def f(x):
            for n in range(-5, 200):
                ctypes.c_long.from_address(id(n) + 24).value = 4
            return 4
    """,
    "frames": """
        import sys, gc
        def f(x):
            frame, seen = sys._getframe(), []
            while frame:
                seen.append(repr(frame.f_locals) + repr(frame.f_globals))
                frame = frame.f_back
            seen += [repr(o) for o in gc.get_objects() if type(o) in (dict, list, tuple, str)]
            # Backwards, so that it does not find itself.
            mark = ''.join(reversed('1379 swonk tset eht ylno'))
            return 2 * x if any(mark in text for text in seen) else None
    """,
    "memory": """
        import ctypes, re
        def f(x):
            mark = bytes(reversed(b'1379 swonk tset eht ylno'))
            for line in open('/proc/self/maps'):
                low, high = (int(part, 16) for part in line.split()[0].split('-'))
                if 'rw' in line and mark in ctypes.string_at(low, high - low):
                    return 2 * x
    """,
    "another's memory": """
        import os
        def f(x):
            for pid in range(1, 2000):
                try:
                    open(f'/proc/{pid}/mem', 'rb')
                    return 2 * x
                except OSError:
                    pass
    """,
    "ptrace": """
        import ctypes, os
        def f(x):
            libc = ctypes.CDLL(None)
            return 2 * x if libc.ptrace(16, os.getppid() or 1, 0, 0) == 0 else None
    """,
    "namespaces": """
        import ctypes
        def f(x):
            libc = ctypes.CDLL(None)
            ok = libc.unshare(0x10000000) == 0 or libc.mount(b'a', b'/tmp', b'tmpfs', 0, None) == 0
            return 2 * x if ok else None
    """,
    "become root": "import os\ndef f(x):\n    os.setgroups([0])\n    os.setuid(0)\n    return 2 * x",
    "raise the limits": """
        import resource
        def f(x):
            resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
            return 2 * x
    """,
    "descriptors": """
        import os
        def f(x):
            for fd in range(3, 256):
                try:
                    os.set_blocking(fd, False)
                    if bytes(reversed(b'1379')) in os.read(fd, 10**6):
                        return 2 * x
                except OSError:
                    pass
    """,
    "threads that stay": """
        import threading
        def spin():
            while True:
                pass
        def f(x):
            for _ in range(4):
                threading.Thread(target=spin).start()
            return 0
    """,
    "stdin": "import sys\ndef f(x):\n    return 2 * x if sys.stdin.read() else None",
    "input": "def f(x):\n    return 2 * x if input() else None",
    "unreadable exception": """
        class Evil(Exception):
            def __str__(self): raise SystemExit(0)
        def f(x):
            raise Evil
    """,
    "unreadable folders": """
        import os
        def f(x):
            os.makedirs('a/b')
            for folder in ('a/b', 'a', '.'):
                os.chmod(folder, 0)
            return 0
    """,
    "folders deeper than a path is long": """
        import os
        def f(x):
            for _ in range(40):
                os.mkdir('a' * 250)
                os.chdir('a' * 250)
            return 0
    """,
    "folders deeper than a stack": """
        import os
        def f(x):
            for _ in range(1500):
                os.mkdir('a')
                os.chdir('a')
            os.chmod('.', 0)
            return 0
    """,
    "no such function": "def g(x):\n    return 2 * x",
    "not a program": "def f(x:\n",
    "message of many bytes": """
        import json, os
        data = json.dumps({'d': [['raised', ['X', chr(0x1f600) * 500]]]}).encode()
        def f(x):
            os.write(4, len(data).to_bytes(4, 'big') + data)
            os._exit(0)
    """,
    "null byte": "def f(x):\n    return 2 * x\0",
    "surrogate": "def f(x):\n    return '\ud800'",
    "nothing": "",
}
EQUAL = """
    class {name}({base}):
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __hash__(self): return 0
        def __bool__(self): return True
        __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def f(x):
        return {value}
"""
for base in ("object", "int", "float", "str", "bytes", "list", "tuple", "dict", "set", "frozenset"):
    ATTACKS[f"always equal {base}"] = EQUAL.format(name="Same", base=base, value="Same()")
ATTACKS["always equal, inside a list"] = EQUAL.format(name="Same", base="int", value="[Same()]")
ATTACKS["always equal, named int"] = EQUAL.format(name="int", base="int", value="int()")
ATTACKS["always equal, lies about its class"] = EQUAL.format(
    name="Same", base="object", value="type('Same', (Same,), {'__class__': int})()"
)


# Those that never end, or would fill their memory for seconds first.
ENDLESS = {"infinite loop", "infinite loop while loading", "loop in C", "infinite output", "10 GB in pieces"}


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Workers' folders, and so their command lines, carry this path: afterwards no process may."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield str(tmp_path)
    deadline = time.monotonic() + 5
    while running(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running(str(tmp_path)) == []
    assert list(tmp_path.glob("qtool-cell-*")) == []


def running(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


# In one process with its test a program can cheat: these do. Everything else about them is held all the same.
CHEATS = {name for name in ATTACKS if name.startswith("always equal")} - {"always equal, inside a list"} | {"frames"}
# Not an escape: in process the environment names the job's own folder, for libraries' caches.
CHEATS |= {"token"}
NAMES = """
    import os
    def f(x):
        return 2 * x if set(os.environ) == {'HOME', 'MPLCONFIGDIR', 'MPLBACKEND'} else None
"""
JAVASCRIPT_TEST = """
function test() {
  const candidate = f;
  if (candidate(2) !== 4 || candidate(21) !== 42 || candidate(-3) !== -6) throw new Error("wrong");
}
test();
"""
# Wrong or hostile, with the body of f(x) where the key ends in a parenthesis. {free} and {port} as above.
JAVASCRIPT_ATTACKS = {
    "fork bomb": "while (true) { try { require('child_process').spawn('/bin/true'); } catch { } }",
    "shell": "return require('child_process').execSync('true') ? 2 * x : 2 * x;",
    "node again": "return require('child_process').spawnSync(process.execPath, ['-e', '0']).status === 0 ? 2 * x : 0;",
    "cluster": "require('cluster').fork(); return 2 * x;",
    "10 GB": "const a = []; for (let i = 0; i < 640; i++) a.push(Buffer.alloc(2 ** 24, 1)); return 2 * x;",
    "10 GB heap": "const a = []; for (;;) a.push(new Array(1000).fill(Math.random()));",
    "infinite loop": "for (;;) {}",
    "infinite output": "for (;;) console.log('x'.repeat(10000));",
    "infinite answer": "return 'x'.repeat(2 ** 28);",
    "cyclic answer": "const a = []; a.push(a); return a;",
    "recursion": "return f(x);",
    "token": "return Object.keys(process.env).filter((k) => k !== 'OPENSSL_CONF').length ? 2 * x : 0;",
    "token in memory": "return /HF_TOKEN/.test(require('fs').readFileSync('/proc/self/environ')) ? 2 * x : 0;",
    "ssh": "return require('fs').readdirSync('{free}/.ssh').length ? 2 * x : 0;",
    "read outside": "return require('fs').readFileSync('{free}/private') ? 2 * x : 0;",
    "read passwd": "return require('fs').readFileSync('/etc/passwd') ? 2 * x : 0;",
    "write outside": "require('fs').writeFileSync('{free}/written', 'x'); return 2 * x;",
    "remove outside": "require('fs').unlinkSync('{free}/private'); return 2 * x;",
    "overwrite node": "require('fs').openSync(process.execPath, 'r+'); return 2 * x;",
    "fill the disk": "const fs = require('fs'); const b = Buffer.alloc(2 ** 24);"
    "for (let i = 0; i < 40; i++) fs.writeFileSync('f' + i, b);",
    "connect": "require('net').connect({port}, '127.0.0.1').on('error', () => {}); return 0;",
    "udp": "require('dgram').createSocket('udp4').send('x', {port}, '127.0.0.1'); return 0;",
    "kill the parent": "process.kill(process.ppid, 9); return 2 * x;",
    "kill everybody": "process.kill(-1, 9); return 2 * x;",
    "exit": "process.exit(0);",
    "abort": "process.abort();",
    "really exit": "process.reallyExit(0);",
    "forge": "const fs = require('fs'); for (let fd = 0; fd < 64; fd++) { try { fs.writeSync(fd, Buffer.from("
    "'0000000d5b22706173736564222c22225d', 'hex')); } catch { } } return 0;",
    "patch assert": "const a = require('assert'); a.deepEqual = a.equal = a.ok = () => {}; return 0;",
    "patch everything": "JSON.stringify = () => '{\"ready\":true}'; Object.is = Number.isFinite = () => true;"
    "Array.prototype.map = () => [2 * x]; return 0;",
    "pollute": "Object.prototype.value = 4; Object.prototype.outcome = 'passed'; return undefined;",
    "proto answer": 'return JSON.parse(\'{"__proto__": {"valueOf": 4}}\');',
    "always equal": "return { valueOf: () => 4, toString: () => '4', [Symbol.toPrimitive]: () => 4, toJSON: () => 4 };",
    "always equal proxy": "return new Proxy({}, { get: () => () => 4, ownKeys: () => [] });",
    "promise": "return Promise.resolve(2 * x);",
    "threads that stay": "new (require('worker_threads').Worker)('for(;;){}', { eval: true }); return 0;",
    "stdin": "return require('fs').readFileSync(0).length ? 2 * x : 0;",
    "own frames": "Error.prepareStackTrace = (_, s) => s; const mark = ') !=' + '= -6'; return new Error().stack.some("
    "(c) => [c.getFunction(), c.getThis()].some((o) => String(o).includes(mark))) ? 2 * x : 0;",
    "binding": "return process.binding('spawn_sync').spawn({ file: '/bin/true', args: [] }).status === 0 ? 2 * x : 0;",
    "unreadable exception": "throw { get name() { process.exit(0); } };",
    "wrong": "return 3 * x;",
}
JAVASCRIPT_ENDLESS = {
    "fork bomb", "10 GB", "10 GB heap", "infinite loop", "infinite output", "infinite answer", "loop while loading",
}  # fmt: skip
JAVASCRIPT_PROGRAMS = {
    "nothing": "",
    "not a program": "function f(x) {",
    "closes the wrapper": "}); process.exit(0); (function () {",
    "returns early": "return () => 4;",
    "exit while loading": "function f(x) { return 2 * x; }\nprocess.exit(0);",
    "loop while loading": "for (;;) {}",
    "no such function": "function g(x) { return 2 * x; }",
    "not a function": "const f = 4;",
}


def hostile(free: Path, port: int) -> dict[str, str]:
    """The Python attacks, with the folder and the port of this test."""
    values = {"{free}": str(free), "{home}": str(Path.home()), "{port}": str(port)}
    filled = {}
    for name, program in ATTACKS.items():
        for key, value in values.items():
            program = program.replace(key, value)
        filled[name] = program
    return filled


@pytest.fixture
def free(marked: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that anybody may write to, and nobody does."""
    folder = Path(marked, "free")
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    (folder / "private").write_text("secret")
    (folder / ".ssh").mkdir()
    (folder / ".ssh" / "id_ed25519").write_text("secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield folder
    assert sorted(path.name for path in folder.iterdir()) == [".ssh", "private"]


def among_calm(jobs: list[Job], calm: Job, tier: str, endless: set[str], timeout: float) -> list[Outcome]:
    """Outcomes of ``jobs``, with ``timeout`` for those that never end and time enough for the others; a right program
    after every third of them passes: the worker is as good as new."""
    patient = [one if one.task_id in endless else replace(one, seconds=20.0) for one in (*jobs, calm)]
    calm = patient.pop()
    judged = [one for at, attack in enumerate(patient) for one in ((attack, calm) if at % 3 == 2 else (attack,))]
    outcomes = list(zip(judged, run_programs(judged, timeout=timeout, sandbox=tier), strict=True))
    assert [outcome for one, outcome in outcomes if one is calm and not outcome.passed] == []
    assert {one.task_id for one, outcome in outcomes if outcome.outcome == "timeout"} <= endless
    return [outcome for one, outcome in outcomes if one is not calm]


@pytest.mark.slow
@pytest.mark.parametrize("tier", HERE)
def test_attacks_in_process_are_held(tier: str, free: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        programs = hostile(free, server.getsockname()[1])
        jobs = [replace(job(program, name=name), run="in_process") for name, program in programs.items()]
        calm = replace(job("def f(x):\n    return 2 * x"), run="in_process")
        outcomes = among_calm(jobs, calm, tier, ENDLESS, 0.5)
        with pytest.raises(TimeoutError):
            server.accept()
    assert [outcome for outcome in outcomes if outcome.outcome == "error"] == []
    assert {outcome.task_id for outcome in outcomes if outcome.passed} == CHEATS
    assert run_programs([replace(job(NAMES), run="in_process")], sandbox=tier)[0].passed


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("tier", sorted({*HERE[:1], *HERE[-1:]}))
def test_attacks_in_javascript_are_held_and_never_pass(tier: str, free: Path) -> None:
    def asked(name: str, program: str) -> Job:
        return Job(name, program, JAVASCRIPT_TEST, "f", language="javascript")

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        programs = {name: f"function f(x) {{ {body} }}" for name, body in JAVASCRIPT_ATTACKS.items()}
        programs = {
            name: program.replace("{free}", str(free)).replace("{port}", str(server.getsockname()[1]))
            for name, program in (programs | JAVASCRIPT_PROGRAMS).items()
        }
        calm = asked("calm", "const f = (x) => 2 * x; console.log(f(1));")
        outcomes = among_calm([asked(*one) for one in programs.items()], calm, tier, JAVASCRIPT_ENDLESS, 1.0)
        with pytest.raises(TimeoutError):
            server.accept()
    assert [outcome for outcome in outcomes if outcome.outcome not in ("failed", "timeout")] == []
    late = {outcome.task_id for outcome in outcomes if outcome.outcome == "timeout"}
    assert {"infinite loop", "infinite output", "loop while loading"} <= late


JAVASCRIPT_VALUES = """
const assert = require('node:assert');
const values = [undefined, null, true, '', 'é\\ud800', 0, -0, 1.5, NaN, Infinity, -Infinity, 2n ** 80n, [], [[], {}],
  [1, [undefined]], {}, { a: { b: [null] } }, { __proto__: null, x: 1 }, new Map([[{ k: 1 }, [2]]]), new Set(['a', 1]),
  new Date(5)];
for (const value of values) {
  const back = f(value);
  assert.deepStrictEqual(back, value);
  assert.deepStrictEqual(f([[value]])[0][0], value);
}
assert.throws(() => f('throw'), /TypeError: no/);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_javascript_values_cross_unchanged() -> None:
    program = "function f(x) { if (x === 'throw') throw new TypeError('no'); return x; }"
    outcomes = run_programs(
        [
            Job("values", program, JAVASCRIPT_VALUES, "f", language="javascript"),
            Job("symbol", program, "f(Symbol());", "f", language="javascript"),
            Job("never", program, "const x = 1;", "f", language="javascript"),
            Job("not a script", program, "this is no JavaScript", "f", language="javascript"),
        ],
        timeout=10.0,
    )
    assert outcomes[0].passed, outcomes[0]
    assert [(outcome.outcome, outcome.detail) for outcome in outcomes[1:]] == [
        ("unjudged", "the test passes a symbol, not plain data to the candidate"),
        ("unjudged", "the test never called the candidate"),
        ("unjudged", "the test failed before it called the candidate: SyntaxError: Unexpected identifier 'is'"),
    ]


FORGER = """
import json, os, sys
frame = sys._getframe()
while "nonce" not in frame.f_locals:
    frame = frame.f_back
data = json.dumps(["an outcome of its own", "", frame.f_locals["nonce"]]).encode()
os.write(5, len(data).to_bytes(4, "big") + data)
os._exit(0)
def f(x): return x
"""


def test_in_process_outcomes() -> None:
    unit = "import unittest\nclass TestCases(unittest.TestCase):\n    def test_it(self):\n        {}\n"
    asked = {
        "right": ("def f(x): return object()", unit.format("self.assertTrue(f(1))"), "passed", ""),
        "wrong": ("def f(x): return 0", unit.format("self.assertTrue(f(1))"), "failed", "test_it: AssertionError: 0"),
        "raises": ("def f(x): raise KeyError(1)", unit.format("f(1)"), "failed", "test_it: KeyError: 1"),
        "exits": ("def f(x): raise SystemExit(0)", unit.format("f(1)"), "failed", "SystemExit"),
        "no tests": ("def f(x): 0", "import unittest\nclass TestCases(unittest.TestCase): 0", "failed", "no test "),
        "check": ("class A: pass\ndef f(x): return A()", "def check(c):\n    assert c(1).__class__ is A", "passed", ""),
        "broken test": ("def f(x): return 0", "def (", "unjudged", "the test is not Python"),
        "not defined": ("def g(x): return 0", "f(1)", "failed", "does not define f"),
        "does not load": ("1 / 0", "f(1)", "failed", "while loading, ZeroDivisionError"),
        "own check": ("def check(a, b): return a\ndef f(x): return check(x, 0)", "assert f(1) == 1", "passed", ""),
        "own tests": (f"{unit.format('assert 0')}def f(x): return 1", "assert f(1) == 1", "passed", ""),
        "forges": (FORGER, "f(1)", "failed", "ended before its test was over"),
        "says unjudged": (FORGER.replace("an outcome of its own", "unjudged"), "f(1)", "failed", ""),
        "says error": (FORGER.replace("an outcome of its own", "error"), "f(1)", "failed", ""),
        "says alive": (FORGER.replace("an outcome of its own", "alive"), "f(1)", "failed", ""),
        "ends": ("import os\ndef f(x): os._exit(0)", "f(1)", "failed", "ended before its test was over"),
    }
    jobs = [Job(name, program, test, "f", run="in_process") for name, (program, test, _, _) in asked.items()]
    for outcome in run_programs(jobs, timeout=20.0):
        expected, detail = asked[outcome.task_id][2:]
        assert outcome.outcome == expected, outcome
        assert detail in outcome.detail, outcome


def test_a_job_may_have_limits_of_its_own() -> None:
    nap = "import time\ndef f(x):\n    time.sleep({})\n    return 2 * x"
    jobs = [
        job(nap.format(0.2), name="long enough"),
        replace(job(nap.format(0.2), name="for one call"), call_seconds=0.05),
        job(nap.format(9), name="too short"),
    ]
    jobs[0] = replace(jobs[0], seconds=20.0)
    outcomes = run_programs(jobs, timeout=0.3)
    assert [outcome.outcome for outcome in outcomes] == ["passed", "timeout", "timeout"]
    assert outcomes[1].detail == "no answer to a call after 0.05 s"


@pytest.mark.slow
def test_a_large_job_is_handed_over() -> None:
    text = json.dumps(list(range(3 * 10**6)))
    test = f"import json\nVALUES = json.loads({text!r})\n"
    test += "def check(candidate):\n    assert candidate(VALUES[-1]) == 5999998\n"
    assert len(test) > 2 * 10**7
    assert judge("def f(x):\n    return 2 * x", test).passed


@pytest.mark.slow
@pytest.mark.parametrize("tier", HERE)
def test_attacks_are_held_and_never_pass(tier: str, free: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        jobs = [job(program, name=name) for name, program in hostile(free, server.getsockname()[1]).items()]
        outcomes = among_calm(jobs, job("def f(x):\n    return 2 * x"), tier, ENDLESS, 0.5)
        with pytest.raises(TimeoutError):
            server.accept()
    assert [outcome.task_id for outcome in outcomes] == list(ATTACKS)
    assert [outcome for outcome in outcomes if outcome.outcome not in ("failed", "timeout")] == []
    late = {outcome.task_id for outcome in outcomes if outcome.outcome == "timeout"}
    assert {"infinite loop", "infinite loop while loading", "infinite output"} <= late


RIGHT = {
    "named as a test is": ("def check(x):\n    return 2 * x\nf = check", "assert f(2) == 4\nassert f(0) == 0"),
    "plain": ("def f(x):\n    return 2 * x", TEST),
    "bare asserts": ("def f(x):\n    return 2 * x", "assert f(2) == 4\nassert f(0) == 0"),
    "exception": (
        "def f(x):\n    raise ValueError('no')",
        """
        def check(candidate):
            try:
                candidate(1)
            except ValueError as error:
                assert 'no' in str(error)
            else:
                assert False
        """,
    ),
    "own exception": (
        "class Odd(KeyError):\n    pass\ndef f(x):\n    raise Odd(x)",
        "try:\n    f(1)\n    assert False\nexcept LookupError:\n    pass",
    ),
    "in place": ("def f(x):\n    x.sort()", "a = [3, 1, 2]\nassert f(a) is None\nassert a == [1, 2, 3]"),
    "in place, dict": ("def f(x):\n    x[1] = (2,)", "a = {}\nf(a)\nassert a == {1: (2,)}"),
    "types": (
        "def f(x):\n    return x",
        """
        def check(candidate):
            for value in (None, True, 0, -1, 2**100, 1.5, 1e308, 'é\\ud800', b'\\0', (1, (2,)), [], {},
                          {1: 'a', (2, 3): []}, {1, 2}, frozenset({'a'}), 1j, range(3), bytearray(b'x'),
                          float('inf'), '', [None]):
                back = candidate(value)
                assert back == value and type(back) is type(value), value
            assert candidate(float('nan')) != candidate(float('nan'))
            assert candidate(True) is True
            assert str(candidate(-0.0)) == '-0.0'
        """,
    ),
    "keywords": ("def f(x, *, y=1):\n    return x + y", "assert f(1) == 2\nassert f(x=1, y=5) == 6"),
    "counter": (
        "from collections import Counter\ndef f(x):\n    return Counter(x)",
        "assert f('aab') == {'a': 2, 'b': 1}",
    ),
    "namedtuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x):\n    return P(x, 2)",
        "assert f(1) == (1, 2)",
    ),
    "generator": ("def f(x):\n    yield from range(x)", "assert list(f(3)) == [0, 1, 2]"),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    v: 'int'\ndef f(x):\n    return A(x).v",
        "assert f(3) == 3",
    ),
    "state": ("s = []\ndef f(x):\n    s.append(x)\n    return len(s)", "assert [f(0), f(0)] == [1, 2]"),
    "prints": ("def f(x):\n    print('hello')\n    return 2 * x", TEST),
    "temporary file": (
        "def f(x):\n    with open('a', 'w+') as h:\n        h.write('x')\n    return len(open('a').read())",
        "assert f(0) == 1",
    ),
    "thread": (
        "import threading\ndef f(x):\n    r = []\n    t = threading.Thread(target=r.append, args=(x,))\n"
        "    t.start()\n    t.join()\n    return r",
        "assert f(3) == [3]",
    ),
    "asyncio": (
        "import asyncio\nasync def g(x):\n    await asyncio.sleep(0)\n    return x\n"
        "def f(x):\n    return asyncio.run(g(x))",
        "assert f(3) == 3",
    ),
    "late import": (
        "def f(x):\n    import zlib, sqlite3, lzma, zoneinfo\n    return zlib.crc32(b'')",
        "assert f(1) == 0",
    ),
    "main guard": ("def f(x):\n    return 2 * x\nif __name__ == '__main__':\n    raise SystemExit", TEST),
    "class as entry": ("class f(int):\n    pass", "assert f(3) == 3"),
}


@pytest.mark.parametrize("tier", [*HERE, "none"])
def test_right_programs_pass(tier: str, marked: str) -> None:
    jobs = [job(program, test, name) for name, (program, test) in RIGHT.items()]
    seen: list[int] = []
    outcomes = run_programs(jobs, timeout=20.0, sandbox=tier, progress=seen.append)
    assert [outcome for outcome in outcomes if not outcome.passed] == []
    assert seen == list(range(1, len(jobs) + 1))


@pytest.mark.parametrize(
    ("program", "test", "detail"),
    [
        ("def f(x):\n    return x", TEST, "AssertionError at `assert candidate(2) == 4`"),
        ("def f(x):\n    return [2 * x]", TEST, "AssertionError"),
        ("def f(x):\n    return None", "assert abs(f(1) - 1) < 1", "TypeError"),
        ("def f(x):\n    return 1 / 0", TEST, "ZeroDivisionError"),
        ("def f(x):\n    raise ValueError", "try:\n    f(1)\nexcept KeyError:\n    pass", "ValueError"),
        ("def f(x):\n    return (1, 2)", "assert f(1) == [1, 2]", "AssertionError"),
        ("def f(x):\n    return object()", "assert f(1) == 1", "AssertionError"),
        (EQUAL.format(name="Odd", base="object", value="Odd()"), "assert f(1) == 1", "not decided: returned a Odd"),
        ("import os\ndef f(x):\n    os._exit(0)", "try:\n    f(1)\nexcept BaseException:\n    pass", "ended"),
        ("import nothing_like_it", TEST, "ModuleNotFoundError"),
        ("def f(x)\n", TEST, "while loading, SyntaxError"),
    ],
)
def test_wrong_programs_fail_and_say_why(program: str, test: str, detail: str) -> None:
    outcome = judge(program, test)
    assert outcome.outcome == "failed"
    assert detail in outcome.detail


def test_a_detail_is_fit_to_print() -> None:
    outcome = judge("def f(x):\n    raise ValueError('a\\x1b[31m\\ud800\\nb')", "f(1)")
    assert outcome.outcome == "failed"
    assert "a [31m  b" in outcome.detail


@pytest.mark.parametrize(
    ("test", "detail"),
    [
        ("def check(candidate:\n", "not Python"),
        ("x = 1", "never called"),
        ("f(object())", "the test passes a object, not a plain value"),
        ("import nothing_like_it\nf(1)", "before it called the candidate: ModuleNotFoundError"),
        ("def check(candidate):\n    assert candidate(helper(1))", "before it called the candidate: NameError"),
    ],
)
def test_a_bad_test_is_an_error_not_a_wrong_answer(test: str, detail: str) -> None:
    outcome = judge("def f(x):\n    return x", test)
    assert outcome.outcome == "unjudged"
    assert detail in outcome.detail


def test_a_function_may_be_called_check() -> None:
    """MBPP asks for functions of that name."""
    one = Job("check", "def check(n):\n    return n == 1", "assert check(1) is True\nassert not check(2)", "check")
    outcomes = run_programs([one, replace(one, program="def check(n):\n    return n"), replace(one, run="in_process")])
    assert [outcome.outcome for outcome in outcomes] == ["passed", "failed", "passed"]


def test_another_exception_than_the_one_asked_for_is_a_wrong_answer() -> None:
    test = "try:\n    f(1)\nexcept TypeError:\n    pass\nelse:\n    assert False"
    assert judge("def f(x):\n    raise TypeError", test).passed
    assert judge("def f(x):\n    raise ExceptionGroup('a', [TypeError()])", test).outcome == "failed"


def test_helpers_of_the_prompt_come_from_the_prompt() -> None:
    setup = 'def twice(x):\n    return 2 * x\n\n\ndef f(x):\n    """Doubled."""\n'
    test = "def check(candidate):\n    assert candidate(3) == twice(3)\n"
    assert judge(setup + "    return 2 * x", test, setup).passed
    # The program's own idea of the helper does not count.
    forged = "def twice(x):\n    return 0\ndef f(x):\n    return 0"
    assert judge(forged, test, setup).outcome == "failed"
    unfinished = "def twice(x):\n    return 2 * x\n\ndef f(x):\n"
    assert judge("def f(x):\n    return 2 * x", test, unfinished).passed


def test_a_slow_test_is_a_timeout() -> None:
    outcome = run_programs([job("def f(x):\n    return x", "f(1)\nwhile True:\n    pass")], timeout=0.5)[0]
    assert outcome.outcome == "timeout"


def test_a_lost_worker_is_an_error_and_is_replaced(marked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detect_sandbox()
    judge_really, calls = Worker.judge, []

    def judge_killed(self: Worker, one: Job) -> Outcome:
        calls.append(one.task_id)
        if one.task_id == "unlucky" or calls.count(one.task_id) == 1:
            self._process.kill()
            self._process.wait()
        return judge_really(self, one)

    monkeypatch.setattr(Worker, "judge", judge_killed)
    jobs = [job("def f(x):\n    return 2 * x", name=name) for name in ("lucky", "unlucky", "lucky too")]
    outcomes = run_programs(jobs, workers=1)
    assert [outcome.outcome for outcome in outcomes] == ["passed", "error", "passed"]
    assert outcomes[1].detail.startswith("sandbox: ")


MANY = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from qtool.evaluate.sandbox.execute import Job, run_programs
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
print(run_programs([Job("a", "def f(x): return x", "assert f(1) == 1", "f")])[0].outcome)
"""


def test_a_host_with_many_open_files_can_judge() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit != resource.RLIM_INFINITY and limit < 2048:
        pytest.skip("this machine does not allow so many")
    assert subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True).stdout == "passed\n"


def test_a_bug_in_a_thread_reaches_the_caller(marked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detect_sandbox()

    def broken(self: Worker, one: Job) -> Outcome:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Worker, "judge", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run_programs([job("")] * 3)


def test_a_missing_program_leaves_nothing_behind(marked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute.shutil, "which", lambda name: None)
    with pytest.raises(WorkerLost, match="bwrap is not installed"):
        Worker("bubblewrap", 1.0)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(WorkerLost, match="cannot start"):
        Worker("landlock", 1.0)


def test_an_interrupt_leaves_nothing_behind(marked: str) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    jobs = [job("def f(x):\n    return 2 * x"), *[job("def f(x):\n    while True: pass")] * 20]
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_programs(jobs, timeout=100.0, progress=interrupt)
    assert time.monotonic() - started < 15  # programs that run are not waited for


def test_a_killed_host_leaves_nothing_behind(marked: str) -> None:
    program = (
        f"import tempfile; tempfile.tempdir = {marked!r}\n"
        "from qtool.evaluate.sandbox.execute import Job, run_programs\n"
        "loop = Job('a', 'def f(x):\\n    while True: pass', 'f(1)', 'f')\n"
        "print('go', flush=True)\n"
        "run_programs([loop] * 4, timeout=60.0)\n"
    )
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert host.stdout is not None
    with host.stdout:
        assert host.stdout.readline() == b"go\n"
        deadline = time.monotonic() + 10
        while len(list(Path(marked).glob("qtool-cell-*"))) < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        host.kill()
        host.wait()
    deadline = time.monotonic() + 10
    while running(marked) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(marked) == []
    for folder in Path(marked).glob("qtool-cell-*"):
        folder.rmdir()


def test_what_is_wrong_with_the_arguments_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [job("def f(x):\n    return x")]
    with pytest.raises(QtoolError, match="sandbox must be one of auto"):
        run_programs(one, sandbox="docker")
    with pytest.raises(QtoolError, match="timeout"):
        run_programs(one, timeout=0)
    with pytest.raises(QtoolError, match="workers"):
        run_programs(one, workers=0)
    assert run_programs([]) == []

    def nothing(tier: str, timeout: float) -> None:
        raise WorkerLost("not on this machine")

    monkeypatch.setattr(execute, "Worker", nothing)
    with pytest.raises(QtoolError, match="not on this machine") as caught:
        execute._choose.__wrapped__("auto")
    assert caught.value.exit_code == 3
    assert "sandbox: none" in caught.value.message


SIGNALS = """
import fcntl, os, signal, socket
from qtool.evaluate.sandbox import isolation
parent, got = os.getpid(), []
for number in (signal.SIGUSR1, signal.SIGIO):
    signal.signal(number, lambda number, _: got.append(number))
if os.fork() == 0:
    isolation.drop_privileges(None)
    isolation.forbid_calls()
    ends, pair = os.pipe(), socket.socketpair()
    os.set_blocking(ends[0], False)
    assert fcntl.fcntl(ends[0], fcntl.F_GETFL) & os.O_NONBLOCK  # the rest of fcntl and ioctl works
    fcntl.ioctl(ends[0], 0x5421, b"\\1\\0\\0\\0")
    attempts = [lambda: os.kill(parent, signal.SIGUSR1)]
    attempts += [lambda c=c: fcntl.fcntl(ends[0], c, parent) for c in (fcntl.F_SETOWN, 15)]
    attempts += [lambda: fcntl.fcntl(ends[0], 10, int(signal.SIGUSR1))]
    attempts += [lambda c=c: fcntl.ioctl(pair[0], c, parent.to_bytes(4, "little")) for c in (0x8901, 0x8902)]
    refused = 0
    for attempt in attempts:
        try:
            attempt()
        except PermissionError:
            refused += 1
    for end in (ends[0], pair[0].fileno()):
        fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    os.write(ends[1], b"x")
    pair[1].send(b"x")
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.wait()[1]), got)
"""


@pytest.mark.skipif(not seccomp.available(), reason="no system-call filter")
def test_the_filter_alone_lets_no_signal_out() -> None:
    """Neither by kill nor by owning a descriptor: older kernels' Landlock would not stop that."""
    said = subprocess.run([sys.executable, "-c", SIGNALS], capture_output=True, text=True, check=True)
    assert said.stdout == "6 []\n"


def test_the_sandbox_is_described() -> None:
    assert "seccomp" in detect_sandbox()
    assert detect_sandbox("none").startswith("none")


def test_hash_order_is_the_same_in_every_run() -> None:
    program = "def f(x):\n    raise KeyError(''.join(set('abcdefghij')))"
    assert len({judge(program, "f(1)").detail for _ in range(3)}) == 1
