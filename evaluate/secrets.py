"""What child processes must not inherit: the tokens and keys in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|(^|_)(API_?)?KEY(_|$)")


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """For a child process: no variable whose name says that it holds a token, a key, a secret or a password."""
    return {name: value for name, value in environment.items() if not _SECRET.search(name.upper())}


@contextmanager
def withheld() -> Iterator[None]:
    """This process's environment without its secrets until the block ends, for libraries that start processes."""
    before = dict(os.environ)
    secrets = before.keys() - without_secrets(before).keys()
    for name in secrets:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update({name: before[name] for name in secrets})
