"""Files that are opened while a page of them waits for a listener: nobody waits for that page with the memory locked, and every byte is asked for."""

import mmap
import os
import signal
from collections.abc import Callable

import pytest
import trio
from _pytest.mark.structures import ParameterSet

from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from fusehsm.linux import syscalls, system_call
from tests.conftest import MakeAccessor
from tests.support.async_listener import HOLD
from tests.support.engines import parameters
from tests.support.harness import PATIENCE
from tests.support.kernel_and_mount import (
    ACCESS_PERM,
    CONTENT,
    MIB,
    PAGE,
    PRE_ACCESS,
    A,
    Mark,
    P,
    World,
    WorldListener,
    command_line,
)
from tests.support.requirements import require

pytestmark = [pytest.mark.fuse, pytest.mark.kernel, pytest.mark.any_engine]

FILL_FLAGS = os.O_RDWR | os.O_CLOEXEC
PAGES = 32
FILLED = CONTENT[: PAGES * PAGE]


def touch(path: str, page: int, pages: int) -> bytes:
    """Map so many pages from that one on, and read the first byte."""
    descriptor = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(descriptor, pages * 4096, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=page * 4096)
    return mapped[:1]


def map_private(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)[0]


def map_to_write(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE)[0]


def map_shared(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    mmap.mmap(descriptor, 4096)[0]


def map_and_fork(path: str) -> None:
    """The child has the parent's mapping, and maps once more."""
    descriptor = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
    child = os.fork()
    if not child:
        mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)[0]
        os._exit(0)
    mapped[0]


def execute(path: str) -> None:
    os.execv(path, [path])


WAITS_IN = (9, 59, system_call.PAGE_FAULT)  # mmap(2), execve(2) of x86-64


def worlds(*without: str, but: str = "") -> list[ParameterSet]:
    """The worlds of a test: those without an engine, and each engine except one."""
    return [each for each in parameters(*without) if each.id != but]


class Holds:
    """Holds every event, except those of processes that it has let go, or from some time on none.

    With pyfuse3 a page that was dropped meanwhile is asked for once more, by whoever comes to it first.
    """

    def __init__(self) -> None:
        self.let_go: set[int] = set()
        self.holds = True

    def __call__(self, event: Event) -> int:
        return HOLD if self.holds and event.pid not in self.let_go else 0


async def until_it_waits(accessor: Accessor) -> None:
    """Return once the accessor waits in mmap(2), execve(2) or a page fault."""
    with trio.fail_after(PATIENCE):
        while (call := system_call.call_of(accessor.pid)) is None or call.number not in WAITS_IN:
            await trio.sleep(0.01)


@pytest.mark.parametrize(
    "use", [map_private, map_to_write, map_shared, map_and_fork, execute], ids=lambda use: use.__name__
)
async def test_a_second_process_can_be_killed_and_looked_at(
    world: World, make_accessor: MakeAccessor, use: Callable[[str], None]
) -> None:
    """While the first waits for a page, which the listener does not answer."""
    require(os.uname().machine == "x86_64", "knows system calls of x86-64")
    if use is map_shared and world.diverges("shared mappings (exact)"):
        return  # a watched file cannot be mapped so
    path = world.file()
    os.chmod(world.backing / "file", 0o755)
    first, second, third = make_accessor(), make_accessor(), make_accessor()
    answer = Holds()
    async with world.listener(Mark(PRE_ACCESS, path), answer=answer) as listener:
        call = first.start(touch, path, 0, 1)
        await listener.wait_for(1)
        second.start(use, path)
        await until_it_waits(second)
        await third.run(command_line, second.pid)
        second.kill()
        assert await trio.to_thread.run_sync(second.wait_exit) == signal.SIGKILL
        answer.holds = False
        listener.release()
        assert await call.wait() == CONTENT[:1]


class FillsAllBut:
    """Fills what events are about with CONTENT, but holds the events of one process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __call__(self, event: Event) -> int:
        if event.offset is None or event.count is None:
            return 0
        if event.pid == self.pid:
            return HOLD
        end = min(event.offset + event.count, PAGES * PAGE)
        os.pwrite(event.fd, CONTENT[event.offset : end], event.offset)
        return 0


def stub(world: World) -> str:
    """A file of PAGES pages that are not here."""
    path = world.file()
    (world.backing / "file").write_bytes(b"")
    os.truncate(world.backing / "file", PAGES * PAGE)
    return path


def read_whole(path: str, page: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    return os.pread(descriptor, count, page * 4096)


def read_into_buffers(path: str, page: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    parts = [bytearray(100), bytearray(count - 100)]
    os.preadv(descriptor, parts, page * 4096)
    return b"".join(parts)


def read_on(path: str, page: int, count: int) -> bytes:
    """By the file position, in two calls."""
    descriptor = os.open(path, os.O_RDONLY)
    os.lseek(descriptor, page * 4096, os.SEEK_SET)
    return os.read(descriptor, count // 2) + os.read(descriptor, count - count // 2)


def read_mapped(path: str, page: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    with mmap.mmap(descriptor, count, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=page * 4096) as mapped:
        return mapped[:]


def read_by_sendfile(path: str, page: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    target = os.memfd_create("target")
    done = 0
    while done < count:
        done += os.sendfile(target, descriptor, page * 4096 + done, count - done)
    return os.pread(target, count, 0)


def read_with_o_direct(path: str, page: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, count) as buffer:
        os.preadv(descriptor, [buffer], page * 4096)
        return buffer[:]


@pytest.mark.parametrize(
    "read",
    [read_whole, read_into_buffers, read_on, read_mapped, read_by_sendfile, read_with_o_direct],
    ids=lambda read: read.__name__,
)
async def test_every_byte_is_asked_for(
    world: World, make_accessor: MakeAccessor, read: Callable[[str, int, int], bytes]
) -> None:
    """Also the pages beside the one that waits, and that one itself once it is answered."""
    path = stub(world)
    first, second = make_accessor(), make_accessor()
    answer = FillsAllBut(first.pid)
    async with world.listener(Mark(PRE_ACCESS, path), answer=answer, event_f_flags=FILL_FLAGS) as listener:
        call = first.start(touch, path, 4, 1)
        await listener.wait_for(1)
        for page, pages in ((0, 4), (5, 1), (20, 12), (5, 3)):
            count = pages * PAGE
            assert await second.run(read, path, page, count) == FILLED[page * PAGE :][:count]
        answer.pid = 0
        for event in listener.take_held():
            answer(event)
            listener.group.answer(event, 0)
            os.close(event.fd)
        assert await call.wait() == FILLED[4 * PAGE :][:1]
        assert await second.run(read, path, 0, PAGES * PAGE) == FILLED


def write_page(path: str, page: int) -> int:
    descriptor = os.open(path, os.O_RDWR)
    return os.pwrite(descriptor, b"new", page * 4096)


async def test_a_write_through_the_cache_keeps_its_page_too(
    world: World, make_accessor: MakeAccessor
) -> None:
    """It has been opened while a page waited, which waits no more. Its own page is locked while its event waits."""
    path = world.file()
    first, second, third, fourth = (make_accessor() for _ in range(4))
    answer = Holds()
    async with world.listener(Mark(PRE_ACCESS, path), answer=answer) as listener:
        touching = first.start(touch, path, 0, 1)
        await listener.wait_for(1)
        writing = second.start(write_page, path, 1)
        await listener.wait_for(2)
        answer.let_go.add(first.pid)
        for event in listener.take_held():
            if event.pid == first.pid:
                listener.group.answer(event, 0)
                os.close(event.fd)
            else:
                held = event
        assert await touching.wait() == CONTENT[:1]
        third.start(touch, path, 2, 1)
        await until_it_waits(third)
        await fourth.run(command_line, third.pid)
        third.kill()
        assert await trio.to_thread.run_sync(third.wait_exit) == signal.SIGKILL
        listener.group.answer(held, 0)
        os.close(held.fd)
        assert await writing.wait() == 3
        listener.release()


@pytest.mark.parametrize("whole_world", worlds("kernel", but="pyfuse3"), indirect=True, scope="module")
async def test_a_read_is_one_event_as_ever(world: World, make_accessor: MakeAccessor) -> None:
    """A permission event comes with each read of a descriptor that was opened meanwhile, and its range is that of the call.

    pyfuse3 does not tell who reads: a divergence with a test of its own ("opened while a page waits").
    """
    path = world.file(size=MIB)
    first, second = make_accessor(), make_accessor()

    def answer(event: Event) -> int:
        return HOLD if event.pid == first.pid and event.offset is not None else 0

    def read_often(path: str) -> list[int]:
        descriptor = os.open(path, os.O_RDONLY)
        places = ((40_000, 10_000), (40_000, 10_000), (100_000, 100), (0, 4096))
        return [len(os.pread(descriptor, count, offset)) for offset, count in places]

    async with world.listener(Mark(PRE_ACCESS | ACCESS_PERM, path), answer=answer) as listener:
        call = first.start(touch, path, 100, 1)
        await listener.wait_for(1)
        listener.take()
        assert await second.run(read_often, path) == [10_000, 10_000, 100, 4096]
        twice = [P(9 * PAGE, 4 * PAGE), A] * 2
        assert world.heard(listener.take()) == [*twice, P(24 * PAGE, PAGE), A, P(0, PAGE), A]
        listener.release()
        assert await call.wait() == CONTENT[100 * PAGE :][:1]


def touch_and_wait(path: str) -> bytes:
    """Map the whole file, touch its sixth page, and keep the mapping for touch_next()."""
    descriptor = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    mmap.kept = mapped  # type: ignore[attr-defined]
    return mapped[5 * 4096 : 5 * 4096 + 1]


def touch_next() -> bytes:
    kept: bytes = mmap.kept  # type: ignore[attr-defined]
    return kept[6 * 4096 : 6 * 4096 + 1]


def punch(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    syscalls.fallocate(descriptor, 3, 0, PAGES * PAGE)  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    os.close(descriptor)


@pytest.mark.parametrize("whole_world", worlds(), indirect=True, scope="module")
async def test_what_an_older_mapping_brings_in_is_asked_for(
    world: World, make_accessor: MakeAccessor
) -> None:
    """Its event came before an eviction, so the pages that it covers are zeros now. The new descriptor must not see those."""
    path = stub(world)
    older, first, second = make_accessor(), make_accessor(), make_accessor()
    answer = FillsAllBut(first.pid)
    async with world.listener(Mark(PRE_ACCESS, path), answer=answer, event_f_flags=FILL_FLAGS) as listener:
        assert await older.run(touch_and_wait, path) == FILLED[5 * PAGE :][:1]
        punch(str(world.backing / "file"))
        listener.take()
        call = first.start(touch, path, 20, 1)
        await listener.wait_for(1)
        assert await second.run(keep_open, path) is None
        await older.run(touch_next)
        for page in (5, 6, 7):
            assert await second.run(read_kept, page) == FILLED[page * PAGE :][:PAGE]
        assert_filled(listener, 5)
        answer.pid = 0
        listener.release()
        await call.wait()


def keep_open(path: str) -> None:
    mmap.descriptor = os.open(path, os.O_RDONLY)  # type: ignore[attr-defined]


def read_kept(page: int) -> bytes:
    return os.pread(mmap.descriptor, 4096, page * 4096)  # type: ignore[attr-defined]


def assert_filled(listener: WorldListener, page: int) -> None:
    """An event that came meanwhile covers that page."""
    ranges = [(event.offset or 0, event.count or 0) for event in listener.take()]
    assert any(start <= page * PAGE < start + count for start, count in ranges)
