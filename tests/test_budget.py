"""Types by budget, through the whole pipeline on a small model: sizes, keys, what is kept, what is refused; and what a
survey tells against derivatives that autograd computes on the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTURES
from pydantic import ValidationError
from small_models import make_model

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.chosen import read_chosen
from qtool.convert.files.manifest import read_manifest
from qtool.convert.files.source import resolve
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.convert.verify.checks import verify
from qtool.evaluate.engines.llama_cpp import serve
from qtool.evaluate.engines.torch_model import load_model
from qtool.make import budgets, measured, needs
from qtool.make.job import Job, artifact_key, open_job
from qtool.make.mixes import planned
from qtool.make.outputs import make_artifacts
from qtool.make.peaks import Work
from qtool.make.writer import OutputWriter
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.budget import Budget
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.method import LayerCodes
from qtool.quantize.precision import fast_bfloat16
from qtool.quantize.ranks import ALONE
from qtool.quantize.source_model import SourceModel
from qtool.quantize.survey import TABLE, Begun, Survey, telling
from qtool.quantize.walk import LayerResult
from qtool.recipe.sections import checked_recipe

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
TEXT = CalibrationSet(torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0)), "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for super-blocks."""
    return make_model(tmp_path_factory.mktemp("budget") / "wide", hidden_size=256, intermediate_size=512)


def job_of(model: Path, folder: Path, *outputs: dict[str, Any]) -> Job:
    wanted = [{"method": "gguf", "rounding": "ggml", **output} for output in outputs]
    recipe = checked_recipe({"model": str(model), "outputs": wanted, "output_dir": str(folder)}, "test")
    return open_job(recipe, resolve(str(model)), torch.device("cpu"), recipe.outputs)


def made(job: Job) -> dict[str, Artifact]:
    return make_artifacts(budgets.decided(job, TEXT), TEXT)


ASKED = {"rounding": "ggml", "budget": {"target_bpw": 4.6}}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Of ASKED, made by a run that nothing stopped; beside it lies what was measured for it. Never changed."""
    (artifact,) = made(job_of(model, tmp_path_factory.mktemp("whole") / "artifacts", ASKED)).values()
    return artifact


def gguf_of(artifact: Artifact) -> Path:
    (file,) = (path for path in artifact.path.glob("*.gguf") if path.name != "imatrix.gguf")
    return file


def test_outputs_of_one_rule_are_written_as_ever() -> None:
    """Keys of artifacts and recipes are digests of this."""
    assert GgufMethod(method="gguf").model_dump(mode="json") == {
        "method": "gguf", "name": "gguf", "type": "Q4_K_M", "imatrix": True, "rounding": None, "damp_percent": 0.1,
        "propagate_error": True, "propagate_strength": 0.5, "pre_tokenizer": None,
    }  # fmt: skip


def test_sizes_are_kept_and_llama_cpp_reads_the_file(model: Path, tmp_path: Path) -> None:
    outputs = [{"name": "bits", "budget": {"target_bpw": 4.6}}, {"name": "size", "budget": {"max_size": "0.9 MB"}}]
    artifacts = made(job_of(model, tmp_path, *outputs))
    bits, size = artifacts["bits"], artifacts["size"]
    manifest, chosen = read_manifest(bits.path), read_chosen(bits.path)
    assert chosen is not None
    assert 0.99 * 4.6 < 8 * manifest.tensor_bytes / manifest.parameters <= 4.6  # 15 matrices leave gaps
    assert chosen.nbytes == manifest.tensor_bytes
    assert chosen.mix == manifest.output["mix"]
    assert len(set(chosen.mix.values())) > 2
    assert 0.99 * 900_000 < gguf_of(size).stat().st_size <= 900_000
    for artifact in artifacts.values():
        assert verify(artifact.path).sound
        with serve(gguf_of(artifact), 64) as url:
            assert url
    layout = bits.file.layout
    assert layout["blk.0.attn_v.weight"][0] == chosen.mix["model.layers.0.self_attn.v_proj"]
    assert layout["token_embd.weight"][0] == chosen.mix["model.embed_tokens"]


def test_a_mix_that_the_manifest_does_not_tell_fails(whole: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.path, tmp_path / whole.path.name)
    assert verify(folder).sound
    path = folder / "qtool.json"
    told = json.loads(path.read_text())
    module = "model.layers.1.mlp.up_proj"
    told["output"]["mix"][module] = "Q8_0" if told["output"]["mix"][module] != "Q8_0" else "Q4_K"
    path.write_text(json.dumps(told))
    found = verify(folder)
    assert not found.sound
    assert any("blk.1.ffn_up.weight is " in check.detail for check in found.checks if check.status == "fail")


def test_costs_are_measured_once_and_the_mix_is_in_the_key(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = budgets.decided(job_of(model, tmp_path, {"budget": {"target_bpw": 4.6}}), TEXT)
    monkeypatch.setattr(budgets, "_measure", None)  # a second measurement would fail
    again = budgets.decided(job_of(model, tmp_path, {"budget": {"target_bpw": 4.6}}), TEXT)
    assert again.outputs[0].method == first.outputs[0].method
    keys = [artifact_key(job, job.outputs[0], TEXT) for job in (first, again)]
    assert keys[0] == keys[1]
    other = budgets.decided(job_of(model, tmp_path, {"budget": {"target_bpw": 5.6}}), TEXT)
    assert artifact_key(other, other.outputs[0], TEXT) != keys[0]
    planned = budgets.known(job_of(model, tmp_path, {"budget": {"target_bpw": 4.6}}))  # neither weights nor text
    assert planned.outputs[0].plan == first.outputs[0].plan
    assert "expected KL" in planned.outputs[0].notes[-1]


def test_a_finished_artifact_needs_no_measurement(
    model: Path, whole: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.path.parent, tmp_path / "a")
    for kept in (tmp_path / "a" / budgets.FOLDER).iterdir():
        kept.unlink()
    monkeypatch.setattr(budgets, "_measure", None)
    (again,) = made(job_of(model, tmp_path / "a", ASKED)).values()
    assert (again.path / "qtool.json").read_bytes() == (whole.path / "qtool.json").read_bytes()


def test_an_interrupted_run_ends_in_the_same_bytes(
    model: Path, whole: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first layer; the costs that were measured are still there."""
    real = OutputWriter.commit

    def die(writer: OutputWriter, result: LayerResult, codes: LayerCodes) -> None:
        if result.index == 1:
            raise OSError("the power is gone")
        real(writer, result, codes)

    monkeypatch.setattr(OutputWriter, "commit", die)
    with pytest.raises(OSError, match="power"):
        made(job_of(model, tmp_path / "b", ASKED))
    monkeypatch.setattr(OutputWriter, "commit", real)
    monkeypatch.setattr(budgets, "_measure", None)
    (again,) = made(job_of(model, tmp_path / "b", ASKED)).values()
    assert gguf_of(again).read_bytes() == gguf_of(whole).read_bytes()
    assert (again.path / "budget.json").read_bytes() == (whole.path / "budget.json").read_bytes()


@pytest.mark.parametrize("layer", [1, 0])
def test_a_survey_that_is_killed_goes_on(
    layer: int, model: Path, whole: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once the matrices from ``layer`` on are measured: these are not measured again, and all costs are as they
    would have been."""

    def kept(folder: Path) -> list[bytes]:
        return [path.read_bytes() for path in (folder / budgets.FOLDER).iterdir()]

    real = measured.keeper

    def dying(path: Path, made_from: str) -> Callable[[Begun], None]:
        def keep(begun: Begun) -> None:
            real(path, made_from)(begun)
            if begun.layer == layer:
                raise KeyboardInterrupt

        return keep

    monkeypatch.setattr(budgets, "keeper", dying)
    with pytest.raises(KeyboardInterrupt):
        budgets.decided(job_of(model, tmp_path / "b", ASKED), TEXT)
    monkeypatch.setattr(budgets, "keeper", real)
    layers: list[int] = []
    back = Survey._back
    monkeypatch.setattr(Survey, "_back", lambda self, index, *rest: (layers.append(index), back(self, index, *rest))[1])
    budgets.decided(job_of(model, tmp_path / "b", ASKED), TEXT)
    assert layers == list(reversed(range(layer)))
    assert kept(tmp_path / "b") == kept(whole.path.parent)  # and nothing else is left there


@pytest.mark.parametrize("damage", ["cut", "other text"])
def test_what_a_killed_survey_left_is_not_trusted(
    damage: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "under.begun"
    measured.keeper(place, "this")(Begun(1, {"lm_head": {"Q8_0": 0.5}}, [torch.ones(1, 2, 3)]))
    whole = measured.begun_at(place, "this")
    assert whole is not None
    assert (whole.layer, whole.costs) == (1, {"lm_head": {"Q8_0": 0.5}})
    assert torch.equal(whole.gradients[0], torch.ones(1, 2, 3))
    if damage == "cut":
        place.write_bytes(place.read_bytes()[:-5])
    assert measured.begun_at(place, "this" if damage == "cut" else "that") is None
    assert not place.exists()
    assert ("damaged" in capsys.readouterr().err) == (damage == "cut")


def test_a_mix_by_hand_is_the_same_file(model: Path, whole: Artifact, tmp_path: Path) -> None:
    mix = read_manifest(whole.path).output["mix"]
    (other,) = made(job_of(model, tmp_path, {"mix": mix})).values()
    assert gguf_of(other).read_bytes() == gguf_of(whole).read_bytes()


def test_the_smallest_file_that_keeps_a_divergence(model: Path, tmp_path: Path) -> None:
    job = budgets.decided(job_of(model, tmp_path, *({"name": f"k{i}", "budget": {"max_kld": kld}}
                                                    for i, kld in enumerate((0.5, 0.01)))), TEXT)  # fmt: skip
    loose, tight = (output.chosen for output in job.outputs)
    assert loose is not None
    assert tight is not None
    assert loose.expected * budgets.FACTOR <= 0.5
    assert tight.expected * budgets.FACTOR <= 0.01
    assert loose.nbytes < tight.nbytes


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"target_bpw": 1.5}, r"target_bpw 1\.5 is too small.*The nearest that works: target_bpw 2\.\d+\."),
        ({"max_size": "0.2 MB"}, r"The nearest that works: max_size 0\.\d+ MB"),
        ({"target_bpw": 17}, "less than or equal to 16"),
        ({"target_bpw": 4, "max_kld": 1}, "target_bpw and max_kld are given"),
        ({}, "none is given"),
        ({"max_size": "22"}, "a size is needed, as `22 GB`"),
        ({"fits": {"card": "rtx4091", "context": 128}}, "Did you mean RTX4090"),
        ({"fits": {"card": "RTX4090", "context": "32k"}}, "more than the 256 tokens"),
    ],
)
def test_budgets_that_cannot_be_kept(model: Path, tmp_path: Path, budget: dict[str, Any], said: str) -> None:
    with pytest.raises(QtoolError, match=said):
        job_of(model, tmp_path, {"budget": budget})


def test_a_budget_that_the_header_eats_is_refused_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    """Between the smallest tensors and the smallest file, whose header holds the vocabulary; what is named works."""
    whole = job_of(model, tmp_path, {"budget": {"target_bpw": 16}})
    method, shape = whole.outputs[0].method, budgets._shape(whole)
    smallest = planned(method, method.offers(shape), shape).nbytes
    for more in (-0.1, 0.002):
        asked = {"budget": {"max_size": f"{smallest / 1e6 + more:.4f} MB"}}
        with pytest.raises(QtoolError, match=r"output 'gguf': .*too small.*that works: max_size 0\.\d+ MB") as caught:
            job_of(model, tmp_path, asked)
        nearest = caught.value.message.rstrip(".").rpartition("max_size ")[2]
        assert job_of(model, tmp_path, {"budget": {"max_size": nearest}}).outputs[0].plan.nbytes >= smallest


@pytest.mark.parametrize(
    ("architecture", "method", "why"),
    [
        ("IQuestLoopCoder", {"method": "gptq"}, "a model whose layers run twice"),
        ("Qwen3Moe", {"method": "gptq"}, "a mixture of experts"),
        ("Mixtral", {"method": "gguf"}, "a mixture of experts"),
    ],
)
def test_models_without_a_survey_are_refused_by_the_plan(
    architecture: str, method: dict[str, Any], why: str, tmp_path: Path
) -> None:
    odd = make_model(tmp_path / "odd", architecture, **MIXTURES.get(architecture, {}))
    section = {"rounding": "ggml"} if method["method"] == "gguf" else {}
    data = {"model": str(odd), "outputs": [method | section | {"budget": {"target_bpw": 8}}]}
    recipe = checked_recipe(data, "test")
    with pytest.raises(QtoolError, match=f"budget: .* not measured yet for {why}: leave out `budget:`"):
        open_job(recipe, resolve(str(odd)), torch.device("cpu"), recipe.outputs)


def test_the_nearest_that_is_named_works(model: Path, tmp_path: Path) -> None:
    with pytest.raises(QtoolError) as caught:
        job_of(model, tmp_path, {"budget": {"target_bpw": 1}})
    nearest = float(caught.value.message.rstrip(".").rpartition(" ")[2])
    assert job_of(model, tmp_path, {"budget": {"target_bpw": nearest}}).outputs[0].plan.bits_per_weight <= nearest


def test_type_and_budget_exclude_each_other(model: Path, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="`type` and `budget` both say"):
        job_of(model, tmp_path, {"type": "Q4_K_M", "budget": {"target_bpw": 5}})


@pytest.mark.parametrize("mix", [{"model.layers.9.mlp.up_proj": "Q4_K"}, {"model.embed_tokens": "Q4_K"}])
def test_mixes_that_are_not_of_the_model(model: Path, tmp_path: Path, mix: dict[str, str]) -> None:
    with pytest.raises(QtoolError, match=r"mix: (names model.layers.9.mlp.up_proj|gives blk.\d.* no type)"):
        job_of(model, tmp_path, {"mix": mix})


def test_a_card_that_must_hold_it(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path, {"budget": {"fits": {"card": "rtx-4090", "context": 128, "users": 2}}})
    assert job.outputs[0].plan.bits_per_weight == pytest.approx(16, abs=0.2)  # all of it fits as it is


def noise(weight: torch.Tensor) -> torch.Tensor:
    """The same for the same shape."""
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return drawn * 0.03 * weight.float().square().mean().sqrt()


def test_memory_that_measuring_takes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the plan before types are known, and refused before the work."""
    asked = {"budget": {"target_bpw": 4.6}}
    job = job_of(model, tmp_path, asked)
    work = Work(job.recipe.calibration, job.decoder, job.checkpoint.tensors, job.outputs, job.device)
    on_device, kept = work.measuring()
    assert kept > 2 * 2 * 8192 * 256 * (1 if fast_bfloat16() else 2)  # two layers' inputs, 256 channels
    assert on_device > 6 * 8 * 256**2 + 8 * 512**2
    plain = needs.needs_of(job_of(model, tmp_path, {"type": "Q8_0"})).host_bytes
    assert needs.needs_of(job_of(model, tmp_path, asked)).host_bytes > plain + kept
    monkeypatch.setattr(needs, "host_memory", lambda: 1000)
    with pytest.raises(QtoolError, match="cannot be measured here what types cost: host memory") as caught:
        budgets.decided(job_of(model, tmp_path, asked), TEXT)
    assert caught.value.exit_code == 3


class Noisy(GgufMethod):
    """Its types have an error that a whole model can be given, too."""

    def trial(self, weight: torch.Tensor, type_name: str, gram: Any, factor: Any) -> torch.Tensor:
        """Of any type."""
        return weight.float() + noise(weight)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"tie_word_embeddings": False}), "Qwen2": ("Qwen2", {}), "Qwen3": ("Qwen3", {}),
    "Gemma2": ("Gemma2", {"query_pre_attn_scalar": 32}),  # its embedding is scaled, its logits are capped
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_survey_tells_is_the_curvature_of_the_divergence(name: str, tmp_path: Path) -> None:
    """A small error of one matrix: KL by two forwards of the whole model against the survey's sum, both on the survey's
    own text. The survey takes tokens and outputs for independent and draws one label a token."""
    architecture, changes = FAMILIES[name]
    folder = make_model(tmp_path / "m", architecture, **({"vocab_size": 384} | changes))
    config = load_config(folder)
    job = job_of(folder, Path("/nowhere"), {"type": "Q8_0"})
    whole: Any = load_model(job.checkpoint.read(), config, torch.device("cpu")).float()
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    modules = [up, down, "model.embed_tokens", *(["lm_head"] if not config.tie_word_embeddings else [])]
    survey = Survey(
        SourceModel(build_skeleton(config), job.decoder, job.checkpoint, torch.device("cpu"), ALONE),
        Noisy(method="gguf"), {module: ["Q8_0"] for module in modules},
    )  # fmt: skip
    expected = survey.run(TEXT)
    with torch.inference_mode():
        source = whole(TEXT.tokens).logits.log_softmax(-1)
        for module in modules:
            weight = whole.get_submodule(module).weight
            before = weight.clone()
            weight.add_(noise(weight))
            other = whole(TEXT.tokens).logits.log_softmax(-1)
            weight.copy_(before)
            measured = float((source.exp() * (source - other)).sum(-1).mean())
            assert 0.5 < expected[module]["Q8_0"] / measured < 2, (module, measured)


def test_of_a_large_table_the_rows_that_count_are_looked_at() -> None:
    """What a few rows count is exact; of the others, which count alike, some stand for all."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.rand(50_000, generator=generator) * 1e-3
    heavy = torch.randperm(len(counts), generator=generator)[:1000]
    counts[heavy] += 5.0
    losses = torch.rand(len(counts), generator=generator) + 1
    rows, share = telling(counts)
    assert len(rows) == len(set(rows.tolist())) == TABLE
    assert set(heavy.tolist()) <= set(rows.tolist())
    assert float(share.sum()) == pytest.approx(float(counts.sum()), rel=1e-4)
    assert float((share * losses[rows]).sum()) == pytest.approx(float((counts * losses).sum()), rel=2e-3)
    small = counts[:100]
    assert torch.equal(telling(small)[1], small)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0, -1, True])
def test_a_divergence_is_a_number(value: float) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate({"max_kld": value})
