"""What serve makes of events that no accessor can be made to cause at will: overflow, files that cannot be opened, notifications."""

import errno
import logging
import os
import tempfile
from collections import deque

import pytest
import trio
import trio.testing

from fusehsm.backends.base import AT_FDCWD, AnyPath, Group
from fusehsm.events import Event
from fusehsm.fanotify.abi import (
    FAN_ALLOW,
    FAN_CLASS_PRE_CONTENT,
    FAN_NONBLOCK,
    FAN_OPEN,
    FAN_Q_OVERFLOW,
    LINUX_6_14,
    RawEvent,
    encode_event,
    encode_response,
)
from fusehsm.handler import serve

P = LINUX_6_14.pre_access


class Replay(Group):
    """A backend whose events are given beforehand: bytes, or the error that read() raises."""

    def __init__(self, *events: bytes | OSError) -> None:
        super().__init__(FAN_CLASS_PRE_CONTENT | FAN_NONBLOCK, os.O_RDWR, LINUX_6_14)
        self._events = deque(events)
        self.responses: list[bytes] = []

    def fileno(self) -> int:
        raise NotImplementedError

    async def mark(
        self, flags: int, mask: int, dirfd: int = AT_FDCWD, path: str | bytes | None = None
    ) -> None:
        raise NotImplementedError

    async def backing(self, path: AnyPath, flags: int = os.O_RDWR) -> int:
        raise NotImplementedError

    def read(self, size: int) -> bytes:
        event = self._events.popleft()
        if isinstance(event, OSError):
            raise event
        assert len(event) <= size
        return event

    def write(self, data: bytes) -> int:
        self.responses.append(data)
        return len(data)

    def event_path(self, raw_event: RawEvent) -> str:
        return "/somewhere"

    async def wait_readable(self) -> None:
        if self._events:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep_forever()

    def close(self) -> None:
        self._events.clear()


def some_file() -> int:
    descriptor, path = tempfile.mkstemp()
    os.unlink(path)
    return descriptor


async def handed_over(group: Group) -> list[Event]:
    """What a handler sees until nothing more comes."""
    seen: list[Event] = []

    async def look(event: Event) -> None:
        os.fstat(event.fd)
        seen.append(event)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, look)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return seen


async def test_an_overflow_is_logged_and_not_handed_over(caplog: pytest.LogCaptureFixture) -> None:
    good = some_file()
    group = Replay(
        encode_event(LINUX_6_14, FAN_Q_OVERFLOW, -1, 0),
        encode_event(LINUX_6_14, P, good, 1, range_=(0, 4096)),
    )
    (event,) = await handed_over(group)
    assert event.fd == good
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "overflowed" in caplog.text
    assert group.responses == [encode_response(good, FAN_ALLOW)]


@pytest.mark.parametrize(
    "lost",
    [
        encode_event(LINUX_6_14, P, -errno.ETXTBSY, 1, range_=(0, 4096)),
        OSError(errno.ETXTBSY, "Text file busy"),
        OSError(errno.EMFILE, "Too many open files"),
    ],
)
async def test_a_file_that_cannot_be_opened_is_logged_and_no_answer_is_owed(
    caplog: pytest.LogCaptureFixture, lost: bytes | OSError
) -> None:
    good = some_file()
    group = Replay(lost, encode_event(LINUX_6_14, P, good, 1, range_=(0, 4096)))
    (event,) = await handed_over(group)
    assert event.fd == good
    assert "cannot be opened" in caplog.text
    assert group.responses == [encode_response(good, FAN_ALLOW)]


async def test_notifications_are_handed_over_and_want_no_answer() -> None:
    first, second = some_file(), some_file()
    # Two short events in the room of one long one.
    group = Replay(
        encode_event(LINUX_6_14, FAN_OPEN, first, 1) + encode_event(LINUX_6_14, FAN_OPEN, second, 2)
    )
    events = await handed_over(group)
    assert [(event.fd, event.pid, event.names, event.offset) for event in events] == [
        (first, 1, ["OPEN"], None),
        (second, 2, ["OPEN"], None),
    ]
    assert group.responses == []
    for descriptor in (first, second):
        with pytest.raises(OSError) as closed:
            os.fstat(descriptor)
        assert closed.value.errno == errno.EBADF


async def test_a_failing_handler_of_a_notification_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    group = Replay(
        encode_event(LINUX_6_14, FAN_OPEN, some_file(), 1), encode_event(LINUX_6_14, FAN_OPEN, some_file(), 2)
    )
    pids: list[int] = []

    async def fail(event: Event) -> None:
        pids.append(event.pid)
        raise ValueError("a mistake")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, fail)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert pids == [1, 2]
    assert [record.getMessage() for record in caplog.records] == ["/somewhere: the handler failed"] * 2
    assert group.responses == []


async def test_a_close_that_tells_of_lost_content_denies(monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = some_file()
    group = Replay(encode_event(LINUX_6_14, P, descriptor, 1, range_=(0, 4096)))
    close = os.close

    def close_of_a_full_network_share(number: int) -> None:
        close(number)
        if number == descriptor:
            raise OSError(errno.EDQUOT, "quota exceeded")

    monkeypatch.setattr(os, "close", close_of_a_full_network_share)
    await handed_over(group)
    assert group.responses == [encode_response(descriptor, 2 | errno.EDQUOT << 24)]


async def test_what_was_read_and_not_begun_is_denied_when_cancelled() -> None:
    first, second = some_file(), some_file()
    # ACCESS_PERM and OPEN_PERM are short: one read brings two.
    group = Replay(encode_event(LINUX_6_14, 0x20000, first, 1) + encode_event(LINUX_6_14, 0x10000, second, 1))

    async def wait(event: Event) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(group, wait, limit=1))
        await trio.testing.wait_all_tasks_blocked()
        assert group.responses == []
        nursery.cancel_scope.cancel()
    denial = 2 | errno.EIO << 24
    assert group.responses == [encode_response(first, denial), encode_response(second, denial)]


async def test_a_handler_that_ends_the_program_leaves_no_event_unanswered() -> None:
    descriptor = some_file()
    group = Replay(encode_event(LINUX_6_14, P, descriptor, 1, range_=(0, 4096)))

    async def give_up(event: Event) -> None:
        raise SystemExit(3)

    with pytest.raises(BaseExceptionGroup) as ended:
        await serve(group, give_up)
    assert ended.group_contains(SystemExit)
    assert group.responses == [encode_response(descriptor, 2 | errno.EIO << 24)]
