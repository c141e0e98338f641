"""The filter of `fusehsm run`, executed by an interpreter of its few instructions: also for the architecture that these tests do not run on."""

import errno
import fcntl
import mmap
import socket
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
from fusehsm.supervisor.placing import is_reserved

OURS, GOES_ON = SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW
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
    "fanotify_mark",
)
COPIES = ("dup", "dup2", "dup3")


def for_listeners(machine: Architecture, *, any_descriptor: bool = False) -> bytes:
    return filters.for_listeners(machine, any_descriptor=any_descriptor)


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
            case 0x54:
                register &= operand
            case 0x06:
                return int(operand)
            case _:
                raise AssertionError(f"operation {operation:#x}")


@MACHINES
@pytest.mark.parametrize("name", [*ON_DESCRIPTORS, *COPIES])
def test_calls_on_reserved_descriptors_are_ours(machine: Architecture, name: str) -> None:
    number = getattr(machine, name)
    program = for_listeners(machine)
    if number is None:
        assert (machine, name) == (AARCH64, "dup2")
        return
    for window in (range(56, 64), range(480, 512), range(960, 1024), range(5 * 1024 - 32, 5 * 1024)):
        for descriptor, expected in (
            (window.start, OURS),
            (window.stop - 1, OURS),
            (1 << 32 | window.start, OURS),  # the kernel looks at an int
            (window.start - 1, GOES_ON),
            (window.stop, GOES_ON),
            (window.start << 32, GOES_ON),
        ):
            arguments = [descriptor, fcntl.F_GETFL]
            assert verdict(program, machine.audit, number, arguments) == expected, descriptor
    for descriptor in (0, 0xFFFF_FFFF, 1 << 20, (1 << 20) + 1023):
        assert verdict(program, machine.audit, number, [descriptor, fcntl.F_GETFL]) == GOES_ON
    # In another place the number of a descriptor means nothing.
    assert verdict(program, machine.audit, number, [3, 960, 960]) == GOES_ON


@MACHINES
def test_every_number_is_judged_as_when_it_is_chosen(machine: Architecture) -> None:
    program = for_listeners(machine)
    for number in (*range(3000), *range((1 << 20) - 1100, (1 << 20) + 1100)):
        expected = OURS if is_reserved(number) else GOES_ON
        assert verdict(program, machine.audit, machine.read, [number]) == expected, number


@MACHINES
def test_calls_on_any_descriptor_are_ours(machine: Architecture) -> None:
    program = for_listeners(machine, any_descriptor=True)
    for descriptor in (0, 3, 960, 5000, 0xFFFF_FFFF):
        for name in ON_DESCRIPTORS:
            arguments = [descriptor, fcntl.F_SETFL]
            assert verdict(program, machine.audit, getattr(machine, name), arguments) == OURS, name
    # The kernel makes copies, and carries groups from process to process.
    for name in (*COPIES, "sendmsg", "sendmmsg", "pidfd_getfd"):
        number = getattr(machine, name)
        assert number is None or verdict(program, machine.audit, number, [960, 0, 0]) == GOES_ON


@MACHINES
@pytest.mark.parametrize("any_descriptor", [False, True])
def test_commands_of_fcntl(machine: Architecture, any_descriptor: bool) -> None:
    program = for_listeners(machine, any_descriptor=any_descriptor)

    def judged(command: int) -> int:
        return verdict(program, machine.audit, machine.fcntl, [960, command])

    assert {judged(command) for command in (fcntl.F_GETFL, fcntl.F_SETFL)} == {OURS}
    copies = {judged(command) for command in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC)}
    assert copies == {GOES_ON if any_descriptor else OURS}
    assert {judged(command) for command in (fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_SETLK)} == {GOES_ON}


@MACHINES
def test_messages_are_ours_but_the_launchers(machine: Architecture) -> None:
    program = for_listeners(machine)
    assert verdict(program, machine.audit, machine.sendmsg, [3, 0, 0]) == OURS
    assert verdict(program, machine.audit, machine.sendmsg, [3, 0, socket.MSG_NOSIGNAL]) == OURS
    assert verdict(program, machine.audit, machine.sendmsg, [3, 0, socket.MSG_CONFIRM]) == GOES_ON
    for number in (machine.sendmmsg, machine.pidfd_getfd):
        assert verdict(program, machine.audit, number, [3, 0, 0]) == OURS


@MACHINES
@pytest.mark.parametrize("make", ["listeners", "accessors"])
def test_mappings_of_files_are_ours(machine: Architecture, make: str) -> None:
    program = for_listeners(machine) if make == "listeners" else filters.for_accessors(machine)
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
    assert verdict(for_listeners(machine), machine.audit, number) == OURS
    assert verdict(filters.for_accessors(machine), machine.audit, number) == GOES_ON


@MACHINES
def test_all_else_goes_on(machine: Architecture) -> None:
    known = {getattr(machine, field.name) for field in fields(machine)} - {machine.audit, machine.seccomp}
    program = for_listeners(machine)
    others = [number for number in range(500) if number not in known]
    assert {verdict(program, machine.audit, number, [960] * 6) for number in others} == {GOES_ON}


@MACHINES
def test_programs_of_another_architecture_are_let_be(machine: Architecture) -> None:
    program = for_listeners(machine)
    i386 = 0x4000_0003
    assert {verdict(program, i386, number, [960] * 6) for number in range(500)} == {GOES_ON}


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
