"""A long text from recipe to report: buckets and their intervals, conditions apart, refusals before work."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from qtool import QtoolError
from qtool.cli import main
from qtool.convert.artifact import Artifact
from qtool.convert.models.shape import shape_of
from qtool.convert.text.long_text import long_text
from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.evaluate.buckets import buckets_of
from qtool.evaluate.engines.layered import Sweep
from qtool.evaluate.engines.sweep_memory import peak_bytes, require_memory
from qtool.evaluate.scorecard import PositionScore, Settings
from qtool.measure.long_text import require_possible, text_of
from qtool.measure.questions import kept_whole
from qtool.recipe.judging import EvaluateSection, GateSection
from qtool.recipe.long import LongSection
from qtool.recipe.sections import load_recipe
from qtool.report.along import along_rows
from qtool.run import run
from qtool.runs.along import along_summary
from qtool.runs.baseline import Measured, _model
from qtool.runs.compare import compare
from qtool.runs.gates import judge
from qtool.runs.record import load_run
from qtool.runs.summary import ModelSummary, Summary

LENGTH = 1024

TASKS = [{"task": "handwritten"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_maker: Callable[..., Path]) -> Path:
    return model_maker(tmp_path_factory.mktemp("long") / "model", max_position_embeddings=LENGTH, loudness=4.0)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files that count, three that do not."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("a", "b"):
        (folder / f"{name}.py").write_text("".join(f"def {name}{i}(x):\n    return x + {i}\n\n" for i in range(60)))
    (folder / "data.bin").write_bytes(b"\0\1")
    (folder / "latin.py").write_bytes(b"# \xe9\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("secret")
    return folder


def settings(condition: str = "") -> Settings:
    return Settings(engine="reference", dtype="float32", device="cpu", prompt="", max_new_tokens=1, condition=condition)


def score(subject: str, nll: list[float], condition: str = "") -> PositionScore:
    return PositionScore(
        key="k", subject=subject, digest="d", settings=settings(condition), length=128 * len(nll), block=128,
        kl=[x / 10 for x in nll], nll=nll, top1=[0.5] * len(nll), cache_bytes=1, seconds=1.0,
    )  # fmt: skip


def test_buckets_double_and_cover_the_text() -> None:
    assert list(buckets_of(16384, 128)) == [(0, 2048), (2048, 4096), (4096, 8192), (8192, 16384)]
    assert list(buckets_of(10000, 128))[-1] == (8192, 10000)
    assert list(buckets_of(1024, 128)) == [(0, 256), (256, 512), (512, 1024)]
    assert list(buckets_of(100, 128)) == [(0, 100)]


def test_a_rise_is_paired_block_by_block_and_never_across_conditions() -> None:
    """A rise of the same 0.1 in every block has an interval of no width, however the blocks differ."""
    source = [1.0 + i % 7 for i in range(16)]
    found = along_summary(score("awq", [x + 0.1 for x in source]), score("source", source))
    assert [bucket.end for bucket in found.buckets] == [512, 1024, 2048]
    for bucket in found.buckets:
        assert bucket.rise is not None
        assert math.isclose(bucket.rise.low, 0.1, abs_tol=1e-9)
        assert math.isclose(bucket.rise.high, 0.1, abs_tol=1e-9)
        assert bucket.kl.low < bucket.kl.estimate < bucket.kl.high
    with pytest.raises(ValueError, match="other conditions"):
        along_summary(score("awq", source, "q8_0"), score("source", source))
    assert along_summary(score("source", source), score("source", source)).buckets[0].rise is None


def test_a_folder_is_one_text_in_the_order_of_its_paths(model: Path, repository: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    found = long_text(TextSource(text=str(repository), samples=1, length=1800), tokenizer)
    text = tokenizer.decode(found.tokens)
    assert text.startswith("# File: a.py\ndef a0(x):")
    assert "\n\n# File: b.py\ndef b0(x):" in text
    assert "secret" not in text
    assert found.parts == 2
    with pytest.raises(QtoolError, match=r"has [\d,]+ tokens of this model; 100,000 are asked for. Set `length: \d+`"):
        long_text(TextSource(text=str(repository), samples=1, length=100_000), tokenizer)
    (tmp_path / "short.py").write_text("x")
    with pytest.raises(QtoolError, match=r"2 tokens of this model; 9 are asked for. Name a longer text"):  # 8 at least
        long_text(TextSource(text=str(tmp_path / "short.py"), samples=1, length=9), tokenizer)
    (tmp_path / "short.py").unlink()
    with pytest.raises(QtoolError, match="holds no file of code or prose"):
        long_text(TextSource(text=str(tmp_path), samples=1, length=8), tokenizer)


@torch.inference_mode()
def slow(source: Path, artifact: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and negative log-likelihood of every position, by transformers' own forward over the whole text."""
    logs = []
    for folder in (source, artifact):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        state = {name: tensor.float() for name, tensor in Artifact.open(folder).read()}
        model.load_state_dict(state, strict=False)
        logs.append(model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    return kl, -logs[1][:-1].gather(1, tokens[1:, None]).squeeze(1)


def recipe_for(write_recipe: Callable[..., Path], model: Path, repository: Path, **evaluate: Any) -> Path:
    asked = {"long": {"text": str(repository), "length": LENGTH}} | evaluate
    return write_recipe(model=str(model), outputs=[{"method": "awq", "group_size": 32}], evaluate=asked)


def test_a_run_tells_it_by_position(
    write_recipe: Callable[..., Path], model: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a slow forward has it; with conditions, each under its own key; and nothing of it is computed twice."""
    conditions = [{"cache": "q4_0"}, {"window": {"sink": 4, "recent": 200}}]
    path = recipe_for(write_recipe, model, repository, conditions=conditions)
    finished = run(path, tmp_path / "runs", device="cpu")
    assert finished is not None
    along = finished.summary.models["awq"].along
    assert list(along) == ["", "q4_0, simulated", "window 4+200"]
    tokens = long_text(TextSource(text=str(repository), samples=1, length=LENGTH), load_tokenizer(model)).tokens
    kl, nll = slow(model, finished.folders["awq"], tokens)
    for bucket in along[""].buckets:
        part = slice(bucket.start, bucket.end)
        assert math.isclose(bucket.kl.estimate, float(kl[part].mean()), rel_tol=1e-3, abs_tol=1e-6)
        assert math.isclose(bucket.nll.estimate, float(nll[part].mean()), rel_tol=2e-3)
    source = finished.summary.models["source"].along
    assert source[""].kl.estimate < 1e-6 < source["q4_0, simulated"].kl.estimate
    window = source["window 4+200"].buckets
    assert window[0].end == 256
    assert window[-1].kl.estimate > 1e-3
    assert finished.scores.positions["source"]["window 4+200"].kl[0] < 1e-6
    # two layers, two heads of 32, keys and values; blocks of 32 are 18 bytes
    sizes = [found.cache_bytes for found in along.values()]
    assert sizes == [LENGTH * 2 * 2 * 64 * 2, LENGTH * 2 * 2 * 64 * 18 // 32, 204 * 2 * 2 * 64 * 2]
    assert [row["cache"] for row in along_rows(finished.summary)] == 2 * ["own", "q4_0, simulated", "window 4+200"]
    assert load_run(finished.folder).summary == finished.summary

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a text is taken through a model again")

    monkeypatch.setattr(Sweep, "states", never)
    again = run(path, tmp_path / "runs", device="cpu")
    assert again is not None
    assert again.scores.positions == finished.scores.positions
    assert not list(finished.folder.glob("scores/*.states"))


def test_report_and_card_show_it(
    write_recipe: Callable[..., Path], model: Path, repository: Path, tmp_path: Path
) -> None:
    from qtool.report.files import write_report

    path = recipe_for(write_recipe, model, repository, conditions=[{"cache": "fp8"}])
    finished = run(path, tmp_path / "runs", device="cpu")
    assert finished is not None
    html = write_report(finished, tmp_path / "out").read_text()
    assert "Along a long text" in html
    assert "KL 512-1K" in html
    drawn = sorted(file.name for file in (tmp_path / "out" / "figures").glob("kl-*.svg"))
    assert drawn == ["kl-along-0.svg", "kl-along-1.svg", "kl-cache.svg"]
    picture = (tmp_path / "out" / "figures" / "kl-along-0.svg").read_text()
    assert ">256<" in picture
    assert ">1K<" in picture
    assert picture.count("<polyline") == 1
    assert "source fp8, simulated" in (tmp_path / "out" / "figures" / "kl-cache.svg").read_text()
    assert "## Along a long text" in (tmp_path / "out" / "report.md").read_text()


def summaries(found: dict[str, list[float]], condition: str = "") -> dict[str, ModelSummary]:
    """Models with this KL in every block of 2,048 tokens."""
    along = {name: along_summary(score(name, [10 * kl for kl in kls], condition), None) for name, kls in found.items()}
    return {name: ModelSummary(along={condition: one}) for name, one in along.items()}


@pytest.mark.parametrize(
    ("gate", "verdict", "said"),
    [
        ({"bucket": "2K-4K"}, "fail", "mean KL 0.3 [0.3, 0.3]: beyond max_kld 0.2"),
        ({"bucket": "0-1K"}, "pass", "mean KL 0.1 [0.1, 0.1]: within max_kld 0.2"),
        ({}, "undecided", "mean KL 0.2 ["),
        ({"bucket": "4K-8K"}, "undecided", "of other buckets: 0-1K, 1K-2K, 2K-4K"),
        ({"bucket": "1K-2K", "cache": "q8_0"}, "undecided", "no KL was measured along a long text under q8_0"),
    ],
)
def test_a_gate_judges_a_bucket_under_its_own_condition(gate: dict[str, Any], verdict: str, said: str) -> None:
    models = summaries({"source": [0.0] * 32, "awq": [0.1] * 16 + [0.3] * 16})
    asked = GateSection.model_validate({"max_kld": 0.2, "long": gate})
    (found,) = judge(Summary(models=models, comparisons=0, evidence=""), [asked])
    assert (found.verdict, said in found.reason) == (verdict, True), found.reason
    assert found.gate.startswith(f"max_kld 0.2 at {gate.get('bucket', 'the long text')}")
    simulated = summaries({"source": [0.0] * 16, "awq": [0.3] * 16}, "q8_0, simulated")
    (other,) = judge(
        Summary(models=simulated, comparisons=0, evidence=""),
        [GateSection.model_validate({"max_kld": 0.2, "long": {"cache": "q8_0", "bucket": "0-512"}})],
    )
    assert (other.verdict, other.gate) == ("undecided", "max_kld 0.2 at 0-512, q8_0")
    assert other.reason == "4 blocks of 128 tokens are too few to judge by; take a longer text"


def measured(kls: list[float], condition: str = "", digest: str = "d") -> Measured:
    along = along_summary(score("awq", [10 * kl for kl in kls], condition).model_copy(update={"digest": digest}), None)
    return _model("key", ModelSummary(along={condition: along}))


def test_two_runs_are_compared_by_bucket_and_never_across_conditions() -> None:
    """Blocks are paired: a rise of the same 0.1 in blocks that differ widely is shown, where it is."""
    before = [0.1 + 0.2 * (i % 5) for i in range(32)]
    after = [*before[:16], *(kl + 0.1 for kl in before[16:])]
    changes = compare([("awq", measured(before), measured(after))], same_source=True)
    assert [(change.what, change.shown) for change in changes] == [
        ("KL to source at 0-1K", "no loss shown"), ("KL to source at 1K-2K", "no loss shown"),
        ("KL to source at 2K-4K", "worse"),
    ]  # fmt: skip
    assert changes[2].change == "rose by 0.1000 [0.1000, 0.1000] nats a token on 16 blocks"
    crossed = compare([("awq", measured(before), measured(after, "q8_0, simulated"))], same_source=True)
    assert [(change.what, change.note) for change in crossed] == [
        ("long text", "only A was measured"), ("long text @ q8_0, simulated", "only B was measured"),
    ]  # fmt: skip
    with pytest.raises(QtoolError, match="long text: other texts"):
        compare([("awq", measured(before), measured(after, digest="e"))], same_source=True)
    apart = compare([("awq", measured(before), measured(after))], same_source=False)
    assert [(change.what, change.shown) for change in apart][2] == ("perplexity at 2K-4K", "worse")
    short = [*before[:8], *(kl + 0.1 for kl in before[8:16])]
    few = compare([("awq", measured(before[:16]), measured(short))], same_source=True)
    assert [change.shown for change in few] == ["not judged", "not judged", "worse"]  # of 4, 4 and 8 blocks
    broken = compare([("awq", measured(before), measured([*before[:31], math.nan]))], same_source=True)
    assert [(change.shown, change.note) for change in broken][2] == ("worse", "not a number in B")


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"max_kld": 1, "long": {"bucket": "64K-128K"}}, "the long text has 0-256, 256-512, 512-1K"),
        ({"max_kld": 1, "long": {"cache": "q4_0"}}, "a gate is about q4_0, and `conditions:` has q8_0"),
        ({"max_drop": 1, "long": {}}, "`long:` of a gate goes with `max_kld:`"),
    ],
)
def test_a_gate_about_what_is_not_measured_is_refused(
    gate: dict[str, Any], said: str, write_recipe: Callable[..., Path], model: Path, repository: Path
) -> None:
    asked = {"long": {"text": str(repository), "length": LENGTH}, "conditions": [{"cache": "q8_0"}]}
    path = write_recipe(model=str(model), evaluate=asked, gates=[gate])
    with pytest.raises(QtoolError, match=re.escape(said)):
        load_recipe(path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"long": {"text": "heldout-code", "length": 4096}}, r"4,096 tokens are more than the 1,024 .*`length: 1024`"),
        ({"long": {"text": "heldout-code"}, "engine": "llama.cpp"}, "read layer by layer, which engine llama.cpp does"),
        (
            {"conditions": [{"cache": "q8_0"}], "tasks": TASKS, "engine": "vllm"},
            "engine vllm keeps no cache of q8_0; it has fp8",
        ),
        (
            {"conditions": [{"window": {}}], "tasks": TASKS, "engine": "llama.cpp"},
            "llama.cpp rolls no window; take engine reference",
        ),
        ({"conditions": [{"cache": "q8_0"}]}, "put `long:` and `tasks:` again, and neither is there"),
        (
            {"conditions": [{"window": {"sink": 4, "recent": 1020}}], "tasks": TASKS},
            r"window 4\+1020 keeps all of the 1,024 tokens .* smaller `recent:`",
        ),
        (
            {"conditions": [{"window": {"sink": 4, "recent": 508}}], "long": {"text": "heldout-code", "length": 512}},
            r"window 4\+508 keeps 512 tokens and would let go of nothing: the long text has 512. Take a smaller",
        ),
        (
            {
                "conditions": [{"cache": "fp8", "window": {"recent": 900}}],
                "max_new_tokens": 64,
                "tasks": [{"task": "long-call", "made": {"lengths": [512, 560], "look_alikes": 0}}],
            },
            r"fp8 window 4\+900 keeps 904 tokens and would let go of nothing: long-call has at most 880",
        ),
        (
            {"tasks": [{"task": "long-call", "made": {"lengths": [512, 900]}}], "max_new_tokens": 64},
            r"long-call: a prompt of 900 tokens, 256 .* answer of 64 .* context, 1,024 .*; `lengths:` up to 704 fit",
        ),
        ({"long": {"text": "SHORT", "length": 1000}}, r"tokens of this model; 1,000 are asked for. Set `length: \d+`"),
        ({"long": {"text": "heldout-code", "length": 385}}, "length: 385 leaves one token to its last block of 128"),
        (
            {"tasks": [{"task": "long-call", "made": {"lengths": [600, 512]}}], "max_new_tokens": 64},
            "made: a length of 512 tokens is too short for 6 look-alikes",
        ),
        ({"text": {"text": "heldout-code", "length": 2048}}, "text: windows of 2048 tokens are longer than"),
        ({"conditions": [{}]}, "names a `cache:`, a `window:` or both"),
        ({"conditions": [{"cache": "fp8"}, {"cache": "fp8"}], "tasks": TASKS}, "says fp8 twice"),
    ],
)
def test_what_cannot_be_is_refused_before_work(
    asked: dict[str, Any], said: str, write_recipe: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.py").write_text("def f(x):\n    return x\n" * 9)
    asked = {key: value | {"text": str(tmp_path / "short.py")} if value == {"text": "SHORT", "length": 1000} else value
             for key, value in asked.items()}  # fmt: skip
    path = write_recipe(model=str(model), evaluate=asked)
    with pytest.raises(QtoolError, match=said) as error:
        run(path, tmp_path / "runs", device="cpu")
    assert not (tmp_path / "artifacts").exists()
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run", "--device", "cpu"])
    assert (result.exit_code, result.output.splitlines()[-1]) == (2, f"Error: {error.value.message}".splitlines()[-1])


def test_a_window_that_holds_a_part_is_said_and_what_it_measures_is_measured(
    write_recipe: Callable[..., Path], model: Path, repository: Path, tmp_path: Path
) -> None:
    """The long text rolls, the shipped task does not; `--dry-run` knows no prompt of a task that is not made."""
    long, window = {"text": str(repository), "length": LENGTH}, [{"window": {"sink": 4, "recent": 900}}]
    asked = {"long": long, "conditions": window, "tasks": TASKS, "max_new_tokens": 8}
    section = EvaluateSection.model_validate(asked)
    prompts = {"handwritten": ["def f():", "def f(x):\n    return"]}
    tokenizer = load_tokenizer(model)
    most = max(len(tokenizer(prompt).input_ids) for prompt in prompts["handwritten"]) + 8
    said = f"conditions: window 4+900 keeps 904 tokens: it costs nothing where handwritten has at most {most}"
    assert kept_whole(section, prompts, tokenizer) == [said]
    assert kept_whole(section) == []
    assert kept_whole(section.model_copy(update={"long": None}), prompts, tokenizer) == [said]
    long["length"] = 904
    path = write_recipe(model=str(model), evaluate=asked)
    result = CliRunner().invoke(main, ["run", str(path), "--dry-run", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "keeps 904 tokens: it costs nothing where the long text has 904" in result.output


def test_no_length_is_named_that_would_be_refused(model: Path, tmp_path: Path) -> None:
    """A text of whole blocks and one token is named without it, and so are a context and what memory holds."""
    tokenizer, text = load_tokenizer(model), tmp_path / "text.py"
    start = int(tokenizer("x").input_ids[0] == tokenizer.bos_token_id)
    lines = (("x = 1\n" * n + "y" * m) for n in range(40, 400) for m in range(3))

    def size(said: str) -> int:
        return start + len(tokenizer(said + "\n\n", add_special_tokens=False).input_ids)

    text.write_text(next(said for said in lines if size(said) % 128 == 1))
    there = size(text.read_text())
    with pytest.raises(QtoolError, match=rf"has {there:,} tokens .* Set `length: {there - 1}` or less"):
        text_of(LongSection(text=str(text), length=4096), None, tokenizer)
    config = json.loads((model / "config.json").read_text())
    shape = shape_of(config | {"max_position_embeddings": 385})
    asked = EvaluateSection.model_validate({"long": {"text": str(text), "length": 512}})
    with pytest.raises(QtoolError, match="Set `length: 384` or less"):
        require_possible(asked, shape)
    with pytest.raises(QtoolError, match="`length: 512` fits"):
        require_memory(shape, 1026, 4, peak_bytes(shape, 513, 513, 4))


def test_blocks_that_do_not_divide_heads_are_refused(
    model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model_maker(tmp_path / "model", head_dim=16)
    long = {"text": "heldout-code", "length": 128}
    path = write_recipe(model=str(folder), evaluate={"long": long, "conditions": [{"cache": "q4_0"}]})
    with pytest.raises(QtoolError, match="heads of 16 do not divide into blocks of 32; bf16, f16, fp8 are kept"):
        run(path, tmp_path / "runs", device="cpu")


def test_the_plan_knows_bytes_of_every_condition(
    write_recipe: Callable[..., Path], model: Path, repository: Path
) -> None:
    conditions = [{"cache": "q8_0"}, {"window": {"recent": 124}}]
    path = recipe_for(write_recipe, model, repository, conditions=conditions)
    result = CliRunner().invoke(main, ["plan", str(path), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    numbers = 2 * 2 * 64
    assert told["caches"] == {
        "own": LENGTH * numbers * 2, "q8_0": LENGTH * numbers * 34 // 32, "window 4+124": 128 * numbers * 2
    }  # fmt: skip
    assert told["long"][0] == LENGTH
    shown = CliRunner().invoke(main, ["plan", str(path)]).output
    assert "long text: 1,024 tokens a layer at a time" in shown
    assert "cache, window 4+124: 0.000 GB a sequence" in shown


def test_without_a_recipe(model: Path, repository: Path, tmp_path: Path) -> None:
    """A folder alone is its own source; a window that is none is refused."""
    words = ["evaluate", str(model), "--long", str(repository), "--long-length", "512", "--device", "cpu"]
    result = CliRunner().invoke(main, [*words, "--condition", "4+100", "--runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Along a long text" in result.output
    assert "window 4+100" in result.output
    wrong = CliRunner().invoke(main, [*words, "--condition", "4+x", "--runs", str(tmp_path)])
    assert (wrong.exit_code, "a window such as 4+4096" in wrong.output) == (2, True)
