"""One expectation, two worlds: notifications, which want no answer: who is told of what, when, and what is merged."""

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from fusehsm.abi import (
    FAN_ACCESS,
    FAN_ALLOW,
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_CLOSE,
    FAN_ENABLE_AUDIT,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_EVICTABLE,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MODIFY,
    FAN_ONDIR,
    FAN_OPEN,
    FAN_OPEN_EXEC,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TID,
    FAN_UNLIMITED_MARKS,
    FAN_UNLIMITED_QUEUE,
    NOTIFICATION_EVENTS,
    RawEvent,
    decode_events,
    encode_response,
    mask_names,
)
from fusehsm.backends.base import Group
from fusehsm.caller import CallReader, reading
from fusehsm.conform.accessor import Accessor
from fusehsm.mountinfo import mount_of
from tests.conftest import MakeAccessor
from tests.harness import fusehsm
from tests.listening import HOLD, PATIENCE
from tests.table import row_names
from tests.worlds import (
    ACCESS_PERM,
    CONTENT,
    EVERYTHING,
    MIB,
    OPEN_PERM,
    PRE_ACCESS,
    PRE_GROUP,
    Failed,
    Mark,
    World,
    outcome,
)

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]

NOTIF_GROUP = FAN_CLASS_NOTIF | FAN_CLOEXEC
SURVIVING = FAN_MARK_IGNORED_SURV_MODIFY
READ_WRITE = os.O_RDWR | os.O_CLOEXEC
FENCE = "fence"


@dataclass(frozen=True, slots=True)
class Told:
    """One notification: the names of its bits, the file's name in the test's directory ("" is the directory), the process."""

    names: frozenset[str]
    file: str
    pid: int


class Notes:
    """A group that is read only when the test says so, so that what is merged does not depend on time."""

    def __init__(self, world: World, group: Group, fencer: Accessor) -> None:
        self.group = group
        self._world = world
        self._fencer = fencer
        self._fence = str(world.path / FENCE)

    async def read(self) -> list[RawEvent]:
        """All that was queued until now. One queue: what stands before an open that this makes is all there is."""
        await self._fencer.run("open", self._fence, os.O_RDONLY)
        taken: list[RawEvent] = []
        with trio.fail_after(PATIENCE):
            while True:
                await self.group.wait_readable()
                try:
                    events = decode_events(self.group.dialect, self.group.read(4096))
                except BlockingIOError:
                    continue
                for event in events:
                    if event.fd >= 0 and self.group.event_path(event) == self._fence:
                        close(event)
                        return taken
                    taken.append(event)

    async def told(self) -> list[Told]:
        """read(), as values; other tests' files are none of its business."""
        told = []
        for event in await self.read():
            path = self.group.event_path(event)
            close(event)
            if path == str(self._world.path) or path.startswith(f"{self._world.path}/"):
                names = frozenset(mask_names(event.mask, self.group.dialect))
                told.append(Told(names, path[len(str(self._world.path)) + 1 :], event.pid))
        return told

    async def names(self) -> list[str]:
        """told(), as the kernel names the bits, in the order of their numbers: "ACCESS|OPEN"."""
        return [named(told) for told in await self.told()]


def named(told: Told) -> str:
    return "|".join(sorted(told.names))


def close(event: RawEvent) -> None:
    """Close an event's descriptors."""
    for descriptor in (event.fd, event.pidfd):
        if descriptor is not None and descriptor >= 0:
            os.close(descriptor)


TakeNotes = Callable[..., Any]


@pytest.fixture
def fencer(make_accessor: MakeAccessor) -> Accessor:
    return make_accessor()


@pytest.fixture
def notes(world: World, fencer: Accessor) -> TakeNotes:
    """`async with notes(*marks, flags=..., event_f_flags=...) as notes`: a group with those marks, by default one for every notification."""
    world.file(FENCE)

    @asynccontextmanager
    async def take_notes(
        *marks: Mark, flags: int = NOTIF_GROUP, event_f_flags: int = os.O_RDONLY | os.O_CLOEXEC
    ) -> AsyncIterator[Notes]:
        group = await world.open_group(flags, event_f_flags)
        try:
            for mark in marks or (world.everywhere(NOTIFICATION_EVENTS),):
                await group.mark(FAN_MARK_ADD | mark.flags, mark.mask, path=str(mark.path))
            await group.mark(FAN_MARK_ADD, FAN_OPEN, path=str(world.path / FENCE))
            yield Notes(world, group, fencer)
        finally:
            group.close()

    return take_notes


# What accessors do; `other` is another file


def read_whole(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    length = len(os.read(descriptor, 100))
    os.close(descriptor)
    return length


def write_some(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    length = os.write(descriptor, b"new")
    os.close(descriptor)
    return length


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


def copy_from_other(descriptor: int, other: str) -> None:
    source = os.open(other, os.O_RDONLY)
    os.copy_file_range(source, descriptor, 5000, 0, 0)
    os.close(source)


@dataclass(frozen=True, slots=True)
class Call:
    """What an accessor does to an open file, and what is told of it, in the order in which each first happens. `divergence`: where
    that entry of fusehsm/divergences.py is to be seen, the call fails or is told otherwise."""

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


def close_after_the_parent(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os.close(descriptor)
        os._exit(0)
    os.close(descriptor)
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)
    return child


def open_and_exit(path: str) -> int:
    child = os.fork()
    if child == 0:
        os.open(path, os.O_RDWR)
        os._exit(0)
    os.waitpid(child, 0)
    return child


def open_and_be_killed(path: str) -> int:
    child = os.fork()
    if child == 0:
        os.open(path, os.O_RDWR)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return child


@pytest.mark.parametrize("act", [close_after_the_parent, open_and_exit, open_and_be_killed])
async def test_who_closes(
    world: World, accessor: Accessor, notes: TakeNotes, act: Callable[[str], int]
) -> None:
    path = world.file()
    async with notes() as group:
        child = await accessor.run(act, path)
        told = await group.told()
    opener = accessor.pid if act is close_after_the_parent else child
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


# Merging


async def test_equal_ones_are_merged_wherever_they_are_queued(
    world: World, make_accessor: MakeAccessor, notes: TakeNotes
) -> None:
    path, other = world.file(), world.file("other")
    one, two = make_accessor(), make_accessor()
    async with notes() as group:
        for accessor, file in ((one, path), (one, other), (two, path), (one, path), (two, path)):
            await accessor.run(read_whole, file)
        await one.run(write_some, path)
        reading = frozenset({"OPEN", "ACCESS", "CLOSE_NOWRITE"})
        assert await group.told() == [
            Told(reading | {"MODIFY", "CLOSE_WRITE"}, "file", one.pid),
            Told(reading, "other", one.pid),
            Told(reading, "file", two.pid),
        ]
        # What has been read is not merged into.
        await one.run(read_whole, path)
        assert await group.told() == [Told(reading, "file", one.pid)]


async def test_many_are_merged(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    """More than travel ahead of being read."""
    paths = [world.file(f"file-{number}") for number in range(150)]
    async with notes() as group:
        for _ in range(2):
            for path in paths:
                await accessor.run(read_whole, path)
        told = await group.told()
    names: dict[str, frozenset[str]] = {}
    for one in told:
        assert one.file not in names or world.diverges("merging of many")
        names[one.file] = names.get(one.file, frozenset()) | one.names
    assert list(names) == [f"file-{number}" for number in range(150)]
    assert set(names.values()) == {frozenset({"OPEN", "ACCESS", "CLOSE_NOWRITE"})}


async def test_a_replaced_file_is_another(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path, other = world.file(), world.file("other")
    async with notes() as group:
        await accessor.run(read_whole, path)
        await accessor.run("rename", other, path)
        await accessor.run(read_whole, path)
        assert [named(one) for one in await group.told()] == ["ACCESS|CLOSE_NOWRITE|OPEN"] * 2


async def test_an_unlinked_file(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes() as group:
        descriptor = await accessor.run("open", path, os.O_RDWR)
        await group.told()
        await accessor.run("unlink", path)
        await accessor.run("pwrite", descriptor, b"new", 0)
        await accessor.run("close", descriptor)
        (event,) = await group.read()
        assert set(mask_names(event.mask, group.group.dialect)) == {"MODIFY", "CLOSE_WRITE"}
        assert os.pread(event.fd, 3, 0) == b"new"
        close(event)


def read_in_two_threads(path: str) -> list[int]:
    found = []

    def read() -> None:
        found.append(threading.get_native_id())
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, 10)
        os.close(descriptor)

    for _ in range(2):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    return found


async def test_threads(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes() as processes, notes(flags=NOTIF_GROUP | FAN_REPORT_TID) as threads:
        first, second = await accessor.run(read_in_two_threads, path)
        names = frozenset({"OPEN", "ACCESS", "CLOSE_NOWRITE"})
        assert await processes.told() == [Told(names, "file", accessor.pid)]
        told = await threads.told()
    assert told == [Told(names, "file", first), Told(names, "file", second)]


# Beside permission events


async def test_one_group_for_both(world: World, accessor: Accessor) -> None:
    """The notification of an access comes after it has been allowed; nothing is merged with a permission event."""
    path = world.file()
    mark = world.everywhere(EVERYTHING | NOTIFICATION_EVENTS)
    async with world.listener(mark) as listener:
        for operation, arguments, names in (
            ("open", (path, os.O_RDWR), ["OPEN_PERM", "OPEN"]),
            ("pread", (100, 0), ["PRE_ACCESS", "ACCESS_PERM", "ACCESS"]),
            ("pwrite", (b"new", 0), ["PRE_ACCESS", "MODIFY"]),
            ("ftruncate", (100,), ["PRE_ACCESS"]),
            ("close", (), ["CLOSE_WRITE"]),
        ):
            if operation == "open":
                descriptor = await accessor.run(operation, *arguments)
            else:
                await accessor.run(operation, descriptor, *arguments)
            await listener.wait_for(len(names))
            assert [brief for event in listener.take() for brief in event.names] == names


async def blocked_in_pread(tid: int) -> None:
    """Wait until a thread waits in pread(2): whatever that sends to a server stands before what others send later."""
    calls = CallReader()
    with trio.fail_after(PATIENCE):
        while True:
            call = calls.read(tid)
            transfer = call and reading(call)
            if transfer and transfer.offset is not None:
                break
            await trio.sleep(0.001)
    calls.close()


async def test_they_stand_in_one_queue(world: World, make_accessor: MakeAccessor, notes: TakeNotes) -> None:
    path, other = world.file(), world.file("other")
    reader, waiter = make_accessor(), make_accessor()
    marks = (world.everywhere(NOTIFICATION_EVENTS), Mark(PRE_ACCESS, other))
    async with notes(*marks, flags=PRE_GROUP) as group:
        await reader.run(read_whole, path)
        call = waiter.start("pread_path", other, 100, 0)
        await blocked_in_pread(waiter.pid)
        await reader.run(read_whole, path)
        events = await group.read()
        names = [(event.pid, *sorted(mask_names(event.mask, group.group.dialect))) for event in events]
        assert names == [
            (reader.pid, "ACCESS", "CLOSE_NOWRITE", "OPEN"),
            (waiter.pid, "OPEN"),
            (waiter.pid, "PRE_ACCESS"),
        ]
        for event in events:
            if event.mask & PRE_ACCESS:
                group.group.write(encode_response(event.fd, FAN_ALLOW))
            close(event)
        assert await call.wait() == CONTENT[:100]
        assert await group.names() == ["ACCESS|CLOSE_NOWRITE"]


async def test_they_come_after_all_have_allowed(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path = world.file()
    async with (
        notes() as group,
        world.listener(Mark(EVERYTHING, path), answer=lambda event: HOLD) as listener,
    ):
        call = accessor.start("pread_path", path, 100, 0)
        for asked, told in ((OPEN_PERM, []), (PRE_ACCESS, ["OPEN"]), (ACCESS_PERM, [])):
            await listener.wait_for(1)
            assert await group.names() == told
            (event,) = listener.take_held()
            assert event.mask == asked
            listener.take()
            listener.group.answer(event, 0)
            os.close(event.fd)
        assert await call.wait() == CONTENT[:100]
        assert await group.names() == ["ACCESS|CLOSE_NOWRITE"]


@dataclass(frozen=True, slots=True)
class Denial:
    """What is denied, and what is told all the same of opening and reading a file."""

    name: str
    mask: int
    told: Sequence[str]


DENIALS = [
    Denial("open", OPEN_PERM, []),
    Denial("PRE_ACCESS", PRE_ACCESS, ["CLOSE_NOWRITE|OPEN"]),
    Denial("ACCESS_PERM", ACCESS_PERM, ["CLOSE_NOWRITE|OPEN"]),
]


@pytest.mark.parametrize("row", DENIALS, ids=row_names)
async def test_what_is_denied_is_not_told(
    world: World, accessor: Accessor, notes: TakeNotes, row: Denial
) -> None:
    path = world.file()
    async with notes(Mark(NOTIFICATION_EVENTS, path)) as group:
        async with world.listener(Mark(row.mask, path), answer=lambda event: errno.EBUSY):
            result = await outcome(lambda: accessor.run("pread_path", path, 100, 0))
            assert result == Failed(errno.EBUSY)
        assert await group.names() == list(row.told)


# Marks


def on(name: str, mask: int, flags: int = 0) -> Callable[[World], Mark]:
    """A mark on something in the test's directory; "" is the directory."""
    return lambda world: Mark(mask, world.path / name if name else world.path, flags)


@dataclass(frozen=True, slots=True)
class Scope:
    """Marks, and what is told of reading and writing each of: file, sub/deep; and of listing sub."""

    name: str
    marks: Sequence[Callable[[World], Mark]]
    file: str = ""
    deep: str = ""
    directory: str = ""


ALL = NOTIFICATION_EVENTS
WRITTEN = "ACCESS|CLOSE_WRITE|MODIFY|OPEN"
LISTED = "ACCESS|CLOSE_NOWRITE|OPEN"
EVERYWHERE = on("", ALL, FAN_MARK_FILESYSTEM)

SCOPES = [
    Scope("a file", [on("file", ALL)], WRITTEN),
    Scope("a file, evictable", [on("file", ALL, FAN_MARK_EVICTABLE)], WRITTEN),
    Scope("a directory", [on("sub", ALL)]),
    Scope("a directory, with FAN_ONDIR", [on("sub", ALL | FAN_ONDIR)], directory=LISTED),
    Scope("its children", [on("sub", ALL | FAN_EVENT_ON_CHILD)], deep=WRITTEN),
    Scope("the parent's children", [on("", ALL | FAN_EVENT_ON_CHILD)], WRITTEN),
    Scope("both", [on("", ALL | FAN_EVENT_ON_CHILD | FAN_ONDIR)], WRITTEN, directory=LISTED),
    Scope("the mount", [on("", ALL, FAN_MARK_MOUNT)], WRITTEN, WRITTEN),
    Scope("the filesystem", [EVERYWHERE], WRITTEN, WRITTEN),
    Scope("directories too", [on("", ALL | FAN_ONDIR, FAN_MARK_MOUNT)], WRITTEN, WRITTEN, LISTED),
    Scope("masks are united", [on("file", FAN_OPEN), on("", FAN_CLOSE, FAN_MARK_MOUNT)], "CLOSE_WRITE|OPEN", "CLOSE_WRITE"),
    Scope("ACCESS", [on("", FAN_ACCESS, FAN_MARK_MOUNT)], "ACCESS", "ACCESS"),
    Scope("MODIFY", [on("", FAN_MODIFY, FAN_MARK_MOUNT)], "MODIFY", "MODIFY"),
    Scope("OPEN", [on("", FAN_OPEN, FAN_MARK_MOUNT)], "OPEN", "OPEN"),
    Scope("CLOSE", [on("", FAN_CLOSE, FAN_MARK_MOUNT)], "CLOSE_WRITE", "CLOSE_WRITE"),
    *(
        Scope(f"all but OPEN and MODIFY of a file, {name}", [EVERYWHERE, on("file", FAN_OPEN | FAN_MODIFY, flags)], told, WRITTEN)
        for name, flags, told in (
            # A write takes an ignore mask away that does not survive it, before it is told.
            ("IGNORED_MASK", FAN_MARK_IGNORED_MASK, "ACCESS|CLOSE_WRITE|MODIFY"),
            ("IGNORED_MASK SURV", FAN_MARK_IGNORED_MASK | SURVIVING, "ACCESS|CLOSE_WRITE"),
            ("IGNORE", FAN_MARK_IGNORE, "ACCESS|CLOSE_WRITE|MODIFY"),
            ("IGNORE SURV", FAN_MARK_IGNORE | SURVIVING, "ACCESS|CLOSE_WRITE"),
        )
    ),
    Scope("all but a directory's children", [EVERYWHERE, on("sub", ALL | FAN_EVENT_ON_CHILD, FAN_MARK_IGNORE | SURVIVING)], WRITTEN),
    Scope("all but OPEN of the mount", [EVERYWHERE, on("", ALL & ~FAN_OPEN, FAN_MARK_MOUNT | FAN_MARK_IGNORE | SURVIVING)], "OPEN", "OPEN"),
]  # fmt: skip


def read_and_write(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.pread(descriptor, 10, 0)
    os.pwrite(descriptor, b"new", 0)
    os.close(descriptor)


@pytest.mark.parametrize("row", SCOPES, ids=row_names)
async def test_scope(world: World, accessor: Accessor, notes: TakeNotes, row: Scope) -> None:
    (world.backing / "sub").mkdir()
    path, deep = world.file(), world.file("sub/deep")
    async with notes(*(make(world) for make in row.marks)) as group:
        for file, expected in ((path, row.file), (deep, row.deep)):
            await accessor.run(read_and_write, file)
            assert await group.names() == [expected] * bool(expected)
        assert await accessor.run("listdir", str(world.path / "sub")) == ["deep"]
        assert await group.names() == [row.directory] * bool(row.directory)


def read_entries(descriptor: int) -> int:
    buffer = ctypes.create_string_buffer(4096)
    numbers = {"x86_64": 217, "aarch64": 61}
    return int(ctypes.CDLL(None).syscall(numbers[os.uname().machine], descriptor, buffer, 4096))


async def test_directories_step_by_step(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    (world.backing / "sub").mkdir()
    path = str(world.path / "sub")
    async with notes(world.everywhere(ALL | FAN_ONDIR)) as group:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        assert await group.told() == [Told(frozenset({"OPEN"}), "sub", accessor.pid)]
        assert await accessor.run(read_entries, descriptor) > 0
        assert await group.names() == ["ACCESS"]
        assert await accessor.run(read_entries, descriptor) == 0
        assert await group.names() == ["ACCESS"]
        assert isinstance(await outcome(lambda: accessor.run("read", descriptor, 10)), Failed)
        assert await group.names() == []
        await accessor.run("close", descriptor)
        assert await group.told() == [Told(frozenset({"CLOSE_NOWRITE"}), "sub", accessor.pid)]
        await accessor.run("mkdir", str(world.path / "sub" / "new"))
        await accessor.run("rmdir", str(world.path / "sub" / "new"))
        assert await group.names() == []


async def test_files_opened_before_the_mark(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    descriptor = await accessor.run("open", world.file(), os.O_RDWR)
    async with notes() as group:
        await accessor.run("pread", descriptor, 100, 0)
        unseen = world.diverges("notifications of files opened before the mark")
        assert await group.names() == ([] if unseen else ["ACCESS"])
        await accessor.run("pwrite", descriptor, b"new", 0)
        assert await group.names() == ["MODIFY"]
        await accessor.run("close", descriptor)
        assert await group.told() == [Told(frozenset({"CLOSE_WRITE"}), "file", accessor.pid)]


# What listeners read


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR], ids=["read-only", "read-write"])
async def test_event_descriptors(world: World, accessor: Accessor, notes: TakeNotes, flags: int) -> None:
    path = world.file()
    async with notes(event_f_flags=flags | os.O_CLOEXEC) as group:
        await accessor.run(read_whole, path)
        (event,) = await group.read()
        assert (event.length, event.offset, event.pidfd) == (24, None, None)
        assert fcntl.fcntl(event.fd, fcntl.F_GETFL) & ~os.O_CLOEXEC == flags | 0o100000
        # What is done through it is not told.
        assert os.pread(event.fd, 100, 0) == CONTENT[:100]
        if flags == os.O_RDWR:
            os.pwrite(event.fd, b"new", 0)
        with pytest.raises(FileNotFoundError):
            group.group.write(encode_response(event.fd, FAN_ALLOW))
        os.close(event.fd)
        assert await group.names() == []


async def test_pidfds(world: World, make_accessor: MakeAccessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes(flags=NOTIF_GROUP | FAN_REPORT_PIDFD) as group:
        accessor = make_accessor()
        for _ in range(2):
            await accessor.run(read_whole, path)
        (event,) = await group.read()
        assert (event.length, event.pid) == (32, accessor.pid)
        assert event.pidfd is not None
        with open(f"/proc/self/fdinfo/{event.pidfd}") as lines:
            assert f"Pid:\t{accessor.pid}\n" in lines
        close(event)


@pytest.mark.parametrize("tells", [False, True], ids=["plain", "FAN_REPORT_FD_ERROR"])
async def test_the_process_is_dead(
    world: World, make_accessor: MakeAccessor, notes: TakeNotes, tells: bool
) -> None:
    path = world.file()
    flags = NOTIF_GROUP | FAN_REPORT_PIDFD | FAN_REPORT_FD_ERROR * tells
    async with notes(flags=flags) as group:
        child = await make_accessor().run(open_and_exit, path)
        (event,) = await group.read()
        close(event)
    assert (event.pid, event.pidfd) == (child, -errno.ESRCH if tells else -1)


async def test_a_file_that_cannot_be_opened(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    """A program that runs cannot be opened for writing: the notification is lost, or with FAN_REPORT_FD_ERROR says why."""
    path, sleep = world.file(), shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, world.backing / "busy")
    # On the backing: what runs from a FUSE mount, its server may write to.
    with subprocess.Popen([world.backing / "busy", "infinity"]) as busy:
        try:
            async with (
                notes(event_f_flags=READ_WRITE) as plain,
                notes(flags=NOTIF_GROUP | FAN_REPORT_FD_ERROR, event_f_flags=READ_WRITE) as telling,
            ):
                await accessor.run(read_whole, path)
                await accessor.run(read_whole, str(world.path / "busy"))
                first, second = await telling.read()
                close(first)
                assert second.fd == -errno.ETXTBSY
                assert set(mask_names(second.mask, telling.group.dialect)) == {
                    "OPEN",
                    "ACCESS",
                    "CLOSE_NOWRITE",
                }
                assert [one.file for one in await plain.told()] == ["file"]
        finally:
            busy.kill()


# What a group looks like from outside


def introspected(world: World, group: Group) -> list[str]:
    """The lines that tell of a group and its marks: its fdinfo, or what `fusehsm status` says; the file's own number as "FILE" etc."""
    if world.is_kernel:
        with open(f"/proc/self/fdinfo/{group.fileno()}") as file:
            lines = [line.split(" fhandle-bytes")[0].strip() for line in file if line.startswith("fanotify")]
    else:
        shown = fusehsm("status", world.path).stdout
        lines = [line.strip() for line in shown.splitlines() if line.startswith("    fanotify")]
    found = mount_of(str(world.path))
    major, minor = found.device
    names = {f"mnt_id:{found.mount_id:x}": "MOUNT", f"sdev:{major << 20 | minor:x}": "DEVICE"}
    for path in world.path.iterdir():
        names[f"ino:{path.stat().st_ino:x}"] = path.name
    return [" ".join(names.get(word, word) for word in line.split()) for line in lines]


async def test_introspection(world: World) -> None:
    path, other = world.file(), world.file("other")
    (world.backing / "sub").mkdir()
    flags = PRE_GROUP | FAN_UNLIMITED_MARKS | FAN_ENABLE_AUDIT | FAN_REPORT_TID
    group = await world.open_group(flags, READ_WRITE)
    try:
        for mark_flags, mask, place in (
            (FAN_MARK_MOUNT, ALL | FAN_EVENT_ON_CHILD, path),
            (FAN_MARK_FILESYSTEM, PRE_ACCESS | OPEN_PERM, path),
            (FAN_MARK_EVICTABLE, ALL, path),
            (FAN_MARK_IGNORE | SURVIVING, FAN_OPEN, path),
            (FAN_MARK_IGNORED_MASK | SURVIVING, PRE_ACCESS, other),
            (0, ALL | FAN_ONDIR | FAN_EVENT_ON_CHILD, str(world.path / "sub")),
        ):
            await group.mark(FAN_MARK_ADD | mark_flags, mask, path=place)
        lines = await trio.to_thread.run_sync(introspected, world, group)
    finally:
        group.close()
    assert lines[0] == "fanotify flags:13b event-flags:88002"
    assert sorted(lines[1:]) == [
        "fanotify DEVICE mflags:0 mask:110000 ignored_mask:0",
        "fanotify MOUNT mflags:0 mask:103b ignored_mask:0",
        "fanotify file DEVICE mflags:440 mask:103b ignored_mask:20",
        "fanotify other DEVICE mflags:40 mask:0 ignored_mask:100000",
        "fanotify sub DEVICE mflags:0 mask:4800103b ignored_mask:0",
    ]


async def test_unlimited_queues_and_marks(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes(flags=NOTIF_GROUP | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS) as group:
        await accessor.run(read_whole, path)
        assert await group.names() == ["ACCESS|CLOSE_NOWRITE|OPEN"]
