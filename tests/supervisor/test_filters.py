"""The filter of `fusehsm run`, executed by an interpreter of its few instructions: also for the architecture that these tests do not run on."""

import errno
import mmap
import struct
from collections.abc import Sequence
from dataclasses import fields

import pytest

from fusehsm.supervisor import filters
from fusehsm.supervisor.command import check_kernel
from fusehsm.supervisor.numbers import (
    AARCH64,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_USER_NOTIF,
    X86_64,
    Architecture,
    architecture,
)
from fusehsm.supervisor.options import RunError

OURS, GOES_ON = SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW
LOWEST, END = 960, 1024
MACHINES = pytest.mark.parametrize("machine", [X86_64, AARCH64], ids=["x86_64", "aarch64"])
ON_DESCRIPTORS = (
    "read",
    "readv",
    "preadv2",
    "write",
    "writev",
    "pwritev2",
    "ioctl",
    "fcntl",
    "dup",
    "dup2",
    "dup3",
    "lseek",
    "fallocate",
    "splice",
    "tee",
    "vmsplice",
    "fanotify_mark",
)


def verdict(program: bytes, audit: int, number: int, arguments: Sequence[int] = ()) -> int:
    """What seccomp(2) does with the call: bpf(4) for a machine with one register."""
    data = struct.pack("=iIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("=HBBI", program))
    register = place = 0
    while True:
        operation, then, otherwise, operand = instructions[place]
        place += 1
        match operation:
            case 0x20:
                (register,) = struct.unpack_from("=I", data, operand)
            case 0x15:
                place += then if register == operand else otherwise
            case 0x35:
                place += then if register >= operand else otherwise
            case 0x45:
                place += then if register & operand else otherwise
            case 0x06:
                return int(operand)
            case _:
                raise AssertionError(f"operation {operation:#x}")


@MACHINES
@pytest.mark.parametrize("name", ON_DESCRIPTORS)
def test_calls_on_reserved_descriptors_are_ours(machine: Architecture, name: str) -> None:
    number = getattr(machine, name)
    program = filters.for_listeners(machine, LOWEST, END)
    if number is None:
        assert (machine, name) == (AARCH64, "dup2")
        return
    for descriptor, expected in (
        (LOWEST, OURS),
        (END - 1, OURS),
        (1 << 32 | LOWEST, OURS),  # the kernel looks at an int
        (LOWEST - 1, GOES_ON),
        (END, GOES_ON),
        (0, GOES_ON),
        (0xFFFF_FFFF, GOES_ON),
        (LOWEST << 32, GOES_ON),
    ):
        assert verdict(program, machine.audit, number, [descriptor]) == expected, descriptor
    # In another place the number of a descriptor means nothing.
    assert verdict(program, machine.audit, number, [3, LOWEST, LOWEST]) == GOES_ON


@MACHINES
@pytest.mark.parametrize("make", ["listeners", "accessors"])
def test_mappings_of_files_are_ours(machine: Architecture, make: str) -> None:
    program = (
        filters.for_listeners(machine, LOWEST, END) if make == "listeners" else filters.for_accessors(machine)
    )
    for flags, expected in (
        (mmap.MAP_PRIVATE, OURS),
        (mmap.MAP_SHARED, OURS),
        (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, GOES_ON),
        (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, GOES_ON),
    ):
        assert verdict(program, machine.audit, machine.mmap, [0, 4096, 1, flags, 3, 0]) == expected


@MACHINES
def test_making_groups_is_for_listeners(machine: Architecture) -> None:
    number = machine.fanotify_init
    assert verdict(filters.for_listeners(machine, LOWEST, END), machine.audit, number) == OURS
    assert verdict(filters.for_accessors(machine), machine.audit, number) == GOES_ON


@MACHINES
def test_all_else_goes_on(machine: Architecture) -> None:
    known = {getattr(machine, field.name) for field in fields(machine)} - {machine.audit, machine.seccomp}
    program = filters.for_listeners(machine, LOWEST, END)
    others = [number for number in range(500) if number not in known]
    assert {verdict(program, machine.audit, number, [LOWEST] * 6) for number in others} == {GOES_ON}


@MACHINES
def test_programs_of_another_architecture_are_let_be(machine: Architecture) -> None:
    program = filters.for_listeners(machine, LOWEST, END)
    i386 = 0x4000_0003
    assert {verdict(program, i386, number, [LOWEST] * 6) for number in range(500)} == {GOES_ON}


def test_machines() -> None:
    assert architecture("x86_64") is X86_64
    assert architecture("aarch64") is AARCH64
    with pytest.raises(
        OSError, match=r"riscv64: its system calls are not known here, only those of x86_64"
    ) as caught:
        architecture("riscv64")
    assert caught.value.errno == errno.ENOSYS


def test_kernels() -> None:
    for release in ("5.9.0", "5.10.0-28-amd64", "6.18.44", "7.0"):
        check_kernel(release)
    for release in ("5.8.18", "4.19.0-27-amd64", "5.4"):
        with pytest.raises(RunError, match=f"Linux {release} cannot .* it needs 5.9 or later"):
            check_kernel(release)
