"""The page cache: what it serves by itself, and what enters it unasked elsewhere."""

import errno
import fcntl
import mmap
import os
from typing import Any

import pytest
import trio

from fusehsm import drop
from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from fusehsm.linux import syscalls
from tests.conform.divergences.sides import PAGE, Side, covers
from tests.conftest import MakeAccessor
from tests.support.async_listener import HOLD

READ_WRITE = os.O_RDWR | os.O_CLOEXEC
PUNCH = syscalls.FALLOC_FL_KEEP_SIZE | 2  # FALLOC_FL_PUNCH_HOLE

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


def advise(descriptor: int, offset: int, length: int) -> None:
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


async def test_read_ahead_asks(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("advised")
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            await accessor.run(advise, descriptor, 16 * PAGE, 2 * PAGE)
            if side is kernel:
                # The next event is the read's: there was none before it.
                await accessor.run("pread", descriptor, 1, 0)
                assert listener.briefly() == [("PRE_ACCESS", 0, PAGE)]
            else:
                await listener.wait_for(
                    1
                )  # read-ahead does not wait for its pages, so neither did the accessor
                assert covers(listener.briefly(), 16 * PAGE, 2 * PAGE)


async def test_files_opened_before_the_mark(
    kernel: Side, exact: Side, first_access: Side, accessor: Accessor
) -> None:
    for side in (kernel, exact, first_access):
        descriptor = await accessor.run("open", side.file("early"), os.O_RDONLY)
        async with side.listening() as listener:
            await accessor.run("pread", descriptor, 1, 0)
            assert covers(listener.briefly(), 0, PAGE) == (side is not kernel)


def touch_page(path: str, page: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    return mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=page * 4096)[:1]


async def test_opened_while_a_page_waits(kernel: Side, exact: Side, make_accessor: MakeAccessor) -> None:
    """One more page is brought in meanwhile, so it is there when another process reads it."""
    for side in (kernel, exact):
        path = side.file("opened-meanwhile")
        first, second, third = make_accessor(), make_accessor(), make_accessor()

        def answer(event: Event, held: int = first.pid) -> int:
            return HOLD if event.pid == held else 0

        async with side.listening(answer=answer) as listener:
            call = first.start(touch_page, path, 4)
            await listener.wait_for(1)
            await second.run(touch_page, path, 8)
            descriptor = await third.run("open", path, os.O_RDONLY)
            listener.take()
            await third.run("pread", descriptor, PAGE, 8 * PAGE)
            assert listener.briefly() == ([("PRE_ACCESS", 8 * PAGE, PAGE)] if side is kernel else [])
            await third.run("pread", descriptor, PAGE, 9 * PAGE)
            assert listener.briefly() == [("PRE_ACCESS", 9 * PAGE, PAGE)]
            listener.release()
            await call.wait()


async def test_eviction_through_an_event_in_first_access_mode(
    kernel: Side, exact: Side, first_access: Side, private: Side, accessor: Accessor
) -> None:
    for side in (kernel, exact, first_access, private):
        path = side.file("evicted", PAGE)
        kept: list[int] = []
        content = [b"old"]

        def fill(event: Event, kept: list[int] = kept, content: list[bytes] = content) -> int:
            if not kept:
                kept.append(os.dup(event.fd))
            os.pwrite(event.fd, content[0], 0)
            return 0

        async with side.listening(event_f_flags=READ_WRITE, answer=fill) as listener:
            assert await accessor.run("pread_path", path, 3, 0) == b"old"
            (descriptor,) = kept
            await trio.to_thread.run_sync(syscalls.fallocate, descriptor, PUNCH, 0, PAGE)
            content[0] = b"new"
            listener.take()
            late = await accessor.run("pread_path", path, 3, 0)
            diverges = side is private and side.diverges("eviction through an event (first-access)")
            assert late == (b"old" if diverges else b"new")
            if diverges:
                await drop(path)
                assert await accessor.run("pread_path", path, 3, 0) == b"new"
            os.close(descriptor)


async def test_content_longer_than_the_stub_in_first_access_mode(
    kernel: Side, exact: Side, first_access: Side, private: Side, accessor: Accessor
) -> None:
    for side in (kernel, exact, first_access, private):
        path = side.file("longer", PAGE)

        def fill(event: Event) -> int:
            os.pwrite(event.fd, b"x" * (PAGE + 100), 0)
            return 0

        async with side.listening(event_f_flags=READ_WRITE, answer=fill):
            first = await accessor.run("pread_path", path, 2 * PAGE, 0)
            cut = side in (first_access, private)
            assert first == b"x" * (PAGE if cut else PAGE + 100)
            assert await accessor.run("pread_path", path, 2 * PAGE, 0) == b"x" * (PAGE + 100)


def read_twice(path: str) -> list[int]:
    """The errnos of two reads of one page; 0 for one that succeeds."""
    errors = []
    descriptor = os.open(path, os.O_RDONLY)
    for _ in range(2):
        try:
            os.pread(descriptor, 1, 0)
            errors.append(0)
        except OSError as error:
            errors.append(error.errno or -1)
    return errors


async def test_reads_after_a_denial(
    kernel: Side, first_access: Side, make_accessor: MakeAccessor, engine: str
) -> None:
    for side in (kernel, first_access):
        path = side.file("denied")
        async with side.listening(answer=lambda event: errno.EBUSY):
            assert await make_accessor().run(read_twice, path) == [errno.EBUSY] * 2
        # A thread's second read has not waited. pyfuse3 does not know whose call it is.
        late = errno.EBUSY if engine == "pyfuse3" else 0
        expected = [0, 0] if side is kernel else [errno.EBUSY, late]
        assert await make_accessor().run(read_twice, path) == expected
        async with side.listening() as listener:
            assert await make_accessor().run(read_twice, path) == [0, 0], "a listener is asked at once"
            assert covers(listener.briefly(), 0, PAGE)


async def test_first_access_events(exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (exact, first_access):
        path = side.file("twice")
        async with side.listening() as listener:
            for _ in range(2):
                await accessor.run("pread_path", path, 100, 10)
            heard = listener.briefly()
        if side is exact:
            assert heard == [("PRE_ACCESS", 0, PAGE)] * 2
        else:
            assert len(heard) == 1
            assert covers(heard, 0, PAGE)


@pytest.mark.parametrize("name", ["OPEN_PERM", "OPEN_EXEC_PERM", "ACCESS_PERM"])
async def test_permission_events_in_first_access_mode(first_access: Side, name: str) -> None:
    with pytest.raises(OSError) as caught:
        async with first_access.listening("PRE_ACCESS", name):
            pass
    assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("dialect", ["patch-v1", "patch-v2"])
async def test_opens_in_first_access_mode(private: Side, accessor: Accessor, dialect: str) -> None:
    path = private.file(f"opened-{dialect}")
    async with private.listening(dialect=dialect) as listener:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        opened = listener.briefly()
        await accessor.run("pread", descriptor, 100, 0)
        read = listener.briefly()
        await accessor.run("close", descriptor)
    assert opened == ([] if private.diverges("opens (first-access)") else [("PRE_ACCESS", 0, 0)])
    assert covers(read, 0, 100)


def send_twice(descriptor: int) -> None:
    for _ in range(2):
        reader, writer = os.pipe()
        os.sendfile(writer, descriptor, 10, 100)
        os.close(reader)
        os.close(writer)


def splice_twice(descriptor: int) -> None:
    for _ in range(2):
        reader, writer = os.pipe()
        os.splice(descriptor, writer, 100, offset_src=10)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("act", [send_twice, splice_twice])
async def test_sent_from_the_cache(kernel: Side, exact: Side, accessor: Accessor, act: Any) -> None:
    for side in (kernel, exact):
        path = side.file("sent")
        async with side.listening() as listener:
            await accessor.run(act, await accessor.run("open", path, os.O_RDONLY))
            heard = listener.briefly()
        assert heard == [("PRE_ACCESS", 0, PAGE)] * (1 if side.diverges("sent from the cache") else 2)


def send_through_two(path: str) -> None:
    target = os.memfd_create("target")
    for descriptor in [os.open(path, os.O_RDONLY) for _ in range(2)]:
        os.sendfile(target, descriptor, 10, 100)


async def test_sent_through_another_descriptor(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("sent-by-two")
        async with side.listening() as listener:
            await accessor.run(send_through_two, path)
            heard = listener.briefly()
        differs = side.diverges("sent from the cache") or side.diverges("sent through another descriptor")
        assert heard == [("PRE_ACCESS", 0, PAGE)] * (1 if differs else 2)


def flags_after_sending(descriptor: int) -> int:
    reader, writer = os.pipe()
    os.sendfile(writer, descriptor, 10, 100)
    os.close(reader)
    os.close(writer)
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


async def test_flags_of_sent_files(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("flags")
        async with side.listening():
            flags = await accessor.run(flags_after_sending, await accessor.run("open", path, os.O_RDONLY))
        assert bool(flags & os.O_DIRECT) is side.diverges("flags of sent files")


async def test_files_opened_before_the_mark_for_notifications(
    kernel: Side, per_file: Side, accessor: Accessor
) -> None:
    for side in (kernel, per_file):
        path = side.file("early")
        async with side.listening():
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            await accessor.run("pread", descriptor, 10, 0)
            async with side.listening("ACCESS_PERM") as listener:
                # The kernel arms a file when it is opened: there is no event on both sides.
                await accessor.run("pread", descriptor, 10, 0)
                assert listener.take() == []
                await accessor.run("pread_path", path, 10, 0)
                assert listener.briefly() == [("ACCESS_PERM", None, None)]
            async with side.listening("ACCESS") as listener:
                await accessor.run("pread", descriptor, 10, 0)
                await accessor.run("pread_path", path, 10, 0)
                await listener.wait_for(1 + (side is kernel))
                assert len(listener.take()) == 1 + (side is kernel)
