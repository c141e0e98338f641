"""The level of the C API (mark, read, write, poll), the same tests on the real kernel, over the control socket and in-process."""

import errno
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from fusehsm.backends.base import AT_FDCWD, Group
from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from fusehsm.fanotify import abi
from fusehsm.fanotify.abi import (
    FAN_ALLOW,
    FAN_AUDIT,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_DENY,
    FAN_EVENT_ON_CHILD,
    FAN_INFO,
    FAN_MARK_ADD,
    FAN_MARK_DONT_FOLLOW,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_MOUNT,
    FAN_MARK_ONLYDIR,
    FAN_MARK_REMOVE,
    FAN_NOFD,
    FAN_ONDIR,
    FAN_OPEN_PERM,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TID,
    LINUX_6_14,
    RawEvent,
    decode_events,
    deny_errno,
    encode_audit_rule,
    encode_event,
    encode_response,
)
from tests.conftest import MakeAccessor
from tests.support.handler_sites import Site, pidfds
from tests.support.kernel_and_mount import Failed, outcome

pytest_plugins = ["tests.support.handler_fixtures"]

PAGE = 4096
P = LINUX_6_14.pre_access
PRE = FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC
BOTH = os.O_RDWR | os.O_CLOEXEC
PIDFD_RECORD = 8


async def queued(group: Group, count: int, size: int = 48) -> bytes:
    """The bytes of the next `count` events."""
    data = b""
    while len(data) < count * size:
        await group.wait_readable()
        data += group.read(count * size - len(data))
    return data


@contextmanager
def running_program(site: Site) -> Iterator[str]:
    """A running program on the site: no process can open it for writing; its path for accessors."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    path = site.make("busy", Path(sleep).read_bytes(), mode=0o755)
    with subprocess.Popen([site.content / "busy", "infinity"]) as process:
        try:
            yield path
        finally:
            process.kill()


# Reading


async def test_an_event_has_the_kernels_bytes(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", 3 * PAGE)
    async with site.group(P) as group:
        call = accessor.start("pread_path", path, 100, PAGE + 10)
        data = await queued(group, 1)
        (event,) = decode_events(LINUX_6_14, data)
        assert data == encode_event(LINUX_6_14, P, event.fd, accessor.pid, range_=(PAGE, PAGE))
        assert group.event_path(event) == path
        assert os.readlink(f"/proc/self/fd/{event.fd}") == str(site.content / "stub")
        assert group.write(encode_response(event.fd, FAN_ALLOW)) == 8
        os.close(event.fd)
        assert await call.wait() == bytes(100)


async def test_reading_an_empty_queue_does_not_block(site: Site) -> None:
    async with site.group(P) as group:
        for size in (0, 24, 4096):
            with pytest.raises(BlockingIOError):
                group.read(size)


async def test_a_buffer_too_small_leaves_the_event_where_it_is(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)
    async with site.group(P) as group:
        poll = select.poll()
        poll.register(group.fileno(), select.POLLIN)
        assert poll.poll(0) == []
        call = accessor.start("pread_path", path, 1, 0)
        await group.wait_readable()
        for size in (0, 24, 47):
            with pytest.raises(OSError) as failed:
                group.read(size)
            assert failed.value.errno == errno.EINVAL
            assert poll.poll(0) != []
            await group.wait_readable()
        (event,) = decode_events(LINUX_6_14, group.read(48))
        assert poll.poll(0) == []
        group.write(encode_response(event.fd, FAN_ALLOW))
        os.close(event.fd)
        await call.wait()


async def test_a_read_gives_as_many_whole_events_as_fit(site: Site, make_accessor: MakeAccessor) -> None:
    path = site.stub("stub", 3 * PAGE)
    accessors = [make_accessor() for _ in range(3)]
    async with site.group(P) as group:
        poll = select.poll()
        poll.register(group.fileno(), select.POLLIN)
        calls = [each.start("pread_path", path, 1, number * PAGE) for number, each in enumerate(accessors)]
        data = await queued(group, 1)
        while len(data) < 48 * 3:
            await group.wait_readable()
            data += group.read(48 * 2 + 47)
        assert poll.poll(0) == []
        events = decode_events(LINUX_6_14, data)
        assert {event.offset for event in events} == {0, PAGE, 2 * PAGE}
        assert {event.pid for event in events} == {each.pid for each in accessors}
        for event in reversed(events):
            group.write(encode_response(event.fd, FAN_ALLOW))
            os.close(event.fd)
        for call in calls:
            assert await call.wait() == b"\0"


@pytest.mark.parametrize(
    ("event_f_flags", "inheritable", "writable"),
    [(os.O_RDONLY, True, False), (os.O_RDWR, True, True), (os.O_RDWR | os.O_CLOEXEC, False, True)],
)
async def test_event_descriptors_are_opened_by_event_f_flags(
    site: Site, accessor: Accessor, event_f_flags: int, inheritable: bool, writable: bool
) -> None:
    path = site.stub("stub", PAGE)
    async with site.group(P, event_f_flags=event_f_flags) as group:
        call = accessor.start("pread_path", path, 1, 0)
        (event,) = decode_events(LINUX_6_14, await queued(group, 1))
        assert os.get_inheritable(event.fd) is inheritable
        if writable:
            os.pwrite(event.fd, b"z", 0)
        else:
            with pytest.raises(OSError) as failed:
                os.pwrite(event.fd, b"z", 0)
            assert failed.value.errno == errno.EBADF
        group.write(encode_response(event.fd, FAN_ALLOW))
        os.close(event.fd)
        assert await call.wait() == (b"z" if writable else b"\0")


async def test_a_pidfd_comes_along_when_asked_for(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)
    async with site.group(P, flags=PRE | FAN_REPORT_PIDFD) as group:
        call = accessor.start("pread_path", path, 1, 0)
        data = await queued(group, 1, 48 + PIDFD_RECORD)
        (event,) = decode_events(LINUX_6_14, data)
        assert event.pidfd is not None
        with open(f"/proc/self/fdinfo/{event.pidfd}", encoding="ascii") as info:
            assert f"Pid:\t{accessor.pid}" in info.read()
        os.close(event.pidfd)
        group.write(encode_response(event.fd, FAN_ALLOW))
        os.close(event.fd)
        await call.wait()
        # And the value level has no use for it, and leaves none behind.
        before = pidfds()
        call = accessor.start("pread_path", path, 1, 0)
        await group.wait_readable()
        (value,) = group.take_events()
        group.answer(value, 0)
        os.close(value.fd)
        await call.wait()
        assert pidfds() == before


async def test_report_tid_names_the_thread(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)
    async with site.group(P, flags=PRE | FAN_REPORT_TID) as group:
        call = accessor.start("pread_path", path, 1, 0)
        (event,) = decode_events(LINUX_6_14, await queued(group, 1))
        assert event.pid == accessor.pid  # its main thread
        group.write(encode_response(event.fd, FAN_ALLOW))
        os.close(event.fd)
        await call.wait()


# Answering


RULE = encode_audit_rule(1, 0, 0)


@pytest.mark.parametrize(
    "response",
    [
        0,
        FAN_ALLOW | FAN_DENY,
        4,
        0x40,
        0x80000000,
        FAN_ALLOW | errno.EIO << 24,
        errno.EIO << 24,
        deny_errno(errno.ENOENT),
        deny_errno(255),
        FAN_ALLOW | FAN_AUDIT,
    ],
)
async def test_a_bad_response_leaves_the_event_waiting(site: Site, accessor: Accessor, response: int) -> None:
    path = site.stub("stub", PAGE)
    async with site.group(P) as group:
        call = accessor.start("pread_path", path, 1, 0)
        (event,) = decode_events(LINUX_6_14, await queued(group, 1))
        with pytest.raises(OSError) as refused:
            group.write(encode_response(event.fd, response))
        assert refused.value.errno == errno.EINVAL
        assert group.write(encode_response(event.fd, deny_errno(errno.EBUSY))) == 8
        os.close(event.fd)
        with pytest.raises(OSError) as denied:
            await call.wait()
        assert denied.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b"", errno.EINVAL),
        (b"\0\0\0\0", errno.EINVAL),
        (encode_response(-1, FAN_ALLOW), errno.EINVAL),
        (encode_response(-2, deny_errno(errno.EIO)), errno.EINVAL),
        (encode_response(FAN_NOFD, FAN_ALLOW | FAN_INFO), errno.EINVAL),
        (encode_response(12345, FAN_ALLOW), errno.ENOENT),
    ],
)
async def test_a_response_to_nothing_is_refused(site: Site, data: bytes, number: int) -> None:
    async with site.group(P) as group:
        with pytest.raises(OSError) as refused:
            group.write(data)
        assert refused.value.errno == number


async def test_the_probe_for_denial_errnos(site: Site) -> None:
    probe = encode_response(FAN_NOFD, deny_errno(errno.EIO) | FAN_INFO) + RULE
    async with site.group(P) as group:
        assert group.write(probe) == 24
    async with site.group(["OPEN_PERM"], flags=FAN_CLASS_CONTENT) as group:
        with pytest.raises(OSError) as refused:
            group.write(probe)
        assert refused.value.errno == errno.EINVAL


async def test_only_the_first_response_of_a_write_counts(site: Site, make_accessor: MakeAccessor) -> None:
    path = site.stub("stub", 2 * PAGE)
    async with site.group(P) as group:
        calls = [make_accessor().start("pread_path", path, 1, offset) for offset in (0, PAGE)]
        first, second = decode_events(LINUX_6_14, await queued(group, 2))
        both = encode_response(first.fd, FAN_ALLOW) + encode_response(second.fd, FAN_ALLOW)
        assert group.write(both) == 8
        with pytest.raises(OSError) as refused:
            group.write(both)
        assert refused.value.errno == errno.ENOENT
        assert group.write(encode_response(second.fd, FAN_ALLOW) + b"rest") == 8
        for event in (first, second):
            os.close(event.fd)
        for call in calls:
            await call.wait()


@pytest.mark.parametrize("by", ["bytes", "values"])
async def test_events_that_share_a_descriptor_number_are_answered_in_the_order_read(
    site: Site, make_accessor: MakeAccessor, by: str
) -> None:
    path = site.stub("stub", 2 * PAGE)
    first, second = make_accessor(), make_accessor()

    async def one_event() -> RawEvent | Event:
        await group.wait_readable()
        (event,) = group.take_events() if by == "values" else decode_events(LINUX_6_14, group.read(48))
        return event

    def answer(event: RawEvent | Event, error: int) -> None:
        if isinstance(event, Event):
            group.answer(event, error)
        else:
            group.write(encode_response(event.fd, deny_errno(error) if error else FAN_ALLOW))

    async with site.group(P) as group:
        opened = []
        for each in (first, second):
            opened.append(await each.run("open", path, os.O_RDONLY))
            # Once before it counts: in-process, the mount opens something of its own for a new accessor.
            call = each.start("pread", opened[-1], 1, 0)
            event = await one_event()
            answer(event, 0)
            os.close(event.fd)
            await call.wait()
        calls = {}
        calls[first.pid] = first.start("pread", opened[0], 1, 0)
        earlier = await one_event()
        os.close(earlier.fd)
        calls[second.pid] = second.start("pread", opened[1], 1, PAGE)
        later = await one_event()
        assert later.fd == earlier.fd, "the number was not reused, so this shows nothing"
        answer(earlier, errno.EAGAIN)
        answer(later, errno.ENOSPC)
        os.close(later.fd)
        with pytest.raises(BlockingIOError):
            await calls[earlier.pid].wait()
        with pytest.raises(OSError) as denied:
            await calls[later.pid].wait()
        assert denied.value.errno == errno.ENOSPC


async def test_both_levels_can_be_mixed(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)
    async with site.group(P) as group:
        call = accessor.start("pread_path", path, 1, 0)
        await group.wait_readable()
        (value,) = group.take_events()
        group.write(encode_response(value.fd, deny_errno(errno.EDQUOT)))
        os.close(value.fd)
        with pytest.raises(OSError) as denied:
            await call.wait()
        assert denied.value.errno == errno.EDQUOT

        call = accessor.start("pread_path", path, 1, 0)
        (raw,) = decode_events(LINUX_6_14, await queued(group, 1))
        value = type(value)(raw.mask, raw.pid, raw.fd, "", raw.offset, raw.count)
        with pytest.raises(OSError) as refused:
            group.answer(value, errno.ENOENT)
        assert refused.value.errno == errno.EINVAL
        group.answer(value, 0)
        with pytest.raises(OSError) as refused:
            group.answer(value, 0)
        assert refused.value.errno == errno.ENOENT
        os.close(raw.fd)
        await call.wait()


# Marks


async def hears(group: Group, accessor: Accessor, path: str) -> bool:
    """Whether a read of that file makes an event for the group."""
    call = accessor.start("pread_path", path, 1, 0)
    heard = False
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                nonlocal heard
                await group.wait_readable()
                heard = True
                for event in decode_events(group.dialect, group.read(4096)):
                    group.write(encode_response(event.fd, FAN_ALLOW))
                    os.close(event.fd)

            nursery.start_soon(listen)
            await call.wait()
            scope.cancel()
    return heard


@pytest.mark.parametrize(
    ("flags", "mask", "target", "heard"),
    [
        (0, P, "file", {"file"}),
        (0, P, "", set()),
        (0, P | FAN_EVENT_ON_CHILD, "", {"file", "other"}),
        (0, P | FAN_EVENT_ON_CHILD, "sub", {"sub/file"}),
        (FAN_MARK_MOUNT, P, "sub", {"file", "other", "sub/file"}),
        (FAN_MARK_FILESYSTEM, P, "file", {"file", "other", "sub/file"}),
        (0, P, "link", {"file"}),
    ],
)
async def test_what_a_mark_covers(
    site: Site, accessor: Accessor, flags: int, mask: int, target: str, heard: set[str]
) -> None:
    (site.content / "sub").mkdir()
    for name in ("file", "other", "sub/file"):
        site.stub(name, PAGE)
    (site.content / "link").symlink_to("file")
    async with await site.bare_group(PRE, BOTH) as group:
        await group.mark(FAN_MARK_ADD | flags, mask, path=str(site.path / target).rstrip("/"))
        for name in ("file", "other", "sub/file"):
            assert await hears(group, accessor, str(site.path / name)) is (name in heard), name
        await group.mark(FAN_MARK_REMOVE | flags, mask, path=os.fsencode(site.path / target))
        for name in ("file", "other", "sub/file"):
            assert not await hears(group, accessor, str(site.path / name)), name


async def test_flushing_takes_the_marks_of_one_type(site: Site, accessor: Accessor) -> None:
    path = site.stub("file", PAGE)
    async with await site.bare_group(PRE, BOTH) as group:
        await group.mark(FAN_MARK_ADD, P, path=path)
        await group.mark(FAN_MARK_ADD | FAN_MARK_MOUNT, P, path=path)
        await group.mark(FAN_MARK_FLUSH, 0)
        assert await hears(group, accessor, path)
        await group.mark(FAN_MARK_FLUSH | FAN_MARK_MOUNT, P, path="/does/not/exist")
        assert not await hears(group, accessor, path)


async def test_a_mark_by_descriptor(site: Site, accessor: Accessor) -> None:
    path = site.stub("file", PAGE)
    async with await site.bare_group(PRE, BOTH) as group:

        async def through(open_flags: int, name: str, mark_path: str | None) -> None:
            descriptor = await trio.to_thread.run_sync(os.open, site.path / name, open_flags)
            try:
                await group.mark(FAN_MARK_ADD, P, descriptor, mark_path)
            finally:
                await trio.to_thread.run_sync(os.close, descriptor)

        await through(os.O_RDONLY, "file", None)
        assert await hears(group, accessor, path)
        await group.mark(FAN_MARK_FLUSH, 0)
        await through(os.O_PATH, "", "file")
        assert await hears(group, accessor, path)
        with pytest.raises(OSError) as refused:
            await through(os.O_PATH, "file", None)
        assert refused.value.errno == errno.EBADF
        with pytest.raises(OSError) as refused:
            await through(os.O_RDONLY, "file", "")
        assert refused.value.errno == errno.ENOENT
        with pytest.raises(OSError) as refused:
            await through(os.O_RDONLY, "file", "file")
        assert refused.value.errno == errno.ENOTDIR


WRONG_MARKS = [
    # flags, mask, dirfd, name (None: no path) -> errno; every row was tried on Linux 6.18
    ("nothing there", FAN_MARK_ADD, P, AT_FDCWD, "missing", errno.ENOENT),
    ("dangling link", FAN_MARK_ADD, P, AT_FDCWD, "dangling", errno.ENOENT),
    ("file used as a directory", FAN_MARK_ADD, P, AT_FDCWD, "file/x", errno.ENOTDIR),
    ("name too long", FAN_MARK_ADD, P, AT_FDCWD, "n" * 300, errno.ENAMETOOLONG),
    ("no path, no descriptor", FAN_MARK_ADD, P, AT_FDCWD, None, errno.EBADF),
    ("no path, closed descriptor", FAN_MARK_ADD, P, 19_000, None, errno.EBADF),
    ("only a directory", FAN_MARK_ADD | FAN_MARK_ONLYDIR, P, AT_FDCWD, "file", errno.ENOTDIR),
    ("only a directory, link to a file", FAN_MARK_ADD | FAN_MARK_ONLYDIR, P, AT_FDCWD, "link", errno.ENOTDIR),
    ("a link itself", FAN_MARK_ADD | FAN_MARK_DONT_FOLLOW, P, AT_FDCWD, "link", errno.EINVAL),
    ("a fifo", FAN_MARK_ADD, P, AT_FDCWD, "fifo", errno.EINVAL),
    ("no command", 0, P, AT_FDCWD, "file", errno.EINVAL),
    ("two commands", FAN_MARK_ADD | FAN_MARK_REMOVE, P, AT_FDCWD, "file", errno.EINVAL),
    ("unknown flag", FAN_MARK_ADD | 0x800, P, AT_FDCWD, "file", errno.EINVAL),
    ("empty mask", FAN_MARK_ADD, 0, AT_FDCWD, "file", errno.EINVAL),
    ("unknown mask bit before a missing path", FAN_MARK_ADD, P | 0x200000, AT_FDCWD, "missing", errno.EINVAL),
    ("directories never ask", FAN_MARK_ADD, P | FAN_ONDIR, AT_FDCWD, "", errno.EINVAL),
    ("never marked", FAN_MARK_REMOVE, P, AT_FDCWD, "file", errno.ENOENT),
    ("flush with a path flag", FAN_MARK_FLUSH | FAN_MARK_ONLYDIR, 0, AT_FDCWD, "file", errno.EINVAL),
    (
        "both kinds of ignoring",
        FAN_MARK_ADD | FAN_MARK_IGNORE | FAN_MARK_IGNORED_MASK,
        P,
        AT_FDCWD,
        "file",
        errno.EINVAL,
    ),
    ("ignoring a directory", FAN_MARK_ADD | FAN_MARK_IGNORE, P, AT_FDCWD, "", errno.EISDIR),
    (
        "ignoring a file's children",
        FAN_MARK_ADD | FAN_MARK_IGNORE,
        P | FAN_EVENT_ON_CHILD,
        AT_FDCWD,
        "file",
        errno.ENOTDIR,
    ),
]


async def test_wrong_marks_fail_as_in_the_kernel(site: Site) -> None:
    site.stub("file", PAGE)
    (site.content / "link").symlink_to("file")
    (site.content / "dangling").symlink_to("nowhere")
    os.mkfifo(site.content / "fifo")
    found = {}
    async with await site.bare_group(PRE, BOTH) as group:
        for what, flags, mask, dirfd, name, _ in WRONG_MARKS:
            path = None if name is None else str(site.path / name)
            try:
                await group.mark(flags, mask, dirfd, path)
                found[what] = "accepted"
            except OSError as error:
                found[what] = errno.errorcode[error.errno or 0]
    assert found == {row[0]: errno.errorcode[row[5]] for row in WRONG_MARKS}


async def test_adding_what_a_mark_cannot_become(site: Site) -> None:
    path = site.stub("file", PAGE)
    async with await site.bare_group(PRE, BOTH) as group:
        await group.mark(FAN_MARK_ADD, P, path=path)
        with pytest.raises(FileExistsError):
            await group.mark(FAN_MARK_ADD, FAN_ONDIR, path=path)


@pytest.mark.parametrize(
    ("flags", "mask"), [(FAN_CLASS_NOTIF, P), (FAN_CLASS_NOTIF, FAN_OPEN_PERM), (FAN_CLASS_CONTENT, P)]
)
async def test_a_class_hears_only_its_own_events(site: Site, flags: int, mask: int) -> None:
    path = site.stub("file", PAGE)
    async with await site.bare_group(flags, os.O_RDONLY) as group:
        with pytest.raises(OSError) as refused:
            await group.mark(FAN_MARK_ADD, mask, path=path)
        assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("flags", "event_f_flags"),
    [
        (FAN_CLASS_PRE_CONTENT | FAN_CLASS_CONTENT, os.O_RDWR),
        (FAN_CLASS_PRE_CONTENT | abi.FAN_REPORT_FID, os.O_RDWR),
        (FAN_CLASS_PRE_CONTENT | FAN_REPORT_PIDFD | FAN_REPORT_TID, os.O_RDWR),
        (FAN_CLASS_PRE_CONTENT | 0x10000, os.O_RDWR),
        (FAN_CLASS_PRE_CONTENT, 3),
        (FAN_CLASS_PRE_CONTENT, os.O_RDWR | os.O_CREAT),
    ],
)
async def test_a_group_with_bad_flags_is_refused(site: Site, flags: int, event_f_flags: int) -> None:
    with pytest.raises(OSError) as refused:
        await site.bare_group(flags, event_f_flags)
    assert refused.value.errno == errno.EINVAL


async def test_two_groups_are_asked_one_after_the_other(site: Site, accessor: Accessor) -> None:
    path = site.stub("file", PAGE)
    asked: list[str] = []

    async def listen(name: str, group: Group, response: int) -> None:
        while True:
            await group.wait_readable()
            for event in decode_events(LINUX_6_14, group.read(4096)):
                asked.append(name)
                group.write(encode_response(event.fd, response))
                os.close(event.fd)

    async with (
        site.group(["OPEN_PERM"], flags=FAN_CLASS_CONTENT) as content,
        site.group(["OPEN_PERM"]) as pre_content,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(listen, "content", content, FAN_ALLOW)
        nursery.start_soon(listen, "pre-content", pre_content, FAN_ALLOW)
        await accessor.run("pread_path", path, 1, 0)
        assert asked == ["pre-content", "content"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("by", ["bytes", "values", "handler"])
async def test_an_event_whose_file_cannot_be_opened_is_denied_and_counted(
    site: Site, accessor: Accessor, by: str
) -> None:
    with running_program(site) as path:
        if by == "handler":

            async def allow(event: Event) -> None:
                raise AssertionError("it has no descriptor to be handled with")

            async with site.serving(allow, P):
                assert await outcome(lambda: accessor.run("pread_path", path, 100, 0)) == Failed(errno.EPERM)
                statistics = await site.statistics()
        else:
            async with site.group(P, flags=PRE | FAN_REPORT_FD_ERROR) as group:
                call = accessor.start("pread_path", path, 100, 0)
                await group.wait_readable()
                (event,) = decode_events(LINUX_6_14, group.read(48)) if by == "bytes" else group.take_events()
                assert (event.fd, event.mask) == (-errno.ETXTBSY, P)
                assert await outcome(call.wait) == Failed(errno.EPERM)
                statistics = await site.statistics()
    counts = {"queued": 1, "allowed": 0, "denied": 1, "withdrawn": 0, "overflowed": 0, "unopened": 1}
    assert statistics in (counts, {})


async def test_closing_allows_what_was_read_and_what_was_not(site: Site, make_accessor: MakeAccessor) -> None:
    path = site.stub("stub", 2 * PAGE)
    async with site.group(P) as group:
        calls = [make_accessor().start("pread_path", path, 1, 0)]
        (event,) = decode_events(LINUX_6_14, await queued(group, 1))
        calls.append(make_accessor().start("pread_path", path, 1, PAGE))
        await group.wait_readable()
    for call in calls:
        assert await call.wait() == b"\0"
    os.close(event.fd)
