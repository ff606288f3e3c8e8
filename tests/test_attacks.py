"""Hostile inputs, a few of every kind, in this process; `scripts/check_hostile.py` runs all of them under limits."""

from __future__ import annotations

import collections
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from attacks import all_attacks
from attacks.bench import Attack, Bench
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

# One kind of damage each that is refused before a model is opened, so that all of them take seconds together.
CHOSEN = (
    "safetensors: empty",
    "safetensors: header length 2**63",
    "safetensors: pickle",
    "safetensors: offsets negative",
    "safetensors: header of 100000 brackets",
    "safetensors: a tensor twice",
    "safetensors: half",
    "index: a shard outside",
    "index: an absolute shard",
    "index: not JSON",
    "index: weight_map a list",
    "index: 100000 brackets",
    "index: no weight_map",
    "recipe: empty",
    "recipe: a list",
    "recipe: not UTF-8",
    "recipe: 5000 brackets",
    "recipe: python/name",
    "recipe: python/object/apply",
    "recipe: billion laughs",
    "recipe: a map in itself",
    "recipe: an unknown method",
    "recipe: model with a null",
    "recipe: group_size 7",
    "recipe: gate NaN",
    "recipe: timeout NaN",
    "manifest: ledger NaN",
    "manifest: ledger Infinity",
    "manifest: ledger as text",
    "manifest: ledger true",
    "manifest: bits_per_weight NaN",
    "manifest: parameters 10**400",
    "manifest: output of text NaN",
    "manifest: files: '../../etc/passwd'",
    "manifest: files: 'C:x'",
    "manifest: files: 'a\\x00b'",
    "manifest: a key twice",
    "manifest: file: 200000 brackets, publish",
    "manifest: file: empty, verify",
    "manifest: source: the artifact itself",
    "manifest: files: bytes -1",
    "manifest: files missing",
    "manifest: an unknown key",
    "special file: a pipe in the manifest",
    "special file: a socket in the manifest",
    "special file: a link to /dev/zero in the manifest",
    "special file: a folder in the manifest",
    "link: a folder of an artifact",
    "link: notes.txt of an artifact, verify",
    "run: a failed check, check",
    "run: no checks, check",
    "run: ledger text, check",
    "run: an artifact changed since",
    "run: lock.json empty, report",
    "name: run ''",
    "name: check 'nothing'",
)


@pytest.fixture(scope="module")
def bench(tiny: Path, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The session's model and run under the names that attacks look for."""
    root = tmp_path_factory.mktemp("bench")
    folder = finished.folder.parent.parent
    (root / "text.txt").symlink_to(folder / "text.txt")
    (root / "task.jsonl").symlink_to(folder / "problems.jsonl")
    (root / "shards").symlink_to(tiny)
    shutil.copytree(tiny, root / "model", ignore=shutil.ignore_patterns("model*"))
    tensors = {name: tensor for file in tiny.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, root / "model" / "model.safetensors", metadata={"format": "pt"})
    (root / "runs").symlink_to(folder / "runs")
    (root / "artifacts").mkdir()
    for name in ("awq", "nf4"):
        for there in (f"model-{name}", f"tiny-{name}"):
            (root / "artifacts" / there).symlink_to(finished.folders[name])
    return Bench(root)


ATTACKS = {attack.label: attack for attack in all_attacks()}


def test_there_are_many_and_each_has_its_own_name() -> None:
    counted = collections.Counter(attack.kind for attack in ATTACKS.values())
    assert len(all_attacks()) == len(ATTACKS) >= 450
    assert min(counted.values()) >= 20
    assert [label for label in CHOSEN if label not in ATTACKS] == []


@pytest.mark.parametrize("attack", [ATTACKS[label] for label in CHOSEN if label in ATTACKS], ids=lambda a: a.label)
def test_it_is_refused_in_one_line(
    attack: Attack, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    result = CliRunner().invoke(main, attack.build(bench, tmp_path))
    assert result.exit_code in attack.codes, result.output
    assert "Traceback" not in result.output
    assert "fault of qtool" not in result.output
    assert result.output.strip()
    assert not bench.canary.exists()
    assert attack.leaks not in result.output
    if result.exit_code == 2:
        refusal = result.output[result.output.rfind("Error:") :]
        assert len(refusal) < 2000
        assert any(name in result.output for name in attack.names or ("",)), os.linesep.join(attack.names)
