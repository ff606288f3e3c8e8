"""Outputs whose types are chosen for a budget: what each type costs is measured, once a model and text, and kept.

The measurement is the first of two passes; it ends with a file in ``output_dir``, from which any other budget is
answered at once. What was decided stands in the output's section (`mix:`) from then on: in its key, so that the same
key means the same bytes, and in the manifest, so that a finished artifact needs no measurement to be known again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtool.convert.files.chosen import Chosen, read_chosen
from qtool.convert.files.config_file import read_config
from qtool.convert.files.durable import load, save
from qtool.convert.files.manifest import MANIFEST, read_manifest
from qtool.convert.files.reading import named
from qtool.convert.formats.plan import ModelShape
from qtool.convert.skeleton import build_skeleton
from qtool.make.job import Job, device_kind, versions
from qtool.make.measured import Measured, begun_at, forget, keeper
from qtool.make.mixes import beside_of, header_of, joined, keeping, limit_of, offers_of, planned, within
from qtool.make.needs import refuse_what_cannot_be_measured
from qtool.make.output import Output, naming, plan_output
from qtool.make.progress import progress_bar
from qtool.quantize import allocation
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.budget import Budget
from qtool.quantize.ranks import ALONE, Ranks
from qtool.quantize.source_model import SourceModel
from qtool.quantize.survey import Survey
from qtool.quantize.survey_errors import Costs
from qtool.recipe.checking import digest_of
from qtool.runs import log
from qtool.runs.stages import stage

FOLDER = "budgets"  # in output_dir
FACTOR = 1.5  # of the measured divergence over the expected one: docs/budgets.md
POINTS = 200  # of a curve that is kept


Ready = Callable[[str], None]


def decided(job: Job, calibration: CalibrationSet, ranks: Ranks = ALONE, ready: Ready = lambda _: None) -> Job:
    """The job with types for every matrix of every output. ``ready``: called before a survey rounds to a type. Raises
    QtoolError for a budget that no mix keeps."""
    if all(output.method.undecided is None for output in job.outputs):
        return job
    outputs: list[Output] = []
    told: list[dict[str, Any]] = []

    def decide() -> None:
        for output in job.outputs:
            if output.method.undecided is not None:
                chosen = _chosen(job, output, output.method.undecided, calibration, ready)
                told.append(chosen.model_dump(mode="json"))

    ranks.own([(0, decide)])
    mixes = iter(ranks.tell(told)[0])
    for output in job.outputs:
        outputs.append(output if output.method.undecided is None else _with(job, output, next(mixes)))
    return replace(job, outputs=tuple(outputs))


def known(job: Job) -> Job:
    """The job with types for the outputs whose costs were measured before, without reading a weight. Raises QtoolError
    for a budget that no mix keeps."""
    outputs = []
    for output in job.outputs:
        if (budget := output.method.undecided) is not None and (costs := _kept(job, output)) is not None:
            output = _with(job, output, _of_costs(job, output, budget, costs.costs).model_dump(mode="json"))
        outputs.append(output)
    return replace(job, outputs=tuple(outputs))


def _with(job: Job, output: Output, told: Mapping[str, Any]) -> Output:
    chosen = Chosen.model_validate({**told, "curve": [tuple(point) for point in told["curve"]]})
    made = plan_output(output.method.decided(chosen.mix), _shape(job), output.folder)
    return replace(made, chosen=chosen)


def _shape(job: Job) -> ModelShape:
    return ModelShape(job.checkpoint.tensors, job.decoder, read_config(job.source.path))


def _chosen(job: Job, output: Output, budget: Budget, calibration: CalibrationSet, ready: Ready) -> Chosen:
    if (finished := _finished(job, output, calibration)) is not None:
        return finished
    made_from = _made_from(job, output, calibration)
    before = _kept(job, output)
    if before is None or before.made_from != made_from:
        with stage("measuring types"):
            before = Measured(made_from=made_from, costs=_measure(job, output, calibration, made_from, ready))
        save(_place(job, output), before)
        forget(_under_way(job, output))
    else:
        log.say(f"{output.name}: costs of types measured before", event="reused", outputs=[output.name])
    return _of_costs(job, output, budget, before.costs)


def _of_costs(job: Job, output: Output, budget: Budget, costs: Costs) -> Chosen:
    """What the budget buys at these costs. Raises QtoolError naming the output."""
    with naming(output.method):
        return _bought(job, output, budget, costs)


def _bought(job: Job, output: Output, budget: Budget, costs: Costs) -> Chosen:
    shape = _shape(job)
    sizes = output.method.offers(shape)
    smallest = planned(output.method, sizes, shape)
    offers, beside, alike = offers_of(sizes, costs), beside_of(smallest, sizes), output.method.alike(shape)
    files = job.files
    header, needed = -1, header_of(budget, output.container, smallest, files)
    while header < needed:  # larger types have a longer header: more digits in its table
        header = needed
        limit = limit_of(budget, smallest, shape, _family(output), header)
        if limit is None:
            mix = keeping(budget, offers, FACTOR, alike)
        else:
            mix = within(budget, offers, limit, beside, smallest.parameters, alike)
        made = output.method.decided(mix).container.of_model(job.decoder)
        needed = header_of(budget, made, made.plan(shape), files)
    return Chosen(
        budget=budget.model_dump(mode="json", exclude_none=True), mix=mix,
        sizes={module: dict(own) for module, own in sizes.items()},
        costs={module: dict(costs[module]) for module in sizes}, beside=beside, parameters=smallest.parameters,
        curve=[(beside + nbytes, cost) for nbytes, cost in _thinned(allocation.curve(joined(offers, alike)))],
        alike=[list(group) for group in alike],
    )  # fmt: skip


def _family(output: Output) -> str:
    return str(output.container.section["quant_method"])


def _thinned(points: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    step = max(1, len(points) // POINTS)
    for number, point in enumerate(points):
        if number % step == 0 or number == len(points) - 1:
            yield point


def _finished(job: Job, output: Output, calibration: CalibrationSet) -> Chosen | None:
    """What was chosen for an artifact that this very recipe finished before."""
    if not (output.folder / MANIFEST).exists() or (chosen := read_chosen(output.folder)) is None:
        return None
    manifest = read_manifest(output.folder)
    budget = output.method.undecided
    asked = budget.model_dump(mode="json", exclude_none=True) if budget is not None else None
    same = manifest.output == output.method.decided(chosen.mix).model_dump(mode="json")
    text = manifest.calibration.get("digest", calibration.digest) == calibration.digest
    here = chosen.budget == asked and manifest.source.get("commit") == job.source.commit
    return chosen if same and text and here else None


def _measure(job: Job, output: Output, calibration: CalibrationSet, made_from: str, ready: Ready) -> Costs:
    refuse_what_cannot_be_measured(job)
    model = build_skeleton(job.config, job.recipe.model.trust_remote_code)
    source = SourceModel(model, job.decoder, job.checkpoint, job.device, ALONE)
    types = {module: list(own) for module, own in output.method.offers(_shape(job)).items()}
    place, layers = _under_way(job, output), len(source.layers)
    begun = begun_at(place, made_from)
    if begun is not None:
        log.say(f"{output.name}: types of {layers - begun.layer} of {layers} layers measured before", event="reused")
    with progress_bar() as bar:
        task = bar.add_task("measuring what types cost", total=2 * (layers if begun is None else begun.layer))
        survey = Survey(source, output.method, types, lambda: bar.advance(task), keeper(place, made_from), ready)
        return survey.run(calibration, begun)


def _asked(output: Output) -> dict[str, Any]:
    """What of a section decides how it rounds."""
    section = output.method.model_dump(mode="json")
    return {name: value for name, value in section.items() if name not in ("name", "budget")}


def _made_from(job: Job, output: Output, calibration: CalibrationSet) -> str:
    return digest_of(
        {
            "source": job.source.commit, "calibration": calibration.digest, "output": _asked(output),
            "device": device_kind(job.device), "versions": versions(output.method),
        }
    )  # fmt: skip


def _place(job: Job, output: Output) -> Path:
    """One file for a model as it lies there, a text as it is named and a way to round, whatever the budgets: it is
    found without reading weights or text."""
    files = [[file.path.name, *file.stamp[:2]] for file in job.source.files]
    text = job.recipe.calibration.model_dump(mode="json")
    about = {"source": job.source.revision or files, "text": text, "output": _asked(output)}
    return named(job.recipe.output_dir) / FOLDER / f"{job.source.name}-{digest_of(about)[:16]}.json"


def _under_way(job: Job, output: Output) -> Path:
    """Where a survey keeps what it can go on from."""
    return _place(job, output).with_suffix(".begun")


def _kept(job: Job, output: Output) -> Measured | None:
    """What was measured before; of a model, types or text that changed since it is measured again."""
    found = load(Measured, _place(job, output))
    sizes = output.method.offers(_shape(job))
    whole = found is not None and all(own.keys() <= found.costs.get(module, {}).keys() for module, own in sizes.items())
    return found if whole else None
