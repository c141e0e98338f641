"""One emulated group: the scenarios that the kernel is put through too, and what only a group of ours has."""

import errno
import itertools
import os
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fusehsm.emulator.group import MAX_QUEUED_EVENTS, Group, Pending, PendingState
from fusehsm.events import EventShape
from fusehsm.fanotify.abi import (
    FAN_ALLOW,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLASS_PRE_CONTENT,
    FAN_DENY,
    FAN_MARK_ADD,
    FAN_OPEN,
    FAN_Q_OVERFLOW,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_PIDFD,
    FAN_UNLIMITED_QUEUE,
    LINUX_6_14,
    PATCH_V1,
    decode_events,
    encode_response,
)
from tests.support.group_scenarios import QUEUE_LIMIT, SCENARIOS, Make, check_errnos, check_response
from tests.support.row_tests import error_of, row_names
from tests.support.rule_rows import CONTENT, PRE, ResponseRow, errno_rows, response_rows

P = LINUX_6_14.pre_access
READ = EventShape(P, 0, 4096)
ACCESS = EventShape(0x20000, None, None)
OPENED = EventShape(FAN_OPEN, None, None)


class EmulatedReading:
    """A process that waits for its event's answer, as the gate would let it."""

    def __init__(self, side: "EmulatedSide", pid: int, busy: bool) -> None:
        self.pid, self.tid = pid, pid + 50000
        self._side = side
        self._answers: list[int] = []
        self.pending = side.put(READ if side.group.priority == 2 else ACCESS, pid, self.tid, busy)
        if self.pending is not None:
            self.pending.on_answer = lambda pending: self._answers.append(pending.errno)

    def result(self) -> int:
        if self.pending is None or self.pending in self._side.released:
            assert self._answers == []
            return 0
        (answer,) = self._answers
        return answer

    def kill(self) -> None:
        assert self.pending is not None
        self._side.group.withdraw(self.pending)


class EmulatedSide:
    """A Group without a mount: numbers for descriptors, given as open(2) does."""

    def __init__(self, flags: int = PRE, event_f_flags: int = os.O_RDONLY) -> None:
        self.group = Group(flags, event_f_flags, LINUX_6_14)
        self.released: list[Pending] = []
        self._pids = itertools.count(1000)
        self._open: set[int] = set()

    def put(
        self,
        shape: EventShape,
        pid: int,
        tid: int,
        busy: bool = False,
        permission: bool = True,
        path: bytes = b"/file",
    ) -> Pending | None:
        return self.group.put(shape, pid=pid, tid=tid, target=busy, path=path, permission=permission)

    def start_reading(self, *, busy: bool = False) -> EmulatedReading:
        reading = EmulatedReading(self, next(self._pids), busy)
        assert reading.pending is not None
        return reading

    def read_unasked(self) -> int:
        if self.group.marks.empty:
            return 0
        reading = EmulatedReading(self, next(self._pids), False)
        assert reading.pending is None
        return reading.result()

    def notify(self, *, busy: bool = False) -> None:
        self.put(OPENED, 1, 1, busy, permission=False)

    def fill_queue(self) -> None:
        # By a name of its own each: equal notifications are merged.
        for number in range(QUEUE_LIMIT):
            self.put(OPENED, 1, 1, permission=False, path=b"/links/%d" % number)

    def unmark(self) -> None:
        self.group.marks.clear()

    def read(self, size: int = 4096) -> bytes:
        return self.group.read(size, self._open_file, lambda pending: self._number())

    def _open_file(self, pending: Pending) -> int:
        if pending.target and self.group.event_f_flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.ETXTBSY, "busy")
        return self._number()

    def _number(self) -> int:
        number = next(number for number in itertools.count(10) if number not in self._open)
        self._open.add(number)
        return number

    def write(self, data: bytes) -> int:
        return self.group.write(data)

    def close_event_fd(self, fd: int) -> None:
        self._open.remove(fd)

    @property
    def queued_bytes(self) -> int:
        return self.group.queued_bytes

    def close(self) -> None:
        self.released += self.group.close()


@pytest.fixture
def make() -> Make:
    def make_marked(flags: int = PRE, event_f_flags: int = os.O_RDONLY) -> EmulatedSide:
        side = EmulatedSide(flags, event_f_flags)
        side.group.marks.modify(FAN_MARK_ADD, FAN_OPEN, 1, opened_for_write=False)
        return side

    return make_marked


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_scenario(scenario: Callable[[Make], None], make: Make) -> None:
    scenario(make)


@pytest.mark.parametrize("row", list(response_rows()), ids=row_names)
def test_response(row: ResponseRow, make: Make) -> None:
    check_response(make, row)


@pytest.mark.parametrize("group_class", [CONTENT, PRE], ids=["CONTENT", "PRE"])
def test_every_errno(group_class: int, make: Make) -> None:
    check_errnos(make, errno_rows(group_class), group_class)


# What the gate and the servers use


def new_group(flags: int = PRE, **more: int) -> Group:
    return Group(flags, os.O_RDWR, LINUX_6_14, **more)  # type: ignore[arg-type]


def put(group: Group, shape: EventShape = READ, **more: object) -> Pending:
    pending = group.put(shape, pid=1, tid=2, target="node", path=b"/x", **more)  # type: ignore[arg-type]
    assert pending is not None
    return pending


@pytest.mark.parametrize(
    ("flags", "priority"),
    [
        (FAN_CLASS_PRE_CONTENT, 2),
        (FAN_CLASS_CONTENT, 1),
        (FAN_CLASS_NOTIF, 0),
        (FAN_CLASS_PRE_CONTENT | 0x3, 2),
    ],
)
def test_priority(flags: int, priority: int) -> None:
    assert new_group(flags).priority == priority


def test_arguments_are_checked() -> None:
    assert error_of(new_group, CONTENT | PRE) == errno.EINVAL
    assert error_of(Group, PRE, os.O_DIRECTORY, LINUX_6_14) == errno.EINVAL


@pytest.mark.parametrize("flags", [0x200, 0x400, 0xE00, 0x4000])
def test_what_the_kernel_has_and_we_have_not_is_refused(flags: int) -> None:
    assert error_of(new_group, flags) == errno.EOPNOTSUPP


def test_take_and_answer() -> None:
    group = new_group()
    answered: list[tuple[str, int]] = []
    first, second = put(group), put(group)
    for name, pending in (("first", first), ("second", second)):
        pending.on_answer = lambda pending, name=name: answered.append((name, pending.errno))
    assert group.take() is first
    assert (first.state, second.state) == (PendingState.REPORTED, PendingState.QUEUED)
    assert group.take() is second
    assert group.take() is None
    group.answer(second, errno.EIO)
    group.answer(first, 0)
    assert answered == [("second", errno.EIO), ("first", 0)]
    assert first.state is second.state is PendingState.ANSWERED
    assert group.outstanding_events == 0


def test_only_outstanding_events_are_answered() -> None:
    group = new_group()
    pending = put(group)
    assert error_of(group.answer, pending, 0) == errno.ENOENT
    group.take()
    group.answer(pending, errno.EIO)
    assert error_of(group.answer, pending, 0) == errno.ENOENT
    assert pending.errno == errno.EIO


def test_an_event_that_was_taken_can_be_answered_by_value_when_it_was_read_as_bytes() -> None:
    group = new_group()
    pending = put(group)
    group.read(4096, lambda pending: 7)
    group.answer(pending, 0)
    assert error_of(group.write, encode_response(7, FAN_ALLOW)) == errno.ENOENT


def test_a_notification_wants_no_answer() -> None:
    group = new_group()
    pending = put(group, OPENED, permission=False)
    assert group.take() is pending
    assert pending.state is PendingState.DELIVERED
    assert error_of(group.answer, pending, 0) == errno.ENOENT
    assert group.close() == []


def test_withdrawn_events_are_not_called_back() -> None:
    group = new_group()
    queued, outstanding, answered = put(group), put(group), put(group)
    for pending in (queued, outstanding):
        pending.on_answer = lambda pending: pytest.fail("called back")
    group.withdraw(queued)
    assert group.take() is outstanding
    group.withdraw(outstanding)
    group.answer(outstanding, errno.EIO)
    assert queued.state is outstanding.state is PendingState.CANCELLED
    assert error_of(group.answer, outstanding, 0) == errno.ENOENT
    group.take()
    group.answer(answered, errno.EIO)
    group.withdraw(answered)
    assert (answered.state, answered.errno) == (PendingState.ANSWERED, errno.EIO)
    group.withdraw(queued)
    assert group.statistics["withdrawn"] == 2


def test_on_readable_is_called_for_every_event() -> None:
    group = new_group(max_queued_events=2)
    lengths: list[int] = []
    group.on_readable = lambda: lengths.append(group.queued_events)
    put(group)
    put(group)
    assert group.put(READ, pid=1, tid=1, target=None, path=b"") is None
    assert group.put(READ, pid=1, tid=1, target=None, path=b"") is None
    assert lengths == [1, 2, 3]  # the third is the overflow event


def test_overflow_is_queued_again_after_it_was_read() -> None:
    group = new_group(max_queued_events=1)
    put(group)
    for _ in range(2):
        assert group.put(READ, pid=1, tid=1, target=None, path=b"") is None
    assert [group.take() is not None for _ in range(3)] == [True, True, False]
    put(group)
    assert group.put(READ, pid=1, tid=1, target=None, path=b"") is None
    masks = [pending.shape.mask for pending in iter(group.take, None)]
    assert masks == [P, FAN_Q_OVERFLOW]
    assert group.statistics["overflowed"] == 3


def test_an_unlimited_queue() -> None:
    group = new_group(PRE | FAN_UNLIMITED_QUEUE, max_queued_events=1)
    for _ in range(100):
        put(group)
    assert group.queued_events == 100


def test_the_default_limit_is_the_kernels() -> None:
    assert MAX_QUEUED_EVENTS == QUEUE_LIMIT


def test_close_gives_back_what_is_unanswered() -> None:
    group = new_group()
    group.marks.modify(FAN_MARK_ADD, P, 1, opened_for_write=False)
    pendings = [put(group) for _ in range(5)]
    put(group, OPENED, permission=False)
    group.read(48 * 3, lambda pending: 7)
    group.answer(pendings[1], 0)
    group.withdraw(pendings[2])
    group.withdraw(pendings[3])
    for pending in pendings:
        pending.on_answer = lambda pending: pytest.fail("called back")
    assert group.close() == [pendings[0], pendings[4]]
    assert group.close() == []
    assert group.marks.empty
    assert (group.queued_events, group.outstanding_events) == (0, 0)
    assert group.put(READ, pid=1, tid=1, target=None, path=b"") is None
    group.withdraw(pendings[0])
    assert error_of(group.answer, pendings[4], 0) == errno.ENOENT
    assert error_of(group.write, encode_response(7, FAN_ALLOW)) == errno.ENOENT


def test_the_clock_is_the_callers() -> None:
    group = Group(PRE, os.O_RDONLY, LINUX_6_14, clock=lambda: 12.5)
    assert put(group).created == 12.5


def test_statistics() -> None:
    group = new_group()
    pendings = [put(group) for _ in range(4)]
    for _ in pendings:
        group.take()
    group.answer(pendings[0], 0)
    group.answer(pendings[1], errno.EIO)
    group.withdraw(pendings[2])
    put(group)

    def refuse(pending: Pending) -> int:
        raise OSError(errno.EMFILE, "no room")

    assert error_of(group.read, 4096, refuse) == errno.EMFILE
    expected = {"queued": 5, "allowed": 1, "denied": 2, "withdrawn": 1, "overflowed": 0, "unopened": 1}
    assert group.statistics == expected


def _dead(pending: Pending) -> int:
    raise OSError(errno.ESRCH, "no such process")


@pytest.mark.parametrize(
    ("flags", "open_pidfd", "pidfd"),
    [
        (FAN_REPORT_PIDFD, lambda pending: 8, 8),
        (FAN_REPORT_PIDFD, _dead, -1),
        (FAN_REPORT_PIDFD, None, -1),
        (FAN_REPORT_PIDFD | FAN_REPORT_FD_ERROR, _dead, -errno.ESRCH),
        (FAN_REPORT_PIDFD | FAN_REPORT_FD_ERROR, None, -errno.ESRCH),
        (0, lambda pending: 8, None),
    ],
)
def test_pidfds(flags: int, open_pidfd: Callable[[Pending], int] | None, pidfd: int | None) -> None:
    group = new_group(PRE | flags)
    put(group)
    (event,) = decode_events(LINUX_6_14, group.read(4096, lambda pending: 7, open_pidfd))
    assert (event.fd, event.pidfd) == (7, pidfd)


def test_a_group_reads_its_own_dialect() -> None:
    group = Group(PRE, os.O_RDONLY, PATCH_V1)
    put(group, EventShape(PATCH_V1.pre_modify, 5, 7))
    assert group.length(put(group, EventShape(PATCH_V1.pre_access, 5, 7))) == 40
    first, _ = decode_events(PATCH_V1, group.read(80, lambda pending: 7))
    assert (first.mask, first.offset, first.count) == (PATCH_V1.pre_modify, 5, 7)


class AnyOrder(RuleBasedStateMachine):
    """Whatever is done in whatever order: every event is delivered at most once, in order, and answered at most once."""

    queued = Bundle("queued")
    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.group = new_group(max_queued_events=4)
        self.expected: list[Pending] = []
        self.waiting: set[Pending] = set()
        self.overflow = False
        self.answers: dict[Pending, int] = {}

    @rule(target=queued)
    def put(self) -> Pending | None:
        full = len(self.expected) + self.overflow >= 4
        pending = self.group.put(READ, pid=1, tid=1, target=None, path=b"")
        assert (pending is None) == full
        if pending is None:
            self.overflow = True
            return None
        self.expected.append(pending)
        pending.on_answer = lambda pending: self.answers.__setitem__(pending, pending.errno)
        return pending

    @rule(target=taken)
    def take(self) -> Pending | None:
        pending = self.group.take()
        if pending is None:
            assert not self.expected
            assert not self.overflow
        elif pending.shape.mask == FAN_Q_OVERFLOW:
            # Behind everything that was queued before it; what was queued after it comes later.
            assert self.overflow
            self.overflow = False
            return None
        else:
            assert pending is self.expected.pop(0)
            self.waiting.add(pending)
        return pending

    @rule(pending=st.one_of(queued, taken))
    def withdraw(self, pending: Pending | None) -> None:
        if pending is None:
            return
        self.group.withdraw(pending)
        if pending in self.expected:
            self.expected.remove(pending)

    @rule(pending=consumes(taken), error=st.sampled_from([0, errno.EIO]))
    def answer(self, pending: Pending | None, error: int) -> None:
        if pending is None:
            return
        withdrawn = pending.state is PendingState.CANCELLED
        self.group.answer(pending, error)
        self.waiting.remove(pending)
        assert self.answers.get(pending) == (None if withdrawn else error)
        assert error_of(self.group.answer, pending, 0) == errno.ENOENT

    @invariant()
    def counts_agree(self) -> None:
        assert self.group.queued_events == len(self.expected) + self.overflow
        assert self.group.outstanding_events == len(self.waiting)

    def teardown(self) -> None:
        unanswered = self.group.close()
        wanted = [pending for pending in self.waiting if pending.state is PendingState.REPORTED]
        assert set(unanswered) == {*wanted, *self.expected}
        assert len(unanswered) == len(wanted) + len(self.expected)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, deadline=None)


def test_denied_by_plain_deny_is_eperm() -> None:
    group = new_group()
    pending = put(group)
    group.read(4096, lambda pending: 7)
    assert group.write(encode_response(7, FAN_DENY)) == 8
    assert pending.errno == errno.EPERM
