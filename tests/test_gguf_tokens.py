"""What a .gguf file says of tokens: every added one, where answers end, odd vocabularies; llama.cpp is the judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool import QtoolError
from qtool.convert.files.source import resolve
from qtool.convert.formats.format import CalibrationText
from qtool.convert.formats.gguf.file import GgufFile
from qtool.convert.formats.gguf.format import GgufTensors
from qtool.convert.formats.gguf.stops import KNOWN, find_stops
from qtool.evaluate.engines import server as served
from qtool.evaluate.engines.llama_cpp import serve
from qtool.make import writer as make_writer
from qtool.make.job import open_job
from qtool.recipe.sections import load_recipe

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
Start = Callable[..., tuple[GgufTensors, str]]


@pytest.fixture
def start(
    model_maker: Callable[..., Path], write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Start:
    """A GGUF output of a tiny model with more added tokens, begun and proved as every run begins one, and its note."""
    notes, prove = [], make_writer.prove
    monkeypatch.setattr(make_writer, "prove", lambda question: notes.append(prove(question)))

    def begin(
        added: list[dict[str, Any]], size: int = 400, edit: Callable[[dict[str, Any]], None] | None = None,
        files: dict[str, Any] | None = None, **config: Any,
    ) -> tuple[GgufTensors, str]:  # fmt: skip
        model = model_maker(tmp_path / "model", vocab_size=size, **config)
        path = model / "tokenizer.json"
        raw = json.loads(path.read_text())
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        number = 1 + max([*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"])])
        for token in added:
            raw["added_tokens"].append({"id": number, **plain, **token})
            number += 1
        if edit:
            edit(raw)
        path.write_text(json.dumps(raw))
        for name, data in (files or {}).items():
            (model / name).write_text(json.dumps(data))
        recipe = load_recipe(write_recipe(model=str(model), outputs=[{"method": "gguf", "type": "F16"}]))
        job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
        file = make_writer.OutputWriter(job, replace(job.outputs[0], key="k")).file
        assert isinstance(file, GgufTensors)
        return file, notes[-1]

    return begin


@pytest.mark.parametrize(
    "contents",
    [
        ["\u00f5", "\u00c1", "\u00ff", "\u00e9"],  # letters that byte-level vocabularies use for bytes
        ["\u4f60\u597d", "<|\u043a\u043e\u043d\u0435\u0446|>", "\U0001f680\U0001f680"],
        ["<a b>", "two words here", " lead", "trail "],
        ["<|a|>", "<|a|>b", "<|a|>bc", "<|"],
        ["   ", "\n\n", "\t\t"],
        ["\u0120the", "\u2581x"],
        ["[PAD390]", "<|endoftext2|>"],
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_of_every_kind_are_found(contents: list[str], special: bool, start: Start) -> None:
    output, note = start([{"content": text, "special": special} for text in contents])
    assert note.startswith("token ids: equal to llama.cpp's on code, white space, unicode and ")
    with serve(output.place, 512, repack=False) as url:
        for text in contents:
            number = output.tokenizer.convert_tokens_to_ids(text)
            assert served.tokenize(url, f"x{text}y").count(number) == 1
    output.close()


@pytest.mark.parametrize("habit", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("special", [True, False])
def test_what_a_token_takes_with_it_is_said_with_an_example(habit: str, special: bool, start: Start) -> None:
    output, note = start([{"content": "<mask>", habit: True, "special": special}, {"content": "<plain>"}])
    assert "equal" not in note
    assert f"beside 1 of {len(output.tokenizer.added_tokens_decoder)} added tokens they differ" in note
    assert f"'<mask>' ({habit}), as in 'a" in note
    output.close()


def test_tokens_that_overlap_are_said_where_the_order_of_the_search_shows(start: Start) -> None:
    """The tokenizer takes the first that it meets, llama.cpp the longest anywhere."""
    output, note = start([{"content": "<ab>cd"}, {"content": "cd>efgh"}])
    assert "equal" not in note
    assert "'<ab>cd' (shares letters with another), as in '<ab>cd>efgh': " in note
    output.close()


def test_a_piece_of_text_that_llama_cpp_takes_for_special_is_said(start: Start) -> None:
    """`</s>` is a tag of HTML too."""

    def piece(raw: dict[str, Any]) -> None:
        raw["model"]["vocab"]["</s>"] = 390

    output, note = start([], edit=piece)
    assert "equal" not in note
    assert "'</s>' (special to llama.cpp by its text alone), as in" in note
    output.close()


def test_a_token_that_changes_a_prompt_of_the_model_is_refused(start: Start) -> None:
    """Phi-3's <|end|> takes the line's end with it, which its chat template writes after each message."""
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    with pytest.raises(QtoolError, match=r"token ids differ from the tokenizer's: '<\|user\|>"):
        start([{"content": "<|end|>", "rstrip": True}], files={"tokenizer_config.json": settings})


@pytest.mark.slow
def test_a_thousand_added_tokens_are_proved_in_seconds(start: Start) -> None:
    begun = time.process_time()
    output, note = start([{"content": f"<|token_{number}|>"} for number in range(1000)], size=1400)
    assert "and 100" in note
    assert time.process_time() - begun < 60
    output.close()


def test_holes_and_rows_without_a_token_are_padded(start: Start) -> None:
    output, _ = start([{"content": "<far>", "id": 380}, {"content": "[PAD399]", "id": 381}])
    file = GgufFile.open(output.place, output.config)
    tokens, types = file.metadata("tokenizer.ggml.tokens"), file.metadata("tokenizer.ggml.token_type")
    assert len(tokens) == len(set(tokens)) == 400
    assert types[399] == 5
    output.close()


def test_a_token_beyond_the_embedding_is_refused(start: Start) -> None:
    def grow(raw: dict[str, Any]) -> None:
        raw["model"]["vocab"]["zzzz"] = 5000

    with pytest.raises(QtoolError, match=r"the tokenizer has token 5000, config\.json's vocab_size is 400"):
        start([], edit=grow)


ENDS = ["<|turn_end|>", "<|answer_done|>", "<|third|>", "<|fourth|>"]


def stopped(output: GgufTensors) -> set[int]:
    """Ids of added tokens at which llama.cpp ends an answer."""
    found = set()
    for name in output.plan.names.values():  # weights that are no NaN: all zeros but the norms' ones
        kind, shape = output.plan.types[name].type, output.plan.shapes[name]
        count = int(torch.tensor(shape).prod()) * (4 if kind == "F32" else 2)
        output.writer.write(name, torch.zeros(count, dtype=torch.uint8))
    with serve(output.place, 128, repack=False) as url:
        for number in output.tokenizer.added_tokens_decoder:
            body = {"prompt": [5, 6], "n_predict": 3, "temperature": 0, "logit_bias": [[number, 1000]]}
            if served.ask(url.removesuffix("/v1") + "/completion", body)["stop_type"] == "eos":
                found.add(number)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_llama_cpp_ends_where_the_model_does_as_far_as_a_file_can_say(count: int, start: Start) -> None:
    def ids(raw: dict[str, Any]) -> None:
        numbers = [token["id"] for token in raw["added_tokens"] if token["content"] in ENDS[:count]]
        ends.extend(numbers)

    ends: list[int] = []
    output, _ = start([{"content": text} for text in ENDS], edit=ids)
    output.close()
    assert len(ends) == count
    generation = {"eos_token_id": ends if count > 1 else ends[0]}
    output, _ = start([{"content": text} for text in ENDS], files={"generation_config.json": generation})
    own = output.tokenizer.eos_token_id
    wanted = {own, *ends}
    found = stopped(output)
    said = " ".join(output.stops.notes)
    for number in wanted:
        text = output.tokenizer.convert_ids_to_tokens(number)
        assert text in output.stops.texts
        assert number in found or repr(text) in said
    assert found <= wanted
    assert len(found) == min(3, len(wanted))
    output.finish("", None, CalibrationText(0, 0, "none"))
    made = (output.place.parent / "Modelfile").read_text()
    assert all(f'PARAMETER stop "{text}"\n' in made for text in ENDS[:count])
    output.close()


def test_llama_cpp_ends_at_the_texts_that_are_said_to_be_known(start: Start) -> None:
    output, _ = start([{"content": text} for text in sorted(KNOWN)])
    numbers = {output.tokenizer.convert_tokens_to_ids(text) for text in KNOWN - {"<|end|>"}}
    assert numbers <= stopped(output)
    assert "llama.cpp also ends an answer at " in " ".join(output.stops.notes)
    output.close()


class Tokens:
    """A tokenizer of five tokens, the last three added."""

    def __init__(self, eos: int | None = 2) -> None:
        self.eos_token_id = eos
        self.added_tokens_decoder = {2: "<e>", 3: "<f>", 4: "<g>"}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "#": 1, "<e>": 2, "<f>": 3, "<g>": 4}


@pytest.mark.parametrize(
    ("generation", "config", "eos", "ids", "texts", "said"),
    [
        ({}, {"eos_token_id": 3}, 2, {"eos": 2, "eot": 3}, ["<e>", "<f>"], []),
        ({"eos_token_id": 4}, {"eos_token_id": 1}, 2, {"eos": 2, "eot": 4}, ["<e>", "<g>"], []),
        ({"eos_token_id": []}, {"eos_token_id": 3}, 2, {"eos": 2}, ["<e>"], []),
        (
            {"eos_token_id": None},
            {"eos_token_id": [3, 4]},
            2,
            {"eos": 2, "eot": 3, "eom": 4},
            ["<e>", "<f>", "<g>"],
            [],
        ),
        (None, {}, None, {}, [], ["no token ends an answer"]),
        (None, {"eos_token_id": [2, 2, 99, -1]}, None, {"eos": 2}, ["<e>"], ["99 is no token", "-1 is no token"]),
        (None, {"eos_token_id": 1}, None, {"eos": 1}, [], ["token 1 ('#'), an ordinary piece of text"]),
    ],
)
def test_odd_ends(
    generation: dict[str, Any] | None, config: dict[str, Any], eos: int | None, ids: dict[str, int], texts: list[str],
    said: list[str], tmp_path: Path,
) -> None:  # fmt: skip
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = find_stops(tmp_path, Tokens(eos), config, 5)
    assert found.ids == ids
    assert found.texts == texts
    assert len(found.notes) == len(said)
    assert all(part in note for part, note in zip(said, found.notes, strict=True))


@pytest.mark.parametrize("value", ["</s>", True, [2, None], {"a": 1}, 2.5])
def test_an_end_that_is_no_number_is_named(value: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(QtoolError, match=r"generation_config\.json: eos_token_id holds .*, which is no token's number"):
        find_stops(tmp_path, Tokens(), {}, 5)


def test_the_begin_of_a_text_is_what_the_tokenizer_does(start: Start) -> None:
    """A padding token of -1, as old Llama configs have it, is none; no BOS is put where the tokenizer puts none."""
    output, _ = start([], pad_token_id=None, edit=None, files={"generation_config.json": {}})
    file = GgufFile.open(output.place, output.config)
    puts = output.tokenizer("x").input_ids[:1] == [output.tokenizer.bos_token_id]
    assert file.metadata("tokenizer.ggml.add_bos_token") is puts
    output.close()
