"""How a problem is put to a model, and how its answer becomes a program: completion or chat."""

from __future__ import annotations

from typing import Any, Literal

from qtool.evaluate.extract import program_from_chat, program_from_completion, stop_at_end_of_function
from qtool.evaluate.tasks import Problem

Style = Literal["completion", "chat"]
CHAT = (
    "Complete this Python function. Answer with the whole function in one Python code block.\n\n```python\n{prompt}```"
)


def choose_style(asked: str, tokenizer: Any) -> Style:
    """`auto`: chat where the model has a chat template."""
    if asked == "auto":
        return "chat" if getattr(tokenizer, "chat_template", None) else "completion"
    return "chat" if asked == "chat" else "completion"


def render(problem: Problem, style: Style, tokenizer: Any) -> str:
    """The exact text the model continues."""
    if style == "completion":
        bos = tokenizer.bos_token or ""
        starts = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] if bos else False
        return (bos if starts else "") + problem.prompt
    messages = [{"role": "user", "content": CHAT.format(prompt=problem.prompt)}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def finished(text: str, style: Style) -> bool:
    """Whether nothing that follows can still belong to the answer."""
    if style == "chat":
        return text.count("```") >= 2
    return len(stop_at_end_of_function(text)) < len(text.rstrip("\n"))


def program(problem: Problem, text: str, style: Style) -> str:
    """The program that is judged."""
    if style == "chat":
        return program_from_chat(text, problem.prompt, problem.entry_point)
    return program_from_completion(problem.prompt, text, problem.entry_point)
