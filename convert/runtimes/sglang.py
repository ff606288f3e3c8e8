"""SGLang's loading rules, as read in version 0.5: its Marlin kernel is vLLM's older one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qtool.convert.runtimes.rule import Runtime, RuntimeRule, Subject, heads, shards

VERSION = "0.5"
MARLIN_GROUPS = (-1, 32, 64, 128)
RUNTIME = Runtime("sglang", "SGLang")


def marlin(subject: Subject, tp: int) -> Iterator[str]:
    """What every container's weights must be; ``tp``: cards."""
    for whose, said in subject.geometries():
        if said["group_size"] not in MARLIN_GROUPS:
            yield f"{whose}group_size {said['group_size']} is not one of -1, 32, 64, 128"
    yield from heads(subject, tp)
    yield from shards(subject, tp, multiple_out=64, multiple_in=128)


def marlin_rule(file: str, broken: Callable[[Subject, int], Iterator[str]]) -> RuntimeRule:
    """``file``: of SGLang's layers/quantization; ``broken``: `marlin` and what the container asks besides."""
    source = f"sglang/srt/layers/quantization/{file}"
    return RuntimeRule("Marlin kernel", "SGLang", VERSION, source, broken, tensor_parallel=True)
