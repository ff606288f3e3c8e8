"""The tokenizer as llama.cpp wants it: token texts, their types, merges or scores, special ids, and the name of the
rules that split text before merging.

The name is found by the hash of a check text's token ids (llama.cpp's own way) and, for vocabularies nobody has hashed,
by comparing tokenizer.json's split rules with those that llama.cpp implements (src/llama-vocab.cpp).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import read_json
from qtool.convert.formats.gguf.ggml import load_gguf
from qtool.convert.formats.gguf.stops import find_stops

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.h, llama_token_type
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_GPT2 = ("ByteLevel", True)
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_PLAIN = ("ByteLevel", False)
# steps of tokenizer.json's pre_tokenizer -> llama.cpp's name
RULES: dict[tuple[tuple[str, Any], ...], str] = {
    (_GPT2,): "gpt-2",
    (("Digits", True), _GPT2): "smollm",
    (("Split", _WORDS + "\\p{N}{1,3}" + _REST), _PLAIN): "llama-bpe",
    (("Split", _WORDS + "\\p{N}" + _REST), _PLAIN): "qwen2",
    (
        ("Split", "[\r\n]"),
        ("Split", "\\s?\\p{L}+"),
        ("Split", "\\s?\\p{P}+"),
        ("Split", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
        ("Digits", True),
        _PLAIN,
    ): "deepseek-coder",
}


def pre_tokenizer(folder: Path, tokenizer: Any) -> str:
    """llama.cpp's name of the split rules. Raises QtoolError where no rule of llama.cpp is known to equal them."""
    table = json.loads(files("qtool.convert.formats.gguf").joinpath("pre_tokenizers.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(str(tokenizer.encode(table["check_text"])).encode()).hexdigest()
    if digest in table["names"]:
        return str(table["names"][digest])
    steps = _steps(tokenizer_json(folder, tokenizer).get("pre_tokenizer"))
    if steps in RULES:
        return RULES[steps]
    raise QtoolError(
        f"{folder / 'tokenizer.json'}: llama.cpp has no name that qtool knows for these split rules ({steps}). If it "
        "implements them, give its name as `pre_tokenizer:` of this output; its token ids are then proved."
    )


def tokenizer_json(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json as the tokenizer in use has it: some classes of transformers replace the file's split rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        found: dict[str, Any] = json.loads(backend.to_str())
        return found
    return read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else {}


def _steps(rules: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    if rules is None:
        return ()
    found = []
    for step in rules["pretokenizers"] if rules["type"] == "Sequence" else [rules]:
        kind = step["type"]
        if kind == "Split":
            found.append((kind, step["pattern"].get("Regex") or step["pattern"].get("String")))
        elif kind == "Digits":
            found.append((kind, step.get("individual_digits")))
        elif kind == "ByteLevel":
            found.append((kind, step.get("use_regex", True)))
        else:
            found.append((kind, None))
    return tuple(found)


def add_vocabulary(
    writer: Any, folder: Path, tokenizer: Any, config: Mapping[str, Any], pre: str | None = None
) -> None:
    """Write every tokenizer key into a `gguf.GGUFWriter`. ``pre``: name of the split rules (None: find it).

    Raises QtoolError for a tokenizer that is neither byte-level BPE nor SentencePiece, or larger than the embedding.
    """
    gguf = load_gguf()
    size = int(config["vocab_size"])
    model = tokenizer_json(folder, tokenizer).get("model", {})
    if model.get("type") != "BPE":
        kind = model.get("type", "tokenizer without a")
        raise QtoolError(f"{folder / 'tokenizer.json'}: a {kind} vocabulary cannot be written as GGUF.")
    if model.get("byte_fallback"):
        tokens, types, scores = sentencepiece_tokens(tokenizer, size, folder)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(_prepends_space(tokenizer_json(folder, tokenizer)))
    else:
        tokens, types = bpe_tokens(tokenizer, size, folder)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or pre_tokenizer(folder, tokenizer))
        writer.add_token_list(tokens)
    if len(set(tokens)) < len(tokens):
        twice = next(text for text, count in Counter(tokens).items() if count > 1)
        raise QtoolError(f"{folder}: two tokens of the file would be {twice!r}, and llama.cpp would know one of them.")
    writer.add_token_types(types)
    try:
        special = gguf.SpecialVocab(folder, not model.get("byte_fallback"), special_token_types=(), n_vocab=size)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OSError) as error:
        raise QtoolError(f"{folder}: the gguf package cannot read its tokenizer's files ({error}).") from error
    special.special_token_ids = special_ids(tokenizer, config, size) | find_stops(folder, tokenizer, config, size).ids
    special.add_special_token = {"bos": begins_with_bos(folder, tokenizer), "eos": _ends_with_eos(tokenizer)}
    special.add_to_gguf(writer)


def special_ids(tokenizer: Any, config: Mapping[str, Any], size: int) -> dict[str, int]:
    """Kind -> token, of those that the tokenizer, or for the first and the padding token config.json, names."""
    found = {}
    for kind in ("bos", "unk", "sep", "pad", "cls", "mask"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is None and kind in ("bos", "pad"):
            number = config.get(f"{kind}_token_id")
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < size:
            found[kind] = number
    return found


def begins_with_bos(folder: Path, tokenizer: Any) -> bool:
    """Whether every text begins with the BOS token: the tokenizer puts it there, or its settings ask for it."""
    if tokenizer.bos_token_id is None:
        return False
    return _asks_for_bos(folder) or bool(tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id])


def _asks_for_bos(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return settings.exists() and read_json(settings).get("add_bos_token") is True


def around_texts(folder: Path, tokenizer: Any) -> list[str]:
    """What the tokenizer puts before or after every text and a .gguf file does not say as it does, a line each: the
    file knows of one BOS token and one EOS token."""
    whole, plain = tokenizer("x").input_ids, tokenizer("x", add_special_tokens=False).input_ids
    starts = (at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain)
    at = next(starts, 0)
    found = []
    for where, ids, own in (
        ("before", whole[:at], tokenizer.bos_token_id), ("after", whole[at + len(plain) :], tokenizer.eos_token_id),
    ):  # fmt: skip
        if ids and ids != [own]:
            names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            found.append(f"the tokenizer puts {names} {where} every text, which a .gguf file cannot say")
    if tokenizer.bos_token_id is not None and _asks_for_bos(folder) and not at:
        found.append(
            f"tokenizer_config.json asks for {tokenizer.bos_token!r} before every text (add_bos_token), and llama.cpp "
            "puts it there; the tokenizer as transformers loads it does not"
        )
    return found


def _ends_with_eos(tokenizer: Any) -> bool:
    ids = tokenizer("x").input_ids
    return tokenizer.eos_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def bpe_tokens(tokenizer: Any, size: int, folder: Path) -> tuple[list[str], list[int]]:
    """(text of every id, its type), padded with unused tokens up to ``size``."""
    texts = _texts(tokenizer, size, folder)
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        text = texts[number]
        if number not in added:
            types.append(UNUSED if isinstance(text, _Padding) else NORMAL)
        else:  # matched against plain text by llama.cpp too, whatever letters it holds
            types.append(CONTROL if added[number].special or _looks_special(text) else USER_DEFINED)
        tokens.append(text)
    return tokens, types


def sentencepiece_tokens(tokenizer: Any, size: int, folder: Path) -> tuple[list[str], list[int], list[float]]:
    """(text of every id, its type, its score), padded up to ``size``, of a BPE vocabulary that falls back to bytes.

    llama.cpp merges the neighbours whose joint text has the highest score, as SentencePiece does: the score of a text
    is its place among tokenizer.json's merges, counted down.
    """
    merges = tokenizer_json(folder, tokenizer)["model"]["merges"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    texts, added = _texts(tokenizer, size, folder), tokenizer.added_tokens_decoder
    tokens, types, scores = [], [], []
    for number in range(size):
        text = texts[number]
        if isinstance(text, _Padding):
            kind = UNUSED
        elif number == tokenizer.unk_token_id:
            kind = UNKNOWN
        elif _BYTE.fullmatch(text):
            kind = BYTE
        elif number in added:
            kind = CONTROL if added[number].special or _looks_special(text) else USER_DEFINED
            text = _matched(tokenizer, text, number)
        else:
            kind = NORMAL
        tokens.append(text)
        types.append(kind)
        scores.append(-float(ranks.get(text, len(merges) + number)) if kind == NORMAL else 0.0)
    return tokens, types, scores


def _prepends_space(raw: Mapping[str, Any]) -> bool:
    """Whether a text is tokenized as if a space stood before it."""
    text = json.dumps([raw.get("normalizer"), raw.get("pre_tokenizer")])
    return '"type": "Prepend"' in text or '"prepend_scheme": "always"' in text or '"prepend_scheme": "first"' in text


def unembedded(tokenizer: Any, size: int) -> list[str]:
    """Added tokens beyond the embedding's ``size`` rows, which the model cannot read and a file leaves out: Gemma 3's
    text models carry the image token of the larger ones."""
    return [str(added) for number, added in sorted(tokenizer.added_tokens_decoder.items()) if number >= size]


class _Padding(str):
    """The text of an id that no token has."""


def _texts(tokenizer: Any, size: int, folder: Path) -> dict[int, str]:
    """The text of every id below ``size``; no two are the same, or llama.cpp would know one of them only."""
    beyond = unembedded(tokenizer, size)
    vocabulary = tokenizer.get_vocab()
    texts = {number: text for text, number in vocabulary.items() if text not in beyond}
    if not texts or max(texts) >= size:
        highest = f"token {max(texts)}" if texts else "no token"
        raise QtoolError(f"{folder}: the tokenizer has {highest}, config.json's vocab_size is {size}.")
    if len(texts) + len(beyond) < len(vocabulary):
        twice = next(text for text, number in vocabulary.items() if texts.get(number, text) != text)
        raise QtoolError(f"{folder}: the tokenizer has two texts for token {vocabulary[twice]}, one is {twice!r}.")
    taken = set(texts.values())
    for number in range(size):
        if number not in texts:
            text = f"[PAD{number}]"
            while text in taken:
                text = f"[{text}]"
            texts[number] = _Padding(text)
    return texts


def _matched(tokenizer: Any, text: str, number: int) -> str:
    """``text`` of an added token as it stands in plain text: a lower bar may stand for a space."""
    plain = text.replace("\u2581", " ")
    if plain == text or tokenizer(text, add_special_tokens=False).input_ids == [number]:
        return text
    return plain


def _looks_special(text: str) -> bool:
    """Control tokens that some tokenizers forget to mark: <|...|> and fill-in-the-middle marks."""
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
