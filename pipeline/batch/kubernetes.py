"""The engine `kubernetes`: a Job for each model, recipes in a ConfigMap, everything made on one volume.

https://kubernetes.io/docs/concepts/workloads/controllers/job/
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import yaml
from pydantic import Field

from qtool import QtoolError
from qtool.batch.engine import SECRET, WORK, Engine, Place, Rendered, Task
from qtool.recipe.section import Positive, Section

CARD = "nvidia.com/gpu"
FILE = "kubernetes.yaml"
LARGEST = 1_000_000  # bytes of a ConfigMap (1 MiB, with its names)
ANSWERED = {  # a gate that failed and a wrong input are answers: no other attempt
    "action": "FailJob", "onExitCodes": {"containerName": "qtool", "operator": "In", "values": [1, 2]},
}  # fmt: skip
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]


class KubernetesSection(Section):
    """`kubernetes:` Jobs for kubectl apply."""

    namespace: Name | None = None
    """Where the Jobs are made."""
    claim: Name = "qtool"
    """A PersistentVolumeClaim that all Jobs write to, at /work: local models, runs and artifacts lie there."""
    secret: Name = "hf-token"
    """A Secret whose key `token` becomes HF_TOKEN; Jobs start without it, too."""
    node_selector: Mapping[str, str] = {}
    """Labels of nodes, such as `nvidia.com/gpu.product: NVIDIA-L40S`."""
    retries: Positive = 10
    """How often a Job that was ended is started again."""


class _Plain(yaml.SafeDumper):
    """Without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _render(tasks: Sequence[Task], place: Place, section: KubernetesSection) -> Rendered:
    if place.image is None:
        raise QtoolError("kubernetes: needs `image:`, an image in which qtool is (Dockerfile makes one).")
    recipes = {f"{task.name}.yaml": task.recipe for task in tasks}
    if (size := sum(len(text.encode()) for text in recipes.values())) > LARGEST:
        raise QtoolError(f"kubernetes: recipes of {size:,} bytes; a ConfigMap holds {LARGEST:,}. Split the list.")
    meta = {"namespace": section.namespace} if section.namespace else {}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "qtool-recipes"} | meta, "data": recipes}
    documents = [config, *(_job(task, place.image, section, meta) for task in tasks)]
    text = yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)
    said = "# kubectl apply -f kubernetes.yaml. A Job that was ended goes on where it stopped.\n"
    return Rendered({FILE: said + text}, [["kubectl", "apply", "-f", FILE]])


def _job(task: Task, image: str, section: KubernetesSection, meta: dict[str, str]) -> dict[str, Any]:
    needs = task.needs
    asked = {"cpu": str(needs.processors), "memory": f"{needs.host_gib}Gi"}
    limits = {"memory": asked["memory"]} | ({CARD: str(needs.cards)} if needs.card else {})
    token = {"secretKeyRef": {"name": section.secret, "key": "token", "optional": True}}
    container = {
        "name": "qtool",
        "image": image,
        # a word each, and none of them a stranger's; /work keeps what was made before
        "command": ["sh", "-c", f"exec qtool run /recipes/{task.name}.yaml {shlex.join(task.options('runs'))}"],
        "workingDir": WORK,
        "env": [
            {"name": SECRET, "valueFrom": token},
            {"name": "OMP_NUM_THREADS", "value": str(needs.processors)},
            {"name": "HF_HOME", "value": f"{WORK}/.cache/huggingface"},
        ],
        "resources": {"requests": asked | limits, "limits": limits},
        "volumeMounts": [{"name": "work", "mountPath": WORK}, {"name": "recipes", "mountPath": "/recipes"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # what a failure policy asks for; the Job makes another pod
        "terminationGracePeriodSeconds": 120,
        **({"nodeSelector": dict(section.node_selector)} if section.node_selector else {}),
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": section.claim}},
            {"name": "recipes", "configMap": {"name": "qtool-recipes"}},
        ],
    }
    labels = {"app.kubernetes.io/name": "qtool"}
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": f"qtool-{task.label}"[:63]} | meta,
        "spec": {
            "backoffLimit": section.retries,
            **({"activeDeadlineSeconds": needs.seconds} if needs.seconds else {}),
            "podFailurePolicy": {"rules": [ANSWERED]},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }  # fmt: skip


KUBERNETES = Engine("kubernetes", KubernetesSection, _render, "kubectl", "see https://kubernetes.io/docs/tasks/tools")
