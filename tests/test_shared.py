"""One long text over several ranks: what one computes alone, each its part, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from moe_models import MIXTURES
from safetensors.torch import load_file
from shared import CASES
from small_models import make_model
from test_ranks import QUIET, free_ports, ranks_of
from transformers import AutoModelForCausalLM

from qtool import QtoolError
from qtool.convert.models.shape import shape_of
from qtool.evaluate.engines.share import Share
from qtool.evaluate.engines.sweep_memory import peak_bytes, queries_of
from qtool.run import run
from qtool.runs.record import load_run

HERE = Path(__file__).parent
SLIDING = {"query_pre_attn_scalar": 32, "sliding_window": 64, "final_logit_softcapping": 4.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which shared.py has done all its cases."""
    folder = tmp_path_factory.mktemp("shared")
    make_model(folder / "dense", num_hidden_layers=3, max_position_embeddings=1024)
    make_model(folder / "sliding", "Gemma2", max_position_embeddings=1024, **SLIDING)
    make_model(folder / "experts", "Qwen3Moe", max_position_embeddings=1024, **MIXTURES["Qwen3Moe"])
    (folder / "ports.json").write_text(json.dumps(free_ports(3 * len(CASES) + 3)))
    environment = os.environ | QUIET | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(HERE / "shared.py"), str(folder)]
    running = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        for one in running:
            _, said = one.communicate(timeout=300)
            assert one.returncode == 0, said[-3000:]
    finally:
        for one in running:
            one.kill()
    return folder


def logits(folder: Path, case: str, number: int) -> torch.Tensor:
    """Of all positions, of which each rank gave its own, and no other did."""
    chunks: dict[int, torch.Tensor] = {}
    for rank in range(number):
        given = {int(start): part for start, part in load_file(folder / f"{case}-{number}-{rank}.safetensors").items()}
        assert not set(given) & set(chunks)
        assert abs(len(given) - len(load_file(folder / f"{case}-{number}-0.safetensors"))) <= 1
        chunks |= given
    return torch.cat([chunks[start] for start in sorted(chunks)])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [2, 3])
def test_ranks_find_what_one_finds(made: Path, case: str, number: int) -> None:
    """Full and sliding layers, experts, a simulated type, a window that rolls, both; a text of less than a chunk each.
    Where no chunk is cut the numbers are the same to the bit."""
    alone = logits(made, case, 1)
    assert len(alone) == CASES[case][1]
    found = logits(made, case, number)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    if case in ("plain", "q8_0", "window"):
        assert torch.equal(found, alone)


@pytest.mark.slow
@torch.inference_mode()
def test_ranks_find_what_transformers_finds(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "dense", dtype=torch.float32).eval()
    window = torch.randint(0, 320, (640,), generator=torch.Generator().manual_seed(2))
    expected = model(input_ids=window[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits(made, "plain", 3), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_other_ranks_go_on_behind_the_last_layer_of_all(made: Path) -> None:
    """Two read two layers of three and end; three read the last one."""
    assert [json.loads((made / f"read-3-{rank}.json").read_text()) for rank in range(3)] == [[2]] * 3
    assert torch.equal(logits(made, "resumed", 3), logits(made, "plain", 1))


@pytest.mark.parametrize(
    ("length", "number", "chunk"), [(768, 2, 96), (768, 4, 32), (1000, 3, 64), (7, 7, 1), (10, 4, 2)]
)
def test_every_position_is_one_ranks_and_work_is_even(length: int, number: int, chunk: int) -> None:
    shares = [Share(rank, number) for rank in range(number)]
    own = [share.own(length, chunk).tolist() for share in shares]
    assert Counter(at for part in own for at in part) == Counter(range(length))
    seen = [sum(at + 1 for at in part) for part in own]  # keys that its queries see
    alone = length % (2 * number * chunk)  # positions behind the last two steps that are whole
    assert max(seen) - min(seen) <= (chunk * (length + number * chunk) if alone else 0)
    heads = [
        [at for start in share.starts(length) for at in range(start, min(length, start + 512))] for share in shares
    ]
    assert Counter(at for part in heads for at in part) == Counter(range(length))


def test_a_text_of_fewer_tokens_than_ranks_is_refused() -> None:
    with pytest.raises(QtoolError, match="a text of 7 tokens cannot be divided among 8 ranks"):
        Share(0, 8).chunk(7, 1024)


def test_a_card_of_several_takes_less() -> None:
    """Of an 8B at 128K: its part of the hidden states, and keys and values of all."""
    shape = shape_of({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2**17,
    })  # fmt: skip
    chunk = queries_of(shape, 2**17)
    one, two, four = (peak_bytes(shape, 2**17, chunk, 2, ranks) for ranks in (1, 2, 4))
    assert four < two < one
    states = 2 * 2**17 * 4096
    assert one - two < states / 2


# ---- as commands

START = "import os, sys; from qtool.cli.cards import launch; sys.exit(launch(sys.argv[1:], 2, os.environ))"


def recipe_at(path: Path, model: Path, name: str, **evaluate: Any) -> Path:
    asked = {
        "model": str(model),
        "outputs": [{"method": "nf4", "rounding": "absmax"}],
        "output_dir": str(path / name),
        "evaluate": {"long": {"text": "heldout-code", "length": 2048}} | evaluate,
    }
    found = path / f"{name}.yaml"
    found.write_text(yaml.safe_dump(asked))
    return found


@pytest.mark.slow
def test_a_run_of_two_says_what_a_run_of_one_says(model_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Every number of every block, of source and artifact under every condition, and the source's distribution."""
    model = model_maker(tmp_path / "model", max_position_embeddings=4096, loudness=4.0)
    conditions = [{"cache": "q4_0"}, {"window": {"sink": 4, "recent": 300}}]
    words = ["run", str(recipe_at(tmp_path, model, "two", conditions=conditions)), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", START, *words, "--runs", str(tmp_path / "runs")],
        env=os.environ | QUIET, capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(recipe_at(tmp_path, model, "one", conditions=conditions), tmp_path / "apart", "cpu")
    finally:
        torch.set_num_threads(before)
    assert one is not None
    two = load_run(next(path.parent for path in (tmp_path / "runs").glob("*/result.json")))
    for name, found in one.scores.positions.items():
        for condition, score in found.items():
            other = two.scores.positions[name][condition]
            assert (score.kl, score.nll, score.top1) == (other.kl, other.nll, other.top1), (name, condition)
    folders = [next((tmp_path / runs / "references").iterdir()) for runs in ("apart", "runs")]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert len(files[0]) == 2048 // 512
    assert not list((tmp_path / "runs").glob("*/scores/*.states"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_dies_in_a_long_text_ends_all_with_its_name(
    model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """And the same command goes on."""
    model = model_maker(tmp_path / "model", num_hidden_layers=12, max_position_embeddings=4096)
    path = recipe_at(tmp_path, model, "two", long={"text": "heldout-code", "length": 4096})
    words = [sys.executable, "-c", START, "run", str(path), "--device", "cpu", "--runs", str(tmp_path / "runs")]
    mark = os.getpid()
    environment = os.environ | QUIET | {"TEST_STARTED": str(mark)}
    running = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert running.stderr is not None
    told = ""
    end = time.monotonic() + 120
    while "source: 4,096 tokens, layer by layer" not in told:
        assert time.monotonic() < end
        told = running.stderr.readline()
    os.kill(ranks_of(mark)["1"], signal.SIGKILL)
    killed = time.monotonic()
    _, said = running.communicate(timeout=60)
    assert time.monotonic() - killed < 15
    assert running.returncode == 3
    assert [line for line in said.splitlines() if line.startswith("Error:")] == [
        "Error: rank 1 of 2: was ended by SIGKILL. The other ranks were ended. Run the same command again: it "
        "continues after the last finished layer."
    ]
    assert ranks_of(mark) == {}
    assert not list((tmp_path / "runs").glob("*/scores/positions-*.json"))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
