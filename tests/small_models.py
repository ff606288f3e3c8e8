"""Two-layer models with random weights and a small tokenizer: the real pipeline runs on them in a second."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

TEXT = "".join(f"def f{i}(a, b):\n    return a * {i} + b\n\n\n" for i in range(400))

PROBLEM = {
    "task_id": "t/0", "prompt": 'def f(x: int) -> int:\n    """Do it."""\n', "entry_point": "f",
    "canonical_solution": "    return x + 1000\n", "test": "def check(candidate):\n    assert candidate(1) == 1001\n",
}  # fmt: skip


@cache
def _tokenizer() -> str:
    """Trained once a process: byte-level BPE of 320 tokens, as tokenizer.json says it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    said: str = tokenizer.to_str()
    return said


def make_model(
    folder: Path, architecture: str = "Llama", shard: str = "200KB", loudness: float = 1.0, **changes: Any
) -> Path:
    """A checkpoint of ``architecture`` in ``folder``: hidden 128, intermediate 256, 4 heads over 2 key/value heads.
    ``loudness``: its logits are multiplied by it."""
    import transformers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_tokenizer())
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    settings: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    kind = _class_of(f"{architecture}ForCausalLM")
    model = kind(kind.config_class(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # outlier channels, as trained models have them
                parameter.copy_(1 + torch.rand_like(parameter) + 6 * (torch.rand_like(parameter) > 0.95))
                parameter.sub_(_added(f"{architecture}ForCausalLM", f"{name}"))
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
        last: Any = getattr(model.model, "norm", None) or model.model.embedding_norm
        last.weight.mul_(loudness)
    model.to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # float32 in every checkpoint
            module.e_score_correction_bias.data = torch.randn(module.e_score_correction_bias.shape)
    model.save_pretrained(folder, max_shard_size=shard)
    fast.save_pretrained(folder)
    return folder


def _added(architecture: str, name: str) -> float:
    """What the norm of a weight adds to it."""
    from qtool.convert.models.table import FAMILIES

    family = FAMILIES.get(architecture)
    return family.norm_offset(name) if family else 0.0


def _class_of(name: str) -> Any:
    """transformers' own, or the one that qtool makes known to it."""
    import transformers

    from qtool.convert.models.table import FAMILIES

    family = FAMILIES.get(name)
    own = family.register() if family is not None and family.register is not None else None
    return own or getattr(transformers, name)


def converted(model: Path, outputs: list[dict[str, Any]], folder: Path, ranks: Any = None) -> dict[str, Path]:
    """Output name -> its sealed artifact in ``folder``, calibrated on fixed random tokens. ``ranks``: who makes them
    together (None: this process alone)."""
    from qtool.convert.files.source import resolve
    from qtool.make.job import open_job
    from qtool.make.outputs import make_artifacts
    from qtool.quantize.calibration import CalibrationSet
    from qtool.quantize.ranks import ALONE
    from qtool.recipe.sections import load_recipe

    path = folder / f"recipe-{ranks.rank if ranks else 0}.yaml"
    path.write_text(json.dumps({"model": str(model), "outputs": outputs, "output_dir": f"{folder}/artifacts"}))
    recipe = load_recipe(path)
    job = open_job(recipe, resolve(recipe.model.id), torch.device("cpu"), recipe.outputs)
    tokens = torch.randint(0, 320, (6, 48), generator=torch.Generator().manual_seed(0))
    made = make_artifacts(job, CalibrationSet(tokens, "test"), ranks=ranks or ALONE)
    return {name: artifact.path for name, artifact in made.items()}
