"""What a family of models is: one object that says all that qtool has to know of it, in a module of its own.

`table.FAMILIES` lists them. Nothing outside convert/models looks at a model's name: it asks the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qtool.convert.models.experts import Mixture
from qtool.convert.models.feeds import Feed, Shape
from qtool.convert.models.geometry import Geometry

Value = int | float | str  # a bool is an int
Settings = Mapping[str, Any]
"""A config.json, completed with the family's defaults."""
Ropes = Mapping[str, Mapping[str, Value]]
"""Kind of layers -> llama.cpp's rotary keys (`rope.rope_keys`)."""
LAYERS = "model.layers."  # how names of tensors in layers begin, as nearly everywhere
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, in `layer_types` and in rotary settings


@dataclass(frozen=True)
class Windows:
    """Which layers attend to `sliding_window` tokens alone, by the code of transformers' class.

    none: no layer, whatever config.json says. all: every layer, whatever `layer_types` says. some: those that
    `layer_types` names; without it all but one in ``period`` or, without a period, those from `max_window_layers` on.
    switched: only where `use_sliding_window` is true. period_key: the key that overrides ``period``.
    """

    which: Literal["none", "all", "some"]
    switched: bool = False
    period: int | None = None
    period_key: str = ""


@dataclass(frozen=True)
class Activation:
    """Of the MLP. ``key`` of config.json names it; ``names`` are those by which transformers computes ``function``."""

    key: str
    names: tuple[str, ...]
    function: Literal["silu", "gelu_tanh"]


SILU = Activation("hidden_act", ("silu", "swish"), "silu")
TANH_GELU = Activation("hidden_activation", ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")


def _as_read(_: Settings, shape: Geometry) -> Geometry:
    return shape


def _no_keys(settings: Settings, shape: Geometry, rope: Ropes) -> dict[str, Value]:
    return {}


def _nothing_more(_: Settings) -> dict[str, Any]:
    return {}


def _never(_: Geometry) -> bool:
    return False


def _takes_all(_: Settings, __: Ropes) -> None:
    return None


@dataclass(frozen=True)
class GgufFacts:
    """How llama.cpp wants a family: what its loader, its graphs and its quantizer have in their code.

    architecture: `general.architecture`.
    permuted: its rotation takes neighbouring pairs, so rows of q and k are stored in that order.
    windows: its sliding layers slide.
    biases: it loads biases of attention.
    factors: it loads llama-3's rotary factors.
    own_yarn: it reads yarn's betas, and by a logarithm what cosines and sines are multiplied by.
    epsilon: the key of config.json that norms add to what they divide by, and its own.
    keys: its own keys, from the completed config.json, the shape, and the rotary keys of each kind of layer. Raises
        QtoolError for what no key can say.
    required: those of them without which it loads a file wrongly.
    refuse: raises QtoolError for what it would compute otherwise, from the config.json and the rotary keys.
    says: keys of config.json that only this family has, and that are written, checked or built in.
    names: the architecture under which the gguf package lists its tensors' names, where it lists it under another.
    like_70b: whether it takes a shape for its "70B", whose attn_v gets more bits.
    """

    architecture: str
    permuted: bool = False
    windows: bool = False
    biases: bool = False
    factors: bool = False
    own_yarn: bool = False
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    keys: Callable[[Settings, Geometry, Ropes], dict[str, Value]] = _no_keys
    required: tuple[str, ...] = ()
    refuse: Callable[[Settings, Ropes], None] = _takes_all
    says: frozenset[str] = frozenset()
    names: str = ""
    like_70b: Callable[[Geometry], bool] = _never


@dataclass(frozen=True)
class Family:
    """All that qtool knows of a family of models.

    name: its class, as `architectures` of config.json has it.
    tensors: name -> shape of every tensor of a checkpoint, a tied head left out.
    feeds: of one layer, in forward order; they may differ from layer to layer.
    activation: of the MLP.
    windows: which layers slide.
    defaults: what transformers' class takes for a key that config.json lacks. What is not here is None or False.
    aliases: other names that transformers reads and writes for a key -> the key.
    derived: what its class takes for missing keys, from the completed config.json.
    shape: what keys of the family's own change in the geometry.
    mixture: what its mixtures of experts are called in its files; None for a family without.
    rope_kinds: the kinds of layers that have rotary settings of their own.
    prefix: how the names of the layers' tensors begin.
    final_norm: what the norm behind the last layer is called, beside the layers.
    plus_one: how the names of norm weights end whose norms apply 1 + weight.
    uncast: how the names of tensors end that keep the dtype in which they are stored.
    partial_rotary: its code rotates the part of every head that `partial_rotary_factor` says.
    drafts: its checkpoints hold layers beyond the last, which guess further tokens and which artifacts leave out.
    whole_scores: as in `Geometry`.
    runtime_keys: what an artifact's config.json says beside the source's, from the completed one: what a runtime looks
        for under another key.
    float16: whether vLLM runs it in float16.
    vllm_names_fused: whether vLLM's class of it says which matrices it keeps as one.
    vllm_takes_gptq: whether vLLM's class of it loads GPTQ files.
    gguf: how llama.cpp wants it; None where it cannot be written, and ``no_gguf`` says so.
    unlike_layers: parts of the names of modules beside the layers that hold matrices, stay as they are, and that a
        runtime may take for such as are quantized.
    built_as: the class of another name that transformers builds for its model_type, and that computes the same.
    register: makes its class known to transformers, which has none; such a model's own code is not run.
    """

    name: str
    tensors: Callable[[Geometry], dict[str, Shape]]
    feeds: Callable[[Geometry, int], tuple[Feed, ...]]
    activation: Activation
    windows: Windows
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    derived: Callable[[Settings], dict[str, Any]] = _nothing_more
    shape: Callable[[Settings, Geometry], Geometry] = _as_read
    mixture: Mixture | None = None
    rope_kinds: tuple[str, ...] = (FULL,)
    prefix: str = LAYERS
    final_norm: str = "norm"
    plus_one: tuple[str, ...] = ()
    uncast: tuple[str, ...] = ()
    partial_rotary: bool = False
    drafts: bool = False
    whole_scores: bool = False
    runtime_keys: Callable[[Settings], dict[str, Any]] = _nothing_more
    float16: bool = True
    vllm_names_fused: bool = True
    vllm_takes_gptq: bool = True
    gguf: GgufFacts | None = None
    no_gguf: str = "cannot be written as GGUF yet"
    built_as: str = ""
    unlike_layers: tuple[str, ...] = ()
    register: Callable[[], Any] | None = None

    def norm_offset(self, name: str) -> float:
        """What the norm of a weight adds to it before it applies it."""
        return 1.0 if name.endswith(self.plus_one) else 0.0

    def casts(self, name: str) -> bool:
        """Whether a tensor is stored in an artifact's dtype, and computed with in the run's."""
        return not name.endswith(self.uncast)
