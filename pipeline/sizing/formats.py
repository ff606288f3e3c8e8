"""What a model's weights take in each format, tensor by tensor, by the very plans that would write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch

from qtool import QtoolError
from qtool.convert.files.writer import Spec, file_sizes, nbytes
from qtool.convert.formats.containers import CONTAINERS
from qtool.convert.formats.gguf.ggml import load_gguf, row_bytes
from qtool.convert.formats.gguf.plan import GgufPlan, plan_gguf
from qtool.convert.formats.plan import OutputPlan, plan_output
from qtool.convert.models.config_keys import check_config
from qtool.convert.models.shape import Decoder, decoder_of, tensor_shapes
from qtool.convert.models.table import find_family, names_of, prefix_of, quantized
from qtool.quantize.methods.sections import AwqMethod, GgufMethod, GptqMethod, Method, Nf4Method, weights_per_scale
from qtool.sizing.headers import Headers

SOURCE = "source"
GGUF_TYPES: tuple[str, ...] = get_args(GgufMethod.model_fields["type"].annotation)
DEFAULT_FORMATS = (SOURCE, "awq", "gptq", "nf4", "Q4_K_M", "Q8_0")
EMBEDDING, HEAD = ("embed_tokens.weight", "token_embd.weight"), ("lm_head.weight", "output.weight")


@dataclass(frozen=True)
class Weights:
    """Bytes of one format. ``layers``: inside the decoder layers; ``embedding`` and ``head``: of a tied model the head
    is the embedding and counted once; ``files``: what lies on the disk, headers included (None: not known);
    ``group``: columns to a scale; ``largest``: bytes of the largest matrix that is expanded before it is used."""

    format: str
    family: str
    layers: int
    embedding: int
    head: int
    other: int
    parameters: int
    files: int | None
    group: int = 1
    largest: int = 0
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.layers + self.embedding + self.head + self.other

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


def method_of(name: str) -> Method | None:
    """The recipe output that a format's name stands for (``awq-g64``: with that group size); None for the source's own
    dtype. Raises QtoolError naming all."""
    base, _, group = name.partition("-g")
    size = int(group) if group.isdigit() else 128
    if name in GGUF_TYPES:
        return GgufMethod(method="gguf", name=name, type=name)  # type: ignore[arg-type]  # one of the literals
    if size in (32, 64, 128):
        if base == "awq":
            return AwqMethod(method="awq", group_size=size)  # type: ignore[arg-type]  # one of the literals
        if base in ("gptq", "gptq-8", "compressed-tensors"):
            return GptqMethod.model_validate(
                {
                    "method": "gptq", "group_size": size, "bits": 8 if base == "gptq-8" else 4,
                    "format": base if base == "compressed-tensors" else "gptq",
                }
            )  # fmt: skip
    if name == "nf4":
        return Nf4Method(method="nf4")
    if name == SOURCE:
        return None
    raise QtoolError(
        f"--format {name}: not a format qtool writes. Known: {SOURCE}, awq, gptq, gptq-8, compressed-tensors (each "
        f"with -g32, -g64 or -g128), nf4, {', '.join(GGUF_TYPES)}."
    )


def weights_of(headers: Headers, name: str) -> Weights:
    """Raises QtoolError where the model cannot be written in this format, saying why."""
    found = _weights_of(headers, name)
    if headers.geometry.tied and found.head and found.embedding:  # stored all the same; engines load one of the two
        return _replace(found, head=0, parameters=found.parameters - headers.geometry.head_weights)
    return found


def _weights_of(headers: Headers, name: str) -> Weights:
    method = method_of(name)
    if method is None:
        specs = {tensor: (info.dtype, info.shape) for tensor, info in headers.tensors.items()}
        return _weights(dtype_name(specs.values()), SOURCE, specs, _parameters(headers), prefix_of(headers.config))
    decoder = _decoder(headers)
    check_config(headers.config)
    section = method.quantization_config()
    if isinstance(method, GgufMethod):
        load_gguf()
        plan = plan_gguf(headers.tensors, decoder, headers.config, method.type)
        return _gguf_weights(name, plan)
    made: OutputPlan = plan_output(
        headers.tensors, decoder, section, method.stored_dtype, weights_per_scale(method),
    )  # fmt: skip
    found = _weights(name, str(section["quant_method"]), made.specs, made.parameters, decoder.prefix)
    largest = 2 * max(linear.out * linear.columns for linear in made.linears)
    group = 1 if isinstance(method, Nf4Method) else weights_per_scale(method)
    return _replace(found, group=group, largest=largest if isinstance(method, Nf4Method) else 0)


def artifact_weights(headers: Headers) -> Weights:
    """Of an artifact as it lies there."""
    if headers.gguf is None:
        specs = {name: (info.dtype, info.shape) for name, info in headers.tensors.items()}
        section = headers.config["quantization_config"]
        method = str(section.get("quant_method", "unknown"))
        found = _weights(method, method, specs, _source_parameters(headers), prefix_of(headers.config))
        said = CONTAINERS[method].geometry(section) if method in CONTAINERS else section
        packed = [shape for dtype, shape in specs.values() if dtype == torch.uint8 and len(shape) == 2]
        largest = max((4 * _count(shape) for shape in packed), default=0)  # two weights to a byte, expanded to 16 bits
        head = 0 if headers.geometry.tied and found.embedding else found.head
        group = int(said.get("group_size") or 1)
        return _replace(found, head=head, group=group, largest=largest, files=_disk(headers))
    from qtool.convert.formats.gguf.file import GgufFile

    file = GgufFile.open(headers.gguf, headers.config)
    sizes = {name: _size(*spec) for name, spec in file.layout.items()}
    kind = headers.gguf.stem.rsplit("-", 1)[-1]
    found = _split(kind, "gguf", sizes, _source_parameters(headers), "blk.")
    return _replace(found, files=headers.gguf.stat().st_size)


def dtype_name(specs: Iterable[Spec]) -> str:
    """What most bytes are stored as: bf16, fp16, fp32."""
    taken: dict[str, int] = {}
    for spec in specs:
        name = str(spec[0]).removeprefix("torch.")
        taken[name] = taken.get(name, 0) + nbytes(spec)
    name = max(taken, key=lambda key: taken[key])
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)


def _decoder(headers: Headers) -> Decoder:
    if find_family(headers.config) is None:
        raise QtoolError(
            f"architecture {names_of(headers.config)} is not known to qtool: only its own dtype can be planned. Known: "
            f"{', '.join(quantized())}."
        )
    return decoder_of(headers.config)


def _parameters(headers: Headers) -> int:
    return sum(info.nbytes // info.dtype.itemsize for info in headers.tensors.values())


def _source_parameters(headers: Headers) -> int:
    if find_family(headers.config) is None:
        return _parameters(headers)
    return sum(_count(shape) for shape in tensor_shapes(headers.config).values())


def _weights(name: str, family: str, specs: Mapping[str, Spec], parameters: int, prefix: str) -> Weights:
    sizes = {tensor: nbytes(spec) for tensor, spec in specs.items()}
    return _replace(_split(name, family, sizes, parameters, prefix), files=sum(file_sizes(specs).values()))


def _gguf_weights(name: str, plan: GgufPlan) -> Weights:
    sizes = {tensor: _size(plan.types[tensor].type, shape) for tensor, shape in plan.shapes.items()}
    return _replace(_split(name, "gguf", sizes, plan.parameters, "blk."), notes=tuple(plan.notes))


def _split(name: str, family: str, sizes: Mapping[str, int], parameters: int, prefix: str) -> Weights:
    layers = sum(size for tensor, size in sizes.items() if tensor.startswith(prefix))
    embedding = sum(size for tensor, size in sizes.items() if tensor.endswith(EMBEDDING))
    head = sum(size for tensor, size in sizes.items() if tensor in HEAD)
    other = sum(sizes.values()) - layers - embedding - head
    return Weights(name, family, layers, embedding, head, other, parameters, None)


def _replace(weights: Weights, **changes: object) -> Weights:
    return replace(weights, **changes)  # type: ignore[arg-type]  # the callers above name the fields


def _size(type_name: str, shape: tuple[int, ...]) -> int:
    return _count(shape[:-1]) * row_bytes(type_name, shape[-1])


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _disk(headers: Headers) -> int | None:
    files = {info.file for info in headers.tensors.values()}
    return sum(file.stat().st_size for file in files) if all(file.is_file() for file in files) else None
