"""The series' event streams on real mounts of both its dialects, each expectation derived from a hunk: see patch_rows.py."""

import errno
import mmap
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor, AccessorDied
from fusehsm.conform.workloads.mapping import map_and_touch
from fusehsm.conform.workloads.opening import open_with
from fusehsm.conform.workloads.reading import pread
from fusehsm.conform.workloads.writing import pwrite_only
from fusehsm.events import Event
from fusehsm.fanotify.abi import DIALECTS, FAN_MARK_FILESYSTEM
from tests.conftest import MakeAccessor, MakeMount
from tests.support import engines
from tests.support.kernel_and_mount import (
    CONTENT,
    PAGE,
    PRE_GROUP,
    SIZE,
    A,
    Expected,
    Failed,
    Mark,
    O,
    P,
    World,
    X,
    outcome,
)
from tests.support.patch_rows import (
    AFTER_TRUNCATION,
    AREA_PERM,
    DO_OPEN,
    FAULT,
    FILE_PERM,
    FILE_RANGE,
    FILEMAP_FAULT,
    READING,
    ROWS,
    WRITING,
    M,
    PatchRow,
    allocate,
    list_directory,
    map_and_change,
    open_directory,
    open_unnamed,
    page,
    run_script,
)
from tests.support.row_tests import error_of, row_names

pytestmark = [pytest.mark.fuse]

O_BIT, A_BIT, X_BIT, P_BIT, M_BIT = 0x10000, 0x20000, 0x40000, 0x80000, 0x100000
ONDIR, ON_CHILD = 0x40000000, 0x08000000
ALL = O_BIT | A_BIT | X_BIT | P_BIT | M_BIT
WATCHES = "10, fs/notify/fsnotify.c, fsnotify_file_has_pre_content_watches"
SEVEN = ("EPERM", "EIO", "EAGAIN", "EBUSY", "ETXTBSY", "ENOSPC", "EDQUOT")


@pytest.fixture(scope="module", params=engines.parameters(words=("patch-v2", "patch-v1")))
def whole_world(request: pytest.FixtureRequest) -> World:
    """`fusehsm mount --events exact` with each engine, in each of the series' dialects."""
    dialect, engine = request.param
    make_mount: MakeMount = request.getfixturevalue("make_engine_mount")
    mount = make_mount("--engine", engine, "--events", "exact", "--abi", dialect)
    return World(dialect, mount.source, mount.path, mount.pid, engine=engine)


def everywhere(path: str | Path, mask: int = ALL) -> Mark:
    """A mark on the whole filesystem. FAN_PRE_MODIFY wants to be told a regular file."""
    return Mark(mask, path, FAN_MARK_FILESYSTEM)


async def heard_of(
    world: World, accessor: Accessor, row: PatchRow, mask: int = ALL
) -> tuple[list[Expected], object]:
    """The events that a row's call makes in a new file of that world, and what it returns."""
    path = world.file(size=row.size)
    world.file("other", size=row.size)
    async with world.listener(everywhere(path, mask)) as listener:
        returned = await outcome(lambda: accessor.run(row.act, path, *row.arguments))
        return world.heard(listener.take()), returned


@pytest.mark.parametrize("row", ROWS, ids=row_names)
async def test_events(world: World, accessor: Accessor, row: PatchRow) -> None:
    result, events = row.expected(world)
    assert await heard_of(world, accessor, row) == (events, result), row.hunk


# Opening


@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC | os.O_CREAT])
async def test_the_open_event_finds_the_file_truncated(world: World, accessor: Accessor, flags: int) -> None:
    path = world.file()
    sizes: list[tuple[int, int]] = []

    def look(event: Event) -> int:
        sizes.append((event.mask, os.fstat(event.fd).st_size))
        return 0

    async with world.listener(everywhere(path), answer=look):
        await accessor.run(open_with, path, flags)
    assert sizes == [(O_BIT, SIZE), (M_BIT, 0)], AFTER_TRUNCATION


async def test_unnamed_files(world: World, accessor: Accessor) -> None:
    """O_TMPFILE is opened elsewhere than where the hook is; writing to it asks."""
    path = world.file()
    heard: list[tuple[int, int | None]] = []

    def note(event: Event) -> int:
        heard.append((event.mask, event.count))
        return 0

    async with world.listener(everywhere(path), answer=note):
        written = await outcome(lambda: accessor.run(open_unnamed, path))
    if world.diverges("O_TMPFILE"):
        assert (written, heard) == (Failed(errno.EOPNOTSUPP), [])
    else:
        assert (written, heard) == (3, [(O_BIT, None), (M_BIT, 3)]), DO_OPEN


# Directories


async def test_directories(world: World, accessor: Accessor) -> None:
    inner = world.inside("directory")
    path = inner.file()
    for name in ("a", "b", "c"):
        inner.file(name, 1)
    for size in (32768, 64):
        async with world.listener(everywhere(path, ALL | ONDIR)) as listener:
            positions = await accessor.run(list_directory, path, size)
            heard = world.heard(listener.take())
        assert len(set(positions)) == len(positions) > 1
        reads = [event for position in positions for event in (A, P(position, 0))]
        assert heard == [event.of("directory") for event in (*READING, *reads)], FILE_PERM


async def test_directories_want_ondir(world: World, accessor: Accessor) -> None:
    inner = world.inside("directory")
    path = inner.file()
    async with world.listener(everywhere(path)) as listener:
        await accessor.run(open_directory, path)
        await accessor.run(list_directory, path, 32768)
        assert listener.take() == [], "02, include/linux/fsnotify_backend.h, FSNOTIFY_PRE_CONTENT_EVENTS"


async def test_a_directorys_mark(world: World, accessor: Accessor) -> None:
    """Inode marks: of the directory itself, and of its children."""
    inner = world.inside("directory")
    path = inner.file()
    async with (
        world.listener(Mark(P_BIT | A_BIT | ONDIR, inner.path)) as own,
        world.listener(Mark(P_BIT | A_BIT | ON_CHILD, inner.path)) as childrens,
    ):
        await accessor.run(pread, path, 300, 5001)
        await accessor.run(open_directory, path)
        assert world.heard(own.take()) == [P(0, 0, "directory")], AREA_PERM
        child = "directory/file"
        assert world.heard(childrens.take()) == [P(0, 0, child), A.of(child), P(5001, 300, child)], FILE_RANGE


# Arming


async def test_files_opened_before_the_mark(world: World, accessor: Accessor) -> None:
    """Another listener's mark elsewhere is all that there is at open(2)."""
    path, elsewhere = world.file(), world.file("elsewhere")
    async with world.listener(Mark(P_BIT, elsewhere)):
        descriptor = await accessor.run("open", path, os.O_RDWR)
        async with world.listener(everywhere(path)) as listener:
            assert await accessor.run("pwrite", descriptor, b"new", 10) == 3
            assert world.heard(listener.take()) == [M(10, 3)], FILE_RANGE
            assert await accessor.run("pread", descriptor, 300, 5001) == CONTENT[5001:5301]
            # As posted: ACCESS_PERM, and exactly those bytes; see "files opened before the mark (patch-v1, patch-v2)".
            assert world.heard(listener.take()) == [P(PAGE, PAGE)], FILE_RANGE


async def test_a_new_mark_is_heard_of_open_files(world: World, accessor: Accessor) -> None:
    """What is watched for at open(2) settles nothing: ACCESS_PERM and PRE_MODIFY are first marked afterwards."""
    path = world.file()
    async with world.listener(Mark(P_BIT, path)) as first:
        descriptor = await accessor.run("open", path, os.O_RDWR)
        assert first.take() == [], AREA_PERM + ": PRE_MODIFY alone"
        async with world.listener(everywhere(path)) as second:
            assert await accessor.run("pread", descriptor, 300, 5001) == CONTENT[5001:5301]
            assert await accessor.run("pwrite", descriptor, b"new", 10) == 3
            assert world.heard(first.take()) == [P(5001, 300)], FILE_RANGE
            assert world.heard(second.take()) == [A, P(5001, 300), M(10, 3)], FILE_RANGE


# Programs


async def test_a_script(world: World, accessor: Accessor) -> None:
    """What the kernel reads of it; what the shell reads then is the shell's business."""
    path = world.file()
    (world.backing / "file").write_text("#!/bin/sh\necho done\n")
    (world.backing / "file").chmod(0o755)
    async with world.listener(everywhere(path)) as listener:
        assert await accessor.run(run_script, path) == b"done\n"
        heard = world.heard(listener.take())
    assert heard[:6] == [X, *READING, A, P(0, 256), O], DO_OPEN + ", and " + AREA_PERM + ": kernel_read()"


# Denials


class Refuser:
    """Denies the `number`th event of one bit."""

    def __init__(self, bit: int, number: int, error: int) -> None:
        self._bit, self._number, self._error = bit, number, error

    def __call__(self, event: Event) -> int:
        self._number -= bool(event.mask & self._bit)
        return self._error if event.mask & self._bit and self._number == 0 else 0


DENIALS: list[tuple[str, Callable[..., object], tuple[object, ...], int, int, list[Expected], int, str]] = [
    # name, act, arguments, bit, which one of it, events, the file's size then, hunk
    ("open", open_with, (os.O_RDONLY,), P_BIT, 1, [*READING], SIZE, DO_OPEN),
    ("open to write", open_with, (os.O_RDWR,), M_BIT, 1, [*WRITING], SIZE, DO_OPEN),
    ("truncated before", open_with, (os.O_WRONLY | os.O_TRUNC,), M_BIT, 1, [*WRITING], 0, AFTER_TRUNCATION),
    ("not truncated", open_with, (os.O_WRONLY | os.O_TRUNC,), O_BIT, 1, [O], SIZE, DO_OPEN + ": if (!error)"),
    ("read", pread, (300, 5001), P_BIT, 2, [*READING, A, P(5001, 300)], SIZE, AREA_PERM),
    ("read, by ACCESS_PERM", pread, (300, 5001), A_BIT, 1, [*READING, A], SIZE, AREA_PERM + ": return ret"),
    ("write", pwrite_only, (300, 30000), M_BIT, 2, [*WRITING, M(30000, 300)], SIZE, AREA_PERM),
    ("fallocate", allocate, (0, 30000, 300), M_BIT, 2, [*WRITING, M(30000, 300)], SIZE, AREA_PERM),
]


@pytest.mark.parametrize("denial", DENIALS, ids=lambda denial: str(denial[0]).replace(" ", "-"))
async def test_denials(world: World, accessor: Accessor, denial: tuple[object, ...]) -> None:
    name, act, arguments, bit, number, events, size, hunk = denial
    assert callable(act)
    assert isinstance(arguments, tuple)
    assert isinstance(bit, int)
    assert isinstance(number, int)
    if name == "fallocate" and world.diverges("fallocate"):
        return
    path = world.file()
    async with world.listener(everywhere(path), answer=Refuser(bit, number, errno.EDQUOT)) as listener:
        returned = await outcome(lambda: accessor.run(act, path, *arguments))
        assert (world.heard(listener.take()), returned) == (events, Failed(errno.EDQUOT)), hunk
    assert os.path.getsize(world.backing / "file") == size, hunk


async def test_a_denied_creation_stays(world: World, accessor: Accessor) -> None:
    path = world.file()
    async with world.listener(everywhere(path), answer=Refuser(M_BIT, 1, errno.ENOSPC)) as listener:
        returned = await outcome(lambda: accessor.run(open_with, path, os.O_RDWR | os.O_CREAT, "new"))
        heard = world.heard(listener.take())
    assert (heard, returned) == ([event.of("new") for event in WRITING], Failed(errno.ENOSPC)), DO_OPEN
    assert (world.backing / "new").exists()


@pytest.mark.parametrize("name", SEVEN)
async def test_the_seven_errnos(world: World, accessor: Accessor, name: str) -> None:
    path, error = world.file(), getattr(errno, name)
    async with world.listener(everywhere(path), answer=Refuser(P_BIT, 1, error)):
        returned = await outcome(lambda: accessor.run(open_with, path, os.O_RDONLY))
        assert returned == Failed(error), "09, fs/notify/fanotify/fanotify.c, fanotify_get_response"


# Page faults


@pytest.mark.parametrize(
    ("bit", "number", "events"), [(P_BIT, 2, [*READING, *page(1)]), (A_BIT, 1, [*READING, A])]
)
async def test_a_denied_fault_is_sigbus(
    world: World, make_accessor: MakeAccessor, bit: int, number: int, events: list[Expected]
) -> None:
    path = world.file()
    async with world.listener(everywhere(path), answer=Refuser(bit, number, errno.EIO)) as listener:
        with pytest.raises(AccessorDied) as died:
            await make_accessor().run(map_and_touch, path, 2 * PAGE, PAGE, [0, PAGE])
        assert died.value.signal == signal.SIGBUS, FAULT
        assert world.heard(listener.take()) == events, AREA_PERM


def touch_what_is_cut_off(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 16384, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.truncate(path, 5000)
    return mapping[8192:8193]


async def test_past_the_end_nobody_is_asked(world: World, make_accessor: MakeAccessor) -> None:
    path = world.file()
    async with world.listener(everywhere(path)) as listener:
        with pytest.raises(AccessorDied) as died:
            await make_accessor().run(touch_what_is_cut_off, path)
        assert died.value.signal == signal.SIGBUS
        assert world.heard(listener.take()) == [*READING], FILEMAP_FAULT + ": after the check against max_idx"


async def test_a_denied_write_fault_is_sigbus(world: World, make_accessor: MakeAccessor) -> None:
    if world.diverges("shared mappings (exact)"):
        return
    path = world.file()
    async with world.listener(everywhere(path), answer=Refuser(M_BIT, 2, errno.EIO)) as listener:
        with pytest.raises(AccessorDied) as died:
            await make_accessor().run(map_and_change, path, [5])
        assert died.value.signal == signal.SIGBUS, FAULT
        assert world.heard(listener.take()) == [*WRITING, M(PAGE, PAGE)], FAULT
    assert world.content() == CONTENT[:SIZE]


async def test_faults_ask_only_where_pre_content_is_watched(world: World, accessor: Accessor) -> None:
    """ACCESS_PERM alone is heard of calls, not of faults."""
    path = world.file()
    async with world.listener(everywhere(path, A_BIT)) as listener:
        await accessor.run(map_and_touch, path, 2 * PAGE, PAGE, [0, PAGE])
        assert listener.take() == [], WATCHES
        await accessor.run(pread, path, 300, 5001)
        assert world.heard(listener.take()) == [A], AREA_PERM
        async with world.listener(Mark(M_BIT, path)) as other:
            await accessor.run(map_and_touch, path, 2 * PAGE, PAGE, [0])
            assert world.heard(listener.take()) == [A], WATCHES + ": any pre-content event, of any group"
            assert other.take() == [], AREA_PERM


# fanotify_mark(2) and the records, as a listener has them


SUPPORTED = "04+05, fs/notify/fanotify/fanotify_user.c, fanotify_events_supported"
DO_MARK = "04, fs/notify/fanotify/fanotify_user.c, do_fanotify_mark"
MARKS = [
    # flags beside FAN_MARK_ADD, class, mask, name, errno, hunk
    (0, 0x8, P_BIT | M_BIT, "file", 0, SUPPORTED),
    (0, 0x8, M_BIT, "", errno.EISDIR, SUPPORTED),
    (0x100, 0x8, M_BIT, "", errno.EISDIR, SUPPORTED),
    (0, 0x8, P_BIT | ONDIR, "", 0, SUPPORTED),
    (0, 0x8, P_BIT, "fifo", errno.EINVAL, SUPPORTED),
    (0x440, 0x8, P_BIT | ONDIR, "fifo", errno.ENOTDIR, SUPPORTED + ": order"),
    (0, 0x4, P_BIT, "file", errno.EINVAL, DO_MARK),
    (0, 0x4, M_BIT, "file", errno.EINVAL, DO_MARK),
    (0, 0x0, P_BIT, "file", errno.EINVAL, DO_MARK),
    (0, 0x0, A_BIT, "file", errno.EINVAL, DO_MARK),
]


@pytest.mark.parametrize(
    ("flags", "group_class", "mask", "target", "expected", "hunk"),
    MARKS,
    ids=[f"{row[0]:#x}-{row[1]:#x}-{row[2]:#x}-{row[3]}" for row in MARKS],
)
async def test_marks(
    world: World, flags: int, group_class: int, mask: int, target: str, expected: int, hunk: str
) -> None:
    world.file()
    os.mkfifo(world.backing / "fifo")
    group = await world.open_group(group_class)
    try:
        marked = await outcome(lambda: group.mark(0x1 | flags, mask, path=str(world.path / target)))
        assert marked == (Failed(expected) if expected else None), hunk
    finally:
        group.close()


async def test_what_a_listener_reads_and_writes(world: World, accessor: Accessor) -> None:
    """Bytes, put together and taken apart here."""
    path = world.file()
    group = await world.open_group(PRE_GROUP)
    # 08, include/uapi/linux/fanotify.h, fanotify_event_info_range; v1 08
    record = {"patch-v2": struct.Struct("=BBHIQQ"), "patch-v1": struct.Struct("=BBHIQ")}[world.name]
    try:
        await group.mark(0x1, P_BIT, path=path)
        call = accessor.start(pread, path, 300, 5001)
        for expected in ((0, 0), (5001, 300)):
            await group.wait_readable()
            data = group.read(4096)
            length, version, _, metadata, mask, fd, pid = struct.unpack_from("=IBBHQii", data)
            assert (length, version, metadata, mask, pid) == (24 + record.size, 3, 24, P_BIT, accessor.pid)
            fields = record.unpack_from(data, 24)
            assert fields[:3] == (6, 0, record.size)
            assert (fields[4:] if world.name == "patch-v2" else fields[:2:-1]) == expected
            for response in (5 << 24 | 1, 2 << 24 | 2, 133 << 24 | 2, 3):
                assert error_of(group.write, struct.pack("=iI", fd, response)) == errno.EINVAL
            final = 1 if expected == (0, 0) else 28 << 24 | 2
            assert group.write(struct.pack("=iI", fd, final)) == 8
            os.close(fd)
        with pytest.raises(OSError) as caught:
            await call.wait()
        assert caught.value.errno == errno.ENOSPC, (
            "09, fs/notify/fanotify/fanotify_user.c, process_access_response"
        )
    finally:
        group.close()


async def test_content_groups_hear_access_perm_in_between(world: World, accessor: Accessor) -> None:
    """ACCESS_PERM goes to every group before PRE_ACCESS goes to anybody."""
    path = world.file()
    order: list[tuple[str, int]] = []

    def noting(name: str) -> Callable[[Event], int]:
        def note(event: Event) -> int:
            order.append((name, event.mask))
            return 0

        return note

    async with (
        world.listener(everywhere(path, A_BIT), flags=0x4, answer=noting("content")),
        world.listener(everywhere(path, A_BIT | P_BIT), answer=noting("pre-content")),
    ):
        await accessor.run(pread, path, 300, 5001)
    expected = [("pre-content", P_BIT), ("pre-content", A_BIT), ("content", A_BIT), ("pre-content", P_BIT)]
    assert order == expected, AREA_PERM


def test_the_dialects_are_the_series_own() -> None:
    assert [DIALECTS[name].pre_content for name in ("patch-v2", "patch-v1")] == [P_BIT | M_BIT] * 2
