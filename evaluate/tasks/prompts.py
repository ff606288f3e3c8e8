"""How a problem is put to a model, and how its answer becomes a program: completion or chat.

Wording, stop sequences and extraction are each benchmark's own where it publishes them (docs/tasks.md has the table):
EvalPlus' codegen.py and provider/utility.py for HumanEval+, MBPP and MBPP+ (MBPP's completion prompt, a docstring with
one assert, is also bigcode-evaluation-harness'); BigCodeBench's generate.py (complete and instruct); LiveCodeBench's
prompts/code_generation.py and utils/extraction_utils.py; MultiPL-E's stop tokens. HumanEval and MultiPL-E publish no
chat prompt: those are qtool's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from qtool import QtoolError
from qtool.convert.text.bounded import ANSWER, SECONDS, Overrun, bounded
from qtool.convert.text.windows import require_rows
from qtool.evaluate.tasks.extract import stop_at_end_of_function
from qtool.evaluate.tasks.problems import Problem
from qtool.evaluate.tasks.reply import newlines
from qtool.evaluate.tasks.table import benchmark_of

Style = Literal["completion", "chat"]
SPEED = 100_000  # characters a second that any template and tokenizer take
CHAT = (
    "Complete this {language} function. Answer with the whole function in one {language} code block.\n\n"
    "```{fence}\n{prompt}```"
)


def choose_style(style: str, tokenizer: Any) -> Style:
    """`auto`: chat where the model has a chat template."""
    if style == "auto":
        return "chat" if getattr(tokenizer, "chat_template", None) else "completion"
    return "chat" if style == "chat" else "completion"


def messages(problem: Problem) -> list[dict[str, str]]:
    """The conversation that asks a chat model. One user message: not every template has a place for a system's."""
    if problem.instruction:
        return [{"role": "user", "content": problem.instruction}]
    language = "JavaScript" if problem.language == "javascript" else "Python"
    content = CHAT.format(language=language, fence=language.lower(), prompt=problem.prompt)
    return [{"role": "user", "content": content}]


def render_all(problems: Sequence[Problem], style: Style, tokenizer: Any, rows: int | None = None) -> list[str]:
    """The exact text the model continues, of each problem; template and tokenizer at work within limits.

    ``rows``: of the model's embedding. Raises QtoolError naming the problem that a template refuses, or whose tokens
    the model does not have.
    """

    def work() -> Iterator[list[Any]]:
        for problem in problems:
            try:
                text = render(problem, style, tokenizer)
            except MemoryError:
                raise
            except Exception as error:  # jinja's, and whatever a template's own filters raise
                yield ["", -1, " ".join(str(error).split())[:300] or type(error).__name__]
                return
            yield [text, max(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, default=-1), ""]

    try:
        characters = sum(len(problem.prompt) for problem in problems)
        made = bounded(work, SECONDS + 0.1 * len(problems) + characters / SPEED, answer=ANSWER + 8 * characters)
    except Overrun as error:
        name = problems[min(len(error.done), len(problems) - 1)].task_id
        raise QtoolError(f"{name}: the model's chat template or tokenizer {error.reason}.") from error
    for problem, (text, token, refusal) in zip(problems, made, strict=False):
        if refusal:
            raise QtoolError(f"{problem.task_id}: the model's chat template refuses the problem: {refusal}")
        if not text.strip():
            raise QtoolError(f"{problem.task_id}: the model's chat template makes an empty prompt of the problem.")
        if rows is not None:
            require_rows(token, rows, tokenizer)
    return [text for text, _, _ in made]


def render(problem: Problem, style: Style, tokenizer: Any) -> str:
    """The exact text the model continues."""
    if style == "completion":
        bos, own = tokenizer.bos_token, tokenizer(problem.prompt).input_ids
        if not bos or own[:1] != [tokenizer.bos_token_id]:
            return problem.prompt
        # SentencePiece puts a space before a text, but in some tokenizers none behind a BOS that is spelled out
        spaced = f"{bos} {problem.prompt}"
        return spaced if tokenizer(spaced, add_special_tokens=False).input_ids == own else bos + problem.prompt
    text: str = tokenizer.apply_chat_template(messages(problem), tokenize=False, add_generation_prompt=True)
    return text


def finished(text: str, style: Style, problem: Problem | None = None) -> bool:
    """Whether nothing that follows can still belong to the answer to ``problem`` (None: to some Python function)."""
    if style == "chat":
        return False  # a block that corrects the last one may follow
    if problem is not None:
        return benchmark_of(problem).finished(problem, text)
    text = newlines(text)
    return len(stop_at_end_of_function(text)) < len(text.rstrip("\n"))


def program(problem: Problem, text: str, style: Style) -> str:
    """The program that is judged."""
    benchmark = benchmark_of(problem)
    return benchmark.from_reply(problem, text) if style == "chat" else benchmark.from_text(problem, text)
