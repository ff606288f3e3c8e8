"""What child processes must not inherit: the tokens and keys in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# HF_TOKEN, HUGGING_FACE_HUB_TOKEN, OPENAI_API_KEY, AWS_SECRET_ACCESS_KEY, PGPASSWORD, ...
_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH)$", re.IGNORECASE)


@contextmanager
def withheld() -> Iterator[None]:
    """The environment without its secrets until the block ends, for libraries that start processes of their own."""
    secrets = {name: os.environ.pop(name) for name in list(os.environ) if _NAMES.search(name)}
    try:
        yield
    finally:
        os.environ.update(secrets)
