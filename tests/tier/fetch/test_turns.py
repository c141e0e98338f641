"""The threads for calls that a user can make wait: what one file and one user can take of them, and how long another waits."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fusehsm.tier.fetch import turns as turns_module
from fusehsm.tier.fetch.turns import Stalled, Stuck, Turns, opened, watched
from fusehsm.tier.stubs.mark import Key

EVIL, VICTIM = 54321, 54322
DEADLINE = 0.3  # seconds
PATIENCE = 20  # seconds


def key(number: int) -> Key:
    return 0, number, 0


class Lock:
    """What calls wait for, as for a file's lock in the kernel: nothing interrupts the wait."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self.waiting = 0

    def wait(self) -> None:
        self.waiting += 1
        self._free.wait()

    def free(self) -> None:
        self._free.set()


@pytest.fixture
def lock() -> Iterator[Lock]:
    lock = Lock()
    yield lock
    lock.free()


@pytest.fixture
def turns() -> Turns:
    return Turns(DEADLINE, errno.EAGAIN, connections=4, most_waiting=16)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "_SLOW", 0.05)
    monkeypatch.setattr(turns_module, "_INTERVAL", 0.05)
    monkeypatch.setattr(turns_module, "PATIENCE", 0.3)


async def stick(turns: Turns, lock: Lock, number: int, uid: int) -> None:
    """A call on a file that does not answer by the deadline."""
    with pytest.raises(Stuck) as failed:
        await turns.run(key(number), uid, "path", lock.wait)
    assert (failed.value.errno, failed.value.filename) == (errno.EAGAIN, "path")


async def test_a_file_takes_one_thread_and_refuses_once_it_is_known(turns: Turns, lock: Lock) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(stick, turns, lock, 1, EVIL)
    assert lock.waiting == 1
    assert turns.is_stuck(key(1), EVIL)
    with trio.fail_after(DEADLINE / 2):
        await stick(turns, lock, 1, EVIL)
    assert await turns.run(key(2), EVIL, "", lambda: "done") == "done"
    lock.free()
    with trio.fail_after(PATIENCE):
        while turns.is_stuck(key(1), EVIL):
            await trio.sleep(0.01)
    assert await turns.run(key(1), EVIL, "", lambda: "done") == "done"


async def test_a_user_takes_a_few_threads_and_no_other_waits(turns: Turns, lock: Lock) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(stick, turns, lock, number, EVIL)
    assert lock.waiting == 8
    assert turns.is_stuck(key(99), EVIL)
    assert not turns.is_stuck(key(99), VICTIM)
    for uid in (VICTIM, 0):
        assert await turns.run(key(99), uid, "", lambda: "done") == "done"


async def test_files_of_root_may_be_locked_by_their_readers(turns: Turns, lock: Lock) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(stick, turns, lock, number, 0)
    assert await turns.run(key(99), 0, "", lambda: "done") == "done"


async def test_requests_for_one_users_files_leave_connections(turns: Turns, lock: Lock) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(turns.from_store, key(number), EVIL, lock.wait)
        await wait_all_tasks_blocked()
        assert await turns.from_store(key(99), VICTIM, lambda: "done") == "done"
        assert turns.connections.borrowed_tokens == 3
        nursery.cancel_scope.cancel()
    # The threads that were left alone keep their connections.
    assert turns.connections.borrowed_tokens == 3
    lock.free()
    with trio.fail_after(PATIENCE):
        while turns.connections.borrowed_tokens:
            await trio.sleep(0.01)


async def test_nothing_is_kept_of_files_and_users_that_are_done(turns: Turns, lock: Lock) -> None:
    await stick(turns, lock, 1, EVIL)
    lock.free()
    for number in range(10):
        await turns.run(key(number), VICTIM + number, "", lambda: None)
        await turns.from_store(key(number), VICTIM + number, lambda: None)
    with trio.fail_after(PATIENCE):
        while turns._files or turns._users:
            await trio.sleep(0.01)


async def test_one_user_has_a_share_of_those_who_wait(
    turns: Turns, lock: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 16: the others are refused, also those who came before the file was known not to answer."""
    users = {1: EVIL, 2: VICTIM}
    monkeypatch.setattr(turns_module, "user_of", users.get)
    refused = 0

    async def wait(pid: int, number: int, uid: int) -> None:
        nonlocal refused
        try:
            with turns.waiting(pid, key(number), uid, ""):
                await trio.sleep_forever()
        except Stuck:
            refused += 1

    async def until(number: int) -> None:
        with trio.fail_after(PATIENCE):
            while refused < number:
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.watch)
        for number, pid in ((1, 1), (2, 2)):
            for _ in range(5):
                nursery.start_soon(wait, pid, number, EVIL)
        await stick(turns, lock, 1, EVIL)
        await until(3)
        await wait(1, 1, EVIL)
        assert refused == 4
        # Others may wait for that file, and the same user for files that answer.
        nursery.start_soon(wait, 2, 1, EVIL)
        nursery.start_soon(wait, 1, 3, EVIL)
        await trio.sleep(0.2)
        assert refused == 4
        nursery.cancel_scope.cancel()


async def test_a_look_that_stands_still_is_left_alone(lock: Lock) -> None:
    count = 0

    def look() -> str:
        nonlocal count
        for _ in range(20):
            count += 1
            threading.Event().wait(0.05)
        return "seen"

    assert await watched(look, lambda: count, 0.5) == "seen"
    with pytest.raises(Stalled):
        await watched(lock.wait, lambda: 0, 0.1)
    with pytest.raises(ZeroDivisionError):
        await watched(lambda: 1 // 0, lambda: 0, 1)


async def test_a_descriptor_that_comes_too_late_is_closed(lock: Lock, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()

    def open_late() -> int:
        lock.wait()
        return os.open(path, os.O_RDONLY)

    def is_open() -> bool:
        return str(path) in [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]

    fd = await opened(lambda: os.open(path, os.O_RDONLY), "file")
    assert is_open()
    os.close(fd)
    closed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        close = os.close

        def close_and_tell(fd: int) -> None:
            close(fd)
            closed.append(fd)

        patch.setattr(os, "close", close_and_tell)
        with pytest.raises(OSError, match="does not answer") as failed:
            await opened(open_late, "file")
        assert failed.value.errno == errno.EBUSY
        lock.free()
        with trio.fail_after(PATIENCE):
            while not closed:
                await trio.sleep(0.01)
    assert not is_open()
