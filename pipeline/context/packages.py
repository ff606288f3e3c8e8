"""The parsers and rankers that `qtool context` needs, none of which anything else here does."""

from __future__ import annotations

import importlib
from typing import Any

from qtool import QtoolError

INSTALL = "pip install 'qtool-llm[context]'"


def required(module: str) -> Any:
    """The module. Raises QtoolError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise QtoolError(f"`qtool context` needs {module}, which is not here. Run: {INSTALL}", exit_code=3) from error
