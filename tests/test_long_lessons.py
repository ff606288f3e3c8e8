"""What the long-context model is trained on: right answers, whole tokens, and no name that the evaluation asks for; the
trainer's own forward is transformers' Llama."""

from __future__ import annotations

import importlib
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.evaluate.tasks import depots

SCRIPTS = Path(__file__).parent.parent / "scripts"
DEMO = Path(__file__).parent.parent / "pipeline" / "data" / "demo-model" / "tokenizer.json"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in ("long_lessons", "small_llama")}
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def encoder(scripts: dict[str, ModuleType]) -> Any:
    return scripts["long_lessons"].Encoder(DEMO)


def text_of(encoder: Any, row: np.ndarray, kinds: set[int]) -> str:
    kept = [int(token) for token, kind in zip(row[0], row[1], strict=True) if kind in kinds]
    return str(encoder.tokenizer.decode(kept))


@pytest.mark.parametrize("seed", range(4))
def test_answers_of_lessons_are_right(scripts: dict[str, ModuleType], seed: int) -> None:
    """Each is run against the definitions of its text: it charges what the depot in its docstring charges."""
    blocks, tail = scripts["long_lessons"]._find(random.Random(seed), 2048)
    context = "\n".join(text for block in blocks for text, _ in block)
    charged = {
        code: name for name, code in re.findall(r'def (charge_\w+)\(.*\n    """The charge of depot (.+)\."""', context)
    }
    weights = dict(re.findall(r"# The weight of depot (.+)\.\n(WEIGHT_\w+) =", context))
    questions = [text for text, kind in tail if text.startswith("def solve")]
    answers = [text for text, kind in tail if kind == scripts["long_lessons"].ANSWER]
    assert len(questions) == len(answers) > 2
    for question, answer in zip(questions, answers, strict=True):
        space: dict[str, Any] = {}
        exec(context + "\n" + question + answer, space)
        first, *others = re.findall(r"depot ([A-Z]\d-[A-Z]+)", question.split("Uses")[0])
        units, level = depots.INPUTS[1]
        charge = {code: space[name](units, **{_keyword(space[name]): level}) for code, name in charged.items()}
        if "times" in question:
            wanted = charge[first] * space[weights[others[0]]] + sum(charge[code] for code in others[1:])
        else:
            wanted = charge[first]
        assert space["solve"](units, level) == wanted


def _keyword(function: Any) -> str:
    return str(function.__code__.co_varnames[1])


def test_rows_are_whole_texts_without_the_names_of_the_evaluation(scripts: dict[str, ModuleType], encoder: Any) -> None:
    lessons = scripts["long_lessons"]
    rows = encoder.rows("a", 1024, 24)
    assert rows.shape == (24, 2, 1024)
    names = re.compile(r"(?:charge|WEIGHT)_[0-9a-fA-F]{4}\b")
    asked, _ = encoder.probes(2048, 8)
    found = {name for row in asked for name in names.findall(text_of(encoder, row, {1, 2, 3}))}
    assert found
    assert found <= lessons.held_out_names()
    for row in rows:
        text = text_of(encoder, row, {1, 2, 3})
        assert not set(names.findall(text)) & lessons.held_out_names()
    ends = [int(np.flatnonzero(row[1])[-1]) for row in asked]
    for row, end in zip(asked, ends, strict=True):  # tokens of the pieces are those of the whole
        assert encoder.tokenizer.encode(text_of(encoder, row[:, :end], {1, 3})).ids == row[0, :end].tolist()
        answer = text_of(encoder, row, {3})
        assert answer.startswith("    return ")
        assert answer.endswith("\n")


def test_the_forward_is_that_of_transformers(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    llama = scripts["small_llama"]
    geometry = llama.Geometry(vocabulary=64, hidden=128, intermediate=64, layers=2, heads=2, kv_heads=1, context=64)
    model = llama.SmallLlama(geometry, 0, torch.float32)
    for parameter in model.named.values():
        parameter.data = (parameter.data * (4 if parameter.ndim == 2 else 1)).bfloat16().float()
    llama.export(model, tmp_path, 0.05)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(path.stat().st_size < 70_000 for path in tmp_path.glob("*.safetensors"))
    again = llama.SmallLlama(geometry, 1, torch.float32)
    again.load(tmp_path)
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
    wanted = torch.nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    with torch.no_grad():
        losses, right = again(tokens)
    torch.testing.assert_close(losses[:, :-1].flatten(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(right[:, :-1], theirs[:, :-1].argmax(-1) == tokens[:, 1:])
