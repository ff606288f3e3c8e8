"""What a container needs in a runtime and what a loading rule is; what rules of several runtimes ask: shards, heads,
groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qtool.convert.models.expert_names import expert_of

TRANSFORMERS = "transformers/utils/quantization_config.py"  # the sources of several containers' rules
QLINEAR = "gptqmodel/nn_modules/qlinear/__init__.py"
TENSOR_PARALLEL = (1, 2, 4, 8)
QUANTIZED = (".qweight", ".weight_packed", ".weight.absmax")  # how the tensors of a quantized module end


@dataclass(frozen=True)
class Subject:
    """What rules look at: config.json and the quantized linears' shapes ``name -> (out, in)``; for GPTQ also each
    linear's least and greatest zero point as decoded, and those whose g_idx is not ``i // group_size``; the names of
    all tensors; quantize_config.json; the linears whose columns are split over the cards (of all others the rows
    are); bits, group_size, sym as the container reads them (AutoAWQ's says no sym); ``own``: those of each linear that
    has others."""

    config: dict[str, Any]
    linears: dict[str, tuple[int, int]]
    zeros: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()
    quantize_config: dict[str, Any] | None = None
    scattered: frozenset[str] = frozenset()
    by_columns: frozenset[str] = frozenset()
    geometry: dict[str, Any] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)

    def geometry_of(self, linear: str) -> dict[str, Any]:
        """Of one linear."""
        return self.own.get(linear, self.geometry)

    def geometries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(how a message begins, bits, group_size, sym): of all linears, and of each kind that has its own."""
        yield "", self.geometry
        kinds: dict[str, str] = {}
        for name in self.own:
            kinds.setdefault(name.rpartition(".")[2] + str(self.own[name]), name)
        for name in kinds.values():
            yield f"{name}: ", self.own[name]

    @property
    def experts(self) -> dict[str, tuple[int, int]]:
        """The linears of routed experts."""
        return {name: shape for name, shape in self.linears.items() if expert_of(name) is not None}

    @property
    def quantization(self) -> dict[str, Any]:
        section: dict[str, Any] = self.config.get("quantization_config") or {}
        return section


def _nothing(_: Mapping[str, Any]) -> Iterator[str]:
    return iter(())


@dataclass(frozen=True)
class Runtime:
    """What one container needs in one runtime. ``engine``: its name in `qtool.evaluate.engines`; ``title``: the name
    that the loading rules have for what reads the file there; ``package``: what must be installed beside the engine,
    ``install``: how; ``refuses(quantization_config)`` yields why such a file is loaded on no platform; ``note``: what
    whoever makes such a file should hear; ``refuses_experts(quantization_config)``: why it does not load experts from
    such a file; ``refuses_model(config.json)``: why it does not load this model from it."""

    engine: str
    title: str
    package: str = ""
    install: str = ""
    refuses: Callable[[Mapping[str, Any]], Iterator[str]] = _nothing
    note: str = ""
    refuses_experts: Callable[[Mapping[str, Any]], Iterator[str]] = _nothing
    refuses_model: Callable[[Mapping[str, Any]], Iterator[str]] = _nothing


@dataclass(frozen=True)
class Observed:
    """What rules ask of a linear's numbers: its least and greatest zero point as decoded, and whether the columns of
    some group lie apart."""

    zeros: tuple[int, int] | None = None
    scattered: bool = False


def nothing_observed(tensor: object, parts: object, section: object) -> Observed:
    """Of a container whose rules ask for none of it."""
    return Observed()


def _always(_: Subject) -> bool:
    return True


@dataclass(frozen=True)
class RuntimeRule:
    """``broken(subject, tp)`` yields a reason for every way the rule is broken at that tensor-parallel size. A
    ``required`` rule tells a fault of the artifact; the others tell what a kernel does not take, a fact about the
    model. ``proof``: whether what it says was seen when that version was run, or read in its source. A rule that does
    not ``apply`` says nothing: what is refused at once needs no word on each kernel."""

    name: str
    runtime: str
    version: str
    source: str
    broken: Callable[[Subject, int], Iterator[str]]
    tensor_parallel: bool = False
    required: bool = False
    proof: Literal["run", "read"] = "read"
    applies: Callable[[Subject], bool] = _always

    @property
    def passed(self) -> str:
        """What a subject that breaks nothing is told."""
        return f"loads by the rules, as {self.proof}"


def has_experts(subject: Subject) -> bool:
    """Whether a rule on experts applies."""
    return bool(subject.experts)


def fused_experts(_: Mapping[str, Any]) -> Iterator[str]:
    """Of transformers, which finds no tensor in such files for what it holds in one, and says nothing."""
    yield (
        "it holds all experts of a layer in one tensor and finds none in the file: it loads without an error, with "
        "experts of random numbers. Use GPTQModel.load, vLLM, SGLang or qtool's reference engine"
    )


def experts_rule(
    refuses: Callable[[Mapping[str, Any]], Iterator[str]], proof: Literal["run", "read"] = "read"
) -> RuntimeRule:
    """That transformers loads a file's experts."""

    def broken(subject: Subject, _: int) -> Iterator[str]:
        yield from refuses(subject.quantization)

    source = "transformers/core_model_loading.py"
    return RuntimeRule("experts", "transformers", "5.23", source, broken, proof=proof, applies=has_experts)


def heads(subject: Subject, tp: int) -> Iterator[str]:
    """Attention heads are split over the cards, key/value heads split or repeated."""
    count = subject.config.get("num_attention_heads", tp)
    kv = subject.config.get("num_key_value_heads", count)
    if count % tp:
        yield f"{count} attention heads do not split over {tp} cards"
    elif kv % tp and tp % kv:
        yield f"{kv} key/value heads neither split over nor repeat on {tp} cards"


def shards(subject: Subject, tp: int, multiple_out: int, multiple_in: int) -> Iterator[str]:
    """One reason for each kind of linear (layers have the same shapes) whose shard breaks a multiple, or whose
    groups lie across two shards."""
    seen: set[tuple[str, int, int, int]] = set()
    for name, (out, columns) in subject.linears.items():
        kind = name.rsplit(".", 1)[-1]
        group = int(subject.geometry_of(name).get("group_size") or 0)
        if (kind, out, columns, group) in seen:
            continue
        seen.add((kind, out, columns, group))
        rows_split = name not in subject.by_columns
        share = out if rows_split else columns
        if share % tp:
            yield f"{kind}: {share} does not split over {tp} cards"
            continue
        out, columns = (out // tp, columns) if rows_split else (out, columns // tp)
        if out % multiple_out:
            yield f"{kind}: out {out} is not a multiple of {multiple_out}"
        if columns % multiple_in:
            yield f"{kind}: in {columns} is not a multiple of {multiple_in}"
        if group > 0 and columns % group:
            yield f"{kind}: in {columns} is not a multiple of the group size {group}"


def _head(subject: Subject, _: int) -> Iterator[str]:
    """No loader of these formats is told of a quantized head or embedding; a tied head lives in the embedding."""
    for name in subject.tensors:
        module = next((name.removesuffix(end) for end in QUANTIZED if name.endswith(end)), "")
        if module.endswith(("lm_head", "embed_tokens")):
            yield f"{name}: {module} is quantized, and no loader expects that"
    if (
        subject.tensors
        and "lm_head.weight" not in subject.tensors
        and subject.config.get("tie_word_embeddings") is False
    ):
        yield "lm_head.weight is missing, and tie_word_embeddings is false"


HEAD = RuntimeRule("embeddings and head", "all", "loaders", "tie_word_embeddings in config.json", _head, required=True)
