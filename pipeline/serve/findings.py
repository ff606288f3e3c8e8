"""What a server must render, end and refuse as the model's files say: templates, stop tokens, the longest prompt."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qtool import QtoolError
from qtool.convert.files.proof import Finding
from qtool.convert.text.bounded import Overrun, bounded
from qtool.evaluate.engines.probe import Conversation, Probe, complete
from qtool.measure.measure import random_prompt
from qtool.serve.process import Server
from qtool.sizing.serving import PlannedServer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Read a file of the repository.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string", "description": "Its path."}},
                "required": ["path"],
            },
        },
    }
]
TALK = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "What does add(1, 2) give?\n\n```python\ndef add(a, b):\n    return a + b\n```"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And for \"é\" < 'z' & 2?"},
]
CALLED = {"id": "call000001", "type": "function"}
ARGUMENTS = {"path": "src/app.py"}
Numbers = dict[str, float]


def templates(planned: PlannedServer, server: Server, probe: Probe, tokenizer: Any) -> Iterator[Finding]:
    """A conversation, and one with a tool that was called, as the server renders them and as transformers does."""
    if not getattr(tokenizer, "chat_template", None):
        yield Finding(what="chat template", outcome="not asked", detail="the model has none")
        return
    yield _template("chat template", planned, server, probe, tokenizer, TALK, None)
    if "tools" not in str(tokenizer.chat_template):
        yield Finding(what="tool calls", outcome="not asked", detail="the chat template knows no tools")
        return
    yield _template("tool calls", planned, server, probe, tokenizer, TALK[1:2], TOOLS)
    talk: list[dict[str, Any]] = [*TALK[1:2], {"role": "assistant", "content": "", "tool_calls": [CALLED]}]
    talk.append({"role": "tool", "tool_call_id": CALLED["id"], "name": "read_file", "content": "print(1)"})
    yield _template("tool results", planned, server, probe, tokenizer, talk, TOOLS)


def _template(
    what: str, planned: PlannedServer, server: Server, probe: Probe, tokenizer: Any, talk: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
) -> Finding:  # fmt: skip
    try:  # a stranger's template runs within limits
        (text,) = bounded(lambda: [_render(tokenizer, _with_arguments(talk, as_text=False), tools)])
    except Overrun as error:
        return Finding(what=what, outcome="not asked", detail=f"transformers does not render it: it {error.reason}")
    except Exception as error:  # whatever a template raises: jinja's, Python's
        said = " ".join(str(error).split())[:200] or type(error).__name__
        return Finding(what=what, outcome="not asked", detail=f"transformers does not render it: {said}")
    conversation = Conversation(_with_arguments(talk, as_text=True), tools)
    found = probe.rendered(server.url, planned.serving.name, conversation)
    wanted: Any = text if isinstance(found, str) else tokenizer(text, add_special_tokens=False).input_ids
    if found == wanted:
        return Finding(what=what, outcome="pass", detail=f"{len(wanted)} {_unit(found)}, as transformers renders it")
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    seen = f"{found[at : at + 20]!r} instead of {wanted[at : at + 20]!r}"
    return Finding(what=what, outcome="fail", detail=f"differs from transformers at {_unit(found)[:-1]} {at}: {seen}")


def _unit(rendered: str | list[int]) -> str:
    return "characters" if isinstance(rendered, str) else "tokens"


def _with_arguments(talk: Sequence[dict[str, Any]], as_text: bool) -> list[dict[str, Any]]:
    """OpenAI's servers take a call's arguments as JSON text, templates as an object."""
    arguments: Any = json.dumps(ARGUMENTS) if as_text else ARGUMENTS
    function = {"name": "read_file", "arguments": arguments}
    return [
        turn | {"tool_calls": [CALLED | {"function": function}]} if "tool_calls" in turn else turn for turn in talk
    ]  # fmt: skip


def _render(tokenizer: Any, talk: Sequence[dict[str, Any]], tools: Any) -> str:
    text: str = tokenizer.apply_chat_template(list(talk), tools=tools, tokenize=False, add_generation_prompt=True)
    return text


def stops(planned: PlannedServer, server: Server, ends: Sequence[int], ids: Sequence[int]) -> Finding:
    """Whether the server ends an answer at each token that generation_config.json says ends one: it is made the
    likeliest."""
    wrong = []
    for end in ends:
        answer = complete(server.url, planned.serving.name, ids, 4, logit_bias={str(end): 100})
        reason, made = answer["choices"][0].get("finish_reason"), answer["choices"][0]["text"]
        if reason != "stop" or made:
            wrong.append(f"{end} (finish_reason {reason!r}, text {made[:20]!r})")
    if not ends:
        return Finding(what="stop tokens", outcome="not asked", detail="the model names none")
    if wrong:
        return Finding(what="stop tokens", outcome="fail", detail=f"does not end at token {', '.join(wrong)}")
    return Finding(what="stop tokens", outcome="pass", detail=f"ends at {', '.join(map(str, ends))}, without its text")


def longest_prompt(planned: PlannedServer, server: Server, numbers: Numbers) -> Iterator[Finding]:
    """A prompt that fills the planned context but for one token, and one that is too long."""
    context, what = planned.serving.context, "longest prompt"
    source, vocabulary = random.Random("longest"), planned.headers.geometry.vocab
    started = time.perf_counter()
    try:
        complete(server.url, planned.serving.name, random_prompt(source, context - 1, vocabulary))
    except QtoolError as error:
        server.require_running()
        yield Finding(what=what, outcome="fail", detail=f"{context - 1:,} tokens: {error.message}")
        return
    numbers["longest_prompt_seconds"] = seconds = time.perf_counter() - started
    yield Finding(what=what, outcome="pass", detail=f"{context - 1:,} tokens and an answer, {seconds:.3g} s")
    try:
        complete(server.url, planned.serving.name, random_prompt(source, context + 300, vocabulary))
    except QtoolError:
        server.require_running()
        yield Finding(what="too long a prompt", outcome="pass", detail=f"{context + 300:,} tokens are refused")
    else:
        detail = f"{context + 300:,} tokens are taken where {context:,} were planned"
        yield Finding(what="too long a prompt", outcome="fail", detail=detail)
