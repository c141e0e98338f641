"""Leases: no process has the file open, and an open(2) of it waits; one expectation for the real kernel's (fcntl(2)) and each engine's mounts."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from fusehsm import leased
from fusehsm.backends.punch import LeasedFile
from fusehsm.conform.accessor import Accessor
from fusehsm.control.client import ControlConnection, request
from fusehsm.control.protocol import Lease, LeaseStatus, Status, Unlease
from fusehsm.fanotify.abi import (
    FAN_MARK_ADD,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_REMOVE,
)
from fusehsm.linux.mountinfo import mount_of
from tests.conftest import MakeAccessor, MakeMount
from tests.support import harness
from tests.support.async_listener import HOLD
from tests.support.devfuse_acts import KEEP_SIZE, PUNCH_HOLE, fallocate_open
from tests.support.harness import PATIENCE
from tests.support.kernel_and_mount import CONTENT, PRE_ACCESS, SIZE, P, World

# Long enough to tell who waits from who does not.
MOMENT = 0.2  # seconds

IGNORE = FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY


@asynccontextmanager
async def lease_soon(path: str) -> AsyncIterator[LeasedFile]:
    """leased(), when a close(2) may not have reached the server yet."""
    with trio.fail_after(PATIENCE):
        while True:
            context = leased(path)
            try:
                file = await context.__aenter__()
                break
            except BlockingIOError:
                await trio.sleep(0.01)
    try:
        yield file
    except BaseException:
        await context.__aexit__(*sys.exc_info())
        raise
    await context.__aexit__(None, None, None)


async def is_refused(path: str) -> bool:
    try:
        async with leased(path):
            return False
    except BlockingIOError as error:
        assert error.errno == errno.EAGAIN
        return True


async def punch(file: LeasedFile) -> None:
    # On the real kernel it may have to wait for a listener.
    await trio.to_thread.run_sync(fallocate_open, file.descriptor, PUNCH_HOLE | KEEP_SIZE, 0, SIZE)


# Who keeps it from being granted


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
async def test_refused_while_open(world: World, accessor: Accessor, flags: int) -> None:
    path = world.file()
    descriptor = await accessor.run("open", path, flags)
    assert await is_refused(path)
    copy = await accessor.run("dup", descriptor)
    await accessor.run("close", descriptor)
    assert await is_refused(path)
    await accessor.run("close", copy)
    async with lease_soon(path) as file:
        assert os.pread(file.descriptor, SIZE, 0) == CONTENT[:SIZE]


@pytest.mark.parametrize(("shared", "writable"), [(False, False), (True, False), (True, True)])
async def test_refused_while_mapped(world: World, accessor: Accessor, shared: bool, writable: bool) -> None:
    """A mapping outlives its descriptor; what it has written is in the file when the lease is granted."""
    path = world.file()
    descriptor = await accessor.run("open", path, os.O_RDWR)
    mapping = await accessor.run("map_file", descriptor, SIZE, 0, shared, writable)
    await accessor.run("close", descriptor)
    assert await is_refused(path)
    if writable:
        await accessor.run("put", mapping, 5, b"new")
    await trio.sleep(MOMENT)
    assert await is_refused(path)
    await accessor.run("unmap", mapping)
    async with lease_soon(path) as file:
        expected = CONTENT[:5] + b"new" + CONTENT[8:20] if writable else CONTENT[:20]
        assert os.pread(file.descriptor, 20, 0) == expected


async def test_refused_while_running(world: World, accessor: Accessor) -> None:
    (world.backing / "program").write_bytes(Path("/bin/sleep").read_bytes())
    (world.backing / "program").chmod(0o755)
    path = str(world.path / "program")
    pid = await accessor.run(lambda path: subprocess.Popen([path, "100"]).pid, path)
    assert await is_refused(path)
    await accessor.run("kill", pid, signal.SIGKILL)
    await accessor.run("waitpid", pid, 0)
    async with lease_soon(path):
        pass


async def test_refused_while_open_on_the_backing(world: World) -> None:
    """As an event's descriptor is, through which its listener fills the file."""
    path = world.file()
    with (world.backing / "file").open("rb"):
        assert await is_refused(path)
    assert not await is_refused(path)


async def test_only_path(world: World) -> None:
    """O_PATH opens nothing, and is as good as a path."""
    descriptor = os.open(world.file(), os.O_PATH)
    try:
        async with leased(descriptor) as file:
            assert os.fstat(file.descriptor).st_size == SIZE
    finally:
        os.close(descriptor)


async def test_one_at_a_time(world: World) -> None:
    path, other = world.file(), world.file("other")
    async with leased(path):
        assert await is_refused(path)
        assert not await is_refused(other)
    assert not await is_refused(path)


async def test_not_regular(world: World) -> None:
    os.mkfifo(world.backing / "fifo")
    for path in (world.path, world.path / "fifo"):
        with pytest.raises(OSError, match="only regular files") as caught:
            await leased(path).__aenter__()
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        await leased(world.path / "absent").__aenter__()


async def test_refused_while_read_ahead(world: World, accessor: Accessor) -> None:
    """What is still being read for a file that was closed meanwhile keeps it open."""
    if world.is_kernel:
        return  # it asks nobody there, so that it cannot be held up
    path = world.file()
    mount = mount_of(path)
    async with world.listener(world.everywhere(PRE_ACCESS), answer=lambda event: HOLD) as listener:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        reading = accessor.start("posix_fadvise", descriptor, 0, SIZE, os.POSIX_FADV_WILLNEED)
        with trio.fail_after(PATIENCE):
            while not listener.take():
                await trio.sleep(0.01)
        await reading.wait()
        await accessor.run("close", descriptor)
        await trio.sleep(MOMENT)
        assert (await request(mount, Status()))["open_files"] == 1
        assert await is_refused(path)
        listener.release(0)
        async with lease_soon(path):
            assert (await request(mount, Status()))["open_files"] == 0


# Who waits


def open_and_read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 20)
    finally:
        os.close(descriptor)


async def test_open_waits(world: World, make_accessor: MakeAccessor) -> None:
    """A process that opens the file sees the hole. Only open(2) of this file waits."""
    path, other = world.file(), world.file("other")
    reader, writer, bystander = make_accessor(), make_accessor(), make_accessor()
    assert await bystander.run(open_and_read, path) == CONTENT[:SIZE]
    blocks = (await bystander.run("stat", path)).st_blocks
    async with lease_soon(path) as file:
        assert not await file.is_wanted()
        calls = reader.start(open_and_read, path), writer.start("pwrite_path", path, b"new", 0)
        await trio.sleep(MOMENT)
        assert not any(call.done for call in calls)
        assert await file.is_wanted()
        assert await bystander.run(open_and_read, other) == CONTENT[:SIZE]
        assert (await bystander.run("stat", path)).st_blocks == blocks
        await bystander.run("chmod", path, 0o640)
        with pytest.raises(BlockingIOError):
            await bystander.run("open", path, os.O_RDONLY | os.O_NONBLOCK)
        await punch(file)
        assert not any(call.done for call in calls)
    await calls[1].wait()
    assert (await calls[0].wait())[3:] == bytes(SIZE - 3)
    assert await bystander.run(open_and_read, path) == b"new" + bytes(SIZE - 3)
    seen = await bystander.run("stat", path)
    held = (world.backing / "file").stat()
    assert (seen.st_blocks, seen.st_mtime_ns) == (held.st_blocks, held.st_mtime_ns)
    assert stat.S_IMODE(seen.st_mode) == 0o640


@pytest.mark.parametrize(
    ("size", "act"),
    [
        (0, lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))),
        (0, lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CREAT))),
        (100, lambda path: os.truncate(path, 100)),
    ],
    ids=["O_TRUNC", "O_CREAT", "truncate"],
)
async def test_truncation_waits(
    world: World, accessor: Accessor, size: int, act: Callable[[str], None]
) -> None:
    path = world.file()
    async with leased(path) as file:
        call = accessor.start(act, path)
        await trio.sleep(MOMENT)
        assert not call.done
        assert os.fstat(file.descriptor).st_size == SIZE
        await punch(file)
    await call.wait()
    assert (await accessor.run("stat", path)).st_size == (world.backing / "file").stat().st_size == size


async def test_names_do_not_wait(world: World, accessor: Accessor) -> None:
    path, doomed, other = world.file(), world.file("doomed"), world.file("other")
    async with leased(path), leased(doomed):
        await accessor.run("rename", path, f"{path}-moved")
        await accessor.run("rename", other, f"{path}-moved")
        await accessor.run("unlink", doomed)
        assert await accessor.run(open_and_read, f"{path}-moved") == CONTENT[:SIZE]


async def test_event_after_the_lease(world: World, accessor: Accessor) -> None:
    """A listener hears of who waited when he reads, and fills the hole. Punching asks it, too, on the real kernel: an ignore mark spares that."""
    path = world.file()

    def answer(event: Any) -> int:
        os.pwrite(event.fd, CONTENT[:SIZE], 0)
        return 0

    mark = world.everywhere(PRE_ACCESS)
    async with world.listener(mark, answer=answer, event_f_flags=os.O_RDWR) as listener:
        async with leased(path) as file:
            call = accessor.start(open_and_read, path)
            await trio.sleep(MOMENT)
            await listener.group.mark(FAN_MARK_ADD | IGNORE, PRE_ACCESS, path=path)
            await punch(file)
            await listener.group.mark(FAN_MARK_REMOVE | IGNORE, PRE_ACCESS, path=path)
            assert os.pread(file.descriptor, 1, 0) == b"\0" if not world.is_kernel else True
            assert listener.take() == []
        assert await call.wait() == CONTENT[:SIZE]
        assert world.heard(listener.take())[0] == P(0, 1 << 20)


# How it ends


HOLDER = """
import sys, trio, fusehsm
async def hold():
    async with fusehsm.leased(sys.argv[1]):
        print("leased", flush=True)
        await trio.sleep_forever()
trio.run(hold)
"""


@contextmanager
def holder(path: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds a lease."""
    with harness.start([sys.executable, "-c", HOLDER, path]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "leased\n"
            yield process
        finally:
            process.kill()


async def test_killed_holder(world: World, accessor: Accessor) -> None:
    path = world.file()
    with holder(path) as process:
        call = accessor.start(open_and_read, path)
        await trio.sleep(MOMENT)
        assert not call.done
        process.kill()
        assert await call.wait() == CONTENT[:SIZE]
    async with lease_soon(path):
        pass


@pytest.mark.parametrize("act", [open_and_read, lambda path: os.truncate(path, 0)], ids=["open", "truncate"])
async def test_killed_waiter(world: World, accessor: Accessor, act: Callable[[str], Any]) -> None:
    path = world.file()
    async with leased(path) as file:
        accessor.start(act, path)
        await trio.sleep(MOMENT)
        accessor.kill()
        assert await trio.to_thread.run_sync(accessor.exited, 10)
        assert os.fstat(file.descriptor).st_size == SIZE
    assert (world.backing / "file").stat().st_size == SIZE


async def test_failed_holder(world: World, accessor: Accessor) -> None:
    """What the block raises is what comes out, and the lease has ended then."""
    path = world.file()
    with pytest.raises(ZeroDivisionError):
        async with leased(path):
            raise ZeroDivisionError
    with trio.move_on_after(0.01):
        async with leased(path):
            await trio.sleep_forever()
    assert await accessor.run(open_and_read, path) == CONTENT[:SIZE]


# The mount's own


def mount_with_breaks(make_mount: MakeMount, seconds: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A mount whose leases break so soon: fs.lease-break-time is the whole machine's."""
    program = f"from fusehsm.linux import syscalls; syscalls.lease_break_seconds = lambda: {seconds}"
    program += "; import sys; from fusehsm.cli import main; sys.exit(main())"
    monkeypatch.setattr(harness, "command_of", lambda uid: ((sys.executable, "-c", program), {}, {}))
    return make_mount("--events", "exact")


async def test_broken(make_mount: MakeMount, accessor: Accessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has waited for too long goes on, and the holder is told so."""
    mount = mount_with_breaks(make_mount, 0.5, monkeypatch)
    (mount.source / "file").write_bytes(CONTENT[:SIZE])
    path = str(mount.path / "file")
    async with leased(path):
        await trio.sleep(0.7)  # nobody waits
    context = leased(path)
    file = await context.__aenter__()
    started = trio.current_time()
    assert await accessor.run(open_and_read, path) == CONTENT[:SIZE]
    assert 0.4 < trio.current_time() - started < 5
    assert await file.is_wanted()
    with pytest.raises(TimeoutError, match="broken"):
        await context.__aexit__(None, None, None)
    async with lease_soon(path):
        pass


@pytest.mark.kernel
async def test_broken_by_the_kernel(kernel_events: Path) -> None:
    path = kernel_events / "broken"
    path.write_bytes(CONTENT[:SIZE])
    with pytest.raises(TimeoutError, match="broken"):
        async with leased(path) as file:
            fcntl.fcntl(file.descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


@pytest.mark.parametrize("events", ["exact", "first-access"])
async def test_nothing_cached_is_left(
    make_mount: MakeMount, make_accessor: MakeAccessor, events: str
) -> None:
    """Pages and attributes, also attributes that a process read during the lease."""
    mount = make_mount("--events", events, "--cache", "private" if events == "exact" else "shared")
    (mount.source / "file").write_bytes(CONTENT[:SIZE])
    path = str(mount.path / "file")
    reader, watcher = make_accessor(), make_accessor()
    for round_ in range(3):
        content = (CONTENT[:SIZE], bytes(SIZE))[round_ > 0]
        assert await reader.run(open_and_read, path) == content
        async with lease_soon(path) as file:
            call = reader.start(open_and_read, path)
            await watcher.run("stat", path)
            await punch(file)
            await watcher.run("stat", path)
        assert await call.wait() == bytes(SIZE)
        assert (
            (await watcher.run("stat", path)).st_blocks
            == (mount.source / "file").stat().st_blocks
            < SIZE >> 9
        )


@pytest.mark.engine("devfuse")
async def test_opens_that_nobody_hears_of(make_mount: MakeMount) -> None:
    mount = make_mount("--events", "first-access", "--cache", "private")
    (mount.source / "file").write_bytes(CONTENT[:SIZE])
    with pytest.raises(OSError, match="first-access") as caught:
        await leased(mount.path / "file").__aenter__()
    assert caught.value.errno == errno.EOPNOTSUPP


async def test_hostile_requests(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--events", "exact")
    (mount.source / "file").write_bytes(CONTENT[:SIZE])
    (mount.source / "directory").mkdir()
    (mount.source / "link").symlink_to("file")
    path = str(mount.path / "file")
    found = await trio.to_thread.run_sync(mount_of, path)
    numbers = {
        name: (await accessor.run("lstat", f"{mount.path}/{name}")).st_ino
        for name in ("file", "link", "directory")
    }
    connection = await ControlConnection.open(found)

    async def fails(message: Any) -> int:
        with pytest.raises(OSError) as caught:
            await connection.request(message)
        return caught.value.errno or 0

    lease = partial(Lease, *found.device)
    assert await fails(lease(1 << 63)) == errno.ESTALE
    assert await fails(Lease(0, 0, numbers["file"])) == errno.EXDEV
    assert await fails(lease(numbers["directory"])) == errno.EINVAL
    assert await fails(lease(numbers["link"])) == errno.EINVAL
    assert await fails(Unlease()) == errno.EBADF
    assert await fails(LeaseStatus()) == errno.EBADF
    _, descriptor = await connection.request(lease(numbers["file"]))
    assert descriptor is not None
    os.close(descriptor)
    assert await fails(lease(numbers["file"])) == errno.EBUSY
    assert (await request(found, Status()))["leases"] == [{"path": path, "waiting": 0}]
    await connection.request(Unlease())
    assert await fails(Unlease()) == errno.EBADF
    # And a client that goes in the middle.
    _, descriptor = await connection.request(lease(numbers["file"]))
    assert descriptor is not None
    os.close(descriptor)
    call = accessor.start(open_and_read, path)
    await trio.sleep(MOMENT)
    assert not call.done
    connection.close()
    assert await call.wait() == CONTENT[:SIZE]
