"""Tokens and keys stay in this process: no child has them in its environment, no redirect takes them elsewhere."""

from __future__ import annotations

import ast
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from qtool import QtoolError
from qtool.evaluate.engines import vllm, vllm_model
from qtool.evaluate.engines.engine import Batch
from qtool.evaluate.engines.server import ServedModel
from qtool.evaluate.sandbox import execute, secrets
from qtool.evaluate.sandbox.execute import TIERS, Job
from qtool.evaluate.sandbox.process import Worker, WorkerLost

ROOT = Path(__file__).parent.parent
NAMES = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PGPASSWORD"]
SECRET = "hf_planted_8315"
STARTERS = {"Popen", "run", "call", "check_call", "check_output"}
OTHERS = {"system", "popen", "spawnv", "spawnve", "posix_spawn", "posix_spawnp", "execv", "execvp", "getoutput"}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, SECRET)


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in family(int(child)))]


LEAK = f"""
import os
def f(x):
    seen = repr(dict(os.environ))
    try:
        seen += open('/proc/self/environ').read()
    except OSError:
        pass
    return {SECRET[::-1]!r}[::-1] in seen
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tier", [*TIERS, "none"])
def test_no_process_of_the_sandbox_has_a_secret(tier: str, planted: None) -> None:
    try:
        with Worker(tier, 20.0) as worker:
            found = [Path(f"/proc/{pid}/environ").read_bytes() for pid in family(worker._process.pid)]
            assert found[0] != b""
            assert not any(SECRET.encode() in environment for environment in found)
            assert worker.judge(Job("leak", LEAK, "assert f(1) is False", "f")).passed
            assert worker.judge(Job("leak", LEAK, "assert f(1) is False", "f", run="in_process")).passed
    except WorkerLost as error:
        pytest.skip(str(error))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_nor_has_node(planted: None) -> None:
    program = f"const f = (x) => JSON.stringify(process.env).includes([...'{SECRET[::-1]}'].reverse().join(''));"
    one = Job("leak", program, "if (f(1) !== false) throw new Error();", "f", language="javascript")
    assert execute.run_programs([one], timeout=20.0, sandbox="none")[0].passed


def test_every_process_is_started_with_an_environment_of_its_own() -> None:
    """Read from the source: what starts a process says what it inherits, and nothing starts one by another way."""
    started = 0
    folders = ("pipeline", "evaluate", "convert", "quantize")
    for path in [file for folder in folders for file in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and path.name != "habits.py":  # which gives programs threads for it
                assert node.module not in ("subprocess", "multiprocessing"), path
            if isinstance(node, ast.Import) and path.name != "habits.py":
                assert not any(alias.name.startswith(("multiprocessing", "pty")) for alias in node.names), path
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            where = f"{path.name}:{node.lineno}"
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if owner == "subprocess" and node.func.attr in STARTERS:
                started += 1
                assert "env" in [keyword.arg for keyword in node.keywords], where
            assert not (owner in ("os", "subprocess") and node.func.attr in OTHERS), where
    assert started >= 1


def test_secrets_are_known_by_their_names() -> None:
    kept = {"PATH": "/bin", "TOKENIZERS_PARALLELISM": "0", "CUDA_VISIBLE_DEVICES": "0", "MONKEY": "x", "HF_HOME": "h"}
    secret = (
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "SSH_KEY_PATH", "DB_PASSWORD",
        "github_token",
    )  # fmt: skip
    assert secrets.without_secrets(kept | dict.fromkeys(secret, "planted")) == kept


def test_secrets_are_withheld_and_given_back(planted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    before = dict(os.environ)
    with secrets.withheld():
        said = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    assert SECRET not in said
    assert "TOKENIZERS_PARALLELISM=false" in said
    assert dict(os.environ) == before
    with pytest.raises(ZeroDivisionError), secrets.withheld():
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_vllms_own_processes_start_without_secrets(planted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class LLM:
        def __init__(self, **_: Any) -> None:
            seen.append(subprocess.run(["env"], capture_output=True, text=True, check=True).stdout)
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(dtype="float16"))

    fake = types.ModuleType("vllm")
    fake.__dict__.update(LLM=LLM, SamplingParams=object)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    vllm_model.load(vllm.FACTS, Path("m"), None, 64)
    vllm_model.load(vllm.FACTS, Path("m"), None, 64, timed=1)
    assert len(seen) == 2
    assert not any(SECRET in text for text in seen)
    assert os.environ["HF_TOKEN"] == SECRET


def test_measure_keeps_the_key_to_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect is not followed, a proxy is not asked about this machine, an error that quotes the key does not."""
    keys: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            self.send_error(404)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/elsewhere")
            else:
                self.send_response(401)
            said = json.dumps({"error": f"bad key {self.headers['Authorization']}"}).encode()
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        for path in ("/moved", "/refused"):
            with pytest.raises(QtoolError, match=r"bad key Bearer \*\*\*"):
                ServedModel(address + path, "m", api_key=SECRET).time(Batch(((10, 11, 12, 13),), 2))
        server.shutdown()
    assert keys == []
