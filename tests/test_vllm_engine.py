"""What can be told of the engine `vllm` without vLLM: its errors, its version, its machine, the dtypes of a file."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

from qtool.convert.files.folder import write_config
from qtool.evaluate.engines import engine as engines
from qtool.evaluate.engines.machine import machine_name
from qtool.evaluate.engines.vllm_model import cause
from qtool.report import measured as measure_report
from qtool.runs.measurements import Row

PYDANTIC = (
    "1 validation error for VllmConfig\n  Value error, Unsupported quantization config: bits=4, sym=False "
    "[type=value_error, input_value=ArgsKwargs((), {'model_co... 'shutdown_timeout': 0}), input_type=ArgsKwargs]\n"
    "    For further information visit https://errors.pydantic.dev/"
)
NO_PLUGIN = (
    "1 validation error for ModelConfig\n  Value error, Unknown quantization method: bitsandbytes. Must be one of "
    "['awq', 'auto_awq'] [type=value_error, input_value=1]"
)
NO_ROOM = (
    "Available memory on node 0 (10.84/15.21 GiB) on startup is less than desired CPU memory utilization (0.92, 14.0 "
    "GiB)."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PYDANTIC, "Unsupported quantization config: bits=4, sym=False"),
        (
            NO_PLUGIN,
            "Unknown quantization method: bitsandbytes. It needs a plugin: pip install vllm-bnb-plugin",
        ),
        (NO_ROOM, f"{NO_ROOM} On a CPU set VLLM_CPU_KVCACHE_SPACE to the GiB of its cache: VLLM_CPU_KVCACHE_SPACE=1"),
        ("first\n  second.", "first second"),
        ("", "RuntimeError"),
    ],
)
def test_vllms_own_reason_is_told(error: str, said: str) -> None:
    assert cause(RuntimeError(error)) == said


def test_a_version_is_found_under_the_name_that_brought_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return {"vllm-cpu": "0.32.0", "torch": "2.13.0"}[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu", "vllm-cpu"]})
    assert engines.package_versions("vllm", "torch") == "vllm-cpu 0.32.0, torch 2.13.0"


def test_a_machine_without_a_card_is_named_by_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine_name("auto") == machine_name("cpu")


@pytest.mark.parametrize(
    ("config", "stored", "said"),
    [
        ({"dtype": "bfloat16"}, torch.float16, "float16"),
        ({"torch_dtype": "bfloat16"}, torch.float16, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, torch.float16, "float16"),
        ({}, torch.bfloat16, "bfloat16"),
        ({"torch_dtype": "float16"}, None, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, None, "bfloat16"),
    ],
)
def test_both_dtypes_say_what_is_stored(
    config: dict[str, str], stored: torch.dtype | None, said: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    write_config(source, target, {}, stored, {})
    assert json.loads((target / "config.json").read_text()) == {"dtype": said, "torch_dtype": said}


def test_no_table_without_columns(capsys: pytest.CaptureFixture[str]) -> None:
    measure_report.print_rows([Row(64, 1, "ok", step_seconds=0.5, memory={"resident": None})])
    assert capsys.readouterr().out.count("prompt x batch") == 1
