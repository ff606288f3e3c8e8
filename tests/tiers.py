"""The sandbox's tiers that work on this machine: tests of the sandbox run in each."""

from __future__ import annotations

from qtool import QtoolError
from qtool.evaluate.sandbox.execute import TIERS, detect_sandbox


def available(tier: str) -> bool:
    try:
        return bool(detect_sandbox(tier))
    except QtoolError:
        return False


HERE = [tier for tier in TIERS if available(tier)]
