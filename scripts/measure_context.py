"""What a budget costs: how often `qtool context` chooses all that a question needs, by method and budget. Markdown.

    python scripts/measure_context.py --work work            made repositories
    python scripts/measure_context.py --work work --real .   definitions of a real one, asked for by docstring
    python scripts/measure_context.py --work work --answers MODEL --budgets 1k,4k,15k    answers kept, too

Made: `--questions` of long-call and long-combine, each about a repository of `--files` files out of the long tasks'
texts, with six look-alikes of each definition, and without (control). Needed: the line of the name and the line of the
depot of every definition that the answer uses. `called` asks about a function that calls another, whose own words the
question does not have, and needs both `def` lines. Real: functions drawn from a folder's Python files; each one's
docstring is taken out of a copy, its first sentence is the question, and its `def` line is needed. Commits are made in
an order that has nothing to do with the questions.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qtool import QtoolError
from qtool.cli.options import numbers
from qtool.context.files import read_tree
from qtool.context.pieces import cut
from qtool.context.ranking import METHODS, Repository
from qtool.context.selection import Count, by_characters, choose, ranked
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate.statistics import wilson
from qtool.evaluate.tasks import long_call, long_combine
from qtool.evaluate.tasks.depots import codes, depot
from qtool.evaluate.tasks.filler import filler_block
from qtool.evaluate.tasks.made import APART, Puzzle
from qtool.evaluate.tasks.problems import Problem

BLOCKS = 14  # of a made file
ALIKE = 6
PUZZLES: dict[str, Callable[[random.Random, int], Puzzle]] = {
    long_call.NAME: long_call.puzzle, long_combine.NAME: long_combine.puzzle,
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """``kind``: the row of the table; ``needed``: lines; ``puzzle``: what an answer is judged by, where one is."""

    kind: str
    name: str
    text: str
    needed: tuple[str, ...]
    repository: Repository
    puzzle: Puzzle | None = None


def made_questions(options: argparse.Namespace) -> Iterator[Question]:
    """A repository for each."""
    for task, puzzle in {**PUZZLES, "called": called}.items():
        for alike in (0,) if options.control else (ALIKE, 0):
            for number in range(options.questions):
                drawn = random.Random(f"context/{task}/{alike}/{number}")
                hidden = puzzle(drawn, alike)
                root = options.work / f"{task}-{alike}-{number}"
                write_repository(root, drawn, hidden, options.files)
                rows = 2 if hidden.test else 1
                needed = tuple(line for block in hidden.needles for line in block.splitlines()[:rows])
                kind = f"{task}, {'look-alikes' if alike else 'control'}"
                judged = hidden if hidden.test else None
                yield Question(kind, f"{kind} {number}", hidden.question, needed, opened(root), judged)


def called(drawn: random.Random, look_alikes: int) -> Puzzle:
    """A depot's charge that another function computes. No test: nothing is answered here."""
    taken: set[str] = set()
    (code,) = codes(drawn, 1)
    blocks: list[str] = []
    for one in (depot(drawn, other, taken) for other in (code, *codes(drawn, look_alikes, code))):
        inner, (a, b, _, modulus) = f"settle_{drawn.randrange(16**4):04x}", one.numbers
        blocks.append(
            f'def {one.name}(units, *, {one.keyword}):\n    """The charge of depot {one.code}."""\n'
            f"    return {inner}(units, {one.keyword}) % {modulus}"
        )
        blocks.append(f'def {inner}(amount, step):\n    """Before rounding."""\n    return amount * {a} + step * {b}')
    question = f"How is the charge of depot {code} computed, step by step?"
    return Puzzle(tuple(blocks[:2]), tuple(blocks[2:]), question, answer="", test="")


def write_repository(root: Path, drawn: random.Random, hidden: Puzzle, files: int) -> None:
    """Files of filler, what is hidden somewhere among it, a commit for every five."""
    from dulwich import porcelain

    shutil.rmtree(root, ignore_errors=True)
    blocks = [[filler_block(drawn) for _ in range(BLOCKS)] for _ in range(files)]
    for block in (*hidden.needles, *hidden.others):
        file = drawn.choice(blocks)
        file.insert(drawn.randrange(len(file) + 1), block)
    paths = [root / f"{drawn.choice('abcdef')}" / f"part_{number:03d}.py" for number in range(files)]
    root.mkdir(parents=True)
    porcelain.init(str(root))
    for path, file in zip(paths, blocks, strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(APART.join(file) + "\n", encoding="utf-8")
    order = [str(path) for path in drawn.sample(paths, len(paths))]
    for begin in range(0, len(order), 5):
        porcelain.add(str(root), order[begin : begin + 5])
        porcelain.commit(str(root), message=b"x", author=b"a <a@b>", committer=b"a <a@b>")


def opened(root: Path) -> Repository:
    """Cut into pieces."""
    return Repository(root, cut(read_tree(root).files))


def real_questions(options: argparse.Namespace) -> Iterator[Question]:
    """One repository for all: a copy without the docstrings of the functions that are asked for."""
    root: Path = options.work / "real"
    shutil.rmtree(root, ignore_errors=True)
    tree = read_tree(options.real)
    found: list[tuple[str, ast.FunctionDef, str]] = []
    texts = {file.path: file.text for file in tree.files}
    for file in tree.files:
        if file.path.endswith(".py"):
            found += [(file.path, node, said) for node, said in documented(file.text)]
    drawn = random.Random("real")
    chosen = drawn.sample(found, min(len(found), 2 * options.questions))
    for path in sorted({path for path, _, _ in chosen}):
        lines = texts[path].split("\n")
        for node in sorted((n for p, n, _ in chosen if p == path), key=lambda n: -n.lineno):
            docstring = node.body[0]
            lines[docstring.lineno - 1 : docstring.end_lineno] = []
        texts[path] = "\n".join(lines)
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    repository = opened(root)
    for path, node, said in chosen:
        head = next(line for line in texts[path].split("\n") if re.match(rf"\s*def {node.name}\(", line))
        yield Question("real", f"{path} {node.name}", said, (f"### {path}", head), repository)


def documented(text: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Functions of more than their docstring, whose first sentence has six words or more and not their own name."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (said := ast.get_docstring(node)):
            sentence = said.split("\n\n")[0].replace("\n", " ")
            if len(sentence.split()) >= 6 and node.name not in sentence:
                yield node, sentence


def prompts(
    questions: Sequence[Question], methods: Sequence[str], budgets: Sequence[int], count: Count
) -> Iterator[tuple[Question, str, int, str, int, int]]:
    """(question, method, budget, prompt, its tokens, those of the whole)."""
    for asked in questions:
        pieces = asked.repository.pieces
        whole = sum(count([piece.text for piece in pieces]))
        for method in methods:
            try:
                order = ranked(asked.repository, asked.text, method)
            except QtoolError:  # a real repository's copy has no history
                continue
            for budget in budgets:
                prompt, tokens, _ = choose(pieces, order, asked.text, METHODS[method].outlined, budget, count)
                yield asked, method, budget, prompt, tokens, whole


def answered(folder: Path, rows: Sequence[tuple[Question, str]], tokens: int) -> list[bool]:
    """Whether the model's answer to each (question, prompt) is right, run in the sandbox."""
    import torch
    from transformers import AutoModelForCausalLM

    from qtool.convert.files.source import resolve
    from qtool.evaluate.engines.engine import Decoding, Request
    from qtool.evaluate.engines.reference import FACTS
    from qtool.evaluate.engines.torch_model import TorchModel
    from qtool.evaluate.sandbox.execute import run_programs
    from qtool.evaluate.tasks import prompts as styles
    from qtool.evaluate.tasks.loading import as_job

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(resolve(str(folder)).path, dtype=dtype).to(device).eval()
    engine = TorchModel(FACTS, model, load_tokenizer(folder))
    problems = [problem_of(asked, prompt, number) for number, (asked, prompt) in enumerate(rows)]
    requests = [
        Request(prompt=one.prompt, seed=0, finished=partial(styles.finished, style="completion", problem=one))
        for one in problems
    ]
    texts = dict(engine.generate(requests, Decoding(max_new_tokens=tokens, batch_size=16)))
    jobs = [as_job(one, styles.program(one, texts[number], "completion")) for number, one in enumerate(problems)]
    outcomes = {one.task_id: one.passed for one in run_programs(jobs, timeout=5.0, sandbox="auto")}
    return [outcomes[one.task_id] for one in problems]


def problem_of(asked: Question, prompt: str, number: int) -> Problem:
    """As `evaluate.tasks.made` makes one, with another text before the question."""
    hidden = asked.puzzle
    assert hidden is not None
    head = prompt.removesuffix(asked.text.rstrip("\n") + "\n").rstrip("\n")
    return Problem(
        task_id=f"{asked.name}/{number}", prompt=head + APART + hidden.question, entry_point=hidden.entry,
        canonical_solution=hidden.answer, test=hidden.test, format=asked.kind.split(",")[0],
        setup=APART.join(sorted((*hidden.needles, *hidden.others))),
    )  # fmt: skip


def counting(folder: Path | None) -> Count:
    """By a model's tokenizer, else by characters."""
    if folder is None:
        return by_characters
    tokenizer = load_tokenizer(folder)

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids]

    return count


def main() -> None:
    """Tables: share of questions whose needed lines are all there; then of answers that are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--real", type=Path, help="a folder of Python code, instead of made repositories")
    parser.add_argument("--questions", type=int, default=20, help="of each row; real: twice as many")
    parser.add_argument("--control", action="store_true", help="made: those without look-alikes alone")
    parser.add_argument("--files", type=int, default=60, help="of a made repository")
    parser.add_argument("--budgets", default="512,1k,2k,4k,8k,16k")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=tuple(METHODS))
    parser.add_argument("--model", type=Path, help="its tokenizer counts; else 3 characters are a token")
    parser.add_argument("--answers", type=Path, help="a model that is asked with what was chosen")
    options = parser.parse_args()
    budgets = numbers(options.budgets, "--budgets")
    questions = list(real_questions(options) if options.real else made_questions(options))
    rows = list(prompts(questions, options.methods, budgets, counting(options.model or options.answers)))
    kept: dict[tuple[str, str, int], list[bool]] = defaultdict(list)
    wholes = []
    for asked, method, budget, prompt, _, whole in rows:
        lines = set(prompt.split("\n"))
        kept[asked.kind, method, budget].append(all(line in lines for line in asked.needed))
        wholes.append(whole)
    print(f"{len(questions)} questions, repositories of {sum(wholes) / len(wholes):,.0f} tokens")
    show("All that is needed was chosen", kept, budgets)
    if options.answers:
        right: dict[tuple[str, str, int], list[bool]] = defaultdict(list)
        rows = [row for row in rows if row[0].puzzle is not None]
        outcomes = answered(options.answers, [(row[0], row[3]) for row in rows], 64)
        for (asked, method, budget, *_), ok in zip(rows, outcomes, strict=True):
            right[asked.kind, method, budget].append(ok)
        show("The model's answer is right", right, budgets)


def show(title: str, found: dict[tuple[str, str, int], list[bool]], budgets: Sequence[int]) -> None:
    """A row for each kind of question and method."""
    print(
        f"\n{title}\n\n| questions | method | " + " | ".join(map(str, budgets)) + " |\n|" + "---|" * (2 + len(budgets))
    )
    for kind, method in dict.fromkeys((kind, method) for kind, method, _ in found):
        cells = []
        for budget in budgets:
            ok = found[kind, method, budget]
            rate = wilson(sum(ok), len(ok))
            cells.append(f"{rate.estimate:.0%} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]")
        print(f"| {kind} | {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
