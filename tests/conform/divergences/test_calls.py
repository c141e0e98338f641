"""System calls: what they return and what is heard of them."""

import ctypes
import errno
import fcntl
import mmap
import os

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from fusehsm.conform.workloads import async_io
from tests.conform.divergences.sides import PAGE, SIZE, Side, covers
from tests.conftest import MakeAccessor
from tests.support.async_listener import HOLD

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


def seek_data_and_hole(descriptor: int) -> tuple[int, int]:
    return os.lseek(descriptor, 0, os.SEEK_DATA), os.lseek(descriptor, 0, os.SEEK_HOLE)


async def test_holes_are_data(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("stub", 0)
        os.truncate(side.backing / "stub", SIZE)
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            if side is kernel:
                with pytest.raises(OSError) as caught:  # no data at all
                    await accessor.run(seek_data_and_hole, descriptor)
                assert caught.value.errno == errno.ENXIO
            else:
                assert await accessor.run(seek_data_and_hole, descriptor) == (0, SIZE)
            own = await trio.to_thread.run_sync(os.open, path, os.O_RDONLY)
            if side.engine == "pyfuse3":
                assert await trio.to_thread.run_sync(seek_data_and_hole, own) == (0, SIZE)
            else:  # the listener, which is this process, sees the hole
                with pytest.raises(OSError) as caught:
                    await trio.to_thread.run_sync(seek_data_and_hole, own)
                assert caught.value.errno == errno.ENXIO
            await trio.to_thread.run_sync(os.close, own)
            assert listener.take() == []


def send_past_the_end(descriptor: int) -> int:
    return os.sendfile(os.memfd_create("target"), descriptor, 20480, 100)


async def test_empty_reads_and_writes(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("empty", size=20000)
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDWR)
            assert await accessor.run("pread", descriptor, 0, 0) == b""
            assert await accessor.run("pwrite", descriptor, b"", 0) == 0
            assert listener.briefly() == ([("PRE_ACCESS", 0, 0)] * 2 if side is kernel else [])
            assert await accessor.run(send_past_the_end, descriptor) == 0
            past = [("PRE_ACCESS", 5 * PAGE, PAGE)]
            assert listener.briefly() == (past if side is kernel else [])


def try_to_lock(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno or 0
    return 0


async def test_locks(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("locked")
        beneath = os.open(side.backing / "locked", os.O_RDWR)
        fcntl.flock(beneath, fcntl.LOCK_EX)
        expected = 0 if side.diverges("locks") else errno.EAGAIN
        assert await accessor.run(try_to_lock, path) == expected
        os.close(beneath)


async def test_locks_by_default(kernel: Side, private: Side, accessor: Accessor) -> None:
    for side in (kernel, private):
        path = side.file("locked")
        beneath = os.open(side.backing / "locked", os.O_RDWR)
        fcntl.flock(beneath, fcntl.LOCK_EX)
        assert await accessor.run(try_to_lock, path) == (errno.EAGAIN if side is kernel else 0)
        os.close(beneath)


def lock_and_close_another(path: str) -> int:
    """What another process gets after this one has locked the file and closed another descriptor of it."""
    locked, other = os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)
    fcntl.lockf(locked, fcntl.LOCK_EX)
    os.close(other)
    child = os.fork()
    if child == 0:
        try:
            fcntl.lockf(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def test_locks_and_other_descriptors(
    kernel: Side, exact: Side, first_access: Side, accessor: Accessor
) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("locked")
        stays = side.diverges("locks and other descriptors") if side is not kernel else False
        assert await accessor.run(lock_and_close_another, path) == (errno.EAGAIN if stays else 0)


def lock_a_directory(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


async def test_locks_of_directories(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        await accessor.run(lock_a_directory, str(side.path))
        beneath = os.open(side.backing, os.O_RDONLY)
        try:
            fcntl.flock(beneath, fcntl.LOCK_EX | fcntl.LOCK_NB)
            refused = False
        except BlockingIOError:
            refused = True
        os.close(beneath)
        assert refused is (side is kernel)


def open_by_handle(path: str, tries: int) -> int:
    """The errno of opening a file by its handle, after the kernel was made to forget what it can; 0 if that works after each of the tries."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = ctypes.create_string_buffer(b"\x80" + bytes(7), 136)  # struct file_handle, room for 128 bytes
    mount_id = ctypes.c_int()
    if libc.name_to_handle_at(-100, path.encode(), handle, ctypes.byref(mount_id), 0):
        return -ctypes.get_errno()
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        for _ in range(tries):
            with open("/proc/sys/vm/drop_caches", "w") as caches:
                caches.write("2")
            found = libc.open_by_handle_at(directory, handle, os.O_RDONLY)
            if found < 0:
                return ctypes.get_errno()
            os.close(found)
    finally:
        os.close(directory)
    return 0


async def test_file_handles(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("handled")
        tries = 2 if side is kernel else 50
        assert await accessor.run(open_by_handle, path, tries) == (0 if side is kernel else errno.ESTALE)


def get_flags(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, 0x80086601, bytes(8))  # FS_IOC_GETFLAGS
    except OSError as error:
        return error.errno or 0
    return 0


async def test_ioctls_of_files(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("flagged")
        expected = errno.ENOTTY if side.diverges("ioctls of files") else 0
        for name in (path, os.path.dirname(path)):
            assert await accessor.run(get_flags, name) == expected


def map_extents(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, 0xC020660B, bytes(8) + b"\xff" * 8 + bytes(16))  # FS_IOC_FIEMAP
    except OSError as error:
        return error.errno or 0
    return 0


async def test_maps_of_extents(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("mapped")
        async with side.listening() as listener:
            assert await accessor.run(map_extents, path) == (0 if side is kernel else errno.EOPNOTSUPP)
            assert listener.take() == []


def call_fallocate(descriptor: int, length: int) -> int:

    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(length))
    return ctypes.get_errno() if failed else 0


async def test_fallocate(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("allocated")
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDWR)
            error = await accessor.run(call_fallocate, descriptor, 100)
            assert (error, listener.briefly()) == (
                (errno.EOPNOTSUPP, []) if side.diverges("fallocate") else (0, [("PRE_ACCESS", 0, PAGE)])
            )


def collapse(path: str, mode: int) -> int:
    descriptor = os.open(path, os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.fallocate(descriptor, mode, ctypes.c_int64(4096), ctypes.c_int64(4096))
    return ctypes.get_errno() if failed else 0


@pytest.mark.parametrize("mode", [8, 0x20, 0x40], ids=["COLLAPSE", "INSERT", "UNSHARE"])
async def test_fallocate_modes(
    kernel: Side, exact: Side, first_access: Side, accessor: Accessor, mode: int
) -> None:
    for side in (kernel, exact, first_access):
        path = side.file(f"collapsed-{mode}", size=4 * PAGE)
        async with side.listening() as listener:
            error = await accessor.run(collapse, path, mode)
            ext4_has_it = mode != 0x40 and side is kernel
            assert error == (0 if ext4_has_it else errno.EOPNOTSUPP)
            assert listener.briefly() == ([("PRE_ACCESS", PAGE, PAGE)] if side is kernel else [])


def read_nowait(descriptor: int) -> int:
    return os.preadv(descriptor, [bytearray(10)], 0, os.RWF_NOWAIT)


async def test_rwf_nowait(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("now")
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            if side is kernel:
                assert await accessor.run(read_nowait, descriptor) == 10
                assert listener.briefly() == [("PRE_ACCESS", 0, PAGE)]
            else:
                with pytest.raises(OSError) as caught:
                    await accessor.run(read_nowait, descriptor)
                assert caught.value.errno == errno.EOPNOTSUPP


def read_into_nowhere(descriptor: int) -> int:

    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.pread(descriptor, ctypes.c_void_p(8), ctypes.c_size_t(100), ctypes.c_long(0))
    return ctypes.get_errno() if done < 0 else 0


async def test_calls_that_fail(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("failing")
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            assert await accessor.run(read_into_nowhere, descriptor) == errno.EFAULT
            with pytest.raises(PermissionError):
                await accessor.run("map_file", descriptor, PAGE, 0, True, True)
            assert listener.briefly() == ([("PRE_ACCESS", 0, PAGE)] * 2 if side is kernel else [])


async def test_unnamed_files(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        flags = os.O_TMPFILE | os.O_RDWR
        if not side.diverges("O_TMPFILE"):
            assert await accessor.run("open", str(side.path), flags) >= 0
            continue
        with pytest.raises(OSError) as caught:
            await accessor.run("open", str(side.path), flags)
        assert caught.value.errno == errno.EOPNOTSUPP


async def test_blocks_of_stubs(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("untouched", 0)
        os.truncate(side.backing / "untouched", SIZE)
        async with side.listening():
            status = await accessor.run("stat", path)
        assert (status.st_size, status.st_blocks) == (SIZE, 0 if side is kernel else 1)


async def test_blocks_of_stubs_for_the_listener(kernel: Side, exact: Side, first_access: Side) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("looked-at", 0)
        os.truncate(side.backing / "looked-at", SIZE)
        async with side.listening():
            status = await trio.to_thread.run_sync(os.stat, path)  # this process is the listener
        assert status.st_blocks == (0 if side is kernel else 1)


async def test_rename_whiteout(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("white")
        if side is kernel:
            await accessor.run(rename_leaving_a_whiteout, path, path + ".new")
            assert os.path.exists(path + ".new")
            continue
        with pytest.raises(OSError) as caught:
            await accessor.run(rename_leaving_a_whiteout, path, path + ".new")
        assert caught.value.errno == errno.EINVAL
        assert not os.path.exists(path + ".new")


def rename_leaving_a_whiteout(old: str, new: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_whiteout = -100, 4
    if libc.renameat2(at_fdcwd, old.encode(), at_fdcwd, new.encode(), rename_whiteout):
        raise OSError(ctypes.get_errno(), "renameat2")


def read_direct(path: str, offset: int, count: int) -> int:
    return os.preadv(os.open(path, os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, count)], offset)


def write_direct(path: str, offset: int, count: int) -> int:
    return os.pwritev(os.open(path, os.O_WRONLY | os.O_DIRECT), [mmap.mmap(-1, count)], offset)


def map_synchronously(path: str) -> int:
    return mmap.mmap(os.open(path, os.O_RDWR), 4096, mmap.MAP_SHARED | 0x80000, mmap.PROT_READ)[0]


async def test_what_ext4_refuses(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("direct")
        async with side.listening():
            for act in (read_direct, write_direct):
                for offset, count in ((100, PAGE), (PAGE, 100)):
                    if side is kernel:
                        with pytest.raises(OSError) as caught:
                            await accessor.run(act, path, offset, count)
                        assert caught.value.errno == errno.EINVAL
                    else:
                        assert await accessor.run(act, path, offset, count) == count
            if side is kernel:
                with pytest.raises(OSError) as caught:
                    await accessor.run(map_synchronously, path)
                assert caught.value.errno == errno.EOPNOTSUPP
            elif not side.diverges("shared mappings (exact)"):
                assert await accessor.run(map_synchronously, path) == 0


async def test_requests_submitted_together(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("together")
        async with side.listening(answer=lambda event: HOLD) as listener:
            call = accessor.start(
                async_io.submit_requests, path, [(async_io.PREAD, 0, 100), (async_io.PREAD, 2 * PAGE, 100)]
            )
            if side is kernel:
                # The second is asked for when the first has been answered.
                await listener.wait_for(1)
                assert listener.release() == 1
            await listener.wait_for(2)
            assert listener.release() == (1 if side is kernel else 2)
            assert await call.wait() == (2, [(0, 100), (1, 100)], bytes(200))


async def test_asynchronous_requests(kernel: Side, exact: Side, accessor: Accessor) -> None:
    much = 3 << 20
    for side in (kernel, exact):
        path = side.file("asynchronous", 4 << 20)
        for act, opcode in (
            (async_io.submit_requests, async_io.PREAD),
            (async_io.submit_entry, async_io.READ),
        ):
            arguments = ([(opcode, 0, much)],) if act is async_io.submit_requests else (opcode, 0, much)
            async with side.listening() as listener:
                *_, data = await accessor.run(act, path, *arguments)
                assert data == bytes(much)
                heard = listener.briefly()
                assert (heard == [("PRE_ACCESS", 0, much)]) is (side is kernel)
                assert all(covers(heard, at, PAGE) for at in range(0, much, PAGE))
        async with side.listening() as listener:
            await accessor.run(
                async_io.submit_requests, path, [(async_io.PWRITE, 0, 100)], os.O_WRONLY | os.O_APPEND
            )
            at = 0 if side is kernel else 4 << 20
            assert listener.briefly() == [("PRE_ACCESS", at, PAGE)]
        async with side.listening(answer=lambda event: errno.EIO):
            if side is kernel:
                with pytest.raises(OSError) as caught:
                    await accessor.run(async_io.submit_requests, path, [(async_io.PREAD, 0, 100)])
                assert caught.value.errno == errno.EIO
            else:
                failed = await accessor.run(async_io.submit_requests, path, [(async_io.PREAD, 0, 100)])
                assert failed == (1, [(0, -errno.EIO)], b"")


async def test_eagain_for_io_uring(kernel: Side, exact: Side, make_accessor: MakeAccessor) -> None:
    for side in (kernel, exact):
        path = side.file("again")
        accessor = make_accessor()
        async with side.listening(answer=lambda event: errno.EAGAIN) as listener:
            call = accessor.start(async_io.submit_entry, path, async_io.READ, 0, 100)
            if side is kernel:
                assert (await call.wait())[0] == -errno.EAGAIN
                assert len(listener.briefly()) == 2
            else:
                await listener.wait_for(5)
                assert not call.done
