"""A process in which the libraries are imported and nothing has run yet: each program that a test wants to kill is a
fork of it, and starts at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOOP = """
import json, os, sys, traceback
import bitsandbytes, torch, transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
import qtool.run

for line in sys.stdin:
    program, words, said = json.loads(line)
    child = os.fork()
    if not child:
        sys.argv = ["-c", *words]
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        try:
            exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Warm:
    """Ends with `close`."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", LOOP]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, program: str, words: list[str], said: Path) -> int:
        """The exit code of ``program``, negative for a signal; ``said``: a file for what it writes to stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([program, words, str(said)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """It holds nothing: to end it in order takes seconds."""
        self._process.kill()
        self._process.communicate()
