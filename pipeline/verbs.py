"""What stands behind the six verbs of `import qtool`: recipe sections made of arguments, then what the command line
calls, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qtool import QtoolError
from qtool.convert.artifact import Artifact
from qtool.convert.files.source import SHIPPED, shipped
from qtool.convert.verify.checks import verify as verify_artifact
from qtool.convert.verify.verification import Verification
from qtool.evaluate.tasks.table import is_dated
from qtool.recipe.faults import sentences
from qtool.recipe.judging import EvaluateSection, GateSection
from qtool.recipe.sections import checked_recipe
from qtool.runs import gates
from qtool.runs.summary import Summary
from qtool.sizing.accelerators import choose, load_accelerators, own_card
from qtool.sizing.fit import HOST_BANDWIDTH
from qtool.sizing.headers import read_headers
from qtool.sizing.plan import Plan, Question, make_plan

Named = str | Path | Mapping[str, Any]
Section = TypeVar("Section", bound=BaseModel)


def plan(
    model: str | Path, gpu: str | None = None, *, gpus: int = 1, contexts: Sequence[int] = (),
    sequences: Sequence[int] = (), kv_dtypes: Sequence[str] = (), engine: str | None = None,
    formats: Sequence[str] = (), cards: str | Path | None = None, host_bandwidth: float | None = None,
    revision: str | None = None, shared_prefix: int = 0,
) -> Plan:  # fmt: skip
    """`qtool.plan`."""
    known = load_accelerators(None if cards is None else Path(cards))
    question = Question(
        cards=choose(known, gpu or own_card(known)), number=gpus, contexts=tuple(contexts),
        sequences=tuple(sequences), kv_dtypes=tuple(kv_dtypes), engine=engine, formats=tuple(formats),
        host_bandwidth=host_bandwidth * 1e9 if host_bandwidth else HOST_BANDWIDTH, shared_prefix=shared_prefix,
    )  # fmt: skip
    return make_plan(read_headers(str(model), revision), question)


def convert(
    model: str | Path, outputs: Sequence[str | Mapping[str, Any]], calibration: Named, folder: str | Path, device: str,
    revision: str | None, trust_remote_code: bool,
) -> dict[str, Artifact]:  # fmt: skip
    """`qtool.convert`: a recipe without measurements."""
    from qtool.preparing import prepare_recipe
    from qtool.run import make

    recipe = checked_recipe(
        {
            "model": {"id": str(model), "revision": revision, "trust_remote_code": trust_remote_code},
            "calibration": _keys(calibration, "text"),
            "outputs": [_keys(output, "method") for output in _several(outputs)],
            "output_dir": str(folder),
        },
        "convert",
    )
    return make(prepare_recipe(recipe, device, may_write=True))


def open(folder: str | Path) -> Artifact:
    """`qtool.open`."""
    return Artifact.open(Path(_place(folder)))


def verify(
    artifact: Artifact | str | Path, source: str | Path | None = None, progress: Callable[[str], None] = lambda _: None
) -> Verification:
    """`qtool.verify`."""
    return verify_artifact(_path(artifact), None if source is None else Path(_place(source)), progress)


def score(
    model: Artifact | str | Path, against: str | Path | None, tasks: Sequence[str | Mapping[str, Any]],
    text: Named | None, runs: str | Path, device: str, trust_remote_code: bool, settings: Mapping[str, Any],
) -> Summary:  # fmt: skip
    """`qtool.score`."""
    from qtool.measure.scoring import score_folders

    measured = {"tasks": [_keys(task, "task") for task in _several(tasks)], "text": text and _keys(text, "text")}
    section = evaluate_section({**measured, **settings})
    if not section.tasks and section.text is None and section.long is None:
        raise QtoolError("nothing to measure: name tasks, a text or both, for example tasks=['handwritten'].")
    source = None if against is None else Path(against)
    return score_folders(_path(model), source, section, Path(runs), device, trust_remote_code)


def evaluate_section(asked: Mapping[str, Any]) -> EvaluateSection:
    """What is asked, checked. Raises QtoolError with every fault."""
    return _checked(EvaluateSection, asked, "")


def task_sections(
    tasks: Sequence[str], limit: int | None, after: date | None, before: date | None
) -> list[dict[str, Any]]:
    """A section for each task. The days are those of benchmarks that have dates; where none has, they stand with all,
    so that the section's own check refuses them."""
    dated = [task for task in tasks if is_dated(task)] or tasks
    window = {"after": after, "before": before}
    return [{"task": task, "limit": limit} | (window if task in dated else {}) for task in tasks]


def judge(summary: Summary, conditions: Sequence[Mapping[str, Any]]) -> list[gates.GateResult]:
    """`qtool.judge`."""
    sections = [_checked(GateSection, gate, f"gates[{i}]: ") for i, gate in enumerate(_several(conditions))]
    return gates.judge(summary, sections)


def _checked(section: type[Section], data: Mapping[str, Any], where: str) -> Section:
    try:
        return section.model_validate(data)
    except ValidationError as error:
        faults = [line.strip().removeprefix("recipe: ") for line in sentences(error, section)]
        raise QtoolError("\n".join(f"{where}{fault}" for fault in faults)) from error


def _keys(given: Any, key: str) -> Any:
    """A name stands for a section with that one key."""
    return {key: str(given)} if isinstance(given, str | Path) else given


def _several(given: Any) -> list[Any]:
    """One is a list of one."""
    return [given] if isinstance(given, str | Mapping) else list(given)


def _path(model: Artifact | str | Path) -> Path:
    return model.path if isinstance(model, Artifact) else Path(model)


def _place(model: str | Path) -> str:
    """A shipped model's folder; all else as it is named."""
    return str(shipped(str(model))) if str(model) in SHIPPED else str(model)
