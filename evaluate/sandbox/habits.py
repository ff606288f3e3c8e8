"""What programs are used to find around them, where the sandbox lacks it: made once, in the candidate's process.

`exit` and `quit` come with Python's `site`, which a worker leaves out; `sys.argv` would hold the worker's own words. No
process can be started here, so `multiprocessing` works with threads (its own `dummy`).
"""

import _sitebuiltins
import builtins
import contextlib
import os
import sys
import time
from typing import Any


def settle() -> None:
    """Give the process what a program's would have."""
    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D (i.e. EOF)")
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D (i.e. EOF)")
    builtins.help = _sitebuiltins._Helper()
    sys.argv = ["candidate.py"]
    sys.orig_argv = [sys.executable, "candidate.py"]
    sys.meta_path.insert(0, _Adapted())
    for name in _ADAPTED:
        if name in sys.modules:
            _ADAPTED[name](sys.modules[name])


class _Adapted:
    """A finder that adapts some modules when they are imported for the first time."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _ADAPTED or name in self._busy:
            return None
        import importlib.util

        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            _ADAPTED[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # wraps this one loader
        return spec


def _threads_for_processes(module: Any) -> None:
    """multiprocessing: its processes, and what they share, are threads and theirs."""
    from multiprocessing import dummy

    class Process(dummy.DummyProcess):
        def __init__(self, *args: Any, daemon: bool | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.daemon = bool(daemon)

    class Value:
        def __init__(self, typecode: Any, value: Any = 0, lock: Any = True) -> None:
            self.value = value
            self._lock = dummy.RLock()

        def get_lock(self) -> Any:
            return self._lock

    class Manager:
        Lock, RLock, Queue, Event, Namespace = dummy.Lock, dummy.RLock, dummy.Queue, dummy.Event, dummy.Namespace
        Array = staticmethod(dummy.Array)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def shutdown(self) -> None:
            pass

    Manager.Value, Manager.dict, Manager.list = Value, dict, list  # type: ignore[attr-defined]  # names that a class body would shadow
    for name in dummy.__all__:
        if name not in ("current_process", "active_children", "freeze_support"):
            setattr(module, name, getattr(dummy, name))
    module.Process, module.Value, module.Manager, module.Array = Process, Value, Manager, dummy.Array
    module.SimpleQueue = dummy.Queue
    module.get_context = lambda method=None: module
    module.set_start_method = lambda *args, **kwargs: None


def _pool_of_threads(module: Any) -> None:
    """multiprocessing.pool: its pool of threads does without the lock that processes would share."""
    import queue

    class Notifier(queue.SimpleQueue):  # type: ignore[type-arg]  # holds whatever the pool puts there
        _reader = None

    class Context:
        SimpleQueue = Notifier

    module.get_context = lambda method=None: Context
    module.Pool._wait_for_updates = staticmethod(lambda sentinels, notifier, timeout=None: notifier.get())


def _executor_of_threads(module: Any) -> None:
    """concurrent.futures: the executor of processes has threads."""

    class ProcessPoolExecutor(module.ThreadPoolExecutor):  # type: ignore[misc]  # the module is a parameter: Any
        def __init__(
            self, max_workers: int | None = None, mp_context: Any = None, initializer: Any = None,
            initargs: Any = (), *, max_tasks_per_child: int | None = None,
        ) -> None:  # fmt: skip
            super().__init__(max_workers, "", initializer, initargs)

        def map(self, function: Any, *iterables: Any, timeout: Any = None, chunksize: int = 1) -> Any:
            return super().map(function, *iterables, timeout=timeout)

    module.ProcessPoolExecutor = ProcessPoolExecutor


def _limits_may_stay(module: Any) -> None:
    """resource: programs ask for a larger stack at their start, which the sandbox refuses and threads have anyway."""
    really = module.setrlimit

    def setrlimit(which: int, limits: Any) -> None:
        if which == module.RLIMIT_STACK:
            with contextlib.suppress(OSError, ValueError):
                really(which, limits)
        else:
            really(which, limits)

    module.setrlimit = setrlimit


def _waits_for_stacks(module: Any) -> None:
    """threading: the large stack of a thread that was joined may still be on its way out, and two do not fit."""
    really = module._start_new_thread

    def start(*args: Any) -> Any:
        for seconds in (0.001, 0.01, 0.1):
            try:
                return really(*args)
            except RuntimeError:
                time.sleep(seconds)
        return really(*args)

    module._start_new_thread = start


def _own_folder(module: Any) -> None:
    """tempfile: the job's folder is the one that may be written to."""
    module.tempdir = os.getcwd()


_ADAPTED = {
    "tempfile": _own_folder,
    "multiprocessing": _threads_for_processes,
    "multiprocessing.pool": _pool_of_threads,
    "concurrent.futures": _executor_of_threads,
    "resource": _limits_may_stay,
    "threading": _waits_for_stacks,
}
