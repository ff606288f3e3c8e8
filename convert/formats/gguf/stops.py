"""Where a model's answers end, and what of it a .gguf file can say.

transformers stops at every id of generation_config.json's `eos_token_id` (config.json's where that file has none).
llama.cpp stops at the file's eos, eot and eom tokens, and at any token with one of the texts that it knows
(src/llama-vocab.cpp, special_eog_ids).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import read_json, shown

KNOWN = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>",
})  # fmt: skip
# texts whose part at the end depends on the rest of the vocabulary, or on the version of llama.cpp
SOMETIMES = frozenset({
    "</s>", "[EOT]", "[EOS]", "<eos>", "<|flush|>", "<|calls|>", "<turn|>", "<|tool_response>", "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
# and those that it takes for marks of another kind
MARKS = frozenset({
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "\u2581<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "\u2581<MID>", "<|code_middle|>", "<|middle|>",
    "<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>",
    "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>",
})  # fmt: skip
UNDONE = ("<|call|>", "<|calls|>")  # beside one of these, llama.cpp may take <|end|> for no end


@dataclass(frozen=True)
class Stops:
    """``ids``: key of the file (eos, eot, eom) -> token; ``texts``: of all tokens that end an answer and that a text
    can name; ``notes``: what of them the file does not say."""

    ids: dict[str, int]
    texts: list[str]
    notes: list[str]


def find_stops(folder: Path, tokenizer: Any, config: Mapping[str, Any], size: int) -> Stops:
    """The tokens below ``size`` at which answers of the model in ``folder`` end; ``config``: its config.json. Raises
    QtoolError where an `eos_token_id` is no number."""
    name, listed = "config.json", config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.exists():
        found = read_json(generation).get("eos_token_id")
        name, listed = ("generation_config.json", found) if found is not None else (name, listed)
    given = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if odd := [value for value in given if not isinstance(value, int) or isinstance(value, bool)]:
        raise QtoolError(f"{folder / name}: eos_token_id holds {shown(repr(odd[0]))}, which is no token's number.")
    first = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    ids = list(dict.fromkeys([*first, *given]))
    notes = [f"{name}'s eos_token_id {number} is no token: left out" for number in ids if not 0 <= number < size]
    ids = [number for number in ids if 0 <= number < size]
    if not ids:
        return Stops({}, [], [*notes, "no token ends an answer: the model names none"])
    return _told(ids, tokenizer, size, notes)


def _told(ids: list[int], tokenizer: Any, size: int, notes: list[str]) -> Stops:
    vocabulary = {text: number for text, number in tokenizer.get_vocab().items() if number < size}
    names = {number: name for name, number in vocabulary.items() if number in ids}
    added = tokenizer.added_tokens_decoder
    undone = any(text in vocabulary for text in UNDONE)
    sure = {number for number in ids if names.get(number) in KNOWN and not (undone and names.get(number) == "<|end|>")}
    told = {"eos": ids[0]}
    others = [number for number in ids[1:] if number not in sure] + [number for number in ids[1:] if number in sure]
    told |= dict(zip(("eot", "eom"), others, strict=False))
    texts = [names[number] for number in ids if number in added]
    for number in ids:
        unnamed = undone and names.get(number) == "<|end|>"
        if (number not in told.values() and number not in sure) or unnamed:
            notes.append(
                f"answers also end at {names.get(number, number)!r}, which a .gguf file cannot say: llama.cpp goes on "
                "after it unless it is told (`PARAMETER stop` in the Modelfile does); qtool's own engines stop there"
            )
        if number not in added:
            piece = f"token {number} ({names.get(number)!r})"
            notes.append(f"answers end at {piece}, an ordinary piece of text: the Modelfile has no stop for it")
    ending = sorted(text for text in KNOWN & vocabulary.keys() if vocabulary[text] not in ids)
    if ending:
        notes.append(f"llama.cpp also ends an answer at {', '.join(ending)}, at which the model's own settings do not")
    return Stops(told, texts, notes)
