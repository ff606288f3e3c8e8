"""Logs of lm-eval and inspect_ai as scores: what is right and wrong, sample by sample, to be paired as qtool's own are.

lm-eval (0.4): `--log_samples --output_path DIR` writes DIR/MODEL/samples_TASK_DATE.jsonl, a row for each document and
filter. inspect_ai (0.3): a log in JSON (`--log-format json`); those in its own `.eval` format are converted by
`inspect log convert`. Both say little of how a model was run: what they do say must agree.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool import QtoolError
from qtool.convert.files.reading import read_bytes, strict_json
from qtool.convert.text.records import read_records
from qtool.evaluate.scorecard import Settings
from qtool.runs.baseline import Baseline, Measured, TaskResult

LM_EVAL, INSPECT = "lm-eval", "inspect_ai"
LARGEST = 1 << 30  # bytes of a log in JSON
_SAMPLES = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.-]+\.jsonl")
_INSPECT_VALUES: dict[Any, int] = {"C": 1, "I": 0, "N": 0, 1: 1, 0: 0}
Row = Mapping[str, Any]


def is_log(path: Path) -> bool:
    """Whether ``path`` looks like a log of another harness: its name alone is looked at, and of JSON its first keys."""
    if path.is_dir():
        return any(_SAMPLES.fullmatch(file.name) for file in path.glob("samples_*.jsonl"))
    if path.suffix in (".jsonl", ".eval"):
        return path.is_file()
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return b'"eval"' in head and b'"status"' in head


def load_log(path: Path) -> Baseline:
    """The scores in a log, or in a folder of lm-eval's. Raises QtoolError saying what the file is instead."""
    if path.suffix == ".eval":
        convert = f"inspect log convert {path} --to json --output-dir json"
        raise QtoolError(f"{path}: a log in inspect_ai's own format. Run `{convert}` and name the file in json/.")
    if path.suffix == ".json":
        return _inspect(path)
    files = [path]
    if path.is_dir():  # of each task the newest
        found = {
            match[1]: file for file in sorted(path.glob("samples_*.jsonl")) if (match := _SAMPLES.fullmatch(file.name))
        }
        files = list(found.values())
    tasks = {label: task for file in files for label, task in _lm_eval(file)}
    folder = path if path.is_dir() else path.parent
    return _baseline(path, folder.resolve().name, tasks)


def _baseline(path: Path, model: str, tasks: Mapping[str, TaskResult]) -> Baseline:
    key = _digest([[label, task.digest, task.solved] for label, task in tasks.items()])
    subject = Measured(key=key, nbytes=None, bits_per_weight=None, tasks=dict(tasks), texts={})
    return Baseline(qtool="", model=model, run=str(path), source=None, subjects={model: subject})


def _lm_eval(path: Path) -> Iterator[tuple[str, TaskResult]]:
    """A task for each filter of a samples file."""
    match = _SAMPLES.fullmatch(path.name)
    task = match[1] if match else path.stem
    rows: dict[str, list[Row]] = {}
    for where, row in read_records(path):
        if not isinstance(row, dict) or not {"doc_id", "filter", "metrics", "resps"} <= set(row):
            raise QtoolError(f"{where}: no row of lm-eval's --log_samples (doc_id, filter, metrics, resps).")
        rows.setdefault(str(row["filter"]), []).append(row)
    if not rows:
        raise QtoolError(f"{path}: holds no samples.")
    for name, found in rows.items():
        yield task if len(rows) == 1 else f"{task}, {name}", _of_rows(path, found)


def _of_rows(path: Path, rows: Sequence[Row]) -> TaskResult:
    samples = max(len(row["resps"][0]) if row["resps"] else 1 for row in rows)
    metric = next(
        (one for one in rows[0]["metrics"] if all(_counts(row, one, samples) is not None for row in rows)), None
    )
    if metric is None:
        said = ", ".join(map(str, rows[0]["metrics"]))
        raise QtoolError(f"{path}: none of its metrics ({said}) says right or wrong of every sample.")
    solved = {_name(row): _counts(row, metric, samples) or 0 for row in rows}
    if len(solved) < len(rows):
        raise QtoolError(f"{path}: names a document twice.")
    asked = [[_name(row), row.get("prompt_hash"), row.get("target_hash")] for row in rows]
    return TaskResult(
        digest=_digest([metric, *asked]), settings=_lm_eval_settings(rows[0]), samples=samples, solved=solved
    )


def _counts(row: Row, metric: str, samples: int) -> int | None:
    """How many of a document's samples were right; None where the metric says no such thing."""
    value = row.get(metric)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        return None
    count = round(value * samples)
    return count if abs(value * samples - count) < 1e-6 else None


def _name(row: Row) -> str:
    doc = row.get("doc")
    own = doc.get("task_id") if isinstance(doc, dict) else None
    return str(row["doc_id"] if own is None else own)


def _lm_eval_settings(row: Row) -> Settings:
    """As the first request was put: all of a task are put alike."""
    arguments = row.get("arguments")
    first: Any = next(iter(arguments.values()), {}) if isinstance(arguments, dict) else {}
    asked = first.get("arg_1") if isinstance(first, dict) else None
    asked = asked if isinstance(asked, dict) else {}
    sampled = bool(asked.get("do_sample"))
    temperature, top_p = (_number(asked.get(key), 1.0) for key in ("temperature", "top_p"))
    return Settings(
        engine=LM_EVAL, dtype="", device="", prompt=f"until {asked.get('until')}",
        max_new_tokens=_number(asked.get("max_gen_toks"), 0), temperature=temperature if sampled else 0.0,
        top_p=top_p if sampled else 1.0,
    )  # fmt: skip


def _inspect(path: Path) -> Baseline:
    log = strict_json(read_bytes(path, LARGEST).decode())
    if not isinstance(log, dict) or not isinstance(log.get("eval"), dict):
        raise QtoolError(f"{path}: no log of inspect_ai.")
    if log.get("status") != "success":
        raise QtoolError(
            f"{path}: the evaluation ended with status {log.get('status')!r}; only a whole one is compared."
        )
    about, samples = log["eval"], log.get("samples") or []
    scorers = list((samples[0].get("scores") or {}) if samples else {})
    tasks = {}
    for scorer in scorers:
        label = str(about.get("task")) if len(scorers) == 1 else f"{about.get('task')}, {scorer}"
        tasks[label] = _of_samples(path, scorer, samples, _inspect_settings(log))
    if not tasks:
        raise QtoolError(f"{path}: holds no scored samples.")
    return _baseline(path, str(about.get("model")), tasks)


def _of_samples(path: Path, scorer: str, samples: Sequence[Row], settings: Settings) -> TaskResult:
    solved: dict[str, int] = {}
    times: dict[str, int] = {}
    asked = {}
    for sample in samples:
        name, value = str(sample["id"]), (sample.get("scores") or {}).get(scorer, {}).get("value")
        right = _INSPECT_VALUES.get(value) if isinstance(value, str | int | float) else None
        if right is None:
            raise QtoolError(f"{path}: sample {name}: {scorer} says {value!r}, neither right (C, 1) nor wrong (I, 0).")
        solved[name], times[name] = solved.get(name, 0) + right, times.get(name, 0) + 1
        asked[name] = _digest([sample.get("input"), sample.get("target")])
    epochs = set(times.values())
    if len(epochs) != 1:
        raise QtoolError(f"{path}: its samples were put {min(epochs)} to {max(epochs)} times.")
    digest = _digest([scorer, sorted(asked.items())])
    return TaskResult(digest=digest, settings=settings, samples=epochs.pop(), solved=solved)


def _inspect_settings(log: Row) -> Settings:
    """What is left out is the provider's default, which no log tells."""
    plan = log.get("plan") or {}
    asked = {**(log["eval"].get("model_generate_config") or {}), **(plan.get("config") or {})}
    steps = ", ".join(str(step.get("solver")) for step in plan.get("steps") or ())
    unknown = "" if asked.get("temperature") is not None else "; temperature as the provider's"
    return Settings(
        engine=INSPECT, dtype="", device="", prompt=f"{steps}{unknown}",
        max_new_tokens=_number(asked.get("max_tokens"), 0), temperature=_number(asked.get("temperature"), 0.0),
        top_p=_number(asked.get("top_p"), 1.0),
    )  # fmt: skip


def _number(value: Any, otherwise: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
