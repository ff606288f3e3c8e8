"""A model in vLLM's offline engine, in this process: generating, timed; and vLLM's own reasons in one line.

API: https://docs.vllm.ai/en/latest/api/vllm (LLM, SamplingParams, EngineArgs). Run with vLLM 0.32 on a CPU.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import QtoolError
from qtool.convert.formats.table import runtime_of
from qtool.evaluate.engines import machine
from qtool.evaluate.engines.engine import (
    Batch,
    Completion,
    Decoding,
    Loaded,
    OutOfMemory,
    Reading,
    Request,
)
from qtool.evaluate.engines.facts import EngineFacts
from qtool.evaluate.sandbox import secrets

CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(frozen=True)
class VllmModel(Loaded):
    """A loaded ``vllm.LLM``; vLLM batches for itself. ``dtype`` and ``device`` are those it really took."""

    llm: Any
    tokenizer: Any
    dtype: str
    device: str

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Completion]:
        """Chunks of ``batch_size`` requests."""
        from vllm import SamplingParams

        left = [index for index in range(len(requests)) if index not in done]
        for start in range(0, len(left), decoding.batch_size):
            rows = left[start : start + decoding.batch_size]
            prompts = [
                {"prompt_token_ids": self.tokenizer(requests[row].prompt, add_special_tokens=False).input_ids}
                for row in rows
            ]
            options = [
                SamplingParams(
                    temperature=decoding.temperature, top_p=decoding.top_p, max_tokens=decoding.max_new_tokens,
                    seed=requests[row].seed if decoding.temperature > 0 else None, skip_special_tokens=True,
                )
                for row in rows
            ]  # fmt: skip
            answers = self.llm.generate(prompts, options, use_tqdm=False)
            for row, answer in zip(rows, answers, strict=True):
                yield row, answer.outputs[0].text

    def time(self, batch: Batch) -> Reading:
        """The first token's time is that of answers of one token; the rest takes the difference."""
        first = self._seconds(batch, 1)
        wall = self._seconds(batch, batch.tokens)
        sequences, tokens = len(batch.prompts), batch.tokens
        steps = ((wall - first) / (tokens - 1),) * sequences if tokens > 1 else ()
        memory = {"device": machine.device_used(), "resident": machine.resident_peak()}
        return Reading((first,) * sequences, steps, wall, tokens * sequences, None, memory)

    def _seconds(self, batch: Batch, tokens: int) -> float:
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": list(prompt)} for prompt in batch.prompts]
        options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        try:
            made = self.llm.generate(asked, options, use_tqdm=False)
        except RuntimeError as error:
            if "out of memory" in str(error).lower():
                raise OutOfMemory(str(error)) from error
            raise
        seconds = time.perf_counter() - started
        short = [answer for answer in made if len(answer.outputs[0].token_ids) != tokens]
        if short:
            raise QtoolError(f"vLLM ended {len(short)} answers before {tokens} tokens: nothing can be told.", 3)
        return seconds

    def logits(self, window: Tensor) -> None:
        """vLLM keeps them to itself."""
        return None


def used(facts: EngineFacts, path: Path, trust_remote_code: bool = False) -> tuple[str, str]:
    """Device and dtype in which vLLM will run the model, asked of vLLM without loading a weight. Raises QtoolError
    (exit 3) where vLLM is not installed or refuses the model."""
    stay_in_process()
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
    except ImportError as error:
        raise _missing(facts, error) from error
    with _told(path):
        config = EngineArgs(model=str(path), trust_remote_code=trust_remote_code).create_model_config()
    return str(current_platform.device_type), str(config.dtype).removeprefix("torch.")


def load(
    facts: EngineFacts, path: Path, tokenizer: Any, context: int, trust_remote_code: bool = False,
    timed: int | None = None, cache: str = "",
) -> VllmModel:  # fmt: skip
    """Load an artifact; ``context``: the longest prompt plus its answer, in tokens; ``timed``: how many sequences at
    once are going to be timed, then compiled and without a prefix cache; ``cache``: the type of keys and values, "" for
    its own. Raises QtoolError (exit 3) where vLLM is not
    installed or does not run, with vLLM's own reason."""
    stay_in_process()
    try:
        from vllm import LLM
    except ImportError as error:
        raise _missing(facts, error) from error
    options: dict[str, Any] = {"max_num_seqs": timed, "enable_prefix_caching": False}
    if timed is None:  # on a CPU compiling takes minutes and a C++ compiler
        options = {"enforce_eager": not torch.cuda.is_available(), "seed": 0}
    options |= {"kv_cache_dtype": cache} if cache else {}
    with _told(path, context), secrets.withheld():  # it starts processes
        llm = LLM(model=str(path), max_model_len=context, trust_remote_code=trust_remote_code, **options)
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    return VllmModel(facts, llm, tokenizer, dtype, device_of(llm))


@contextmanager
def closing(running: VllmModel) -> Iterator[VllmModel]:
    """What it holds is let go when the block ends, so that the next model finds room."""
    try:
        yield running
    finally:
        close(running.llm)
        del running
        gc.collect()


def close(llm: Any) -> None:
    """Stop a ``vllm.LLM`` and the process group that it made."""
    core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    if core is not None:
        core.shutdown()
    with suppress(ImportError):
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def device_of(llm: Any) -> str:
    """`cpu`, `cuda` …: where a loaded model computes."""
    config = getattr(llm.llm_engine, "vllm_config", None)
    return str(config.device_config.device_type) if config is not None else "unknown"


def stay_in_process() -> None:
    """Before vLLM is imported: its engine runs in this process, so that its errors are told and its memory counted;
    and it binds no threads to cores, because the programs that are judged would inherit that."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def cause(error: BaseException) -> str:
    """vLLM's reason in one line, with what would do where qtool knows it."""
    text = str(error).strip() or type(error).__name__
    if found := re.search(r"Value error, (.*?)(?: \[type=|$)", text, re.DOTALL):  # pydantic's wrapping
        text = found.group(1)
    text = " ".join(text.split()).removesuffix(".")
    lowered = text.lower()
    if "unknown quantization method: bitsandbytes" in lowered:
        plugin = runtime_of({"quant_method": "bitsandbytes"}, "vllm")
        return f"{text.partition('. Must')[0]}. It needs a plugin: {plugin.install if plugin else ''}"
    if CPU_CACHE.lower() in lowered or ("memory" in lowered and "cpu" in lowered):
        return f"{text}. On a CPU set {CPU_CACHE} to the GiB of its cache: {CPU_CACHE}=1"
    return text


@contextmanager
def _told(path: Path, context: int = 0) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError, AssertionError, NotImplementedError, ImportError) as error:
        # vLLM has no error of its own for a model that it does not take: each layer of it raises what it likes.
        why = cause(error)
        what = f"has no room for {context} tokens" if context and "memory" in why.lower() else "cannot load it here"
        raise QtoolError(f"{path}: vLLM {what}: {why}.", exit_code=3) from error


def _missing(facts: EngineFacts, error: ImportError) -> QtoolError:
    return QtoolError(
        f"engine vllm needs vLLM, which is not here ({error}). Run: {facts.install}; "
        "or serve the model elsewhere and use engine openai.",
        exit_code=3,
    )
