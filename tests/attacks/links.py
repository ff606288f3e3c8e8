"""Links that lead out of a folder, to a secret: it is neither copied, published nor printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attacks.bench import Attack, Bench, edit_json, sign

KEPT = "TOPSECRET-CONTENT-91"
SIDECARS = (
    "notes.txt",
    "LICENSE",
    "NOTICE",
    "extra.json",
    "chat_template.jinja",
    "vocab.txt",
    "tokenizer.model",
    "generation_config.json",
    "special_tokens_map.json",
    "merges.txt",
    "README.md",
)


def _secret(work: Path) -> Path:
    (work / "elsewhere").mkdir()
    path = work / "elsewhere" / "secret"
    path.write_text(KEPT)
    return path


def _sidecar(name: str, relative: bool) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        model, secret = bench.model(work), _secret(work)
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(Path("../elsewhere/secret") if relative else secret)
        return bench.recipe(work, model=str(model))

    return build


def _artifact(name: str, command: str) -> Callable[[Bench, Path], list[str]]:
    def build(bench: Bench, work: Path) -> list[str]:
        folder, secret = bench.artifact(work), _secret(work)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(secret)
        sign(folder)
        edit_json(folder / "qtool.json", lambda data: data["files"].setdefault(name, {"bytes": 9, "sha256": "0" * 64}))
        if command == "verify":
            return ["verify", str(folder)]
        return ["publish", str(folder), "--to", "acme", "--license", "mit", "--dry-run"]

    return build


def _parent(bench: Bench, work: Path) -> list[str]:
    folder, secret = bench.artifact(work), _secret(work)
    (folder / "sub").symlink_to(secret.parent)
    sign(folder)
    edit_json(
        folder / "qtool.json", lambda data: data["files"].update({"sub/secret": {"bytes": 20, "sha256": "0" * 64}})
    )
    return ["verify", str(folder)]


def _shard(bench: Bench, work: Path) -> list[str]:
    model = bench.model(work)
    (work / "elsewhere").mkdir()
    (model / "model.safetensors").rename(work / "elsewhere" / "weights")
    (model / "model.safetensors").symlink_to(work / "elsewhere" / "weights")
    return [*bench.recipe(work, model=str(model)), "--dry-run"]


def _output(bench: Bench, work: Path) -> list[str]:
    """The output's folder is a link already."""
    (work / "elsewhere").mkdir()
    (work / "artifacts").mkdir()
    (work / "artifacts" / "model-nf4").symlink_to(work / "elsewhere")
    return bench.recipe(work)


def attacks() -> list[Attack]:
    taken = frozenset({0, 2})
    found = [Attack("link", f"{name}, absolute", _sidecar(name, False), taken, leaks=KEPT) for name in SIDECARS]
    found += [Attack("link", f"{name}, relative", _sidecar(name, True), taken, leaks=KEPT) for name in SIDECARS[::2]]
    for name in ("notes.txt", "sub/deep.json", "LICENSE"):
        for command in ("verify", "publish"):
            found.append(
                Attack(
                    "link", f"{name} of an artifact, {command}", _artifact(name, command), frozenset({1, 2}), leaks=KEPT
                )
            )
    found.append(Attack("link", "a folder of an artifact", _parent, frozenset({1, 2}), leaks=KEPT))
    found.append(Attack("link", "a shard", _shard, taken))
    return [*found, Attack("link", "an output's folder", _output, frozenset({0, 2, 3}))]
