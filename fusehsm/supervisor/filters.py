"""Makes the filter of a command: the system calls that the supervisor answers (seccomp(2), bpf(4)).

Every other call goes on untouched and at full speed. A call on a descriptor comes to the supervisor only if its number is a reserved one, or with
`--any-descriptor` always.
"""

import fcntl
import mmap
import socket
import struct
from collections.abc import Sequence
from typing import Final

from fusehsm.supervisor.numbers import SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF, Architecture
from fusehsm.supervisor.placing import BLOCK, END_OF_RESERVED, LOW_WINDOWS, RESERVED_OF_BLOCK

_INSTRUCTION: Final = struct.Struct("=HBBI")
# linux/bpf_common.h
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_IF_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
# struct seccomp_data; the low half of an argument comes first on both architectures
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_ARGUMENTS: Final = 16

_Line = tuple[
    int, int, str | None, str | None
]  # operation, operand, the target if it holds, and if not (None: the next line)


def for_listeners(architecture: Architecture, *, any_descriptor: bool) -> bytes:
    """The filter for fanotify_init(2), mmap(2) of files, and calls on reserved descriptors, or on all (`any_descriptor`)."""
    on_descriptors = [
        architecture.read,
        architecture.readv,
        architecture.preadv2,
        architecture.write,
        architecture.writev,
        architecture.pwritev2,
        architecture.ioctl,
        architecture.fanotify_mark,
    ]
    commands = [fcntl.F_GETFL, fcntl.F_SETFL]
    others: list[_Line] = []
    if not any_descriptor:
        # Calls that give a group a number; in the kernel they go where the filter does not stop them.
        on_descriptors += [
            number
            for number in (architecture.dup, architecture.dup2, architecture.dup3)
            if number is not None
        ]
        commands += [fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC]
        others = [
            (_IF_EQUAL, architecture.sendmsg, "message", None),
            (_IF_EQUAL, architecture.sendmmsg, "ours", None),
            (_IF_EQUAL, architecture.pidfd_getfd, "ours", None),
        ]
    on_number = "ours" if any_descriptor else "number"
    lines: list[str | _Line] = [
        *_this_architecture(architecture),
        *((_IF_EQUAL, number, on_number, None) for number in on_descriptors),
        (_IF_EQUAL, architecture.fcntl, "command", None),
        *others,
        (_IF_EQUAL, architecture.fanotify_init, "ours", None),
        (_IF_EQUAL, architecture.mmap, "mapping", "go on"),
        "command",
        (_LOAD, _ARGUMENTS + 8 * 1, None, None),
        *((_IF_EQUAL, command, on_number, None) for command in commands),
        (_RETURN, SECCOMP_RET_ALLOW, None, None),
        "number",
        *_reserved_numbers(),
        "message",
        # Messages with descriptors go through local sockets, which ignore MSG_CONFIRM. launch.py sends this filter's own descriptor with it.
        (_LOAD, _ARGUMENTS + 8 * 2, None, None),
        (_IF_ANY_BIT, socket.MSG_CONFIRM, "go on", "ours"),
        *_of_files(),
    ]
    return _assemble(lines)


def _reserved_numbers() -> list[str | _Line]:
    lines: list[str | _Line] = [
        (_LOAD, _ARGUMENTS, None, None),
        (_IF_AT_LEAST, END_OF_RESERVED, "go on", None),
        (_IF_AT_LEAST, BLOCK, None, "low"),
        (_AND, BLOCK - 1, None, None),
        (_IF_AT_LEAST, BLOCK - RESERVED_OF_BLOCK, "ours", "go on"),
        "low",
    ]
    for window in LOW_WINDOWS:  # from the highest to the lowest
        lines += [(_IF_AT_LEAST, window.stop, "go on", None), (_IF_AT_LEAST, window.start, "ours", None)]
    return [*lines, (_RETURN, SECCOMP_RET_ALLOW, None, None)]


def for_accessors(architecture: Architecture) -> bytes:
    """The filter for mmap(2) of files alone."""
    return _assemble(
        [*_this_architecture(architecture), (_IF_EQUAL, architecture.mmap, "mapping", "go on"), *_of_files()]
    )


def _this_architecture(architecture: Architecture) -> list[_Line]:
    # Calls of another architecture (a 32-bit program) have other numbers, and go on.
    return [
        (_LOAD, _ARCHITECTURE, None, None),
        (_IF_EQUAL, architecture.audit, None, "go on"),
        (_LOAD, _NUMBER, None, None),
    ]


def _of_files() -> list[str | _Line]:
    return [
        "mapping",
        (_LOAD, _ARGUMENTS + 8 * 3, None, None),
        (_IF_ANY_BIT, mmap.MAP_ANONYMOUS, "go on", "ours"),
    ]


def _assemble(lines: Sequence[str | _Line]) -> bytes:
    """Assemble the program. A str in `lines` is a label for its place."""
    lines = [
        *lines,
        "go on",
        (_RETURN, SECCOMP_RET_ALLOW, None, None),
        "ours",
        (_RETURN, SECCOMP_RET_USER_NOTIF, None, None),
    ]
    places: dict[str, int] = {}
    instructions: list[_Line] = []
    for line in lines:
        if isinstance(line, str):
            places[line] = len(instructions)
        else:
            instructions.append(line)
    program = b""
    for place, (operation, operand, then, otherwise) in enumerate(instructions):
        jumps = (0 if name is None else places[name] - place - 1 for name in (then, otherwise))
        program += _INSTRUCTION.pack(operation, *jumps, operand)
    return program
