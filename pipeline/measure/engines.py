"""The engines that `qtool measure` runs: transformers, vLLM, llama.cpp, and any OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.evaluate.engines import openai as served
from qtool.evaluate.engines import vllm as engine
from qtool.evaluate.sandbox import secrets
from qtool.measure.measure import OutOfMemory, Reading

TIMEOUT = 1800.0  # seconds without a byte
LEAST_ID = 10  # ids below are special tokens in most vocabularies


class Transformers:
    """A model loaded by transformers itself, on ``device``; whole prefill, then single steps on its growing cache."""

    def __init__(self, path: Path, device: str, trust_remote_code: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.device = torch.device(device)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", device_map={"": str(self.device)} if self.device.type != "cpu" else None,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        except (ImportError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise QtoolError(f"{path}: transformers cannot load it here: {reason}", exit_code=3) from error
        self.model: Any = model.eval()
        self.random = random.Random(0)

    def run(self, context: int, sequences: int, tokens: int) -> Reading:
        """Raises OutOfMemory."""
        import torch

        try:
            with torch.inference_mode():
                return self._run(context, sequences, tokens)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory(str(error).splitlines()[0]) from error

    def _run(self, context: int, sequences: int, tokens: int) -> Reading:
        import torch

        vocabulary = self.model.config.vocab_size
        rows = [prompt(self.random, context, vocabulary) for _ in range(sequences)]
        ids = torch.tensor(rows, device=self.device)
        self._reset()
        started = self._now()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = self._now() - started
        for _ in range(tokens - 1):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        wall = self._now() - started
        steps = ((wall - first) / (tokens - 1),) * sequences if tokens > 1 else ()
        return Reading((first,) * sequences, steps, wall, tokens * sequences, None, self._peak())

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _reset(self) -> None:
        import torch

        reset_resident_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> dict[str, int | None]:
        import torch

        if self.device.type != "cuda":
            return {"resident": resident_peak()}
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "allocated": torch.cuda.max_memory_allocated(), "device": total - free, "resident": resident_peak(),
        }  # fmt: skip


class Vllm:
    """vLLM's offline engine, as many sequences as asked for at once; on a CPU in this process, whose memory is counted.
    Run with vLLM 0.32 on a CPU."""

    def __init__(self, path: Path, context: int, sequences: int, vocabulary: int) -> None:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm  # type: ignore[import-not-found, unused-ignore]  # an extra of its own
        except ImportError as error:
            raise QtoolError(f"engine vllm: vLLM is not installed here. Run: {engine.INSTALL}", 3) from error
        self.parameters: Any = vllm.SamplingParams
        try:
            with secrets.withheld():  # it starts processes
                self.llm: Any = vllm.LLM(
                    model=str(path), max_model_len=context, max_num_seqs=sequences, enable_prefix_caching=False
                )
        except (RuntimeError, ValueError, OSError, AssertionError, NotImplementedError) as error:
            why = engine.cause(error)
            what = f"has no room for {context} tokens" if "memory" in why.lower() else "cannot load it"
            raise QtoolError(f"{path}: vLLM {what}: {why}.", exit_code=3) from error
        self.vocabulary = vocabulary
        self.random = random.Random(0)

    def run(self, context: int, sequences: int, tokens: int) -> Reading:
        """The first token's time is that of answers of one token; the rest takes the difference."""
        first = self._generate(context, sequences, 1)
        wall = self._generate(context, sequences, tokens)
        steps = ((wall - first) / (tokens - 1),) * sequences if tokens > 1 else ()
        memory: dict[str, int | None] = {"device": device_used(), "resident": resident_peak()}
        return Reading((first,) * sequences, steps, wall, tokens * sequences, None, memory)

    def _generate(self, context: int, sequences: int, tokens: int) -> float:
        asked = [{"prompt_token_ids": prompt(self.random, context, self.vocabulary)} for _ in range(sequences)]
        parameters = self.parameters(temperature=0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        try:
            made = self.llm.generate(asked, parameters, use_tqdm=False)
        except RuntimeError as error:
            if "out of memory" in str(error).lower():
                raise OutOfMemory(str(error)) from error
            raise
        seconds = time.perf_counter() - started
        short = [answer for answer in made if len(answer.outputs[0].token_ids) != tokens]
        if short:
            raise QtoolError(f"vLLM ended {len(short)} answers before {tokens} tokens: nothing can be told.", 3)
        return seconds


@dataclass
class Server:
    """An OpenAI-compatible server at ``url`` (which ends in /v1), streaming, all requests of a batch at once.
    ``inside``: whether it runs in this process, so that its memory is this process's."""

    url: str
    model: str
    vocabulary: int
    api_key: str | None = None
    inside: bool = False
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def run(self, context: int, sequences: int, tokens: int) -> Reading:
        """Prompts are random token ids, so that no prefix cache helps. Raises OutOfMemory, QtoolError (exit 3)."""
        prompts = [prompt(self.random, context, self.vocabulary) for _ in range(sequences)]
        if self.inside:
            reset_resident_peak()
        started = time.perf_counter()
        with ThreadPoolExecutor(sequences) as pool:
            answers = list(pool.map(lambda ids: self._ask(ids, tokens), prompts))
        wall = time.perf_counter() - started
        counted = [answer.tokens for answer in answers]
        steps = tuple((a.last - a.first) / (a.tokens - 1) for a in answers if a.tokens > 1)
        cached = [answer.cached for answer in answers if answer.cached is not None]
        return Reading(
            tuple(answer.first for answer in answers), steps, wall, sum(counted),
            sum(cached) / (context * len(cached)) if cached else None,
            {"resident": resident_peak() if self.inside else None},
        )  # fmt: skip

    def _ask(self, ids: list[int], tokens: int) -> _Answer:
        body = {
            "model": self.model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "cache_prompt": False, "stream_options": {"include_usage": True},
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = f"{self.url.rstrip('/')}/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        started = time.perf_counter()
        times: list[float] = []
        usage: dict[str, Any] = {}
        try:
            with served.opener(url).open(request, timeout=TIMEOUT) as answer:
                for line in answer:
                    data = line.decode().strip().removeprefix("data:").strip()
                    if not line.startswith(b"data:") or data == "[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise _refusal(url, served.hide(json.dumps(event["error"]), self.api_key))
                    usage = event.get("usage") or usage
                    if event.get("choices"):  # the last one says why it ended; a server may merge tokens into one
                        times.append(time.perf_counter() - started)
        except urllib.error.HTTPError as error:
            said = served.hide(error.read(500).decode(errors="replace"), self.api_key)
            raise _refusal(url, said or f"answered {error.code}") from error
        except OSError as error:
            raise QtoolError(f"{url}: cannot be reached ({error}). Is the server running?", exit_code=3) from error
        if not times:
            raise QtoolError(f"{url}: answered without a token.", exit_code=3)
        details = usage.get("prompt_tokens_details") or {}
        made = int(usage.get("completion_tokens") or len(times))
        return _Answer(times[0], times[-1], made, details.get("cached_tokens"))


@dataclass(frozen=True)
class _Answer:
    """Seconds to the first and the last piece, tokens made, prompt tokens served from a cache (None: not said)."""

    first: float
    last: float
    tokens: int
    cached: int | None


def prompt(source: random.Random, context: int, vocabulary: int) -> list[int]:
    """Random token ids."""
    return [source.randrange(min(LEAST_ID, vocabulary - 1), vocabulary) for _ in range(context)]


def reset_resident_peak() -> None:
    """Let the kernel count this process's peak anew (Linux; elsewhere the peak is of the whole process's life)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def resident_peak() -> int | None:
    """Bytes of this process's resident peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def device_used() -> int | None:
    """Bytes taken on the accelerator, whoever took them."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def llama_cpp_machine() -> str | None:
    """The card that llama.cpp computes on here; None where it was built for the processor alone, or is missing."""
    try:
        import xllamacpp
    except ImportError:
        return None
    cards = [device for device in xllamacpp.get_device_info() if "GPU" in device["type"].name]
    return str(cards[0]["description"]) if cards else None


def _refusal(url: str, said: str) -> Exception:
    lowered = said.lower()
    if "out of memory" in lowered or "exceed" in lowered or ("context" in lowered and "size" in lowered):
        return OutOfMemory(said)
    return QtoolError(f"{url}: {said}", exit_code=3)
