"""Training data of the demo model: its tokenizer, the token files and the rows that a step reads."""

import json
import multiprocessing
import os
from bisect import bisect_left, insort
from itertools import islice
from pathlib import Path

import numpy as np
from demo_corpus import forbidden_texts, read_problems
from demo_programs import training_texts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # token 0: ends every document
PADDING = -1  # in rows only; never fed to the model
ROW = 512  # tokens; a few documents fit into one row
CHUNK = 10_000  # documents in one token file
BLANK_LINE_ROWS = 8  # one row in so many separates its documents by a blank line, as text files do


def new_tokenizer() -> Tokenizer:
    """Byte-level BPE that never merges a line break with what stands around it.

    A prompt ends with a line break and the answer starts with spaces, so the tokens of a prompt are the same
    with and without the answer behind it.  The splits are those known to llama.cpp as "deepseek-coder".
    """
    tokenizer = Tokenizer(models.BPE())
    patterns = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *splits,
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = new_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """tokenizer.json and the settings that AutoTokenizer wants."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END, "eos_token": END, "pad_token": END,
        "add_bos_token": False, "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    marks = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n")


def chunk_texts(number: int, documents: int) -> list[str]:
    """The documents of one token file: the same on every machine."""
    return list(islice(training_texts(f"train/{number}", forbidden_texts(read_problems())), documents))


def write_chunk(task: tuple[Path, int, int]) -> int:
    """Generate, encode and store one token file: uint16 tokens, each document ended by token 0."""
    folder, number, documents = task
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = (tokenizer.encode(text).ids for text in chunk_texts(number, documents))
    tokens = np.fromiter((token for ids in encoded for token in (*ids, 0)), dtype=np.uint16)
    partial = folder / f"tokens-{number:04d}.partial"
    with partial.open("wb") as handle:
        np.save(handle, tokens)
    partial.rename(folder / f"tokens-{number:04d}.npy")
    return int(tokens.size)


def prepare(folder: Path, documents: int, vocabulary: int, workers: int) -> None:
    """Tokenizer and token files; what exists already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(chunk_texts(0, min(CHUNK, documents)), vocabulary).save(str(folder / "tokenizer.json"))
    size = min(CHUNK, documents)
    wanted = [(folder, number, size) for number in range(max(1, documents // CHUNK))]
    missing = [task for task in wanted if not (folder / f"tokens-{task[1]:04d}.npy").exists()]
    if workers < 2:
        for task in missing:
            write_chunk(task)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for done, _ in enumerate(pool.imap_unordered(write_chunk, missing), 1):
            if done % 16 == 0 or done == len(missing):
                print(f"data: {done} of {len(missing)} token files", flush=True)


def pack(tokens: np.ndarray, line_break: int) -> np.ndarray:
    """Whole documents put into rows of ROW tokens, best fit first, int16 [rows, ROW], PADDING behind.

    Every row begins with a document, as every prompt does.
    """
    ends = np.flatnonzero(tokens == 0) + 1
    documents = [d for d in np.split(tokens, ends[:-1]) if d.size <= ROW]
    rows: list[list[np.ndarray]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in sorted(documents, key=len, reverse=True):
        place = bisect_left(free, (len(document), -1))
        left, row = free.pop(place) if place < len(free) else (ROW, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        insort(free, (left - len(document), row))
    packed = np.full((len(rows), ROW), PADDING, dtype=np.int16)
    for line, parts in zip(packed, rows, strict=True):
        # longest first would let the model guess a length from its place
        order = sorted(parts, key=lambda part: int(part[:8].astype(np.int64).sum()) * 7919 % 97)
        flat = np.concatenate(order)
        line[: flat.size] = flat
    some = packed[::BLANK_LINE_ROWS]
    some[some == 0] = line_break
    return packed


def load_rows(folder: Path) -> np.ndarray:
    """All token files, packed."""
    line_break = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("\n").ids[0]
    return np.concatenate([pack(np.load(path), line_break) for path in sorted(folder.glob("tokens-*.npy"))])
