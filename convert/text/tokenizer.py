"""A model's tokenizer: loaded in this process only after a child has loaded and tried it within limits."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import MB, TOKENIZER_LIMIT, open_file, read_json, read_text, shown
from qtool.convert.text.bounded import MEMORY, SECONDS, Overrun, bounded

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
CONFIG = "tokenizer_config.json"
BESIDE = (CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
_UNREAD = ("untagged enum", "did not match", "unknown variant", "missing field", "expected ", "regex", "out of vocab")
# What no tokenizer may choke on: words, numbers, runs that an unlucky pattern backtracks over, other scripts.
PROBE = (
    "def f(a, b):\n\treturn a + b  # 12345 été 漢字 🙂 ﷺ\n"
    + "a" * 64
    + "!"
    + " " * 64
    + "x"
    + "ab" * 32
    + "0" * 64
    + "\n"
)
TOKENS_PER_BYTE = 16  # NFKD makes 18 letters of one that takes 3 bytes; a byte is one token at most


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer. Raises QtoolError when the folder carries none that can be used here."""
    from transformers import AutoTokenizer

    _require_files(path, trust_remote_code)

    def load() -> Any:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)

    def work() -> Iterator[str]:
        tokenizer = load()
        tokens = len(tokenizer(PROBE).input_ids)
        yield (
            ""
            if tokens <= TOKENS_PER_BYTE * len(PROBE.encode())
            else f"makes {tokens:,} tokens of {len(PROBE)} letters"
        )

    size = sum(path.joinpath(name).stat().st_size for name in FILES if path.joinpath(name).is_file())
    try:
        # a tokenizer that is code of its own may use what a fork has not; who allows it trusts it
        refusal = "" if trust_remote_code else bounded(work, SECONDS + 4 * size / MB, 2 * MEMORY + 24 * size)[0]
        if not refusal:
            tokenizer = load()
            _require_special(path, tokenizer)
            _require_certain(path, tokenizer)
            return tokenizer
    except Overrun as error:
        refusal = error.reason
    except (OSError, ValueError, TypeError, ImportError) as error:
        refusal = f"ended in {type(error).__name__}: {error}"
    raise QtoolError(f"{path}: no usable tokenizer: {_why(path, ' '.join(refusal.split())[:300])}.")


def _require_files(path: Path, trust_remote_code: bool) -> None:
    """Regular files of bounded size, JSON where they have to be."""
    there = [name for name in (*FILES, *BESIDE) if os.path.lexists(path / name)]
    for name in there:
        open_file(path / name, TOKENIZER_LIMIT).close()
    config = read_json(path / CONFIG) if CONFIG in there else {}
    _require_templates(path / CONFIG, config.get("chat_template"))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if name in there:
            read_json(path / name, TOKENIZER_LIMIT)
    if not set(FILES) & set(there) and not (trust_remote_code and "auto_map" in config):
        raise QtoolError(
            f"{path}: no tokenizer: none of {', '.join(FILES)} is there. Copy the tokenizer's files from the model's "
            "own repository; text cannot become tokens without them."
        )
    if "tokenizer.json" in there:
        text = read_text(path / "tokenizer.json", TOKENIZER_LIMIT)
        if not text.lstrip().startswith("{") or not text.rstrip().endswith("}"):
            raise QtoolError(f"{path / 'tokenizer.json'}: not valid JSON: it is cut off or damaged. Copy it again.")


def _require_special(path: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer whose own marks have no row in the model's embedding."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    rows = config.get("vocab_size")
    for name in ("bos_token", "eos_token"):
        token = getattr(tokenizer, f"{name}_id")
        if isinstance(rows, int) and isinstance(token, int) and token >= rows:
            raise QtoolError(
                f"{path}: the tokenizer's {name} is token {token}, but config.json's vocab_size is {rows}: tokenizer "
                "and weights are not of one model."
            )


def _require_certain(path: Path, tokenizer: Any) -> None:
    """Refuse merges that are left out at random: no two readings of one text would be the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    dropout = getattr(getattr(backend, "model", None), "dropout", None)
    if dropout:
        raise QtoolError(
            f"{path / 'tokenizer.json'}: model.dropout is {dropout:g}: merges are left out at random, as in training. "
            "Set it to null."
        )


def _require_templates(path: Path, given: Any) -> None:
    """One template, or a list of named ones."""
    if given is None or isinstance(given, str | dict):
        return
    keys = ("name", "template")
    if not isinstance(given, list) or not all(
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in keys) for one in given
    ):
        raise QtoolError(
            f"{path}: chat_template is {shown(repr(given))}; a text, or a list with a name and a template each is "
            "needed."
        )


def _why(path: Path, said: str) -> str:
    """The reason in a user's words."""
    if not (path / "tokenizer.json").exists() and (path / "tokenizer.model").exists():
        if importlib.util.find_spec("sentencepiece") is None:
            return "tokenizer.model alone needs the package sentencepiece. Install it, or copy tokenizer.json as well"
        return f"tokenizer.model is damaged, or is no SentencePiece model ({said})"
    if any(mark in said for mark in _UNREAD):
        version = importlib.metadata.version("tokenizers")
        return f"tokenizer.json is damaged, or of a newer release than tokenizers {version}, which is here ({said})"
    return f"it {said}"
