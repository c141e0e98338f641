"""Accessors that keep the daemon from reading what they are: it gives up on that, and goes on serving the others."""

import ctypes
import fcntl
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from fusehsm.emulator.accessor_threads import MOST, MOST_OF_A_USER, AccessorThreads
from fusehsm.events import Event
from tests.conftest import MakeAccessor, MakeMount
from tests.support.async_listener import HOLD, listening
from tests.support.harness import Mount
from tests.support.kernel_and_devfuse import engine as engine
from tests.support.requirements import require_root

pytestmark = [pytest.mark.fuse, pytest.mark.root]

CONTENT = bytes(range(256)) * 256


@pytest.fixture
def mount(make_mount: MakeMount) -> Mount:
    require_root()
    made = make_mount("--events", "exact")
    for name in ("file", "memory"):
        (made.source / name).write_bytes(CONTENT)
    return made


def hold_memory(event: Event) -> int:
    """The answer of a listener that lets one file wait for ever."""
    return HOLD if event.path.endswith("/memory") else 0


def open_epoll_that_is_locked(memory: str) -> int:
    """An epoll descriptor that the kernel keeps locked: a thread waits for a listener while it is told there of what is ready."""
    descriptor = os.open(memory, os.O_RDONLY)
    page = mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    reading, writing = os.pipe()
    os.write(writing, b"ready")
    poll = __import__("select").epoll()
    poll.register(reading, 1)
    number: int = os.dup(poll.fileno())
    wait = ctypes.CDLL(None).epoll_wait
    threading.Thread(target=wait, args=(number, ctypes.c_void_p(address), 1, -1), daemon=True).start()
    mmap.kept = poll, page  # type: ignore[attr-defined]
    return number


async def test_a_lock_of_a_descriptor_that_is_an_epoll_now(mount: Mount, make_accessor: MakeAccessor) -> None:
    """The daemon looks now and then whether the descriptor by which a lock was taken is still that file."""
    hostile, other = make_accessor(), make_accessor()
    async with listening(mount.path, answer=hold_memory) as listener:
        number = await hostile.run("open", str(mount.path / "file"), os.O_RDWR)
        await hostile.run(lock, number)
        epoll = await hostile.run(open_epoll_that_is_locked, str(mount.path / "memory"))
        await listener.wait_for(1)
        await hostile.run("dup2", epoll, number)
        # Not before the daemon has looked.
        descriptor = await other.run("open", str(mount.path / "file"), os.O_RDWR)
        await other.run(lock, descriptor)
        assert await other.run("pread", descriptor, 100, 0) == CONTENT[:100]


def lock(descriptor: int) -> None:
    fcntl.lockf(descriptor, fcntl.LOCK_EX)


async def test_a_write_through_a_descriptor_that_is_an_epoll_now(
    mount: Mount, make_accessor: MakeAccessor
) -> None:
    """The call's open file tells whether it appends, and it is another one by the time of the answer."""
    hostile, other = make_accessor(), make_accessor()
    path = mount.path / "file"

    def answer(event: Event) -> int:
        return HOLD if event.pid == hostile.pid else 0

    async with listening(mount.path, answer=answer) as listener:
        number = await hostile.run("open", str(path), os.O_WRONLY | os.O_APPEND)
        epoll = await hostile.run(open_epoll_that_is_locked, str(mount.path / "memory"))
        await listener.wait_for(1)
        await hostile.run(begin_to_write, number)
        await listener.wait_for(2)
        with (mount.source / "file").open("ab") as grown:
            grown.write(b"more")
        await hostile.run("dup2", epoll, number)
        (writing,) = [event for event in listener._held if not event.path.endswith("/memory")]
        listener._held.remove(writing)
        listener._finish(writing, 0)
        descriptor = await other.run("open", str(path), os.O_RDWR)
        assert await other.run("pread", descriptor, 100, 0) == CONTENT[:100]
    assert path.read_bytes() == CONTENT + b"more" + b"new"


def begin_to_write(descriptor: int) -> None:
    threading.Thread(target=os.write, args=(descriptor, b"new"), daemon=True).start()


@pytest.fixture
def silent(make_mount: MakeMount, tmp_path: Path) -> Iterator[Mount]:
    """A mount whose server is to be stopped: close(2) of its files never returns then."""
    made = make_mount("--events", "first-access", "--cache", "shared", source=None)
    (made.source / "file").write_bytes(CONTENT)
    yield made
    os.kill(made.pid, signal.SIGCONT)


async def test_a_foreign_file_in_place_of_a_sent_one_is_not_taken(
    mount: Mount, silent: Mount, make_accessor: MakeAccessor
) -> None:
    """After the answer the daemon changes a flag of the file that is sent. Another file is there by then."""
    hostile = make_accessor()
    async with listening(mount.path, answer=lambda event: HOLD) as listener:
        foreign = await hostile.run("open", str(silent.path / "file"), os.O_RDONLY)
        os.kill(silent.pid, signal.SIGSTOP)
        for turn in range(3):
            number = await hostile.run("open", str(mount.path / "file"), os.O_RDONLY)
            await hostile.run(begin_to_send, number, turn * 4096)
            await listener.wait_for(turn + 1)
            await hostile.run("dup2", foreign, number)
            before = await hostile.run(sent)
            listener.release()
            await hostile.run(until_sent, before + 4096)
        # The answer to a later request comes after all that.
        await hostile.run("listdir", str(mount.path))
        taken = [os.readlink(f"/proc/{mount.pid}/fd/{name}") for name in os.listdir(f"/proc/{mount.pid}/fd")]
        assert not [path for path in taken if path.startswith(str(silent.path))]
        os.kill(silent.pid, signal.SIGCONT)


def begin_to_send(descriptor: int, offset: int) -> None:
    if not hasattr(mmap, "target"):
        mmap.target = os.memfd_create("target")  # type: ignore[attr-defined]
    arguments = (mmap.target, descriptor, offset, 4096)  # type: ignore[attr-defined]
    threading.Thread(target=os.sendfile, args=arguments, daemon=True).start()


def sent() -> int:
    return os.fstat(mmap.target).st_size  # type: ignore[attr-defined]


def until_sent(size: int) -> None:
    while os.fstat(mmap.target).st_size < size:  # type: ignore[attr-defined]
        time.sleep(0.01)


async def test_the_threads_of_one_user_are_not_those_of_another(make_accessor: MakeAccessor) -> None:
    require_root()
    one, another = make_accessor(uid=54321, gid=54321), make_accessor(uid=54322, gid=54322)
    for accessor in (one, another):
        await accessor.run("getpid")  # it has its user by then
    threads, stuck = AccessorThreads(), threading.Event()
    asked = []

    def never(number: int) -> None:
        asked.append(number)
        stuck.wait()

    try:
        async with trio.open_nursery() as nursery:
            for number in range(3 * MOST_OF_A_USER):
                nursery.start_soon(threads.run, one.pid, never, number)
        # Each of them has been given up on, but none has ended.
        assert len(asked) == MOST_OF_A_USER
        assert await threads.run(one.pid, os.getpid) is None
        assert await threads.run(another.pid, os.getpid) == os.getpid()
    finally:
        stuck.set()


async def test_all_threads_together_are_bounded(make_accessor: MakeAccessor) -> None:
    require_root()
    threads, stuck = AccessorThreads(), threading.Event()
    users = [make_accessor(uid=54400 + each, gid=54400) for each in range(MOST // MOST_OF_A_USER + 2)]
    for user in users:
        await user.run("getpid")
    asked = []

    def never(user: Accessor) -> None:
        asked.append(user)
        stuck.wait()

    try:
        async with trio.open_nursery() as nursery:
            for user in users:
                for _ in range(MOST_OF_A_USER):
                    nursery.start_soon(threads.run, user.pid, never, user)
        assert len(asked) == MOST
    finally:
        stuck.set()
