"""One expectation, two worlds: notifications: what is merged, how they stand beside permission events, and which marks hear them."""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from fusehsm.fanotify.abi import (
    FAN_ACCESS,
    FAN_ALLOW,
    FAN_CLOSE,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_EVICTABLE,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_MOUNT,
    FAN_MODIFY,
    FAN_ONDIR,
    FAN_OPEN,
    FAN_REPORT_TID,
    NOTIFICATION_EVENTS,
    encode_response,
    mask_names,
)
from fusehsm.linux.system_call import CallReader, reading
from tests.conftest import MakeAccessor
from tests.support.async_listener import HOLD
from tests.support.harness import PATIENCE
from tests.support.kernel_and_mount import (
    ACCESS_PERM,
    CONTENT,
    EVERYTHING,
    OPEN_PERM,
    PRE_ACCESS,
    PRE_GROUP,
    Failed,
    Mark,
    World,
    outcome,
)
from tests.support.notification_groups import (
    ALL,
    NOTIF_GROUP,
    SURVIVING,
    TakeNotes,
    Told,
    close,
    named,
    on,
    read_whole,
    write_some,
)
from tests.support.row_tests import row_names

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


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


@dataclass(frozen=True, slots=True)
class Scope:
    """Marks, and what is told of reading and writing each of: file, sub/deep; and of listing sub."""

    name: str
    marks: Sequence[Callable[[World], Mark]]
    file: str = ""
    deep: str = ""
    directory: str = ""


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
