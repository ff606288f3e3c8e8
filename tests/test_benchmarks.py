"""Every benchmark's published format, with problems of our own: read, asked, answered, judged in the sandbox."""

import base64
import datetime
import gzip
import json
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from qtool import QtoolError
from qtool.evaluate.sandbox.execute import detect_sandbox, run_programs
from qtool.evaluate.sandbox.process import Outcome
from qtool.evaluate.tasks import loading as tasks
from qtool.evaluate.tasks import prompts, solvable
from qtool.evaluate.tasks.livecodebench import decode_tests
from qtool.evaluate.tasks.loading import as_job, load_task
from qtool.evaluate.tasks.problems import Problem, Task
from qtool.evaluate.tasks.table import data_sets

node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def sandbox() -> str:
    """The machine's, or none: these programs are our own."""
    try:
        detect_sandbox()
        return "auto"
    except QtoolError:
        return "none"


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def judge(*asked: tuple[Problem, str, prompts.Style]) -> list[Outcome]:
    jobs = [as_job(problem, prompts.program(problem, text, style)) for problem, text, style in asked]
    return run_programs(jobs, timeout=20.0, sandbox=sandbox())


def judge_both(problem: Problem, right: str, wrong: str, fence: str = "python") -> None:
    """``right`` passes and ``wrong`` fails, as a base model's continuation and in a chat model's reply."""
    whole = problem.format in ("mbpp", "livecodebench")
    chats = [text if whole else problem.prompt + text for text in (right, wrong)]
    replies = [f"<think>easy</think>Here:\n```{fence}\n{text}\n```\nDone." for text in chats]
    outcomes = judge(
        (problem, right, "completion"), (problem, wrong, "completion"),
        (problem, replies[0], "chat"), (problem, replies[1], "chat"),
    )  # fmt: skip
    assert [outcome.outcome for outcome in outcomes] == ["passed", "failed"] * 2, outcomes


HUMANEVAL_PLUS = {
    "task_id": "HumanEval/900",
    "prompt": '\ndef shares(total: int, n: int) -> list:\n    """Split total into n equal parts.\n    """\n',
    "entry_point": "shares",
    "canonical_solution": "    return [total / n] * n\n",
    "contract": "    assert n > 0\n",
    "base_input": [[10, 4], [7, 7]],
    "plus_input": [[1, 3], [0, 2]],
    "atol": 1e-6,
}


def test_humaneval_plus_release(tmp_path: Path) -> None:
    path = write(tmp_path / "HumanEvalPlus.jsonl", HUMANEVAL_PLUS)
    (problem,) = load_task("humaneval+", file=path).problems
    assert problem.call_seconds == 4.0
    judge_both(problem, "    return [total / n] * n\n", "    return [total // n] * n\n")
    # Close is right, another type or length is not.
    near, other = "    return [total / n + 1e-9] * n\n", "    return tuple([total / n] * n)\n"
    found = judge((problem, near, "completion"), (problem, other, "completion"))
    assert [outcome.outcome for outcome in found] == ["passed", "failed"]
    # The file says itself what it is, and its text does not depend on the hash seed.
    assert load_task(path).problems == (problem,)
    assert "frozenset(['Diff', " in problem.test


def test_humaneval_plus_data_set(tmp_path: Path) -> None:
    test = (
        "import numpy as np\n\ndef check(candidate):\n    inputs, results = [[10, 4], [1, 3]], [[2.5] * 4, [1/3] * 3]\n"
        "    for given, expected in zip(inputs, results):\n        assert np.allclose(candidate(*given), expected)\n"
    )
    row = {key: HUMANEVAL_PLUS[key] for key in ("task_id", "prompt", "canonical_solution", "entry_point")}
    (problem,) = load_task("humaneval+", file=write(tmp_path / "test.jsonl", row | {"test": test})).problems
    assert problem.libraries == ("numpy",)
    assert problem.run == "call"
    judge_both(problem, "    return [total / n] * n\n", "    return [total // n] * n\n")
    assert prompts.messages(problem)[0]["content"].startswith("Please provide a self-contained Python script")


MBPP = {
    "task_id": 500,
    "text": "Write a function to count the odd numbers in a list.",
    "code": "def count_odd(xs):\r\n  return sum(x % 2 for x in xs)",
    "test_list": ["assert count_odd([1, 2, 3]) == 2", "assert count_odd([]) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBPP_OBJECTS = {
    "task_id": 501,
    "text": "Write a function to find the longest of the given rods.",
    "code": "class Rod:\n  def __init__(self, n):\n    self.n = n\ndef longest(rods):\n  return max(r.n for r in rods)",
    "test_list": ["assert longest([Rod(2), Rod(5)]) == 5"],
    "test_setup_code": "rod = Rod(3)",
    "challenge_test_list": [],
}


def test_mbpp(tmp_path: Path) -> None:
    # Problems 1 to 10 are the few-shot examples, from 511 on the validation and training splits.
    others = [{**MBPP, "task_id": number} for number in (2, 10, 511, 900)]
    plain, objects = load_task("mbpp", file=write(tmp_path / "mbpp.jsonl", MBPP, MBPP_OBJECTS, *others)).problems
    assert plain.task_id == "Mbpp/500"
    assert plain.prompt == f'"""\n{MBPP["text"]}\nassert count_odd([1, 2, 3]) == 2\n"""\n'
    assert (plain.run, objects.run) == ("call", "in_process")
    assert (plain.entry_point, objects.entry_point) == ("count_odd", "longest")
    assert plain.solution == plain.prompt + "def count_odd(xs):\n  return sum(x % 2 for x in xs)\n"
    right = "def count_odd(xs):\n    return sum(x % 2 for x in xs)\n\nassert False\n"
    judge_both(plain, right, "def count_odd(xs):\n    return 2\n")
    judge_both(objects, objects.canonical_solution, objects.canonical_solution.replace("max", "min"))


def test_mbpp_sanitized_is_a_json_list(tmp_path: Path) -> None:
    row = {key: value for key, value in MBPP.items() if key not in ("text", "test_setup_code", "challenge_test_list")}
    row |= {"prompt": MBPP["text"], "source_file": "x", "test_imports": ["import math"]}
    row["test_list"] = ["assert count_odd([math.floor(1.5)]) == 1"]
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text(json.dumps([row]))
    (problem,) = load_task(str(path)).problems
    assert problem.run == "call"
    assert judge((problem, str(MBPP["code"]), "completion"))[0].passed


@pytest.mark.parametrize(
    ("test", "run"),
    [
        ("assert f([1]) == 1", "call"),
        ("import math\nassert math.isclose(f([1]), 1)", "call"),
        ("for x, y in [(1, 2)]:\n    assert f(x) == y", "call"),
        ("assert f(lambda x: x) == 1", "in_process"),
        ("def g(x):\n    return x\nassert f(g) == 1", "in_process"),
        ("class A:\n    pass\nassert f(A()) == 1", "in_process"),
        ("assert f(Node(1)) == 1", "in_process"),
        ("assert f(helper(1)) == 1", "in_process"),
    ],
)
def test_a_test_that_shares_objects_is_marked(tmp_path: Path, test: str, run: str) -> None:
    code = "class Node: pass\ndef helper(x): return x\ndef f(x): return 1"
    path = write(tmp_path / "mbpp.jsonl", {**MBPP, "code": code, "test_list": [test]})
    assert load_task(path).problems[0].run == run


def test_mbpp_plus_release_and_data_set(tmp_path: Path) -> None:
    release = {
        "task_id": "Mbpp/2",  # one of those whose arguments are tuples
        "prompt": '"""\nWrite a function to join two tuples.\nassert join((1,), (2,)) == (1, 2)\n"""\n',
        "entry_point": "join",
        "canonical_solution": "\ndef join(a, b):\n    return a + b\n",
        "base_input": [[[1], [2]]],
        "plus_input": [[[], [3, 4]]],
        "atol": 0,
    }
    path = tmp_path / "MbppPlus.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(release).encode()))
    (problem,) = load_task(str(path)).problems
    assert (problem.format, problem.run) == ("mbpp", "call")
    judge_both(problem, "def join(a, b):\n    return (*a, *b)\n", "def join(a, b):\n    return [*a, *b]\n")
    row = {**MBPP, "prompt": MBPP["text"], "test": "import numpy as np\nassert np.sum(count_odd([1, 3])) == 2\n"}
    del row["text"]
    (problem,) = load_task("mbpp+", file=write(tmp_path / "rows.jsonl", row)).problems
    assert problem.libraries == ("numpy",)
    judge_both(problem, str(MBPP["code"]), "def count_odd(xs):\n    return 0")


def test_mbpp_plus_comparisons_are_evalplus_own(tmp_path: Path) -> None:
    def task(name: str, code: str, inputs: list[Any], atol: float = 0) -> Problem:
        row = {
            "task_id": "Mbpp/1000", "prompt": '"""\nx\n"""\n', "entry_point": name, "canonical_solution": code,
            "base_input": inputs, "plus_input": {}, "atol": atol,
        }  # fmt: skip
        return load_task("mbpp+", file=write(tmp_path / f"{name}.jsonl", row)).problems[0]

    as_sets = task("Diff", "def Diff(a, b):\n    return list(a)\n", [[[1, 2], []]])
    anything = task("are_equivalent", "def are_equivalent(a):\n    return True\n", [[1]])
    matches = task("check_str", "import re\ndef check_str(s):\n    return re.match('a', s)\n", [["ab"], ["b"]])
    assert matches.run == "in_process"
    found = judge(
        (as_sets, "def Diff(a, b):\n    return a[::-1]\n", "completion"),
        (as_sets, "def Diff(a, b):\n    return a[1:]\n", "completion"),
        (anything, "def are_equivalent(a):\n    return False\n", "completion"),
        (matches, "import re\ndef check_str(s):\n    return re.search('^a', s)\n", "completion"),
        (matches, "def check_str(s):\n    return s[0] == 'a'\n", "completion"),
        (matches, "def check_str(s):\n    return s\n", "completion"),
    )
    assert [outcome.outcome for outcome in found] == ["passed", "failed", "passed", "passed", "passed", "failed"]


BIGCODEBENCH = {
    "task_id": "BigCodeBench/9000",
    "complete_prompt": 'import numpy as np\n\ndef task_func(rows):\n    """Means of the rows.\n    """\n',
    "instruct_prompt": "Means of the rows.\nYou should write self-contained code starting with:\n```\n"
    "import numpy as np\ndef task_func(rows):\n```",
    "canonical_solution": "    return np.asarray(rows).mean(axis=1)",
    "code_prompt": "import numpy as np\ndef task_func(rows):\n",
    "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def test_a(self):\n"
    "        self.assertEqual(task_func([[1, 3]]).tolist(), [2])\n    def test_b(self):\n"
    "        self.assertIsInstance(task_func([[1]]), np.ndarray)\n",
    "entry_point": "task_func",
    "doc_struct": "{}",
    "libs": "['numpy']",
}


def test_bigcodebench(tmp_path: Path) -> None:
    absent = {
        **BIGCODEBENCH, "task_id": "BigCodeBench/9001", "code_prompt": "import no_such_library\ndef task_func(rows):\n",
    }  # fmt: skip
    task = load_task("bigcodebench", file=write(tmp_path / "BigCodeBench.jsonl", BIGCODEBENCH, absent))
    (problem,) = task.problems
    assert task.left_out == {"BigCodeBench/9001": "needs no_such_library, not installed here"}
    assert (problem.run, problem.libraries) == ("in_process", ("numpy",))
    judge_both(problem, "    return np.asarray(rows).mean(axis=1)\n", "    return np.asarray(rows).mean(axis=0)\n")
    # A chat answer that forgot the imports still has the prompt's, as in the published scores.
    reply = "```python\ndef task_func(rows):\n    return np.mean(rows, axis=1)\n```"
    assert judge((problem, reply, "chat"))[0].passed
    assert prompts.messages(problem)[0]["content"].endswith("def task_func(rows):\n```\n")


def test_bigcodebench_without_the_unsolvable(tmp_path: Path) -> None:
    starts = {
        **BIGCODEBENCH, "task_id": "BigCodeBench/9002",
        "canonical_solution": "    import subprocess\n    subprocess.run(['true'])\n    return np.mean(rows, axis=1)",
    }  # fmt: skip
    task = load_task("bigcodebench", file=write(tmp_path / "BigCodeBench.jsonl", BIGCODEBENCH, starts))
    if sandbox() == "none":
        pytest.skip("nothing forbids starting programs here")
    kept = solvable.solvable(task, 20.0, "auto")
    assert [problem.task_id for problem in kept.problems] == ["BigCodeBench/9000"]
    assert "its published solution fails here: test_a" in kept.left_out["BigCodeBench/9002"]
    assert solvable.solvable(kept, 20.0, "auto") == kept


def test_a_test_that_shares_more_than_values_is_judged_in_process(tmp_path: Path) -> None:
    shares = {
        "prints": (
            "    print('hi')\n",
            "import contextlib, io\ndef check(f):\n    with contextlib.redirect_stdout(io.StringIO()) as b:\n"
            "        f(1)\n    assert b.getvalue() == 'hi\\n'\n",
        ),
        "own class": ("    return x.w\n", "class W:\n    w = 2\ndef check(f):\n    assert f(W()) == 2\n"),
        "values": ("    return 2 * x\n", "import math\ndef check(f):\n    assert math.isclose(f(1), 2)\n"),
        "cannot": ("    return x.v\n", "class W:\n    w = 2\ndef check(f):\n    assert f(W()) == 2\n"),
    }  # fmt: skip
    rows = [
        {"task_id": name, "prompt": 'def f(x):\n    """Do."""\n', "canonical_solution": body, "test": test}
        | {"entry_point": "f"}
        for name, (body, test) in shares.items()
    ]  # fmt: skip
    found = solvable.solvable(load_task(str(write(tmp_path / "own.jsonl", *rows))), 10.0, "auto")
    runs = {"prints": "in_process", "own class": "in_process", "values": "call"}
    assert {p.task_id: p.run for p in found.problems} == runs
    assert list(found.left_out) == ["cannot"]


def lcb(**changes: Any) -> dict[str, Any]:
    tests = [{"input": "2\n3 4\n", "output": "7\n", "testtype": "stdin"}]
    row = {
        "question_title": "Sum", "question_content": "Print the sum of n numbers.", "platform": "atcoder",
        "question_id": "abc900_a", "contest_id": "abc900", "contest_date": "2025-02-01T00:00:00", "starter_code": "",
        "difficulty": "easy", "public_test_cases": json.dumps(tests),
        "private_test_cases": encode([{"input": "1\n5", "output": "5", "testtype": "stdin"}]), "metadata": "{}",
    }  # fmt: skip
    return row | changes


def encode(tests: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


FUNCTIONAL = {
    "question_id": "3900",
    "platform": "leetcode",
    "question_content": "Double every number.",
    "starter_code": "class Solution:\n    def twice(self, xs: List[int], k: int) -> List[int]:\n        ",
    "metadata": json.dumps({"func_name": "twice"}),
    "public_test_cases": json.dumps([{"input": "[1, 2]\n2", "output": "[2, 4]", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": "[]\n1", "output": "[]", "testtype": "functional"}]),
}


def test_livecodebench_stdin(tmp_path: Path) -> None:
    (problem,) = load_task("livecodebench", file=write(tmp_path / "test6.jsonl", lcb())).problems
    assert problem.run == "stdin"
    assert problem.seconds == 12.0
    judge_both(problem, "input()\nprint(sum(map(int, input().split())))\n", "print(7)\n")
    right = [
        "import sys\ndef main():\n    d = sys.stdin.read().split()\n    print(sum(map(int, d[1:])))\n    sys.exit(0)\n"
        "if __name__ == '__main__':\n    main()\n",
        "import os\nd = os.read(0, 1000).split()\nos.write(1, str(sum(map(int, d[1:]))).encode())\n",
        "import threading\ndef go():\n    n, *d = open(0).read().split()\n    print(sum(map(int, d)), '.0', sep='')\n"
        "threading.Thread(target=go).start()\n",
        "n = int(sys.stdin.buffer.readline())\nprint(' ', *[sum(map(int, input().split()))], '\\n\\n')\n",
    ]
    wrong = [
        "print('7')\nprint('5')\n", "while True:\n    print('7' * 10**6)\n", "import os\nprint(7)\nos._exit(0)\n", "",
        "class A(str):\n    def __eq__(s, o): return True\nprint(A())\n", "print(input() or 7)\nraise ValueError\n",
    ]  # fmt: skip
    found = judge(*[(problem, text, "completion") for text in right + wrong])
    assert [outcome.outcome for outcome in found[: len(right)]] == ["passed"] * len(right), found
    assert [outcome for outcome in found[len(right) :] if outcome.outcome not in ("failed", "timeout")] == []


def test_livecodebench_functional(tmp_path: Path) -> None:
    (problem,) = load_task("livecodebench", file=write(tmp_path / "t.jsonl", lcb(**FUNCTIONAL))).problems
    assert (problem.run, problem.entry_point) == ("call", "twice")
    begun = "class Solution:\n    def twice(self, xs: List[int], k: int) -> List[int]:\n"
    judge_both(problem, begun + "        return tuple(2 * x for x in xs)\n", begun + "        return xs\n")
    slow = begun + "        while True: pass\n"
    assert judge((problem.model_copy(update={"call_seconds": 0.2}), slow, "completion"))[0].outcome == "timeout"


def test_livecodebench_window(tmp_path: Path) -> None:
    days = ["2024-12-31T23:00:00", "2025-01-01T00:00:00", "2025-03-01T12:30:00"]
    path = write(tmp_path / "t.jsonl", *[lcb(question_id=day, contest_date=day) for day in days])

    def found(after: str | None, before: str | None) -> list[str]:
        window = [datetime.date.fromisoformat(day) if day else None for day in (after, before)]
        return [p.task_id for p in load_task("livecodebench", file=path, after=window[0], before=window[1]).problems]

    assert found(None, None) == days
    assert found("2025-01-01", None) == days[1:]
    assert found(None, "2025-01-01") == days[:2]
    assert found("2025-01-02", "2025-03-01") == days[2:]
    with pytest.raises(QtoolError, match=r"no problems in it from 2026-01-01 to the last \(3 are outside\)"):
        found("2026-01-01", None)
    day = datetime.date(2025, 1, 1)
    assert load_task(path, after=day).name == "t[2025-01-01..]"
    with pytest.raises(QtoolError, match="has no contest dates"):
        load_task("mbpp", after=day)
    with pytest.raises(QtoolError, match="no contest date"):
        load_task(write(tmp_path / "m.jsonl", MBPP), after=day)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle ran')",))


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (pickle.dumps(Evil()), "opcode GLOBAL|opcode STACK_GLOBAL|opcode TUPLE1|more than one text"),
        (pickle.dumps(["a"]), "more than one text"),
        (pickle.dumps(("a", "b")), "more than one text"),
        (pickle.dumps(1), "more than one text"),
        (pickle.dumps("{"), "not JSON"),
        (pickle.dumps("[]")[:-1], "damaged pickle"),
        (b"", "damaged pickle"),
    ],
)
def test_a_pickle_of_anything_but_text_is_refused(tmp_path: Path, payload: bytes, said: str) -> None:
    text = base64.b64encode(zlib.compress(payload)).decode()
    with pytest.raises(QtoolError, match=said) as caught:
        load_task("livecodebench", file=write(tmp_path / "t.jsonl", lcb(private_test_cases=text)))
    assert "t.jsonl:1: key 'private_test_cases'" in caught.value.message


def test_tests_decode_whatever_the_pickle_protocol() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        packed = zlib.compress(pickle.dumps('[{"input": "é"}]', protocol=protocol))
        assert decode_tests("x", base64.b64encode(packed).decode()) == '[{"input": "é"}]'
    with pytest.raises(QtoolError, match="neither JSON nor base64"):
        decode_tests("x", "***")
    with pytest.raises(QtoolError, match="damaged, or more than"):
        decode_tests("x", base64.b64encode(zlib.compress(b"x" * 100)[:-8]).decode())


MULTIPL_E = {
    "name": "HumanEval_900_pair_up",
    "language": "js",
    "prompt": "//Pairs of neighbours, undefined if there are none.\nfunction pair_up(xs){\n",
    "doctests": "transform",
    "original": "x.py",
    "prompt_terminology": "reworded",
    "tests": "const assert = require('node:assert');\n\n\nfunction test() {\n  let candidate = pair_up;\n"
    "  assert.deepEqual(candidate([1, 2, 3]),[[1, 2], [2, 3]]);\n  assert.deepEqual(candidate([]),undefined);\n"
    '  assert.deepEqual(candidate(["a", "b"]),[["a", "b"]]);\n}\n\ntest();',
    "stop_tokens": ["\nfunction ", "\n/*", "\n//", "\nconsole.log"],
}
JAVASCRIPT = (
    "  if (xs.length === 0) return undefined;\n  const out = [];\n"
    "  for (let i = 1; i < xs.length; i++) out.push([xs[i - 1], xs[i]]);\n  return out;\n}\n"
)


@node
def test_multipl_e_javascript(tmp_path: Path) -> None:
    (problem,) = load_task("multipl-e-js", file=write(tmp_path / "js.jsonl", MULTIPL_E)).problems
    assert (problem.language, problem.entry_point, problem.run) == ("javascript", "pair_up", "call")
    wrong = JAVASCRIPT.replace("undefined", "null").replace("i = 1", "i = 2")
    judge_both(problem, JAVASCRIPT, wrong, "javascript")
    assert judge((problem, JAVASCRIPT + "\nconsole.log(pair_up(", "completion"))[0].passed
    assert prompts.messages(problem)[0]["content"].endswith(f"```javascript\n{MULTIPL_E['prompt']}```")


def test_multipl_e_other_languages(tmp_path: Path) -> None:
    python = {
        **MULTIPL_E, "language": "py", "name": "HumanEval_901_half",
        "prompt": 'def half(x: int) -> float:\n    """\n    Half of x.\n    """\n',
        "tests": "def check(candidate):\n    assert candidate(3) == 1.5\n\ndef test_check():\n    check(half)\n\n"
        "test_check()\n",
        "stop_tokens": ["\ndef", "\n#", "\nif", "\nclass"],
    }  # fmt: skip
    (problem,) = load_task(write(tmp_path / "py.jsonl", python)).problems
    judge_both(problem, "    return x / 2\n", "    return x // 2\n")
    with pytest.raises(QtoolError, match="language 'rkt'"):
        load_task(write(tmp_path / "rkt.jsonl", {**MULTIPL_E, "language": "rkt"}))


@node
def test_javascript_without_node_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = load_task(write(tmp_path / "js.jsonl", MULTIPL_E)).problems
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "node" else which(name))
    with pytest.raises(QtoolError, match="needs node, which is not installed") as caught:
        judge((problem, JAVASCRIPT, "completion"))
    assert caught.value.exit_code == 3


def test_parquet_is_read_like_jsonl(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [MBPP | {"task_id": 20}, MBPP | {"task_id": 21}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    found = load_task("mbpp", file=str(tmp_path / "test.parquet"))
    assert found.digest == load_task("mbpp", file=write(tmp_path / "mbpp.jsonl", *rows)).digest
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(QtoolError, match="damaged parquet"):
        load_task("mbpp", file=str(tmp_path / "bad.parquet"))


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("mbpp", {**MBPP, "task_id": "five"}, "key 'task_id' is 'five', not MBPP's number"),
        ("mbpp", {**MBPP, "test_list": []}, "'test_list' is missing or empty"),
        ("mbpp", {**MBPP, "test_list": [3]}, "'test_list' is not a list of texts"),
        ("mbpp", {**MBPP, "code": "def other(x): pass"}, "no assert of 'test_list' calls"),
        ("mbpp", {**MBPP, "code": "def ("}, "is not Python"),
        ("mbpp", {**MBPP, "task_id": 3}, "problems 11 to 510"),
        ("bigcodebench", MBPP, "key 'code_prompt' is missing. The row has challenge_test_list, code"),
        ("bigcodebench", {**BIGCODEBENCH, "test": "import no_such_library"}, "all 1 are left out .*no_such_library"),
        ("livecodebench", lcb(contest_date="soon", starter_code="x"), "must both be given, or neither"),
        ("livecodebench", lcb(metadata="["), "'metadata' is not a JSON object"),
        ("livecodebench", lcb(public_test_cases="[1]"), "a test has no text 'input' and 'output'"),
        ("humaneval+", {**HUMANEVAL_PLUS, "base_input": "x"}, "'base_input' is a str, not a list"),
        ("humaneval+", {**HUMANEVAL_PLUS, "atol": "x"}, "'atol' is a str"),
        ("multipl-e-js", {**MULTIPL_E, "tests": "", "name": "x"}, "neither 'tests' nor 'name'"),
    ],
)
def test_a_bad_row_is_refused_with_place_and_key(tmp_path: Path, task: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(QtoolError, match=said) as caught:
        load_task(task, file=write(tmp_path / "bad.jsonl", row))
    assert caught.value.exit_code == 2
    assert "bad.jsonl" in caught.value.message


# --- the data sets on the Hub ---


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    calls = []

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append({"repository": repository, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_benchmark_comes_at_its_pinned_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = data_sets()["livecodebench"][1]
    folder = tmp_path / known.revision
    folder.mkdir()
    for number, name in enumerate(["test10.jsonl", "test2.jsonl", "test.jsonl"]):
        write(folder / name, lcb(question_id=f"{number} {name}"))
    calls = fake_hub(monkeypatch, folder)
    # A pinned data set that is not whole is half a download; at another revision nobody knows how many there are.
    with pytest.raises(QtoolError, match="3 of 1055 problems are in the local cache") as caught:
        load_task("livecodebench")
    assert caught.value.exit_code == 3
    task = load_task("livecodebench", revision="main")
    assert [problem.task_id for problem in task.problems] == ["2 test.jsonl", "1 test2.jsonl", "0 test10.jsonl"]
    assert task.source == f"livecodebench/code_generation_lite@{known.revision}"
    assert [call["revision"] for call in calls] == [known.revision, "main"]
    assert calls[0]["repo_type"] == "dataset"
    for _, data_set in data_sets().values():
        assert len(data_set.revision) == 40
        int(data_set.revision, 16)


@pytest.mark.parametrize("name", sorted(set(data_sets()) - {"humaneval"}))
def test_a_benchmark_that_cannot_be_fetched_names_the_offline_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(QtoolError, match="cannot be fetched") as caught:
        load_task(name)
    assert caught.value.exit_code == 3
    known = data_sets()[name][1]
    for part in (known.repository, known.local, f"`file: PATH` beside `task: {name}`"):
        assert part in caught.value.message


def test_a_benchmark_with_a_wrong_revision_or_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, tmp_path)
    with pytest.raises(QtoolError, match=r"has no file data/test-\*.parquet, or only a part of it is cached") as caught:
        load_task("mbpp+")
    assert caught.value.exit_code == 3

    def unknown(*args: Any, **options: Any) -> str:
        import httpx2 as httpx

        response = httpx.Response(404, request=httpx.Request("GET", "http://localhost"))
        raise RevisionNotFoundError("no", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unknown)
    with pytest.raises(QtoolError, match="has no revision 'nope'") as caught:
        load_task("mbpp+", revision="nope")
    assert caught.value.exit_code == 2


def test_file_and_revision_are_for_benchmarks(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", MBPP)
    for name in ("heldout", path):
        with pytest.raises(QtoolError, match="`file` is for the benchmarks"):
            load_task(name, file=path)
    with pytest.raises(QtoolError, match="is neither a known task nor a file"):
        load_task("mbpp", file=str(tmp_path / "none.jsonl"))
    assert isinstance(load_task(path), Task)
    assert set(tasks.SHIPPED).isdisjoint(data_sets())
