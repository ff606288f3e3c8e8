"""vLLM's loading rules, as vLLM 0.32 has them.

What it refuses, whatever the card, was seen by running its CPU build (scripts/check_vllm.py runs all of it again), and
so was its kernel for the CPU. Marlin's rules were read: model_executor/kernels/linear/mixed_precision/marlin.py asks
for the type, the group size, and groups that do not lie across ranks; shapes that its tiles do not divide are padded
with zeros, with a warning. Marlin and Machete themselves ran with vLLM 0.26, which asked for `out % 64 == 0` and
`in % 128 == 0` as well and took another kernel where that did not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from qtool.convert.models.expert_names import expert_of
from qtool.convert.models.shape import shape_of
from qtool.convert.models.table import find_family
from qtool.convert.runtimes.rule import Runtime, RuntimeRule, Subject, has_experts, heads, shards

VERSION = "0.32"
MARLIN_GROUPS = (-1, 32, 64, 128)
CPU_MULTIPLE = 32
EXPERTS_HIDDEN = 128
FOLDER = "vllm/model_executor/layers/quantization"
_KERNELS = "vllm/model_executor/kernels/linear/mixed_precision"
JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
          "up_proj": "gate_up_proj"}  # fmt: skip
Refuses = Callable[[Mapping[str, Any]], Iterator[str]]
"""quantization_config, or all of config.json -> why vLLM loads such a file on no platform."""


def runtime(
    refuses: Refuses, package: str = "", install: str = "", refuses_model: Refuses = lambda _: iter(())
) -> Runtime:
    """What a container needs in vLLM. ``package``: a plugin."""
    note = f"vLLM loads it with {package} only ({install}, in vLLM's environment)" if package else ""
    return Runtime("vllm", "vLLM", package, install, refuses, note, refuses_model=refuses_model)


def fuses_unnamed(config: Mapping[str, Any]) -> Iterator[str]:
    """Of its reader of bitsandbytes files, which asks the model's class what it keeps as one."""
    family = find_family(config)
    if family is not None and not family.vllm_names_fused:
        yield f"vLLM's class of {family.name} does not name its fused matrices, which its reader of NF4 asks for"


def takes_no_gptq(config: Mapping[str, Any]) -> Iterator[str]:
    """Of its reader of GPTQ files: run with 0.32, whose loader ends in an error for some classes."""
    family = find_family(config)
    if family is not None and not family.vllm_takes_gptq:
        yield (
            f"vLLM {VERSION}'s class of {family.name} does not load GPTQ files; take `format: compressed-tensors` or "
            "`method: awq`"
        )


def joined(linear: str) -> str | None:
    """The module that holds a linear together with others, which have to be stored alike: q, k and v; gate and up; all
    experts of a layer. None: it stands alone."""
    if expert_of(linear) is not None:
        return linear.partition(".experts.")[0] + ".experts"
    before, _, kind = linear.rpartition(".")
    return f"{before}.{JOINED[kind]}" if kind in JOINED else None


def named(linears: Iterable[str]) -> list[str]:
    """These linears, and what holds them in vLLM: what a list has to name that vLLM looks a module up in."""
    found = [name for linear in linears for name in (linear, joined(linear)) if name is not None]
    return list(dict.fromkeys(found))


def lacking(section: Mapping[str, Any], *keys: str) -> Iterator[str]:
    """Keys that vLLM's own reader of the section asks for."""
    yield from (f"quantization_config lacks {key!r}" for key in keys if section.get(key) is None)


def dtype_flag(config: Mapping[str, Any]) -> str | None:
    """What must follow ``--dtype`` where config.json says a dtype that vLLM does not run the model in: vllm/config/
    model.py, whose --dtype auto runs it in bfloat16 then."""
    family = find_family(config)
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return "bfloat16" if family and not family.float16 and said == "float16" else None


def _marlin(subject: Subject, tp: int) -> Iterator[str]:
    for whose, said in subject.geometries():
        if said["group_size"] not in MARLIN_GROUPS:
            yield f"{whose}group_size {said['group_size']} is not one of -1, 32, 64, 128"
        if said["bits"] not in (4, 8):
            yield f"{whose}bits is {said['bits']}; Marlin takes 4 and 8"
        if said.get("sym") is False and said["bits"] == 8:
            yield f"{whose}the grid is asymmetric with 8 bits; Marlin takes zero points with 4 bits only"
    yield from heads(subject, tp)
    yield from shards(subject, tp, multiple_out=1, multiple_in=1)


def _experts(subject: Subject, tp: int) -> Iterator[str]:
    """check_moe_marlin_supports_config of quantization/utils/marlin_utils.py. What this kernel does not take goes to
    the slower one of moe_wna16, which takes groups of 32 and more."""
    shape, group = shape_of(subject.config), int(subject.geometry.get("group_size") or 0)
    if shape.hidden % EXPERTS_HIDDEN:
        yield f"hidden_size {shape.hidden} is not a multiple of {EXPERTS_HIDDEN}"
    if group not in MARLIN_GROUPS:
        yield f"group_size {group} is not one of -1, 32, 64, 128"
    if tp > shape.experts:
        yield f"{shape.experts} experts on {tp} cards"
    elif shape.expert_width % tp:
        yield f"experts {shape.expert_width} wide do not split over {tp} cards"
    elif group > 0 and shape.expert_width // tp % group:
        yield (
            f"experts {shape.expert_width} wide on {tp} cards are {shape.expert_width // tp} wide, no multiple of the "
            f"group size {group}; --enable-expert-parallel gives each card whole experts"
        )


def _cpu(subject: Subject, tp: int) -> Iterator[str]:
    for whose, said in subject.geometries():
        if said["bits"] != 4:
            yield f"{whose}bits is {said['bits']}; vLLM on a CPU takes 4 only"
        if (said["group_size"] or 0) > 0 and said["group_size"] % 2:
            yield f"{whose}group_size {said['group_size']} is odd"
    yield from heads(subject, tp)
    yield from shards(subject, tp, CPU_MULTIPLE, CPU_MULTIPLE)


def loading(
    refuses: Refuses, source: str, title: str = "vLLM", refuses_model: Refuses = lambda _: iter(())
) -> RuntimeRule:
    """The rule that vLLM takes the file at all."""

    def broken(subject: Subject, _: int) -> Iterator[str]:
        yield from refuses(subject.quantization)
        yield from refuses_model(subject.config)

    return RuntimeRule("loading", title, VERSION, source, broken, proof="run")


def rules(
    file: str, refuses: Refuses, *more: RuntimeRule, refuses_model: Refuses = lambda _: iter(())
) -> tuple[RuntimeRule, ...]:
    """Loading, ``more``, and the kernels, which are worth a look only where it loads. ``file``: of vLLM's
    layers/quantization."""

    def loads(subject: Subject) -> bool:
        return not any(refuses(subject.quantization)) and not any(refuses_model(subject.config))

    kernels = (
        RuntimeRule("Marlin kernel", "vLLM", VERSION, f"{_KERNELS}/marlin.py", _marlin, True, applies=loads),
        RuntimeRule(
            "Marlin kernel for experts",
            "vLLM",
            VERSION,
            f"{FOLDER}/utils/marlin_utils.py",
            _experts,
            True,
            applies=lambda subject: loads(subject) and has_experts(subject),
        ),
        RuntimeRule("CPU kernel", "vLLM", VERSION, f"{_KERNELS}/cpu.py", _cpu, True, proof="run", applies=loads),
    )
    takes = loading(refuses, f"{FOLDER}/{file}", refuses_model=refuses_model)
    return takes, *(replace(rule, applies=loads) for rule in more), *kernels
