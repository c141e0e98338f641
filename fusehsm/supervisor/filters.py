"""Makes the filter of a command: the system calls that the supervisor answers (seccomp(2), bpf(4)).

Every other call goes on untouched and at full speed. A call on a descriptor comes to the supervisor only if its number is a reserved one.
"""

import mmap
import struct
from collections.abc import Sequence
from typing import Final

from fusehsm.supervisor.numbers import SECCOMP_RET_ALLOW, SECCOMP_RET_USER_NOTIF, Architecture

_INSTRUCTION: Final = struct.Struct("=HBBI")
# linux/bpf_common.h
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_IF_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
# struct seccomp_data; the low half of an argument comes first on both architectures
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_ARGUMENTS: Final = 16

_Line = tuple[
    int, int, str | None, str | None
]  # operation, operand, the target if it holds, and if not (None: the next line)


def for_listeners(architecture: Architecture, lowest: int, end: int) -> bytes:
    """The filter for fanotify_init(2), mmap(2) of files, and calls on descriptors from `lowest` to before `end`."""
    on_descriptors = [
        architecture.read,
        architecture.readv,
        architecture.preadv2,
        architecture.write,
        architecture.writev,
        architecture.pwritev2,
        architecture.ioctl,
        architecture.fcntl,
        architecture.dup,
        architecture.dup2,
        architecture.dup3,
        architecture.lseek,
        architecture.fallocate,
        architecture.splice,
        architecture.tee,
        architecture.vmsplice,
        architecture.fanotify_mark,
    ]
    lines: list[str | _Line] = [
        *_this_architecture(architecture),
        *((_IF_EQUAL, number, "descriptor", None) for number in on_descriptors if number is not None),
        (_IF_EQUAL, architecture.fanotify_init, "ours", None),
        (_IF_EQUAL, architecture.mmap, "mapping", "go on"),
        "descriptor",
        (_LOAD, _ARGUMENTS, None, None),
        (_IF_AT_LEAST, lowest, None, "go on"),
        (_IF_AT_LEAST, end, "go on", "ours"),
        *_of_files(),
    ]
    return _assemble(lines)


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
