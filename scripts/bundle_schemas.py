"""The schemas that check_bundle.py puts a bundle to: whose they are, as of when, and what they say against a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qtool import QtoolError


@dataclass(frozen=True)
class Source:
    """A schema as its project has it."""

    repository: str
    path: str
    commit: str
    date: str
    sha256: str

    def read(self, folder: Path, name: str) -> Any:
        """Raises QtoolError for other bytes."""
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise QtoolError(f"{folder / name}: not {self.path} of {self.repository} at {self.commit}.")
        return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


SOURCES = {
    "production-stack.json": Source(
        "vllm-project/production-stack", "helm/values.schema.json", "a6c01db05f65", "2026-08-05",
        "c6f98c9146c09e4ef01609afb9a1667da1694de3ca4d84247c942d875622a86a",
    ),
    "llm-d.json": Source(
        "llm-d-incubation/llm-d-modelservice", "charts/llm-d-modelservice/values.schema.json", "3051935eb5a4",
        "2026-04-22", "cf1c751fdc6fc294b65f69c1f1b07fba8cd593a2049e3981ff39b75d56221623",
    ),
    "kserve.yaml": Source(
        "kserve/kserve", "config/crd/full/llmisvc/serving.kserve.io_llminferenceservices.yaml", "aaac4e294dae",
        "2026-08-21", "fbd625c2a2ac7b79e17c9763b7a0c4acf3cd3eaa99ebf0fab06db008785b35f3",
    ),
    "compose.json": Source(
        "compose-spec/compose-spec", "schema/compose-spec.json", "170098ba07d9", "2026-06-23",
        "1f91e091f16b2dd50ab8860e02bb391d22df553d91c145eacedb1b6eff9c3f0e",
    ),
}  # fmt: skip


def schema_of(found: Any) -> Any:
    """Of a CRD, the version that is stored."""
    if "spec" not in found:
        return found
    return next(v for v in found["spec"]["versions"] if v["storage"])["schema"]["openAPIV3Schema"]


def faults(data: Any, schema: Any) -> list[str]:
    """What the schema says against it."""
    from jsonschema import Draft202012Validator

    plain = {key: value for key, value in schema.items() if key != "$schema"}  # one of them names a draft of its own
    found = Draft202012Validator(plain).iter_errors(data)
    return [f"{error.json_path}: {error.message[:120]}" for error in found]


def unknown(data: Any, schema: Any, at: str = "") -> Iterator[str]:
    """Keys that the schema does not name, where it names any and says nothing of others."""
    if isinstance(data, list):
        for item in data:
            yield from unknown(item, schema.get("items") or {}, at)
    if not isinstance(data, dict):
        return
    known = schema.get("properties")
    open_ended = schema.get("additionalProperties") or schema.get("patternProperties")
    for key, value in data.items():
        if known and not open_ended and key not in known:
            yield f"{at}.{key}"
        elif known and key in known:
            yield from unknown(value, known[key], f"{at}.{key}")
