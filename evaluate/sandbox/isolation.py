"""What Linux offers to hold a hostile process: namespaces, Landlock, resource limits, dropped privileges.

Runs only in the child programs of execute.py; every call is made through ctypes, so nothing has to be
installed. Sources: namespaces(7), user_namespaces(7), pivot_root(2), landlock(7), capabilities(7). Functions
raise OSError naming the call that the machine refused.
"""

import ctypes
import functools
import os
import resource
import struct
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from qtool.evaluate.sandbox.seccomp import install

GIB = 2**30
FILE_LIMIT = 16 * 2**20
STACK = 120 * 2**20
TMP_SIZE = "32m"
# Where Linux systems keep third-party packages, below a folder of shared libraries or of the standard library.
PACKAGES = ("site-packages", "dist-packages", "*/site-packages", "*/dist-packages")
INSIDE_ID = 1000
# All that a program may open of /dev: they hold nothing and keep nothing.
DEVICES = [path for path in map(Path, ("/dev/null", "/dev/zero", "/dev/urandom")) if path.is_char_device()]

_NEWNS, _NEWUTS, _NEWIPC = 0x20000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 38, 36
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# The three Landlock calls have one number on every architecture.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _READ_FILE, _READ = 0b1, 0b100, 0b1100


@dataclass(frozen=True)
class Limits:
    """Bytes of address space, and of it writable private memory."""

    address_space: int
    data: int | None = None


PLAIN = Limits(GIB)
# numpy, pandas and the like map libraries and thread stacks before they compute anything.
LIBRARIES = Limits(4 * GIB, 2 * GIB)
# V8 reserves address space that it never touches: what counts is what it may write to.
NODE = Limits(8 * GIB, GIB)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> int:
    zero = ctypes.c_ulong(0)
    result: int = _libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero)
    return result


def _unshare(flags: int, what: str) -> None:
    _check(_libc.unshare(flags), f"unshare {what}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    raw = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_libc.mount(raw[0], raw[1], raw[2], ctypes.c_ulong(flags), raw[3]), f"mount {target}")


def standard_library() -> list[Path]:
    """The folders a bare interpreter reads: its standard library and the system's shared libraries."""
    stdlib = Path(os.__file__).parent
    wanted = [stdlib, Path(sysconfig.get_path("platstdlib")), Path(sys.base_prefix, "lib"), *system_libraries()]
    # Outer folders first: what lies inside one needs no mount of its own.
    return sorted({path for path in wanted if path.is_dir()}, key=lambda path: (len(path.parts), path))


def system_libraries() -> list[Path]:
    """Where the system keeps shared libraries and the dynamic loader."""
    return [path for path in map(Path, ("/lib", "/lib64", "/usr/lib", "/usr/lib64")) if path.is_dir()]


def third_party(shown: list[Path]) -> list[Path]:
    """The folders of third-party packages inside those shown: qtool's own data may lie there, and published
    solutions."""
    places = (path for folder in shown for pattern in PACKAGES for path in folder.glob(pattern))
    folders = {Path(os.path.realpath(path)) for path in places}
    return sorted(path for path in folders if path.is_dir())


def enter_namespaces(root: str, shown: list[Path], hidden: list[Path]) -> None:
    """Leave the machine: own user (unless root), mount, net, ipc, uts namespaces, a root without its files.

    ``root`` is an empty folder that becomes ``/``: a read-only tmpfs holding ``shown`` (folders and files, bound
    read-only, outer ones first), in which the folders ``hidden`` are empty, and a bounded ``/tmp``. Processes forked
    afterwards are in a PID namespace of their own.
    """
    if os.geteuid() != 0:
        uid, gid = os.geteuid(), os.getegid()
        _unshare(_NEWUSER, "user")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{INSIDE_ID} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{INSIDE_ID} {gid} 1")
    os.umask(0o022)
    _unshare(_NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWPID, "mount, net, ipc, uts, pid")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    # One bounded /tmp for a worker: mounting one for each job takes 4 ms, emptying it almost nothing. It comes before
    # what is shown: an interpreter may lie in /tmp itself.
    Path(root, "tmp").mkdir()
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={TMP_SIZE},mode=0755,nr_inodes=4096")
    for path in shown:
        _bind(path, Path(root + str(path)))
    for path in hidden:
        if (place := Path(root + str(path))).is_dir():
            _mount("tmpfs", str(place), "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=4k,mode=0555")
    for path in DEVICES:
        _bind(path, Path(root + str(path)), device=True)
    os.chdir(root)
    here = ctypes.c_char_p(b".")
    _check(_libc.syscall(ctypes.c_long(_PIVOT_ROOT[os.uname().machine]), here, here), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount the old root")
    os.chdir("/")
    _mount("tmpfs", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _bind(source: Path, target: Path, device: bool = False) -> None:
    if target.exists():
        return
    if source.is_dir():
        target.mkdir(parents=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(str(source), str(target), None, _MS_BIND | _MS_REC)
    flags = os.statvfs(source).f_flag
    # Inside a user namespace a remount may add restrictions but not drop those the mount has.
    kept = flags & (_MS_NOEXEC | 1024 | 2048) | (1 << 21 if flags & 4096 else 0)
    kept |= 0 if device else _MS_NODEV
    _mount("none", str(target), None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | kept)


def own_pid_namespace() -> None:
    """The next fork is PID 1 of a new namespace: it sees no other process, and all below it die with it."""
    _unshare(_NEWPID, "pid for a job")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, so that it can end them."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide() -> None:
    """No process of the same user may read this one's memory."""
    if sys.platform == "linux":
        _prctl(_PR_SET_DUMPABLE, 0)


def limit_resources(seconds: float, threads: int | None, memory: Limits = PLAIN) -> None:
    """Limits on memory, CPU, file size, open files, core dumps; ``threads`` does not bind root."""
    limits = [
        ("RLIMIT_AS", memory.address_space),
        ("RLIMIT_CPU", int(seconds) + 2),
        ("RLIMIT_FSIZE", FILE_LIMIT),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ]
    if memory is not NODE:
        # Programs ask for more than the usual 8 MiB and could not set it themselves. What the kernel leaves free below
        # a stack is 128 MiB; node's threads would each take as much.
        limits.append(("RLIMIT_STACK", STACK))
    if memory.data is not None:
        limits.append(("RLIMIT_DATA", memory.data))
    if threads is not None:
        limits.append(("RLIMIT_NPROC", threads))
    for name, value in limits:
        number = getattr(resource, name, None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (OSError, ValueError):
            # macOS refuses some of these; elsewhere a limit that cannot be set must not be passed over.
            if sys.platform == "linux":
                raise


def drop_privileges(uid: int | None) -> None:
    """Become ``uid`` (None: stay) without groups and capabilities, for good."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:
        for capability in range(64):
            if _prctl(_PR_CAPBSET_DROP, capability) != 0:
                break
        header = struct.pack("Ii", 0x20080522, 0)
        _check(_libc.capset(header, bytes(24)), "capset")
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")


@functools.cache
def landlock_version() -> int:
    """ABI version of Landlock, 0 where it is missing."""
    if sys.platform != "linux":
        return 0
    result = _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(0, int(result))


Grant = tuple[str, int]


@functools.cache
def _landlock_files() -> int:
    """All that the ABI can forbid to do to files."""
    version = landlock_version()
    files = 0x1FFF | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    return files | (1 << 15 if version >= 5 else 0)


def landlock_read(readable: list[Path], executable: list[Path]) -> list[Grant]:
    """What grants reading these, running those, and the devices."""
    grants = [(str(path), _READ if path.is_dir() else _READ_FILE) for path in readable]
    grants += [(str(path), _EXECUTE | (_READ if path.is_dir() else _READ_FILE)) for path in executable]
    devices = _READ_FILE | 0b10 | (1 << 14 if landlock_version() >= 3 else 0)
    return [*grants, *((str(path), devices) for path in DEVICES if path.exists())]


def landlock_write(folder: str) -> Grant:
    """What grants all in ``folder`` but making device nodes."""
    return folder, _landlock_files() & ~(1 << 6 | 1 << 11)


def landlock_rules(grants: list[Grant]) -> int:
    """No file but these, no TCP, no signal or abstract socket to others, as far as the ABI goes: a descriptor for
    `landlock`, good for many processes."""
    version = landlock_version()
    rules = struct.pack("QQQ", _landlock_files(), 0b11, 0b11)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    size, flags = ctypes.c_size_t(len(rules)), ctypes.c_uint(0)
    ruleset = _check(_libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), rules, size, flags), "landlock_create_ruleset")
    number, own, one = ctypes.c_long(_LANDLOCK_ADD), ctypes.c_int(ruleset), ctypes.c_int(1)
    for path, allowed in grants:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, fd)
        _check(_libc.syscall(number, own, one, rule, flags), "landlock_add_rule")
        os.close(fd)
    return ruleset


def landlock(ruleset: int) -> None:
    """Restrict this process, for good, to what the rules grant; an earlier restriction stays in force beside it."""
    number, flags = ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_uint(0)
    _check(_libc.syscall(number, ctypes.c_int(ruleset), flags), "landlock_restrict_self")
    os.close(ruleset)


def readable_without(folder: Path, hidden: list[Path]) -> list[Path]:
    """``folder``, or where something hidden lies inside it, all that lies there but that. Landlock grants whole trees,
    so a folder that is split so can be read in but not listed."""
    if folder in hidden:
        return []
    inside = [path for path in hidden if path.is_relative_to(folder)]
    if not inside:
        return [folder]
    kept = [child for child in sorted(folder.iterdir()) if not child.is_symlink()]
    return [path for child in kept for path in readable_without(child, inside)]


def forbid_calls(execute: bool = False) -> None:
    """Only the system calls a single, unconnected process needs (see seccomp); the rest fail with EPERM.

    With ``execute`` the process may still replace itself by another program, which keeps all limits.
    """
    install(_libc, execute)
