"""The files beside an artifact: from its plan alone, in its engine's words, each saying that nobody ran it.

What reads them for real (schemas, promtool, docker compose, Prometheus): scripts/check_bundle.py, check_observed.py.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from small_models import converted

import qtool
from qtool import QtoolError
from qtool.bundle.bundle import Bundle, make_bundle
from qtool.bundle.queries import Asked, queries
from qtool.bundle.table import FILES, NOT_RUN
from qtool.bundle.target import as_flags, as_words
from qtool.cli import main
from qtool.evaluate.engines.scrape import known_metrics
from qtool.evaluate.engines.table import SERVERS
from qtool.serve.here import server_here

OUTPUTS: list[dict[str, Any]] = [
    {"method": "awq", "group_size": 32},
    {"method": "gptq", "name": "ct", "group_size": 32, "format": "compressed-tensors", "propagate_error": False},
    {"method": "nf4"},
    {"method": "gguf", "type": "Q8_0"},
]
REPO = "my-org/Tiny-AWQ"


@pytest.fixture(scope="module")
def artifacts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = converted(tiny, OUTPUTS, tmp_path_factory.mktemp("bundle"))
    return made


def bundle_of(folder: Path, card: str = "L40S", repository: str | None = REPO, **asked: Any) -> Bundle:
    server = server_here(str(folder), card, **({"users": 8, "context": 64} | asked))
    return make_bundle(folder, server, repository, folder / "serve")


@pytest.fixture(scope="module")
def awq(artifacts: dict[str, Path]) -> Bundle:
    return bundle_of(artifacts["awq"], cards=2)


@pytest.fixture(scope="module")
def gguf(artifacts: dict[str, Path]) -> Bundle:
    return bundle_of(artifacts["gguf"], "RTX4090", None)


def read(bundle: Bundle, name: str) -> Any:
    return yaml.safe_load(bundle.files[name])


def test_each_engine_gets_the_files_that_suit_it(awq: Bundle, gguf: Bundle) -> None:
    assert set(awq.files) == {
        "recipe.yaml", "production-stack.yaml", "llm-d.yaml", "kserve.yaml", "compose.yaml", "alerts.yaml",
        "dashboard.json", "load.sh", "README.md",
    }  # fmt: skip
    assert set(gguf.files) == {
        "llama-server.ini", "Modelfile", "compose.yaml", "alerts.yaml", "dashboard.json", "load.sh", "README.md",
    }  # fmt: skip
    assert awq.left_out == gguf.left_out == ()


def test_every_file_says_that_nobody_ran_it(awq: Bundle, gguf: Bundle) -> None:
    for bundle in (awq, gguf):
        for name, text in bundle.files.items():
            assert NOT_RUN in text, name
            assert "verified" not in text, name


def test_every_row_is_some_engines_and_every_engines_row_is_there() -> None:
    named = {kind for facts in SERVERS.values() for kind in facts.bundle}
    assert named == set(FILES)
    for facts in SERVERS.values():
        if facts.bundle:  # what the files do not carry: an environment
            assert facts.metrics is not None
            assert re.fullmatch(r"\S+:\S*\d\S*", facts.image)
            assert not facts.image.endswith(":latest")


def test_the_flags_are_the_planned_ones(awq: Bundle) -> None:
    """Those of the command that `qtool serve` starts, whatever that comes to be."""
    planned = as_flags(list(awq.target.server.launch.words))
    own = {"--host", "--port", "--served-model-name"}
    composed = read(awq, "compose.yaml")["services"]["engine"]["command"]
    assert composed[0] == "/model"
    assert {k: v for k, v in as_flags(composed).items() if k not in own} == {
        k: v for k, v in planned.items() if k not in own
    }
    assert as_flags(composed)["--host"] == "0.0.0.0"
    charts = own | {"--tensor-parallel-size"}
    wanted = as_words(planned, charts)
    assert read(awq, "recipe.yaml")["model"]["base_args"] == wanted
    assert read(awq, "llm-d.yaml")["decode"]["containers"][0]["args"] == wanted
    (container,) = read(awq, "kserve.yaml")["spec"]["template"]["containers"]
    assert container["env"] == [{"name": "VLLM_ADDITIONAL_ARGS", "value": " ".join(wanted)}]


def test_two_cards_are_asked_for_everywhere(awq: Bundle) -> None:
    stack = read(awq, "production-stack.yaml")["servingEngineSpec"]["modelSpec"][0]
    assert stack["resources"] == {"requests": {"nvidia.com/gpu": "2"}, "limits": {"nvidia.com/gpu": "2"}}
    assert stack["vllmConfig"]["tensorParallelSize"] == 2
    assert read(awq, "llm-d.yaml")["decode"]["parallelism"] == {"tensor": 2}
    assert read(awq, "kserve.yaml")["spec"]["parallelism"] == {"tensor": 2}
    assert read(awq, "recipe.yaml")["strategy_overrides"] == {"single_node_tp": {"tp": 2}}
    (device,) = read(awq, "compose.yaml")["services"]["engine"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}


def test_production_stack_says_what_its_chart_would_turn_off(awq: Bundle) -> None:
    """The chart writes --no-enable-prefix-caching where values say nothing."""
    config = read(awq, "production-stack.yaml")["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]
    assert config["enablePrefixCaching"] is True
    assert config["enableChunkedPrefill"] is True
    assert config["maxModelLen"] == 64
    assert config["maxNumSeqs"] == 8
    assert not {"--enable-prefix-caching", "--max-model-len", "--port"} & set(config["extraArgs"])


def test_the_recipe_has_their_words(awq: Bundle, artifacts: dict[str, Path]) -> None:
    recipe = read(awq, "recipe.yaml")
    assert recipe["model"]["model_id"] == REPO
    assert recipe["model"]["docker_image"] == f"vllm/vllm-openai:v{recipe['model']['min_vllm_version']}"
    assert recipe["variants"]["default"]["precision"] == "awq"
    assert recipe["variants"]["default"]["vram_minimum_gb"] * 1e9 >= 2 * awq.target.server.estimate.total
    assert "hardware" not in recipe["meta"]  # only cards on which somebody ran it
    assert read(bundle_of(artifacts["ct"]), "recipe.yaml")["variants"]["default"]["precision"] == "int4"


def test_a_format_that_the_image_does_not_run_gets_no_files(artifacts: dict[str, Path]) -> None:
    """NF4 needs a plugin that vLLM's image lacks."""
    with pytest.raises(QtoolError, match="vllm-bnb-plugin"):
        bundle_of(artifacts["nf4"])


def test_without_a_repository_nothing_names_one(artifacts: dict[str, Path]) -> None:
    bundle = bundle_of(artifacts["awq"], repository=None)
    assert set(bundle.files) == {"compose.yaml", "alerts.yaml", "dashboard.json", "load.sh", "README.md"}
    assert [text.split(":")[0] for text in bundle.left_out] == [
        "recipe.yaml", "production-stack.yaml", "llm-d.yaml", "kserve.yaml"
    ]  # fmt: skip
    assert all("--repo" in text for text in bundle.left_out)


@pytest.mark.parametrize("card", ["MI300X", "cpu"])
def test_what_is_nvidias_is_left_out_elsewhere(artifacts: dict[str, Path], card: str) -> None:
    bundle = bundle_of(artifacts["awq"], card)
    assert set(bundle.files) == {"alerts.yaml", "dashboard.json", "load.sh", "README.md"}
    assert "NVIDIA" in bundle.left_out[0]


@pytest.mark.parametrize("repository", ["name", "a/b/c", "/b", "a/"])
def test_a_repository_has_an_owner_and_a_name(artifacts: dict[str, Path], repository: str) -> None:
    with pytest.raises(QtoolError, match="ORG/NAME"):
        bundle_of(artifacts["awq"], repository=repository)


def names_in(promql: str) -> set[str]:
    return set(re.findall(r"[a-z_]+:[a-z_]+", promql))


def test_alerts_and_dashboard_use_the_engines_own_names_and_no_other(awq: Bundle, gguf: Bundle) -> None:
    for bundle in (awq, gguf):
        metrics = bundle.target.server.facts.metrics
        assert metrics is not None
        stated = {name for names in metrics.names().values() for name in names}
        rules = read(bundle, "alerts.yaml")["groups"][0]["rules"]
        panels = json.loads(bundle.files["dashboard.json"])["panels"]
        asked = [rule["expr"] for rule in rules] + [t["expr"] for panel in panels for t in panel["targets"]]
        used = set().union(*(names_in(expr) for expr in asked))
        assert used
        assert used <= stated
        shown = set().union(*(names_in(t["expr"]) for panel in panels for t in panel["targets"]))
        assert {name for name in stated if not name.endswith("_count")} == shown  # all that it says is drawn


def test_every_engine_with_a_page_has_queries() -> None:
    for _, metrics in known_metrics():
        assert {"requests", "tokens", "step"} <= set(queries(Asked(metrics, ("m",))))


def test_other_models_of_the_same_prometheus_are_left_out(awq: Bundle) -> None:
    """The plan's limits are this model's; vLLM's lines say whose they are."""
    metrics = awq.target.server.facts.metrics
    assert metrics is not None
    asked = Asked(metrics, ('Qwen2.5 "x"', "my-org/b+c"))
    assert asked.of("vllm:a") == r'vllm:a{model_name=~"Qwen2\\.5 \"x\"|my-org/b\\+c"}'
    text = awq.files["alerts.yaml"] + awq.files["dashboard.json"].replace(r"\"", '"')
    named = re.findall(r"vllm:\w+(\{[^}]*\})?", text)
    assert set(named) - {""} == {f'{{model_name=~"{awq.target.name}|{REPO}"}}'}


def test_limits_are_the_plans(awq: Bundle) -> None:
    cell = awq.target.server.estimate
    rules = {rule["alert"]: rule for rule in read(awq, "alerts.yaml")["groups"][0]["rules"]}
    assert cell.first_token is not None
    assert rules["SlowFirstToken"]["expr"].endswith(f"> {cell.first_token.slow:.3g}")
    assert rules["SlowTokens"]["expr"].endswith(f"> {cell.step.slow:.3g}")
    assert "8 users of 64 tokens" in rules["CacheThrashing"]["annotations"]["description"]
    panels = {panel["title"]: panel for panel in json.loads(awq.files["dashboard.json"])["panels"]}
    steps = panels["Requests"]["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [step["value"] for step in steps] == [None, 8.0]
    assert NOT_RUN in json.loads(awq.files["dashboard.json"])["description"]


def test_the_load_is_the_planned_one(awq: Bundle, gguf: Bundle) -> None:
    ours, bench = awq.files["load.sh"].splitlines()[-2:]
    words = shlex.split(ours)
    assert words[:3] == ["qtool", "measure", "$URL/v1"]
    assert words[words.index("--context") + 1] == "32"
    assert words[words.index("--concurrency") + 1] == "1,4,8,16"
    assert shlex.split(bench)[:3] == ["vllm", "bench", "serve"]
    assert "bench" not in gguf.files["load.sh"]
    known = {option for parameter in main.commands["measure"].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_llama_servers_preset(gguf: Bundle) -> None:
    preset = configparser.ConfigParser()
    head, mark, rest = gguf.files["llama-server.ini"].partition("version = 1\n")  # before any section
    assert mark
    preset.read_string(head + rest)
    (section,) = preset.sections()
    found = dict(preset[section])
    assert section == gguf.target.name
    assert Path(found.pop("model")).is_file()
    assert found == {
        "ctx-size": "512", "parallel": "8", "n-gpu-layers": "99", "flash-attn": "on", "batch-size": "2048",
        "ubatch-size": "512", "metrics": "true",
    }  # fmt: skip


def test_the_modelfile_is_the_artifacts_own_from_where_it_lies(gguf: Bundle) -> None:
    own = (gguf.target.artifact.path / "Modelfile").read_text().splitlines()
    lines = [line for line in gguf.files["Modelfile"].splitlines() if not line.startswith("# ")]
    assert gguf.target.artifact.gguf is not None
    assert lines[0] == f"FROM ../{gguf.target.artifact.gguf.name}"
    assert lines[-1] == "PARAMETER num_ctx 64"
    assert [line for line in own if not line.startswith(("FROM ", "# "))] == lines[1:-1]


def test_files_elsewhere_find_the_artifact(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = artifacts["gguf"]
    words = ["bundle", str(folder), "--card", "RTX4090", "--context", "64", "--out", str(tmp_path / "a b/deploy")]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    out = tmp_path / "a b/deploy"
    (volume,) = yaml.safe_load((out / "compose.yaml").read_text())["services"]["engine"]["volumes"]
    assert (out / volume["source"]).resolve() == folder.resolve()
    (line,) = [line for line in (out / "Modelfile").read_text().splitlines() if line.startswith("FROM ")]
    assert (out / line.removeprefix("FROM ")).is_file()


@pytest.mark.parametrize("planted", ["link", "dangling", "file", "folder", "linked folder"])
def test_nothing_of_anybody_elses_is_overwritten(artifacts: dict[str, Path], tmp_path: Path, planted: str) -> None:
    """An artifact from the Hub may bring links along."""
    folder = Path(shutil.copytree(artifacts["awq"], tmp_path / "theirs"))
    precious = tmp_path / "precious"
    precious.write_text("mine")
    if planted == "linked folder":
        (tmp_path / "elsewhere").mkdir()
        (folder / "serve").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "serve").mkdir()
        place = folder / "serve/README.md"
        if planted == "folder":
            place.mkdir()
        elif planted == "file":
            place.write_text("# My notes")
        else:
            place.symlink_to(precious if planted == "link" else tmp_path / "nowhere")
    found = CliRunner().invoke(main, ["bundle", str(folder), "--card", "L40S", "--context", "64"])
    assert found.exit_code == 2, found.output
    assert len(found.output.strip().splitlines()[-1]) < 400
    assert precious.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert planted != "file" or (folder / "serve/README.md").read_text() == "# My notes"
    assert planted != "linked folder" or not any((tmp_path / "elsewhere").iterdir())


def test_a_name_that_hides_something_goes_into_no_file(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts["awq"], tmp_path / "a\nrm -rf x"))
    with pytest.raises(QtoolError, match="rename it"):
        make_bundle(folder, server_here(str(folder), "L40S", users=8, context=64), None, tmp_path / "out")


def test_the_same_plan_gives_the_same_bytes(artifacts: dict[str, Path], awq: Bundle) -> None:
    assert bundle_of(artifacts["awq"], cards=2).files == awq.files


def test_labels_are_kubernetes_names(awq: Bundle) -> None:
    for name in ("Qwen2.5-Coder-32B_AWQ", "40B", "---", "x" * 99, "Ünïcode-7B"):
        headers = replace(awq.target.server.headers, name=name)
        label = replace(awq.target, server=replace(awq.target.server, headers=headers)).label
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,46}[a-z0-9])?", label), name


def test_an_artifact_with_its_bundle_still_verifies(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Through the command; of an earlier bundle nothing stays whose plan was another."""
    folder = Path(shutil.copytree(artifacts["awq"], tmp_path / "mine"))
    words = ["bundle", str(folder), "--card", "L40S", "--context", "64"]
    found = CliRunner().invoke(main, [*words, "--repo", REPO])
    assert found.exit_code == 0, found.output
    assert (folder / "serve/kserve.yaml").is_file()
    (folder / "serve/notes.txt").write_text("mine")
    (folder / "serve/recipe.yaml").write_text("mine, too")
    found = CliRunner().invoke(main, words)
    assert "left out: kserve.yaml" in found.output
    assert sorted(path.name for path in (folder / "serve").iterdir()) == [
        "README.md", "alerts.yaml", "compose.yaml", "dashboard.json", "load.sh", "notes.txt", "recipe.yaml",
    ]  # fmt: skip
    assert qtool.verify(folder).sound
    (folder / "serve/model.safetensors").write_bytes(b"x")
    assert not qtool.verify(folder).sound


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["missing"], 2, "no such folder"), (["ARTIFACT", "--card", "L40S", "--context", "1m"], 2, "1m"),
        (["ARTIFACT", "--card", "Z9"], 2, "not a card qtool knows"),
        (["ARTIFACT", "--card", "L40S", "--engine", "llama.cpp"], 2, "does not load it"),
        (["ARTIFACT", "--card", "L40S", "--out", "FILE"], 3, "cannot be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    artifacts: dict[str, Path], tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "file").write_text("")
    places = {"ARTIFACT": str(artifacts["awq"]), "FILE": str(tmp_path / "file")}
    found = CliRunner().invoke(main, ["bundle", *(places.get(word, word) for word in words)])
    assert found.exit_code == code, found.output
    assert said in found.output
