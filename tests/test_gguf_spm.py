"""SentencePiece vocabularies in GGUF: llama.cpp splits text by scores as the tokenizer does by merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.files.source import resolve
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.make.job import open_job
from qtool.make.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe.sections import load_recipe

pytest.importorskip("xllamacpp")
gguf: Any = pytest.importorskip("gguf")
SPECIALS = ("<unk>", "<s>", "</s>")
SIZE = 480


def make_tokenizer(folder: Path, prepend: bool) -> None:
    """As Llama 2's and Mistral's tokenizer.json have it: BPE over text whose spaces are lower bars, bytes for the
    rest, and every way to split a piece in two among the merges, in the order of the pieces."""
    from tokenizers import Tokenizer, models, trainers

    text = Path(__file__).read_text(encoding="utf-8").replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 280, show_progress=False, max_token_length=12)
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(text.splitlines(), trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    vocabulary = {name: number for number, name in enumerate((*SPECIALS, *(f"<0x{i:02X}>" for i in range(256))))}
    for piece, _ in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = []
    for piece in [piece for piece, _ in pieces if len(piece) > 1]:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, space] if prepend else [space]
    raw = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": number, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False} for number, name in enumerate(SPECIALS)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "add_bos_token": True,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def make_gemma_tokenizer(folder: Path) -> None:
    """As Gemma's: runs of spaces and newlines are tokens of their own, the first ones through merges that outrank all
    others, the second as added tokens; no space before a text; one added token too many for the embedding."""
    make_tokenizer(folder, False)
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = raw["model"]["vocab"], raw["model"]["merges"]
    runs = ["\u2581" * count for count in range(2, 7)]
    added = [*("\n" * count for count in range(1, 5)), *runs, "<table>", "<start_of_turn>"]
    for name in added:
        if name in vocabulary:
            continue
        vocabulary[name] = len(vocabulary)
    vocabulary |= {f"<unused{number}>": number for number in range(len(vocabulary), SIZE)}
    first = [[run[:i], run[i:]] for run in reversed(runs) for i in range(len(run) - 1, 0, -1)]
    raw["model"]["merges"] = first + [pair for pair in merges if pair not in first]
    names = {"<s>": "<bos>", "</s>": "<eos>"}
    for entry in raw["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    raw["model"]["vocab"] = {names.get(name, name): number for name, number in vocabulary.items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] += [
        {"id": vocabulary[name], "content": name, "special": name == "<start_of_turn>", **plain} for name in added
    ]
    raw["added_tokens"] += [{"id": SIZE, "content": "<image_soft_token>", "special": True, **plain}]
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    settings = {
        "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>",
        "pad_token": "<eos>", "mask_token": "<unk>", "add_bos_token": True,
        "extra_special_tokens": {"image_token": "<image_soft_token>"},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def convert(recipe_path: Path) -> Any:
    recipe = load_recipe(recipe_path)
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    tokens = token_windows(recipe.calibration, load_tokenizer(job.source.path, False))
    return next(iter(make_artifacts(job, CalibrationSet(tokens, "t")).values()))


@pytest.mark.parametrize("prepend", [True, False])
def test_llama_cpp_splits_as_the_tokenizer_does(
    prepend: bool, model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_maker(tmp_path / "model", vocab_size=SIZE)
    make_tokenizer(model, prepend)
    artifact = convert(write_recipe(model=str(model), outputs=[{"method": "gguf", "type": "F16"}]))
    equal = "token ids: equal to llama.cpp's on code, white space, unicode and 3 added tokens"
    assert equal in artifact.manifest.notes
    file = GgufFile.open(artifact.gguf, json.loads((model / "config.json").read_text()))
    assert file.metadata("tokenizer.ggml.model") == "llama"
    assert file.metadata("tokenizer.ggml.add_space_prefix") is prepend
    types = file.metadata("tokenizer.ggml.token_type")
    assert types[:4] == [2, 3, 3, 6]
    assert types[258] == 6
    assert types[-1] == 5  # padding up to the embedding's rows
    assert file.metadata("tokenizer.ggml.tokens")[3] == "<0x00>"
    scores = file.metadata("tokenizer.ggml.scores")
    assert len(scores) == SIZE
    assert len(set(scores[300:400])) > 50


def test_flat_scores_are_found_out(
    model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary whose merges carry no order splits otherwise, and no file is left."""
    from qtool.convert.formats.gguf import vocab as gguf_vocab

    model = model_maker(tmp_path / "model", vocab_size=SIZE)
    make_tokenizer(model, True)
    whole = gguf_vocab.sentencepiece_tokens

    def flat(*arguments: Any) -> Any:
        tokens, types, scores = whole(*arguments)
        return tokens, types, [-1000.0] * len(scores)

    monkeypatch.setattr(gguf_vocab, "sentencepiece_tokens", flat)
    monkeypatch.setattr("qtool.make.outputs._walk", lambda *_: pytest.fail("layers were quantized before the proof"))
    with pytest.raises(QtoolError, match="token ids differ from the tokenizer's: "):
        convert(write_recipe(model=str(model), outputs=[{"method": "gguf", "type": "F16"}]))


def test_unigram_vocabularies_are_refused(
    model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_maker(tmp_path / "model")
    path = model / "tokenizer.json"
    raw = json.loads(path.read_text())
    pieces = [[text, -float(number)] for text, number in sorted(raw["model"]["vocab"].items(), key=lambda i: i[1])]
    raw["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    path.write_text(json.dumps(raw))
    with pytest.raises(QtoolError, match="a Unigram vocabulary cannot be written as GGUF"):
        convert(write_recipe(model=str(model), outputs=[{"method": "gguf", "type": "F16"}]))


def test_gemma_splits_runs_and_keeps_within_its_embedding(
    model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"]}
    model = model_maker(tmp_path / "model", "Gemma3", vocab_size=SIZE, **changes)
    make_gemma_tokenizer(model)
    tokenizer = load_tokenizer(model, False)
    assert type(tokenizer).__name__ == "GemmaTokenizer"
    text = tokenizer("a" + " " * 9 + "b\n\n\n\n\n", add_special_tokens=False).input_ids
    assert [tokenizer.convert_ids_to_tokens(n) for n in text] == [
        "a", "\u2581" * 6, "\u2581" * 3, "b", "\n" * 4, "\n",
    ]  # fmt: skip
    artifact = convert(write_recipe(model=str(model), outputs=[{"method": "gguf", "type": "F16"}]))
    assert artifact.notes == [
        "tokens beyond the embedding's rows, left out: <image_soft_token>",
        "token ids: equal to llama.cpp's on code, white space, unicode and 14 added tokens",
        "tokenizer_config.json asks for '<bos>' before every text (add_bos_token), and llama.cpp puts it there; the "
        "tokenizer as transformers loads it does not",
    ]
    file = GgufFile.open(artifact.gguf, artifact.config)
    assert len(file.metadata("tokenizer.ggml.tokens")) == SIZE
    assert file.metadata("tokenizer.ggml.add_space_prefix") is False
    assert file.metadata("tokenizer.ggml.add_bos_token") is True
