"""The demo model, its training stream and the data that ship beside it."""

import gzip
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "pipeline/data/demo-model"
HELD_OUT_CODE = ROOT / "evaluate/data/heldout_code.jsonl"
CALIBRATION = ROOT / "quantize/data/calibration.jsonl"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for more: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The scripts, which are no package: their folder is on the path while they are loaded."""
    names = ("demo_programs", "demo_corpus", "demo_snippets", "demo_text_operations", "train_demo_model",
             "score_demo_model")  # fmt: skip
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    with gzip.open(ROOT / "evaluate/data/heldout.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def model() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(MODEL)


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- problems


def test_the_task_is_large_graded_and_in_humaneval_format(problems):
    assert len(problems) >= 1000
    assert {p["level"] for p in problems} == {1, 2, 3, 4, 5}
    assert len({p["prompt"] for p in problems}) == len({p["task_id"] for p in problems}) == len(problems)
    for number, problem in enumerate(problems):
        assert problem["task_id"] == f"heldout/{number}"
        assert problem["prompt"].startswith(f"def {problem['entry_point']}(")
        assert problem["prompt"].endswith('"""\n')
        assert problem["test"].startswith("def check(candidate):\n")
        assert problem["test"].count("assert candidate(") >= 5


def test_the_generator_still_writes_the_shipped_problems(scripts, problems):
    assert scripts["demo_corpus"].held_out_problems({1: 25}) == problems[:25]


def test_canonical_solutions_pass_and_empty_ones_do_not(problems):
    for problem in problems:
        namespace: dict = {}
        exec(problem["prompt"] + problem["canonical_solution"] + "\n" + problem["test"], namespace)
        namespace["check"](namespace[problem["entry_point"]])
        with pytest.raises(AssertionError):
            namespace["check"](lambda *values: None)


def test_asserts_include_edge_cases(problems):
    edges = {"list": "candidate([]", "str": 'candidate(""', "int": "candidate(0", "dict": "candidate({}"}
    for problem in problems:
        kind = problem["prompt"].split(": ", 1)[1]
        edge = next(edge for name, edge in edges.items() if kind.startswith(name))
        assert edge in problem["test"], problem["task_id"]


# ---------------------------------------------------------------- the split


def test_every_problem_has_a_held_out_composition(scripts, problems):
    operations = scripts["demo_text_operations"].BY_NAME
    for problem in problems:
        assert scripts["demo_programs"].is_held_out(tuple(problem["composition"]))
        assert all(name in operations for name in problem["composition"])


def test_training_programs_never_have_a_held_out_composition(scripts, problems):
    held_out = {tuple(p["composition"]) for p in problems}
    stream = scripts["demo_programs"].programs("train/0", held_out=False)
    drawn = {program.composition for program in itertools.islice(stream, 500)}
    assert len(drawn) > 400
    assert not drawn & held_out
    assert not any(scripts["demo_programs"].is_held_out(composition) for composition in drawn)


def test_training_stream_contains_no_prompt_and_no_solution_of_the_task(scripts, problems):
    forbidden = scripts["demo_corpus"].forbidden_texts(problems)
    stream = scripts["demo_programs"].training_texts("train/1", forbidden)
    text = "\n".join(itertools.islice(stream, 800))
    for problem in problems:
        assert problem["prompt"] not in text
        assert '\n    """\n' + problem["canonical_solution"] + "\n" not in text


def test_a_forbidden_program_is_left_out_of_the_stream(scripts):
    first = next(scripts["demo_programs"].programs("train/2", held_out=False))
    kept = next(scripts["demo_programs"].training_texts("train/2", frozenset({first.body})))
    assert kept != first.prompt + first.body
    assert next(scripts["demo_programs"].training_texts("train/2")) == first.prompt + first.body


def test_calibration_corpus_shares_nothing_with_the_held_out_data(problems):
    calibration = "\n".join(texts_of(CALIBRATION))
    for problem in problems:
        assert problem["prompt"] not in calibration
        assert '\n    """\n' + problem["canonical_solution"] + "\n" not in calibration
    for text in texts_of(HELD_OUT_CODE):
        assert text not in calibration
    assert 300_000 <= CALIBRATION.stat().st_size <= 500_000


def test_held_out_code_shares_no_prompt_with_the_task(problems):
    text = "\n".join(texts_of(HELD_OUT_CODE))
    assert not any(problem["prompt"] in text for problem in problems)


def test_operations_have_working_equivalent_expressions(scripts):
    """Two programs of one operation each, in every spelling, run and agree with the operation's reference."""
    programs = scripts["demo_programs"].programs("spellings", held_out=False, lengths={1: 1})
    seen = {program.composition for program in itertools.islice(programs, 600)}  # each is executed and compared
    assert len(seen) > 100


# ---------------------------------------------------------------- the shipped model


def test_shards_are_small_and_complete():
    index = json.loads((MODEL / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in MODEL.glob("*.safetensors"))
    assert len(shards) == 2
    total = 0
    for shard in shards:
        assert (MODEL / shard).stat().st_size <= 15 * 2**20
        with safe_open(MODEL / shard, framework="pt") as tensors:
            assert {n for n, s in index["weight_map"].items() if s == shard} == set(tensors.keys())
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(name)
                assert tensor.dtype == torch.bfloat16
                assert torch.isfinite(tensor).all()
                total += tensor.numel() * 2
    assert total == index["metadata"]["total_size"] <= 20_000_000


def test_dimensions_suit_every_format():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0
    assert config["head_dim"] == 64
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_prompt_tokens_do_not_change_when_the_answer_follows(tokenizer, problems):
    for problem in problems[::20]:
        prompt = tokenizer(problem["prompt"])["input_ids"]
        whole = tokenizer(problem["prompt"] + problem["canonical_solution"])["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole) == problem["prompt"] + problem["canonical_solution"]


def test_shipped_model_solves_what_its_card_says(scripts, model, tokenizer, problems):
    """90.2 % of 1200: of 40 such problems, fewer than 30 is a one-in-a-thousand accident."""
    chosen = problems[7::30]
    score = scripts["score_demo_model"]
    answers = score.complete(model, tokenizer, [p["prompt"] for p in chosen], batch=40)
    right = [
        score.passes((p["prompt"], answer, p["test"], p["entry_point"]))
        for p, answer in zip(chosen, answers, strict=True)
    ]
    assert len(chosen) == 40
    assert sum(right) >= 30


def test_rounding_is_the_textbook_one(scripts):
    weight = torch.tensor([[7.5, -7.5, 1.0, 0.4] + [0.0] * 124])
    rounded = scripts["score_demo_model"].round_to_nearest(weight, 4)
    assert rounded[0, :4].tolist() == [7.0, -8.0, 1.0, 0.0]  # scale 1; the codes are -8 to 7


def test_paired_test_against_a_known_value(scripts):
    before = [True] * 10
    after = [False] * 8 + [True] * 2
    assert scripts["score_demo_model"].paired_p(before, after) == (8, 0, 2 / 2**8)


# ---------------------------------------------------------------- training


@pytest.mark.slow
def test_smoke_training_resumes_to_the_same_bytes(scripts, tmp_path, capsys):
    """A run that was stopped and went on exports what an uninterrupted one exports, and that loads."""
    train = scripts["train_demo_model"].main
    smoke = ["--smoke", "--documents", "60", "--steps", "4"]
    assert train([*smoke, "--work", str(tmp_path / "a"), "--out", str(tmp_path / "one")]) == 0
    again = [*smoke, "--work", str(tmp_path / "b"), "--out", str(tmp_path / "two")]
    assert train([*again, "--minutes", "0"]) == 3
    assert not (tmp_path / "two").exists()
    capsys.readouterr()
    assert train(again) == 0
    assert "from step 2" in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "loss.svg"} < set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert trained.config.num_hidden_layers == 2
