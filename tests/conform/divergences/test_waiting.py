"""Who waits for whom, and what becomes of the killed."""

import ctypes
import errno
import mmap
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.opening import open_group
from fusehsm.conform.accessor import Accessor, PendingCall
from fusehsm.daemon.control_server import MOST_GROUPS
from fusehsm.fanotify.abi import FAN_CLASS_PRE_CONTENT
from fusehsm.linux import system_call
from fusehsm.linux.mountinfo import mount_of
from tests.conform.divergences.sides import READ_ONLY, SIZE, Side
from tests.conftest import MakeAccessor
from tests.support.async_listener import HOLD, Listener
from tests.support.harness import PATIENCE

MMAP = (9, 222)  # x86-64, arm64

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


async def test_writers_of_one_file(kernel: Side, exact: Side, make_accessor: MakeAccessor) -> None:
    for side in (kernel, exact):
        path = side.file("written")
        writers = [make_accessor() for _ in range(2)]
        async with side.listening(answer=lambda event: HOLD) as listener:
            calls = [writer.start("pwrite_path", path, b"new", 0) for writer in writers]
            if side.diverges("writers of one file"):
                await one_after_the_other(listener, writers, calls)
            await listener.wait_for(2)
            listener.release()
            assert [await call.wait() for call in calls] == [3, 3]


async def one_after_the_other(
    listener: Listener, accessors: list[Accessor], calls: list[PendingCall]
) -> None:
    """Of two, the other's request can only come when the first one's event has been answered."""
    await listener.wait_for(1)
    waiting, done = sorted(
        zip(calls, accessors, strict=True), key=lambda c: c[1].pid == listener.heard[0].pid
    )
    assert listener.release() == 1
    await done[0].wait()
    assert not waiting[0].done


async def test_writers_past_the_end(kernel: Side, exact: Side, make_accessor: MakeAccessor) -> None:
    for side in (kernel, exact):
        for change in (("pwrite_path", b"new", SIZE - 1), ("truncate", SIZE + 1)):
            path = side.file("longer")
            accessors = [make_accessor() for _ in range(2)]
            async with side.listening(answer=lambda event: HOLD) as listener:
                calls = [accessor.start(change[0], path, *change[1:]) for accessor in accessors]
                if side.diverges("writers past the end"):
                    await one_after_the_other(listener, accessors, calls)
                await listener.wait_for(2)
                listener.release()
                for call in calls:
                    await call.wait()


def map_first_page(descriptor: int) -> bytes:
    return mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)[:1]


async def test_mapping_a_file_that_was_opened_before(
    kernel: Side, exact: Side, make_accessor: MakeAccessor
) -> None:
    """On a real kernel the killed process goes at once. Here it goes with the answer."""
    for side in (kernel, exact):
        path = side.file("opened-before")
        first, second = make_accessor(), make_accessor()
        async with side.listening(answer=lambda event: HOLD) as listener:
            descriptors = [await accessor.run("open", path, os.O_RDONLY) for accessor in (first, second)]
            touching = first.start(map_first_page, descriptors[0])
            await listener.wait_for(1)
            second.start(map_first_page, descriptors[1])
            await until_in_mmap(second)
            second.kill()
            if side is kernel:
                await trio.to_thread.run_sync(second.wait_exit)
            else:
                assert not await trio.to_thread.run_sync(second.exited, 0.3)
            listener.release()
            assert await touching.wait() == b"\0"
            assert await trio.to_thread.run_sync(second.wait_exit) == signal.SIGKILL


async def until_in_mmap(accessor: Accessor) -> None:
    with trio.fail_after(PATIENCE):
        while (call := system_call.call_of(accessor.pid)) is None or call.number not in MMAP:
            await trio.sleep(0.01)


async def test_killed_before_it_is_read(kernel: Side, exact: Side, make_accessor: MakeAccessor) -> None:
    for side in (kernel, exact):
        path = side.file("killed")
        accessor = make_accessor()
        async with open_group(side.path, ["PRE_ACCESS"], mark=side.mark, event_f_flags=READ_ONLY) as group:
            accessor.start("pread_path", path, 100, 0)
            await group.wait_readable()
            accessor.kill()
            await trio.to_thread.run_sync(accessor.wait_exit)
            if side is kernel:
                with pytest.raises(BlockingIOError):
                    group.take_events()
            else:
                (event,) = group.take_events()
                assert event.pid == accessor.pid
                group.answer(event, 0)
                os.close(event.fd)


def start_reader(descriptor: int) -> int:
    child = os.fork()
    if child == 0:
        os.pread(descriptor, 100, 0)
        os._exit(0)
    return child


def wait_for(child: int, options: int) -> tuple[int, int]:
    return os.waitpid(child, options)


async def test_killed_with_a_passed_descriptor(
    kernel: Side, exact: Side, make_accessor: MakeAccessor
) -> None:
    for side in (kernel, exact):
        path = side.file("passed")
        opener, witness = make_accessor(), make_accessor()
        async with side.listening(answer=lambda event: HOLD) as listener:
            descriptor = await opener.run("open", path, os.O_RDONLY)
            child = await opener.run(start_reader, descriptor)
            witness.start("pread_path", path, 100, 0)
            await listener.wait_for(2)
            os.kill(child, signal.SIGKILL)
            # This one was killed later and is gone, so the look for killed processes has passed the child since.
            witness.kill()
            await trio.to_thread.run_sync(witness.wait_exit)
            if side.diverges("killed with a passed descriptor"):
                assert await opener.run(wait_for, child, os.WNOHANG) == (0, 0)
                listener.release()
            assert await opener.run(wait_for, child, 0) == (child, signal.SIGKILL)
            listener.release()


def make_groups_as_somebody(number: int) -> tuple[int, int]:
    """As a user who has no group yet, and still may; how many were made, and the errno of the next."""
    pr_set_securebits, no_setuid_fixup, nobody_else = 28, 4, 54321
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(pr_set_securebits, ctypes.c_ulong(no_setuid_fixup), 0, 0, 0)
    os.setresuid(nobody_else, nobody_else, nobody_else)
    for made in range(number):
        if libc.fanotify_init(9, os.O_RDONLY) < 0:
            return made, ctypes.get_errno()
    return number, 0


async def test_limits(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    limit = int(Path("/proc/sys/fs/fanotify/max_user_groups").read_text())
    assert await accessor.run(make_groups_as_somebody, limit + 1) == (limit, errno.EMFILE)
    with ExitStack() as stack:

        async def make_group(side: Side) -> None:
            mount = mount_of(str(side.path))
            group = await EmulatedGroup.connect(mount, FAN_CLASS_PRE_CONTENT, READ_ONLY)
            stack.callback(group.close)

        for _ in range(MOST_GROUPS):
            await make_group(exact)
        with pytest.raises(OSError) as caught:
            await make_group(exact)
        assert caught.value.errno == errno.EMFILE
        await make_group(first_access)
