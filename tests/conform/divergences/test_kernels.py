"""The rows that hold on older kernels with every engine, each shown on the kernel that runs here. `make oldkernel` runs this on the old ones."""

import ctypes
import errno
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.divergences import DIVERGENCES
from tests.conform.divergences.sides import PAGE, Side
from tests.conftest import MakeAccessor
from tests.support.async_listener import HOLD
from tests.support.closing import close_in_child

pytestmark = pytest.mark.fuse

OLDER_KERNELS = sorted(entry.name for entry in DIVERGENCES if any(entry.until))


async def errno_of(call: Awaitable[object]) -> int:
    try:
        await call
    except OSError as error:
        return error.errno or 0
    return 0


async def shared_mapping(side: Side, make_accessor: MakeAccessor) -> bool:
    accessor, path = make_accessor(), side.file("mapped")
    async with side.listening():
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        number = await errno_of(accessor.run("map_file", descriptor, PAGE, 0, True))
    assert number in (0, errno.ENODEV)
    return number == errno.ENODEV


async def second_read_of_a_program(side: Side, make_accessor: MakeAccessor) -> bool:
    """Shown only by kernels that can load modules; those of distributions do."""
    path = side.backing / "program"
    # With the header of a real program, of which the kernel then reads the program headers.
    path.write_bytes(Path(sys.executable).read_bytes()[: 2 * PAGE])
    path.chmod(0o755)
    reads = iter([0])  # the first one finds the format

    async with side.listening(answer=lambda event: next(reads, errno.EIO)) as listener:
        assert await errno_of(make_accessor().run("execute", str(side.path / "program"))) == errno.ENOEXEC
        heard = listener.briefly()
    assert heard[:2] == [("PRE_ACCESS", 0, PAGE)] * 2
    assert heard[2:] in ([], [("PRE_ACCESS", 0, PAGE)])
    return len(heard) == 3


async def second_writer(side: Side, make_accessor: MakeAccessor) -> bool:
    path, writers = side.file("written"), [make_accessor(), make_accessor()]

    def is_asked() -> bool:
        return any(event.offset == PAGE for event in listener.heard)

    async with side.listening(answer=lambda event: HOLD) as listener:
        first = writers[0].start("pwrite_path", path, b"one", 0)
        await listener.wait_for(1)
        second = writers[1].start("pwrite_path", path, b"two", PAGE)
        waits = side.diverges("writers of one file")
        if not waits:
            await listener.wait_until(is_asked)
        assert is_asked() is not waits
        listener.release()
        await first.wait()
        await listener.wait_until(is_asked)
        listener.release()
        await second.wait()
    return waits


async def close_beside_a_writer(side: Side, make_accessor: MakeAccessor) -> bool:
    path, other = side.file("closing", 2 * PAGE), side.file("other")
    writer, reader = make_accessor(), make_accessor()
    async with side.listening(answer=lambda event: 0 if event.path == other else HOLD) as listener:
        descriptor = await reader.run("open", path, os.O_RDONLY)
        write = writer.start("pwrite_path", path, b"one", 0)
        await listener.wait_for(1)
        close = reader.start("close", descriptor)
        await make_accessor().run("read_file", other)
        waits = side.diverges("closing beside a writer")
        if waits:
            assert not close.done
        else:
            await close.wait()
        listener.release()
        await write.wait()
        await close.wait()
    return waits


async def unnamed_file(side: Side, make_accessor: MakeAccessor) -> bool:
    number = await errno_of(make_accessor().run("open", str(side.path), os.O_TMPFILE | os.O_RDWR))
    assert number in (0, errno.EOPNOTSUPP)
    return bool(number == errno.EOPNOTSUPP)


async def closing_process(side: Side, make_accessor: MakeAccessor) -> bool:
    accessor: Accessor = make_accessor()
    async with side.listening("CLOSE_WRITE") as listener:
        descriptor = await accessor.run("open", side.file("closed"), os.O_RDWR)
        child = await accessor.run(close_in_child, descriptor)
        await listener.wait_for(1)
        (event,) = listener.take()
    assert event.pid in (child, accessor.pid)
    return event.pid == accessor.pid


def allocate_zeros(path: str) -> int:
    """The errno of fallocate(2) with FALLOC_FL_ZERO_RANGE."""
    failed = libc.fallocate(os.open(path, os.O_RDWR), 0x10, ctypes.c_int64(0), ctypes.c_int64(100))
    return ctypes.get_errno() if failed else 0


async def zero_range(side: Side, make_accessor: MakeAccessor) -> bool:
    number = await make_accessor().run(allocate_zeros, side.file("zeros"))
    # pyfuse3 has no fallocate(2) at all: the row "fallocate".
    if side.diverges("fallocate"):
        assert number == errno.EOPNOTSUPP
        return side.diverges("zeros by fallocate")
    assert number in (0, errno.EOPNOTSUPP)
    return bool(number == errno.EOPNOTSUPP)


SHOWS: dict[str, Callable[[Side, MakeAccessor], Awaitable[bool]]] = {
    "shared mappings (exact)": shared_mapping,
    "programs that are read again": second_read_of_a_program,
    "writers of one file": second_writer,
    "closing beside a writer": close_beside_a_writer,
    "O_TMPFILE": unnamed_file,
    "zeros by fallocate": zero_range,
    "who closes": closing_process,
}


def test_every_such_row_is_shown() -> None:
    assert sorted(SHOWS) == OLDER_KERNELS


@pytest.mark.parametrize("name", SHOWS)
async def test_what_older_kernels_do(name: str, exact: Side, make_accessor: MakeAccessor) -> None:
    assert await SHOWS[name](exact, make_accessor) == exact.diverges(name)
