"""Kill `qtool run` at every durable operation, and at random moments; run it again; the bytes must be the same.

    python scripts/check_kills.py                       # every operation of a small conversion, then with scores
    python scripts/check_kills.py --every 7 --random 0  # each seventh operation only

Operations: opening a file to write, fsync, rename, unlink, mkdir, rmdir, truncate, reserving space, a tensor written,
half a line of a journal. Each kill is a fork that ends by SIGKILL just before the operation. After it: no layer is made
again that a journal had, no file is left over, artifacts and scores have the bytes of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # forks want one thread
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
LAYERS = 2
OUTPUTS = "[{method: awq, group_size: 32}, {method: gguf, type: Q8_0}, {method: nf4}]"
USED = (
    "bitsandbytes", "gguf", "xllamacpp", "datasets", "qtool.report.terminal", "qtool.run",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)  # fmt: skip
SCORES = """evaluate:
  tasks: [{task: heldout, limit: 2}]
  text: {text: heldout-code, samples: 2, length: 32}
  max_new_tokens: 4
"""
LIMIT = float(os.environ.get("LIMIT", "300"))
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


class Hooks:
    """In a forked child: counts durable operations below ``folder`` and dies before number ``fatal``; notes layers."""

    def __init__(self, folder: Path, log: Path, fatal: int | None) -> None:
        self.folder, self.fatal, self.count = f"{folder}{os.sep}", fatal, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.write = os.write

    def install(self) -> None:
        """From here on operations count."""
        from qtool.convert.files.journal import StepJournal
        from qtool.convert.files.writer import TensorWriter
        from qtool.quantize.walk import Walk

        fsync, reserve, run, add = os.fsync, os.posix_fallocate, Walk.run, StepJournal.add

        def counted(function: Callable[..., Any], path: Callable[..., str]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.before(path(*args))
                return function(*args)

            return call

        def noted(walk: Any, start: int = 0) -> Iterator[Any]:
            for result in run(walk, start):
                self.note("made", result.index)
                yield result

        def added(journal: Any, step: dict[str, Any]) -> None:
            if self.count + 1 == self.fatal:  # torn: half of the line reaches the disk
                journal._file.write(json.dumps(step).encode()[:20])
            self.before(os.path.abspath(journal.path))
            add(journal, step)
            self.note("kept", os.path.abspath(journal.path))

        os.fsync = counted(fsync, _path_of)
        os.posix_fallocate = counted(reserve, lambda fd, *_: _path_of(fd))
        TensorWriter.write = counted(TensorWriter.write, lambda *_: self.folder)  # type: ignore[method-assign]  # watched
        StepJournal.add, Walk.run = added, noted  # type: ignore[method-assign, assignment]  # watched
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python's own notice of what is about to be done."""
        if event == "open":
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and isinstance(args[0], str | os.PathLike):
                self.before(os.path.abspath(args[0]))
        elif event in EVENTS and isinstance(args[0], str | os.PathLike):
            self.before(os.path.abspath(args[0]))

    def before(self, path: str) -> None:
        """An operation on ``path`` comes."""
        if path.startswith(self.folder):
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def note(self, *words: Any) -> None:
        """For the parent."""
        self.write(self.log, (json.dumps(words) + "\n").encode())


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def start(folder: Path, log: Path, fatal: int | None) -> int:
    """`qtool run r.yaml` in a fork of its own session; the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        os.chdir(folder)
        said = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in (1, 2):
            os.dup2(said, number)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        from qtool.cli import main

        hooks = Hooks(folder, log, fatal)
        hooks.install()
        hooks.note("begun", os.getpid())  # from here on a signal meets the command
        try:
            main(["run", "r.yaml", "--device", "cpu"], standalone_mode=True)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        hooks.note("operations", hooks.count)
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Its exit code, negative for a signal. Raises TimeoutError."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGUSR1)  # where it hangs goes to its output
    time.sleep(1)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"no end after {LIMIT:.0f} s")


def notes(log: Path, word: str) -> list[Any]:
    """What a child noted under ``word``."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row[1] for row in rows if row[0] == word]


def contents(folder: Path) -> dict[str, str]:
    """Every artifact's files by sha256, and the scores without the times."""
    found = {}
    for path in sorted(p for p in (folder / "artifacts").rglob("*") if p.is_file()):
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.glob("runs/*/scores/*")):
        data = json.loads(path.read_bytes()) if path.suffix == ".json" else {}
        found[path.relative_to(folder).as_posix()] = json.dumps({k: v for k, v in data.items() if k != "seconds"})
    return found


def leftovers(folder: Path) -> list[str]:
    """What should not be there after a run that reached its end."""
    marks = (".partial", ".damaged", ".lock", "journal.jsonl")
    return [path.name for path in folder.rglob("*") if path.name.endswith(marks)]


class Trials:
    """A recipe, run once without a kill, then killed and run again."""

    def __init__(self, work: Path, model: Path, scored: bool) -> None:
        self.work = work
        self.text = (
            f"model: {model}\ncalibration: {{text: qtool-code, samples: 4, length: 32}}\noutputs: {OUTPUTS}\n"
            + (SCORES if scored else "")
        )
        self.base, log = self.fresh("base")
        begun = time.monotonic()
        code = wait(start(self.base, log, None))
        self.seconds = time.monotonic() - begun
        if code:
            raise SystemExit(f"the run that nobody kills ended with {code}:\n{log.with_suffix('.out').read_text()}")
        self.operations = int(notes(log, "operations")[0])
        self.journals = {name.split("/artifacts/")[1] for name in notes(log, "kept")}

    def fresh(self, name: str) -> tuple[Path, Path]:
        """(a folder with the recipe in it, the log of its children)."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "r.yaml").write_text(self.text)
        log = self.work / f"{name}.log"
        for path in (log, log.with_suffix(".out")):
            path.unlink(missing_ok=True)
        return folder, log

    def said(self) -> str:
        """What the last children printed."""
        return "".join(path.read_text()[-3000:] for path in sorted(self.work.glob("*.out")) if path.stem != "base")

    def fault(self, fatal: int | None, signum: int = signal.SIGKILL, after: float = 0.0) -> str:
        """What is wrong after a kill before operation ``fatal`` (None: ``signum`` after so many seconds)."""
        folder, log = self.fresh("killed")
        pid = start(folder, log, fatal)
        if fatal is None:
            while not notes(log, "begun"):
                time.sleep(0.005)
            time.sleep(max(after, 0.05))  # its handlers stand
            os.kill(pid, signum)
        code = wait(pid)
        said = (
            log.with_suffix(".out").read_text() if log.with_suffix(".out").exists() else ""
        )  # killed before its first word
        if signum != signal.SIGKILL and code not in (0, 128 + signum):
            return f"exit code {code}: {said[-300:]}"
        if signum != signal.SIGKILL and code and "Run the same command again" not in said:
            return f"did not say how to go on: {said[-300:]}"
        kept = [name.split("/artifacts/")[1] for name in notes(log, "kept")]
        begin = min(kept.count(name) for name in self.journals)
        again = log.with_name("again.log")
        for path in (again, again.with_suffix(".out")):
            path.unlink(missing_ok=True)
        code = wait(start(folder, again, None))
        said += again.with_suffix(".out").read_text()
        if code or "Traceback" in said:
            return f"the run after it ended with {code}: {said[-500:]}"
        made = notes(again, "made")  # a thread may have kept a layer and be killed before it notes that
        if made not in (list(range(begin, LAYERS)), list(range(begin + 1, LAYERS))):
            return f"{begin} of {LAYERS} layers were kept, made again: {made}"
        expected, found = contents(self.base), contents(folder)
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        left = leftovers(folder)
        return f"differing {differing}, left over {left}" if differing or left else ""


def main() -> int:
    """Print n/N; 1 where a kill did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each Nth operation")
    parser.add_argument("--random", type=int, default=12, help="kills -9 and signals at random moments")
    parser.add_argument("--no-scores", action="store_true", help="conversions only")
    options = parser.parse_args()
    from small_models import make_model  # the tests' small models

    for name in USED:  # once, for all forks
        importlib.import_module(name)
    work = Path(tempfile.mkdtemp(prefix="qtool-kills-"))
    good = total = 0
    try:
        model = make_model(work / "tiny", num_hidden_layers=LAYERS)
        for scored in (False,) if options.no_scores else (False, True):
            trials = Trials(work, model, scored)
            what = "with scores" if scored else "conversion"
            print(f"{what}: {trials.operations} operations, {trials.seconds:.1f} s", flush=True)
            rng = random.Random(1)
            numbers: list[tuple[int | None, int]] = [
                (number, signal.SIGKILL) for number in range(1, trials.operations + 1, options.every)
            ]
            signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            numbers += [(None, signals[number % 4]) for number in range(options.random)]
            for fatal, signum in numbers:
                try:
                    fault = trials.fault(fatal, signum, rng.random() * trials.seconds)
                except TimeoutError as error:
                    fault = f"{error}: {trials.said()}"
                total, good = total + 1, good + (not fault)
                if fault:
                    print(f"  {what}, {fatal or signal.Signals(signum).name}: {fault}", flush=True)
            print(f"{what}: {good}/{total} so far", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"kills after which nothing was lost: {good}/{total}")
    return 0 if good == total else 1


if __name__ == "__main__":
    raise SystemExit(main())
