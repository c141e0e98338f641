"""What a listener has answered counts, whatever it does next: it closes its group at once, or is killed."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import trio

from fusehsm.conform.accessor import Accessor, AccessorDied
from fusehsm.events import Event
from fusehsm.fanotify.abi import FAN_MARK_ADD
from fusehsm.linux.proc import threads_of
from tests.conftest import MakeAccessor, MakeMount
from tests.support.handler_sites import Site
from tests.support.harness import PATIENCE, start
from tests.support.kernel_and_mount import PAGE, PRE_ACCESS, World

pytest_plugins = ["tests.support.handler_fixtures"]

FEW = 50
READERS = 150  # more answers than the mount's server takes before others get their turn


def refused_reads(path: str, number: int, step: int) -> list[int]:
    """The errnos of so many reads at once, `step` bytes apart, each by a thread with an open file of its own; 0 for one that succeeds."""
    errors = [0] * number

    def read(index: int) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.pread(descriptor, 1, index * step)
        except OSError as error:
            errors[index] = error.errno or -1
        finally:
            os.close(descriptor)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def refused_then_read(path: str) -> list[int]:
    """The errnos of two reads of one thread, one after the other; 0 for one that succeeds."""
    errors = [0, 0]
    descriptor = os.open(path, os.O_RDONLY)
    for index in range(2):
        try:
            os.pread(descriptor, 1, 0)
        except OSError as error:
            errors[index] = error.errno or -1
    return errors


def until_asleep(pids: list[int], number: int) -> None:
    """Return when so many threads of these processes wait for a page."""
    deadline = time.monotonic() + PATIENCE
    while sum(is_waiting(pid, tid) for pid in pids for tid in threads_of(pid)) < number:
        assert time.monotonic() < deadline, "they do not wait"
        time.sleep(0.01)


def is_waiting(pid: int, tid: int) -> bool:
    """Whether a thread is in state D."""
    with open(f"/proc/{pid}/task/{tid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "D"


@contextmanager
def busy(world: World) -> Iterator[None]:
    """Meanwhile the mount's server gets nothing done."""
    if world.daemon is None:
        yield
        return
    os.kill(world.daemon, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(world.daemon, signal.SIGCONT)


async def taken(group: Any, number: int) -> list[Event]:
    """The next so many events."""
    events: list[Event] = []
    with trio.fail_after(PATIENCE):
        while len(events) < number:
            await group.wait_readable()
            with suppress(BlockingIOError):
                events += group.take_events()
    return events


async def test_a_group_that_is_closed_at_once(world: World, accessor: Accessor) -> None:
    path = world.file(size=READERS * PAGE)
    group = await world.open_group()
    await group.mark(FAN_MARK_ADD, PRE_ACCESS, path=path)
    call = accessor.start(refused_reads, path, READERS, PAGE)
    events = await taken(group, READERS)
    with busy(world):
        for event in events:
            os.close(event.fd)
            group.answer(event, errno.EBUSY)
        group.close()
    assert await call.wait() == [errno.EBUSY] * READERS


async def test_a_group_that_is_closed_with_events_unread(world: World, make_accessor: MakeAccessor) -> None:
    path = world.file(size=(READERS + 1) * PAGE)
    refused, late = make_accessor(), make_accessor()
    group = await world.open_group()
    await group.mark(FAN_MARK_ADD, PRE_ACCESS, path=path)
    calls = [refused.start(refused_reads, path, READERS, PAGE)]
    events = await taken(group, READERS)
    calls.append(late.start("pread_path", path, 1, READERS * PAGE))
    await group.wait_readable()
    with busy(world):
        for event in events:
            os.close(event.fd)
            group.answer(event, errno.EBUSY)
        group.close()
    assert await calls[0].wait() == [errno.EBUSY] * READERS
    assert len(await calls[1].wait()) == 1, "what was not read is allowed"


async def test_a_group_in_this_process(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", READERS * PAGE)
    async with site.group() as group:
        call = accessor.start(refused_reads, path, READERS, PAGE)
        for event in await taken(group, READERS):
            os.close(event.fd)
            group.answer(event, errno.EBUSY)
    assert await call.wait() == [errno.EBUSY] * READERS


LISTENER = """
import os, signal, sys, trio
from fusehsm.backends.opening import open_group

async def main():
    path, number = sys.argv[1], int(sys.argv[2])
    async with open_group(path, ("PRE_ACCESS",), mark="inode") as group:
        print("ready", flush=True)
        events = []
        while len(events) < number:
            await group.wait_readable()
            try:
                events += group.take_events()
            except BlockingIOError:
                pass
        print("taken", flush=True)
        sys.stdin.readline()
        for event in events:
            group.answer(event, 16)
        os.kill(os.getpid(), signal.SIGKILL)

trio.run(main)
"""


async def test_a_listener_that_is_killed(world: World, accessor: Accessor) -> None:
    path = world.file(size=READERS * PAGE)
    command = [sys.executable, "-c", LISTENER, path, str(READERS)]
    with start(command, stdin=subprocess.PIPE) as listener:
        try:
            assert listener.stdin is not None
            assert listener.stdout is not None
            assert await trio.to_thread.run_sync(listener.stdout.readline) == "ready\n"
            call = accessor.start(refused_reads, path, READERS, PAGE)
            assert await trio.to_thread.run_sync(listener.stdout.readline) == "taken\n"
            with busy(world):
                listener.stdin.write("\n")
                listener.stdin.flush()
                await trio.to_thread.run_sync(listener.wait, PATIENCE)
            assert await call.wait() == [errno.EBUSY] * READERS
        finally:
            listener.kill()


# The kernel asks more than once for a page that was refused


async def test_reads_into_the_page_cache(make_mount: MakeMount, accessor: Accessor) -> None:
    """Of one page: they wait for it one after the other, and each is asked about once."""
    mount = make_mount("--events", "first-access", "--cache", "private")
    world = World("first-access", mount.source, mount.path, mount.pid)
    path = world.file(size=16 * PAGE)
    group = await world.open_group()
    await group.mark(FAN_MARK_ADD, PRE_ACCESS, path=path)
    call = accessor.start(refused_reads, path, FEW, 0)
    for _ in range(FEW):
        (event,) = await taken(group, 1)
        os.close(event.fd)
        group.answer(event, errno.EBUSY)
    group.close()
    assert 0 not in await call.wait()


async def test_reads_that_wait_behind_a_denied_one(
    make_mount: MakeMount, make_accessor: MakeAccessor, engine: str
) -> None:
    """The listener denies all that it has and closes its group: no waiting access is allowed."""
    mount = make_mount("--events", "first-access", "--cache", "private")
    world = World("first-access", mount.source, mount.path, mount.pid)
    path = world.file(size=16 * PAGE)
    waiting, later = make_accessor(), make_accessor()
    group = await world.open_group()
    await group.mark(FAN_MARK_ADD, PRE_ACCESS, path=path)
    call = waiting.start(refused_reads, path, FEW, 0)
    (event,) = await taken(group, 1)
    # They wait for the page in the kernel, which makes no request and no event.
    await trio.to_thread.run_sync(until_asleep, [waiting.pid], FEW - 1)
    os.close(event.fd)
    with busy(world):
        group.answer(event, errno.EBUSY)
        group.close()
    assert await call.wait() == [errno.EBUSY] * FEW
    # A thread's next call did not wait. pyfuse3 does not know whose call it is.
    assert await later.run(refused_then_read, path) == [
        errno.EBUSY,
        0 if engine == "devfuse" else errno.EBUSY,
    ]


async def test_faults_that_wait_behind_a_denied_one(
    make_mount: MakeMount, make_accessor: MakeAccessor
) -> None:
    mount = make_mount("--events", "exact")
    world = World("emulator", mount.source, mount.path, mount.pid)
    path = world.file(size=PAGE)
    group = await world.open_group()
    await group.mark(FAN_MARK_ADD, PRE_ACCESS, path=path)
    accessors = [make_accessor() for _ in range(5)]
    mappings = []
    for accessor in accessors:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        mappings.append(await accessor.run("map_file", descriptor, PAGE))
    calls = [
        accessor.start("touch", mapping, 0) for accessor, mapping in zip(accessors, mappings, strict=True)
    ]
    (event,) = await taken(group, 1)
    await trio.to_thread.run_sync(until_asleep, [accessor.pid for accessor in accessors], 4)
    os.close(event.fd)
    with busy(world):
        group.answer(event, errno.EBUSY)
        group.close()
    for call in calls:
        with pytest.raises(AccessorDied) as died:
            await call.wait()
        assert died.value.signal == signal.SIGBUS


async def test_a_page_fault(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--events", "exact")
    world = World("emulator", mount.source, mount.path, mount.pid)
    path = world.file(size=PAGE)
    group = await world.open_group()
    await group.mark(FAN_MARK_ADD, PRE_ACCESS, path=path)
    descriptor = await accessor.run("open", path, os.O_RDONLY)
    mapping = await accessor.run("map_file", descriptor, PAGE)
    call = accessor.start("touch", mapping, 0)
    (event,) = await taken(group, 1)
    os.close(event.fd)
    with busy(world):
        group.answer(event, errno.EBUSY)
        group.close()
    with pytest.raises(AccessorDied) as died:
        await call.wait()
    assert died.value.signal == signal.SIGBUS
