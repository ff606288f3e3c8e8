"""The system calls a judged program may make, as a seccomp filter (seccomp(2), linux/filter.h).

An allow list: files, memory, time, threads, pipes. Left out and so refused with EPERM: fork and exec, sockets
(but a pair between threads, for asyncio), signals to other processes, ptrace, mounts, namespaces, keys, bpf,
io_uring, shared memory, and every call that did not exist when this was written.
"""

import ctypes
import functools
import os
import struct
from typing import Any

_EPERM, _ENOSYS, _EOPNOTSUPP = 1, 38, 95
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_AT_NUMBER, _AT_ARCHITECTURE, _AT_ARGUMENTS = 0, 4, 16
_CLONE_THREAD = 0x10000
_AF_UNIX = 1

# Inclusive ranges of the allowed numbers, taken from the kernel's unistd headers (x86_64: unistd_64.h,
# aarch64: asm-generic/unistd.h) for the calls named in the module's first lines.
# fmt: off
_ALLOWED: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "x86_64": (
        0xC000003E,
        [
            (0, 28), (32, 40), (45, 45), (60, 61), (63, 63), (72, 85), (87, 87), (89, 91), (95, 100),
            (102, 102), (104, 104), (107, 108), (110, 111), (115, 115), (118, 118), (120, 121),
            (124, 125), (127, 128), (130, 131), (137, 138), (140, 140), (143, 143), (145, 147),
            (158, 158), (186, 186), (201, 202), (204, 204), (213, 213), (217, 219), (228, 233),
            (247, 247), (257, 258), (262, 264), (267, 271), (273, 274), (280, 281), (283, 287),
            (290, 293), (309, 309), (316, 316), (318, 319), (324, 324), (326, 326), (332, 332),
            (334, 334), (436, 437), (439, 439), (441, 441), (449, 449),
        ],
    ),
    "aarch64": (
        0xC00000B7,
        [
            (17, 17), (19, 25), (29, 29), (32, 32), (34, 35), (38, 38), (43, 50), (52, 53), (56, 57),
            (59, 59), (61, 68), (71, 73), (78, 80), (82, 83), (85, 88), (90, 90), (93, 96), (98, 103),
            (113, 115), (120, 121), (123, 126), (128, 128), (132, 137), (139, 139), (141, 141),
            (148, 148), (150, 150), (153, 153), (155, 156), (158, 158), (160, 160), (163, 163),
            (165, 166), (168, 169), (172, 179), (207, 207), (214, 216), (222, 222), (226, 227),
            (232, 233), (260, 260), (276, 276), (278, 279), (283, 283), (285, 285), (291, 291),
            (293, 293), (436, 437), (439, 439), (441, 441), (449, 449),
        ],
    ),
}
# fmt: on
# Calls that are allowed for some arguments only, by architecture.
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
_SENDTO = {"x86_64": 44, "aarch64": 206}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_EXECVE = {"x86_64": 59, "aarch64": 221}
_CLONE3 = 435
# Reserves any amount of disk at once; "not supported" makes the C library write instead.
_FALLOCATE = {"x86_64": 285, "aarch64": 47}
# Whoever "owns" a pipe or a socket is sent a signal of its user's choice when it is ready: kill by another name.
_FCNTL = {"x86_64": 72, "aarch64": 25}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX, _FIOSETOWN, _SIOCSPGRP = 8, 10, 15, 0x8901, 0x8902


def available() -> bool:
    """Whether the filter below knows this machine. Makes what `install` installs."""
    machine = os.uname().machine
    if machine not in _ALLOWED:
        return False
    for execute in (False, True):
        _program(machine, execute)
    return True


def install(libc: Any, execute: bool = False) -> None:
    """Install the filter for this process, for good. no_new_privs must be set. Raises OSError.

    ``execute`` allows execve, for a process that is yet to become node: fork stays refused, so there is no other.
    """
    code = _program(os.uname().machine, execute)
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count and a pointer, with the compiler's padding between them.
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(instructions))
    zero = ctypes.c_ulong(0)
    if libc.prctl(22, ctypes.c_ulong(2), program, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


@functools.cache  # a worker makes it before it forks: once, not for every process
def _program(machine: str, execute: bool) -> bytes:
    """BPF: jt and jf are the instructions to skip when the comparison holds or not."""
    architecture, ranges = _ALLOWED[machine]
    ranges = sorted(ranges + [(_EXECVE[machine], _EXECVE[machine])] * execute)
    refuse, allow = _REFUSE, _op(_RETURN, _ALLOW)
    code = [_op(_LOAD, _AT_ARCHITECTURE), _op(_EQUAL, architecture, 1, 0), refuse]
    code += [_op(_LOAD, _AT_NUMBER)]
    # "Not implemented" makes the C library fall back to clone, whose flags a filter can see.
    code += [_op(_EQUAL, _CLONE3, 0, 1), _op(_RETURN, _ERRNO | _ENOSYS)]
    code += [_op(_EQUAL, _FALLOCATE[machine], 0, 1), _op(_RETURN, _ERRNO | _EOPNOTSUPP)]
    code += [
        _op(_EQUAL, _CLONE[machine], 0, 4),
        *_load_low(0),
        _op(_ANY_BIT, _CLONE_THREAD, 0, 1),
        allow,
        refuse,
    ]
    code += [
        _op(_EQUAL, _SOCKETPAIR[machine], 0, 4),
        *_load_low(0),
        _op(_EQUAL, _AF_UNIX, 0, 1),
        allow,
        refuse,
    ]
    for number, argument in ((_SENDTO[machine], 4), (_PRLIMIT[machine], 2)):
        # Only with a null pointer there: no destination address, no new limit.
        code += [_op(_EQUAL, number, 0, 6), *_load_low(argument), _op(_EQUAL, 0, 0, 3)]
        code += [_op(_LOAD, _AT_ARGUMENTS + 8 * argument + 4), _op(_EQUAL, 0, 0, 1), allow, refuse]
    for number, commands in (
        (_FCNTL[machine], (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX)),
        (_IOCTL[machine], (_FIOSETOWN, _SIOCSPGRP)),
    ):
        count = len(commands)
        code += [_op(_EQUAL, number, 0, count + 3), *_load_low(1)]
        code += [*(_op(_EQUAL, command, count - i, 0) for i, command in enumerate(commands)), allow, refuse]
    return b"".join([*code, *_within(ranges)])


def _within(ranges: list[tuple[int, int]]) -> list[bytes]:
    """Allow the numbers in one of the ``ranges``, refuse all others. They are sought by halves: for every process of a
    job the kernel runs the new filter for every number there is."""
    if len(ranges) == 1:
        ((low, high),) = ranges
        return [_op(_AT_LEAST, low, 0, 2), _op(_GREATER, high, 1, 0), _op(_RETURN, _ALLOW), _REFUSE]
    middle = len(ranges) // 2
    lower, upper = _within(ranges[:middle]), _within(ranges[middle:])
    return [_op(_AT_LEAST, ranges[middle][0], len(lower), 0), *lower, *upper]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _load_low(argument: int) -> list[bytes]:
    return [_op(_LOAD, _AT_ARGUMENTS + 8 * argument)]


_REFUSE = _op(_RETURN, _ERRNO | _EPERM)
