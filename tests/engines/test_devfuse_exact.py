"""Exact events with the devfuse engine, held against the real kernel: what pyfuse3 cannot hear or do."""

import errno
import fcntl
import os
import signal

import pytest
import trio

from fusehsm.backends.opening import DEFAULT_FLAGS
from fusehsm.conform.accessor import Accessor, AccessorDied
from fusehsm.control.client import ControlConnection
from fusehsm.control.protocol import VERSION, Hello, MarkRequest, Reader
from fusehsm.fanotify.abi import (
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_MARK_ADD,
    FAN_ONDIR,
    FAN_REPORT_TID,
    FAN_UNLIMITED_QUEUE,
)
from fusehsm.linux import proc
from fusehsm.linux.mountinfo import mount_of
from tests.support.devfuse_acts import MAPPED, OPERATIONS, act
from tests.support.devfuse_rows import (
    AGAIN,
    ALLOCATIONS,
    COPIES,
    REFUSED_ALLOCATIONS,
    REFUSED_COPIES,
    SHARED,
    SHARED_WRITES,
    Allocation,
    Copy,
)
from tests.support.kernel_and_devfuse import engine as engine
from tests.support.kernel_and_devfuse import needs_shared_mappings
from tests.support.kernel_and_devfuse import whole_world as whole_world
from tests.support.kernel_and_mount import (
    ACCESS_PERM,
    ANSWERS,
    CONTENT,
    EVERYTHING,
    MIB,
    OPEN_PERM,
    PAGE,
    PRE_ACCESS,
    SIZE,
    A,
    Denier,
    Expected,
    Failed,
    Mark,
    O,
    P,
    Row,
    World,
    outcome,
    performed,
)
from tests.support.row_tests import row_names

pytestmark = [pytest.mark.fuse, pytest.mark.kernel, pytest.mark.any_engine]

CONTENT_EVENTS = PRE_ACCESS | ACCESS_PERM


async def check(world: World, accessor: Accessor, row: Row) -> None:
    """A call's result and events are as the row has them."""
    result, events = row.expected(world)
    heard, returned = await performed(world, accessor, row)
    assert (world.heard(heard), returned) == (events, result)


# Who


READS = (P(PAGE, PAGE), A)
# What each operation of devfuse_acts.py asks for, and of how large a file.
ASKED: dict[str, tuple[tuple[Expected, ...], int]] = {
    "read": (READS, SIZE),
    "pread": (READS, SIZE),
    "readv": (READS, SIZE),
    "large pread": ((P(PAGE, 3 * MIB + PAGE), A), 5 * MIB),
    "write": ((P(PAGE, PAGE),), SIZE),
    "pwrite": ((P(PAGE, PAGE),), SIZE),
    "large pwrite": ((P(PAGE, 3 * MIB + PAGE),), 5 * MIB),
    "ftruncate": ((P(PAGE, PAGE),), SIZE),
    "fallocate": ((P(PAGE, PAGE),), SIZE),
    "sendfile": (READS, SIZE),
    "splice from": (READS, SIZE),
    "splice to": ((P(PAGE, PAGE),), SIZE),
    "copy_file_range": ((P(2 * PAGE, PAGE), A, P(0, PAGE)), SIZE),
    "private mapping": ((P(PAGE, MAPPED),), SIZE),
    "shared mapping": ((P(PAGE, MAPPED),), SIZE),
}
TIDS = FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE | FAN_REPORT_TID


def test_every_operation_is_tried() -> None:
    assert ASKED.keys() == OPERATIONS.keys()


@pytest.mark.parametrize(
    "way",
    ["itself", "thread", "inherited", "inherited by a thread", "passed", "passed to a thread"],
    ids=lambda way: way.replace(" ", "-"),
)
@pytest.mark.parametrize("name", ASKED, ids=lambda name: name.replace(" ", "-"))
async def test_who_really_accesses(world: World, accessor: Accessor, name: str, way: str) -> None:
    """The event names who makes the call, by process and by thread, however he came by the descriptor."""
    if name == "shared mapping":
        needs_shared_mappings(world)
    asked, size = ASKED[name]
    path = world.file(size=size)
    mark = Mark(CONTENT_EVENTS, path)
    async with world.listener(mark) as processes, world.listener(mark, flags=TIDS) as threads:
        opener, (process, thread) = await accessor.run(act, path, "do", way, name)
        by_process, by_thread = processes.take(), threads.take()
    assert opener[0] == accessor.pid
    assert (opener[0] == process) == (way in ("itself", "thread"))
    assert (process == thread) == ("thread" not in way)
    assert world.heard(by_process) == world.heard(by_thread) == list(asked)
    assert {event.pid for event in by_process} == {process}
    assert {event.pid for event in by_thread} == {thread}


async def test_a_program_reads_its_standard_input(world: World, accessor: Accessor) -> None:
    """As a shell hands it over with `<`."""
    path = world.file()
    async with world.listener(Mark(CONTENT_EVENTS, path)) as listener:
        program, data = await accessor.run(act, path, "read_as_program")
        heard = listener.take()
    assert (world.heard(heard), data) == ([P(0, PAGE), A], CONTENT[:100])
    assert {event.pid for event in heard} == {program}


async def test_who_touches_an_inherited_mapping(world: World, accessor: Accessor) -> None:
    """Who maps, on the real kernel; here who touches first ("mappings ask when touched")."""
    needs_shared_mappings(world)
    path = world.file()
    async with world.listener(Mark(CONTENT_EVENTS, path)) as listener:
        child = await accessor.run(act, path, "touch_inherited_mapping")
        heard = listener.take()
    assert world.heard(heard) == [P(PAGE, MAPPED)]
    assert [event.pid for event in heard] == [accessor.pid if world.is_kernel else child]


async def test_threads_in_different_calls_on_one_file(world: World, accessor: Accessor) -> None:
    """Each event has the range of its own thread's call."""
    path = world.file(size=5 * MIB)
    async with world.listener(Mark(CONTENT_EVENTS, path), flags=TIDS) as listener:
        doers = await accessor.run(act, path, "two_calls_at_once")
        heard = listener.take()
    for thread, name in doers.items():
        assert world.heard([event for event in heard if event.pid == thread]) == list(ASKED[name][0])
    assert {event.pid for event in heard} == doers.keys()
    assert len(doers) == 3


# fallocate(2)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=row_names)
async def test_fallocate(world: World, accessor: Accessor, allocation: Allocation) -> None:
    path = world.file()
    before = os.stat(path).st_blocks
    arguments = (allocation.mode, allocation.offset, allocation.length)
    async with world.listener(world.everywhere()) as listener:
        size = await accessor.run(act, path, "fallocate", *arguments)
        heard = listener.take()
    assert (world.heard(heard), size) == ([O, P(*allocation.asked)], allocation.size)
    assert {event.pid for event in heard} == {accessor.pid}
    assert world.content() == allocation.content == await accessor.run("read_file", path)
    if allocation.blocks:
        assert (os.stat(path).st_blocks - before) * allocation.blocks > 0
    assert os.stat(path).st_blocks == os.stat(world.backing / "file").st_blocks


async def test_denied_fallocate(world: World, accessor: Accessor) -> None:
    """It fails with the listener's errno and changes nothing; allowed, the next one does its work."""
    path = world.file()
    denier = Denier(world, "PRE_ACCESS")
    kinds = [(errno.EIO, allocation) for allocation in ALLOCATIONS]
    async with world.listener(world.everywhere(), answer=denier) as listener:
        for answer, allocation in [*kinds, *((answer, ALLOCATIONS[-1]) for answer in ANSWERS)]:
            call = (path, "fallocate", allocation.mode, allocation.offset, allocation.length)
            denier.answer = answer
            failed = await outcome(lambda call=call: accessor.run(act, *call))  # type: ignore[misc]
            heard = world.heard(listener.take())
            assert (failed, heard) == (Failed(ANSWERS[answer]), [O, P(*allocation.asked)])
            denier.answer = 0
            assert (await accessor.run("stat", path)).st_size == SIZE
        assert await accessor.run("read_file", path) == CONTENT[:SIZE]
        assert await accessor.run(act, path, "fallocate", 0, 0, SIZE + 1) == SIZE + 1
    assert world.content() == CONTENT[:SIZE] + b"\0"


@pytest.mark.parametrize("row", REFUSED_ALLOCATIONS, ids=row_names)
async def test_refused_fallocate(world: World, accessor: Accessor, row: Row) -> None:
    await check(world, accessor, row)
    assert world.content() == CONTENT[:SIZE]


async def test_a_hole_under_a_mapping(world: World, accessor: Accessor) -> None:
    """What the page cache has of it goes."""
    path = world.file()
    async with world.listener(world.everywhere()) as listener:
        seen = await accessor.run(act, path, "punch_under_mapping", 100, 5000)
        heard = world.heard(listener.take())
    assert seen == (CONTENT[100:5100], bytes(5000), bytes(5000))
    assert heard == [O, P(0, MAPPED), P(0, 2 * PAGE), P(0, 2 * PAGE), A]


# copy_file_range(2)


def copied(world: World, copy: Copy) -> tuple[str, bytes]:
    """Make the files of a copy; the source's path, and what the target holds."""
    path = world.file(size=copy.size)
    target = CONTENT[: copy.size]
    if copy.target != "file":
        target = target[::-1]
        (world.backing / copy.target).write_bytes(target)
    return path, target


@pytest.mark.parametrize(
    "watched",
    [("file", "other"), ("file",), ("other",), ()],
    ids=["both", "the-source", "the-target", "neither"],
)
@pytest.mark.parametrize("copy", COPIES, ids=row_names)
async def test_copy_file_range(
    world: World, accessor: Accessor, copy: Copy, watched: tuple[str, ...]
) -> None:
    path, target = copied(world, copy)
    marks = [Mark(EVERYTHING, world.path / name) for name in watched if (world.path / name).exists()]
    call = (path, "copy", copy.target, copy.count, copy.source_offset, copy.target_offset)
    async with world.listener(*marks) as listener:
        count, size = await accessor.run(act, *call)
        heard = listener.take()
    content = copy.content(target)
    assert (count, size) == (copy.copied, len(content))
    assert world.heard(heard) == copy.events(watched, is_kernel=world.is_kernel)
    assert {event.pid for event in heard} <= {accessor.pid}
    assert world.content(copy.target) == content
    if copy.target != "file":
        assert world.content() == CONTENT[: copy.size]
    assert await accessor.run("read_file", str(world.path / copy.target)) == content


@pytest.mark.parametrize("row", REFUSED_COPIES, ids=row_names)
async def test_refused_copy_file_range(world: World, accessor: Accessor, row: Row) -> None:
    await check(world, accessor, row)
    assert world.content() == world.content("other") == CONTENT[:SIZE]


@pytest.mark.parametrize("side", ["source", "target"])
async def test_denied_copy_file_range(world: World, accessor: Accessor, side: str) -> None:
    """Either side's listener can deny it, with each errno; nothing is copied then."""
    copy = COPIES[0]
    path, target = copied(world, copy)
    watched = ("file",) if side == "source" else ("other",)
    denier = Denier(world, "PRE_ACCESS")
    call = (path, "copy", "other", copy.count, copy.source_offset, copy.target_offset)
    async with world.listener(Mark(PRE_ACCESS, world.path / watched[0]), answer=denier) as listener:
        for answer, number in ANSWERS.items():
            denier.answer = answer
            failed = await outcome(lambda: accessor.run(act, *call))
            heard = world.heard(listener.take())
            assert (failed, [event.name for event in heard]) == (Failed(number), ["PRE_ACCESS"])
            denier.answer = 0
            assert await accessor.run("read_file", str(world.path / "other")) == target
            listener.take()
        assert (await accessor.run(act, *call))[0] == copy.copied
    assert world.content("other") == copy.content(target)


@pytest.mark.parametrize("row", AGAIN, ids=row_names)
async def test_the_same_range_again(world: World, accessor: Accessor, row: Row) -> None:
    """sendfile(2) and splice(2) make an event each time."""
    await check(world, accessor, row)


# Seeking


LAYOUT = [
    ("data", 0),
    ("hole", 2 * PAGE),
    ("data", 4 * PAGE),
    ("hole", 5 * PAGE),
    ("data", 16 * PAGE),
    ("hole", 17 * PAGE),
]


def sparse(world: World) -> str:
    """A file of data and holes as in LAYOUT, and a hole at its end."""
    with (world.backing / "file").open("wb") as file:
        for place, count in ((0, 2 * PAGE), (4 * PAGE, PAGE), (16 * PAGE, PAGE)):
            file.seek(place)
            file.write(CONTENT[:count])
        file.truncate(20 * PAGE + 5)
    return str(world.path / "file")


async def test_holes_of_an_unwatched_file(world: World, accessor: Accessor) -> None:
    """They are the backing's own, also while others are watched."""
    path, other = sparse(world), world.file("other")
    async with world.listener(Mark(EVERYTHING, other)) as listener:
        assert await accessor.run(act, path, "layout") == LAYOUT
        assert listener.take() == []
    assert await accessor.run(act, path, "layout") == LAYOUT


async def test_holes_of_a_watched_file(world: World, accessor: Accessor) -> None:
    """Seeking makes no event. There are none here ("holes are data"), so that no program takes a stub for empty."""
    path = sparse(world)
    early = await accessor.run("open", path, os.O_RDONLY)
    assert await accessor.run(act, early, "layout_open") == LAYOUT
    async with world.listener(world.everywhere(PRE_ACCESS)) as listener:
        found = await accessor.run(act, path, "layout")
        assert found == (LAYOUT if world.is_kernel else [("data", 0), ("hole", 20 * PAGE + 5)])
        # Also by a descriptor that is older than the mark.
        assert await accessor.run(act, early, "layout_open") == found
        assert listener.take() == []


async def test_holes_are_shown_to_the_process_that_reads_the_events(world: World, accessor: Accessor) -> None:
    """A later process with the number of that process finds data everywhere."""
    path = sparse(world)
    if world.is_kernel:
        assert await accessor.run(act, path, "layout") == LAYOUT
        return
    data = [("data", 0), ("hole", 20 * PAGE + 5)]
    mount = await trio.to_thread.run_sync(mount_of, path)
    connection = await ControlConnection.open(mount)
    started = proc.started(accessor.pid)
    assert started is not None
    try:
        with pytest.raises(OSError) as refused:  # there is no group yet
            await connection.request(Reader(accessor.pid, started))
        assert refused.value.errno == errno.EBADF
        _, events = await connection.request(Hello(VERSION, DEFAULT_FLAGS, os.O_RDWR, None))
        assert events is not None
        try:
            inode = (await trio.to_thread.run_sync(os.stat, path)).st_ino
            mark = MarkRequest(FAN_MARK_ADD, PRE_ACCESS, *mount.device, inode)
            await connection.request(mark)
            assert await accessor.run(act, path, "layout") == data
            await connection.request(Reader(accessor.pid, started + 1))
            assert await accessor.run(act, path, "layout") == data
            await connection.request(Reader(accessor.pid, started))
            assert await accessor.run(act, path, "layout") == LAYOUT
        finally:
            os.close(events)
    finally:
        connection.close()


@pytest.mark.parametrize("is_watched", [False, True], ids=["unwatched", "watched"])
async def test_seeking_where_nothing_is(world: World, accessor: Accessor, is_watched: bool) -> None:
    path = world.file()
    async with world.listener(*[world.everywhere(PRE_ACCESS)] * is_watched) as listener:
        found = await accessor.run(act, path, "seek_wrongly")
        assert found == [*[errno.ENXIO] * 6, SIZE - 100, SIZE - 90]
        assert listener.take() == []


# Shared mappings


@pytest.mark.parametrize("row", SHARED, ids=row_names)
async def test_shared_mapping(world: World, accessor: Accessor, row: Row) -> None:
    """Its event, and what is written through it reaches the file."""
    needs_shared_mappings(world)
    await check(world, accessor, row)
    content = bytearray(CONTENT[:SIZE])
    for place, data in SHARED_WRITES.get(row.name, {}).items():
        content[place : place + len(data)] = data
    assert world.content() == content


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda number: errno.errorcode.get(number, "plain"))
async def test_denied_shared_mapping(world: World, accessor: Accessor, answer: int) -> None:
    """mmap(2) fails on the real kernel, the touch here ("mappings ask when touched"). Nothing is written."""
    needs_shared_mappings(world)
    path = world.file()
    denier = Denier(world, "PRE_ACCESS")
    denier.answer = answer
    async with world.listener(world.everywhere(), answer=denier) as listener:
        call = accessor.start(act, path, "share_writing", 100, b"new")
        if world.is_kernel:
            assert await outcome(call.wait) == Failed(ANSWERS[answer])
        else:
            with pytest.raises(AccessorDied) as died:
                await call.wait()
            assert died.value.signal == signal.SIGBUS
        assert world.heard(listener.take()) == [O, P(PAGE, MAPPED)]
    assert world.content() == CONTENT[:SIZE]


# Unnamed files


async def test_unnamed_files(world: World, accessor: Accessor) -> None:
    """O_TMPFILE makes its events, holds what is written, and can be given a name."""
    async with world.listener(world.everywhere()) as listener:
        written = await accessor.run(act, str(world.path), "unnamed", CONTENT[:5000])
        heard = [event.brief for event in listener.take()]
        links = await accessor.run(act, str(world.path), "unnamed_then_named", "named", CONTENT[:5000])
        listener.take()
    assert written == (CONTENT[:5000], 0)
    assert heard == [
        ("OPEN_PERM", None, None),
        ("PRE_ACCESS", 0, 2 * PAGE),
        ("PRE_ACCESS", 0, 2 * PAGE),
        ("ACCESS_PERM", None, None),
    ]
    assert links == 1
    assert world.content("named") == CONTENT[:5000]
    assert await accessor.run("listdir", str(world.path)) == ["named"]


def change_flags(path: str, directory: str) -> list[int]:
    """As chattr(1) and lsattr(1) do, through one descriptor each."""
    get, put = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
    found = []
    for place in (path, directory):
        descriptor = os.open(place, os.O_RDONLY)
        present = fcntl.ioctl(descriptor, get, bytes(8))
        fcntl.ioctl(descriptor, put, bytes([present[0] | 0x40]) + present[1:])
        found.append(fcntl.ioctl(descriptor, get, bytes(8))[0] & 0x40)
        os.close(descriptor)
    return found


async def test_flags_make_no_events(world: World, accessor: Accessor) -> None:
    """The kernel opens the inode for itself then, which is no open(2) that anybody hears of."""
    path = world.file()
    (world.backing / "directory").mkdir()
    directory = str(world.path / "directory")
    mask = CONTENT_EVENTS | OPEN_PERM
    async with world.listener(Mark(mask, path), Mark(OPEN_PERM | FAN_ONDIR, directory)) as listener:
        assert await accessor.run(change_flags, path, directory) == [0x40, 0x40]
        heard = [(event.names, event.path) for event in listener.take()]
    opened = ("OPEN_PERM",)
    assert heard == [(opened, path), (opened, directory)]
