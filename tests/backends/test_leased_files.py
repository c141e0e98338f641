"""A lease that a user holds on a file of theirs (fcntl(2), F_SETLEASE) stops only the accesses to that file, and no listener. One expectation for the
real kernel and for mounts."""

import errno
import fcntl
import os

import pytest
import trio

from fusehsm.backends.base import Group
from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from fusehsm.fanotify.abi import (
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_REPORT_FD_ERROR,
    LINUX_6_14,
    decode_events,
)
from tests.conftest import MakeAccessor
from tests.support.handler_sites import InProcessSite, Site

pytest_plugins = ["tests.support.handler_fixtures"]

P = LINUX_6_14.pre_access
PRE = FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC
READ_WRITE = os.O_RDWR | os.O_CLOEXEC | os.O_LARGEFILE
PAGE = 4096
PATIENCE = 10  # seconds, less than fs.lease-break-time


def lease_for_reading(path: str) -> int:
    """Hold a lease, and do not give it back."""
    import fcntl
    import signal

    signal.signal(signal.SIGIO, signal.SIG_IGN)
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    return descriptor


async def test_only_accesses_to_the_leased_file_fail(site: Site, make_accessor: MakeAccessor) -> None:
    leased, other = site.stub("leased", PAGE), site.stub("other", PAGE)
    holder, reader = make_accessor(), make_accessor()
    seen: list[str] = []

    async def look(event: Event) -> None:
        assert not fcntl.fcntl(event.fd, fcntl.F_GETFL) & os.O_NONBLOCK
        seen.append(event.path)

    async with site.serving(look, P):
        await holder.run(lease_for_reading, str(site.content / "leased"))
        with trio.fail_after(PATIENCE):
            for _ in range(3):
                with pytest.raises(PermissionError):
                    await reader.run("pread_path", leased, 1, 0)
                assert await reader.run("pread_path", other, 1, 0) == b"\0"
    assert seen == [other] * 3


async def test_a_queue_with_leased_files_is_not_taken_for_empty(
    site: Site, make_accessor: MakeAccessor
) -> None:
    """A listener that ends asks until nothing is left, and only then closes the group, which lets all others go on."""
    if isinstance(site, InProcessSite):
        return  # such a group ends with its mount
    leased, other = site.stub("leased", PAGE), site.stub("other", PAGE)
    holder = make_accessor()
    accessors = [make_accessor() for _ in range(4)]
    async with site.group(P) as group:
        await holder.run(lease_for_reading, str(site.content / "leased"))
        calls = [accessor.start("pread_path", leased, 1, 0) for accessor in accessors[:3]]
        await trio.sleep(0.3)  # until they wait
        calls.append(accessors[3].start("pread_path", other, 1, 0))
        await trio.sleep(0.3)
        assert next_path(group) == other
        for call in calls[:3]:
            with pytest.raises(PermissionError):
                await call.wait()
        assert await calls[3].wait() == b"\0"


def next_path(group: Group) -> str:
    """The path of the next event, which is allowed. An error is of a file that cannot be opened; EAGAIN is an empty queue."""
    for _ in range(10):
        try:
            (event,) = group.take_events()
        except BlockingIOError:
            return ""
        except OSError:
            continue
        os.close(event.fd)
        group.answer(event, 0)
        return event.path
    raise AssertionError


async def test_the_error_of_the_open_can_be_had(site: Site, make_accessor: MakeAccessor) -> None:
    leased = site.stub("leased", PAGE)
    holder, reader = make_accessor(), make_accessor()
    async with site.group(P, flags=PRE | FAN_REPORT_FD_ERROR) as group:
        await holder.run(lease_for_reading, str(site.content / "leased"))
        call = reader.start("pread_path", leased, 1, 0)
        await group.wait_readable()
        (event,) = decode_events(LINUX_6_14, group.read(PAGE))
        assert (event.mask, event.fd) == (P, -errno.EAGAIN)
        with pytest.raises(PermissionError):
            await call.wait()


async def test_who_asks_for_descriptors_that_do_not_wait_keeps_them_so(
    site: Site, accessor: Accessor
) -> None:
    path = site.stub("stub", PAGE)
    for flags in (READ_WRITE, READ_WRITE | os.O_NONBLOCK):
        async with site.group(P, event_f_flags=flags) as group:
            call = accessor.start("pread_path", path, 1, 0)
            await group.wait_readable()
            (event,) = group.take_events()
            assert fcntl.fcntl(event.fd, fcntl.F_GETFL) & os.O_NONBLOCK == flags & os.O_NONBLOCK
            os.close(event.fd)
            group.answer(event, 0)
            assert await call.wait() == b"\0"
