"""The model card: the whole text, what the Hub's own reader finds in it, and texts that try to break out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from qtool.convert.files.licence import Licence
from qtool.convert.files.manifest import FileEntry, Manifest
from qtool.convert.files.proof import Finding, Proof
from qtool.convert.verify.verification import Check
from qtool.evaluate.scorecard import FidelityScore, ProblemOutcome, Scores, Settings, TaskScore
from qtool.report.card import Card, Published, card_text, escape, eval_files, fenced, loading
from qtool.runs.gates import GateResult
from qtool.runs.measurements import Measurement, Row
from qtool.runs.summary import Size, summarise

GOLDEN = Path(__file__).parent / "data/card.md"
SETTINGS = Settings(engine="vllm", version="0.33", dtype="float16", device="cuda", prompt="chat", max_new_tokens=384)
RECIPE = "model: IQuest/Coder-7B\ncalibration: {text: my-org/code-text}\noutputs:\n- method: awq\n"


def task(name: str, solved: int) -> TaskScore:
    outcomes = {
        f"t/{i}": ProblemOutcome(outcome="passed" if i < solved else "failed", detail="", completion="")
        for i in range(40)
    }
    return TaskScore(
        key=name, subject=name, task="humaneval", digest="d", settings=SETTINGS, sandbox="bwrap", seconds=1.0,
        outcomes=outcomes,
    )  # fmt: skip


def fidelity(name: str, kl: float) -> FidelityScore:
    return FidelityScore(
        key=name, subject=name, digest="t", settings=SETTINGS, tokens=96, nll=[1.0, 1.2], kl=[kl, kl], top1=[0.9, 0.8],
        kl_p95=kl, kl_p999=kl, context=48,
    )  # fmt: skip


def manifest(**output: object) -> Manifest:
    return Manifest(
        qtool="0.1.0", key="k" * 64, output={"method": "awq", "name": "awq", "bits": 4, **output},
        source={"model": "IQuest/Coder-7B", "name": "Coder-7B", "commit": "abc123"},
        calibration={"text": "my-org/code-text"}, device="NVIDIA H100", versions={"torch": "2.13.0"}, parameters=100,
        tensor_bytes=4_100_000_000, bits_per_weight=4.31,
        ledger={f"layers.{i}.up_proj": {"rtn_error": 0.1 * i, "error": 0.05 * i} for i in range(1, 4)},
        files={"model.safetensors": FileEntry(bytes=1, sha256="0"), "m-Q4_K_M.gguf": FileEntry(bytes=1, sha256="0")},
        notes=["a note on <types>"],
    )  # fmt: skip


def measurement() -> Measurement:
    rows = [
        Row(2048, batch, "ok", "", {"p50": 0.2, "p95": 0.3, "p99": 0.3}, step, batch / step, batch / step / 64, 0.21,
            0.0, {"allocated": 5 * 2**30, "device": 6 * 2**30}, 5 * 2**30, (0.002, 0.02), (0.1, 0.4))
        for batch, step in ((1, 0.0125), (8, 0.016))
    ]  # fmt: skip
    return Measurement("k", "awq", "vllm", "vllm 0.33", "NVIDIA H100 | <x>", 64, 3, "2026-01-01", tuple(rows))


@pytest.fixture
def card() -> Card:
    checks = [
        Check("files and sha256", "pass", "2 files"),
        Check("transformers: loads", "pass", "fine"),
        Check("vLLM 0.33: plain kernel, TP 1", "pass", "fine"),
        Check("SGLang 0.5: Marlin kernel, TP 1", "fail", "k_proj: out 32 is not a multiple of 64", required=False),
    ]
    verdict = GateResult("awq", "max_drop 3", "pass", "lost 2.5 points: within | bounds <b>", "warn")
    scores = Scores(tasks={"source": {"humaneval": task("source", 30)}, "awq": {"humaneval": task("awq", 29)}})
    scores.add_fidelity(fidelity("source", 0.0))
    scores.add_fidelity(fidelity("awq", 0.0125))
    sizes = {"source": Size(15_200_000_000, 16.0), "awq": Size(4_100_000_000, 4.31, 4_100_000_000)}
    return Card(
        repo="my-org/Coder-7B-AWQ-4bit", base_model="IQuest/Coder-7B",
        licence=Licence("other", "iquestcoder", "https://example.org/LICENSE"),
        artifacts=[Published("awq", "AWQ-4bit", "", manifest(), checks, [verdict])],
        summary=summarise(scores, sizes, {"awq": [measurement()]}), recipe_text=RECIPE, plot=True,
    )  # fmt: skip


def test_the_whole_card(card: Card) -> None:
    """After a change on purpose: look at the new text, then store it as tests/data/card.md."""
    assert card_text(card) == GOLDEN.read_text()


def test_servers_that_proved_it_are_named(card: Card) -> None:
    cache = Finding(what="cache", outcome="pass", detail="17 blocks")
    proof = Proof(
        engine="vllm", version="vllm 0.32.0", machine="a <processor>", dtype="float16", cache_type="bf16", context=512,
        users=4, time="", command="vllm serve m", kernels=["CPUWNA16LinearKernel"],
        numbers={"kl": 4.3e-6, "top1": 0.9984}, findings=[cache],
    )  # fmt: skip
    (item,) = card.artifacts
    proved = replace(item, manifest=item.manifest.model_copy(update={"proofs": [proof]}))
    text = card_text(replace(card, artifacts=[proved], summary=card.summary.with_proofs({"awq": [proof]})))
    assert "## In real servers" in text
    assert "| awq | vllm 0.32.0 | float16 | pass | 4.3e-06 | 99.84% | 4 x 512 |" in text
    assert "vllm 0.32.0 on a &lt;processor&gt;: CPUWNA16LinearKernel." in text
    assert "checked on these files; vllm was started with them." in text


def test_the_hubs_reader_finds_the_metadata(card: Card) -> None:
    data = ModelCard(card_text(card)).data
    assert data.base_model == "IQuest/Coder-7B"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "iquestcoder",
        "https://example.org/LICENSE",
    )
    assert data.library_name == "transformers"
    assert data.datasets == ["my-org/code-text"]
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("humaneval", "pass@1", 0.725), ("held-out text", "kl-divergence", 0.0125),
    ]  # fmt: skip


def test_a_local_source_has_no_base_model(card: Card) -> None:
    text = card_text(replace(card, base_model=None))
    assert "base_model" not in text
    assert "Coder-7B quantized to AWQ-4bit" in text


def test_registered_benchmarks_have_result_files(card: Card) -> None:
    files = eval_files(card, {"humaneval": ("openai/openai_humaneval", "openai_humaneval"), "other": ("a/b", "c")})
    assert list(files) == [".eval_results/humaneval.yaml"]
    (entry,) = yaml.safe_load(files[".eval_results/humaneval.yaml"])
    assert entry["value"] == 0.725
    assert entry["dataset"]["id"] == "openai/openai_humaneval"


def test_a_gguf_is_loaded_by_llama_cpp_alone(card: Card) -> None:
    made = manifest(method="gguf", type="Q4_K_M")
    text = "\n".join(loading(replace(card.artifacts[0], manifest=made), "my-org/Coder-GGUF"))
    assert "llama-server -m ./Coder-GGUF/m-Q4_K_M.gguf" in text
    assert "vllm" not in text
    assert "ollama" not in text  # no Modelfile in the manifest


def test_a_runtime_whose_rules_failed_is_not_named(card: Card) -> None:
    assert not any("sglang" in block for block in loading(card.artifacts[0], "my-org/x"))
    assert any("vllm serve my-org/x" in block for block in loading(card.artifacts[0], "my-org/x"))


def test_a_runtime_that_any_number_of_cards_refuses_is_not_named(card: Card) -> None:
    """Its other rules hold: transformers reads the keys of a GPTQ file, and makes all linears of one size."""
    keys = [Check("transformers 5.23: keys", "pass", ""), Check("vLLM 0.32: loading", "pass", "")]
    sizes = Check("transformers + GPTQModel 7.6: sizes", "fail", "it makes all linears of one size", required=False)
    kernel = Check("vLLM 0.32: CPU kernel, TP 1", "fail", "bits is 8", required=False, cards=1)
    item = replace(card.artifacts[0], manifest=manifest(method="gptq"), checks=[*keys, sizes, kernel])
    text = "\n".join(loading(item, "my-org/x"))
    assert "transformers" not in text
    assert "vllm serve my-org/x" in text, "another kernel runs it"


@pytest.mark.parametrize(
    ("output", "package"),
    [
        ({"method": "gptq"}, "gptqmodel"), ({"method": "nf4"}, "bitsandbytes"),
        ({"method": "gptq", "format": "compressed-tensors"}, "compressed-tensors"),
    ],
)  # fmt: skip
def test_each_container_names_the_package_of_its_kernels(card: Card, output: dict[str, str], package: str) -> None:
    """In a folder of its own, which has to be fetched first."""
    checks = [Check(f"{runtime} 1: keys", "pass", "") for runtime in ("transformers", "compressed-tensors", "vLLM")]
    item = replace(card.artifacts[0], manifest=manifest(**output), checks=checks, folder="one")
    fetched, python, shell = loading(item, "my-org/x")
    assert "hf download my-org/x --local-dir ./x" in fetched
    assert f"# pip install transformers accelerate {package}\n" in python
    assert 'model = "./x/one"' in python
    assert "vllm serve ./x/one" in shell


def test_texts_of_others_stay_texts(card: Card) -> None:
    assert escape("a <script>|x|\n# [b](c) `d`") == "a &lt;script&gt;\\|x\\| \\# \\[b\\](c) \\`d\\`"
    assert fenced("```\n</details>\n````", "yaml") == "`````yaml\n```\n</details>\n````\n`````"
    hostile = Licence("other", "<img src=x onerror=alert(1)>", "javascript:alert(1)")
    text = card_text(replace(card, licence=hostile)).split("\n---\n", 1)[1]
    assert "<img" not in text
    assert "javascript:" not in text


def test_what_did_not_pass_is_said_first(card: Card) -> None:
    item = replace(card.artifacts[0], refused=["gate fail: max_drop 3: lost 9"])
    text = card_text(replace(card, artifacts=[item]))
    warning = text.index("**Published although it did not pass** (awq): gate fail: max\\_drop 3: lost 9.")
    assert warning < text.index("## What it cost")
