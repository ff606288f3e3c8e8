"""`qtool measure`: the arithmetic, the engines it talks to, and what it does not believe."""

from __future__ import annotations

import http.server
import json
import random
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qtool import QtoolError
from qtool.cli import main
from qtool.convert.files.source import resolve
from qtool.evaluate.engines import transformers, vllm, vllm_model
from qtool.evaluate.engines.engine import Batch, Model, OutOfMemory, Reading, TooLong, Use
from qtool.evaluate.engines.server import ServedModel
from qtool.evaluate.engines.vllm_model import load
from qtool.measure.measure import measure, percentile, random_prompt
from qtool.runs import ledger
from qtool.sizing.accelerators import load_accelerators
from qtool.sizing.fit import Estimate, Setting, estimate_of
from qtool.sizing.formats import weights_of
from qtool.sizing.headers import read_headers

IQUEST = Path(__file__).parent / "data" / "iquest" / "IQuest-Coder-V1-40B"


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(argument) for argument in arguments])


def batch(context: int, sequences: int, tokens: int, vocabulary: int = 50) -> Batch:
    source = random.Random(0)
    return Batch(tuple(random_prompt(source, context, vocabulary) for _ in range(sequences)), tokens)


class Scripted:
    """Readings as a test wants them."""

    def __init__(self, step: float, first: float, limit: int = 100) -> None:
        self.step, self.first, self.limit = step, first, limit
        self.calls: list[tuple[int, int, int]] = []

    def time(self, batch: Batch) -> Reading:
        context, sequences, tokens = len(batch.prompts[0]), len(batch.prompts), batch.tokens
        self.calls.append((context, sequences, tokens))
        if sequences > self.limit:
            raise OutOfMemory("CUDA out of memory")
        wall = self.first + (tokens - 1) * self.step
        return Reading((self.first,) * sequences, (self.step,) * sequences, wall, tokens * sequences, None,
                       {"allocated": 7, "device": None})  # fmt: skip


def h200(context: int, sequences: int) -> Estimate | None:
    headers = read_headers(str(IQUEST))
    setting = Setting(headers.geometry, weights_of(headers, "source"), vllm.FACTS, load_accelerators()["H200"])
    return estimate_of(setting, context, sequences)


def test_requests_are_tokens_over_the_length_of_answers() -> None:
    engine = Scripted(step=0.05, first=1.0)
    (row,) = measure(engine.time, [2048], [4], 101, 3, h200, 50, price=3.6)
    assert engine.calls == [(2048, 4, 4)] + [(2048, 4, 101)] * 3  # warm-up, then repeats
    rate = 4 * 101 / (1 + 100 * 0.05)
    assert row.status == "ok"
    assert row.tokens_per_second == pytest.approx(rate)
    assert row.requests_per_second == pytest.approx(rate / 101)
    assert row.cost_per_million == pytest.approx(3.6 / 3600 / rate * 1e6)
    assert row.first_seconds == {"p50": 1.0, "p95": 1.0, "p99": 1.0}
    assert row.memory == {"allocated": 7, "device": None}
    assert row.predicted is not None
    assert row.step_bound is not None
    assert row.step_bound[0] < 0.05


def test_what_beats_its_bound_is_rejected() -> None:
    """122 tokens/s for one user of the 40B in 16 bits on one card: the bus cannot."""
    (row,) = measure(Scripted(step=1 / 122, first=1.0).time, [2048], [1], 16, 1, h200, 50)
    assert row.status == "rejected"
    assert "8.2 ms a token beats the bound of 16." in row.why
    (row,) = measure(Scripted(step=0.02, first=0.001).time, [32768], [1], 16, 1, h200, 50)
    assert row.status == "rejected"
    assert "first token after 0.001 s beats the bound" in row.why
    (row,) = measure(Scripted(step=0.02, first=0.001).time, [32768], [1], 16, 1, lambda c, n: None, 50)
    assert row.status == "ok"  # nothing is known of the card
    assert row.predicted is None


def test_a_row_ends_where_memory_does() -> None:
    rows = list(measure(Scripted(0.05, 9.0, limit=2).time, [2048, 4096], [4, 1, 2, 8], 8, 1, h200, 50))
    assert [(row.context, row.sequences, row.status) for row in rows[:4]] == [
        (2048, 1, "ok"), (2048, 2, "ok"), (2048, 4, "out of memory"), (2048, 8, "not run"),
    ]  # fmt: skip
    assert rows[4].status == "ok"  # the next context starts anew
    assert rows[2].why == "CUDA out of memory"


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert percentile([3.0], 0.99) == 3.0


def test_prompts_are_random_and_never_the_same() -> None:
    seen: list[Batch] = []
    engine = Scripted(step=0.05, first=1.0)
    list(measure(lambda batch: (seen.append(batch), engine.time(batch))[1], [16], [2], 8, 2, lambda c, n: None, 50))
    prompts = [prompt for batch in seen for prompt in batch.prompts]
    assert len(set(prompts)) == len(prompts) == 6
    assert all(10 <= token < 50 for prompt in prompts for token in prompt)


def test_transformers_on_the_cpu(tiny: Path, tmp_path: Path) -> None:
    use = Use("cpu", 2, lambda: 21, timed=True)
    with transformers.ENGINE.open(Model("tiny", path=tiny), use) as running:
        assert running.dtype == json.loads((tiny / "config.json").read_text())["dtype"]  # as stored
        reading = running.time(batch(16, 2, 5))
    with transformers.ENGINE.open(Model("tiny", path=tiny), Use("cpu", 2, lambda: 21)) as running:
        assert running.dtype == "float32"
    assert reading.tokens == 10
    assert len(reading.first) == len(reading.steps) == 2
    assert 0 < reading.first[0] < reading.wall
    assert reading.memory["resident"] is None or reading.memory["resident"] > 2**20
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    nothing = Model("empty", path=tmp_path)
    with pytest.raises(QtoolError, match="transformers cannot load it here"), transformers.ENGINE.open(nothing, use):
        pass


def test_the_command_measures_and_logs(tiny: Path, tmp_path: Path) -> None:
    result = call("measure", tiny, "--context", "16,32", "--batch", "1,2", "--tokens", 4, "--runs", tmp_path,
                  "--device", "cpu", "--price", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    for expected in ("16 x 1", "32 x 2", "decode tok/s", "requests/s", "per million", "first p99 s"):
        assert expected in result.output
    (entry,) = ledger.read(tmp_path)
    assert (entry["kind"], entry["key"]) == ("measure", resolve(str(tiny)).commit)
    assert [row["status"] for row in entry["rows"]] == ["ok"] * 4
    result = call("measure", tiny, "--context", "254", "--batch", 1, "--tokens", 4, "--device", "cpu")
    assert result.exit_code == 2
    assert "more than the 256 that" in result.output
    result = call("measure", tiny, "--engine", "llama.cpp", "--context", 16, "--batch", 1)
    assert result.exit_code == 2
    assert "holds no .gguf file" in result.output


def test_llama_cpp_measures_a_file(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    import torch

    from qtool.make.job import open_job
    from qtool.make.outputs import make_artifacts
    from qtool.preparing import calibrate
    from qtool.recipe.sections import load_recipe

    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: qtool-demo\noutputs: [{{method: gguf, imatrix: false}}]\noutput_dir: {tmp_path}/a\n")
    loaded = load_recipe(recipe)
    job = open_job(loaded, resolve("qtool-demo"), torch.device("cpu"), loaded.outputs)
    artifact = make_artifacts(job, calibrate(job))["gguf"]
    result = call("measure", artifact.path, "--context", 64, "--batch", "1,2", "--tokens", 8, "--repeats", 2,
                  "--runs", tmp_path, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["engine"], found["tokens"], found["key"]) == ("llama.cpp", 8, artifact.manifest.key)
    rows = found["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    for row in rows:
        assert row["step_seconds"] > 0
        assert 0 < row["first_seconds"]["p50"] <= row["first_seconds"]["p99"]
        assert row["requests_per_second"] == pytest.approx(row["tokens_per_second"] / 8)
        assert row["memory"]["resident"] is None or row["memory"]["resident"] > 2**20


class FakeVllm(types.ModuleType):
    """As much of vLLM's offline interface as is used; a call takes a millisecond a token."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.asked: list[Any] = []
        self.clock = 0.0
        fake = self

        class SamplingParams:
            def __init__(self, **settings: Any) -> None:
                self.settings = settings

        class LLM:
            def __init__(self, **settings: Any) -> None:
                fake.asked.append(settings)
                if settings["max_model_len"] > 1000:
                    raise ValueError("No available memory for the cache blocks.")
                self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(dtype="torch.float16"))

            def generate(self, prompts: list[Any], parameters: Any, use_tqdm: bool) -> list[Any]:
                if len(prompts) > 2:
                    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
                tokens = parameters.settings["max_tokens"]
                fake.clock += 0.01 + 0.001 * tokens
                output = types.SimpleNamespace(token_ids=[1] * tokens)
                return [types.SimpleNamespace(outputs=[output]) for _ in prompts]

        self.SamplingParams, self.LLM = SamplingParams, LLM


def test_vllm_offline_against_a_recorded_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(QtoolError, match="needs vLLM, which is not here") as error:
        load(vllm.FACTS, Path("m"), None, 100, timed=2)
    assert error.value.exit_code == 3
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(vllm_model, "time", types.SimpleNamespace(perf_counter=lambda: fake.clock))  # no busy machine
    running = load(vllm.FACTS, Path("m"), None, 100, timed=2)
    assert {key: fake.asked[0][key] for key in ("max_model_len", "max_num_seqs", "enable_prefix_caching")} == {
        "max_model_len": 100, "max_num_seqs": 2, "enable_prefix_caching": False,
    }  # fmt: skip
    reading = running.time(batch(20, 2, 11))
    assert reading.tokens == 22
    assert reading.first == pytest.approx((0.011, 0.011))
    assert reading.steps == pytest.approx((0.001, 0.001))
    with pytest.raises(OutOfMemory):
        running.time(batch(20, 3, 4))
    with pytest.raises(QtoolError, match="no room for 2000 tokens"):
        load(vllm.FACTS, Path("m"), None, 2000, timed=1)


@pytest.fixture
def openai_server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Streams as OpenAI-compatible servers do; prompts over 100 tokens are too long."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"authorization": self.headers.get("Authorization")})
            if len(body["prompt"]) > 100:
                said = b'{"error": {"message": "the request exceeds the available context size"}}'
                self.send_response(400)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)
                return
            self.send_response(200)
            self.end_headers()
            time.sleep(0.02)
            for number in range(body["max_tokens"]):
                last = number + 1 == body["max_tokens"]
                event = {"choices": [{"text": "x", "finish_reason": "length" if last else None}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.002)
            usage = {"completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 16}}
            self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_openai_compatible_server(openai_server: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = openai_server
    reading = ServedModel(url, "m", api_key="k").time(batch(32, 3, 6))
    assert reading.tokens == 18
    assert all(seconds > 0.015 for seconds in reading.first)
    assert all(0.001 < seconds < 1 for seconds in reading.steps)  # a machine may be busy
    assert reading.cached == pytest.approx(0.5)
    assert {len(body["prompt"]) for body in asked} == {32}
    assert len({tuple(body["prompt"]) for body in asked}) == 3  # no prefix is shared
    assert asked[0]["authorization"] == "Bearer k"
    with pytest.raises(TooLong, match="exceeds the available context size"):
        ServedModel(url, "m").time(batch(101, 1, 4))
    with pytest.raises(QtoolError, match=r"cannot be reached .* Is the server running\?"):
        ServedModel("http://127.0.0.1:9/v1", "m").time(batch(8, 1, 2))


def test_a_url_from_the_command_line(
    openai_server: tuple[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    result = call("measure", openai_server[0], "--context", 32, "--batch", "1,2", "--tokens", 4, "--repeats", 1,
                  "--shape", IQUEST, "--gpu", "H200", "--runs", tmp_path)  # fmt: skip
    assert result.exit_code == 1, result.output  # a token every 2 ms from 74 GiB of weights: not believed
    assert "beats the bound of" in result.output
    assert "50%" in result.output
    assert "secret-key" not in result.output + (tmp_path / "ledger.jsonl").read_text()


def test_a_password_in_a_url_is_refused(tmp_path: Path) -> None:
    result = call("measure", "http://me:secret@127.0.0.1:9/v1", "--runs", tmp_path)
    assert result.exit_code == 2
    assert "put the server's key into OPENAI_API_KEY" in result.output
    assert "secret" not in result.output


def test_help_shows_examples() -> None:
    assert "Examples:" in call("measure", "--help").output


def test_a_log_that_cannot_be_kept_is_refused_before_measuring(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    result = call("measure", tiny, "--context", "16", "--batch", "1", "--runs", tmp_path / "runs")
    assert result.exit_code == 2
    assert "is not a folder" in result.output
