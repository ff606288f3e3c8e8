"""What types lose: problems side by side lose what each loses alone, and a problem is what shares an input."""

from __future__ import annotations

import pytest
import torch

from qtool.convert.formats.gguf.ggml import BLOCKS
from qtool.convert.models.feeds import whole
from qtool.quantize import survey_errors
from qtool.quantize.methods.ggml import quantize_ggml
from qtool.quantize.methods.gguf import GgufMethod
from qtool.quantize.methods.gptq import GptqMethod
from qtool.quantize.methods.kquant_rounding import WHOLE_ROWS, _search
from qtool.quantize.methods.method import Method
from qtool.quantize.survey_errors import Problem, costs_of, layers_at_once, problems_of, spaced

CPU = torch.device("cpu")


def problems(kinds: list[str], compensates: bool = True, columns: int = 256) -> list[Problem]:
    """Two of one layer: of two matrices, and of one that has more rows than are looked at."""
    generator = torch.Generator().manual_seed(0)
    rows = {"q": 48, "k": 16, "up": 300}
    weights = {name: torch.randn(count, columns, generator=generator) * 0.05 for name, count in rows.items()}
    groups = [[whole("q"), whole("k")], [whole("up")]]
    types = {f"layers.3.{name}": kinds for name in rows}
    made = problems_of(groups, lambda matrix: weights[matrix.module], "layers.3.", types, CPU, compensates)
    for problem in made:
        x = torch.randn(512, columns, generator=generator) * torch.linspace(0.1, 2, columns)
        problem.add(x)
        for member in problem.members:
            for _ in range(2):
                member.add(x[:64], torch.randn(64, len(member.outputs), generator=generator))
    return made


def test_matrices_that_share_an_input_share_a_gram_matrix() -> None:
    first, second = problems(["Q4_K"])
    assert [member.module for member in first.members] == ["layers.3.q", "layers.3.k"]
    assert (first.rows, second.rows) == (64, 256)
    assert torch.equal(second.members[0].rows, spaced(300, 256))


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        (GgufMethod(method="gguf"), ["Q2_K", "Q4_K", "IQ4_XS", "Q8_0", "BF16"]),
        (GgufMethod(method="gguf", rounding="ggml"), ["Q3_K", "Q5_1"]),
        (GptqMethod(method="gptq"), ["int4-g64", "16 bits"]),
    ],
)
def test_side_by_side_they_lose_what_each_loses_alone(
    method: Method, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of zeros fill up the smaller one."""
    pytest.importorskip("xllamacpp")
    asked: list[str] = []
    alone = costs_of(problems(kinds, method.compensates), method, asked.append)
    assert asked == kinds * 2
    together = survey_errors._tried(problems(kinds, method.compensates), method, lambda _: None)
    assert alone.keys() == together.keys() == {"layers.3.q", "layers.3.k", "layers.3.up"}
    for module, own in alone.items():
        assert list(own) == kinds
        assert own == pytest.approx(together[module], rel=0.02)
    assert alone["layers.3.q"][kinds[0]] > 0


@pytest.mark.parametrize("type_name", ["Q2_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q8_0", *WHOLE_ROWS])
def test_a_stack_is_searched_as_its_problems_are(type_name: str) -> None:
    """Bit for bit, in one call."""
    pytest.importorskip("xllamacpp")
    weights, importance = torch.randn(3, 5, 512), torch.rand(3, 512) + 0.1
    found = _search(weights, type_name, importance)
    each = [quantize_ggml(one, type_name, row / row.mean()).data for one, row in zip(weights, importance, strict=True)]
    assert torch.equal(found.data, torch.cat(each))
    assert found.shape == (15, 512)
    assert 512 % BLOCKS[type_name][0] == 0


def test_a_method_that_does_not_compensate_takes_the_diagonal() -> None:
    whole, diagonal = problems(["Q4_K"]), problems(["Q4_K"], compensates=False)
    for one, other in zip(whole, diagonal, strict=True):
        torch.testing.assert_close(other.gram, one.gram.diagonal())


def test_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on a processor; on a card as many as a part of it holds, whatever is free there."""
    assert layers_at_once(CPU, 1) == 1
    card = type("Card", (), {"total_memory": 80 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    device = torch.device("cuda")
    assert [layers_at_once(device, size) for size in (10**9, 5 * 10**9, 30 * 10**9)] == [8, 4, 1]
