"""SGLang, which qtool does not run: its loading rules are read (convert/runtimes/sglang.py), and cards name it."""

from __future__ import annotations

from qtool.evaluate.engines.facts import EngineFacts

FACTS = EngineFacts(
    name="sglang",
    load=lambda download: [(f"python -m sglang.launch_server --model-path {download.place}", "bash")],
)
