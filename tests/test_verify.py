"""Planted faults: each is named by `verify`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import converted

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.folder import file_entries
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.formats import autoawq, autogptq, bnb_nf4, compressed_tensors
from qtool.convert.formats.table import geometry_of
from qtool.convert.runtimes import rule as runtimes
from qtool.convert.verify.checks import verify
from qtool.convert.verify.verification import Verification

OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "group_size": 32},
    {"method": "gptq", "group_size": 32, "propagate_error": False},
    {"method": "gptq", "name": "v2", "group_size": 64, "sym": False, "propagate_error": False},
    {"method": "gptq", "name": "ct", "group_size": -1, "format": "compressed-tensors", "propagate_error": False},
    {"method": "nf4"},
]


@pytest.fixture(scope="module")
def artifacts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return converted(tiny, OUTPUTS, tmp_path_factory.mktemp("verify"))


@pytest.fixture
def copy(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifacts["awq"], tmp_path / "copy"))


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], resign: bool = True) -> None:
    """Edit one tensor; ``resign`` renews the manifest's sha256, as a writer with a bug would have."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})
    if resign:
        sign(folder)


def sign(folder: Path) -> None:
    manifest = read_manifest(folder).model_copy(update={"files": file_entries(folder)})
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def failures(result: Verification) -> str:
    return "\n".join(f"{c.name}: {c.detail}" for c in result.checks if c.status == "fail" and c.required)


@pytest.mark.parametrize("name", [output.get("name", output["method"]) for output in OUTPUTS])
def test_a_good_artifact_is_sound_and_unmade_checks_are_listed(
    name: str, artifacts: dict[str, Path], tiny: Path
) -> None:
    result = verify(artifacts[name])
    assert result.sound
    assert [c.name for c in result.checks if c.status == "not made"] == ["error against the source"]
    with_source = verify(artifacts[name], tiny)
    assert with_source.sound
    assert not [c for c in with_source.checks if c.status == "not made"]
    assert [c.detail for c in with_source.checks if c.name == "error against the source"] == ["14 linears as recorded"]


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config["quantization_config"][key]
        else:
            config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


Q = "model.layers.1.mlp.up_proj"
MODULES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LINEARS = [f"model.layers.{index}.{module}" for index in (0, 1) for module in MODULES]
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing file": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "one flipped bit": (
        lambda p: change_tensor(p, f"{Q}.qweight", lambda t: t ^ 1, resign=False),
        "model.safetensors has changed (sha256)",
    ),
    "shorter file": (lambda p: (p / "config.json").write_text("{}"), "config.json has 2 bytes"),
    "a stranger among the weights": (
        lambda p: save_file({"x": torch.zeros(1)}, p / "extra.safetensors"), "extra.safetensors is not in the manifest",
    ),
    "NaN": (
        lambda p: change_tensor(p, "model.norm.weight", lambda t: t * float("nan")),
        "model.norm.weight holds NaN or Inf",
    ),
    "zero scale": (lambda p: change_tensor(p, f"{Q}.scales", lambda t: t * 0), f"{Q}.scales holds zeros"),
    "wrong shape": (
        lambda p: change_tensor(p, f"{Q}.qzeros", lambda t: t[:-1]),
        f"{Q}.qzeros has shape [3, 32], expected [4, 32]",
    ),
    "lost key": (lambda p: edit_config(p, zero_point=None), "quantization_config lacks 'zero_point'"),
    "wrong group size": (lambda p: edit_config(p, group_size=64), "config.json says group_size 64"),
    "wrong version": (lambda p: edit_config(p, version="gemv"), "version is 'gemv'"),
    "wrong bits": (lambda p: edit_config(p, bits=8), "bits is 8"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_named(fault: str, copy: Path) -> None:
    plant, expected = FAULTS[fault]
    plant(copy)
    result = verify(copy)
    assert not result.sound
    assert expected in failures(result)


def rename(folder: Path, old: str, new: str | None) -> None:
    """Rename a tensor, or drop it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(old)
    if new is not None:
        tensors[new] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    sign(folder)


def edit_weights(folder: Path, **changes: Any) -> None:
    """Change what a compressed-tensors config says of the weights; None: say nothing."""
    config = json.loads((folder / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del weights[key]
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder)


def untie(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    sign(folder)


def edit_side(folder: Path, **changes: Any) -> None:
    side = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(side | changes))
    sign(folder)


def drop_side(folder: Path) -> None:
    (folder / "quantize_config.json").unlink()
    sign(folder)


def scramble_state(folder: Path) -> None:
    change_tensor(folder, f"{Q}.weight.quant_state.bitsandbytes__nf4", lambda t: t ^ 0x55)


EMBEDDING = "model.embed_tokens.weight"
FORMAT_FAULTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("awq", lambda p: rename(p, EMBEDDING, "model.embed_tokens.qweight"), "model.embed_tokens is quantized"),
    ("nf4", lambda p: rename(p, EMBEDDING, f"{EMBEDDING}.absmax"), "model.embed_tokens is quantized"),
    ("ct", lambda p: rename(p, EMBEDDING, "model.embed_tokens.weight_packed"), "model.embed_tokens is quantized"),
    ("awq", untie, "lm_head.weight is missing, and tie_word_embeddings is false"),
    ("awq", lambda p: edit_config(p, quant_method="hqq"), "quant_method 'hqq' cannot be read back"),
    *(("gptq", lambda p, k=key: edit_config(p, **{k: None}), f"quantization_config lacks {key!r}")
      for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")),
    ("gptq", lambda p: edit_config(p, checkpoint_format="gptq_v2"), "zero points are 7 in checkpoint_format 'gptq_v2'"),
    ("gptq", lambda p: change_tensor(p, f"{Q}.qzeros", lambda t: t * 0 - 0x77777778), "zero points are 9 in"),
    ("gptq", lambda p: edit_config(p, checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    ("gptq", lambda p: edit_config(p, bits=3), "bits is 3"),
    ("gptq", lambda p: edit_config(p, bits=8), "config.json says bits 8, the artifact was made with 4"),
    ("gptq", lambda p: edit_config(p, sym=False), "config.json says sym False, the artifact was made with True"),
    ("gptq", lambda p: edit_config(p, desc_act=True), "config.json says desc_act True"),
    ("gptq", lambda p: edit_config(p, lm_head=True), "lm_head is true, but the head is not quantized"),
    ("gptq", lambda p: edit_side(p, group_size=128), "disagree on group_size"),
    ("gptq", drop_side, "quantize_config.json is missing"),
    ("gptq", lambda p: rename(p, f"{Q}.g_idx", None), f"{Q}.g_idx is missing"),
    ("gptq", lambda p: rename(p, f"{Q}.qweight", f"{Q}.weight"), f"{Q} is missing"),
    ("gptq", lambda p: change_tensor(p, f"{Q}.scales", lambda t: t.float()), f"{Q}.scales is torch.float32"),
    ("v2", lambda p: edit_config(p, checkpoint_format="gptq"), "disagree on checkpoint_format"),
    ("ct", lambda p: edit_config(p, format="int-quantized"), "format is 'int-quantized'"),
    ("ct", lambda p: edit_config(p, quantization_status="frozen"), "quantization_status is 'frozen'"),
    ("ct", lambda p: edit_config(p, ignore=[]), "ignore lacks 'lm_head'"),
    ("ct", lambda p: edit_config(p, config_groups={}), "config_groups does not say bits"),
    ("ct", lambda p: edit_weights(p, symmetric=None), "config_groups does not say sym"),
    ("ct", lambda p: edit_weights(p, num_bits=8), "config.json says bits 8"),
    ("ct", lambda p: edit_weights(p, strategy="group", group_size=32), "config.json says group_size 32"),
    ("ct", lambda p: change_tensor(p, f"{Q}.weight_shape", lambda t: t.flip(0)), f"{Q}.weight_packed has shape"),
    ("ct", lambda p: change_tensor(p, f"{Q}.weight_scale", lambda t: t * 0), f"{Q}.weight_scale holds zeros"),
    ("gptq", lambda p: change_tensor(p, f"{Q}.scales", lambda t: t * 0), f"{Q}.scales holds zeros"),
    ("awq", lambda p: change_tensor(p, f"{Q}.scales", lambda t: -t), f"{Q}.scales holds zeros or negative"),
    ("nf4", lambda p: edit_config(p, load_in_4bit=False), "load_in_4bit is False"),
    ("nf4", lambda p: edit_config(p, bnb_4bit_quant_type="fp4"), "bnb_4bit_quant_type is 'fp4'"),
    ("nf4", lambda p: edit_config(p, bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage is 'bfloat16'"),
    ("nf4", lambda p: edit_config(p, bnb_4bit_compute_dtype=None), "bnb_4bit_compute_dtype is None"),
    ("nf4", lambda p: edit_config(p, llm_int8_skip_modules=[]), "llm_int8_skip_modules lacks 'lm_head'"),
    ("nf4", lambda p: edit_config(p, bnb_4bit_use_double_quant=False), "config.json says double_quant False"),
    ("nf4", lambda p: rename(p, f"{Q}.weight.nested_absmax", None), "the tensors say otherwise"),
    ("nf4", scramble_state, "is not the JSON of a bitsandbytes QuantState"),
    ("nf4", lambda p: change_tensor(p, f"{Q}.weight", lambda t: t[:-1]), f"{Q}.weight has shape [16383, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "suffix"), [("gptq", "scales"), ("ct", "weight_scale")])
def test_scales_of_symmetric_grids_may_be_negative(
    name: str, suffix: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """As made, both signs occur; turned round, the file is as sound."""
    scales = Artifact.open(artifacts[name]).checkpoint.tensor(f"{Q}.{suffix}")
    assert bool((scales < 0).any())
    assert bool((scales > 0).any())
    folder = Path(shutil.copytree(artifacts[name], tmp_path / "copy"))
    change_tensor(folder, f"{Q}.{suffix}", lambda t: -t)
    assert f"{Q}.{suffix}" not in failures(verify(folder))


@pytest.mark.parametrize(
    ("name", "plant", "expected"), FORMAT_FAULTS, ids=[f"{name}: {expected}" for name, _, expected in FORMAT_FAULTS]
)
def test_each_planted_fault_of_a_format_is_named(
    name: str, plant: Callable[[Path], Any], expected: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifacts[name], tmp_path / "copy"))
    plant(folder)
    result = verify(folder)
    assert not result.sound
    assert expected in failures(result)


SAME_SHAPE = {
    "gptq": ".qweight", "v2": ".qzeros", "ct": ".weight_packed", "nf4": ".weight", "awq": ".qweight",
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_SHAPE)
def test_codes_of_another_linear_pass_everything_but_the_source(
    name: str, artifacts: dict[str, Path], tmp_path: Path, tiny: Path
) -> None:
    """Well-formed and wrong: only the error against the source can tell."""
    copy = Path(shutil.copytree(artifacts[name], tmp_path / "copy"))
    suffix = SAME_SHAPE[name]
    other = load_file(copy / "model.safetensors")[f"{Q.replace('up', 'gate')}{suffix}"]
    change_tensor(copy, f"{Q}{suffix}", lambda _: other)
    assert verify(copy).sound
    result = verify(copy, tiny)
    assert not result.sound
    assert f"{Q}: |W - Ŵ|/|W| is" in failures(result)


def test_only_qtools_artifacts_can_be_verified(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(QtoolError, match=r"no qtool\.json"):
        verify(copy)
    assert Artifact.open(copy).manifest is None


@pytest.mark.parametrize("name", ["awq", "nf4"])
def test_another_models_weights_are_not_the_source(
    name: str, artifacts: dict[str, Path], model_maker: Callable[..., Path], tmp_path: Path
) -> None:
    wide = model_maker(tmp_path / "wide", hidden_size=256, head_dim=64, num_hidden_layers=1)
    told = failures(verify(artifacts[name], wide))
    assert "layers.0.self_attn.q_proj is [128, 128] here and [256, 256] there: not its source" in told
    assert "(+11 more)" in told


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ledger": {name: {} for name in LINEARS}}, f"the ledger has no error (frobenius) of {LINEARS[0]}"),
        ({"ledger": {"model.layers.9.x": {"frobenius": 1.0}}}, "model.layers.9.x is missing"),
        ({"output": {"dtype": 7}}, "scales is torch.float16, expected torch.float32"),
    ],
)
def test_a_manifest_that_makes_no_sense_fails_its_checks(
    changes: dict[str, Any], expected: str, copy: Path, tiny: Path
) -> None:
    edit_manifest(copy, **changes)
    assert expected in failures(verify(copy, tiny))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/dev/zero", "a/../../b"])
def test_a_manifest_reads_no_file_outside_its_folder(name: str, copy: Path) -> None:
    """/dev/zero has 0 bytes for `stat`, and no end for whoever hashes it."""
    edit_manifest(copy, files={name: {"bytes": 0, "sha256": "0" * 64}})
    with pytest.raises(QtoolError, match="names a file outside its folder"):
        verify(copy)


@pytest.mark.parametrize("size", [0, -3, "32", None, True])
def test_a_group_size_that_is_none(size: Any, artifacts: dict[str, Path], tmp_path: Path) -> None:
    for name in ("awq", "gptq"):
        folder = Path(shutil.copytree(artifacts[name], tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["group_size"] = size
        (folder / "config.json").write_text(json.dumps(config))
        sign(folder)
        with pytest.raises(QtoolError, match=r"group_size is .*; a number above 0, or -1, is needed"):
            list(Artifact.open(folder).read())
        assert not verify(folder).sound


def test_parts_that_do_not_fit_together_are_named(artifacts: dict[str, Path], tmp_path: Path) -> None:
    faults: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
        "awq": (f"{Q}.scales", lambda t: t[:-1], "zeros"),
        "gptq": (f"{Q}.g_idx", lambda t: t - 1, "g_idx does not name one of 4 groups"),
        "ct": (f"{Q}.weight_scale", lambda t: t[:-8], "codes of 256 rows"),
        "nf4": (f"{Q}.weight.absmax", lambda t: t[:-1], "32768 weights in blocks of 64"),
    }
    for name, (tensor, change, said) in faults.items():
        folder = Path(shutil.copytree(artifacts[name], tmp_path / name))
        change_tensor(folder, tensor, change)
        with pytest.raises(QtoolError, match=f"{Q} does not fit its config.json .*{said}"):
            Artifact.open(folder).codes(Q)
    (folder / "config.json").write_text(json.dumps({"quantization_config": ["nf4"]}))
    with pytest.raises(QtoolError, match="quantization_config is no mapping"):
        Artifact.open(folder)


def test_a_broken_manifest_is_named(copy: Path) -> None:
    (copy / MANIFEST).write_text('{"qtool": 1}')
    with pytest.raises(QtoolError, match=r"qtool\.json: not a manifest"):
        verify(copy)


CONFIG = {
    "num_attention_heads": 32, "num_key_value_heads": 8,
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}  # fmt: skip
LLAMA_8B = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip
BY_COLUMNS = frozenset(("o_proj", "down_proj"))


def broken(runtime: str, rule: str, tp: int, linears: dict[str, tuple[int, int]], **quantization: Any) -> list[str]:
    # CONFIG holds a section there
    config = CONFIG | {"quantization_config": {**CONFIG["quantization_config"], **quantization}}  # type: ignore[dict-item]
    subject = runtimes.Subject(
        config, linears, by_columns=BY_COLUMNS, geometry=geometry_of(config["quantization_config"])
    )
    found = next(r for r in autoawq.RULES if (r.runtime, r.name) == (runtime, rule))
    return list(found.broken(subject, tp))


def test_runtime_rules() -> None:
    for tp in runtimes.TENSOR_PARALLEL:
        assert not broken("vLLM", "plain kernel", tp, LLAMA_8B)
        assert not broken("vLLM", "Marlin kernel", tp, LLAMA_8B)
    # tiles that do not fit are padded since 0.32; SGLang's Marlin is the older one
    assert not broken("vLLM", "Marlin kernel", 1, LLAMA_8B | {"q_proj": (4096, 4160)}, group_size=32)
    assert not broken("vLLM", "Marlin kernel", 1, {"q_proj": (576, 576), "down_proj": (576, 1536)}, group_size=64)
    assert broken("SGLang", "Marlin kernel", 1, LLAMA_8B | {"q_proj": (4096, 4160)}, group_size=32) == [
        "q_proj: in 4160 is not a multiple of 128"
    ]
    assert broken("vLLM", "Marlin kernel", 2, LLAMA_8B | {"o_proj": (4096, 4160)}, group_size=64) == [
        "o_proj: in 2080 is not a multiple of the group size 64"
    ]
    assert broken("vLLM", "CPU kernel", 1, LLAMA_8B | {"k_proj": (1040, 4096)}) == [
        "k_proj: out 1040 is not a multiple of 32"
    ]
    assert broken("vLLM", "Marlin kernel", 1, LLAMA_8B, group_size=16)[0].startswith("group_size 16")
    assert broken("SGLang", "Marlin kernel", 1, LLAMA_8B, zero_point=False) == ["zero_point is not true"]
    assert broken("vLLM", "loading", 1, LLAMA_8B, zero_point=False)[0].startswith("zero_point is false")
    # 18944 = 148 * 128: its eighth is no multiple of the group
    assert broken("vLLM", "plain kernel", 8, LLAMA_8B | {"down_proj": (3584, 18944)}) == [
        "down_proj: in 2368 is not a multiple of the group size 128"
    ]
    assert broken("vLLM", "plain kernel", 1, LLAMA_8B | {"k_proj": (1020, 4096)}) == [
        "k_proj: out 1020 is not a multiple of 8"
    ]


def gptq_subject(linears: dict[str, tuple[int, int]], **quantization: Any) -> runtimes.Subject:
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    heads = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}
    section |= quantization
    config = heads | {"quantization_config": section}
    return runtimes.Subject(config, linears, by_columns=BY_COLUMNS, geometry=geometry_of(section))


def reasons(rules: tuple[runtimes.RuntimeRule, ...], runtime: str, subject: runtimes.Subject, tp: int = 1) -> list[str]:
    """Of all rules for accelerators that are not required and say something of the subject."""
    asked = [rule for rule in rules if rule.runtime == runtime and not rule.required and rule.name != "CPU kernel"]
    return [reason for rule in asked if rule.applies(subject) for reason in rule.broken(subject, tp)]


def test_gptq_kernels() -> None:
    for tp in runtimes.TENSOR_PARALLEL:
        for group_size in (-1, 32, 64, 128):
            assert not reasons(autogptq.RULES, "vLLM", gptq_subject(LLAMA_8B, group_size=group_size), tp)
    assert reasons(autogptq.RULES, "SGLang", gptq_subject(LLAMA_8B, sym=False)) == [
        "the grid is asymmetric (sym: false); Marlin takes symmetric ones"
    ]
    assert not reasons(autogptq.RULES, "SGLang", gptq_subject(LLAMA_8B, bits=8))
    assert not reasons(autogptq.RULES, "vLLM", gptq_subject({"q_proj": (96, 192)}, group_size=32))
    narrow = reasons(autogptq.RULES, "SGLang", gptq_subject({"q_proj": (96, 192)}, group_size=32))
    assert narrow == ["q_proj: out 96 is not a multiple of 64", "q_proj: in 192 is not a multiple of 128"]
    assert not reasons(autogptq.RULES, "AutoGPTQ", gptq_subject(LLAMA_8B, checkpoint_format="gptq"))
    assert reasons(autogptq.RULES, "AutoGPTQ", gptq_subject(LLAMA_8B, checkpoint_format="gptq_v2"))
    stranger = gptq_subject(LLAMA_8B, checkpoint_format="gptq")
    stranger.config["model_type"] = "qwen3_moe"
    assert reasons(autogptq.RULES, "AutoGPTQ", stranger) == ["it knows no models of type 'qwen3_moe'"]


def test_zero_points_that_a_version_cannot_hold() -> None:
    rule = next(rule for rule in autogptq.RULES if rule.name == "zero points")
    for sym, version, zeros, good in (
        (True, "gptq", (8, 8), True), (True, "gptq_v2", (8, 9), False), (False, "gptq_v2", (0, 15), True),
        (False, "gptq", (0, 15), False), (False, "gptq", (1, 15), True),
    ):  # fmt: skip
        subject = gptq_subject(LLAMA_8B, sym=sym, checkpoint_format=version)
        subject.zeros["q_proj"] = zeros
        assert (not list(rule.broken(subject, 1))) == good


def test_compressed_tensors_and_nf4_kernels() -> None:
    config = {"num_attention_heads": 32, "num_key_value_heads": 8}
    for sym, bits, good in ((True, 4, True), (True, 8, True), (False, 4, True), (False, 8, False)):
        section = compressed_tensors.quantization_config(bits, 128, sym, False)
        subject = runtimes.Subject(config | {"quantization_config": section}, LLAMA_8B, geometry=geometry_of(section))
        assert (not reasons(compressed_tensors.RULES, "vLLM", subject)) == good
    section = bnb_nf4.quantization_config(True, ["lm_head"])
    subject = runtimes.Subject(
        config | {"quantization_config": section}, LLAMA_8B | {"k_proj": (1000, 4128)}, geometry=geometry_of(section)
    )
    assert reasons(bnb_nf4.RULES, "bitsandbytes", subject) == [
        "k_proj: out 1000 is not a multiple of 32", "k_proj: in 4128 is not a multiple of 64"
    ]  # fmt: skip


def test_groups_of_scattered_columns_need_their_mark(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Kernels that are told desc_act false do not look at g_idx."""
    folder = Path(shutil.copytree(artifacts["gptq"], tmp_path / "copy"))
    change_tensor(folder, f"{Q}.g_idx", lambda t: t.flip(0))
    result = verify(folder)
    assert not result.sound
    assert f"{Q}: g_idx is not i // group_size, and desc_act is false" in failures(result)


def test_an_old_file_with_desc_act_is_refused_by_vllms_rule(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """As qtool wrote act-order before 0.32 refused it: sound, but vLLM does not load it."""
    folder = Path(shutil.copytree(artifacts["gptq"], tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST).read_text())
    edit_config(folder, desc_act=True)
    edit_side(folder, desc_act=True)
    renewed = json.loads((folder / MANIFEST).read_text())
    edit_manifest(folder, files=renewed["files"], output=manifest["output"] | {"desc_act": True})
    result = verify(folder)
    assert result.sound
    (check,) = [check for check in result.checks if check.name.startswith("vLLM")]
    assert (check.name, check.status) == ("vLLM 0.32: loading", "fail")
    assert "desc_act is true" in check.detail
