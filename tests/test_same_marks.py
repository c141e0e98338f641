"""One expectation, two worlds: which marks hear what, and what a file that was opened earlier makes of later marks."""

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from fusehsm.abi import (
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MARK_REMOVE,
    FAN_ONDIR,
    FAN_OPEN,
)
from fusehsm.conform.accessor import Accessor
from tests.conftest import MakeAccessor
from tests.listening import HOLD
from tests.table import row_names
from tests.worlds import (
    ACCESS_PERM,
    CONTENT,
    EVERYTHING,
    EXEC_PERM,
    OPEN_PERM,
    PAGE,
    PRE_ACCESS,
    PRE_GROUP,
    A,
    Expected,
    Mark,
    O,
    P,
    World,
    WorldListener,
)

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]

SURVIVING = FAN_MARK_IGNORED_SURV_MODIFY
CONTENT_GROUP = FAN_CLASS_CONTENT | FAN_CLOEXEC
NOTIF_GROUP = FAN_CLASS_NOTIF | FAN_CLOEXEC

MakeMark = Callable[[World], Mark]


def on(name: str, mask: int, flags: int = 0) -> MakeMark:
    """A mark on something in the test's directory; "" is the directory."""
    return lambda world: Mark(mask, world.path / name if name else world.path, flags)


# Armed at open


@dataclass(frozen=True, slots=True)
class Arming:
    """What was watched when the file was opened, and which events it makes for a group that watches everything later."""

    name: str
    marks: Sequence[MakeMark]
    armed: str  # "", "P", or "PA"
    group: int = PRE_GROUP


ARMING_ROWS = [
    Arming("nothing", [], ""),
    Arming("OPEN", [on("", FAN_OPEN, FAN_MARK_FILESYSTEM)], "", NOTIF_GROUP),
    Arming("OPEN_PERM", [on("", OPEN_PERM, FAN_MARK_FILESYSTEM)], ""),
    Arming("OPEN_EXEC_PERM", [on("", EXEC_PERM, FAN_MARK_FILESYSTEM)], ""),
    Arming("OPEN_PERM of class CONTENT", [on("", OPEN_PERM, FAN_MARK_FILESYSTEM)], "", CONTENT_GROUP),
    Arming("PRE_ACCESS of another file", [on("other", PRE_ACCESS)], ""),
    Arming("ACCESS_PERM of another file", [on("other", ACCESS_PERM)], ""),
    Arming("PRE_ACCESS of the directory itself", [on("", PRE_ACCESS)], ""),
    Arming("PRE_ACCESS", [on("file", PRE_ACCESS)], "P"),
    Arming("PRE_ACCESS on children", [on("", PRE_ACCESS | FAN_EVENT_ON_CHILD)], "P"),
    Arming("PRE_ACCESS on the mount", [on("", PRE_ACCESS, FAN_MARK_MOUNT)], "P"),
    Arming("PRE_ACCESS on the filesystem", [on("", PRE_ACCESS, FAN_MARK_FILESYSTEM)], "P"),
    Arming("PRE_ACCESS and OPEN_PERM", [on("file", PRE_ACCESS), on("file", OPEN_PERM)], "P"),
    Arming("ACCESS_PERM", [on("file", ACCESS_PERM)], "PA"),
    Arming("ACCESS_PERM of class CONTENT", [on("file", ACCESS_PERM)], "PA", CONTENT_GROUP),
    Arming("ACCESS_PERM on children", [on("", ACCESS_PERM | FAN_EVENT_ON_CHILD)], "PA"),
    Arming("both", [on("file", ACCESS_PERM | PRE_ACCESS)], "PA"),
    Arming("both, of two marks", [on("file", ACCESS_PERM), on("", PRE_ACCESS, FAN_MARK_FILESYSTEM)], "PA"),
]


def touch_mapping(descriptor: int, offset: int) -> bytes:
    return mmap.mmap(descriptor, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=offset)[:1]


async def use(world: World, accessor: Accessor, descriptor: int, listener: WorldListener, armed: str) -> None:
    """Read, write, map and truncate an open file, for a listener for everything that came after it was opened."""

    async def heard_of(operation: object, *arguments: object) -> list[Expected]:
        await accessor.run(operation, descriptor, *arguments)  # type: ignore[arg-type]
        return world.heard(listener.take())

    if armed or world.is_kernel:
        pre = [P(PAGE, PAGE)] if armed else []
        assert await heard_of("pread", 100, 5000) == pre + [A] * (armed == "PA")
        assert await heard_of("pwrite", b"new", 5000) == pre
        assert await heard_of(touch_mapping, 3 * PAGE) == ([P(3 * PAGE, PAGE)] if armed else [])
    else:
        # Known divergence "files opened before the mark": only what enters the page cache is asked for.
        for operation, *arguments in (["pread", 100, 5000], ["pwrite", b"new", 5000], [touch_mapping, 12288]):
            assert {event.name for event in await heard_of(operation, *arguments)} <= {"PRE_ACCESS"}
    assert await heard_of("ftruncate", 5000) == [P(PAGE, PAGE)]


@pytest.mark.parametrize("closed", [False, True], ids=["group stays", "group closes"])
@pytest.mark.parametrize("row", ARMING_ROWS, ids=row_names)
async def test_armed_at_open(world: World, accessor: Accessor, row: Arming, closed: bool) -> None:
    path = world.file()
    world.file("other")
    async with AsyncExitStack() as stack:
        first = stack if not closed else await stack.enter_async_context(AsyncExitStack())
        marks = [make(world) for make in row.marks]
        await first.enter_async_context(world.listener(*marks, flags=row.group))
        descriptor = await accessor.run("open", path, os.O_RDWR)
        if closed:
            await first.aclose()
        listener = await stack.enter_async_context(world.listener(world.everywhere()))
        await use(world, accessor, descriptor, listener, row.armed)
        await accessor.run("pread_path", path, 100, 0)
        assert world.heard(listener.take()) == [O, P(0, PAGE), A]


@pytest.mark.parametrize("change", ["ignored", "removed", "flushed"])
async def test_armed_though_the_mark_does_not_count(world: World, accessor: Accessor, change: str) -> None:
    path = world.file()
    watch = world.everywhere(PRE_ACCESS)
    async with world.listener(watch) as first:
        if change == "ignored":
            await first.group.mark(FAN_MARK_ADD | FAN_MARK_IGNORE | SURVIVING, PRE_ACCESS, path=path)
        descriptor = await accessor.run("open", path, os.O_RDWR)
        if change == "removed":
            await first.group.mark(FAN_MARK_REMOVE | watch.flags, PRE_ACCESS, path=str(world.path))
        if change == "flushed":
            await first.group.mark(FAN_MARK_FLUSH | watch.flags, 0, path=str(world.path))
        async with world.listener(world.everywhere()) as listener:
            await use(world, accessor, descriptor, listener, "P")


async def test_marks_that_go_and_come_again(world: World, accessor: Accessor) -> None:
    path = world.file()
    watch = world.everywhere()
    async with world.listener(watch) as listener:
        group = listener.group
        descriptor = await accessor.run("open", path, os.O_RDWR)
        assert world.heard(listener.take()) == [O]
        for flags, mask in ((FAN_MARK_REMOVE, EVERYTHING), (FAN_MARK_FLUSH, 0)):
            await group.mark(flags | FAN_MARK_FILESYSTEM, mask, path=str(world.path))
            assert await accessor.run("pread", descriptor, 100, 5000) == CONTENT[5000:5100]
            assert await accessor.run("pwrite", descriptor, CONTENT[:10], 0) == 10
            await accessor.run("truncate", path, 20000)
            await accessor.run("pread_path", path, 100, 0)
            assert listener.take() == []
            await group.mark(FAN_MARK_ADD | FAN_MARK_FILESYSTEM, EVERYTHING, path=str(world.path))
            await accessor.run("pread", descriptor, 100, 5000)
            assert world.heard(listener.take()) == [P(PAGE, PAGE), A]


async def test_flush_takes_one_type_only(world: World, accessor: Accessor) -> None:
    path = world.file()
    async with world.listener(
        Mark(PRE_ACCESS, path),
        Mark(ACCESS_PERM, path, FAN_MARK_FILESYSTEM),
        Mark(OPEN_PERM, path, FAN_MARK_MOUNT),
    ) as listener:
        left = [O, P(0, PAGE), A]
        for flags, gone in ((0, P(0, PAGE)), (FAN_MARK_MOUNT, O), (FAN_MARK_FILESYSTEM, A)):
            await accessor.run("pread_path", path, 100, 0)
            assert world.heard(listener.take()) == left
            await listener.group.mark(FAN_MARK_FLUSH | flags, 0, path=path)
            left.remove(gone)
        await accessor.run("pread_path", path, 100, 0)
        assert not left
        assert listener.take() == []


async def test_a_mark_that_comes_while_the_open_waits(world: World, accessor: Accessor) -> None:
    """A file is armed before its OPEN_PERM is asked: a mark that the listener sets then is too late."""
    path = world.file()
    async with world.listener(world.everywhere(OPEN_PERM), answer=lambda event: HOLD) as listener:
        call = accessor.start("open", path, os.O_RDWR)
        await listener.wait_for(1)
        await listener.group.mark(FAN_MARK_ADD, EVERYTHING & ~OPEN_PERM, path=path)
        listener.release()
        descriptor = await call.wait()
        listener.take()
        await listener.group.mark(FAN_MARK_FLUSH, 0, path=path)
        async with world.listener(world.everywhere()) as later:
            await use(world, accessor, descriptor, later, "")


@pytest.mark.parametrize("change", ["remove", "flush", "ignore"])
async def test_a_mark_that_goes_while_somebody_waits(world: World, accessor: Accessor, change: str) -> None:
    path = world.file()
    async with world.listener(Mark(PRE_ACCESS, path), answer=lambda event: HOLD) as listener:
        call = accessor.start("pread_path", path, 100, 0)
        await listener.wait_for(1)
        flags, mask = {
            "remove": (FAN_MARK_REMOVE, PRE_ACCESS),
            "flush": (FAN_MARK_FLUSH, 0),
            "ignore": (FAN_MARK_ADD | FAN_MARK_IGNORE | SURVIVING, PRE_ACCESS),
        }[change]
        await listener.group.mark(flags, mask, path=path)
        assert not call.done
        (event,) = listener.take_held()
        listener.group.answer(event, 28)
        os.close(event.fd)
        with pytest.raises(OSError) as caught:
            await call.wait()
        assert caught.value.errno == 28
        # What comes then is not asked any more.
        assert await accessor.run("pread_path", path, 100, 0) == CONTENT[:100]
        assert len(listener.take()) == 1


# Scope


@dataclass(frozen=True, slots=True)
class Scope:
    """Marks of one group, and what is heard of opening and reading each of: file, deep (in the directory sub), other."""

    name: str
    marks: Sequence[MakeMark]
    file: str = ""
    deep: str = ""
    other: str = ""


SCOPE_ROWS = [
    Scope("a file", [on("file", EVERYTHING)], "OPA"),
    Scope("a file, with FAN_EVENT_ON_CHILD", [on("file", EVERYTHING | FAN_EVENT_ON_CHILD)], "OPA"),
    Scope("a directory", [on("", EVERYTHING)]),
    Scope("its children", [on("", EVERYTHING | FAN_EVENT_ON_CHILD)], "OPA", other="OPA"),
    Scope("another directory's children", [on("sub", EVERYTHING | FAN_EVENT_ON_CHILD)], deep="OPA"),
    Scope("the mount", [on("", EVERYTHING, FAN_MARK_MOUNT)], "OPA", "OPA", "OPA"),
    Scope("the mount, named by a file", [on("file", EVERYTHING, FAN_MARK_MOUNT)], "OPA", "OPA", "OPA"),
    Scope("the filesystem", [on("file", EVERYTHING, FAN_MARK_FILESYSTEM)], "OPA", "OPA", "OPA"),
    Scope(
        "several marks of one group make one event",
        [
            on("file", EVERYTHING),
            on("", EVERYTHING | FAN_EVENT_ON_CHILD),
            on("", EVERYTHING, FAN_MARK_MOUNT),
            on("", EVERYTHING, FAN_MARK_FILESYSTEM),
        ],
        "OPA",
        "OPA",
        "OPA",
    ),
    Scope(
        "their masks are united",
        [
            on("file", OPEN_PERM),
            on("", PRE_ACCESS | FAN_EVENT_ON_CHILD),
            on("", ACCESS_PERM, FAN_MARK_FILESYSTEM),
        ],
        "OPA",
        "A",
        "PA",
    ),
    Scope("PRE_ACCESS only", [on("", PRE_ACCESS, FAN_MARK_FILESYSTEM)], "P", "P", "P"),
    Scope("ACCESS_PERM only", [on("", ACCESS_PERM, FAN_MARK_FILESYSTEM)], "A", "A", "A"),
    Scope("OPEN_PERM only", [on("", OPEN_PERM, FAN_MARK_FILESYSTEM)], "O", "O", "O"),
    Scope("OPEN_EXEC_PERM only", [on("", EXEC_PERM, FAN_MARK_FILESYSTEM)]),
    Scope(
        "directories too",
        [on("", OPEN_PERM | ACCESS_PERM | FAN_ONDIR, FAN_MARK_FILESYSTEM)],
        *("OA", "OA", "OA"),
    ),
    # Ignore marks
    *(
        Scope(
            f"all but PRE_ACCESS of a file, {name}",
            [on("", EVERYTHING, FAN_MARK_FILESYSTEM), mark],
            "OA",
            "OPA",
            "OPA",
        )
        for name, mark in {
            "IGNORED_MASK": on("file", PRE_ACCESS, FAN_MARK_IGNORED_MASK),
            "IGNORED_MASK SURV": on("file", PRE_ACCESS, FAN_MARK_IGNORED_MASK | SURVIVING),
            "IGNORE": on("file", PRE_ACCESS, FAN_MARK_IGNORE),
            "IGNORE SURV": on("file", PRE_ACCESS, FAN_MARK_IGNORE | SURVIVING),
        }.items()
    ),
    *(
        Scope(
            f"all but PRE_ACCESS, {name}", [on("", EVERYTHING, FAN_MARK_FILESYSTEM), mark], "OA", "OA", "OA"
        )
        for name, mark in {
            "mount IGNORED_MASK": on("", PRE_ACCESS, FAN_MARK_MOUNT | FAN_MARK_IGNORED_MASK),
            "filesystem IGNORED_MASK": on("", PRE_ACCESS, FAN_MARK_FILESYSTEM | FAN_MARK_IGNORED_MASK),
            "mount IGNORE": on("", PRE_ACCESS, FAN_MARK_MOUNT | FAN_MARK_IGNORE | SURVIVING),
            "filesystem IGNORE": on("", PRE_ACCESS, FAN_MARK_FILESYSTEM | FAN_MARK_IGNORE | SURVIVING),
        }.items()
    ),
    Scope(
        "all but a directory's children",
        [
            on("", EVERYTHING, FAN_MARK_FILESYSTEM),
            on("", PRE_ACCESS | FAN_EVENT_ON_CHILD, FAN_MARK_IGNORE | SURVIVING),
        ],
        *("OA", "OPA", "OA"),
    ),
    Scope(
        "IGNORED_MASK of a directory does nothing for its children",
        [
            on("", EVERYTHING, FAN_MARK_FILESYSTEM),
            on("", PRE_ACCESS | FAN_EVENT_ON_CHILD, FAN_MARK_IGNORED_MASK),
        ],
        *("OPA", "OPA", "OPA"),
    ),
    Scope(
        "everything of a file ignored",
        [on("", EVERYTHING, FAN_MARK_FILESYSTEM), on("file", EVERYTHING, FAN_MARK_IGNORE | SURVIVING)],
        *("", "OPA", "OPA"),
    ),
    Scope("only an ignore mark", [on("file", EVERYTHING, FAN_MARK_IGNORE | SURVIVING)]),
]


@pytest.mark.parametrize("row", SCOPE_ROWS, ids=row_names)
async def test_scope(world: World, accessor: Accessor, row: Scope) -> None:
    (world.backing / "sub").mkdir()
    paths = {name: world.file(name) for name in ("file", "sub/deep", "other")}
    # Twice: nothing may depend on what the kernel remembers of the first time.
    async with world.listener(*(make(world) for make in row.marks)) as listener:
        for _ in range(2):
            for (name, path), letters in zip(paths.items(), (row.file, row.deep, row.other), strict=True):
                assert await accessor.run("pread_path", path, 100, 5000) == CONTENT[5000:5100]
                shapes = {"O": O.of(name), "P": P(PAGE, PAGE, name), "A": A.of(name)}
                assert world.heard(listener.take()) == [shapes[letter] for letter in letters]


async def test_directories_are_heard_with_ondir(world: World, accessor: Accessor) -> None:
    (world.backing / "sub").mkdir()
    for name in ("sub/one", "sub/two"):
        world.file(name)
    directory = str(world.path / "sub")
    mask = OPEN_PERM | ACCESS_PERM
    async with world.listener(world.everywhere(mask | FAN_ONDIR)) as listener:
        assert sorted(await accessor.run("listdir", directory)) == ["one", "two"]
        # The last getdents64(2), which finds nothing more, is asked too.
        assert world.heard(listener.take()) == [O.of("sub"), A.of("sub"), A.of("sub")]
    async with world.listener(world.everywhere(mask)) as listener:
        assert sorted(await accessor.run("listdir", directory)) == ["one", "two"]
        assert listener.take() == []


# Ignore marks and writing


@pytest.mark.parametrize("survives", [False, True])
@pytest.mark.parametrize("kind", [FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORE], ids=["IGNORED_MASK", "IGNORE"])
async def test_a_write_ends_ignoring(
    world: World, make_accessor: MakeAccessor, kind: int, survives: bool
) -> None:
    reader, writer = make_accessor(), make_accessor()
    path = world.file()
    async with world.listener(world.everywhere(PRE_ACCESS)) as listener:

        async def heard_of_reading() -> list[Expected]:
            await reader.run("pread_path", path, 100, 0)
            return world.heard(listener.take())

        flags = FAN_MARK_ADD | kind | (SURVIVING if survives else 0)
        await listener.group.mark(flags, PRE_ACCESS, path=path)
        assert await heard_of_reading() == []
        descriptor = await writer.run("open", path, os.O_RDWR)
        assert await heard_of_reading() == []  # to open for writing is not to write
        await writer.run("pwrite", descriptor, b"new", 0)
        listener.take()
        assert await heard_of_reading() == ([] if survives else [P(0, PAGE)])
        assert await reader.run("pread_path", path, 3, 0) == b"new"


@pytest.mark.parametrize("survives", [False, True])
@pytest.mark.parametrize("kind", [FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORE], ids=["IGNORED_MASK", "IGNORE"])
async def test_ignoring_what_is_open_for_writing(
    world: World, make_accessor: MakeAccessor, kind: int, survives: bool
) -> None:
    """Without SURV_MODIFY the kernel says yes and makes no mark."""
    reader, writer = make_accessor(), make_accessor()
    path = world.file()
    async with world.listener(world.everywhere(PRE_ACCESS)) as listener:
        descriptor = await writer.run("open", path, os.O_RDWR)
        await listener.group.mark(FAN_MARK_ADD | kind | (SURVIVING if survives else 0), PRE_ACCESS, path=path)
        await reader.run("pread_path", path, 100, 0)
        assert world.heard(listener.take()) == ([] if survives else [P(0, PAGE)])
        await writer.run("close", descriptor)


async def test_an_ignore_mark_that_goes(world: World, accessor: Accessor) -> None:
    path = world.file()
    ignoring = FAN_MARK_IGNORE | SURVIVING
    async with world.listener(world.everywhere(PRE_ACCESS)) as listener:
        for _ in range(2):
            await listener.group.mark(FAN_MARK_ADD | ignoring, PRE_ACCESS, path=path)
            assert await accessor.run("pread_path", path, 100, 0) == CONTENT[:100]
            assert listener.take() == []
            await listener.group.mark(FAN_MARK_REMOVE | ignoring, PRE_ACCESS, path=path)
            assert await accessor.run("pread_path", path, 100, 0) == CONTENT[:100]
            assert world.heard(listener.take()) == [P(0, PAGE)]
