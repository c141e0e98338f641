"""The handler API, the same tests three times: on the real kernel, over the control socket, in the mount's own process."""

import contextlib
import errno
import functools
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from fusehsm.backends.base import Group
from fusehsm.backends.kernel import KernelGroup
from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from fusehsm.fanotify.abi import FAN_CLASS_CONTENT, LINUX_6_14
from fusehsm.handler import serve
from tests.conftest import MakeAccessor
from tests.support.handler_sites import Site, open_for_both

PAGE = 4096
DENY_ERRNOS = sorted(LINUX_6_14.deny_errnos)


pytest_plugins = ["tests.support.handler_fixtures"]


async def allow(event: Event) -> None:
    """Lets everything pass."""


# What a handler is given and what its return means


async def test_a_handler_fills_what_is_about_to_be_read(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", 3 * PAGE)
    seen: list[Event] = []

    async def fill(event: Event) -> None:
        seen.append(event)
        assert event.offset is not None
        assert event.count is not None
        os.pwrite(event.fd, b"x" * event.count, event.offset)

    async with site.serving(fill):
        assert await accessor.run("pread_path", path, 100, PAGE + 10) == b"x" * 100

    (event,) = seen
    assert (event.offset, event.count) == (PAGE, PAGE)
    assert event.path == path
    assert event.pid == accessor.pid
    assert event.names == ["PRE_ACCESS"]
    assert event.mask == LINUX_6_14.pre_access
    assert (site.content / "stub").read_bytes() == bytes(PAGE) + b"x" * PAGE + bytes(PAGE)


async def test_names_that_are_not_utf8_arrive_as_the_os_module_has_them(
    site: Site, accessor: Accessor
) -> None:
    name = os.fsdecode(b"caf\xe9 \xff")
    path = site.stub(name, PAGE)
    seen: list[str] = []

    async def look(event: Event) -> None:
        seen.append(event.path)

    async with site.serving(look):
        await accessor.run("pread_path", os.fsencode(path), 1, 0)
    assert seen == [path]


@pytest.mark.parametrize("number", DENY_ERRNOS, ids=[errno.errorcode[number] for number in DENY_ERRNOS])
async def test_raising_an_errno_denies_with_it(site: Site, accessor: Accessor, number: int) -> None:
    path = site.stub("stub", PAGE)

    async def refuse(event: Event) -> None:
        raise OSError(number, "not now")

    async with site.serving(refuse):
        with pytest.raises(OSError) as denied:
            await accessor.run("pread_path", path, 100, 0)
    assert denied.value.errno == number


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOENT, "no such thing in the store"), OSError("no number"), ValueError("a mistake")],
)
async def test_any_other_exception_denies_with_eio_and_is_logged(
    site: Site, accessor: Accessor, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    path = site.stub("stub", PAGE)

    async def fail(event: Event) -> None:
        raise failure

    async with site.serving(fail):
        for _ in range(2):  # it does not end the serving
            with pytest.raises(OSError) as denied:
                await accessor.run("pread_path", path, 100, 0)
            assert denied.value.errno == errno.EIO
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 2
    assert path in logged[0].getMessage()
    assert logged[0].exc_info is not None
    assert logged[0].exc_info[1] is failure


async def test_an_errno_out_of_a_nursery_denies_with_it(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)

    async def busy() -> None:
        raise OSError(errno.EBUSY, "the tape robot is out")

    async def refuse(event: Event) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy)

    async with site.serving(refuse):
        with pytest.raises(OSError) as denied:
            await accessor.run("pread_path", path, 100, 0)
    assert denied.value.errno == errno.EBUSY


async def test_a_content_group_can_only_deny_with_eperm(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)

    async def refuse(event: Event) -> None:
        raise OSError(errno.ENOSPC, "full")

    async with site.serving(refuse, ["OPEN_PERM"], flags=FAN_CLASS_CONTENT):
        with pytest.raises(OSError) as denied:
            await accessor.run("pread_path", path, 100, 0)
    assert denied.value.errno == errno.EPERM


# Kinds of handlers


class AsyncCallable:
    async def __call__(self, event: Event) -> None:
        await trio.lowlevel.checkpoint()
        os.pwrite(event.fd, b"y", 0)


async def _with_argument(what: bytes, event: Event) -> None:
    os.pwrite(event.fd, what, 0)


def _sync(event: Event) -> None:
    assert threading.current_thread() is not threading.main_thread()
    os.pwrite(event.fd, b"y", 0)


@pytest.mark.parametrize(
    "handler",
    [
        AsyncCallable(),
        functools.partial(_with_argument, b"y"),
        _sync,
        lambda event: _with_argument(b"y", event),
    ],
    ids=["async callable object", "partial", "plain function", "plain function that returns a coroutine"],
)
async def test_every_kind_of_callable_is_a_handler(site: Site, accessor: Accessor, handler: object) -> None:
    path = site.stub("stub", PAGE)
    async with site.serving(handler):  # type: ignore[arg-type]
        assert await accessor.run("pread_path", path, 1, 0) == b"y"


async def test_a_plain_function_denies_by_raising_too(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)

    def refuse(event: Event) -> None:
        raise OSError(errno.EAGAIN, "later")

    async with site.serving(refuse):
        with pytest.raises(BlockingIOError):
            await accessor.run("pread_path", path, 1, 0)


# Many at once


async def test_a_handler_that_waits_keeps_nobody_else_waiting(
    site: Site, make_accessor: MakeAccessor
) -> None:
    slow, quick = site.stub("slow", PAGE), site.stub("quick", PAGE)
    may_end = trio.Event()
    waits = trio.Event()

    async def wait_for_slow(event: Event) -> None:
        if event.path == slow:
            waits.set()
            await may_end.wait()

    patient, eager = make_accessor(), make_accessor()
    async with site.serving(wait_for_slow):
        call = patient.start("pread_path", slow, 1, 0)
        await waits.wait()
        for _ in range(10):
            await eager.run("pread_path", quick, 1, 0)
        assert not call.done
        may_end.set()
        assert await call.wait() == b"\0"


async def test_as_many_handlers_run_at_once_as_the_limit_says(
    site: Site, make_accessor: MakeAccessor
) -> None:
    path = site.stub("stub", PAGE)
    running: set[object] = set()
    most = 0
    full = trio.Event()
    may_end = trio.Event()

    async def wait(event: Event) -> None:
        nonlocal most
        token = object()
        running.add(token)
        most = max(most, len(running))
        if len(running) == 3:
            full.set()
        await may_end.wait()
        running.remove(token)

    accessors = [make_accessor() for _ in range(8)]
    async with site.serving(wait, limit=3):
        calls = [each.start("pread_path", path, 1, 0) for each in accessors]
        await full.wait()
        may_end.set()
        for call in calls:
            assert await call.wait() == b"\0"
    assert most == 3


async def test_plain_functions_run_at_once_in_threads(site: Site, make_accessor: MakeAccessor) -> None:
    path = site.stub("stub", PAGE)
    meet = threading.Barrier(4, timeout=60)

    def wait_for_the_others(event: Event) -> None:
        meet.wait()

    accessors = [make_accessor() for _ in range(4)]
    async with site.serving(wait_for_the_others):
        calls = [each.start("pread_path", path, 1, 0) for each in accessors]
        for call in calls:
            assert await call.wait() == b"\0"


async def test_a_burst_larger_than_the_limit_is_answered_to_the_last(
    site: Site, make_accessor: MakeAccessor
) -> None:
    path = site.stub("stub", 100 * PAGE)

    async def fill(event: Event) -> None:
        await trio.lowlevel.checkpoint()
        assert event.offset is not None
        os.pwrite(event.fd, b"%8d" % event.offset, event.offset)

    accessors = [make_accessor() for _ in range(12)]
    async with site.serving(fill, limit=2):
        for start in range(0, 48, 12):
            calls = [
                each.start("pread_path", path, 8, (start + position) * PAGE)
                for position, each in enumerate(accessors)
            ]
            for position, call in enumerate(calls):
                assert await call.wait() == b"%8d" % ((start + position) * PAGE)


def test_a_limit_below_one_is_refused() -> None:
    async def main() -> None:
        await serve(None, allow, limit=0)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="limit=0"):
        trio.run(main)


# Descriptors


async def test_event_descriptors_are_closed(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)
    calls = 0
    during: list[int] = []

    async def refuse_every_other(event: Event) -> None:
        nonlocal calls
        calls += 1
        during.append(len(open_for_both("stub")))
        if calls % 2:
            raise OSError(errno.EIO, "odd")

    async with site.serving(refuse_every_other):
        for _ in range(6):
            with contextlib.suppress(OSError):
                await accessor.run("pread_path", path, 1, 0)
        assert open_for_both("stub") == []
    assert during == [1] * 6


async def test_a_handler_may_close_its_descriptor(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)

    async def fill(event: Event) -> None:
        with os.fdopen(event.fd, "r+b") as file:
            file.write(b"filled")

    async with site.serving(fill):
        assert await accessor.run("pread_path", path, 6, 0) == b"filled"


async def test_a_program_can_be_executed_though_its_descriptor_is_writable(
    site: Site, accessor: Accessor
) -> None:
    path = site.make("program", mode=0o755)
    shutil.copyfile(shutil.which("true") or "/bin/true", site.content / "program")

    async with site.serving(allow, ["OPEN_EXEC_PERM", "OPEN_PERM"]):
        for _ in range(20):
            assert (await accessor.run("execute", path))[0] == 0


# The end


async def test_cancelling_leaves_no_event_unanswered(site: Site, make_accessor: MakeAccessor) -> None:
    path = site.stub("stub", PAGE)
    both = trio.Event()
    waiting = 0

    async def wait(event: Event) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 2:
            both.set()
        await trio.sleep_forever()

    accessors = [make_accessor() for _ in range(2)]
    async with site.group() as group:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, group, wait)
            calls = [each.start("pread_path", path, 1, 0) for each in accessors]
            await both.wait()
            nursery.cancel_scope.cancel()
        # Answered by serve itself: the group still stands.
        for call in calls:
            with pytest.raises(OSError) as denied:
                await call.wait()
            assert denied.value.errno == errno.EIO


async def test_a_thread_that_never_ends_does_not_hold_up_the_end(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)
    may_end = threading.Event()
    ended = threading.Event()
    begun = trio.Event()
    token = trio.lowlevel.current_trio_token()
    written: list[int] = []

    def hang(event: Event) -> None:
        trio.from_thread.run_sync(begun.set, trio_token=token)
        try:
            may_end.wait(60)
            written.append(os.pwrite(event.fd, b"late", 0))
        finally:
            ended.set()

    try:
        async with site.group() as group:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, group, hang)
                call = accessor.start("pread_path", path, 1, 0)
                await begun.wait()
                nursery.cancel_scope.cancel()
            with pytest.raises(OSError) as denied:
                await call.wait()
            assert denied.value.errno == errno.EIO
    finally:
        may_end.set()
    await trio.to_thread.run_sync(ended.wait)
    # Its descriptor was left open until then: no other file can have got its number meanwhile.
    assert written == [4]


async def test_closing_the_group_lets_accesses_pass(site: Site, accessor: Accessor) -> None:
    path = site.stub("stub", PAGE)
    async with site.serving(allow):
        await accessor.run("pread_path", path, 1, 0)
    assert await accessor.run("pread_path", path, 1, 0) == b"\0"


async def test_serve_ends_with_an_error_when_the_group_is_closed(site: Site) -> None:
    async def served(group: Group) -> None:
        with pytest.raises(OSError) as ended:
            await serve(group, allow)
        assert ended.value.errno == errno.EBADF

    async with site.group() as group, trio.open_nursery() as nursery:
        nursery.start_soon(served, group)
        await trio.testing.wait_all_tasks_blocked()
        group.close()


# Files by their paths, below the overlay


async def test_a_handler_opens_a_file_by_its_path(site: Site, accessor: Accessor) -> None:
    path, other = site.stub("stub", PAGE), site.stub("other", PAGE)
    seen: list[str] = []

    async with site.group() as group, trio.open_nursery() as nursery:

        async def fill_the_other(event: Event) -> None:
            seen.append(event.path)
            if event.pid == accessor.pid:
                descriptor = await group.backing(other)
                # In a thread: on the real kernel this access makes an event.
                await trio.to_thread.run_sync(os.pwrite, descriptor, b"from elsewhere", 0)
                os.close(descriptor)

        nursery.start_soon(serve, group, fill_the_other)
        await accessor.run("pread_path", path, 1, 0)
        nursery.cancel_scope.cancel()
    assert (site.content / "other").read_bytes()[:14] == b"from elsewhere"
    # The real kernel has nothing below: there the handler's own access makes an event.
    assert seen == ([path, other] if isinstance(group, KernelGroup) else [path])


async def test_a_file_by_its_path_is_the_file_that_open_finds(site: Site, tmp_path: Path) -> None:
    (site.content / "directory").mkdir()
    (site.content / "directory" / "file").write_bytes(b"content")
    (site.content / "link").symlink_to("directory/file")
    (site.content / "away").symlink_to("/etc/passwd")
    (tmp_path / "to-the-site").symlink_to(site.path)
    ways = ["directory/file", "directory/../directory/./file", "link"]

    async with site.serving(allow) as group:
        for path in [*(site.path / way for way in ways), tmp_path / "to-the-site" / "link"]:
            descriptor = await group.backing(path)
            # In a thread: on the real kernel this access makes an event.
            assert await trio.to_thread.run_sync(os.pread, descriptor, 99, 0) == b"content"
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)
        os.close(await group.backing(os.fsencode(site.path), os.O_RDONLY | os.O_DIRECTORY))
        for name, flags, number in [
            ("nothing", os.O_RDWR, errno.ENOENT),
            ("directory", os.O_RDWR, errno.EISDIR),
            ("link", os.O_RDWR | os.O_NOFOLLOW, errno.ELOOP),
            ("new", os.O_RDWR | os.O_CREAT, errno.EINVAL),
        ]:
            with pytest.raises(OSError) as refused:
                await group.backing(site.path / name, flags)
            assert refused.value.errno == number, name
        if not isinstance(group, KernelGroup):
            for path in (site.path / "away", tmp_path):
                with pytest.raises(OSError, match="not on the fusehsm mount") as refused:
                    await group.backing(path, os.O_RDONLY)
                assert refused.value.errno == errno.EXDEV
