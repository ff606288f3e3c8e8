"""The reference engine against transformers' own generate, and the divergence against full distributions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.checkpoint import Checkpoint
from qtool.convert.skeleton import load_config
from qtool.convert.text import load_tokenizer
from qtool.evaluate import fidelity, prompts
from qtool.evaluate.generate import generate, load_model
from qtool.evaluate.tasks import Problem

PROMPTS = ["def f1(a, b):\n", "def f23(a, b):\n    return", "x", "def f7(a, b):\n    return a * 7 + b\n\n\ndef"]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load_model(Checkpoint.open(tiny).read(), load_config(tiny), torch.device("cpu"))


def answers(model: Any, tokenizer: Any, batch: int, limit: int = 21, stop: Any = lambda _: False) -> list[str]:
    found = [""] * len(PROMPTS)
    generate(
        model, tokenizer, PROMPTS, max_new_tokens=limit, batch_size=batch, finished=stop,
        on_text=lambda index, text: found.__setitem__(index, text),
    )  # fmt: skip
    return found


def test_the_loaded_model_is_transformers_own(model: Any, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokens = torch.randint(0, 320, (2, 40))
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tokens).logits, other(input_ids=tokens).logits)


def test_batched_greedy_equals_transformers_one_by_one(model: Any, tokenizer: Any) -> None:
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=21, do_sample=False, pad_token_id=0
        )
        expected.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    for batch in (1, 2, 4):
        assert answers(model, tokenizer, batch) == expected


def test_rows_stop_when_they_are_done(model: Any, tokenizer: Any) -> None:
    """A row that stops early leaves the batch; the others go on exactly as before."""
    full = answers(model, tokenizer, 4)
    stopped = answers(model, tokenizer, 4, stop=lambda text: full[0].startswith(text) and len(text) > 4)
    assert stopped[1:] == full[1:]
    assert full[0].startswith(stopped[0])
    assert len(stopped[0]) < len(full[0])


def test_a_model_with_a_missing_tensor_is_refused(tiny: Path) -> None:
    stream = ((name, tensor) for name, tensor in Checkpoint.open(tiny).read() if "up_proj" not in name)
    with pytest.raises(QtoolError, match=r"lacks model\.layers\.0\.mlp\.up_proj"):
        load_model(stream, load_config(tiny), torch.device("cpu"))


def test_divergence_equals_the_full_distributions(model: Any, tiny: Path) -> None:
    windows = torch.randint(0, 320, (3, 32), generator=torch.Generator().manual_seed(1))
    other = load_model(
        ((name, tensor + 0.01 * torch.randn(tensor.shape)) for name, tensor in Checkpoint.open(tiny).read()),
        load_config(tiny), torch.device("cpu"),
    )  # fmt: skip
    source = fidelity.reference(model, windows)
    found = fidelity.diverge(other, windows, source)
    with torch.inference_mode():
        p = model(input_ids=windows).logits.double().log_softmax(-1)
        q = other(input_ids=windows).logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(kl.mean(1).tolist(), rel=1e-3)
    assert found.kl_p999 == pytest.approx(float(kl.max()), rel=1e-3)
    nll = -q[:, :-1].gather(2, windows[:, 1:, None]).mean((1, 2))
    assert found.nll == pytest.approx(nll.tolist(), rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean(1).tolist())
    itself = fidelity.diverge(model, windows, source)
    assert max(itself.kl) < 1e-6
    assert itself.top1 == [1.0] * 3


def test_top_k_with_a_tail_is_a_close_lower_bound() -> None:
    torch.manual_seed(0)
    p = (3 * torch.randn(50, 5000)).log_softmax(-1)
    q = (p + 0.3 * torch.randn(50, 5000)).log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    top = p.topk(2048)
    found = fidelity.bucketed_kl(top.values, q.gather(1, top.indices))
    assert (found <= full + 1e-6).all()
    assert float(found.mean()) == pytest.approx(float(full.mean()), rel=0.02)
    assert math.isclose(float(fidelity.bucketed_kl(top.values, top.values).max()), 0, abs_tol=1e-5)


PROBLEM = Problem(
    task_id="t/0", prompt='def add(a: int, b: int) -> int:\n    """Add."""\n', entry_point="add",
    canonical_solution="    return a + b\n", test="def check(candidate):\n    assert candidate(1, 2) == 3\n",
)  # fmt: skip


def test_prompts(tokenizer: Any) -> None:
    assert prompts.choose_style("auto", tokenizer) == "completion"
    assert prompts.render(PROBLEM, "completion", tokenizer) == PROBLEM.prompt
    assert not prompts.finished("    return a", "completion")
    assert prompts.finished("    return a\ndef other", "completion")
    assert prompts.finished("```python\ndef add(a, b): ...\n```", "chat")
    assert "return a + b" in prompts.program(PROBLEM, "    return a + b\ndef more():", "completion")
