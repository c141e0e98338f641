"""Mappings and programs: what the emulator does otherwise."""

import ctypes
import errno
import mmap
import os
import shutil
import signal
import time

import pytest
import trio

from fusehsm.conform.accessor import Accessor, AccessorDied
from tests.conform.divergences.sides import PAGE, PERMISSION_EVENTS, Side, covers
from tests.conftest import MakeAccessor

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


async def test_mappings_ask_when_touched(
    kernel: Side, exact: Side, first_access: Side, make_accessor: MakeAccessor
) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("mapped")
        accessor = make_accessor()
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            number = await accessor.run("map_file", descriptor, 2 * PAGE, PAGE)
            at_mmap = listener.briefly()
            await accessor.run("touch", number, 0)
            at_touch = listener.briefly()
        if side is kernel:
            assert (at_mmap, at_touch) == ([("PRE_ACCESS", PAGE, 2 * PAGE)], [])
        else:
            assert at_mmap == []
            assert covers(at_touch, PAGE, PAGE)

        path = side.file("denied")
        async with side.listening(answer=lambda event: errno.EIO):
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            if side is kernel:
                with pytest.raises(OSError) as denied:
                    await accessor.run("map_file", descriptor, 2 * PAGE, PAGE)
                assert denied.value.errno == errno.EIO
            else:
                number = await accessor.run("map_file", descriptor, 2 * PAGE, PAGE)
                with pytest.raises(AccessorDied) as died:
                    await accessor.run("touch", number, 0)
                assert died.value.signal == signal.SIGBUS


async def test_shared_mappings_in_exact_mode(exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (exact, first_access):
        path = side.file("shared")
        async with side.listening():
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            if side is exact and side.diverges("shared mappings (exact)"):
                with pytest.raises(OSError) as caught:
                    await accessor.run("map_file", descriptor, PAGE, 0, True)
                assert caught.value.errno == errno.ENODEV
            else:
                assert (
                    await accessor.run("touch", await accessor.run("map_file", descriptor, PAGE, 0, True), 0)
                    == b"\0"
                )


def map_twice(descriptor: int) -> None:
    for _ in range(2):
        mmap.mmap(descriptor, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)[0]


async def test_pages_in_the_cache(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("cached")
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            await accessor.run(map_twice, descriptor)
            assert listener.briefly() == [("PRE_ACCESS", 0, PAGE)] * (2 if side is kernel else 1)
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            await accessor.run(map_twice, descriptor)
            assert listener.briefly() == [("PRE_ACCESS", 0, PAGE)] * (2 if side is kernel else 1)


async def test_program_start(kernel: Side, exact: Side, accessor: Accessor) -> None:
    ranges = []
    program = shutil.which("true")
    assert program is not None
    for side in (kernel, exact):
        shutil.copy(program, side.backing / "program")
        async with side.listening(*PERMISSION_EVENTS) as listener:
            assert await accessor.run("execute", str(side.path / "program")) == (0, b"")
            heard = listener.briefly()
        assert [name for name, _, _ in heard[:4]] == [
            "OPEN_EXEC_PERM",
            "OPEN_PERM",
            "PRE_ACCESS",
            "ACCESS_PERM",
        ]
        ranges.append([event for event in heard if event[0] == "PRE_ACCESS"])
    assert ranges[0] != ranges[1]


def write_while_it_runs(path: str) -> int:
    child = os.fork()
    if child == 0:
        os.execve(path, [path, "1000"], {})
    while os.readlink(f"/proc/{child}/exe") != path:
        time.sleep(0.001)
    try:
        os.close(os.open(path, os.O_WRONLY))
        return 0
    except OSError as error:
        return error.errno or 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def start_while_it_is_written(path: str) -> int:
    """The errno of execve(2)."""
    descriptor = os.open(path, os.O_WRONLY)
    child = os.fork()
    if child == 0:
        try:
            os.execve(path, [path, "0"], {})
        except OSError as error:
            os._exit(error.errno or 0)
    _, status = os.waitpid(child, 0)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(status)


async def test_running_programs(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    program = shutil.which("sleep")
    assert program is not None
    for side in (kernel, exact, first_access):
        shutil.copy(program, side.backing / "running")
        async with side.listening():
            written = await accessor.run(write_while_it_runs, str(side.path / "running"))
            started = await accessor.run(start_while_it_is_written, str(side.path / "running"))
        assert written == started == (0 if side is kernel else errno.ETXTBSY)


@pytest.mark.parametrize("flag", [0x8000, 0x2000, 0], ids=["MAP_POPULATE", "MAP_LOCKED", "mlock"])
async def test_denied_while_it_is_mapped(
    kernel: Side, exact: Side, first_access: Side, make_accessor: MakeAccessor, flag: int
) -> None:
    for side in (kernel, exact, first_access):
        path = side.file(f"populated-{flag}")
        accessor = make_accessor()
        async with side.listening(answer=lambda event: errno.EIO) as listener:
            call = accessor.start(map_at_once, path, flag)
            if side is kernel:
                with pytest.raises(OSError) as caught:
                    await call.wait()
                assert caught.value.errno == errno.EIO
                assert len(listener.briefly()) == 1
            else:
                await listener.wait_for(5)
                assert not call.done
                accessor.kill()
                await trio.to_thread.run_sync(accessor.wait_exit)


def map_at_once(path: str, flag: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    descriptor = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, 8192, protection, mmap.MAP_PRIVATE | flag, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    if not flag:
        libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(8192))


async def test_pages_not_yet_written(
    kernel: Side, exact: Side, first_access: Side, accessor: Accessor
) -> None:
    for side in (kernel, exact, first_access):
        if side is exact and side.diverges("shared mappings (exact)"):
            continue
        path = side.file("dirty")
        backing = str(side.backing / "dirty")
        async with side.listening():
            descriptor = await accessor.run("open", path, os.O_RDWR)
            number = await accessor.run("map_file", descriptor, PAGE, 0, True, True)
            await accessor.run("put", number, 0, b"new")
            at_once = await accessor.run("pread_path", backing, 3, 0)
            await accessor.run("close", descriptor)
            at_close = await accessor.run("pread_path", backing, 3, 0)
            await accessor.run("unmap", number)
            in_the_end = await accessor.run("pread_path", backing, 3, 0)
        assert in_the_end == b"new"
        assert (at_once == b"new") is (side is kernel)
        assert (at_close == b"new") is (side is not exact)
