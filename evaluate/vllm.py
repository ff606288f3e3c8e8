"""The engine `vllm`: an artifact under vLLM's offline engine, in this process, on this machine's accelerator.

API: https://docs.vllm.ai/en/latest/api/vllm (LLM, SamplingParams).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.evaluate import secrets
from qtool.evaluate.engines import Completion, Decoding, Request, package_versions

INSTALL = "pip install vllm (in an environment of its own; it brings its own torch)"


@dataclass(frozen=True)
class VllmEngine:
    """A loaded ``vllm.LLM``; vLLM batches for itself."""

    llm: Any
    tokenizer: Any
    dtype: str
    name: str = "vllm"
    device: str = "cuda"

    @property
    def version(self) -> str:
        """The packages that compute."""
        return package_versions("vllm", "torch", "transformers")

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


def load(path: Path, tokenizer: Any, context: int, trust_remote_code: bool = False) -> VllmEngine:
    """Load an artifact; ``context``: the longest prompt plus its answer, in tokens. Raises QtoolError (exit 3) where
    vLLM is not installed or does not run."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise QtoolError(
            f"engine vllm needs vLLM and an accelerator, which are not here ({error}). Run: {INSTALL}; "
            "or serve the model elsewhere and use engine openai.",
            exit_code=3,
        ) from error
    try:
        with secrets.withheld():  # it starts processes
            llm = LLM(
                model=str(path), max_model_len=context, enforce_eager=False, seed=0, trust_remote_code=trust_remote_code
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise QtoolError(f"{path}: vLLM cannot load it here ({str(error).splitlines()[0]}).", exit_code=3) from error
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    return VllmEngine(llm, tokenizer, dtype)
