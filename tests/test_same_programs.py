"""One expectation, two worlds: programs that are executed, and who is said to access what was inherited, passed or linked."""

import ctypes
import errno
import os
import shutil
import socket
import threading

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from tests.conftest import MakeAccessor
from tests.harness import NOBODY
from tests.worlds import CONTENT, MIB, PAGE, SIZE, A, Expected, Failed, O, P, World, X, outcome

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]

HEADER = (P(0, PAGE), A)


def run_program(path: str, by_descriptor: bool = False) -> tuple[int, int]:
    """Its process id, and its exit code; 200 and more: execve's errno."""
    program = os.open(path, os.O_RDONLY) if by_descriptor else path
    child = os.fork()
    if child == 0:
        try:
            os.execve(program, [path], {})
        except OSError as error:
            os._exit(200 + (error.errno or 0))
    return child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def program(world: World, name: str = "true") -> str:
    """A copy of one of the system's programs."""
    found = shutil.which(name)
    assert found is not None
    shutil.copy(found, world.backing / "file")
    return str(world.path / "file")


def segments_as_touched(heard: list[Expected]) -> bool:
    """Whether the rest of a program's events are pre-content events of whole pages: the entry "program start"."""
    return bool(heard) and all(event.name == "PRE_ACCESS" and event.offset is not None for event in heard)


async def test_a_program(world: World, accessor: Accessor) -> None:
    path = program(world)
    async with world.listener(world.everywhere()) as listener:
        child, status = await accessor.run(run_program, path)
        heard = listener.take()
    assert status == 0
    assert {event.pid for event in heard} == {child}
    events = world.heard(heard)
    assert events[:8] == [X, O, *HEADER * 3]
    assert segments_as_touched(events[8:])


async def test_a_program_by_descriptor(world: World, accessor: Accessor) -> None:
    path = program(world)
    async with world.listener(world.everywhere()) as listener:
        child, status = await accessor.run(run_program, path, True)
        heard = listener.take()
    assert status == 0
    assert [event.pid for event in heard[:3]] == [accessor.pid, child, child]
    assert world.heard(heard)[:9] == [O, X, O, *HEADER * 3]


async def test_a_script(world: World, accessor: Accessor) -> None:
    world.file()
    script = world.backing / "file"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o755)
    async with world.listener(world.everywhere()) as listener:
        child, status = await accessor.run(run_program, str(world.path / "file"))
        heard = listener.take()
    assert status == 7
    assert {event.pid for event in heard} == {child}
    assert world.heard(heard) == [X, O, *HEADER, O, P(0, 2 * PAGE), A]


async def test_a_program_that_is_no_program(world: World, accessor: Accessor) -> None:
    path = world.file()
    (world.backing / "file").chmod(0o755)
    async with world.listener(world.everywhere()) as listener:
        child, status = await accessor.run(run_program, path)
        heard = listener.take()
    assert status == 200 + errno.ENOEXEC
    assert world.heard(heard) == [X, O, *HEADER]
    assert {event.pid for event in heard} == {child}


def check_execution(path: str) -> int:
    """execveat(2) with AT_EXECVE_CHECK (Linux 6.14); its errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    nothing = (ctypes.c_char_p * 1)(None)
    number = {"x86_64": 322, "aarch64": 281}[os.uname().machine]
    failed = libc.syscall(number, -100, path.encode(), nothing, nothing, 0x10000)
    return ctypes.get_errno() if failed else 0


async def test_a_check_of_execution(world: World, accessor: Accessor) -> None:
    path = program(world)
    async with world.listener(world.everywhere()) as listener:
        assert await accessor.run(check_execution, path) == 0
        assert world.heard(listener.take()) == [X, O]


def exec_from_thread(path: str) -> tuple[int, int]:
    child = os.fork()
    if child == 0:
        thread = threading.Thread(target=lambda: os.execve(path, [path], {}))
        thread.start()
        thread.join()
        os._exit(100)
    return child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def test_a_program_executed_by_a_thread(world: World, accessor: Accessor) -> None:
    path = program(world)
    async with world.listener(world.everywhere()) as listener:
        child, status = await accessor.run(exec_from_thread, path)
        heard = listener.take()
    assert status == 0
    assert {event.pid for event in heard} == {child}
    assert world.heard(heard)[:4] == [X, O, *HEADER]


# Who it is


def read_in_child(path: str, count: int) -> tuple[int, bool]:
    descriptor = os.open(path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        os._exit(len(os.pread(descriptor, count, 5000)) != count)
    return child, os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("count", [100, MIB // 2])
async def test_an_inherited_descriptor(world: World, accessor: Accessor, count: int) -> None:
    path = world.file(size=MIB)
    async with world.listener(world.everywhere()) as listener:
        child, read = await accessor.run(read_in_child, path, count)
        heard = listener.take()
    assert read
    length = -(-(5000 + count) // PAGE) * PAGE - PAGE
    assert world.heard(heard) == [O, P(PAGE, length), A]
    reader = accessor.pid if world.diverges("pid") else child
    assert [event.pid for event in heard] == [accessor.pid, reader, reader]


def read_what_a_child_opened(path: str) -> tuple[int, bytes]:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        socket.send_fds(theirs, [b"x"], [os.open(path, os.O_RDONLY)])
        os._exit(0)
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(child, 0)  # its opener is gone
    return child, os.pread(descriptors[0], 100, 5000)


async def test_a_passed_descriptor(world: World, accessor: Accessor) -> None:
    path = world.file()
    async with world.listener(world.everywhere()) as listener:
        child, data = await accessor.run(read_what_a_child_opened, path)
        heard = listener.take()
    assert data == CONTENT[5000:5100]
    assert world.heard(heard) == [O, P(PAGE, PAGE), A]
    reader = child if world.diverges("pid") else accessor.pid
    assert [event.pid for event in heard] == [child, reader, reader]


async def test_hard_links(world: World, accessor: Accessor) -> None:
    """The name that was used; on the emulator the one looked up last, which is the same here (divergence "paths of hard links")."""
    world.file()
    os.link(world.backing / "file", world.backing / "other")
    async with world.listener(world.everywhere()) as listener:
        for name in ("file", "other"):
            await accessor.run("pread_path", str(world.path / name), 100, 0)
            assert world.heard(listener.take()) == [O.of(name), P(0, PAGE, name), A.of(name)]


async def test_a_user_who_may_not(world: World, make_accessor: MakeAccessor) -> None:
    path = world.file()
    os.chmod(world.backing / "file", 0o600)
    nobody = make_accessor(uid=NOBODY, gid=NOBODY)
    async with world.listener(world.everywhere()) as listener:
        assert await outcome(lambda: nobody.run("open", path, os.O_RDONLY)) == Failed(errno.EACCES)
        assert await outcome(lambda: nobody.run("truncate", path, 0)) == Failed(errno.EACCES)
        assert listener.take() == []
        os.chmod(world.backing / "file", 0o644)
        await nobody.run("pread_path", path, 100, 0)
        heard = listener.take()
    assert world.heard(heard) == [O, P(0, PAGE), A]
    assert {event.pid for event in heard} == {nobody.pid}


async def test_what_the_listener_fills_in(world: World, accessor: Accessor) -> None:
    path = world.file()
    (world.backing / "file").write_bytes(bytes(SIZE))

    def fill(event: Event) -> int:
        if event.offset is not None and event.count is not None:
            os.pwrite(event.fd, CONTENT[event.offset : event.offset + event.count], event.offset)
        return 0

    marks = world.everywhere()
    async with world.listener(marks, answer=fill, event_f_flags=os.O_RDWR | os.O_CLOEXEC) as listener:
        assert await accessor.run("pread_path", path, 5000, 4000) == CONTENT[4000:9000]
        assert world.heard(listener.take()) == [O, P(0, 3 * PAGE), A]
    assert world.content()[: 3 * PAGE] == CONTENT[: 3 * PAGE]
