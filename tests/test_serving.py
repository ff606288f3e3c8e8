"""`qtool serve` and `qtool prove` against a small server with planted faults; nothing is left running afterwards."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from click.testing import CliRunner, Result
from small_models import converted

from qtool import QtoolError
from qtool.cli import main
from qtool.convert.artifact import Artifact
from qtool.convert.files.manifest import read_manifest
from qtool.convert.files.proof import Finding, Outcome, Proof, replaced
from qtool.evaluate.engines.facts import Launch, Serving
from qtool.evaluate.engines.table import SERVERS
from qtool.evaluate.sandbox.secrets import hidden
from qtool.recipe.judging import GateSection
from qtool.report.served import finding_rows, proof_line, proof_rows
from qtool.runs.gates import judge
from qtool.runs.summary import ModelSummary, Summary
from qtool.serve import process
from qtool.serve.parity import compare, divergence, eight_bits, prompts
from qtool.serve.programs import require_program, with_program
from qtool.sizing.accelerators import Accelerator, load_accelerators
from qtool.sizing.fit import Setting
from qtool.sizing.formats import artifact_weights
from qtool.sizing.headers import read_headers
from qtool.sizing.serving import PlannedServer, Wish, block_bytes, plan_server
from qtool.sizing.sharing import chunked_prefill, shared_prefix

FAKE = Path(__file__).parent / "fake_engine.py"
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.path }})"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MACHINE = Accelerator("cpu", "a processor", 8 * 2**30, 1e12, 1e13, None, "cpu", None, {})


@pytest.fixture(scope="module")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AWQ artifact with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("served")
    model = shutil.copytree(tiny, folder / "tiny")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return Path(converted(model, [{"method": "awq", "group_size": 32}], folder)["awq"])


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`vllm` on PATH is the fake; no process of it may outlive the test."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(FAKE)])} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("QTOOL_VLLM_PYTHON", raising=False)
    yield
    assert running() == []


def running() -> list[str]:
    """Command lines of fakes."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(FAKE) in words:
            lines.append(" ".join(words))
    return lines


def alive(pid: int) -> bool:
    """Whether the process is there and not merely not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(child: Path, within: float = 20.0) -> bool:
    """Whether the process whose number ``child`` holds ends; a machine at work takes its time to reap it."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if child.exists() and child.read_text() and not alive(int(child.read_text())):
            return True
        time.sleep(0.05)
    return False


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(main, [str(argument) for argument in arguments])


def free() -> int:
    return process.free_port()


def one_line(result: Result) -> str:
    """The error: one line that says it, then at most what the server said."""
    (said,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return said


# --- the command ---


def test_a_dry_run_is_the_planned_command(artifact: Path) -> None:
    result = call("serve", artifact, "--card", "H100", "--gpus", 2, "--context", 128, "--users", 3, "--dry-run")
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout)
    assert words[:3] == ["vllm", "serve", str(artifact)]
    for flag, value in {
        "--max-model-len": "128", "--max-num-seqs": "3", "--dtype": "float16", "--tensor-parallel-size": "2",
        "--max-num-batched-tokens": "8192", "--gpu-memory-utilization": "0.92", "--host": "127.0.0.1",
    }.items():  # fmt: skip
        assert words[words.index(flag) + 1] == value, flag
    assert {"--enable-prefix-caching", "--enable-chunked-prefill"} <= set(words)
    assert "vllm is not installed here: pip install vllm" in result.stderr


def test_a_processor_is_told_the_bytes_of_its_cache(artifact: Path) -> None:
    plan = planned(artifact, context=200, users=3)
    # 2 blocks of 128 tokens for each of 3 users, and the block that vLLM keeps for itself; 2 layers x 2 heads x 32 x 2
    assert (plan.blocks, plan.token_bytes) == (7, 512)
    words = plan.launch.words
    assert words[words.index("--kv-cache-memory-bytes") + 1] == str(7 * 128 * 512)
    assert "--gpu-memory-utilization" not in words


@pytest.mark.usefixtures("fake")
def test_the_printed_line_can_be_pasted(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    folder.symlink_to(artifact)
    port = free()
    result = call("serve", folder, "--card", "cpu", "--port", port, "--dry-run")
    assert len(result.stdout.splitlines()) == 1
    with subprocess.Popen(["sh", "-c", f"exec {result.stdout}"], stdout=subprocess.DEVNULL) as shell:
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.1)
            else:
                raise AssertionError("nobody answers")
        finally:
            shell.kill()


@pytest.mark.parametrize(("engine", "begins"), [("sglang", "python3 -m sglang.launch_server --model-path")])
def test_what_was_not_run_says_so(artifact: Path, engine: str, begins: str) -> None:
    result = call("serve", artifact, "--engine", engine, "--card", "H100", "--dry-run")
    assert result.stdout.startswith(begins)
    assert "not run: SGLang's flags are those that it documents" in result.stderr
    refused = call("prove", artifact, "--engine", engine)
    assert refused.exit_code == 2


def test_ollama_is_told_by_variables() -> None:
    launch = SERVERS["ollama"].launch
    assert launch is not None
    gguf = {"place": "a/m", "file": Path("a/m/m.gguf"), "name": "M", "cache_type": "q8_0", "context": 512}
    made = launch(serving(**gguf))
    assert made.text.startswith("OLLAMA_HOST=127.0.0.1:8000 OLLAMA_CONTEXT_LENGTH=512 OLLAMA_NUM_PARALLEL=2 ")
    assert made.text.endswith("ollama create m -f a/m/Modelfile; wait")


def serving(**changes: object) -> Serving:
    given: dict[str, object] = {
        "revision": None, "default_file": "", "config": {}, "sequences": 2, "cards": 1, "offload": "",
    }  # fmt: skip
    return Serving(**(given | changes))  # type: ignore[arg-type]


def test_a_missing_engine_names_its_install_line(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("QTOOL_VLLM_PYTHON", raising=False)
    result = call("serve", artifact, "--card", "cpu")
    assert result.exit_code == 3
    assert "engine vllm is not installed here. Run: pip install vllm" in one_line(result)
    assert "QTOOL_VLLM_PYTHON" in one_line(result)
    other = call("serve", artifact, "--card", "cpu", "--python", sys.executable)
    assert (other.exit_code, "has no vllm. Run there: pip install vllm" in one_line(other)) == (3, True)
    never = call("serve", artifact, "--patience", "nan")
    assert (never.exit_code, "nan is no finite number" in one_line(never)) == (2, True)
    nowhere = call("serve", artifact, "--card", "cpu", "--python", "nowhere/python")
    assert (nowhere.exit_code, "nowhere/python: no Python is there" in one_line(nowhere)) == (2, True)


def test_programs_stand_where_planned_words_do() -> None:
    assert with_program(("vllm", "serve", "m"), ("/x/python", "-m", "v")) == ("/x/python", "-m", "v", "serve", "m")
    assert with_program(("python3", "-m", "sglang", "--a"), ("/p", "-m", "s")) == ("/p", "-m", "s", "--a")
    assert with_program(("llama-server", "-m", "f.gguf"), ("l",)) == ("l", "-m", "f.gguf")  # its -m is a file
    assert Launch(("a", "b c"), {"X": "1 2"}).text == "X='1 2' a 'b c'"
    assert require_program(SERVERS["llama.cpp"])[-1].endswith(("llama-server", "qtool.evaluate.engines.llama_server"))


# --- faults: one clear line each, and nothing left running (the fixture looks) ---


@pytest.mark.usefixtures("fake")
def test_a_port_in_use(artifact: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = call("serve", artifact, "--card", "cpu", "--port", port)
    assert result.exit_code == 3
    assert f"port {port} on 127.0.0.1 is in use" in one_line(result)


def test_a_model_too_large(artifact: Path, tmp_path: Path) -> None:
    cards = load_accelerators()
    small = Accelerator("small", "small", 2**30, 1e12, 1e13, None, "9.0", 1e10, {})
    with pytest.raises(QtoolError, match=r"too large for 1 x small: 4 users of 64 tokens need 0\.99 GiB") as fault:
        plan_server(read_headers(str(artifact)), Wish(small))
    assert fault.value.exit_code == 3
    plan_server(read_headers(str(artifact)), Wish(cards["H100"]))
    with pytest.raises(QtoolError, match="was made for 256 tokens"):
        plan_server(read_headers(str(artifact)), Wish(cards["H100"], context=257))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("dies", "vllm: the server ended by itself (code 5) after 0 s. It said last:"),
        ("never listens", "vllm: the server did not answer at http://127.0.0.1:"),
        ("silent", "vllm: the server did not answer at http://127.0.0.1:"),
        ("garbage", "vllm: the server does not complete a prompt: http"),
        ("other shape", "answers something else than it should (IndexError"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_faults_at_the_start(
    artifact: Path, fault: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QTOOL_FAKE", fault)
    monkeypatch.setenv("HF_TOKEN", "hf_environment99")
    monkeypatch.setenv("QTOOL_FAKE_CHILD", str(tmp_path / "child"))
    monkeypatch.setattr(process, "GRACE", 1.0)
    patience = 5 if fault in ("never listens", "silent") else 60
    result = call("serve", artifact, "--card", "cpu", "--port", free(), "--patience", patience, "--quiet")
    assert result.exit_code == 3, result.output
    assert said in re.sub(r"after \d+ s", "after 0 s", one_line(result))
    assert "hf_" not in result.output
    if fault == "dies":
        assert "  | ValueError: no room for the cache; key ***" in result.output
        assert "the environment holds no token" in result.output
    else:  # its child, which ignores SIGTERM, is gone as well
        assert gone(tmp_path / "child")


def served(artifact: Path, tmp_path: Path, **environment: str) -> tuple[subprocess.Popen[str], int]:
    """`qtool serve` in front, once it has answered."""
    port = free()
    words = [sys.executable, "-m", "qtool", "serve", str(artifact), "--card", "cpu", "--port", str(port)]
    front = subprocess.Popen(
        words, text=True, stderr=subprocess.PIPE, env=os.environ | environment, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert front.stderr is not None
    for line in front.stderr:
        if "Ctrl-C ends it" in line:
            return front, port
    raise AssertionError("it did not start")


@pytest.mark.slow
@pytest.mark.usefixtures("fake")
def test_ctrl_c_ends_the_whole_group(artifact: Path, tmp_path: Path) -> None:
    child = tmp_path / "child"
    front, port = served(artifact, tmp_path, QTOOL_FAKE_CHILD=str(child))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/version", timeout=5) as answer:
        assert json.load(answer) == {"version": "9.9"}
    front.send_signal(signal.SIGINT)
    _, said = front.communicate(timeout=60)
    assert front.returncode == 130
    assert "The server and all its processes have ended." in said
    assert gone(child)


@pytest.mark.slow
@pytest.mark.usefixtures("fake")
def test_an_engine_that_dies_in_the_middle(artifact: Path, tmp_path: Path) -> None:
    front, port = served(artifact, tmp_path, QTOOL_FAKE="dies later")
    body = json.dumps({"prompt": [1], "max_tokens": 1}).encode()
    for _ in range(3):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", body, timeout=5).close()
        except OSError:
            break
    _, said = front.communicate(timeout=60)
    assert front.returncode == 3
    assert "Error: vllm: the server ended by itself (code 9) after" in said
    assert "  | RuntimeError: Worker died with ***" in said


def test_secrets_of_logs_are_hidden() -> None:
    told = hidden("key sk-abcdefgh1234 and swordfish, s3 x", {"MY_TOKEN": "swordfish", "A_KEY": "s3", "HOME": "key"})
    assert told == "key *** and ***, s3 x"


# --- the proof ---


def planned(artifact: Path, **wish: int) -> PlannedServer:
    return plan_server(read_headers(str(artifact)), Wish(MACHINE, **wish))  # type: ignore[arg-type]


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64 take seconds; these are as telling here."""
    few = prompts()[60:]
    monkeypatch.setattr("qtool.serve.parity.prompts", lambda: few)


def findings(result: Result) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(result.stdout)["findings"]}


@pytest.mark.slow
@pytest.mark.usefixtures("fake", "few_prompts")
def test_a_proof(artifact: Path) -> None:
    result = call("prove", artifact, "--engine", "vllm", "--card", "cpu", "--chunk", 64, "--users", 2, "--json")
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert {name: finding["outcome"] for name, finding in found.items()} == dict.fromkeys(
        [
            "log-probabilities", "chat template", "tool calls", "tool results", "stop tokens", "longest prompt",
            "too long a prompt", "cache", "speed, 223 tokens x 1", "speed, 223 tokens x 2", "shared prefix",
            "chunked prefill", "preemptions", "memory",
        ],
        "pass",
    )  # fmt: skip
    proof = Proof.model_validate(json.loads(result.stdout))
    assert proof.numbers["kl"] < 1e-6  # the fake answers from the reference: float32 through JSON
    assert proof.numbers["top1"] == 1.0
    assert (proof.numbers["cache_blocks"], proof.numbers["cache_blocks_planned"]) == (5, 5)
    assert (proof.numbers["shared_tokens"], proof.numbers["shared_tokens_planned"]) == (128, 128)
    assert proof.numbers["long_prompt_steps_planned"] == 4
    assert (proof.version, proof.kernels, proof.dtype) == ("vllm 9.9", ["FakeLinearKernel"], "float16")
    assert proof.command.startswith(f"vllm serve {artifact.name} --max-model-len 256")
    assert str(artifact.parent) not in result.stdout
    assert read_manifest(artifact).proofs == [proof]
    assert call("verify", artifact).exit_code == 0  # the manifest names no other file


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted",
    [
        {
            "noisy": ("log-probabilities", "mean KL 0.0"),
            "template": ("chat template", "differs from transformers at token 0"),
            "endless": ("stop tokens", "does not end at token 0 (finish_reason 'length'"),
            "short": ("longest prompt", "255 tokens: http"),
            "fewer blocks": ("cache", "8 blocks of 128 tokens, 9 of 128 planned"),
            "no sharing": (
                "shared prefix",
                "of 128 shared tokens 0 (0 blocks, 0.00 MiB) came from the cache, 128 planned",
            ),
            "larger chunks": ("chunked prefill", "1 steps of up to 2,048 by the plan; the server says 4,096"),
            "preempting": ("preemptions", "7"),
        },
        {
            "tools lost": ("tool calls", "differs from transformers at token"),
            "takes all": ("too long a prompt", "556 tokens are taken where 256 were planned"),
        },
    ],
)
@pytest.mark.usefixtures("fake", "few_prompts")
def test_faults_that_a_proof_finds(
    artifact: Path, planted: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOL_FAKE", ",".join(planted))
    before = (artifact / "qtool.json").read_bytes()
    result = call("prove", artifact, "--engine", "vllm", "--card", "cpu", "--no-log", "--json")
    assert result.exit_code == 1, result.output
    found = findings(result)
    more = {"template": {"tool calls", "tool results"}, "tools lost": {"tool results"}}
    wrong = {what for what, _ in planted.values()}.union(*(more.get(name, set()) for name in planted))
    assert {name for name, finding in found.items() if finding["outcome"] == "fail"} == wrong
    for what, said in planted.values():
        assert said in found[what]["detail"]
    assert (artifact / "qtool.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("fake", "few_prompts")
def test_a_server_that_dies_under_proof(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_FAKE", "dies later")
    result = call("prove", artifact, "--engine", "vllm", "--card", "cpu", "--no-log")
    assert result.exit_code == 3
    assert "vllm: the server ended by itself (code 9)" in one_line(result)


def test_llama_cpp_itself_is_proved(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.delenv("QTOOL_LLAMA_CPP_PYTHON", raising=False)
    few = prompts()[60:61]
    monkeypatch.setattr("qtool.serve.parity.prompts", lambda: few)
    folder = converted(tiny, [{"method": "gguf", "type": "Q8_0", "imatrix": False}], tmp_path)["gguf"]
    result = call("prove", folder, "--card", "cpu", "--chunk", 64, "--users", 2, "--json")
    assert result.exit_code == 0, result.output
    proof = Proof.model_validate(json.loads(result.stdout))
    assert proof.numbers["kl"] < proof.numbers["kl_limit"]
    assert (proof.numbers["cache_tokens"], proof.numbers["cache_tokens_planned"]) == (512, 512)
    assert (proof.numbers["shared_tokens"], proof.numbers["shared_tokens_planned"]) == (128, 128)
    assert (proof.numbers["long_prompt_steps"], proof.numbers["long_prompt_steps_planned"]) == (4, 4)
    assert proof.command.startswith(f"llama-server -m {folder.name}/")


# --- what the numbers mean ---


def test_there_are_64_pieces_of_code() -> None:
    assert len(set(prompts())) == 64


def test_divergence_is_exact_where_all_is_named_and_never_more() -> None:
    p = torch.randn(40).log_softmax(-1)
    q = torch.randn(40).log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    assert divergence(p, dict(enumerate(q.tolist()))) == pytest.approx(exact, abs=1e-6)
    best = dict(sorted(enumerate(q.tolist()), key=lambda pair: -pair[1])[:5])
    assert 0 <= divergence(p, best) < exact
    assert divergence(p, dict(enumerate(p.tolist()))) == pytest.approx(0, abs=1e-6)
    assert divergence(p, {41: -1.0}) == math.inf  # no token of this model
    assert divergence(p, {0: math.nan}) == math.inf


def test_the_worst_token_is_named() -> None:
    rows = [[1, 2, 3], [4, 5]]
    reference = [torch.full((len(row), 8), 0.0).log_softmax(-1) for row in rows]
    for part in reference:
        part[:, 3] += 1e-3  # the likeliest
    told = [[dict(enumerate(part[i].tolist())) for i in range(len(part) - 1)] for part in reference]
    told[0][1] = {token: (0.0 if token == 6 else -20.0) for token in range(8)}
    found = compare(rows, told, reference)
    assert (found.prompt, found.position, found.tokens) == (0, 2, 3)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.kl == pytest.approx(found.worst / 3, rel=1e-3)


def test_eight_bits_hold_each_block_for_itself() -> None:
    x = torch.tensor([[127.0, 1.4, -3.6, 0.0, 1.27, 0.013, 0.004]])
    assert eight_bits(x, 4)[0].tolist() == pytest.approx([127, 1, -4, 0, 1.27, 0.01, 0.0], abs=1e-6)


def test_what_a_shared_beginning_saves(artifact: Path) -> None:
    plan = planned(artifact, context=256, users=4)
    found = shared_prefix(plan.setting, 200, 4)
    # one whole block of 128 is shared; three users do not hold it again: 3 x 128 x 512 bytes
    assert (found.held, found.blocks, found.nbytes) == (128, 3, 3 * 128 * 512)
    assert found.seconds is not None
    flops = 2 * 128 * plan.setting.geometry.linears  # and attention, and the head, beside the linears
    assert found.seconds.best > flops / (1.05 * 1e13)
    assert shared_prefix(plan.setting, 100, 4).blocks == 0
    card = plan_server(read_headers(str(artifact)), Wish(load_accelerators()["H100"]))
    assert shared_prefix(card.setting, 200, 4).blocks == 3 * (200 // 16)


def test_chunks_of_a_long_prompt(artifact: Path) -> None:
    found = chunked_prefill(planned(artifact).setting, 250, 64)
    assert (found.steps, found.chunk) == (4, 64)
    assert found.pause is not None
    assert found.whole is not None
    assert found.pause.best < found.whole.best / 3


def test_plan_says_what_sharing_saves(artifact: Path) -> None:
    result = call("plan", artifact, "--gpu", "H100", "--context", 256, "--shared-prefix", 200, "--concurrency", 4)
    assert result.exit_code == 0, result.output
    assert "a beginning of 200 tokens, shared by 4 users: 36 blocks of the cache saved (0.3 MiB)" in result.output
    found = json.loads(
        call("plan", artifact, "--gpu", "H100", "--context", 256, "--shared-prefix", 200, "--json").stdout
    )
    assert found["answers"][0]["shared_prefix"]["blocks_saved"] == 7 * 12  # of 8 users, the default's most


# --- where a proof goes ---


def proof(outcome: str = "pass", **changes: object) -> Proof:
    given: dict[str, object] = {
        "engine": "vllm", "version": "vllm 0.32.0", "machine": "a processor", "dtype": "float16", "cache_type": "bf16",
        "context": 512, "users": 4, "time": "2026-01-01", "command": "vllm serve m",
        "kernels": ["CPUWNA16LinearKernel"],
        "numbers": {"kl": 4.3e-6, "top1": 0.9984, "memory": 2**30, "memory_planned": 2**31},
        "findings": [Finding(what="cache", outcome=cast("Outcome", outcome), detail="16 blocks, 17 planned")],
    }  # fmt: skip
    return Proof(**(given | changes))  # type: ignore[arg-type]


def test_a_newer_proof_takes_the_place_of_an_older() -> None:
    old, other = proof("fail"), proof(dtype="bfloat16")
    assert replaced([old, other], proof()) == [other, proof()]


@pytest.mark.parametrize(
    ("proofs", "verdict", "reason"),
    [
        ([proof()], "pass", "proved in vllm 0.32.0, float16"),
        ([proof("fail")], "fail", "cache: 16 blocks, 17 planned"),
        ([], "undecided", "nobody proved it in vllm: `serve: {prove: [vllm]}` in the recipe, or `qtool prove`"),
    ],
)
def test_a_gate_asks_for_it(proofs: list[Proof], verdict: str, reason: str) -> None:
    models = {"source": ModelSummary(), "awq": ModelSummary(proofs=proofs)}
    summary = Summary(models=models, comparisons=0, evidence="")
    (result,) = judge(summary, [GateSection(served="vllm", on_undecided="fail")])
    assert (result.output, result.gate, result.verdict, result.reason) == ("awq", "served vllm", verdict, reason)
    assert result.failed == (verdict != "pass")


def test_reports_show_it() -> None:
    (row,) = proof_rows({"awq": [proof("fail")]})
    assert row["result"] == "FAIL: cache"
    assert row["KL to the reference"] == "4.3e-06"
    assert row["GiB (planned)"] == "1.00 (2.00)"
    assert finding_rows({"awq": [proof()]})[0]["detail"] == "16 blocks, 17 planned"
    assert proof_line(proof()).startswith("proved in vllm 0.32.0 (float16 with CPUWNA16LinearKernel) on a processor")


@pytest.mark.slow
@pytest.mark.usefixtures("fake", "few_prompts")
def test_a_recipe_has_its_outputs_proved(write_recipe: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.serve.here.own_card", lambda known: "RTX4090,H100")
    recipe = write_recipe(serve={"prove": ["vllm"], "users": 2}, gates=[{"served": "vllm"}])  # type: ignore[operator]
    result = call("run", recipe, "--runs", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert "pass  awq: served vllm: proved in vllm 9.9, float16" in result.output
    (folder,) = (tmp_path / "artifacts").iterdir()
    assert [p.passed for p in Artifact.open(folder).manifest.proofs] == [True]  # type: ignore[union-attr]
    report = next((tmp_path / "runs").glob("*/report.md")).read_text()
    assert "## In real servers" in report
    assert "| awq | vllm 9.9 | float16 | pass |" in report
    assert '<section id="served">' in next((tmp_path / "runs").glob("*/report.html")).read_text()
    monkeypatch.setenv("QTOOL_FAKE", "dies")  # what was proved so is not started again
    assert call("run", recipe, "--runs", tmp_path / "runs").exit_code == 0
    monkeypatch.setenv("QTOOL_FAKE", "fewer blocks")
    recipe = write_recipe(serve={"prove": ["vllm"], "users": 3})  # type: ignore[operator]
    failed = call("run", recipe, "--runs", tmp_path / "runs")
    assert failed.exit_code == 1
    assert "not proved in vllm 9.9" in failed.output


def test_a_recipe_whose_server_is_missing_ends_before_any_work(
    write_recipe: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("QTOOL_VLLM_PYTHON", raising=False)
    result = call("run", write_recipe(serve={"prove": ["vllm"]}), "--runs", tmp_path / "runs")  # type: ignore[operator]
    assert result.exit_code == 3
    assert "engine vllm is not installed here" in one_line(result)
    assert not any((tmp_path / "artifacts").glob("*"))
    wrong = call("run", write_recipe(serve={"prove": ["vlm"]}), "--runs", tmp_path / "runs")  # type: ignore[operator]
    assert wrong.exit_code == 2


def test_a_token_of_the_cache_has_its_bytes_whatever_an_engine_pads(artifact: Path) -> None:
    """llama.cpp takes cells by 256; a token still has two rows of keys and values a layer, in two bytes each."""
    headers, card = read_headers(str(artifact)), load_accelerators()["H100"]
    geometry = headers.geometry
    for name in ("vllm", "llama.cpp"):
        setting = Setting(
            geometry, artifact_weights(headers), SERVERS[name], card, 1, SERVERS[name].cache_types[0].name
        )
        assert block_bytes(setting) == 2 * geometry.layers * geometry.kv_row * 2 * SERVERS[name].block


def test_a_window_that_llama_cpp_has_not_is_said_before_it_is_served(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "slides"))
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32}
    (model / "config.json").write_text(json.dumps(config))
    said = "right only up to the window of 32 tokens"
    made = converted(model, [{"method": "gguf", "type": "Q8_0"}], tmp_path)["gguf"]
    for words in (["plan", made, "--gpu", "L4"], ["serve", made, "--card", "cpu", "--dry-run"], ["verify", made]):
        assert said in " ".join(call(*words).output.split()), words
    assert said in " ".join(call("plan", model, "--gpu", "L4", "--format", "Q8_0").output.split())


def test_a_beginning_longer_than_the_context_is_refused(artifact: Path) -> None:
    for words in (["serve", artifact, "--card", "H100", "--dry-run"], ["plan", artifact, "--gpu", "H100"]):
        result = call(*words, "--shared-prefix", "8k")
        assert result.exit_code == 2, result.output
        assert "--shared-prefix 8192: a user's context is" in one_line(result)
