"""A rehearsal runs every output on a tiny model of the same kind, on which no kernel's compiled form depends that the
real one would not have; and nothing of it can harm a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.convert.files.config_file import read_config
from qtool.convert.files.tensor_info import TensorInfo
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.shape import decoder_of
from qtool.make import rehearsing
from qtool.make.job import Job
from qtool.make.needs import Resources
from qtool.preparing import prepare
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.table import METHODS
from qtool.quantize.rehearsal import LAYERS, UNIT, Wanted, reduced, rehearse, try_types

OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "group_size": 64}, {"method": "gptq", "group_size": 64, "bits": 8, "propagate_error": False},
    {"method": "nf4"}, {"method": "gguf", "type": "Q4_K_M"}, {"method": "gguf", "name": "q8", "type": "Q8_0"},
]  # fmt: skip
REAL: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "num_hidden_layers": 32},
    "Qwen2.5-0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "num_hidden_layers": 24},
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "num_hidden_layers": 30},
    "all heads alike": {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16,
                        "num_key_value_heads": 16, "num_hidden_layers": 24},
}  # fmt: skip
BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


def forms(config: Mapping[str, Any], method: Method) -> set[tuple[Any, ...]]:
    """On what a kernel's compiled form depends: a matrix's group, its type, what its width divides by, and whether its
    integers are ones or divide by 16 (Triton compiles for these apart)."""
    decoder = decoder_of(config)
    tensors = {
        name: TensorInfo(Path("m"), torch.bfloat16, shape)
        for name, shape in decoder.family.tensors(decoder.shape).items()
    }
    plan = method.container.of_model(decoder).plan(ModelShape(tensors, decoder, config))
    return {
        (linear.group_size, linear.type, linear.columns % UNIT, linear.out % 16, linear.columns >= 512, linear.out == 1)
        for linear in plan.linears
    }


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("output", range(len(OUTPUTS)))
def test_the_tiny_models_matrices_are_of_the_real_ones_forms(name: str, output: int) -> None:
    config = BASE | REAL[name]
    tiny = reduced(config, decoder_of(config).shape)
    method = METHODS[OUTPUTS[output]["method"]].model_validate(OUTPUTS[output])
    assert forms(tiny, method) == forms(config, method)
    assert tiny["num_hidden_layers"] == LAYERS
    small = decoder_of(tiny).shape
    assert small.hidden <= 1024
    assert small.intermediate <= 1024


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Gemma"])
def test_every_output_of_every_dense_family_is_rehearsed(architecture: str, model_maker: Callable[..., Path],
                                                         tmp_path: Path) -> None:  # fmt: skip
    changes: dict[str, Any] = {} if architecture == "Llama" else {"vocab_size": 384}
    config = read_config(model_maker(tmp_path / "model", architecture, num_hidden_layers=3, **changes))
    pytest.importorskip("gguf")
    outputs = OUTPUTS if architecture == "Llama" else [OUTPUTS[0], OUTPUTS[3]]
    results = list(rehearse(Wanted(config=config, dtype="bfloat16", outputs=outputs, device="cpu")))
    layers = [result for result in results if result.index is not None]
    assert [result.index for result in layers] == [0, 1]
    for result in layers:
        assert len(result.outputs) == len(outputs)
        assert all(len(codes.codes) == 7 for codes in result.outputs.values())


@pytest.mark.slow
def test_the_process_marks_that_it_came_to_its_end(tmp_path: Path) -> None:
    wanted = Wanted(config=BASE | REAL["SmolLM2-135M"], dtype="bfloat16", outputs=[OUTPUTS[2]], device="cpu")
    process = rehearsing._start(wanted, tmp_path / "done")
    assert process.wait(120) == 0
    assert (tmp_path / "done").exists()
    broken = wanted.model_copy(update={"config": {"architectures": ["None"]}})
    process = rehearsing._start(broken, tmp_path / "not")
    assert process.wait(120) != 0
    assert not (tmp_path / "not").exists()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job as a machine with a card would see it."""
    (tmp_path / "r.yaml").write_text(
        f"model: qtool-demo\noutputs: {json.dumps(OUTPUTS)}\noutput_dir: {tmp_path}/artifacts\n"
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(rehearsing, "device_kind", lambda _: "a card")
    return replace(prepare(tmp_path / "r.yaml", "cpu"), device=torch.device("cuda"))


def with_room(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    room = int(gib * 2**30)
    needs = Resources("a card", 10**9, 10**9 + room, 0, None, 0, 0, "", None)
    monkeypatch.setattr(rehearsing, "needs_of", lambda *_, **__: needs)


def test_what_is_worth_a_rehearsal(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, 40)
    found = rehearsing._worth(job)
    assert [wanted.outputs[0]["name"] for wanted in found] == ["awq", "gptq", "nf4", "gguf", "q8"]
    assert rehearsing._worth(replace(job, device=torch.device("cpu"))) == []
    mark = rehearsing._mark(job, found[1])  # compiled before
    mark.parent.mkdir()
    mark.touch()
    job.outputs[2].folder.mkdir(parents=True)  # made before
    assert [wanted.outputs[0]["name"] for wanted in rehearsing._worth(job)] == ["awq", "gguf", "q8"]
    with_room(monkeypatch, 2.5)  # of the card beside the run itself
    assert len(rehearsing._worth(job)) == 2
    with_room(monkeypatch, 0.5)
    assert rehearsing._worth(job) == []


def test_rehearsals_end_with_the_block_and_never_fail_it(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, 40)
    started: list[subprocess.Popen[str]] = []

    def start(*_: object) -> subprocess.Popen[str]:
        if len(started) == 2:
            raise OSError("no more processes")
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], text=True))
        return started[-1]

    monkeypatch.setattr(rehearsing, "_start", start)
    with rehearsing.rehearsing(job):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.returncode for process in started)
    with pytest.raises(ValueError, match="of the run"), rehearsing.rehearsing(job):
        raise ValueError("of the run")


def test_the_types_of_budgets_are_rehearsed_side_by_side(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else, once for budgets that round alike; no type without a loss."""
    with_room(monkeypatch, 40)
    monkeypatch.setattr(rehearsing.os, "cpu_count", lambda: 16)
    wanted = [{"method": "gguf", "name": f"b{bits}", "budget": {"target_bpw": bits}} for bits in (5, 6)]
    methods = [METHODS["gguf"].model_validate(one) for one in wanted]
    outputs = [replace(job.outputs[3], method=method, folder=job.outputs[3].folder / method.name) for method in methods]
    found = rehearsing._worth(replace(job, outputs=(*outputs, job.outputs[0])))
    assert [list(one.widths) for one in found[:-1]] == [
        [kind] for kind in ("IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    ]
    assert found[-1].outputs[0]["name"] == "awq"
    assert all(width >= 256 and width % 256 == 0 for one in found[:-1] for own in one.widths.values() for width in own)
    monkeypatch.setattr(rehearsing.os, "cpu_count", lambda: 2)
    found = rehearsing._worth(replace(job, outputs=tuple(outputs)))
    assert sorted(kind for one in found for kind in one.widths) == sorted(
        ("IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    )
    assert len(found) == 2


@pytest.mark.parametrize("name", ["gguf", "gptq", "awq", "nf4"])
def test_what_a_rehearsal_of_types_is_told_is_a_section(name: str, job: Job) -> None:
    """A budget's own section has keys that no recipe may say beside it."""
    method = METHODS[name].model_validate({"method": name, "budget": {"target_bpw": 9}})
    for wanted in rehearsing._types(job, replace(job.outputs[0], method=method)):
        read = METHODS[name].model_validate(wanted.outputs[0])
        assert read.undecided is None
        assert read.model_copy(update={"name": method.name, "budget": method.undecided}) == method


@pytest.mark.parametrize(
    ("section", "kinds"),
    [({"method": "gguf"}, ("Q2_K", "IQ4_XS", "Q8_0")), ({"method": "gptq"}, ("int4-g128", "int8-g128"))],
)
def test_types_are_tried_as_a_survey_tries_them(section: dict[str, Any], kinds: tuple[str, ...]) -> None:
    pytest.importorskip("xllamacpp")
    wanted = Wanted(
        config={}, dtype="bfloat16", outputs=[section], device="cpu", widths={kind: [256] for kind in kinds}
    )
    tried = list(try_types(wanted))
    assert [list(one.shape) for one in tried] == [[2, 256, 256], [256, 256]] * len(kinds)


def test_a_survey_waits_for_the_type_that_it_needs(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []

    class Process:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self, timeout: float | None = None) -> None:
            waited.append(self.name)

        def kill(self) -> None:
            pass

    def start(wanted: Wanted, mark: Path) -> Any:
        return Process(",".join(wanted.widths))

    monkeypatch.setattr(rehearsing, "_start", start)
    one = Wanted(config={}, dtype="float32", outputs=[], device="cpu")
    worth = [one.model_copy(update={"widths": {kind: [256]}}) for kind in ("Q4_K", "Q5_K")]
    monkeypatch.setattr(rehearsing, "_worth", lambda _: worth)
    with rehearsing.rehearsing(job) as rehearsals:
        rehearsals.ready("Q5_K")
        assert waited == ["Q5_K"]
        rehearsals.ready("BF16")
        assert waited == ["Q5_K"]
