"""What fetch remembers of files does not grow with the files that come and go."""

import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from fusehsm.events import Event
from fusehsm.fanotify.abi import LINUX_6_14
from fusehsm.tier.fetch.handler import Fetcher, Policy
from fusehsm.tier.fetch.served import Served
from fusehsm.tier.stores.open import open_store
from fusehsm.tier.stubs.mark import Key, key_of
from fusehsm.tier.stubs.tree import Namespace, Tree
from tests.support.requirements import require_root
from tests.support.tier.populated import plant

MOST = 16
SIZE = 3000


@asynccontextmanager
async def fetcher(store: Path, target: Path) -> AsyncIterator[Fetcher]:
    policy = Policy(most_known=MOST, deadline=10)
    tree = Tree(Namespace.TRUSTED, (Namespace.TRUSTED,), b"12345678")
    with open_store(str(store)) as opened:
        async with trio.open_nursery() as nursery:
            yield Fetcher(opened, str(target), tree, policy, nursery)
            nursery.cancel_scope.cancel()


async def access(fetcher: Fetcher, path: Path, *, removed: bool = False) -> None:
    """An access to the first byte."""
    fd = os.open(path, os.O_RDWR)
    try:
        if removed:
            path.unlink()
        await fetcher(Event(LINUX_6_14.pre_access, 1, fd, str(path), 0, 1, LINUX_6_14))
    finally:
        os.close(fd)


@pytest.fixture
def store(places: Callable[[str], Path], target: Path) -> Path:
    """A store of 40 files, of which `target` has stubs."""
    require_root()
    store = places("store")
    for number in range(40):
        (store / f"{number:02}").write_bytes(b"c" * SIZE)
    plant(store, target)
    return store


async def test_of_users_own_files(store: Path, target: Path) -> None:
    async with fetcher(store, target) as fetching:
        for number in range(200):
            path = target / f"own{number}"
            path.write_bytes(b"own")
            await access(fetching, path)
            path.unlink()
        assert len(fetching.served) <= MOST + MOST // 8 + 1


class Forgetting(dict[Key, Served]):
    """Forgets a file as soon as a thread has asked whether it is known."""

    def __contains__(self, key: object) -> bool:
        is_known = super().__contains__(key)
        if threading.current_thread() is not threading.main_thread():
            self.pop(key, None)  # type: ignore[call-overload]
        return is_known


async def test_a_stub_that_is_forgotten_while_it_is_met_stays_a_stub(store: Path, target: Path) -> None:
    """It does not become a file of the user's own, which nobody fills."""
    async with fetcher(store, target) as fetching:
        fetching.served = Forgetting()
        path = target / "00"
        fd = os.open(path, os.O_RDONLY)
        key = key_of(fd, os.fstat(fd))
        met: list[Served] = []

        async def meet() -> None:
            met.append(await fetching.meet(key, 0, fd, path.name))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(meet)
        os.close(fd)
        assert len(met) == 8
        assert all(served.file is not None for served in met)


async def test_files_with_a_record_to_close_are_remembered(store: Path, target: Path) -> None:
    async with fetcher(store, target) as fetching:
        for number in range(40):
            await access(fetching, target / f"{number:02}")
            assert (target / f"{number:02}").read_bytes() == b"c" * SIZE
            own = target / f"own{number}"
            own.write_bytes(b"own")
            await access(fetching, own)
        stubs = [served for served in fetching.served.values() if served.file is not None]
        assert len(stubs) == 40
        assert len(fetching.served) <= 40 + MOST + MOST // 8 + 1


async def test_removed_files_are_forgotten_at_once(store: Path, target: Path) -> None:
    async with fetcher(store, target) as fetching:
        for number in range(10):
            await access(fetching, target / f"{number:02}", removed=True)
        assert not fetching.served


async def test_a_file_that_is_being_read_is_remembered(store: Path, target: Path) -> None:
    async with fetcher(store, target) as fetching:
        await access(fetching, target / "00")
        (served,) = fetching.served.values()
        assert served.file is not None
        served.file.recorded = False  # as if nothing were on the disk
        served.evicting = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(access, fetching, target / "00")
            await trio.testing.wait_all_tasks_blocked()
            served.evicting.set()
            served.evicting = None
            for number in range(60):
                path = target / f"own{number}"
                path.write_bytes(b"own")
                await access(fetching, path)
        assert served in fetching.served.values()
