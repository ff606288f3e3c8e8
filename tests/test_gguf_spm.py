"""SentencePiece vocabularies in GGUF: llama.cpp splits text by scores as the tokenizer does by merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.gguf_file import GgufFile
from qtool.convert.source import resolve
from qtool.convert.text import load_tokenizer, token_windows
from qtool.job import open_job
from qtool.outputs import make_artifacts
from qtool.quantize.calibration import CalibrationSet
from qtool.recipe import load_recipe

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


def convert(recipe_path: Path) -> Any:
    recipe = load_recipe(recipe_path)
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    tokens = token_windows(recipe.calibration, load_tokenizer(job.source.path, False))
    return next(iter(make_artifacts(job, recipe.outputs, CalibrationSet(tokens, "t")).values()))


@pytest.mark.parametrize("prepend", [True, False])
def test_llama_cpp_splits_as_the_tokenizer_does(
    prepend: bool, model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_maker(tmp_path / "model", vocab_size=SIZE)
    make_tokenizer(model, prepend)
    artifact = convert(write_recipe(model=str(model), outputs=[{"method": "gguf", "type": "F16"}]))
    equal = "token ids: equal to llama.cpp's on code, white space, unicode and special tokens"
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
    from qtool.convert import gguf_vocab

    model = model_maker(tmp_path / "model", vocab_size=SIZE)
    make_tokenizer(model, True)
    whole = gguf_vocab.sentencepiece_tokens

    def flat(*arguments: Any) -> Any:
        tokens, types, scores = whole(*arguments)
        return tokens, types, [-1000.0] * len(scores)

    monkeypatch.setattr(gguf_vocab, "sentencepiece_tokens", flat)
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
