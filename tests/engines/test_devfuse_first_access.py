"""First-access events with the devfuse engine: what is in the page cache is the kernel's business alone, and got there under an allowed event."""

import errno
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fusehsm.conform.accessor import Accessor, AccessorDied
from fusehsm.control.client import request
from fusehsm.control.protocol import Drop, Status
from fusehsm.events import Event
from fusehsm.fanotify.abi import (
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_REMOVE,
)
from fusehsm.linux.mountinfo import mount_of
from tests.conftest import MakeAccessor, MakeMount
from tests.support.async_listener import HOLD
from tests.support.devfuse_acts import KEEP_SIZE, PUNCH_HOLE, act, fallocate_open
from tests.support.devfuse_cached import described, expected_read_only, make_many
from tests.support.harness import NOBODY, PATIENCE, Mount, fuse_device_for_everybody
from tests.support.kernel_and_devfuse import ENGINE
from tests.support.kernel_and_devfuse import engine as engine
from tests.support.kernel_and_mount import (
    ANSWERS,
    CONTENT,
    PAGE,
    PLAIN_DENY,
    PRE_ACCESS,
    SIZE,
    Failed,
    Mark,
    World,
    WorldListener,
    outcome,
)
from tests.support.stub_pattern import Filler, Stub, make_stub

pytestmark = [pytest.mark.fuse, pytest.mark.any_engine, pytest.mark.engine(ENGINE)]

FIRST_ACCESS = ("--events", "first-access", "--cache", "private")
# A memory that gets scarce makes the kernel forget, whenever it likes.
UNASKED = ("FORGET", "BATCH_FORGET", "INTERRUPT", "INIT", "DESTROY")


def world_of(mount: Mount) -> World:
    return World("first-access", mount.source, mount.path, mount.pid)


@pytest.fixture(scope="module")
def whole_world(make_shared_mount: MakeMount) -> World:
    return world_of(make_shared_mount(*FIRST_ACCESS, "--allow-other"))


@pytest.fixture
def world(whole_world: World, numbers: Iterator[int]) -> World:
    """An empty directory of the mount."""
    return whole_world.inside(f"test-{next(numbers)}")


@pytest.fixture(scope="module")
def small_world(make_shared_mount: MakeMount) -> World:
    """Its daemon may hold few descriptors."""
    return world_of(make_shared_mount(*FIRST_ACCESS, "--allow-other", descriptors=256))


async def requests(world: World) -> Counter[str]:
    """How many requests of each kind the mount has answered so far."""
    found = (await request(mount_of(str(world.path)), Status()))["requests"]
    return Counter({name: number for name, number in found.items() if name not in UNASKED})


# Without requests


async def test_after_the_first_open_none_arrives(world: World, accessor: Accessor) -> None:
    for index in range(20):
        world.file(f"file-{index}")
    assert await accessor.run(act, str(world.path), "devfuse_cached.look", 1) == [CONTENT[:SIZE]] * 20
    found = await requests(world)
    assert found["READ"] >= 20
    assert (found["OPEN"], found["OPENDIR"]) == (1, 1)
    assert not {"RELEASE", "RELEASEDIR"} & found.keys()
    assert found["FLUSH"] <= 1


async def test_a_warm_tree_makes_no_requests(world: World, accessor: Accessor) -> None:
    for index in range(20):
        world.file(f"file-{index}")
    # A cold look leaves the times of access to be asked for.
    await accessor.run(act, str(world.path), "devfuse_cached.look", 2)
    before = await requests(world)
    assert await accessor.run(act, str(world.path), "devfuse_cached.look", 3) == [CONTENT[:SIZE]] * 20
    assert await requests(world) == before


async def test_what_is_cached_is_read_without_requests_while_somebody_listens(
    world: World, accessor: Accessor
) -> None:
    """Attributes are believed for as long as a file has been quiet; its content needs no asking."""
    for index in range(20):
        world.file(f"file-{index}")
    async with world.listener(world.everywhere(PRE_ACCESS)) as listener:
        await accessor.run(act, str(world.path), "devfuse_cached.look", 1)
        assert len(listener.take()) >= 20
        before = await requests(world)
        assert await accessor.run(act, str(world.path), "devfuse_cached.look", 3) == [CONTENT[:SIZE]] * 20
        made = await requests(world) - before
        assert made.keys() <= {"GETATTR", "LOOKUP", "STATX"}, made
        assert listener.take() == []


# Changes


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT], ids=["w", "rw", "creat"])
@pytest.mark.parametrize("is_watched", [False, True], ids=["unwatched", "watched"])
async def test_truncating_opens(world: World, accessor: Accessor, flags: int, is_watched: bool) -> None:
    """O_TRUNC truncates, by a SETATTR of its own."""
    path = world.file()
    assert await accessor.run("read_file", path) == CONTENT[:SIZE]
    before = await requests(world)
    async with world.listener(*[Mark(PRE_ACCESS, path)] * is_watched):
        assert await accessor.run(act, path, "devfuse_cached.truncate_at_open", flags) == (0, b"new")
    assert (await requests(world) - before)["SETATTR"] >= 1
    assert world.content() == b"new"


@pytest.mark.parametrize("flags", [0, os.O_SYNC, os.O_DSYNC], ids=["plain", "sync", "dsync"])
async def test_appending(world: World, accessor: Accessor, flags: int) -> None:
    path = world.file()
    before = await requests(world)
    pieces = [b"one", b"2" * 5000, b"three"]
    size = await accessor.run(act, path, "devfuse_cached.append", flags, pieces)
    assert size == SIZE + 5008
    assert world.content() == CONTENT[:SIZE] + b"".join(pieces) == await accessor.run("read_file", path)
    assert (await requests(world) - before)["FSYNC"] >= 2


async def test_renamed_while_open(world: World, accessor: Accessor) -> None:
    path = world.file()
    content = CONTENT[:100] + b"written" + CONTENT[107:SIZE]
    seen = await accessor.run(act, path, "devfuse_cached.rename_open", SIZE + 1)
    assert seen == (content, content, b"another")
    assert (world.content("file.moved"), world.content()) == (content, b"another")


async def test_replaced_while_open(world: World, accessor: Accessor) -> None:
    path = world.file()
    (world.backing / "other").write_bytes(b"other")
    seen = await accessor.run(act, path, "devfuse_cached.rename_over_open", "other", SIZE + 1)
    assert seen == (b"written" + CONTENT[7:SIZE], b"other")
    assert world.content() == b"other"


async def test_mappings(world: World, accessor: Accessor) -> None:
    path = world.file()
    assert await accessor.run(act, path, "devfuse_cached.write_through_mapping", 100, b"shared") == b"shared"
    assert world.content()[100:106] == b"shared"
    seen = await accessor.run(act, path, "devfuse_cached.write_to_private_mapping", 100, b"mine")
    assert seen == (b"mine", b"shar")
    assert world.content()[100:106] == b"shared"


async def test_unlinked_while_open(world: World, accessor: Accessor) -> None:
    path = world.file()
    seen = await accessor.run(act, path, "devfuse_cached.use_unlinked", SIZE + 1)
    content = bytearray(CONTENT[:6000])
    content[5000:5007] = b"written"
    content[:6] = b"mapped"
    assert seen == (CONTENT[:SIZE], 0, content, 0o640, b"mapped")
    assert not os.listdir(world.backing)


async def test_unlinked_stub(world: World, accessor: Accessor) -> None:
    """Its events come, and their descriptor is good for filling it."""
    stub = make_stub(world.backing, world.path, "stub", 1, SIZE)
    filler = Filler()
    filler.knows(stub)
    async with world.listener(Mark(PRE_ACCESS, stub.path), answer=filler, event_f_flags=os.O_RDWR):
        descriptor = await accessor.run("open", stub.path, os.O_RDONLY)
        await accessor.run("unlink", stub.path)
        assert await accessor.run("pread", descriptor, SIZE + 1, 0) == stub.content
        assert filler.events


async def test_many_unlinked_with_few_descriptors(small_world: World, accessor: Accessor) -> None:
    """The daemon cannot hold them all open."""
    place = small_world.inside("unlinked")
    make_many(str(place.backing), "unlinked", 2000)
    assert await accessor.run(act, str(place.path), "devfuse_cached.unlink_many", 2000) == 4000
    assert os.listdir(place.backing) == os.listdir(place.path) == []


async def test_many_open_with_few_descriptors(small_world: World, accessor: Accessor) -> None:
    place = small_world.inside("open")
    make_many(str(place.backing), "open", 1000)
    assert await accessor.run(act, str(place.path), "devfuse_cached.open_many", 1000) == 2000
    assert len(os.listdir(f"/proc/{small_world.daemon}/fd")) <= 256
    starts = {(place.backing / f"open-{index}").read_bytes()[:7] for index in range(1000)}
    assert starts == {b"written"}


async def test_new_files_that_their_makers_may_not_write(world: World, make_accessor: MakeAccessor) -> None:
    """The process that makes a file may write to it through that descriptor, whatever its mode."""
    os.chmod(world.backing, 0o777)
    user = make_accessor(uid=NOBODY, gid=NOBODY)
    found = await user.run(act, str(world.path), "devfuse_cached.make_read_only", 20)
    assert found == expected_read_only(20)


@pytest.fixture(scope="module")
def users_mount(
    places: Callable[[str], Path], session_directory: Path, make_shared_mount: MakeMount
) -> Mount:
    """An ordinary user's own mount, whose daemon may hold few descriptors."""
    source, point = places("users"), session_directory / "users-mount"
    point.mkdir()
    for place in (source, point):
        os.chown(place, NOBODY, NOBODY)
    with fuse_device_for_everybody():
        return make_shared_mount(*FIRST_ACCESS, source=source, path=point, uid=NOBODY, descriptors=256)


def test_new_files_that_an_ordinary_users_server_may_not_open(
    users_mount: Mount, make_accessor: MakeAccessor
) -> None:
    user = make_accessor(uid=NOBODY, gid=NOBODY)
    for _ in range(2):
        found = user.call(act, str(users_mount.path), "devfuse_cached.make_read_only", 20)
        assert found == expected_read_only(20)
        for index in range(20):
            path = users_mount.source / f"object-{index}"
            assert os.stat(path).st_mode & 0o777 == 0o444
            user.call("unlink", str(users_mount.path / path.name))


# Every byte under an allowed event


@asynccontextmanager
async def filling(
    world: World, *stubs: Stub, marks: tuple[Mark, ...] = ()
) -> AsyncIterator[tuple[WorldListener, Filler]]:
    """A listener, on all of the mount unless `marks` say otherwise, that fills stubs with exactly what its events name."""
    filler = Filler()
    for stub in stubs:
        filler.knows(stub)
    async with world.listener(
        *(marks or (world.everywhere(PRE_ACCESS),)), answer=filler, event_f_flags=os.O_RDWR
    ) as listener:
        yield listener, filler


def stub_of(world: World, name: str = "stub", size: int = SIZE) -> Stub:
    return make_stub(world.backing, world.path, name, len(name), size)


@pytest.mark.parametrize(
    "way", ["itself", "thread", "inherited", "passed"], ids=lambda way: way.replace(" ", "-")
)
@pytest.mark.parametrize("name", ["pread", "pwrite", "private mapping", "sendfile", "ftruncate"])
async def test_who_really_accesses(world: World, accessor: Accessor, name: str, way: str) -> None:
    path = world.file()
    async with world.listener(Mark(PRE_ACCESS, path)) as listener:
        _, (process, _) = await accessor.run(act, path, "do", way, name)
        assert {event.pid for event in listener.take()} == {process}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda number: errno.errorcode.get(number, "plain"))
async def test_denied_then_allowed(world: World, accessor: Accessor, answer: int) -> None:
    """A denial is not remembered and leaves nothing in the cache; what is allowed is not asked for again."""
    stub = stub_of(world)
    async with filling(world, stub) as (listener, filler):
        filler.error = answer
        for _ in range(2):
            failed = await outcome(lambda: accessor.run("pread_path", stub.path, 100, 5000))
            assert failed == Failed(ANSWERS[answer])
            assert listener.take()
        filler.error = 0
        assert await accessor.run("read_file", stub.path) == stub.content
        assert listener.take()
        assert await accessor.run("read_file", stub.path) == stub.content
        assert listener.take() == []


async def test_denied_mapping(world: World, make_accessor: MakeAccessor) -> None:
    """SIGBUS, and then not."""
    stub = stub_of(world)
    async with filling(world, stub) as (listener, filler):
        filler.error = PLAIN_DENY
        with pytest.raises(AccessorDied) as died:
            await make_accessor().run(act, stub.path, "devfuse_cached.touch", SIZE, 9000)
        assert died.value.signal == signal.SIGBUS
        assert listener.take()
        filler.error = 0
        seen = await make_accessor().run(act, stub.path, "devfuse_cached.touch", SIZE, 9000)
        assert seen == stub.content[9000:9001]


async def test_denied_truncating_open(world: World, accessor: Accessor) -> None:
    """Truncation is asked for; denied, the file is as it was."""
    stub = stub_of(world)
    async with filling(world, stub) as (_, filler):
        filler.error = errno.EIO
        with pytest.raises(OSError) as caught:
            await accessor.run("open", stub.path, os.O_WRONLY | os.O_TRUNC)
        assert caught.value.errno == errno.EIO
        filler.error = 0
        assert await accessor.run("read_file", stub.path) == stub.content


async def test_a_write_into_a_stub(world: World, accessor: Accessor) -> None:
    """The page that is written in part is asked for first; no accessor sees its zeros."""
    stub = stub_of(world)
    filled = False

    def fill_once(event: Event) -> int:
        nonlocal filled
        if not filled:
            os.pwrite(event.fd, stub.content, 0)
        filled = True
        return 0

    async with world.listener(
        Mark(PRE_ACCESS, stub.path), answer=fill_once, event_f_flags=os.O_RDWR
    ) as listener:
        assert await accessor.run("pwrite_path", stub.path, b"new", 5000) == 3
        assert [(event.offset, event.count) for event in listener.take()] == [(PAGE, PAGE)]
        content = stub.content[:5000] + b"new" + stub.content[5003:]
        assert await accessor.run("read_file", stub.path) == content
        await accessor.run("truncate", stub.path, 9000)
        assert await accessor.run("read_file", stub.path) == content[:9000]
    assert world.content("stub") == content[:9000]


async def change_marks(listener: WorldListener, flags: int, path: str | None, mask: int = PRE_ACCESS) -> None:
    await listener.group.mark(flags, mask, path=path)


@pytest.mark.parametrize("way", ["removed", "flushed", "ignored"])
async def test_a_mark_that_comes_back(world: World, accessor: Accessor, way: str) -> None:
    """An HSM takes the mark of a filled file away, and puts it back with the hole that it punches: what was cached meanwhile is void."""
    stub = stub_of(world)
    ignoring = FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY
    marks = (world.everywhere(PRE_ACCESS),) if way == "ignored" else (Mark(PRE_ACCESS, stub.path),)
    async with filling(world, stub, marks=marks) as (listener, _):
        assert await accessor.run("read_file", stub.path) == stub.content
        assert listener.take()
        if way == "removed":
            await change_marks(listener, FAN_MARK_REMOVE, stub.path)
        elif way == "flushed":
            await change_marks(listener, FAN_MARK_FLUSH, None, 0)
        else:
            await change_marks(listener, ignoring, stub.path)
        assert await accessor.run("read_file", stub.path) == stub.content
        assert listener.take() == []
        punch(stub.backing, SIZE)
        if way == "ignored":
            await change_marks(listener, ignoring & ~FAN_MARK_ADD | FAN_MARK_REMOVE, stub.path)
        else:
            await change_marks(listener, FAN_MARK_ADD, stub.path)
        assert await accessor.run("read_file", stub.path) == stub.content
        assert listener.take(), "nobody was asked for what had been punched"
        assert world.content("stub") == stub.content


async def test_very_many_files_under_an_ignore_mark(world: World, accessor: Accessor) -> None:
    """All that was cached under it goes when a write ends it, however long that takes."""
    number, stub = 3000, bytes(100)
    directory = world.path / "many"
    await accessor.run("mkdir", str(directory))
    backing = world.backing / "many"
    for index in range(number):
        (backing / f"stub-{index}").write_bytes(stub)
    async with world.listener(world.everywhere(PRE_ACCESS)) as listener:
        everywhere = FAN_MARK_ADD | FAN_MARK_FILESYSTEM | FAN_MARK_IGNORED_MASK
        await change_marks(listener, everywhere, str(world.path))
        assert await accessor.run(act, str(directory), "devfuse_cached.read_all") == {stub}
        for index in range(number):
            (backing / f"stub-{index}").write_bytes(CONTENT[:100])
        assert listener.take() == []
        await accessor.run("pwrite_path", str(directory / "stub-0"), CONTENT[:1], 0)
        with trio.fail_after(20):
            while await accessor.run(act, str(directory), "devfuse_cached.read_all") != {CONTENT[:100]}:
                await trio.sleep(0.1)


async def test_no_page_stays_locked_of_who_was_killed(world: World, make_accessor: MakeAccessor) -> None:
    """The kernel does not tell of it: what is read ahead waits without its accessor."""
    path = world.file()
    victim, other = make_accessor(), make_accessor()
    async with world.listener(Mark(PRE_ACCESS, path), answer=lambda event: HOLD) as listener:
        victim.start("pread_path", path, 100, 5000)
        await listener.wait_for(1)
        victim.kill()
        assert await trio.to_thread.run_sync(victim.wait_exit) == signal.SIGKILL
        call = other.start("pread_path", path, 100, 5000)
        with trio.fail_after(PATIENCE):
            await listener.wait_for(2)
        listener.release()
        assert await call.wait() == CONTENT[5000:5100]


async def test_cached_before_the_mark(world: World, accessor: Accessor) -> None:
    """A stub's zeros that were read before there was a listener are not shown any more."""
    stub = stub_of(world)
    descriptor = await accessor.run("open", stub.path, os.O_RDONLY)
    mapping = await accessor.run("map_file", descriptor, SIZE)
    assert await accessor.run("pread", descriptor, SIZE, 0) == bytes(SIZE)
    assert await accessor.run("touch", mapping, 0, SIZE) == bytes(SIZE)
    async with filling(world, stub, marks=(Mark(PRE_ACCESS, stub.path),)) as (listener, _):
        assert await accessor.run("touch", mapping, 0, SIZE) == stub.content
        assert await accessor.run("pread", descriptor, SIZE, 0) == stub.content
        assert listener.take()


@pytest.mark.parametrize("by", ["the event's descriptor", "the backing"])
async def test_evicted_and_dropped(world: World, accessor: Accessor, by: str) -> None:
    """A listener punches a hole and has the cached pages dropped: the next access makes an event again, also through a standing mapping."""
    stub = stub_of(world)
    filler = Filler()
    filler.knows(stub)
    kept: list[int] = []

    def answer(event: Event) -> int:
        kept.append(os.dup(event.fd))
        return filler(event)

    async with world.listener(
        world.everywhere(PRE_ACCESS), answer=answer, event_f_flags=os.O_RDWR
    ) as listener:
        descriptor = await accessor.run("open", stub.path, os.O_RDONLY)
        mapping = await accessor.run("map_file", descriptor, SIZE)
        mount, status = mount_of(str(world.path)), await accessor.run("stat", stub.path)
        for _ in range(3):
            assert await accessor.run("touch", mapping, 0, SIZE) == stub.content
            assert await accessor.run("pread", descriptor, SIZE, 0) == stub.content
            assert listener.take()
            assert await accessor.run("read_file", stub.path) == stub.content
            assert listener.take() == []
            if by == "the backing":
                punch(stub.backing, SIZE)
            else:
                fallocate_open(kept[0], PUNCH_HOLE | KEEP_SIZE, 0, SIZE)
            await request(mount, Drop(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino))
    for descriptor in kept:
        os.close(descriptor)


def punch(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fallocate_open(descriptor, PUNCH_HOLE | KEEP_SIZE, 0, size)
    finally:
        os.close(descriptor)


# Attributes


async def test_attributes_after_a_fill(world: World, accessor: Accessor) -> None:
    """Size, blocks and time are the backing's right after the read that had the file filled."""
    stubs = [stub_of(world, f"stub-{index}", 100_000 * index + 1) for index in range(10)]
    async with filling(world, *stubs):
        for stub in stubs:
            await accessor.run("stat", stub.path)
            data, shown = await accessor.run(act, stub.path, "devfuse_cached.read_and_stat")
            assert data == stub.content
            assert shown == described(stub.backing)
            assert shown[0] == stub.size
            assert shown[1] > 0


@asynccontextmanager
async def kept_open(world: World, accessor: Accessor) -> AsyncIterator[tuple[Stub, list[int]]]:
    """A stub that has been read once, and the descriptors of it that its listener keeps, to fill it when it has answered."""
    stub = stub_of(world, size=1 << 20)
    kept: list[int] = []

    def answer(event: Event) -> int:
        kept.append(os.dup(event.fd))
        return 0

    async with world.listener(Mark(PRE_ACCESS, stub.path), answer=answer, event_f_flags=os.O_RDWR):
        await accessor.run("pread_path", stub.path, 1, 0)
        yield stub, kept
    for descriptor in kept:
        os.close(descriptor)


async def test_attributes_after_a_late_fill(world: World, accessor: Accessor) -> None:
    """A listener that goes on filling when it has answered is noticed too: a file is believed for as long as it has been quiet."""
    async with kept_open(world, accessor) as (stub, kept):
        await accessor.run(act, stub.path, "devfuse_cached.described")
        await trio.to_thread.run_sync(os.pwrite, kept[0], stub.content, 0)
        began = trio.current_time()
        with trio.fail_after(10):
            while await accessor.run(act, stub.path, "devfuse_cached.described") != described(stub.backing):
                await trio.sleep(0.01)
        assert trio.current_time() - began < 2


async def test_attributes_once_nobody_can_fill_any_more(world: World, accessor: Accessor) -> None:
    """Nothing is believed for good while a listener has the file open for writing; then the kernel asks no more."""
    async with kept_open(world, accessor) as (stub, kept):

        async def shown() -> object:
            return await accessor.run(act, stub.path, "devfuse_cached.described")

        await trio.sleep(0.8)  # longer than a fill that is over is waited for
        await shown()
        await trio.to_thread.run_sync(os.pwrite, kept[0], stub.content, 0)
        with trio.fail_after(10):
            while await shown() != described(stub.backing):
                await trio.sleep(0.05)
        while kept:
            os.close(kept.pop())
        quiet = 5.0  # more seconds than the file has been left alone by now
        await trio.sleep(quiet / 2)
        assert await shown() == described(stub.backing)
        before = await requests(world)
        await trio.sleep(quiet)
        assert await shown() == described(stub.backing)
        assert "GETATTR" not in await requests(world) - before


REFILLING = """
import os


async def answer(event):
    if event.path.endswith("changed"):
        status = os.fstat(event.fd)
        os.utime(event.fd, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    if event.path.endswith("kept"):
        os.dup(event.fd)
    if "once" in event.path and os.fstat(event.fd).st_blocks or not os.fstat(event.fd).st_size:
        return
    if "stub" in event.path or "once" in event.path:
        os.pwrite(event.fd, bytes(range(256)) * (os.fstat(event.fd).st_size // 256), 0)
"""


@pytest.fixture(scope="module")
def refilling(session_directory: Path) -> tuple[Path, dict[str, str]]:
    """Where the handler above is, and the environment that finds it."""
    modules = session_directory / "refilling"
    modules.mkdir()
    (modules / "refilling.py").write_text(REFILLING)
    return modules, {"PYTHONPATH": f"{modules}:{os.getcwd()}"}


@pytest.fixture(scope="module")
def refilled(make_shared_mount: MakeMount, refilling: tuple[Path, dict[str, str]]) -> Mount:
    """A mount with it."""
    cwd, env = refilling
    return make_shared_mount(*FIRST_ACCESS, "--handler", "refilling:answer", cwd=cwd, env=env)


async def test_attributes_after_a_fill_at_once(refilled: Mount, accessor: Accessor) -> None:
    """What a handler has filled without having to be waited for shows as soon as it can be read."""
    for index in range(50):
        backing = refilled.source / f"stub-{index}"
        backing.touch()
        os.truncate(backing, 1 << 16)
        path = str(refilled.path / backing.name)
        await accessor.run("stat", path)
        data, shown = await accessor.run(act, path, "devfuse_cached.read_and_stat")
        assert data == bytes(range(256)) * 256
        assert shown == described(backing)


async def test_attributes_after_a_fill_at_open(
    make_mount: MakeMount, accessor: Accessor, refilling: tuple[Path, dict[str, str]]
) -> None:
    """What an event at open has filled shows too, although the read after it changes nothing."""
    cwd, env = refilling
    options = ("--events", "exact", "--cache", "private", "--abi", "patch-v2")
    mount = make_mount(*options, "--handler", "refilling:answer", cwd=cwd, env=env)
    backing = mount.source / "once"
    backing.touch()
    os.truncate(backing, 1 << 16)
    path = str(mount.path / backing.name)
    await accessor.run("stat", path)
    descriptor = await accessor.run("open", path, os.O_RDONLY)
    await trio.sleep(0.1)  # longer than a change may be taken for the next one
    assert await accessor.run("pread", descriptor, 1 << 16, 0) == bytes(range(256)) * 256
    # Unlike stat(2), it does not ask for the time of access, which the read has made the kernel ask for.
    shown = await trio.run_process(["stat", "-c", "%b", path], capture_stdout=True)
    assert int(shown.stdout) == backing.stat().st_blocks


@pytest.mark.parametrize("name", ["left", "changed", "kept"])
async def test_attributes_when_pages_were_reclaimed(refilled: Mount, accessor: Accessor, name: str) -> None:
    """A file whose pages come back under an event that changes nothing is still believed; else it is asked about anew."""
    world, backing = world_of(refilled), refilled.source / name
    backing.write_bytes(CONTENT[: 2 * PAGE])
    path = str(world.path / name)

    await accessor.run(act, path, "devfuse_cached.read_and_stat")
    await trio.sleep(0.8)  # longer than a fill that is over is waited for
    assert await accessor.run(act, path, "devfuse_cached.described") == described(backing)
    descriptor = await accessor.run("open", path, os.O_RDONLY)
    before = await requests(world)
    await accessor.run("posix_fadvise", descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert await accessor.run("pread", descriptor, 3 * PAGE, 0) == CONTENT[: 2 * PAGE]
    assert await accessor.run("pread", descriptor, 3 * PAGE, 0) == CONTENT[: 2 * PAGE]
    made = await requests(world) - before
    assert made["READ"] >= 1
    assert ("GETATTR" in made) == (name != "left"), made
    assert await accessor.run(act, path, "devfuse_cached.described") == described(backing)
