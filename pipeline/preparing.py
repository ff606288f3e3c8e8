"""A recipe becomes a job: what can be refused is refused, the source opened, the calibration text drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qtool import QtoolError
from qtool.convert.files.durable import require_writable
from qtool.convert.files.manifest import MANIFEST
from qtool.convert.files.reading import named
from qtool.convert.files.source import ModelSource, resolve
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows
from qtool.make.device import choose_device
from qtool.make.job import Job, open_job
from qtool.measure.long_text import require_possible, text_of
from qtool.measure.questions import kept_whole, require_lengths, require_room
from qtool.measure.run import check_contexts
from qtool.quantize.calibration import CalibrationSet
from qtool.quantize.methods.method import Method
from qtool.recipe.overrides import NONE, Overrides
from qtool.recipe.paths import require_paths
from qtool.recipe.sections import Recipe, load_recipe
from qtool.runs import log


def prepare(
    path: Path, device: str, only: tuple[str, ...] = (), runs: Path | None = None, overrides: Overrides = NONE,
    source: ModelSource | None = None,
) -> Job:  # fmt: skip
    """Everything that can be refused is refused here, before a weight is read. ``runs``: where this run will be kept
    (None: nothing will be written); ``source``: as another rank resolved it."""
    recipe = load_recipe(path, overrides)
    require_paths(recipe, path)
    if runs is not None:
        require_writable(runs, "--runs")
    return prepare_recipe(recipe, device, only, runs is not None, source)


def prepare_recipe(
    recipe: Recipe, device: str, only: tuple[str, ...] = (), may_write: bool = False, source: ModelSource | None = None
) -> Job:
    """`prepare` for a recipe that is no file."""
    if may_write:
        made = named(recipe.output_dir)
        if not any(made.glob(f"*/{MANIFEST}")):  # finished ones are reused from where nothing can be written, too
            require_writable(made, "output_dir:")
    names = [output.name for output in recipe.outputs]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise QtoolError(f"--only {unknown[0]}: the recipe's outputs are {', '.join(names)}.")
    found = source or resolve(recipe.model.id, recipe.model.revision)
    if may_write:  # the key of what is made asks for it, after everything that can go on beside
        found.read_behind()
    job = _with_enough_text(open_job(recipe, found, choose_device(device), _chosen(recipe, only)))
    most = getattr(job.config, "max_position_embeddings", None)
    _check_calibration(recipe, most)
    require_possible(recipe.evaluate, job.decoder.shape)
    require_lengths(recipe.evaluate, job.config)
    if (asked := recipe.measure) is not None:
        check_contexts("measure", asked.contexts, asked.tokens, most, found.name)
    return job


def _with_enough_text(job: Job) -> Job:
    """More windows of calibration where the recipe wants more tokens for an expert."""
    recipe, text = job.recipe, job.recipe.calibration
    number = recipe.experts.samples(job.decoder.shape, text.samples, text.length)
    if number == text.samples:
        return job
    shape = job.decoder.shape
    mean = number * text.length * shape.active // shape.experts
    log.say(
        f"calibration: {number} windows, not {text.samples}, so that the mean expert sees {mean:,} tokens "
        f"(`experts: {{min_tokens: {recipe.experts.min_tokens}}}`)"
    )
    drawn = text.model_copy(update={"samples": number})
    return replace(job, recipe=recipe.model_copy(update={"calibration": drawn}))


def _check_calibration(recipe: Recipe, most: int | None) -> None:
    """As evaluation's: windows longer than the model's context would measure it where it was never trained."""
    length = recipe.calibration.length
    if most is not None and length > most and any(output.calibrated for output in recipe.outputs):
        raise QtoolError(
            f"calibration: length {length:,} is more than the {most:,} tokens that the model was made for "
            "(max_position_embeddings in config.json)."
        )


def _chosen(recipe: Recipe, only: tuple[str, ...]) -> list[Method]:
    return [output for output in recipe.outputs if not only or output.name in only]


def require_texts(job: Job) -> None:
    """What a run reads and makes before its first weight, for who does not run: the long text, the shortest made
    prompts, and what it says of windows that let go of nothing. Raises QtoolError where one of them is too short."""
    asked = job.recipe.evaluate
    for line in kept_whole(asked):
        log.say(line)
    if asked.long is None and not asked.tasks:
        return
    tokenizer = load_tokenizer(job.source.path, job.recipe.model.trust_remote_code)
    require_room(asked, tokenizer)
    if asked.long is not None:
        text_of(asked.long, job.config, tokenizer)


def calibrate(job: Job) -> CalibrationSet:
    """The calibration text as windows of tokens. Raises QtoolError where there is too little."""
    source = job.recipe.calibration
    tokenizer = load_tokenizer(job.source.path, job.recipe.model.trust_remote_code)
    return CalibrationSet(token_windows(source, tokenizer, getattr(job.config, "vocab_size", None)), source.text)
