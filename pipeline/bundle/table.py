"""The files beside an artifact: one row a file. Which of them suit an engine, the engine's own facts say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import yaml

from qtool.bundle import kubernetes, local, monitoring, recipe
from qtool.bundle.target import Target

NOT_RUN = "Not run: configuration only."


@dataclass(frozen=True)
class File:
    """``text(target, note)``: what follows the header; ``note``: the header's sentences, for a file that has no
    comments. ``use``: how it is taken up; ``checked``: by what a file of its kind (never this one) was looked at where
    qtool is made, empty for nothing; ``published``: it names the artifact on the Hub. ``comment``: what begins a line
    of the header, empty where there is none; ``first``: a line before it. ``nvidia``: it names the engine's image and
    asks for NVIDIA's cards."""

    name: str
    use: str
    checked: str
    text: Callable[[Target, str], str]
    published: bool = False
    comment: str = "# "
    first: str = ""
    nvidia: bool = False


class _Plain(yaml.SafeDumper):
    """Without anchors: what stands twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _yaml(make: Callable[[Target], object]) -> Callable[[Target, str], str]:
    def text(target: Target, note: str) -> str:
        return str(yaml.dump(make(target), Dumper=_Plain, sort_keys=False, width=110, allow_unicode=True))

    return text


FILES: dict[str, File] = {
    "recipe": File(
        "recipe.yaml",
        "a pull request to vllm-project/recipes, as models/ORG/REPO.yaml, date_added and date_updated being its day",
        "its own build, scripts/build-recipes-api.mjs", _yaml(recipe.vllm_recipe), published=True, nvidia=True,
    ),
    "production-stack": File(
        "production-stack.yaml", "helm install NAME vllm/vllm-stack -f production-stack.yaml",
        "helm/values.schema.json of vllm-project/production-stack", _yaml(kubernetes.production_stack),
        published=True, nvidia=True,
    ),
    "llm-d": File(
        "llm-d.yaml", "helm install NAME llm-d-modelservice/llm-d-modelservice -f llm-d.yaml",
        "values.schema.json of llm-d-incubation/llm-d-modelservice", _yaml(kubernetes.llm_d),
        published=True, nvidia=True,
    ),
    "kserve": File(
        "kserve.yaml", "kubectl apply -f kserve.yaml", "the LLMInferenceService CRD of kserve/kserve",
        _yaml(kubernetes.kserve), published=True, nvidia=True,
    ),
    "compose": File(
        "compose.yaml", "docker compose -f compose.yaml up", "compose-spec.json of compose-spec/compose-spec",
        _yaml(local.compose), nvidia=True,
    ),
    "preset": File(
        "llama-server.ini", "llama-server --models-preset llama-server.ini",
        "llama-server's documentation, by reading it",
        lambda target, note: local.preset(target), comment="; ",
    ),
    "modelfile": File(
        "Modelfile", "ollama create NAME -f Modelfile", "", lambda target, note: local.modelfile(target)
    ),
    "alerts": File(
        "alerts.yaml", "rule_files of Prometheus", "promtool, its check rules and its test rules",
        _yaml(monitoring.alerts),
    ),
    "dashboard": File(
        "dashboard.json", "Grafana: Dashboards, New, Import", "Prometheus, which answered its queries",
        monitoring.dashboard, comment="",
    ),
    "load": File(
        "load.sh", "sh load.sh, with URL=http://HOST:PORT where it is not this machine", "a server that took it",
        lambda target, note: local.load(target), first="#!/bin/sh\n",
    ),
}  # fmt: skip
