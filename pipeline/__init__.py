"""qtool: quantize a code model and know what it cost.

Six verbs: `plan`, `convert`, `open`, `verify`, `score`, `judge` (docs/python.md). Importing them loads nothing heavy:
torch comes with the first call.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qtool.convert.artifact import Artifact
    from qtool.convert.verify.verification import Verification
    from qtool.runs.gates import GateResult
    from qtool.runs.summary import Summary
    from qtool.sizing.plan import Plan

__all__ = ["QtoolError", "convert", "judge", "open", "plan", "score", "verify"]


class QtoolError(click.ClickException):
    """An error the user can act on: what is wrong, why, and what to do.

    ``exit_code``: 2 the input is wrong (default), 3 the machine lacks something.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click types it as a class variable and reads the instance

    def format_message(self) -> str:
        """What a terminal shows: messages quote files and programs, whose control codes and endless names are not for
        it."""
        text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in self.message)
        return re.sub(r"\S{400,}", lambda long: f"{long[0][:120]}…{long[0][-40:]}", text)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a stage that can say how to go on."""


def plan(model: str | Path, gpu: str | None = None, **options: Any) -> Plan:
    """Does ``model`` fit on a card, in which format, with how long a context? No weight is read or downloaded.

    ``model``: a folder, a config.json, a Hub id, an artifact. ``gpu``: cards, comma-separated (None: this machine's,
    else RTX4090 and H100). ``options``: ``gpus``, ``contexts``, ``sequences``, ``kv_dtypes``, ``engine``, ``formats``,
    ``cards`` (a YAML file of cards of your own), ``host_bandwidth`` (GB/s), ``revision``, ``shared_prefix`` (tokens).
    Raises QtoolError.

    >>> found = qtool.plan("qtool-demo", gpu="RTX4090", formats=["awq", "Q4_K_M"], contexts=[512])
    >>> [(answer.setting.weights.format, answer.fits, answer.context) for answer in found.answers]
    [('awq', True, 512), ('Q4_K_M', True, 512)]
    """
    from qtool import verbs

    return verbs.plan(model, gpu, **options)


def convert(
    model: str | Path,
    outputs: Sequence[str | Mapping[str, Any]],
    calibration: str | Path | Mapping[str, Any] = "qtool-code",
    *,
    folder: str | Path = "artifacts",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Artifact]:
    """Turn an FP16 or BF16 model into artifacts below ``folder``, all from one read of its weights.

    ``outputs``: methods by name, or with their keys as under a recipe's `outputs:`. ``calibration``: a text by name or
    path, or with its keys as under `calibration:`. What is finished is reused, what was begun goes on. Returns output
    name -> artifact. Raises QtoolError, with every fault at once, before a weight is read.

    >>> made = qtool.convert("qtool-demo", ["awq", {"method": "awq", "name": "small", "group_size": 32}],
    ...                      {"text": "qtool-code", "samples": 4, "length": 64})
    >>> made["awq"].path.as_posix(), made["small"].quantization["group_size"]
    ('artifacts/qtool-demo-awq', 32)
    """
    from qtool import verbs

    return verbs.convert(model, outputs, calibration, folder, device, revision, trust_remote_code)


def open(folder: str | Path) -> Artifact:
    """An artifact, or any model's folder: its manifest, its quantized linears, its tensors under their own names.

    Raises QtoolError where the folder is unfinished or holds no model.

    >>> artifact = qtool.open("artifacts/qtool-demo-awq")
    >>> len(artifact.linears()), artifact.codes("model.layers.0.mlp.down_proj").dequantize().shape
    (14, torch.Size([256, 768]))
    """
    from qtool import verbs

    return verbs.open(folder)


def verify(artifact: Artifact | str | Path, source: str | Path | None = None, **asked: Any) -> Verification:
    """Open an artifact again and check it: sha256, shapes, finiteness, what each runtime asks for; with ``source``, the
    unquantized model's folder, each linear's error, too.

    A check that fails is a result; QtoolError is raised where there is no artifact at all. ``asked``: ``progress``, a
    function that is called with the name of each stage.

    >>> found = qtool.verify("artifacts/qtool-demo-awq", source="qtool-demo")
    >>> found.sound, [check.name for check in found.checks if check.status == "fail" and check.required]
    (True, [])
    """
    from qtool import verbs

    return verbs.verify(artifact, source, **asked)


def score(
    model: Artifact | str | Path,
    against: str | Path | None = None,
    tasks: Sequence[str | Mapping[str, Any]] = (),
    text: str | Mapping[str, Any] | None = None,
    *,
    runs: str | Path = "runs",
    device: str = "auto",
    trust_remote_code: bool = False,
    **settings: Any,
) -> Summary:
    """Measure a model on coding tasks and on held-out text; ``against`` its source, paired problem by problem.

    ``tasks`` and ``text``: names, or keys as under a recipe's `evaluate:`; ``settings``: its other keys (``engine``,
    ``samples``, …). What was measured before is read from ``runs``. Raises QtoolError.

    >>> found = qtool.score("artifacts/qtool-demo-awq", against="qtool-demo",
    ...                     text={"text": "heldout-code", "samples": 4, "length": 64})
    >>> kl = found.models["qtool-demo-awq"].text.kl
    >>> 0 < kl.low < kl.estimate < kl.high < 1
    True
    """
    from qtool import verbs

    return verbs.score(model, against, tasks, text, runs, device, trust_remote_code, settings)


def judge(summary: Summary, gates: Sequence[Mapping[str, Any]]) -> list[GateResult]:
    """Hold what `score` measured against ``gates``, each with one condition as under a recipe's `gates:`. A verdict is
    pass, fail, or undecided: the interval holds the limit, or nothing was measured.

    >>> summary = qtool.score("artifacts/qtool-demo-awq", against="qtool-demo",
    ...                       text={"text": "heldout-code", "samples": 4, "length": 64})
    >>> [result.verdict for result in qtool.judge(summary, [{"max_kld": 2.0}, {"max_drop": 5}])]
    ['pass', 'undecided']
    """
    from qtool import verbs

    return verbs.judge(summary, gates)


_VERBS: dict[str, Callable[..., Any]] = {"convert": convert, "plan": plan}  # verbs whose name a module has, too


class _Called(ModuleType):
    """A module that is called as the verb of its name: `qtool.convert` is both."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        return _VERBS[self.__name__.rpartition(".")[2]](*args, **named)


class _Root(ModuleType):
    """This package. Importing `qtool.convert.artifact` sets ``convert`` here to the folder's module, which would
    hide the verb: such a module takes the verb's call and its documentation."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Called
            value.__dict__.update(__doc__=_VERBS[name].__doc__, __wrapped__=_VERBS[name])
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root
