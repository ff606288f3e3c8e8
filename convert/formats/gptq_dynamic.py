"""`dynamic` of a GPTQ section: linears that are stored otherwise than the rest.

Sources: GPTQModel gptqmodel/quantization/config.py (`dynamic_get`), vLLM layers/quantization/utils/gptq_utils.py. A key
is `+:` or `-:` and a regular expression that a module's name is held against from its beginning; `-:` leaves it in 16
bits, `+:` changes values of the section for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qtool import QtoolError
from qtool.convert.formats.apart import Apart
from qtool.convert.runtimes import vllm

DYNAMIC = "dynamic"
QUANTIZED = "modules_in_block_to_quantize"  # what optimum reads for transformers, which knows no other list
_ONE = re.compile(r"[+-]:\^((?:[\w-]|\\\.|\\-)+)\$")


def with_rules(section: Mapping[str, Any], apart: Apart, linears: Sequence[str]) -> dict[str, Any]:
    """A rule for each linear, and one for what holds it in vLLM; where some stay in 16 bits, the list of those that do
    not."""
    rules: dict[str, dict[str, Any]] = dict(section.get(DYNAMIC) or {})
    for linear, settings in apart.items():
        for name in vllm.named([linear]):
            rules[_rule(name, settings is not None)] = dict(settings or {})
    kept = [linear for linear in linears if apart.get(linear, {}) is not None]
    if QUANTIZED in section:  # for vLLM, too, which keeps some of them as one
        kept = vllm.named(kept)
    listed = {QUANTIZED: [kept]} if len(kept) < len(linears) or QUANTIZED in section else {}
    return {**section, DYNAMIC: rules, **listed}


def changed(section: Mapping[str, Any], linear: str) -> Mapping[str, Any]:
    """The section with the values of a rule that names the linear. Raises QtoolError for rules that are patterns, but
    for what stays in 16 bits: a linear that is stored with codes is none of these."""
    rules = section.get(DYNAMIC)
    if not rules:
        return section
    known = isinstance(rules, Mapping) and all(str(rule).startswith("-:") or _named(str(rule)) for rule in rules)
    if not known or not all(isinstance(said, Mapping) for said in rules.values()):
        raise QtoolError(f"quantization_config: {DYNAMIC} holds a pattern; qtool reads rules that name one module.")
    return {**section, **rules.get(_rule(linear, True), {})}


def left_out(section: Mapping[str, Any]) -> list[str]:
    """Modules that stay unquantized; patterns as `re:…`."""
    rules = [str(rule) for rule in section.get(DYNAMIC) or {} if str(rule).startswith("-:")]
    return [_named(rule) or f"re:{rule.removeprefix('-:')}" for rule in rules]


def other_sizes(section: Mapping[str, Any]) -> bool:
    """Whether some linears are of other bits or groups than the rest."""
    return any(not str(rule).startswith("-:") for rule in section.get(DYNAMIC) or {})


def _rule(module: str, quantized: bool) -> str:
    return f"{'+' if quantized else '-'}:^{re.escape(module)}$"


def _named(rule: str) -> str | None:
    """The module that a rule names, None where it is a pattern of another form."""
    found = _ONE.fullmatch(rule)
    return found[1].replace("\\", "") if found else None
