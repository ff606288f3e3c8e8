"""Whether llama.cpp splits text as a model's own tokenizer does: code and prose, every added token, its own prompts.

llama.cpp looks for added tokens before anything else, longest first, and knows nothing of `lstrip`, `rstrip` and
`single_word` (src/llama-vocab.cpp, tokenizer_st_partition; its per-token attributes are set by the model's name). So
each added token is tried alone, doubled, against text, white space and line ends, and against those that overlap it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qtool.convert.formats.gguf.stops import KNOWN, MARKS, SOMETIMES
from qtool.convert.models.geometry import Geometry
from qtool.evaluate.engines.llama_cpp import compute_buffer, serve, sliding_cells
from qtool.evaluate.engines.server import tokenize

CORPUS = (
    "def f(x, y=1):\n\treturn x**2 + y  # square\n\n\nclass A(B):\n    pass\n",
    "  leading,   inner and trailing spaces   \n\n\n\t\t\tmixed \t \n \r\n end",
    "for (int i = 0; i < 1000000; ++i) { a[i] ^= 0xDEADBEEF >> 3; } // 3.14159e-10 1234567890",
    "I've they'RE we'Ll don't 'quoted' \"double\" `back` $HOME && || != == => -> ::",
    "na\u00efve caf\u00e9 \u03a9\u2248\u00e7 \u4f60\u597d\u4e16\u754c "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f680 \U0001f9d1\u200d\U0001f4bb \u00a0 \u3000 end",
    "snake_case camelCase SCREAMING_CASE kebab-case x1y2z3 http://example.org/a?b=c&d=%20#e",
)  # NFC text: llama.cpp never composes marks, where some tokenizers do
AROUND = (
    "a {} b", "a{}b", " {}", "{} ", "{}{}", "{} {}", "x\n{}\ny", "x\n\n  {}  \n\ny", "({})", "1{}2", "\t{}\t",
    "\u00e9{}\u00e9", "_{}_", ".{},", "  {}{}  ",
)  # fmt: skip
CONTEXT = 256  # the least that llama.cpp takes; it keeps a cache of so many tokens in each layer
TOGETHER = 50  # tokens to a text: one that differs is looked at piece by piece
OVERLAPS = 2000


@dataclass(frozen=True)
class Difference:
    """A text that llama.cpp splits otherwise; ``token``: the added token it is about, None for plain text."""

    text: str
    found: list[int]
    expected: list[int]
    token: str | None = None
    habit: str = ""

    def __str__(self) -> str:
        return f"{self.text!r}: {_short(self.found)} instead of {_short(self.expected)}"


@dataclass(frozen=True)
class Proof:
    """What the comparison showed.

    ``fatal``: the first text that must not differ and does. ``limits``: for each token that llama.cpp finds by other
    rules (white space or whole words beside it, letters that two tokens share), one example. ``tokens``: how many added
    tokens were tried.
    """

    fatal: Difference | None
    limits: list[Difference]
    tokens: int


def prove_tokens(file: Path, tokenizer: Any, without: Collection[str] = (), prompts: Sequence[str] = ()) -> Proof:
    """llama.cpp, reading ``file``, against ``tokenizer``. Added tokens in ``without`` are not in the file; ``prompts``:
    texts of the model's own chat template. Raises QtoolError as `serve` does."""
    added = {token.content: _habit(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens = [text for text in added if text and text not in without]
    pieces = sorted((KNOWN | SOMETIMES | MARKS) & tokenizer.get_vocab().keys() - added.keys())
    added |= dict.fromkeys(pieces, "special to llama.cpp by its text alone")
    with serve(file, CONTEXT, repack=False) as url:  # no weight is looked at: they may still be missing

        def differs(text: str, token: str | None = None) -> Difference | None:
            expected = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ids = tokenize(url, text)
            if ids == expected:
                return None
            if token is not None and not added[token]:  # another token in the text may be the one with a habit
                token = next((other for other, habit in added.items() if habit and other in text), token)
            return Difference(text, ids, expected, token, added.get(token or "", ""))

        for text in (*CORPUS, *prompts, *tokens):
            if (fatal := differs(text)) is not None:
                return Proof(fatal, [], len(tokens))
        limits: dict[str, Difference] = {}
        for difference in _around([*tokens, *pieces], differs):
            assert difference.token is not None
            if not difference.habit:
                return Proof(difference, [], len(tokens))
            limits.setdefault(difference.token, difference)
    return Proof(None, list(limits.values()), len(tokens))


def proof_bytes(geometry: Geometry) -> int:
    """Of its own that this process takes for `prove_tokens`: llama.cpp's cache and compute buffer; it maps the file."""
    cache = 2 * 2 * CONTEXT * geometry.layers * geometry.kv_row  # keys and values in float16
    return cache + compute_buffer(geometry, CONTEXT, CONTEXT, sliding=sliding_cells(geometry, CONTEXT))


def _around(tokens: Sequence[str], differs: Callable[..., Difference | None]) -> Iterator[Difference]:
    """Differences of tokens in their surroundings. Many surroundings make one text; where it agrees, all of them do."""
    for start in range(0, len(tokens), TOGETHER):
        some = tokens[start : start + TOGETHER]
        pieces = [(token, around.replace("{}", token)) for token in some for around in AROUND]
        pieces += [(token, token[:-1]) for token in some] + [(token, token[1:]) for token in some]
        pieces += [(one, one + two) for one, two in pairwise(some)]
        yield from _tried(pieces, differs)
    pieces = list(_overlapping(tokens))
    for start in range(0, len(pieces), 10 * TOGETHER):
        for difference in _tried(pieces[start : start + 10 * TOGETHER], differs):
            yield replace(difference, habit=difference.habit or "shares letters with another")


def _tried(pieces: Sequence[tuple[str, str]], differs: Callable[..., Difference | None]) -> Iterator[Difference]:
    if differs(" and\n".join(text for _, text in pieces)) is None:
        return
    alone = [found for token, text in pieces if (found := differs(text, token)) is not None]
    yield from alone
    if not alone:  # what differs shows only beside another piece
        for (token, text), (_, following) in pairwise(pieces):
            if (found := differs(f"{text} and\n{following}", token)) is not None:
                yield found


def _overlapping(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Two tokens that share letters: which of them is found depends on the order of the search."""
    begins: dict[str, list[str]] = {}
    for token in tokens:
        for length in range(1, min(len(token), 64)):
            begins.setdefault(token[:length], []).append(token)
    count = 0
    for token in tokens:
        for length in range(1, min(len(token), 64)):
            for other in begins.get(token[-length:], ())[:8]:
                if other != token and count < OVERLAPS:
                    count += 1
                    yield token, token + other[length:]


def _habit(token: Any) -> str:
    return ", ".join(name for name in ("lstrip", "rstrip", "single_word") if getattr(token, name, False))


def _short(ids: Sequence[int]) -> str:
    return str(list(ids)) if len(ids) <= 40 else f"[{', '.join(map(str, ids[:40]))}, …]"
