"""The environment that every test starts in, whatever the user's own says: no Hub settings, no proxy, no colours."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

# Settings of qtool and its libraries, tokens, proxies and certificates, terminals, texts' encodings.
_USERS = re.compile(
    r"(QTOOL|HF|HUGGING_?FACE|TRANSFORMERS|DATASETS|TOKENIZERS|OPENAI|VLLM|LC)_.*|(.*_)?PROXY"
    r"|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|LANG|LANGUAGE|PYTHON(WARNINGS|IOENCODING|UTF8|SAFEPATH)"
    r"|NO_COLOR|FORCE_COLOR|CLICOLOR(_FORCE)?|COLORTERM|TTY_.*|COLUMNS|LINES|TERM|XDG_CACHE_HOME",
    re.IGNORECASE,
)


def make_neutral(environment: MutableMapping[str, str], hub: str) -> None:
    """Take out what a user may have set; ``hub``: an empty folder in place of the user's cache and login."""
    for name in [name for name in environment if _USERS.fullmatch(name)]:
        del environment[name]
    environment |= {"HF_HOME": hub, "LC_ALL": "C.UTF-8", "TERM": "xterm"}
    # tests run side by side, on models too small for more: threads would only wait for one another
    environment["OMP_NUM_THREADS"] = "1"
