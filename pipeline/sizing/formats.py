"""What a model's weights take in each format, tensor by tensor, by the very plans that would write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from qtool import QtoolError
from qtool.convert.files.shards import file_sizes
from qtool.convert.files.writer import Spec, nbytes
from qtool.convert.formats.gguf.ggml import row_bytes
from qtool.convert.formats.gguf.names import STACKED
from qtool.convert.formats.plan import ModelShape
from qtool.convert.formats.table import FORMATS
from qtool.convert.models.config_keys import check_config
from qtool.convert.models.expert_names import expert_of
from qtool.convert.models.missing import missing_fact
from qtool.convert.models.shape import Decoder, decoder_of, tensor_shapes
from qtool.convert.models.table import find_family, names_of, prefix_of, quantized
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.table import METHODS
from qtool.sizing.headers import Headers

SOURCE = "source"
GROUPS = (32, 64, 128)
DEFAULT_FORMATS = (SOURCE, "awq", "gptq", "nf4", "Q4_K_M", "Q8_0")
EMBEDDING, HEAD = ("embed_tokens.weight", "token_embd.weight"), ("lm_head.weight", "output.weight")


@dataclass(frozen=True)
class Weights:
    """Bytes of one format. ``layers``: inside the decoder layers; ``embedding`` and ``head``: of a tied model the head
    is the embedding and counted once; ``files``: what lies on the disk, headers included (None: not known);
    ``group``: columns to a scale; ``largest``: bytes of the largest matrix that is expanded before it is used;
    ``experts``: of ``layers``, what routed experts take."""

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
    experts: int = 0
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.layers + self.embedding + self.head + self.other

    def read(self, share: float) -> int:
        """Of the layers' bytes, those of one step that needs this ``share`` of the routed experts."""
        return self.layers - self.experts + int(self.experts * share)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


def method_of(name: str) -> Method | None:
    """The recipe output that a format's name stands for (``awq-g64``: with that group size); None for the source's own
    dtype. Raises QtoolError naming all."""
    base, _, group = name.partition("-g")
    size = int(group) if group.isdigit() else GROUPS[-1]
    for method, method_class in METHODS.items():
        if not method_class.grouped and name in method_class.short:
            return method_class.model_validate({"method": method, **method_class.short[name]})
        if method_class.grouped and base in method_class.short and size in GROUPS:
            return method_class.model_validate({"method": method, "group_size": size, **method_class.short[base]})
    if name == SOURCE:
        return None
    grouped = [short for method_class in METHODS.values() if method_class.grouped for short in method_class.short]
    others = [short for method_class in METHODS.values() if not method_class.grouped for short in method_class.short]
    raise QtoolError(
        f"--format {name}: not a format qtool writes. Known: {SOURCE}, {', '.join(grouped)} (each with -g32, -g64 or "
        f"-g128), {', '.join(others)}."
    )


def weights_of(headers: Headers, name: str) -> Weights:
    """Raises QtoolError where the model cannot be written in this format, saying why."""
    weights = _weights_of(headers, name)
    if headers.geometry.tied and weights.head and weights.embedding:  # stored all the same; engines load one of the two
        return _replace(weights, head=0, parameters=weights.parameters - headers.geometry.head_weights)
    return weights


def _weights_of(headers: Headers, name: str) -> Weights:
    method = method_of(name)
    if method is None:
        specs = {tensor: (info.dtype, info.shape) for tensor, info in headers.tensors.items()}
        return _weights(dtype_name(specs.values()), SOURCE, specs, _parameters(headers), prefix_of(headers.config))
    decoder = _decoder(headers)
    check_config(headers.config)
    container = method.container.of_model(decoder)
    shape = ModelShape(headers.tensors, decoder, headers.config)
    plan = container.plan(shape)
    sizes = {tensor: nbytes(spec) for tensor, spec in plan.specs.items()}
    family = str(container.section["quant_method"])
    found = _split(name, family, sizes, plan.parameters, decoder.prefix)
    largest = 2 * max(linear.out * linear.columns for linear in plan.linears) if container.expands else 0
    files, notes = container.file_bytes(plan), tuple(plan.notes)
    return replace(found, group=container.group, largest=largest, files=files, notes=notes)


def artifact_weights(headers: Headers) -> Weights:
    """Of an artifact as it lies there."""
    if headers.gguf is None:
        specs = {name: (info.dtype, info.shape) for name, info in headers.tensors.items()}
        section = headers.config["quantization_config"]
        method = str(section.get("quant_method", "unknown"))
        found = _weights(method, method, specs, _source_parameters(headers), prefix_of(headers.config))
        row = FORMATS.get(method)
        said = row.geometry(section) if row is not None and row.SAFETENSORS else section
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
        reason = missing_fact(headers.config)
        why = f"not quantized yet ({reason})" if reason else "not known to qtool"
        raise QtoolError(
            f"architecture {names_of(headers.config)} is {why}: only its own dtype can be planned. Known: "
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


def _split(name: str, family: str, sizes: Mapping[str, int], parameters: int, prefix: str) -> Weights:
    layers = sum(size for tensor, size in sizes.items() if tensor.startswith(prefix))
    embedding = sum(size for tensor, size in sizes.items() if tensor.endswith(EMBEDDING))
    head = sum(size for tensor, size in sizes.items() if tensor in HEAD)
    other = sum(sizes.values()) - layers - embedding - head
    experts = sum(size for tensor, size in sizes.items() if expert_of(tensor) is not None or tensor.endswith(STACKED))
    return Weights(name, family, layers, embedding, head, other, parameters, None, experts=experts)


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
