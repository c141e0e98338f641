"""What happens on a group, step by step: one set of scenarios for our Group and for the real kernel's.

Each takes `make`, which makes a `Side`: a group with marks so that every read of "the file" raises one event. `test_group.py` runs them
on fusehsm, `test_kernel_rules.py` on the running kernel.
"""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest

from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_ALLOW,
    FAN_CLASS_CONTENT,
    FAN_CLASS_PRE_CONTENT,
    FAN_DENY,
    FAN_OPEN,
    FAN_Q_OVERFLOW,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TID,
    LINUX_6_14,
    RawEvent,
    decode_events,
    deny_errno,
    encode_response,
)
from tests.support.row_tests import error_of
from tests.support.rule_rows import ResponseRow

PRE, CONTENT = FAN_CLASS_PRE_CONTENT, FAN_CLASS_CONTENT
P = LINUX_6_14.pre_access
QUEUE_LIMIT = 16384


class Reading(Protocol):
    """A process that reads the file: `pid`, `tid`; result() waits for its errno, 0 when it was allowed."""

    pid: int
    tid: int

    def result(self) -> int: ...

    def kill(self) -> None:
        """SIGKILL, and it is dead when this returns."""


class Side(Protocol):
    """One group. Of class PRE_CONTENT it watches PRE_ACCESS of the file, of CONTENT, ACCESS_PERM; always OPEN of another file."""

    def start_reading(self, *, busy: bool = False) -> Reading:
        """A process reads the file; returns when the event is queued. `busy`: another file, which runs, so that it cannot be
        opened for writing."""

    def read_unasked(self) -> int:
        """A process reads the file, and is not made to wait: its errno."""

    def notify(self, *, busy: bool = False) -> None:
        """Queue a notification: the other file, or the busy one, is opened."""

    def fill_queue(self) -> None:
        """Queue as many notifications as the queue holds, no two alike."""

    def unmark(self) -> None:
        """Remove every mark."""

    def read(self, size: int = 4096) -> bytes:
        """read(2); the kernel's errors."""

    def write(self, data: bytes) -> int:
        """write(2); the kernel's errors."""

    def close_event_fd(self, fd: int) -> None:
        """close(2) of an event fd."""

    @property
    def queued_bytes(self) -> int:
        """ioctl(FIONREAD)."""

    def close(self) -> None:
        """Close the group."""


class Make(Protocol):
    """Makes a Side from what goes to fanotify_init(2); all end with the test."""

    def __call__(self, flags: int = PRE, event_f_flags: int = os.O_RDONLY) -> Side: ...


def events_of(side: Side, size: int = 4096) -> list[RawEvent]:
    """One read, decoded."""
    return decode_events(LINUX_6_14, side.read(size))


def one_event(side: Side) -> RawEvent:
    """One read that must give one event."""
    (event,) = events_of(side)
    return event


def answer(side: Side, event: RawEvent, response: int = FAN_ALLOW) -> None:
    """Answer, which must be taken."""
    assert side.write(encode_response(event.fd, response)) == 8


def queued_events(side: Side) -> int:
    """By FIONREAD, which counts 24 bytes for each."""
    assert side.queued_bytes % 24 == 0
    return side.queued_bytes // 24


# Reading


def an_empty_queue(make: Make) -> None:
    side = make()
    for size in (0, 1, 4096):
        with pytest.raises(BlockingIOError):
            side.read(size)


def one_read_of_the_file(make: Make) -> None:
    side = make()
    reading = side.start_reading()
    event = one_event(side)
    assert event == RawEvent(P, event.fd, reading.pid, 0, 4096, None, 48)
    assert event.fd >= 0
    answer(side, event)
    assert reading.result() == 0


def a_content_group_sees_access_perm_without_a_range(make: Make) -> None:
    side = make(CONTENT)
    reading = side.start_reading()
    event = one_event(side)
    assert event == RawEvent(FAN_ACCESS_PERM, event.fd, reading.pid, None, None, None, 24)
    answer(side, event)
    assert reading.result() == 0


def a_buffer_smaller_than_the_event(make: Make) -> None:
    side = make()
    reading = side.start_reading()
    for size in range(48):
        assert error_of(side.read, size) == errno.EINVAL
    assert queued_events(side) == 1
    (event,) = events_of(side, 48)
    answer(side, event)
    assert reading.result() == 0


def a_buffer_smaller_than_an_event_with_pidfd(make: Make) -> None:
    side = make(PRE | FAN_REPORT_PIDFD)
    reading = side.start_reading()
    assert error_of(side.read, 55) == errno.EINVAL
    (event,) = events_of(side, 56)
    assert event.pidfd is not None
    assert event.pidfd >= 0
    assert (event.length, event.offset, event.count) == (56, 0, 4096)
    side.close_event_fd(event.pidfd)
    answer(side, event)
    assert reading.result() == 0


def a_buffer_smaller_than_a_notification(make: Make) -> None:
    side = make()
    side.notify()
    assert error_of(side.read, 23) == errno.EINVAL
    (event,) = events_of(side, 24)
    assert (event.mask, event.length) == (FAN_OPEN, 24)


def a_buffer_for_some_of_the_events(make: Make) -> None:
    side = make()
    readings = [side.start_reading() for _ in range(4)]
    first = events_of(side, 48 * 2 + 47)
    assert len(first) == 2
    assert queued_events(side) == 2
    rest = events_of(side)
    assert len(rest) == 2
    assert [event.pid for event in first + rest] == [reading.pid for reading in readings]
    assert len({event.fd for event in first + rest}) == 4
    for event in first + rest:
        answer(side, event)
    assert [reading.result() for reading in readings] == [0] * 4


def notifications_and_permission_events_are_one_queue(make: Make) -> None:
    side = make()
    before = side.start_reading()
    side.notify()
    after = side.start_reading()
    assert queued_events(side) == 3
    first, second, third = events_of(side)
    assert (first.mask, second.mask, third.mask) == (P, FAN_OPEN, P)
    assert (first.pid, third.pid) == (before.pid, after.pid)
    # Nobody waits for a notification's answer.
    assert error_of(side.write, encode_response(second.fd, FAN_ALLOW)) == errno.ENOENT
    answer(side, first)
    answer(side, third)


def equal_notifications_are_merged(make: Make) -> None:
    side = make()
    side.notify()
    reading = side.start_reading()
    side.notify()
    assert queued_events(side) == 2
    notification, event = events_of(side)
    assert (notification.mask, event.mask) == (FAN_OPEN, P)
    # Not with one that has been read.
    side.notify()
    assert one_event(side).mask == FAN_OPEN
    answer(side, event)
    assert reading.result() == 0


def a_short_event_that_fits_waits_behind_a_long_one(make: Make) -> None:
    side = make()
    side.notify()
    reading = side.start_reading()
    assert [event.mask for event in events_of(side, 24 + 47)] == [FAN_OPEN]
    side.notify()
    assert error_of(side.read, 47) == errno.EINVAL
    long, short = events_of(side)
    assert (long.mask, short.mask) == (P, FAN_OPEN)
    answer(side, long)
    assert reading.result() == 0


def the_thread_is_reported_where_asked_for(make: Make) -> None:
    side = make(PRE | FAN_REPORT_TID)
    reading = side.start_reading()
    event = one_event(side)
    assert event.pid == reading.tid
    answer(side, event)


# Answering


def answers_in_any_order(make: Make) -> None:
    side = make()
    readings = [side.start_reading() for _ in range(3)]
    events = events_of(side)
    for index, response in ((2, FAN_ALLOW), (0, FAN_DENY), (1, deny_errno(errno.EIO))):
        answer(side, events[index], response)
    assert [reading.result() for reading in readings] == [errno.EPERM, errno.EIO, 0]


def an_event_that_was_not_read_cannot_be_answered(make: Make) -> None:
    side = make()
    answered = side.start_reading()
    event = one_event(side)
    waiting = side.start_reading()
    answer(side, event)
    assert answered.result() == 0
    assert error_of(side.write, encode_response(event.fd, FAN_ALLOW)) == errno.ENOENT
    answer(side, one_event(side))
    assert waiting.result() == 0


def an_answer_cannot_be_given_twice(make: Make) -> None:
    side = make()
    reading = side.start_reading()
    event = one_event(side)
    answer(side, event, deny_errno(errno.EBUSY))
    assert error_of(side.write, encode_response(event.fd, FAN_ALLOW)) == errno.ENOENT
    assert reading.result() == errno.EBUSY


def only_the_first_of_two_responses_counts(make: Make) -> None:
    side = make()
    readings = [side.start_reading() for _ in range(2)]
    first, second = events_of(side)
    both = encode_response(first.fd, FAN_DENY) + encode_response(second.fd, FAN_DENY)
    assert side.write(both) == 8
    answer(side, second)
    assert [reading.result() for reading in readings] == [errno.EPERM, 0]


def an_event_can_be_answered_after_its_fd_is_closed(make: Make) -> None:
    side = make()
    reading = side.start_reading()
    event = one_event(side)
    side.close_event_fd(event.fd)
    answer(side, event, deny_errno(errno.ENOSPC))
    assert reading.result() == errno.ENOSPC


def a_reused_fd_number_is_answered_in_the_order_read(make: Make) -> None:
    side = make()
    first = side.start_reading()
    event = one_event(side)
    side.close_event_fd(event.fd)
    second = side.start_reading()
    assert one_event(side).fd == event.fd
    answer(side, event, deny_errno(errno.EIO))
    assert first.result() == errno.EIO
    answer(side, event, deny_errno(errno.EBUSY))
    assert second.result() == errno.EBUSY
    assert error_of(side.write, encode_response(event.fd, FAN_ALLOW)) == errno.ENOENT


def unmarking_does_not_release_who_waits(make: Make) -> None:
    side = make()
    outstanding = side.start_reading()
    event = one_event(side)
    queued = side.start_reading()
    side.unmark()
    answer(side, event, deny_errno(errno.EIO))
    answer(side, one_event(side), deny_errno(errno.EBUSY))
    assert (outstanding.result(), queued.result()) == (errno.EIO, errno.EBUSY)
    assert side.read_unasked() == 0


# Ends


def closing_allows(make: Make) -> None:
    side = make()
    outstanding = side.start_reading()
    one_event(side)
    queued = side.start_reading()
    side.close()
    assert (outstanding.result(), queued.result()) == (0, 0)


def killed_while_queued(make: Make) -> None:
    side = make()
    before, killed, after = (side.start_reading() for _ in range(3))
    killed.kill()
    assert queued_events(side) == 2
    first, second = events_of(side)
    assert (first.pid, second.pid) == (before.pid, after.pid)
    answer(side, first)
    answer(side, second)


def killed_while_alone_in_the_queue(make: Make) -> None:
    side = make()
    side.start_reading().kill()
    assert queued_events(side) == 0
    with pytest.raises(BlockingIOError):
        side.read()


def killed_after_it_was_read(make: Make) -> None:
    side = make()
    killed = side.start_reading()
    event = one_event(side)
    killed.kill()
    answer(side, event, FAN_DENY)
    assert error_of(side.write, encode_response(event.fd, FAN_ALLOW)) == errno.ENOENT


# Event fds that cannot be opened


def a_file_that_cannot_be_opened_denies(make: Make) -> None:
    side = make(event_f_flags=os.O_RDWR)
    reading = side.start_reading(busy=True)
    assert error_of(side.read) == errno.ETXTBSY
    assert reading.result() == errno.EPERM
    assert queued_events(side) == 0


def behind_a_good_event_it_is_dropped_silently(make: Make) -> None:
    side = make(event_f_flags=os.O_RDWR)
    good = side.start_reading()
    bad = side.start_reading(busy=True)
    other = side.start_reading()
    event = one_event(side)
    assert event.pid == good.pid
    assert bad.result() == errno.EPERM
    # The bad one has ended that read; the next begins behind it.
    following = one_event(side)
    assert following.pid == other.pid
    answer(side, event)
    answer(side, following)


def fd_error_tells_why(make: Make) -> None:
    side = make(PRE | FAN_REPORT_FD_ERROR, event_f_flags=os.O_RDWR)
    bad = side.start_reading(busy=True)
    good = side.start_reading()
    event, following = events_of(side)
    assert event == RawEvent(P, -errno.ETXTBSY, bad.pid, 0, 4096, None, 48)
    assert bad.result() == errno.EPERM
    assert error_of(side.write, encode_response(event.fd, FAN_ALLOW)) == errno.EINVAL
    answer(side, following)
    assert good.result() == 0


def fd_error_with_pidfd_tells_who(make: Make) -> None:
    side = make(PRE | FAN_REPORT_FD_ERROR | FAN_REPORT_PIDFD, event_f_flags=os.O_RDWR)
    bad = side.start_reading(busy=True)
    event = one_event(side)
    assert (event.fd, event.pid, event.length) == (-errno.ETXTBSY, bad.pid, 56)
    assert event.pidfd is not None
    assert event.pidfd >= 0
    side.close_event_fd(event.pidfd)


def a_notification_of_a_file_that_cannot_be_opened_is_lost(make: Make) -> None:
    side = make(event_f_flags=os.O_RDWR)
    side.notify(busy=True)
    assert error_of(side.read) == errno.ETXTBSY
    with pytest.raises(BlockingIOError):
        side.read()


# Overflow


def _overflow(make: Make, flags: int, fd: int, pidfd: int | None, length: int) -> None:
    side = make(PRE | flags)
    side.fill_queue()
    assert queued_events(side) == QUEUE_LIMIT
    assert [side.read_unasked() for _ in range(3)] == [0, 0, 0]
    assert queued_events(side) == QUEUE_LIMIT + 1
    events = []
    while queued_events(side):
        batch = events_of(side, 1 << 16)
        for event in batch:
            for descriptor in (event.fd, event.pidfd):
                if descriptor is not None and descriptor >= 0:
                    side.close_event_fd(descriptor)
        events += batch
    assert {event.mask for event in events[:-1]} == {FAN_OPEN}
    assert events[-1] == RawEvent(FAN_Q_OVERFLOW, fd, 0, None, None, pidfd, length)
    # There is room again.
    reading = side.start_reading()
    answer(side, one_event(side), FAN_DENY)
    assert reading.result() == errno.EPERM


def a_full_queue_allows_and_says_so_once(make: Make) -> None:
    _overflow(make, 0, -1, None, 24)


def a_full_queue_with_errors_and_pidfds(make: Make) -> None:
    _overflow(make, FAN_REPORT_FD_ERROR | FAN_REPORT_PIDFD, -errno.EBADF, -errno.ESRCH, 32)


def _scenarios() -> Iterator[Callable[[Make], None]]:
    for name, value in globals().items():
        if getattr(value, "__annotations__", {}).get("make") is Make and not name.startswith("_"):
            yield value


SCENARIOS = {scenario.__name__: scenario for scenario in _scenarios()}


def check_response(make: Make, row: ResponseRow) -> None:
    """One row of rule_rows.response_rows on a group with one outstanding event."""
    side = make(row.group_flags)
    reading = side.start_reading()
    event = one_event(side)
    data = row.data(event.fd)
    if row.result < 0:
        assert error_of(side.write, data) == -row.result
    else:
        assert side.write(data) == row.result
    if row.decision is None:
        answer(side, event)  # that it can be answered shows that it was waiting
    assert reading.result() == (row.decision or 0)


def check_errnos(make: Make, rows: Iterator[ResponseRow], group_flags: int) -> None:
    """Many rows for one group: the refused ones leave the event waiting."""
    side = make(group_flags)
    reading = side.start_reading()
    event = one_event(side)
    for row in rows:
        if row.result < 0:
            assert error_of(side.write, row.data(event.fd)) == -row.result, row.name
            continue
        assert side.write(row.data(event.fd)) == row.result, row.name
        assert reading.result() == row.decision, row.name
        reading = side.start_reading()
        side.close_event_fd(event.fd)
        event = one_event(side)
    answer(side, event)
    assert reading.result() == 0
