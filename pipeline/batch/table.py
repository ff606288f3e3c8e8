"""Every engine of jobs: one file and one row each."""

from __future__ import annotations

from qtool.batch.engine import Engine
from qtool.batch.here import HERE
from qtool.batch.huggingface import HUGGINGFACE
from qtool.batch.kubernetes import KUBERNETES
from qtool.batch.ray import RAY
from qtool.batch.skypilot import SKYPILOT
from qtool.batch.slurm import SLURM

ENGINES: dict[str, Engine] = {one.name: one for one in (HERE, SLURM, RAY, KUBERNETES, SKYPILOT, HUGGINGFACE)}
