"""The engine that a recipe names, opened for one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qtool import QtoolError
from qtool.convert.files.checkpoint import TensorStream
from qtool.evaluate.engines import llama_cpp, vllm
from qtool.evaluate.engines import openai as served
from qtool.evaluate.engines.engine import Engine, package_versions
from qtool.evaluate.engines.torch_engines import TorchEngine, load_model, load_native, reference_dtype
from qtool.evaluate.scorecard import Settings
from qtool.measure.subjects import Subject
from qtool.recipe.judging import EvaluateSection

PACKAGES = {
    "reference": ("torch", "transformers"),
    "transformers": ("torch", "transformers", "gptqmodel", "bitsandbytes", "compressed-tensors"),
    "llama.cpp": ("xllamacpp",),
    "vllm": vllm.PACKAGES,
}


def settings_of(section: EvaluateSection, device: torch.device, style: str) -> Settings:
    """What the scorecard says of the engine and its settings, known before a model is loaded. Engines that run a file
    as it is have the dtype `as stored`: source and artifact may differ in it, as they would in use."""
    dtype = str(reference_dtype(device)).removeprefix("torch.") if section.engine == "reference" else "as stored"
    version = package_versions(*PACKAGES.get(section.engine, ()))
    if section.engine == "openai":
        assert section.base_url is not None
        models = list(section.models.values())
        version, dtype = served.connect(section.base_url, models[0] if models else None).version, "as served"
    places = {"openai": "server", "llama.cpp": "cpu", "vllm": "as built"}
    return Settings(
        engine=section.engine, version=version, dtype=dtype, device=places.get(section.engine, device.type),
        prompt=style, max_new_tokens=section.max_new_tokens, temperature=section.temperature, top_p=section.top_p,
        seed=section.seed if section.temperature > 0 else None,
    )  # fmt: skip


def settings_for(settings: Settings, subject: Subject, trusted: bool) -> Settings:
    """``settings`` with the device and the dtype in which vLLM runs this model: it takes each in its own. Raises
    QtoolError where vLLM is not here or refuses the model."""
    if settings.engine != "vllm" or subject.path is None:
        return settings
    device, dtype = vllm.used(subject.path, trusted)
    return settings.model_copy(update={"device": device, "dtype": dtype})


@contextmanager
def open_engine(
    section: EvaluateSection, subject: Subject, config: Any, tokenizer: Any, device: torch.device, trusted: bool,
    prompts: Sequence[str],
) -> Iterator[Engine]:  # fmt: skip
    """Load ``subject``; it is let go when the block ends. ``prompts`` tell how long a context must be. Raises
    QtoolError where this engine cannot run this model."""
    if section.engine == "reference":
        yield TorchEngine("reference", load_model(_stream(subject), config, device, trusted), tokenizer)
    elif section.engine == "openai":
        assert section.base_url is not None
        yield served.connect(section.base_url, served_name(section, subject))
    elif section.engine == "llama.cpp":
        if subject.gguf is None:
            raise QtoolError(f"{subject.name}: engine llama.cpp runs .gguf files only; use engine reference.")
        context = _context(prompts, tokenizer, section.max_new_tokens)
        with llama_cpp.open_engine(subject.gguf, tokenizer, context, section.batch_size, "as stored") as engine:
            yield engine
    elif subject.path is None:
        raise QtoolError(f"{subject.name}: engine {section.engine} runs model folders only.")
    elif section.engine == "transformers":
        yield TorchEngine("transformers", load_native(subject.path, device, trusted), tokenizer)
    else:
        context = _context(prompts, tokenizer, section.max_new_tokens)
        with vllm.open_engine(subject.path, tokenizer, context, trusted) as engine:
            yield engine


def served_name(section: EvaluateSection, subject: Subject) -> str | None:
    """The name under which the server has ``subject``; None: the only one it has."""
    if section.models and subject.name not in section.models:
        raise QtoolError(f"evaluate.models: names no served model for {subject.name!r}.")
    return section.models.get(subject.name)


def _stream(subject: Subject) -> TensorStream:
    if subject.stream is None:
        raise QtoolError(f"{subject.name}: has no weights here; use engine openai.")
    return subject.stream()


def _context(prompts: Sequence[str], tokenizer: Any, new: int) -> int:
    return max((len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts), default=0) + new
