"""`qtool plan` as a user meets it: the answer, the grid, JSON, the picture, jobs, cards, and what it refuses."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from qtool import QtoolError
from qtool.cli import main
from qtool.convert.files.source import resolve
from qtool.convert.formats import autogptq, bnb_nf4
from qtool.make import needs as job_needs
from qtool.make.job import device_kind, open_job
from qtool.make.output import TOKENIZER_AND_CONFIG
from qtool.make.outputs import make_artifacts
from qtool.preparing import calibrate
from qtool.recipe.sections import load_recipe
from qtool.runs import ledger
from qtool.sizing.accelerators import choose, load_accelerators
from qtool.sizing.headers import read_headers
from qtool.sizing.plan import Question, make_plan

IQUEST = Path(__file__).parent / "data" / "iquest"
B40 = IQUEST / "IQuest-Coder-V1-40B"


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(main, [str(argument) for argument in arguments])


def test_the_answer_comes_first() -> None:
    result = call("plan", B40, "--full", "--gpu", "rtx-4090,H100", "--format", "awq,Q4_K_M", "--context", "2k,32k,128k")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("does not fit  awq (4.39 bpw, 20.34 GiB) on RTX4090 with vllm")
    assert "--cpu-offload-gb 1" in lines[1]
    assert "over the host link at 32 GB/s" in lines[2]
    # Q4_K_S was not asked for, and is larger than AWQ: but llama.cpp needs less beside the weights
    assert lines[3].strip() == "to hold 2,048 tokens x 1: format Q4_K_S (llama.cpp), or 2 x RTX4090"
    assert "to hold 2,048 tokens x 1: --kv-dtype q4_0, or format Q4_K_S (llama.cpp), or 2 x RTX4090" in result.output
    assert "to hold 131,072 tokens x 1: 4 x RTX4090" in result.output
    assert (
        "fits  awq (4.39 bpw, 20.34 GiB) on H100 with vllm, bf16 cache: one sequence of up to 131,072" in result.output
    )
    assert "vllm serve IQuest-Coder-V1-40B-awq --max-model-len 131072" in result.output
    assert "llama-server -m IQuest-Coder-V1-40B-Q4_K_M/IQuest-Coder-V1-40B-Q4_K_M.gguf -c 131072" in result.output
    assert "assumed: no weights are here" in result.output
    assert "IQuest-Coder-V1-40B on 1 x H100" in result.output


def test_one_screen_by_default() -> None:
    """At eighty columns: a table for each card, no cell torn, no line longer, what does not fit with what would."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["plan", str(B40), "--gpu", "RTX4090,H100"])
    lines = result.output.splitlines()
    tables = [line for line in lines if line.startswith("  ")]
    assert (result.exit_code, max(map(len, tables)) <= 80, len(lines) < 40) == (0, True, True), result.output
    assert [line.split()[0] for line in tables if line.split()] == 2 * ["format", *FORMATS]
    assert "  awq      20.34   vllm                  131,072      79      44 - 154" in result.output
    assert "bf16: more than the 72.8 GiB that vllm takes; what does: 2 x H100" in lines
    assert "awq, gptq: more than the 21.7 GiB that vllm takes; what does: 2 x RTX4090" in lines
    assert not re.search(r"\de[+-]?\d", result.output)
    assert result.output.count("serve ") == 1


FORMATS = ["bf16", "awq", "gptq", "nf4", "Q4_K_M", "Q8_0"]


def test_json_has_every_cell_and_the_picture_is_svg(tmp_path: Path) -> None:
    picture = tmp_path / "a.svg"
    result = call(
        "plan", B40, "--gpu", "H200", "--kv-dtype", "bf16,fp8", "--format", "source,awq", "--context", "8k,64k",
        "--concurrency", "1,3", "--json", "--svg", picture,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(a["format"], a["kv_dtype"]) for a in found["answers"]] == [
        ("bf16", "bf16"), ("bf16", "fp8"), ("awq", "bf16"), ("awq", "fp8"),
    ]  # fmt: skip
    cells = found["answers"][1]["cells"]
    assert [(cell["context"], cell["sequences"]) for cell in cells] == [(8192, 1), (8192, 3), (65536, 1), (65536, 3)]
    assert cells[0]["cache"] == 8192 * 160 * 1024
    assert "--kv-cache-dtype fp8" in found["answers"][1]["command"]
    root = xml.etree.ElementTree.fromstring(picture.read_text())
    assert root.tag.endswith("svg")
    assert "the line: H200" in picture.read_text()


def test_unified_memory_is_for_llama_cpp() -> None:
    result = call("plan", B40, "--gpu", "M4-Max-128", "--format", "awq,Q4_K_M", "--context", "32k", "--full")
    assert result.exit_code == 0, result.output
    assert "awq: vLLM does not run on M4-Max-128; take a GGUF format" in result.output
    assert "fits  Q4_K_M (4.83 bpw, 22.38 GiB) on M4-Max-128 with llama.cpp" in result.output


def test_several_cards_share() -> None:
    result = call("plan", B40, "--gpu", "H100", "--gpus", 2, "--format", "source", "--context", "32k", "--full")
    assert "fits  bf16 (16.00 bpw, 74.12 GiB) on 2 x H100 with vllm" in result.output
    assert "--tensor-parallel-size 2" in result.output
    result = call("plan", B40, "--gpu", "H100", "--gpus", 3, "--format", "source", "--context", "32k", "--full")
    assert "cannot be served" in result.output
    assert "40 heads do not divide by 3" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "RTX4091"], "--gpu RTX4091: not a card qtool knows. Did you mean RTX4090? Known: RTX3090"),
        (["--context", "256k"], "was made for 131,072 tokens (max_position_embeddings in config.json)"),
        (["--context", "8q"], "--context 8q: a whole number above 0 is needed"),
        (["--concurrency", "0"], "--concurrency 0: a whole number above 0 is needed"),
        (["--kv-dtype", "int3"], "--kv-dtype int3: not a cache type. Known: bf16"),
        (["--kv-dtype", "q4_0", "--engine", "vllm"], "--kv-dtype q4_0: vllm keeps its cache in bf16, f16, fp8"),
        (["--format", "q4"], "--format q4: not a format qtool writes"),
        (["--engine", "llama.cpp", "--format", "awq"], "awq: llama.cpp does not load it"),
        (["--cards", "/absent.yaml"], "/absent.yaml: no such file"),
    ],
)
def test_bad_input_says_what_and_what_else(arguments: list[str], said: str) -> None:
    result = call("plan", B40, *(["--gpu", "H100"] if "--gpu" not in arguments else []), *arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_cards_state_every_source_and_users_add_their_own(tmp_path: Path) -> None:
    cards = load_accelerators()
    for name in ("RTX3090", "RTX4090", "RTX5090", "L4", "L40S", "A100-40", "A100-80", "H100", "H200", "B200",
                 "RTXPRO6000", "MI300X", "M4-Max-128"):  # fmt: skip
        assert set(cards[name].sources) == {"memory", "bandwidth", "bf16", "fp8", "compute", "host_link"}, name
    assert cards["M4-Max-128"].unified
    own = tmp_path / "cards.yaml"
    own.write_text("Mine: {memory: 10, bandwidth: 100, compute: '8.6', host_link: 16}\n")
    (mine,) = choose(load_accelerators(own), "mine")
    assert (mine.memory, mine.bandwidth, mine.bf16) == (10 * 2**30, 100e9, None)
    result = call("plan", IQUEST / "IQuest-Coder-V1-7B", "--cards", own, "--gpu", "mine", "--format", "awq")
    assert result.exit_code == 0, result.output
    for text, said in (
        ("Mine: {memory: 10}\n", "Mine: bandwidth is None; a number above 0"),
        ("Mine: {memory: -1, bandwidth: 1}\n", "memory is -1; a number above 0"),
        ("Mine: {memory: .inf, bandwidth: 1}\n", "memory is inf; a number above 0"),
        ("Mine: {memory: 1, bandwidth: 1, sources: [a book]}\n", "Mine: sources is .'a book'.; a mapping is needed"),
        ("Mine: {memory: 1, bandwidth: 1, speed: 3}\n", "Mine: speed; keys are"),
        ("- x\n", "cards are a mapping"),
    ):
        own.write_text(text)
        with pytest.raises(QtoolError, match=said):
            load_accelerators(own)


def test_a_plan_takes_no_second_and_help_no_imports() -> None:
    cards = choose(load_accelerators(), "H100")
    headers = read_headers(str(B40))
    formats = ("source", "awq", "gptq", "nf4", "Q4_K_M")
    make_plan(headers, Question(cards, formats=("Q4_K_M",), contexts=(2048,)))  # imports
    started = time.process_time()
    plan = make_plan(read_headers(str(B40)), Question(cards, formats=formats))
    assert time.process_time() - started < 1
    assert sum(len(answer.cells) for answer in plan.answers) == 5 * 5 * 4
    heavy = ("torch", "transformers", "pydantic", "yaml", "rich")
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom qtool.cli import main\n"
        "for words in (['--help'], ['plan', '--help']):\n    assert CliRunner().invoke(main, words).exit_code == 0\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_recipe_is_planned_as_a_job(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, runs = write_recipe(), tmp_path / "runs"
    result = call("plan", recipe, "--runs", runs)
    assert result.exit_code == 0, result.output
    assert "this job fits" in result.output
    assert "time: not known" in result.output
    loaded = load_recipe(recipe)
    job = open_job(loaded, resolve(loaded.model.id), torch.device("cpu"), loaded.outputs)
    plan = job.output("awq").plan
    entry = {
        "device": device_kind(job.device), "seconds": 8.0, "like": job_needs.like(loaded),
        "artifacts": {"awq": {"bytes": plan.nbytes, "bpw": plan.bits_per_weight}},
    }  # fmt: skip
    ledger.append(runs, entry)
    assert "time: about 8 s" in call("plan", recipe, "--runs", runs).output
    more = call("plan", recipe, "--runs", runs, "--set", "calibration.samples=999")
    assert "time: not known" in more.output
    needs = job_needs.needs_of(job)
    made = make_artifacts(job, calibrate(job))["awq"]
    taken = sum(path.stat().st_size for path in made.path.rglob("*") if path.is_file())
    assert taken <= needs.disk_bytes <= taken + TOKENIZER_AND_CONFIG
    monkeypatch.setattr(job_needs, "host_memory", lambda: 1000)
    found = json.loads(call("plan", recipe, "--runs", runs, "--json").output)
    assert found["short"][0].startswith("host memory: ")
    other = write_recipe(output_dir=str(tmp_path / "elsewhere"))
    result = call("run", other, "--runs", runs)
    assert result.exit_code == 3
    assert "this job cannot finish here: host memory: " in result.output
    assert not any((tmp_path / "elsewhere").iterdir())


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """As much of the Hub as headers need, on the loopback interface; remembers what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            path = self.path.split("?")[0]
            asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            if path.startswith("/api/models/org/tiny"):
                names = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
                return self.send(json.dumps({"id": "org/tiny", "sha": "a" * 40, "siblings": names}).encode())
            file = folder / path.rsplit("/", 1)[-1]
            if not path.startswith("/org/tiny/resolve/") or not file.exists():
                missing = "RepoNotFound" if "/tiny" not in path else "EntryNotFound"
                return self.send(b"", 404, {"X-Error-Code": missing})
            data = file.read_bytes()
            extra = {"ETag": f'"{file.name}"', "X-Repo-Commit": "a" * 40}
            if "Range" in self.headers:
                low, high = self.headers["Range"].removeprefix("bytes=").split("-")
                part = data[int(low) : int(high) + 1]
                extra["Content-Range"] = f"bytes {low}-{int(low) + len(part) - 1}/{len(data)}"
                return self.send(part, 206, extra)
            self.send(data, 200, extra)

        def send(self, data: bytes, status: int = 200, extra: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (extra or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_a_hub_model_is_planned_from_headers_alone(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys\nfrom qtool.sizing.headers import read_headers\nfrom qtool.sizing.formats import weights_of\n"
        "from qtool import QtoolError\nh = read_headers('org/tiny')\n"
        "print(weights_of(h, 'awq-g32').nbytes, len(h.tensors), h.name)\n"
        "try:\n    read_headers('org/absent')\nexcept QtoolError as error:\n    print(error.message)"
    )
    with hub(tiny) as (url, asked):
        # no proxy, no token: the loopback server is all there is
        environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
    assert done.returncode == 0, done.stderr + "\n".join(asked)
    from qtool.sizing.formats import weights_of

    local = read_headers(str(tiny))
    first, second = done.stdout.splitlines()
    assert first == f"{weights_of(local, 'awq-g32').nbytes} {len(local.tensors)} tiny"
    assert "org/absent: is not on the Hub, or is private" in second
    weights = [line for line in asked if ".safetensors" in line and line.startswith("GET") and "index" not in line]
    assert weights
    assert all("bytes=" in line for line in weights)  # never a whole shard


def test_files_that_were_read_do_not_fill_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A control group counts its page cache as used: after one read of a large model nothing else seems to be left."""
    monkeypatch.setattr(job_needs, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("990000\n")
    (tmp_path / "memory.stat").write_text("anon 90000\nfile 900000\nactive_file 400000\ninactive_file 500000\n")
    assert job_needs.host_memory() == 910_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (job_needs.host_memory() or 0) > 1_000_000


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("RemoteEntryNotFoundError", "has no config.json on the Hub"), ("GatedRepoError", "is gated: accept its terms"),
        ("SafetensorsParsingError", "holds a file that is not whole safetensors"),
    ],
)  # fmt: skip
def test_what_the_hub_answers_is_told(fault: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, fault)

    def answer(*_: object, **__: object) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    with pytest.raises(QtoolError, match=said) as caught:
        read_headers("org/name")
    assert caught.value.exit_code == 2


def test_a_config_on_the_hub_that_is_no_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    with pytest.raises(QtoolError, match=r"config\.json: not valid JSON"):
        read_headers("org/name")


def test_the_documented_tables_are_what_plan_says() -> None:
    import importlib.util

    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("sizing_tables", root / "scripts" / "sizing_tables.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (root / "docs" / "sizing.md").read_text(encoding="utf-8")
    assert text.count("<!-- plan ") == len(script.MODELS)
    assert script.filled(text) == text


def artifact(folder: Path, tiny: Path, section: dict[str, object]) -> Path:
    """A folder that `plan` takes for an artifact: its rules look at config.json, its sizes at the tensors."""
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return folder


def test_the_command_works_where_it_was_typed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = autogptq.quantization_config(4, 32, True, 0.1)
    artifact(tmp_path / "my models" / "it's one", tiny, section)
    monkeypatch.chdir(tmp_path)
    for typed in ("my models/it's one", "./my models/it's one/", str(tmp_path / "my models" / "it's one")):
        found = json.loads(call("plan", typed, "--gpu", "H100", "--json").stdout)
        words = shlex.split(found["answers"][0]["command"])
        assert words[:3] == ["vllm", "serve", typed]
        assert Path(words[2]).is_dir()
    found = json.loads(call("plan", "my models/it's one", "--gpu", "H100", "--engine", "transformers", "--json").stdout)
    assert """from_pretrained("my models/it's one",""" in found["answers"][0]["command"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (autogptq.quantization_config(4, 32, False, 0.1), "take `format: compressed-tensors`"),
        (autogptq.quantization_config(4, 32, True, 0.1) | {"desc_act": True}, "desc_act is true"),
    ],
)
def test_no_command_for_what_vllm_refuses(section: dict[str, object], said: str, tiny: Path, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", tiny, section)
    result = call("plan", folder, "--gpu", "H100", "--full")
    assert result.exit_code == 0, result.output
    assert "vllm serve" not in result.output
    assert said in result.output.splitlines()[0]
    (answer,) = json.loads(call("plan", folder, "--gpu", "H100", "--json").stdout)["answers"]
    assert (answer["fits"], answer["command"], answer["changes"]) == (False, "", [])


def test_nf4_names_the_plugin_that_vllm_needs(tiny: Path, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a", tiny, bnb_nf4.quantization_config(True, ["lm_head"]))
    for engine in ("vllm", "transformers"):
        assert "pip install vllm-bnb-plugin" in call("plan", folder, "--gpu", "H100", "--engine", engine).output


GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "vocab_size": 256000, "sliding_window": 4096, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
    "torch_dtype": "bfloat16", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_gemma_is_served_in_bfloat16(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA2))
    cards = choose(load_accelerators(), "H100")
    (answer,) = make_plan(read_headers(str(tmp_path)), Question(cards, formats=("awq",), contexts=(2048,))).answers
    assert "--dtype bfloat16" in answer.command
