"""llama.cpp's type rules by the sizes that llama-quantize's dry run prints for public models."""

from __future__ import annotations

from collections import Counter

import pytest

from qtool.convert.formats.gguf.ggml import row_bytes
from qtool.convert.formats.gguf.types import FILE_TYPES, tensor_types, use_more_bits
from qtool.convert.models.shape import shape_of
from qtool.convert.models.table import gguf_facts


def model(
    hidden: int, layers: int, heads: int, kv: int, dim: int, intermediate: int, vocabulary: int, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, hidden)}
    for layer in range(layers):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (heads * dim, hidden),
            "attn_k": (kv * dim, hidden), "attn_v": (kv * dim, hidden), "attn_output": (hidden, heads * dim),
            "ffn_gate": (intermediate, hidden), "ffn_up": (intermediate, hidden), "ffn_down": (hidden, intermediate),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    shapes["output_norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"output.weight": (vocabulary, hidden)}


IQUEST_40B = model(5120, 80, 40, 8, 128, 27648, 76800)
LLAMA_8B = model(4096, 32, 32, 8, 128, 14336, 128256)
SMOLLM2 = model(576, 30, 9, 3, 64, 1536, 49152, tied=True)


def nbytes(shapes: dict[str, tuple[int, ...]], file_type: str, layers: int, large: bool = False) -> int:
    types = tensor_types(shapes, file_type, layers, large)
    return sum(
        (shape[0] if len(shape) > 1 else 1) * row_bytes(types[name].type, shape[-1]) for name, shape in shapes.items()
    )


@pytest.mark.parametrize(
    ("file_type", "mebibytes"), [("Q4_K_M", 22915.45), ("Q5_K_M", 26887.32), ("Q6_K", 31134.00), ("Q8_0", 40325.02)]
)
def test_iquest_coder_40b_as_llama_quantize_sizes_it(file_type: str, mebibytes: float) -> None:
    assert nbytes(IQUEST_40B, file_type, 80, large=True) / 2**20 == pytest.approx(mebibytes, abs=0.005)


@pytest.mark.parametrize(("file_type", "bpw"), [("Q4_K_M", 4.894), ("Q6_K", 6.563)])
def test_llama_8b_bits_per_weight(file_type: str, bpw: float) -> None:
    weights = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in LLAMA_8B.values())
    assert 8 * nbytes(LLAMA_8B, file_type, 32) / weights == pytest.approx(bpw, abs=0.0005)


@pytest.mark.parametrize(
    ("architecture", "layers", "kv", "expected"),
    [
        ("LlamaForCausalLM", 80, 8, True),
        ("IQuestCoderForCausalLM", 80, 8, True),
        ("LlamaForCausalLM", 80, 64, False),  # its "65B"
        ("LlamaForCausalLM", 80, None, False),
        ("LlamaForCausalLM", 64, 8, False),
        ("Qwen2ForCausalLM", 80, 8, True),
        ("Qwen2ForCausalLM", 80, 64, True),  # qwen2 asks for the layers alone
        ("Qwen2ForCausalLM", 64, 8, False),
        ("Qwen3ForCausalLM", 80, 8, False),
    ],
)
def test_what_llama_cpp_takes_for_its_70b(architecture: str, layers: int, kv: int | None, expected: bool) -> None:
    config = {
        "architectures": [architecture], "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": kv, "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 32000,
    }  # fmt: skip
    assert gguf_facts(config).like_70b(shape_of(config)) is expected


def test_rows_that_256_does_not_divide_fall_back() -> None:
    types = tensor_types(SMOLLM2, "Q4_K_M", 30)
    assert Counter(typed.type for typed in types.values()) == {
        "Q5_0": 166, "F32": 61, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14,
    }  # fmt: skip
    assert types["token_embd.weight"].wanted == "Q6_K"
    assert types["token_embd.weight"].type == "Q8_0"
    assert types["blk.0.ffn_down.weight"].fell_back is False
    assert tensor_types({"blk.0.ffn_up.weight": (8, 40)}, "Q4_K_M", 2)["blk.0.ffn_up.weight"].type == "F16"


def test_layers_with_more_bits() -> None:
    assert [n for n in range(32) if use_more_bits(n, 32)] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert [sum(use_more_bits(n, count) for n in range(count)) for count in (24, 28, 36, 80)] == [12, 14, 18, 40]


def test_small_mixes() -> None:
    small = tensor_types(LLAMA_8B, "Q4_K_S", 32)
    assert [small[f"blk.{n}.attn_v.weight"].type for n in (0, 3, 4)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert [small[f"blk.{n}.ffn_down.weight"].type for n in (0, 3, 4)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert {t.type for name, t in tensor_types(LLAMA_8B, "Q5_K_S", 32).items() if "blk" in name} == {"Q5_K", "F32"}


def test_file_types_are_the_gguf_packages() -> None:
    gguf = pytest.importorskip("gguf")
    for name, number in FILE_TYPES.items():
        found = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_")
        assert found == name
