"""`qtool init`: a first recipe for a model, this machine and a card, from headers alone, and why it is so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, get_args

import torch
import yaml

from qtool import QtoolError
from qtool.convert.files.source import SHIPPED
from qtool.convert.formats.table import runs_in
from qtool.convert.models.shape import decoder_of
from qtool.convert.models.table import find_family
from qtool.make.needs import host_memory
from qtool.make.peaks import LIBRARIES
from qtool.quantize.memory import peak_bytes
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.table import METHODS
from qtool.runs.evidence import size_text
from qtool.serve.here import card_here
from qtool.sizing.accelerators import Accelerator
from qtool.sizing.formats import GROUPS, SOURCE, method_of, weights_of
from qtool.sizing.headers import Headers, read_headers
from qtool.sizing.plan import Answer, Plan, Question, make_plan

GIB = 2**30
SAMPLES = (128, 64, 32, 16)  # windows of calibration: the most that fit the memory
LENGTH = 512
ON_CARDS, ELSEWHERE = "awq", "Q4_K_M"  # formats taken where nobody names a method


@dataclass(frozen=True)
class Starter:
    """A recipe as text, and what it rests on; ``missing``: packages that its outputs need and that are not here."""

    text: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """What was looked at: the model's headers, the card to serve it on, this machine's memory."""

    headers: Headers
    card: Accelerator
    free: int | None
    device: str


def look(model: str, card: str | None, revision: str | None = None) -> Seen:
    """Headers, card and machine. Raises QtoolError where there is no model, or one that is quantized already."""
    headers = read_headers(model, revision)
    if headers.quantized:
        raise QtoolError(f"{model}: is quantized already; name the 16-bit model that it was made from.")
    if find_family(headers.config) is None:
        weights_of(headers, ON_CARDS)  # says what is known
    device = "cuda" if torch.cuda.is_available() else "cpu"
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else host_memory()
    return Seen(headers, card_here(card, weights_of(headers, SOURCE).nbytes), free, device)


def default_format(card: Accelerator) -> str:
    """What is taken where nobody says: llama.cpp's file for processors and unified memory, else AWQ."""
    return ELSEWHERE if card.processor or card.unified else ON_CARDS


def formats_of(names: Sequence[str], card: Accelerator) -> list[str]:
    """Methods (`gguf`) or formats (`Q4_K_M`, `awq-g64`) as `qtool plan` calls them. Raises QtoolError naming all."""
    found = []
    for name in names or [default_format(card)]:
        by_case = {short.lower(): short for method in METHODS.values() for short in method.short}
        plain = by_case.get(name.lower(), name)
        found.append(ELSEWHERE if plain.lower() == "gguf" else plain)
        try:
            known = method_of(found[-1]) is not None
        except QtoolError:
            known = False
        if not known:
            formats = ", ".join(sorted({short for method in METHODS.values() for short in method.short}))
            raise QtoolError(f"--method {name}: is no method ({', '.join(METHODS)}) and no format ({formats}).")
    return list(dict.fromkeys(found))


def write_starter(seen: Seen, formats: Sequence[str]) -> Starter:
    """The recipe for these formats. Raises QtoolError where the model cannot be written in one of them."""
    headers = seen.headers
    methods = [_fitting(headers, name) for name in formats]
    samples, memory = _samples(seen, methods)
    length = min(LENGTH, headers.geometry.max_context or LENGTH)
    missing = tuple(why for method in methods if (why := _missing(method, seen.device)))
    parts = [_head(seen, formats, missing), _model(headers), _calibration(samples, length, memory)]
    parts += [_outputs(seen, methods, formats), _evaluate(headers, length), _gates(headers)]
    return Starter("\n\n".join(map(_aligned, parts)) + "\n", missing)


def _aligned(part: str) -> str:
    """Comments behind values begin in one column of a section."""
    lines = [
        line.partition("  # ") if not line.lstrip().startswith("#") else (line, "", "") for line in part.split("\n")
    ]
    at = max((len(code.rstrip()) for code, mark, _ in lines if mark), default=0)
    return "\n".join(f"{code.rstrip():{at}}  # {said.strip()}" if mark else code for code, mark, said in lines)


def _head(seen: Seen, formats: Sequence[str], missing: Sequence[str]) -> str:
    geometry, source = seen.headers.geometry, weights_of(seen.headers, SOURCE)
    unit, word = (1e9, "billion") if source.parameters >= 1e9 else (1e6, "million")
    context = f"{geometry.max_context or 0:,} tokens of context"
    free = " of memory free" if seen.card.processor else ""
    told = [
        f"Written by `qtool init` (qtool {version('qtool-llm')}). Every key: `qtool recipes --keys`.",
        "  qtool run THIS-FILE --dry-run     the plan: no weight is read",
        "  qtool run THIS-FILE               convert, verify, score, judge, report",
        *(f"First: {line}" for line in missing),
        "",
        f"Model: {geometry.architecture}, {source.parameters / unit:.1f} {word} parameters,",
        f"  {geometry.layers} layers, {context}; {size_text(source.nbytes)} ({source.format}).",
        f"Served on: {seen.card.name}, {seen.card.memory / GIB:.1f} GiB{free}.",
        *_planned(seen, formats),
        f"Converted on: {_device(seen)}.",
    ]
    return "\n".join(f"# {line}".rstrip() for line in told)


def _device(seen: Seen) -> str:
    name = torch.cuda.get_device_name() if seen.device == "cuda" else f"{os.cpu_count() or 1} processor cores"
    return name + ("" if seen.free is None else f", {seen.free / GIB:.1f} GiB free")


def _planned(seen: Seen, formats: Sequence[str]) -> list[str]:
    """A line for the source and each format: bytes, and how much text of how many users fits."""
    try:
        plan = make_plan(seen.headers, Question(cards=[seen.card], formats=(SOURCE, *formats)))
    except QtoolError as error:
        return [f"  not planned: {error.message}"[:110]]
    said = []
    for answer in plan.answers:
        weights = answer.setting.weights
        size = f"{size_text(weights.nbytes)}, {weights.bits_per_weight:.2f} bits a weight"
        said.append(f"  {weights.format:8} {size}; {_holds(plan, answer)}")
    return said


def _holds(plan: Plan, answer: Answer) -> str:
    if answer.faults:
        return f"{answer.setting.engine} refuses it"
    if not answer.fits:
        return f"does not fit: {answer.smallest.total / GIB:.1f} GiB needed"
    users = f"or {answer.sequences:,} users of {min(plan.contexts):,}" if answer.sequences > 1 else "one user"
    return f"{answer.context:,} tokens, {users}"


def _model(headers: Headers) -> str:
    name = headers.name if headers.name in SHIPPED else headers.place or headers.name
    if headers.revision is None and (name in SHIPPED or "/" not in name or name.startswith((".", "/", "~"))):
        return f"model: {_scalar(name)}"
    revision = f"  revision: {_scalar(headers.revision or 'main')}  # the run's lock.json has the commit"
    return f"model:\n  id: {_scalar(name)}\n{revision}"


def _calibration(samples: int, length: int, memory: str) -> str:
    return (
        "calibration:\n"
        "  text: qtool-code    # ships with qtool; or your own .txt, .jsonl, .parquet\n"
        f"  samples: {samples}        # windows of text; {memory}\n"
        f"  length: {length}         # tokens in each"
    )


def _outputs(seen: Seen, methods: Sequence[Method], formats: Sequence[str]) -> str:
    lines = ["outputs:                # all from one read of the weights"]
    for method, name in zip(methods, formats, strict=True):
        section = str(method.container.of_model(decoder_of(seen.headers.config)).section["quant_method"])
        readers = ", ".join(dict.fromkeys(runtime.engine for runtime in runs_in(section)))
        why = f"read by {readers}" + (
            f"; the usual choice for {seen.card.name}" if name == default_format(seen.card) else ""
        )
        lines.append(f"  - method: {method.model_dump()['method']}    # {why}")
        lines += [f"    {key}: {value}" + (f"    # {said}" if said else "") for key, value, said in _keys(seen, method)]
    return "\n".join(lines)


def _keys(seen: Seen, method: Method) -> list[tuple[str, Any, str]]:
    """(key, value, reason) of what is worth writing down: what differs from the defaults, and the size of groups."""
    said = {
        "group_size": "weights to a scale: the largest that divides every matrix",
        "dtype": "vLLM does not run this family in float16",
        "type": "Q5_K_M and Q6_K are larger and nearer to the source",
    }
    given, fields = method.model_dump(), type(method).model_fields
    changed = {key: value for key, value in given.items() if value != fields[key].default or key in said}
    kept = {key: value for key, value in changed.items() if key not in ("method", "dtype")}
    if "dtype" in given and given["dtype"] != fields["dtype"].default:
        kept["dtype"] = given["dtype"]
    return [(key, value, said.get(key, "")) for key, value in kept.items()]


def _fitting(headers: Headers, name: str) -> Method:
    """The method with the largest groups that divide every matrix, in a dtype that servers run this family in."""
    asked = method_of(name)
    assert asked is not None
    family, chosen = find_family(headers.config), None
    sizes = (
        [""]
        if "-g" in name or "group_size" not in type(asked).model_fields
        else [f"-g{n}" for n in sorted(GROUPS)[::-1]]
    )
    for number, size in enumerate(sizes):
        try:
            weights_of(headers, name + size)
        except QtoolError:
            if number == len(sizes) - 1:
                raise
            continue
        chosen = method_of(name + size)
        break
    assert chosen is not None
    dtype = type(chosen).model_fields.get("dtype")
    if family is not None and not family.float16 and dtype is not None and "bfloat16" in get_args(dtype.annotation):
        chosen = chosen.model_copy(update={"dtype": "bfloat16"})
    return chosen


def _samples(seen: Seen, methods: Sequence[Method]) -> tuple[int, str]:
    """How many windows the memory here holds while they pass through the model, and why so many."""
    headers = seen.headers
    decoder, shapes = decoder_of(headers.config), {name: info.shape for name, info in headers.tensors.items()}
    need = 0
    for samples in SAMPLES:
        need = peak_bytes(decoder, shapes, methods, samples * LENGTH, seen.device) + LIBRARIES
        if seen.free is None or need <= seen.free:
            fewer = "" if samples == SAMPLES[0] else f"; {SAMPLES[0]} would not fit"
            return samples, f"about {need / GIB:.1f} GiB while converting{fewer}"
    return SAMPLES[-1], f"about {need / GIB:.1f} GiB while converting: more than is free here"


def _missing(method: Method, device: str) -> str:
    try:
        method.require(torch.device(device))
    except QtoolError as error:
        return error.message
    return ""


def _evaluate(headers: Headers, length: int) -> str:
    most = min(384, (headers.geometry.max_context or 2048) // 2)
    task = "heldout" if headers.name in SHIPPED else "handwritten"
    return (
        "evaluate:               # source and outputs are asked the same\n"
        "  tasks:\n"
        f"    - task: {task}    # ships with qtool; humaneval+, mbpp+ and more\n"
        "      # limit: 20         sooner done, and only large losses show\n"
        "  text:                 # perplexity, and KL to the source: sees smaller losses than tasks do\n"
        "    text: heldout-code\n"
        "    samples: 16\n"
        f"    length: {length}\n"
        f"  max_new_tokens: {most}    # of an answer"
    )


def _gates(headers: Headers) -> str:
    task = "heldout" if headers.name in SHIPPED else "handwritten"
    return (
        "gates:                  # `qtool run` and `qtool check` end with 1 where one fails\n"
        "  - max_kld: 0.2          # nats a token; 4 bits with calibration lie far below\n"
        f"  - task: {task}\n"
        "    max_drop: 15          # points; passes where the loss is surely less"
    )


def _scalar(text: str) -> str:
    return yaml.safe_dump(text, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("\n...\n").strip()
