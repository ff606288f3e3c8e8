"""The engine `openai`: a model that an OpenAI-compatible server has (vLLM, SGLang, llama-server, Ollama).

API: https://platform.openai.com/docs/api-reference (completions, chat, models), as those servers implement it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qtool import QtoolError
from qtool.evaluate.engines.engine import Engine, Model, Running, Use
from qtool.evaluate.engines.facts import EngineFacts

if TYPE_CHECKING:  # whoever only reads the table of engines waits for no HTTP client
    from qtool.evaluate.engines.server import ServedModel

FACTS = EngineFacts(name="openai", place="server", dtype=lambda device: "as served", served=True)
NO_LIST = (404, 405, 501)  # what a server answers that keeps no list of its models


def connect(base_url: str, model: str | None) -> ServedModel:
    """The engine for a server, after asking which models it has: the only one where ``model`` is None. The key is
    OPENAI_API_KEY's, if set. Raises QtoolError: exit 2 for a bad URL or an unknown model, exit 3 for no answer."""
    from qtool.evaluate.engines.server import KEY_VARIABLE, Broken, ServedModel, open_url

    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise QtoolError(
            f"--base-url {base_url!r}: give the address that ends before /completions, http://host:8000/v1."
        )
    if parts.username or parts.password:
        raise QtoolError(f"--base-url: a key does not belong into the address. Set {KEY_VARIABLE} instead.")
    key = os.environ.get(KEY_VARIABLE) or None
    try:
        with open_url(f"{base_url.rstrip('/')}/models", None, key) as answer:
            listed = [(str(row["id"]), str(row.get("owned_by") or "")) for row in json.load(answer).get("data") or []]
            software = answer.headers.get("Server") or ""
    except Broken as error:
        raise QtoolError(f"{base_url}/models: {error}. Is the server running?", exit_code=3) from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise QtoolError(f"{base_url}/models: not an OpenAI-compatible answer. Does the address end in /v1?") from error
    names = [name for name, _ in listed]
    if model is None and len(names) != 1:
        raise QtoolError(
            f"{base_url}: serves {', '.join(names[:8]) or 'nothing'}; name one: MODEL of `qtool evaluate`, --name of "
            "`qtool measure`."
        )
    if model is not None and names and model not in names:
        raise QtoolError(f"{base_url}: does not serve {model!r}; it has {', '.join(names[:8])}.")
    owner = next((owner for name, owner in listed if name == (model or names[0])), "")
    version = ", ".join(part for part in (owner, software) if part)
    return ServedModel(base_url.rstrip("/"), model or names[0], version=version, api_key=key)


def only_model(base_url: str) -> str:
    """The only model that a server has; any name will do for one that keeps no list. Raises QtoolError as `connect`."""
    import urllib.error

    try:
        return connect(base_url, None).model
    except QtoolError as error:
        if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code in NO_LIST:
            return "default"
        raise


@contextmanager
def _open(model: Model, use: Use) -> Iterator[Running]:
    from qtool.evaluate.engines.server import KEY_VARIABLE, ServedModel

    if use.timed:  # asked of servers too that keep no list of models
        key = os.environ.get(KEY_VARIABLE) or None
        yield ServedModel(model.base_url, model.served or only_model(model.base_url), api_key=key)
    else:
        yield connect(model.base_url, model.served)


ENGINE = Engine(FACTS, _open, version=lambda facts, model: connect(model.base_url, model.served).version)
