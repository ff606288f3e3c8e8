"""The reference engine against transformers' own generate, and the divergence against full distributions."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qtool import QtoolError
from qtool.cli import main
from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.skeleton import load_config
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate import fidelity
from qtool.evaluate.engines import cache, reference, torch_model
from qtool.evaluate.engines.engine import Decoding, Request
from qtool.evaluate.engines.sampling import sample, shared_noise
from qtool.evaluate.engines.torch_model import TorchModel, load_model, logits_of
from qtool.evaluate.tasks import prompts
from qtool.evaluate.tasks.problems import Problem

PROMPTS = ["def f1(a, b):\n", "def f23(a, b):\n    return", "x", "def f7(a, b):\n    return a * 7 + b\n\n\ndef"]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load_model(Checkpoint.open(tiny).read(), load_config(tiny), torch.device("cpu"))


def answers(model: Any, tokenizer: Any, batch: int, limit: int = 21, stop: Any = lambda _: False) -> list[str]:
    engine = TorchModel(reference.FACTS, model, tokenizer)
    requests = [Request(prompt, stop) for prompt in PROMPTS]
    return [text for _, text in sorted(engine.generate(requests, Decoding(limit, batch)))]


def test_the_loaded_model_is_transformers_own(model: Any, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokens = torch.randint(0, 320, (2, 40))
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tokens).logits, other(input_ids=tokens).logits)


def test_batched_greedy_equals_transformers_one_by_one(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=21, do_sample=False, pad_token_id=0
        )
        expected.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    for batch in (1, 2, 4):
        assert answers(model, tokenizer, batch) == expected
    monkeypatch.setattr(cache, "ROOM", 3)  # the cache is enlarged several times
    assert answers(model, tokenizer, 4) == expected


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


def sampled(model: Any, tokenizer: Any, batch: int, done: Collection[int] = ()) -> dict[int, str]:
    engine = TorchModel(reference.FACTS, model, tokenizer)
    requests = [Request(prompt, lambda _: False, seed=seed) for seed in (1, 2) for prompt in PROMPTS]
    return dict(engine.generate(requests, Decoding(9, batch, temperature=1.0, top_p=0.9), done))


def test_a_sample_depends_on_its_own_seed_alone(model: Any, tokenizer: Any) -> None:
    whole = sampled(model, tokenizer, 8)
    assert whole == sampled(model, tokenizer, 3)
    assert whole[0] != whole[len(PROMPTS)]
    rest = sampled(model, tokenizer, 3, done={0, 1, 6})
    assert rest == {index: text for index, text in whole.items() if index not in {0, 1, 6}}


def test_nucleus_sampling_has_the_renormalized_frequencies() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(40_000, 4)
    noise = shared_noise(torch.arange(40_000), 7, 4)
    shares = torch.bincount(sample(logits, 1.0, 0.75, noise), minlength=4) / 40_000
    assert shares.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.01)  # 0.5 alone is below 0.75, with 0.3 above
    cooled = torch.bincount(sample(logits, 0.5, 1.0, noise), minlength=4) / 40_000
    assert cooled.tolist() == pytest.approx([v / 0.365 for v in (0.25, 0.09, 0.0225, 0.0025)], abs=0.01)


def test_noise_is_gumbel_and_its_own_at_every_place() -> None:
    noise = shared_noise(torch.arange(600), 3, 500)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert float(noise.std()) == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    again = shared_noise(torch.tensor([17, 400]), 3, 300)  # whatever the batch and the vocabulary
    assert torch.equal(again, noise[[17, 400], :300])
    following = shared_noise(torch.arange(600), 4, 500)
    for a, b in ((noise, following), (noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        pairs = torch.stack([a.flatten(), b.flatten()])
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.01


def test_models_that_share_noise_differ_no_more_than_their_distributions() -> None:
    """2 TV / (1 + TV) at most; apart, a model differs from itself at every second token."""
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(50, generator=generator)
    q = p + 0.1 * torch.randn(50, generator=generator)
    distance = float((p.softmax(-1) - q.softmax(-1)).abs().sum()) / 2
    shared, own = shared_noise(torch.arange(20_000), 0, 50), shared_noise(torch.arange(20_000, 40_000), 0, 50)
    first, second, apart = (
        sample(logits.expand(20_000, 50), 1.0, 1.0, noise) for logits, noise in ((p, shared), (q, shared), (q, own))
    )
    differ = float((first != second).double().mean())
    assert 0 < differ <= 2 * distance / (1 + distance) + 0.005
    assert float((first != apart).double().mean()) > 10 * differ


@pytest.fixture(scope="module")
def other(tiny: Path) -> Any:
    """The tiny model, disturbed."""
    torch.manual_seed(3)
    stream = ((name, tensor + 0.01 * torch.randn(tensor.shape)) for name, tensor in Checkpoint.open(tiny).read())
    return load_model(stream, load_config(tiny), torch.device("cpu"))


def test_divergence_equals_the_full_distributions(model: Any, other: Any, tmp_path: Path) -> None:
    windows = torch.randint(0, 320, (3, 32), generator=torch.Generator().manual_seed(1))
    source = fidelity.make_reference(logits_of(model), windows, tmp_path / "source")
    found = fidelity.diverge(logits_of(other), windows, source)
    assert found.kept == 0
    with torch.inference_mode():
        p = model(input_ids=windows).logits.double().log_softmax(-1)
        q = other(input_ids=windows).logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(kl.mean(1).tolist(), rel=1e-3)
    assert found.kl_p999 == pytest.approx(float(kl.max()), rel=1e-3)
    nll = -q[:, :-1].gather(2, windows[:, 1:, None]).mean((1, 2))
    assert found.nll == pytest.approx(nll.tolist(), rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean(1).tolist())
    by_position = kl.mean(0)
    assert found.position_bin == 1
    assert found.kl_by_position == pytest.approx(by_position.tolist(), rel=1e-3)
    itself = fidelity.diverge(logits_of(model), windows, source)
    assert max(itself.kl) < 1e-6
    assert itself.top1 == [1.0] * 3


def test_long_windows_in_chunks_equal_one_pass(
    model: Any, other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.randint(0, 320, (2, 150), generator=torch.Generator().manual_seed(2))
    mine, theirs = logits_of(model), logits_of(other)
    whole = fidelity.diverge(theirs, windows, fidelity.make_reference(mine, windows, tmp_path / "whole"))
    for module in (fidelity, torch_model):
        monkeypatch.setattr(module, "CHUNK", 64)
    source = fidelity.make_reference(mine, windows, tmp_path / "parts")
    parts = fidelity.diverge(logits_of(other), windows, source)
    assert len(list(source.folder.iterdir())) == 6
    assert parts.nll == pytest.approx(whole.nll, rel=1e-5)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-4)
    assert parts.kl_by_position == pytest.approx(whole.kl_by_position, rel=1e-3)
    assert (parts.position_bin, len(parts.kl_by_position)) == (3, 50)
    few = fidelity.diverge(theirs, windows, fidelity.make_reference(mine, windows, tmp_path / "few", kept=64))
    assert few.kept == 64
    assert 0.8 * sum(whole.kl) < sum(few.kl) < sum(whole.kl)
    assert few.top1 == whole.top1


def test_a_reference_stays_within_its_budget() -> None:
    assert fidelity.kept_tokens(1536, 10_000) == 1536
    assert fidelity.kept_tokens(50_000, 10_000) == 2048
    assert fidelity.kept_tokens(150_000, 4 * 131_072) * 8 * 4 * 131_072 <= 2**30
    assert fidelity.kept_tokens(150_000, 10**9) == 64


def test_kl_by_layer_is_that_of_the_hybrid_model(model: Any, other: Any, tiny: Path, tmp_path: Path) -> None:
    windows = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(4))
    source = fidelity.make_reference(logits_of(model), windows, tmp_path / "source")
    changed = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixed_up = sorted(changed.items(), key=lambda item: item[0][::-1])  # no layer in one piece
    found = fidelity.diverge_by_layer(model, "model.layers.", iter(mixed_up), windows, source)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for index in range(2):
        mark = f"model.layers.{index}."
        stream = ((name, changed[name] if name.startswith(mark) else tensor) for name, tensor in before.items())
        hybrid = load_model(stream, load_config(tiny), torch.device("cpu"))
        expected = fidelity.diverge(logits_of(hybrid), windows, source).kl
        assert found[index] == pytest.approx(sum(expected) / 2, rel=1e-4)
    lacking = ((name, tensor) for name, tensor in changed.items() if ".1.mlp" not in name)
    with pytest.raises(QtoolError, match=r"lacks layer 1\."):
        fidelity.diverge_by_layer(model, "model.layers.", lacking, windows, source)


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
    assert not prompts.finished("```python\ndef add(a, b): ...\n```", "chat")  # a correction may follow
    assert "return a + b" in prompts.program(PROBLEM, "    return a + b\ndef more():", "completion")


def test_a_sliding_window_keeps_its_own_cache(model_maker: Any, tmp_path: Path) -> None:
    """Only plain layers get room; a model with a window of 8 answers as under transformers' generate."""
    folder = model_maker(tmp_path / "mistral", "Mistral", sliding_window=8)
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(Checkpoint.open(folder).read(), load_config(folder), torch.device("cpu"))
    assert not any(isinstance(layer, cache.RoomyLayer) for layer in cache.make_cache(model).layers)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        expected.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert answers(model, tokenizer, 4, 12) == expected


def test_a_shipped_name_is_scored_as_a_folder_is(tmp_path: Path) -> None:
    words = ["evaluate", "qtool-demo", "--text", "heldout-code", "--windows", "1", "--window-length", "32"]
    result = CliRunner().invoke(main, [*words, "--device", "cpu", "--runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output
    missing = CliRunner().invoke(main, ["evaluate", "nope", *words[2:]])
    assert (missing.exit_code, "no folder 'nope', and it is not a Hub id" in missing.output) == (2, True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ nope.a.b }}", "template refuses the problem: 'nope' is undefined"),
        ("{# nothing #}", "makes an empty prompt"),
        ("{{ 'a' * 10**11 }}", "takes more than 1024 MiB of memory"),
    ],
)
def test_a_hostile_template_is_refused_naming_the_problem(tiny: Path, template: str, said: str) -> None:
    own = load_tokenizer(tiny)
    own.chat_template = template
    with pytest.raises(QtoolError, match=f"{PROBLEM.task_id}: .*{said}"):
        prompts.render_all([PROBLEM], "chat", own)


def test_prompts_of_a_task_are_those_of_its_problems(tokenizer: Any) -> None:
    asked = [PROBLEM, PROBLEM.model_copy(update={"prompt": "def g():\n"})]
    assert prompts.render_all(asked, "completion", tokenizer) == [problem.prompt for problem in asked]
    assert prompts.render_all([], "chat", tokenizer) == []
    with pytest.raises(QtoolError, match="embedding has 3 rows"):
        prompts.render_all(asked, "completion", tokenizer, rows=3)
