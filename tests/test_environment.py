"""Tests do not depend on what the user has set."""

from __future__ import annotations

import os
import re
from pathlib import Path

from environment import make_neutral

HOSTILE = {
    "HF_HUB_OFFLINE": "1", "HF_TOKEN": "planted", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_DATASETS_OFFLINE": "1",
    "HUGGING_FACE_HUB_TOKEN": "planted", "TRANSFORMERS_OFFLINE": "1", "QTOOL_TRACEBACK": "1",
    "OPENAI_API_KEY": "planted",
    "http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9",
    "NO_PROXY": "*", "SSL_CERT_FILE": "/missing", "NO_COLOR": "1", "FORCE_COLOR": "1", "COLUMNS": "20", "LINES": "3",
    "TERM": "dumb", "LANG": "C", "LC_ALL": "POSIX", "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "latin-1",
}  # fmt: skip


def test_what_a_user_has_set_is_taken_out() -> None:
    environment = HOSTILE | {"PATH": "/bin", "HOME": "/home/me", "OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": "0"}
    make_neutral(environment, "/hub")
    assert environment == {
        "PATH": "/bin", "HOME": "/home/me", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0",
        "HF_HOME": "/hub", "LC_ALL": "C.UTF-8", "TERM": "xterm",
    }  # fmt: skip


def test_it_is_taken_out_before_the_libraries_look() -> None:
    import huggingface_hub.constants as constants
    from huggingface_hub import get_token

    assert "qtool-tests-hub-" in os.environ["HF_HOME"]
    assert not constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_CACHE.startswith(os.environ["HF_HOME"])
    assert get_token() is None


def test_what_every_test_shares_is_run_once() -> None:
    """pytest loads conftest.py itself; importing it runs it again, and a second Hub is set behind the libraries."""
    for path in sorted([*Path(__file__).parent.rglob("*.py"), *Path(__file__).parents[1].glob("scripts/*.py")]):
        assert not re.search(r"^\s*(from|import) conftest\b", path.read_text(), re.MULTILINE), path
