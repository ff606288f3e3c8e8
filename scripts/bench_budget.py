"""Seconds that a budget's survey takes, part by part, and peak memory: random weights of a known geometry, no download.

    python scripts/bench_budget.py [--geometry 8b|mid|toy] [--outputs gguf,gptq,compressed-tensors] [--device cuda]
        [--layers 36] [--passes 2] [--work FOLDER]

8b: hidden 4096, intermediate 12288, 36 layers, a vocabulary of 151,936, bf16. Four layers lie on the disk, the others
are these again. For each output a process of its own with an empty cache of Triton's kernels, its types rehearsed
beside it as `qtool run` does, then another with the kernels that the first left (--passes 2). Prints a line of JSON for
each: seconds of opening (imports, skeleton, embedding), the forward, the head, the way back (gradients and sums), the
waiting for kernels, the rounding by type, the mix, and all; memory's peaks. Within five minutes on an H100; `toy` in
seconds on a processor.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qtool.convert.files.checkpoint import Checkpoint
from qtool.convert.files.tensor_info import Within
from qtool.convert.formats.plan import ModelShape
from qtool.convert.models.shape import Decoder, decoder_of
from qtool.convert.skeleton import build_skeleton, load_config
from qtool.make.mixes import joined, offers_of
from qtool.quantize import allocation
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.method import Method
from qtool.quantize.methods.table import METHODS
from qtool.quantize.ranks import ALONE
from qtool.quantize.rehearsal import Wanted, reduced_width
from qtool.quantize.source_model import SourceModel
from qtool.quantize.survey import Survey
from qtool.quantize.survey_memory import TOKENS

GEOMETRIES = {  # hidden, intermediate, heads, key/value heads, layers, vocabulary, tokens of a window
    "8b": (4096, 12288, 32, 8, 36, 151936, 512),
    "mid": (1024, 3072, 8, 4, 12, 32000, 512),
    "toy": (256, 256, 2, 1, 2, 512, 128),
}
DISTINCT = 4  # layers
OUTPUTS: dict[str, dict[str, Any]] = {
    "gguf": {"method": "gguf", "budget": {"target_bpw": 5}},
    "gguf-ggml": {"method": "gguf", "rounding": "ggml", "budget": {"target_bpw": 5}},
    "gptq": {"method": "gptq", "budget": {"target_bpw": 6}},
    "compressed-tensors": {"method": "gptq", "format": "compressed-tensors", "budget": {"target_bpw": 6}},
}


def main() -> None:
    """Make the model, time each output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="8b")
    parser.add_argument("--outputs", default="gguf,gptq")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--child", choices=OUTPUTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(surveyed(options, options.work)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="qtool-bench-") as folder:
        work = options.work or Path(folder)
        if not (work / "config.json").exists():
            begun = time.perf_counter()
            make_model(work, options)
            print(json.dumps({"model made": round(time.perf_counter() - begun, 1)}), flush=True)
        for output in options.outputs.split(","):
            with tempfile.TemporaryDirectory(prefix="qtool-kernels-") as kernels:
                for number in range(options.passes):
                    told = {"output": output, "kernels": "warm" if number else "cold"}
                    print(json.dumps(told | timed_child(options, work, output, kernels)), flush=True)


def timed_child(options: argparse.Namespace, work: Path, output: str, kernels: str) -> dict[str, Any]:
    """One survey in a process of its own."""
    command = [sys.executable, __file__, "--child", output, "--geometry", options.geometry, "--device", options.device,
               "--work", str(work), *(["--layers", str(options.layers)] if options.layers else [])]  # fmt: skip
    begun = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": kernels}, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.splitlines()[-3:]}
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told | {"process": round(time.perf_counter() - begun, 1)}


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """config.json of all layers."""
    hidden, intermediate, heads, kv_heads, layers, vocabulary, _ = GEOMETRIES[options.geometry]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "torch_dtype": "bfloat16",
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "num_hidden_layers": options.layers or layers, "vocab_size": vocabulary, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Few layers, bf16 weights with a heavy tail, a shard for each."""
    config = config_of(options)
    config["num_hidden_layers"] = min(DISTINCT, config["num_hidden_layers"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: tuple(one.shape) for name, one in build_skeleton(load_config(folder)).state_dict().items()}
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shape in shapes.items():
        normal = torch.randn(shape, generator=generator, device=device)
        made = torch.ones_like(normal) if len(shape) == 1 else normal * (1 + normal.abs() / 4) * 0.02
        shard = name.split(".")[2] if ".layers." in name else name.split(".")[0]
        shards.setdefault(shard, {})[name] = made.to(torch.bfloat16).cpu()
    files = {shard: f"model-{shard}.safetensors" for shard in shards}
    for shard, tensors in shards.items():
        save_file(tensors, folder / files[shard], metadata={"format": "pt"})
    places = {name: files[shard] for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def repeated(folder: Path, decoder: Decoder) -> Checkpoint:
    """All layers, of those that there are."""
    stored = Checkpoint.open(folder)
    distinct = min(DISTINCT, decoder.shape.layers)
    tensors = dict(stored.tensors)
    for layer in range(distinct, decoder.shape.layers):
        source = decoder.at(layer % distinct)
        for name, info in stored.tensors.items():
            if name.startswith(source):
                own = decoder.at(layer) + name.removeprefix(source)
                tensors[own] = replace(info, within=Within(name, info.shape))
    return stored.holding(tensors)


class Clock:
    """Seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.spent: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        """When all that was asked of the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def around(self, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """The same, timed."""

        def timed(*args: Any, **named: Any) -> Any:
            begun = self.now()
            try:
                return action(*args, **named)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + self.now() - begun

        return timed


def halfway(offers: allocation.Offers) -> float:
    """Nats a token of the best mix halfway between the smallest and the largest."""
    mix = allocation.cheapest(offers, sum(allocation.bounds(offers)) // 2)
    assert mix is not None
    return allocation.cost_of(mix)


def surveyed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A survey and its mix."""
    begun, config, device = time.perf_counter(), config_of(options), torch.device(options.device)
    decoder = decoder_of(config)
    checkpoint = repeated(folder, decoder)
    shape = ModelShape(checkpoint.tensors, decoder, config)
    method = METHODS[OUTPUTS[options.child]["method"]].model_validate(OUTPUTS[options.child])
    sizes = method.offers(shape)
    rehearsals = rehearsed(options, method, shape, sizes) if device.type == "cuda" else {}
    path = folder / f"config-{decoder.shape.layers}"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    source = SourceModel(build_skeleton(load_config(path)), decoder, checkpoint, device, ALONE)
    length = GEOMETRIES[options.geometry][-1]
    generator = torch.Generator().manual_seed(0)
    text = CalibrationSet(torch.randint(config["vocab_size"], (TOKENS // length, length), generator=generator), "bench")
    clock = Clock(device)
    marks: list[float] = []
    tries = type(method).trial

    def trial(self: Method, weight: Tensor, kind: str, gram: Any, factor: Any) -> Tensor:
        done: Tensor = clock.around(kind, tries)(self, weight, kind, gram, factor)
        return done

    def ready(kind: str) -> None:
        if kind in rehearsals:
            rehearsals[kind].wait()

    type(method).trial = trial  # type: ignore[method-assign, assignment]  # a model of pydantic takes no other
    survey = Survey(
        source, method, {module: list(own) for module, own in sizes.items()}, lambda: marks.append(clock.now()),
        ready=clock.around("waiting for kernels", ready),
    )  # fmt: skip
    survey._head = clock.around("head", survey._head)  # type: ignore[method-assign]  # as above
    started = clock.now()
    costs = survey.run(text)
    ended = clock.now()
    layers = decoder.shape.layers
    kinds = {kind: round(clock.spent[kind], 2) for kind in dict.fromkeys(k for own in sizes.values() for k in own)}
    waited = clock.spent.get("waiting for kernels", 0.0)
    mixing = time.perf_counter()
    expected = halfway(joined(offers_of(sizes, costs), method.alike(shape)))
    mixed = time.perf_counter() - mixing
    for process in set(rehearsals.values()):
        with suppress(OSError):
            process.kill()
    told = {
        "opening": started - begun, "forward": marks[layers - 1] - started,
        "head": clock.spent["head"], "back": ended - marks[layers - 1] - clock.spent["head"], "survey": ended - started,
        "waiting for kernels": waited, "rounding": sum(kinds.values()), "mix": mixed,
    }  # fmt: skip
    rounded = {name: round(value, 2) for name, value in told.items()} | {"by type": kinds}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    on_card = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return rounded | {
        "beyond the forward": round(told["survey"] - told["forward"] - waited, 2), "host GiB": round(peak, 2),
        "card GiB": round(on_card, 2), "layers": layers,
        "device": torch.cuda.get_device_name() if on_card else f"{os.cpu_count()} cores",
        "expected KL": expected,
    }  # fmt: skip


def rehearsed(
    options: argparse.Namespace, method: Method, shape: ModelShape, sizes: Mapping[str, Mapping[str, int]]
) -> dict[str, subprocess.Popen[str]]:
    """A process a type, as rehearsing.py has them: type -> process."""
    found: dict[str, subprocess.Popen[str]] = {}
    lossy = {kind for own in sizes.values() for kind in own} - {
        max(own, key=lambda k: own[k]) for own in sizes.values()
    }
    columns = {module: info.shape[-1] for module in sizes if (info := shape.tensors.get(f"{module}.weight"))}
    for kind in sorted(lossy):
        widths = sorted({reduced_width(columns[module]) for module, own in sizes.items() if kind in own})
        section = method.model_dump(mode="json", exclude={"budget"})
        wanted = Wanted(
            config={}, dtype="bfloat16", outputs=[section], device=options.device, widths={kind: widths}
        )  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "qtool.quantize.rehearsal", os.devnull], stdin=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin as given:
            given.write(wanted.model_dump_json())
        found[kind] = process
    return found


if __name__ == "__main__":
    main()
