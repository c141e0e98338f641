"""--unattended hold with several groups: only the answer of a pre-content group that covers a parked access ends its wait."""

import errno
import os
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio

from fusehsm.backends.opening import DEFAULT_FLAGS, open_group
from fusehsm.conform.accessor import Accessor, PendingCall
from fusehsm.fanotify.abi import FAN_ACCESS_PERM, FAN_CLASS_CONTENT, FAN_CLOEXEC, FAN_MARK_ADD, LINUX_6_14
from tests.conftest import MakeAccessor, MakeMount
from tests.emulator.test_unattended import SIZE, stub_in, waiting
from tests.support.async_listener import HOLD, Answer, Listener, listening
from tests.support.harness import Mount, fusehsm
from tests.support.stub_pattern import Filler, Stub

pytestmark = pytest.mark.fuse

PRE_ACCESS = LINUX_6_14.pre_access
CONTENT_CLASS = FAN_CLASS_CONTENT | FAN_CLOEXEC


@pytest.fixture
def filler() -> Filler:
    return Filler()


def scanning(
    stub: Stub, answer: Answer = lambda event: 0, **how: Any
) -> AbstractAsyncContextManager[Listener]:
    """A virus scanner: it hears of reads, and fills nothing."""
    how = {"flags": CONTENT_CLASS, **how}
    return listening(stub.path, ("ACCESS_PERM",), mark="inode", answer=answer, **how)


async def touch_marks(listener: Listener, path: str) -> None:
    """Change a mark, after which the parked accesses are looked at again."""
    await listener.group.mark(FAN_MARK_ADD, FAN_ACCESS_PERM, path=path)


async def is_parked(mount: Mount, call: PendingCall) -> bool:
    (waiter,) = await waiting(mount, 1)
    return waiter["group"] is None and not call.done


async def left_by_the_dead(mount: Mount, stub: Stub) -> None:
    """Let a group come that covers the stub, and go."""
    async with open_group(stub.path, ("PRE_ACCESS",), mark="inode"):
        pass
    assert mount.process.poll() is None


@pytest.mark.parametrize("before", ["a group has died", "no group has been"])
async def test_a_content_group_lets_nothing_go_on(
    make_mount: MakeMount, accessor: Accessor, filler: Filler, before: str
) -> None:
    mount = make_mount("--unattended", "hold", "--events", "exact")
    stub, other = stub_in(mount, "stub", filler), stub_in(mount, "other", filler)
    async with scanning(stub) as scanner:
        if before == "a group has died":
            await left_by_the_dead(mount, stub)
        call = accessor.start("pread_path", stub.path, 100, 0)
        await scanner.wait_for(1)
        assert await is_parked(mount, call)
        await touch_marks(scanner, other.path)
        await scanner.wait_for(2)
        assert await is_parked(mount, call)
        async with listening(stub.path, ("PRE_ACCESS",), mark="inode", answer=filler):
            assert await call.wait() == stub.content[:100]


async def test_a_content_group_may_deny_what_is_parked(
    make_mount: MakeMount, accessor: Accessor, filler: Filler
) -> None:
    mount = make_mount("--unattended", "hold", "--events", "exact")
    stub, other = stub_in(mount, "stub", filler), stub_in(mount, "other", filler)
    answers = iter((0, errno.EPERM))
    async with scanning(stub, lambda event: next(answers)) as scanner:
        call = accessor.start("pread_path", stub.path, 100, 0)
        await scanner.wait_for(1)
        assert await is_parked(mount, call)
        await touch_marks(scanner, other.path)
        with pytest.raises(PermissionError):
            await call.wait()


async def test_permission_events_do_not_stand_for_a_dead_group_that_filled(
    make_mount: MakeMount, accessor: Accessor, filler: Filler
) -> None:
    """Although it is a pre-content group that answers them."""
    mount = make_mount("--unattended", "hold", "--events", "exact")
    stub, other = stub_in(mount, "stub", filler), stub_in(mount, "other", filler)
    async with scanning(stub, flags=DEFAULT_FLAGS) as watcher:
        await left_by_the_dead(mount, stub)
        call = accessor.start("pread_path", stub.path, 100, 0)
        await watcher.wait_for(1)
        assert await is_parked(mount, call)
        await touch_marks(watcher, other.path)
        await watcher.wait_for(2)
        assert await is_parked(mount, call)
        async with listening(stub.path, ("PRE_ACCESS",), mark="inode", answer=filler):
            assert await call.wait() == stub.content[:100]


async def test_a_group_that_fills_what_is_opened(
    make_mount: MakeMount, accessor: Accessor, filler: Filler
) -> None:
    """What it leaves behind waits for another of its class."""
    mount = make_mount("--unattended", "hold", "--events", "exact")
    stub = stub_in(mount, "stub", filler)
    how: dict[str, Any] = {"mask": ("OPEN_PERM",), "mark": "inode"}

    def fill(event: Any) -> int:
        os.pwrite(event.fd, stub.content, 0)
        return 0

    async with open_group(stub.path, **how) as group:
        call = accessor.start("pread_path", stub.path, 100, 0)
        await group.wait_readable()
    assert await is_parked(mount, call)
    async with listening(stub.path, flags=CONTENT_CLASS, **how) as scanner:
        await scanner.wait_for(1)
        assert await is_parked(mount, call)
        async with listening(stub.path, answer=fill, **how):
            assert await call.wait() == stub.content[:100]


@pytest.mark.parametrize("events", ["exact", "first-access"])
async def test_who_is_asked_of_changes_does_not_attend_reads(
    make_mount: MakeMount, accessor: Accessor, filler: Filler, events: str
) -> None:
    mount = make_mount("--unattended", "hold", "--events", events, "--abi", "patch-v2")
    stub = stub_in(mount, "stub", filler)
    descriptor = None
    async with listening(stub.path, ("PRE_ACCESS",), mark="inode", answer=filler):
        descriptor = await accessor.run("open", stub.path, 0)
    call = accessor.start("pread", descriptor, 100, 0)
    assert await is_parked(mount, call)
    async with listening(stub.path, ("PRE_MODIFY",), mark="inode"):
        assert await is_parked(mount, call)
        async with listening(stub.path, ("PRE_ACCESS",), mark="inode", answer=filler):
            assert await call.wait() == stub.content[:100]


@pytest.mark.parametrize("policy", ["hold", "deny"])
async def test_a_group_that_comes_while_another_is_asked(
    make_mount: MakeMount, accessor: Accessor, filler: Filler, policy: str
) -> None:
    mount = make_mount("--unattended", policy, "--events", "exact")
    stub = stub_in(mount, "stub", filler)
    first = True

    def wait_once(event: Any) -> int:
        nonlocal first
        answer, first = (HOLD if first else 0), False
        return answer

    async with scanning(stub, wait_once) as scanner:
        call = accessor.start("pread_path", stub.path, 100, 0)
        await scanner.wait_for(1)
        async with listening(stub.path, ("PRE_ACCESS",), mark="inode", answer=filler):
            scanner.release()
            assert await call.wait() == stub.content[:100]


@pytest.mark.parametrize("events", ["exact", "first-access"])
async def test_groups_that_come_and_go(
    make_mount: MakeMount, accessor: Accessor, filler: Filler, events: str
) -> None:
    mount = make_mount("--unattended", "hold", "--events", events)
    stub, other = stub_in(mount, "stub", filler), stub_in(mount, "other", filler)
    call = accessor.start("pread_path", stub.path, 100, 0)
    assert await is_parked(mount, call)
    async with listening(other.path, ("PRE_ACCESS",), mark="inode", answer=filler):
        assert await is_parked(mount, call)
    assert await is_parked(mount, call)
    for _ in range(2):
        async with open_group(stub.path, ("PRE_ACCESS",), mark="inode") as group:
            await group.wait_readable()  # it is asked, and does not answer
        assert await is_parked(mount, call)
    async with listening(stub.path, ("PRE_ACCESS",), mark="inode", answer=filler):
        assert await call.wait() == stub.content[:100]


async def test_released_while_a_content_group_is_asked_again(
    make_mount: MakeMount, make_accessor: MakeAccessor, filler: Filler
) -> None:
    mount = make_mount("--unattended", "hold", "--events", "exact")
    stub, other = stub_in(mount, "stub", filler), stub_in(mount, "other", filler)
    await left_by_the_dead(mount, stub)
    answers = iter((0, HOLD))
    async with scanning(stub, lambda event: next(answers)) as scanner:
        call = make_accessor().start("pread_path", stub.path, 100, 0)
        await scanner.wait_for(1)
        assert await is_parked(mount, call)
        await touch_marks(scanner, other.path)
        await scanner.wait_for(2)
        await trio.to_thread.run_sync(fusehsm, "status", "--release", str(mount.path))
        assert not call.done
        scanner.release()
        assert await call.wait() == bytes(min(100, SIZE))
