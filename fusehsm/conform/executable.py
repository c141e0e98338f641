"""A program of known content and size: the events of its start do not depend on the programs of this machine.

It is a static ELF file with the segments of an ordinary program. It reads one byte of its constants, writes it to its variables, and then exits
or waits for a signal.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SIZE: Final = 40960  # bytes of the file
_PAGE: Final = 4096
_LARGEST_PAGE: Final = 65536  # of all machines
_BASE: Final = 0x400000
_READ, _WRITE, _EXECUTE = 4, 2, 1  # flags of a segment
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_EXECUTABLE: Final = 2  # ET_EXEC
_LOADED: Final = 1  # PT_LOAD


@dataclass(frozen=True, slots=True)
class _Segment:
    """A part of the file that the kernel maps."""

    #: Its number, from 0 on.
    number: int
    flags: int
    #: The place in the file in bytes, a multiple of a page.
    offset: int
    #: The size in the file in bytes.
    size: int
    #: The size in memory in bytes; the memory behind the part of the file is zeros.
    memory: int

    @property
    def address(self) -> int:
        """The address in memory. No two segments have a page in common, of whatever size pages are."""
        return _BASE + self.number * 2 * _LARGEST_PAGE + self.offset

    def packed(self) -> bytes:
        """The entry of the program header."""
        return _SEGMENT.pack(
            _LOADED,
            self.flags,
            self.offset,
            self.address,
            self.address,
            self.size,
            self.memory,
            _LARGEST_PAGE,
        )


_HEAD = _Segment(0, _READ, 0, _PAGE, _PAGE)
_CODE = _Segment(1, _READ | _EXECUTE, _PAGE, 4 * _PAGE, 4 * _PAGE)
_CONSTANTS = _Segment(2, _READ, 5 * _PAGE, 3 * _PAGE, 3 * _PAGE)
_VARIABLES = _Segment(3, _READ | _WRITE, 8 * _PAGE, _PAGE, 2 * _PAGE)
_SEGMENTS = (_HEAD, _CODE, _CONSTANTS, _VARIABLES)


def write_executable(path: Path, code: int | None = 0) -> None:
    """Write a program that exits with `code`, or waits for a signal if that is None. Raises OSError, and KeyError on an unknown machine."""
    path.write_bytes(image(os.uname().machine, code))
    path.chmod(0o755)


def image(machine: str, code: int | None) -> bytes:
    """The program's file for a machine (`uname -m`). Raises KeyError for an unknown one."""
    number, instructions = {"x86_64": (62, _x86_64), "aarch64": (183, _aarch64)}[machine]
    header = _HEADER.pack(
        b"\x7fELF\x02\x01\x01",
        _EXECUTABLE,
        number,
        1,  # the version
        _CODE.address,
        _HEADER.size,
        0,  # no sections
        0,
        _HEADER.size,
        _SEGMENT.size,
        len(_SEGMENTS),
        0,
        0,
        0,
    )
    start = header + b"".join(segment.packed() for segment in _SEGMENTS)
    return (start.ljust(_CODE.offset, b"\0") + instructions(code)).ljust(SIZE, b"\0")


def _x86_64(code: int | None) -> bytes:
    load = b"\x8a\x04\x25" + struct.pack("<I", _CONSTANTS.address)  # mov al, [constant]
    store = b"\x88\x04\x25" + struct.pack("<I", _VARIABLES.address)  # mov [variable], al
    wait = b"\xb8\x22\0\0\0\x0f\x05\xeb\xf7"  # again: mov eax, pause; syscall; jmp again
    leave = (
        b"\xbf" + struct.pack("<I", code or 0) + b"\xb8\x3c\0\0\0\x0f\x05"
    )  # mov edi, code; mov eax, exit; syscall
    return load + store + (wait if code is None else leave)


def _aarch64(code: int | None) -> bytes:
    def put(register: int, value: int) -> int:
        return 0xD2800000 | value << 5 | register  # movz x<register>, #value

    def put_high(register: int, value: int) -> int:
        return 0xF2A00000 | value << 5 | register  # movk x<register>, #value, lsl 16

    def put_address(register: int, address: int) -> list[int]:
        return [put(register, address & 0xFFFF), put_high(register, address >> 16)]

    call = 0xD4000001  # svc #0
    words = [*put_address(1, _CONSTANTS.address), 0x39400022]  # ldrb w2, [x1]
    words += [*put_address(1, _VARIABLES.address), 0x39000022]  # strb w2, [x1]
    if code is None:
        # again: ppoll(NULL, 0, NULL, NULL, 0); b again
        words += [*(put(register, 0) for register in range(5)), put(8, 73), call, 0x14000000 | -7 & 0x3FFFFFF]
    else:
        words += [put(0, code), put(8, 93), call]  # exit(code)
    return struct.pack(f"<{len(words)}I", *words)
