"""Several processes make artifacts together: the same bytes as one, the same words, and none is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from moe_models import MIXTURES
from ranked import CREWS, NUMBERS
from safetensors.torch import load_file, save_file
from small_models import TEXT, make_model

from qtool import QtoolError
from qtool.cli import cards, main
from qtool.cli.cards import LAUNCHED
from qtool.make.needs import needs_of
from qtool.make.output import owners_of
from qtool.make.seat import ONE, Seat
from qtool.preparing import prepare
from qtool.quantize.memory import peak_bytes
from qtool.quantize.methods.awq import AwqMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.nf4 import Nf4Method
from qtool.quantize.ranks import ALONE, Home, Ranks, dealt_out
from qtool.quantize.statistics import InputStatistics
from qtool.run import run
from qtool.runs.record import load_run

HERE = Path(__file__).parent
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens at now."""
    with ExitStack() as held:
        found = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def damaged(model: Path, folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A copy of a model with one tensor changed."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: change(tensors[name])}, path, {"format": "pt"})


def not_a_number(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] = float("nan")
    return tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which ranked.py has done all its cases."""
    folder = tmp_path_factory.mktemp("ranks")
    dense = make_model(folder / "dense")
    make_model(folder / "experts", "Qwen2Moe", **MIXTURES["Qwen2Moe"])
    damaged(dense, folder / "nan", "model.layers.1.mlp.up_proj.weight", not_a_number)
    damaged(dense, folder / "loud", "model.layers.0.post_attention_layernorm.weight", lambda tensor: tensor * 1e5)
    (folder / "ports.json").write_text(json.dumps(free_ports(60)))
    environment = os.environ | QUIET | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(HERE / "ranked.py"), str(folder)]
    running = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    try:
        for one in running:
            _, said = one.communicate(timeout=600)
            assert one.returncode == 0, said[-3000:]
    finally:
        for one in running:
            one.kill()
    return folder


def sums(folder: Path) -> dict[str, str]:
    """File -> sha256 of every artifact."""
    files = sorted(path for path in (folder / "artifacts").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def said(folder: Path, case: str, number: int) -> set[str]:
    """What the ranks raised."""
    return {json.loads(path.read_text()) for path in folder.glob(f"said-{case}-{number}-*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense", "experts", "fewer"])
def test_bytes_do_not_depend_on_the_number_of_ranks(made: Path, case: str) -> None:
    """Every file of every artifact, the manifest among them. `fewer`: two batches for three ranks."""
    numbers = (3,) if case == "fewer" else (2, 3)
    assert set().union(*(said(made, case, number) for number in (1, *numbers))) == {""}
    alone = sums(made / f"{case}-1")
    assert sum(name.endswith("qtool.json") for name in alone) == {"dense": 7, "experts": 4, "fewer": 2}[case]
    assert any(name.endswith(".safetensors") for name in alone)
    for number in numbers:
        assert sums(made / f"{case}-{number}") == alone


@pytest.mark.slow
@pytest.mark.parametrize("case", CREWS)
def test_bytes_do_not_depend_on_who_helps(made: Path, case: str) -> None:
    """Ranks without an output of their own round with an owner: pieces of rows, candidates of a search, figures of a
    record. `pairs`: two crews of two side by side."""
    numbers = NUMBERS[case]
    assert set().union(*(said(made, case, number) for number in numbers)) == {""}
    alone = sums(made / f"{case}-1")
    assert sum(name.endswith("qtool.json") for name in alone) == len(CREWS[case])
    for number in numbers:
        assert sums(made / f"{case}-{number}") == alone


@pytest.mark.slow
def test_another_crew_goes_on(made: Path) -> None:
    """Begun by four ranks, finished by two."""
    assert said(made, "rejoined", 4) == {"stopped"}
    assert said(made, "rejoined", 2) == {""}
    assert sums(made / "rejoined") == sums(made / "awq-1") != {}


@pytest.mark.slow
def test_what_one_number_of_ranks_began_another_finishes(made: Path) -> None:
    assert said(made, "resumed", 2) == {"stopped"}
    assert said(made, "resumed", 3) == {""}
    alone = {name: value for name, value in sums(made / "dense-1").items() if "-awq/" in name or "-gptq/" in name}
    assert sums(made / "resumed") == alone != {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"), [("nan", "layers.1.mlp.up_proj.weight: the source weight holds NaN"), ("loud", "float16 holds")]
)
def test_all_ranks_refuse_in_the_same_words(made: Path, case: str, words: str) -> None:
    """`loud`: an output of another rank than the first's cannot hold what batches of all ranks show."""
    alone = said(made, case, 1)
    (message,) = alone
    assert words in message
    assert said(made, case, 3) == alone


# ---- as commands


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Four layers: long enough to be met in the middle."""
    make_model(tmp_path / "model", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(TEXT)
    asked: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "calibration": {"text": str(tmp_path / "text.txt"), "samples": 24, "length": 256},
        "outputs": [{"method": "awq", "group_size": 32}, {"method": "gptq", "group_size": 32}],
        "output_dir": str(tmp_path / "artifacts"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asked))
    return path


def ranks_of(started: int) -> dict[str, int]:
    """Rank -> process, of those that were started with this number in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        told = dict(word.decode().split("=", 1) for word in words if b"=" in word)
        if told.get("TEST_STARTED") == str(started) and LAUNCHED in told:
            found[told["RANK"]] = int(folder.name)
    return found


def begun(folder: Path) -> Iterator[int]:
    """How many layers each unfinished output has noted."""
    for path in folder.glob("artifacts/*.partial/*journal.jsonl"):
        yield path.read_text().count("\n") - 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_stops_all_and_another_number_goes_on(recipe: Path) -> None:
    """Within seconds, in one line, with no process left; torchrun, with three, ends in the bytes of one alone."""
    folder, mark = recipe.parent, os.getpid()
    environment = os.environ | QUIET | {"TEST_STARTED": str(mark)}
    (folder / "alone.yaml").write_text(recipe.read_text().replace("/artifacts", "/alone/artifacts"))
    start = "import os, sys; from qtool.cli.cards import launch; sys.exit(launch(sys.argv[1:], 2, os.environ))"
    words = ["run", str(recipe), "--device", "cpu", "--runs", str(folder / "runs")]
    running = subprocess.Popen(
        [sys.executable, "-c", start, *words], env=environment, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    end = time.monotonic() + 120
    while min([*begun(folder), 0, 0][:2]) < 1:  # both outputs
        assert time.monotonic() < end
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.02)
    killed = time.monotonic()
    os.kill(ranks_of(mark)["1"], signal.SIGKILL)
    _, words_said = running.communicate(timeout=60)
    assert time.monotonic() - killed < 15
    assert running.returncode == 3
    lines = [line for line in words_said.splitlines() if line.startswith("Error:")]
    assert lines == [
        "Error: rank 1 of 2: was ended by SIGKILL. The other ranks were ended. Run the same command again: it "
        "continues after the last finished layer."
    ]
    assert "Traceback" not in words_said
    assert ranks_of(mark) == {}
    assert not list((folder / "artifacts").glob("*/qtool.json"))

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "qtool", *words]
    torchrun[3:3] = ["--master-addr", "127.0.0.1", "--master-port", str(free_ports(1)[0])]
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "quantizing layers: 0 of 3" not in done.stderr  # went on
    assert done.stdout.count("awq: verified") == 1  # rank 0 alone speaks
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(folder / "alone.yaml", folder / "runs", "cpu")
    finally:
        torch.set_num_threads(before)
    assert sums(folder) == sums(folder / "alone") != {}


@pytest.mark.slow
def test_models_are_scored_side_by_side(tmp_path: Path) -> None:
    """Two ranks score what one would, the same to the digit; each asks its own models alone, of the source's
    distribution that rank 0 made first."""
    asked: dict[str, Any] = {
        "model": "qtool-demo",
        "calibration": {"text": "qtool-code", "samples": 8, "length": 128},
        "outputs": [{"method": "awq"}, {"method": "nf4", "rounding": "absmax"}, {"method": "gptq", "descent": False}],
        "evaluate": {
            "tasks": [{"task": "heldout", "limit": 6}], "max_new_tokens": 48,
            "text": {"text": "heldout-code", "samples": 4, "length": 64},
        },
    }  # fmt: skip
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(asked | {"output_dir": str(tmp_path / name)}))
    start = "import os, sys; from qtool.cli.cards import launch; sys.exit(launch(sys.argv[1:], 2, os.environ))"
    words = ["run", str(tmp_path / "two.yaml"), "--device", "cpu", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-c", start, *words, "--profile", str(tmp_path / "trace.json")],
        env=os.environ | QUIET, capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    spans = [span for span in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if "dur" in span]
    here = {(span["name"], span["args"]["detail"]) for span in spans if span["name"] in ("fidelity", "tasks")}
    assert here == {
        (kind, name + rest) for name in ("source", "nf4") for kind, rest in (("fidelity", ""), ("tasks", ": heldout"))
    }
    two = load_run(next(path.parent for path in (tmp_path / "runs").glob("*/result.json")))
    assert {"source", "awq", "nf4", "gptq"} == set(two.summary.models)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = run(tmp_path / "one.yaml", tmp_path / "apart", "cpu")
    finally:
        torch.set_num_threads(before)
    assert one is not None
    for name, model in one.summary.models.items():
        other = two.summary.models[name]
        assert (model.tasks, model.text) == (other.tasks, other.text), name


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_gpus_are_cards(recipe: Path, device: str) -> None:
    result = CliRunner().invoke(main, ["run", str(recipe), "--gpus", "2", "--device", device])
    assert result.exit_code == 2
    assert f"--gpus 2 --device {device}: --gpus takes the cards cuda:0 to cuda:1" in result.output


def test_gpus_inside_torchrun(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["run", str(recipe), "--gpus", "2"])
    assert result.exit_code == 2
    assert "torchrun has started several processes already" in result.output


@pytest.mark.slow
def test_more_cards_than_there_are(recipe: Path) -> None:
    """Said once, before any work. As torch sees none on this machine, or fewer."""
    number = (torch.cuda.device_count() if torch.cuda.is_available() else 0) + 2
    words = ["run", str(recipe), "--gpus", str(number), "--runs", str(recipe.parent / "runs")]
    environment = os.environ | QUIET
    done = subprocess.run(
        [sys.executable, "-m", "qtool", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stderr.count(f"{number} ranks take a card each, and torch sees") == 1
    assert not (recipe.parent / "runs").exists()
    assert not (recipe.parent / "artifacts").exists()


def test_the_plan_says_what_a_card_takes(recipe: Path) -> None:
    refused = CliRunner().invoke(main, ["run", str(recipe), "--dry-run", "--gpus", "4"])
    assert (refused.exit_code, "4 ranks take a card each" in refused.output) == (3, True)
    job = prepare(recipe, "cpu")
    assert needs_of(job).host_bytes < needs_of(job, cards=4).host_bytes  # each has its own libraries


# ---- what the starter makes of it


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        # a fault of one rank alone, while the others wait for it
        (
            "1) echo 'Error: rank 1 of 3: disk full.' >&2; exit 3;; *) sleep 60;;",
            3,
            "rank 1 of 3: disk full. The other",
        ),
        # what all refuse: rank 0 has said it
        ("0) sleep .2; echo 'Error: no' >&2; exit 2;; *) exit 2;;", 2, "no"),
        # those that lost another say nothing
        ("2) kill -9 $$;; *) sleep .1; exit 70;;", 3, "rank 2 of 3: was ended by SIGKILL. The other ranks were ended."),
        (
            "0) kill -9 $$;; *) echo 'Error: rank: gone' >&2; sleep .2; exit 3;;",
            3,
            "rank 0 of 3: was ended by SIGKILL.",
        ),
        ("0) exit 70;; 1) echo Warning; exit 1;; *) exit 0;;", 3, "rank 1 of 3: ended with exit code 1."),
        ("0) sleep .1; exit 1;; *) exit 0;;", 1, ""),  # a gate failed, long after the others left
        ("*) exit 0;;", 0, ""),
    ],
)
def test_one_line_tells_what_began_it(
    script: str,
    code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ncase $RANK in {script} esac\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setattr(cards, "GRACE", 0.5)
    begun = time.monotonic()
    assert cards.launch(["run"], 3, os.environ) == code
    assert time.monotonic() - begun < 10
    told = capfd.readouterr().err
    assert told.count("Error: ") == bool(line)
    assert f"Error: {line}" in told or not line


# ---- the parts


def test_a_seat_is_what_torchrun_says() -> None:
    """One process, or what only looks like a group, walks alone; several machines are refused."""
    told = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert Seat.of(told | {"LOCAL_WORLD_SIZE": "4"}) == Seat(1, 4)
    assert Seat.of({}) == Seat.of({"RANK": "1", "WORLD_SIZE": "4"}) == Seat.of(told | {"WORLD_SIZE": "1"}) == ONE
    with pytest.raises(QtoolError, match="one machine"):
        Seat.of(told | {"LOCAL_WORLD_SIZE": "2"})


def test_outputs_are_dealt_by_cost() -> None:
    """The longest first, each to the rank that has least; equal ones in their order."""
    assert dealt_out([1, 6, 8, 6, 4], 2) == [0, 1, 0, 1, 0]
    assert dealt_out([6, 6, 6], 2) == [0, 1, 0]
    assert dealt_out([6, 6], 4) == [0, 1]
    assert dealt_out([], 3) == []
    assert owners_of([], 2) == []


def test_sums_are_of_one_batch_after_the_other() -> None:
    """total += the product of one batch, which several ranks do alike: not a sum begun with the total."""
    stats = InputStatistics()
    parts = [torch.randn(64, 40) * 1000**number for number in range(3)]
    expected = torch.zeros(40, 40)
    for part in parts:
        stats.add(part)
        expected += part.t() @ part
    stats.finish()
    assert torch.equal(stats.gram.triu(), expected.triu())
    assert stats.tokens == 192


def test_a_rank_without_a_batch_adds_nothing() -> None:
    stats, same = InputStatistics(), InputStatistics()
    x = torch.randn(8, 16)
    for one in (stats, same):
        one.add(x, x + 1)
    stats.add(x[:0], x[:0])
    for name in ("gram", "drift", "absmax"):
        assert torch.equal(getattr(stats, name), getattr(same, name))


def test_alone_nothing_is_copied() -> None:
    tensor = torch.ones(3)
    assert Home().share({"a": tensor})["a"] is tensor
    assert Home().rows(tensor)[0] is tensor
    assert ALONE.tell("x") == ["x"]
    assert Ranks(1, 3).dealt(list(range(8))) == [1, 4, 7]
    assert Ranks(2, 3).rounds(8) == 3


def test_a_card_holds_its_part_of_the_text(tiny: Path) -> None:
    """Of the hidden states 1/N; of the statistics those of its own outputs; the layer of every stream beside."""
    from qtool.convert.files.checkpoint import Checkpoint
    from qtool.convert.files.config_file import read_config
    from qtool.convert.models.shape import decoder_of

    shapes = {name: info.shape for name, info in Checkpoint.open(tiny).tensors.items()}
    decoder = decoder_of(read_config(tiny))
    methods: list[Method] = [AwqMethod(method="awq"), GptqMethod(method="gptq"), Nf4Method(method="nf4")]
    tokens = 1 << 24
    alone = peak_bytes(decoder, shapes, methods, tokens, "cuda")
    four = peak_bytes(decoder, shapes, methods, tokens, "cuda", 0, 4, methods[:1])
    states = 2 * tokens * 128 * 4
    assert alone - four == pytest.approx(states * 3 / 4, rel=0.1)
    assert peak_bytes(decoder, shapes, methods, tokens, "cuda", 0, 1, methods) == alone
