"""llm-compressor quantizes a model on given tokens; compare_llmcompressor.py runs it in an environment of its own.

    python peer_llmcompressor.py MODEL TOKENS.pt OUT gptq|awq GROUP

GPTQ is symmetric, AWQ asymmetric, as qtool's defaults are; routers and the head stay as they are.
"""

from __future__ import annotations

import argparse

import torch


def main() -> None:
    """Quantize and save, packed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("kind", choices=("gptq", "awq"))
    parser.add_argument("group", type=int)
    options = parser.parse_args()

    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    IntermediatesCache.pin_memory = lambda *_, **__: None  # it needs an accelerator
    tokens = torch.load(options.tokens)
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=options.kind == "gptq", strategy="group", group_size=options.group
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    ignore = ["lm_head", "re:.*mlp.gate$"]
    recipe = [GPTQModifier(config_groups=groups, ignore=ignore)]
    if options.kind == "awq":
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=ignore)]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model, dataset=Dataset.from_dict(rows), recipe=recipe,
        tokenizer=AutoTokenizer.from_pretrained(options.model), max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )  # fmt: skip
    model.save_pretrained(options.out, save_compressed=True)


if __name__ == "__main__":
    main()
