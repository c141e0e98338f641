"""One expectation, two worlds: notifications, which want no answer: what makes them, and when."""

import ctypes
import fcntl
import mmap
import os
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.fanotify.abi import (
    FAN_OPEN,
    FAN_OPEN_EXEC,
    NOTIFICATION_EVENTS,
)
from tests.conftest import MakeAccessor
from tests.support.closing import close_in_child
from tests.support.kernel_and_mount import (
    CONTENT,
    MIB,
    Failed,
    World,
    outcome,
)
from tests.support.notification_groups import (
    FENCE,
    NOTIF_GROUP,
    TakeNotes,
    Told,
    named,
    open_and_exit,
)
from tests.support.row_tests import row_names

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


# What accessors do; `other` is another file


def pread_call(descriptor: int, other: str) -> None:
    os.pread(descriptor, 100, 0)


def pread_often(descriptor: int, other: str) -> None:
    for offset in range(5):
        os.pread(descriptor, 100, offset)


def pread_all(descriptor: int, other: str) -> None:
    os.pread(descriptor, 20000, 0)


def pread_past_the_end(descriptor: int, other: str) -> None:
    os.pread(descriptor, 100, 1 << 20)


def pread_nothing(descriptor: int, other: str) -> None:
    os.pread(descriptor, 0, 0)


def readv_call(descriptor: int, other: str) -> None:
    os.preadv(descriptor, [bytearray(10), bytearray(10)], 5000)


def pwrite_call(descriptor: int, other: str) -> None:
    os.pwrite(descriptor, b"new", 0)


def pwrite_nothing(descriptor: int, other: str) -> None:
    os.pwrite(descriptor, b"", 0)


def extend(descriptor: int, other: str) -> None:
    os.pwrite(descriptor, b"new", 1 << 20)


def truncate_call(descriptor: int, other: str) -> None:
    os.ftruncate(descriptor, 5000)


def allocate(descriptor: int, other: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(40000)):
        raise OSError(ctypes.get_errno(), "fallocate")


def punch_hole(descriptor: int, other: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, 3, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "fallocate")


def map_and_touch(descriptor: int, other: str) -> None:
    with mmap.mmap(descriptor, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
        mapping[:1]


def map_and_write(descriptor: int, other: str) -> None:
    with mmap.mmap(descriptor, 4096, flags=mmap.MAP_SHARED) as mapping:
        mapping[:3] = b"new"
        mapping.flush()


def look(descriptor: int, other: str) -> None:
    os.fstat(descriptor)
    os.lseek(descriptor, 0, os.SEEK_END)
    os.fsync(descriptor)
    os.fchmod(descriptor, 0o640)
    os.utime(descriptor)
    fcntl.fcntl(descriptor, fcntl.F_GETFL)


def advise(descriptor: int, other: str) -> None:
    os.posix_fadvise(descriptor, 0, 8192, os.POSIX_FADV_WILLNEED)


def duplicate_and_close(descriptor: int, other: str) -> None:
    os.close(os.dup(descriptor))


def fork_and_close(descriptor: int, other: str) -> None:
    child = os.fork()
    if child == 0:
        os.close(descriptor)
        os._exit(0)
    os.waitpid(child, 0)


def send(descriptor: int, other: str) -> None:
    ours, _theirs = socket.socketpair()
    os.sendfile(ours.fileno(), descriptor, 0, 1000)


def send_from_the_end(descriptor: int, other: str) -> None:
    ours, _theirs = socket.socketpair()
    os.sendfile(ours.fileno(), descriptor, 1 << 20, 1000)


def splice_out(descriptor: int, other: str) -> None:
    _reader, writer = os.pipe()
    os.splice(descriptor, writer, 1000, offset_src=0)


def splice_in(descriptor: int, other: str) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"new")
    os.splice(reader, descriptor, 3, offset_dst=0)


def send_in(descriptor: int, other: str) -> None:
    source = os.open(other, os.O_RDONLY)
    os.sendfile(descriptor, source, 0, 1000)
    os.close(source)


def copy_from_other(descriptor: int, other: str) -> None:
    source = os.open(other, os.O_RDONLY)
    os.copy_file_range(source, descriptor, 5000, 0, 0)
    os.close(source)


@dataclass(frozen=True, slots=True)
class Call:
    """What an accessor does to an open file, and what is told of it, in the order in which each first happens. `divergence`: where
    that entry of fusehsm/conform/divergences.py is to be seen, the call fails or is told otherwise."""

    act: Callable[[int, str], None]
    told: Sequence[str] = ()
    divergence: str = ""
    emulated: Sequence[str] = ()

    @property
    def name(self) -> str:
        """For the test's id."""
        return self.act.__name__


CALLS = [
    Call(pread_call, ["file ACCESS"]),
    Call(pread_often, ["file ACCESS"]),
    Call(pread_all, ["file ACCESS"]),
    Call(readv_call, ["file ACCESS"]),
    Call(pread_past_the_end),
    Call(pread_nothing),
    Call(pwrite_call, ["file MODIFY"]),
    Call(extend, ["file MODIFY"]),
    Call(pwrite_nothing),
    Call(truncate_call),
    Call(allocate, ["file MODIFY"], "fallocate"),
    Call(punch_hole, ["file MODIFY"], "fallocate"),
    Call(map_and_touch),
    Call(map_and_write, [], "shared mappings (exact)"),
    Call(look),
    Call(duplicate_and_close),
    Call(fork_and_close),
    Call(send, ["file ACCESS"]),
    Call(send_from_the_end),
    Call(splice_out, ["file ACCESS"]),
    Call(splice_in, ["file MODIFY"]),
    Call(send_in, ["other ACCESS|CLOSE_NOWRITE|OPEN", "file MODIFY"]),
    Call(copy_from_other, ["other ACCESS|CLOSE_NOWRITE|OPEN", "file MODIFY"]),
]


@pytest.mark.parametrize("call", CALLS, ids=row_names)
async def test_calls(world: World, accessor: Accessor, notes: TakeNotes, call: Call) -> None:
    path, other = world.file(), world.file("other")
    async with notes() as group:
        descriptor = await accessor.run("open", path, os.O_RDWR)
        assert await group.told() == [Told(frozenset({"OPEN"}), "file", accessor.pid)]
        result = await outcome(lambda: accessor.run(call.act, descriptor, other))
        told = await group.told()
        if call.divergence and world.diverges(call.divergence):
            assert isinstance(result, Failed)
        else:
            assert result is None
            assert [f"{one.file} {named(one)}" for one in told] == list(call.told)
            assert {one.pid for one in told} <= {accessor.pid}
        await accessor.run("close", descriptor)
        assert await group.told() == [Told(frozenset({"CLOSE_WRITE"}), "file", accessor.pid)]


async def test_advice(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    """What read-ahead fetches is taken for a read by an engine that is not told what for a page is wanted (entry "read-ahead asks")."""
    path = world.file()
    async with notes() as group:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        await accessor.run(advise, descriptor, path)
        told = {name for one in await group.told() for name in one.names}
        assert told in ([{"OPEN"}, {"OPEN", "ACCESS"}] if world.diverges("read-ahead asks") else [{"OPEN"}])


# Opening and closing


@dataclass(frozen=True, slots=True)
class Opening:
    """An open(2), and whether its close(2) is CLOSE_WRITE."""

    name: str
    flags: int
    writes: bool
    file: str = "file"
    divergence: str = ""


OPENINGS = [
    Opening("for reading", os.O_RDONLY, False),
    Opening("for writing", os.O_WRONLY, True),
    Opening("for both", os.O_RDWR, True),
    Opening("for neither", os.O_ACCMODE, False),
    Opening("O_TRUNC", os.O_WRONLY | os.O_TRUNC, True),
    Opening("O_CREAT", os.O_CREAT | os.O_RDWR, True),
    Opening("O_CREAT of a new file", os.O_CREAT | os.O_RDWR, True, "new"),
    Opening("O_EXCL", os.O_CREAT | os.O_EXCL | os.O_WRONLY, True, "new"),
    Opening("O_CREAT for reading", os.O_CREAT | os.O_RDONLY, False, "new"),
]


@pytest.mark.parametrize("row", OPENINGS, ids=row_names)
async def test_openings(world: World, accessor: Accessor, notes: TakeNotes, row: Opening) -> None:
    world.file()
    async with notes() as group:
        descriptor = await accessor.run("open", str(world.path / row.file), row.flags, 0o644)
        assert await group.told() == [Told(frozenset({"OPEN"}), row.file, accessor.pid)]
        await accessor.run("close", descriptor)
        name = "CLOSE_WRITE" if row.writes else "CLOSE_NOWRITE"
        assert await group.told() == [Told(frozenset({name}), row.file, accessor.pid)]


async def test_what_opens_nothing(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes() as group:
        await accessor.run("close", await accessor.run("open", path, os.O_PATH))
        for failing in (os.O_CREAT | os.O_EXCL | os.O_RDWR, os.O_RDONLY | os.O_DIRECTORY):
            assert isinstance(await outcome(lambda flags=failing: accessor.run("open", path, flags)), Failed)  # type: ignore[misc]
        await accessor.run("truncate", path, 100)
        await accessor.run("rename", path, str(world.path / "renamed"))
        await accessor.run("unlink", str(world.path / "renamed"))
        assert await group.told() == []


def open_and_be_killed(path: str) -> int:
    child = os.fork()
    if child == 0:
        os.open(path, os.O_RDWR)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return child


@pytest.mark.parametrize("act", [close_in_child, open_and_exit, open_and_be_killed])
async def test_who_closes(
    world: World, accessor: Accessor, notes: TakeNotes, act: Callable[[Any], int]
) -> None:
    path = world.file()
    async with notes() as group:
        opened_here = act is close_in_child
        what = await accessor.run("open", path, os.O_RDWR) if opened_here else path
        child = await accessor.run(act, what)
        told = await group.told()
    opener = accessor.pid if opened_here else child
    closer = opener if world.diverges("who closes") else child
    assert [(one.pid, *sorted(one.names)) for one in told] == (
        [(opener, "OPEN"), (closer, "CLOSE_WRITE")] if opener != closer else [(opener, "CLOSE_WRITE", "OPEN")]
    )


async def test_a_mapping_keeps_it_open(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes() as group:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        mapping = await accessor.run("map_file", descriptor, 4096)
        await accessor.run("close", descriptor)
        assert await group.names() == ["OPEN"]
        await accessor.run("unmap", mapping)
        assert await group.told() == [Told(frozenset({"CLOSE_NOWRITE"}), "file", accessor.pid)]


@pytest.mark.parametrize("size", [3 * MIB, 3 * MIB + 5])
async def test_one_call_is_one_notification(
    world: World, make_accessor: MakeAccessor, notes: TakeNotes, size: int
) -> None:
    """However many requests it takes, and although each notification is read at once."""
    path = world.file(size=6 * MIB)
    accessor = make_accessor()
    async with world.listener(world.everywhere(NOTIFICATION_EVENTS), flags=NOTIF_GROUP) as listener:
        descriptor = await accessor.run("open", path, os.O_RDWR)
        await listener.wait_for(1)
        assert [event.names for event in listener.take()] == [("OPEN",)]
        for operation, name in (("read", "ACCESS"), ("write", "MODIFY")):
            for _ in range(2):
                argument: object = size if operation == "read" else CONTENT[:size]
                await accessor.run(operation, descriptor, argument)
                # One queue: what another process opens comes after it.
                await make_accessor().run("open", str(world.path / FENCE), os.O_RDONLY)
                await listener.wait_until_named("OPEN")
                assert [event.names for event in listener.take()] == [(name,), ("OPEN",)]
            await accessor.run("lseek", descriptor, 0, os.SEEK_SET)


# Programs


def run_program(path: str) -> tuple[int, int]:
    child = os.fork()
    if child == 0:
        try:
            os.execve(path, [path], {})
        except OSError as error:
            os._exit(200 + (error.errno or 0))
    return child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def program(world: World, *, script: bool = False) -> str:
    if script:
        (world.backing / "program").write_text("#!/bin/sh\n")
        (world.backing / "program").chmod(0o755)
    else:
        found = shutil.which("true")
        assert found is not None
        shutil.copy(found, world.backing / "program")
    return str(world.path / "program")


@pytest.mark.parametrize("script", [False, True], ids=["program", "script"])
@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (NOTIFICATION_EVENTS, {"OPEN", "OPEN_EXEC", "ACCESS", "CLOSE_NOWRITE"}),
        (FAN_OPEN | FAN_OPEN_EXEC, {"OPEN", "OPEN_EXEC"}),
        (FAN_OPEN_EXEC, {"OPEN_EXEC"}),
        (FAN_OPEN, {"OPEN"}),
    ],
    ids=["everything", "both", "OPEN_EXEC", "OPEN"],
)
async def test_programs(
    world: World, accessor: Accessor, notes: TakeNotes, mask: int, names: set[str], script: bool
) -> None:
    path = program(world, script=script)
    async with notes(world.everywhere(mask)) as group:
        child, status = await accessor.run(run_program, path)
        told = [one for one in await group.told() if one.pid == child]
    assert status == 0
    assert told == [Told(frozenset(names), "program", child)]


async def test_open_exec_is_one_event_with_open(world: World, accessor: Accessor) -> None:
    path = program(world)
    mask = FAN_OPEN | FAN_OPEN_EXEC
    async with world.listener(world.everywhere(mask), flags=NOTIF_GROUP) as listener:
        await accessor.run(run_program, path)
        await listener.wait_for(1)
        assert [event.names for event in listener.take()] == [("OPEN", "OPEN_EXEC")]
