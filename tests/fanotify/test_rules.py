"""Argument checks, row by row; the kernel is asked the same rows in test_kernel_rules.py."""

import errno
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusehsm.fanotify.abi import (
    DIALECTS,
    FAN_ALLOW,
    FAN_CLASS_PRE_CONTENT,
    FAN_ENABLE_AUDIT,
    LINUX_6_14,
    PATCH_V1,
    PATCH_V2,
    Dialect,
    deny_errno,
    encode_response,
)
from fusehsm.fanotify.rules import (
    ObjectKind,
    UnansweredEvents,
    check_init,
    check_mark,
    fill_buffer,
    parse_response,
)
from tests.support.row_tests import error_of, row_names
from tests.support.rule_rows import (
    ADD,
    CONTENT,
    EINVAL,
    EISDIR,
    ENOTDIR,
    EOC,
    FLUSH,
    FS,
    IGNORE,
    IGNORE_SURV,
    IGNORED,
    MOUNT,
    NOTIF,
    ONDIR,
    PRE,
    REMOVE,
    RULE,
    MarkRow,
    O,
    P,
    ResponseRow,
    X,
    errno_rows,
    init_rows,
    mark_rows,
    response_rows,
)

KINDS = {"file": ObjectKind.REGULAR, "dir": ObjectKind.DIRECTORY}
POSTINGS = pytest.mark.parametrize("dialect", [PATCH_V2, PATCH_V1], ids=lambda dialect: dialect.name)
# In the bits of the two postings.
OLD_P, OLD_M = PATCH_V2.pre_access, PATCH_V2.pre_modify


@pytest.mark.parametrize(("flags", "event_f_flags", "expected"), list(init_rows()))
def test_init(flags: int, event_f_flags: int, expected: int) -> None:
    assert error_of(check_init, flags, event_f_flags) == expected


@pytest.mark.parametrize("row", [row for row in mark_rows() if len(row.steps) == 1], ids=row_names)
def test_single_marks(row: MarkRow) -> None:
    """Errors that come from the call alone; sequences of calls are test_marks.py's."""
    (step,) = row.steps
    kind = KINDS.get(step.target, ObjectKind.OTHER)
    assert error_of(check_mark, row.group_class, LINUX_6_14, step.flags, step.mask, kind) == step.errno


@pytest.mark.parametrize(
    ("flags", "mask", "before", "after"),
    [
        pytest.param(ADD | IGNORE, P | EOC, 0, ENOTDIR, id="event-flags-of-an-ignore-mark"),
        pytest.param(ADD | IGNORE | FS, P, 0, EINVAL, id="filesystem-ignore-without-surv"),
        pytest.param(ADD, P | ONDIR, EINVAL, EINVAL, id="mask"),
        pytest.param(REMOVE | IGNORE, P | EOC, 0, 0, id="remove-does-not-look-at-the-object"),
    ],
)
def test_what_is_checked_before_the_path_is_looked_up(flags: int, mask: int, before: int, after: int) -> None:
    assert error_of(check_mark, PRE, LINUX_6_14, flags, mask, None) == before
    assert error_of(check_mark, PRE, LINUX_6_14, flags, mask, ObjectKind.REGULAR) == after


@POSTINGS
@pytest.mark.parametrize(
    ("group_class", "flags", "mask", "kind", "expected"),
    [
        (PRE, ADD, OLD_P, ObjectKind.REGULAR, 0),
        (PRE, ADD, OLD_M, ObjectKind.REGULAR, 0),
        (PRE, ADD | FS, OLD_P | OLD_M, ObjectKind.REGULAR, 0),
        (PRE, ADD, OLD_P | ONDIR, ObjectKind.DIRECTORY, 0),
        (PRE, ADD | FS, OLD_P | ONDIR, ObjectKind.DIRECTORY, 0),
        (PRE, ADD, OLD_M, ObjectKind.DIRECTORY, EISDIR),
        (PRE, ADD | MOUNT, OLD_M, ObjectKind.DIRECTORY, EISDIR),
        (PRE, ADD | FS, OLD_P | OLD_M, ObjectKind.DIRECTORY, EISDIR),
        (PRE, ADD | IGNORED, OLD_M, ObjectKind.DIRECTORY, EISDIR),
        (PRE, REMOVE, OLD_M, ObjectKind.DIRECTORY, 0),
        (PRE, ADD, OLD_P, ObjectKind.OTHER, EINVAL),
        (PRE, ADD, OLD_M, ObjectKind.OTHER, EINVAL),
        (PRE, ADD, 0x200000, ObjectKind.REGULAR, EINVAL),
        (CONTENT, ADD, OLD_P, ObjectKind.REGULAR, EINVAL),
        (CONTENT, ADD, OLD_M, ObjectKind.REGULAR, EINVAL),
        (CONTENT, ADD, O | X, ObjectKind.REGULAR, 0),
        (NOTIF, ADD, OLD_P, ObjectKind.REGULAR, EINVAL),
        (NOTIF, FLUSH, OLD_M, None, EINVAL),
        (PRE, ADD | IGNORE_SURV, OLD_P | ONDIR, ObjectKind.REGULAR, ENOTDIR),
        (PRE, ADD | IGNORE_SURV, OLD_P | ONDIR, ObjectKind.DIRECTORY, 0),
    ],
)
def test_marks_of_the_postings(
    dialect: Dialect, group_class: int, flags: int, mask: int, kind: ObjectKind | None, expected: int
) -> None:
    assert error_of(check_mark, group_class, dialect, flags, mask, kind) == expected


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("row", list(response_rows()), ids=row_names)
def test_responses(dialect: Dialect, row: ResponseRow) -> None:
    check_response(dialect, row)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("group_class", [CONTENT, PRE], ids=["CONTENT", "PRE"])
def test_every_errno(dialect: Dialect, group_class: int) -> None:
    for row in errno_rows(group_class):
        check_response(dialect, row)


def check_response(dialect: Dialect, row: ResponseRow) -> None:
    data = row.data(5)
    if row.result == -errno.ENOENT:
        assert parse_response(data, row.group_flags, dialect).fd == row.fd
    elif row.result < 0:
        assert error_of(parse_response, data, row.group_flags, dialect) == -row.result
    else:
        response = parse_response(data, row.group_flags, dialect)
        assert response.length == row.result
        assert response.probe == (row.decision is None)
        if row.decision is not None:
            assert (response.fd, response.decision_errno) == (5, row.decision)


def test_audit_is_told() -> None:
    group_flags = FAN_CLASS_PRE_CONTENT | FAN_ENABLE_AUDIT
    assert parse_response(encode_response(5, 0x11), group_flags, LINUX_6_14).audit
    assert not parse_response(encode_response(5, 0x01), group_flags, LINUX_6_14).audit
    assert parse_response(memoryview(encode_response(5, 0x31) + RULE), group_flags, LINUX_6_14).audit


def test_a_bad_errno_is_named_with_the_good_ones() -> None:
    good = "EAGAIN, EBUSY, EDQUOT, EIO, ENOSPC, EPERM, ETXTBSY"
    with pytest.raises(OSError, match=rf"errno 2 is none of {good}"):
        parse_response(encode_response(5, deny_errno(errno.ENOENT)), PRE, LINUX_6_14)


@given(data=st.binary(max_size=40), group_class=st.sampled_from([NOTIF, CONTENT, PRE]))
def test_any_response_is_taken_or_refused(data: bytes, group_class: int) -> None:
    if error := error_of(parse_response, data, group_class, LINUX_6_14):
        assert error == EINVAL
        return
    response = parse_response(data, group_class, LINUX_6_14)
    assert response.length <= len(data)
    assert response.decision_errno in {0, *LINUX_6_14.deny_errnos}
    assert response.probe or response.fd >= 0


@pytest.mark.parametrize(
    ("lengths", "size", "fitting"),
    [
        ([24], 24, 1),
        ([24, 24], 47, 1),
        ([24, 24], 48, 2),
        ([48, 24, 56], 80, 2),
        ([48, 24, 56], 128, 3),
        ([24, 48, 24], 50, 1),  # the third would fit, but order counts
    ],
)
def test_fill_buffer(lengths: list[int], size: int, fitting: int) -> None:
    assert fill_buffer(lengths, size) == fitting


@pytest.mark.parametrize(("first", "size"), [(24, 0), (24, 23), (48, 47), (56, 55), (48, 24)])
def test_a_buffer_too_small_for_the_first_event(first: int, size: int) -> None:
    assert error_of(fill_buffer, [first, 24], size) == EINVAL


@pytest.mark.parametrize("size", [0, 4096])
def test_an_empty_queue(size: int) -> None:
    with pytest.raises(BlockingIOError):
        fill_buffer([], size)


def test_allow_is_what_a_response_of_one_means() -> None:
    response = parse_response(encode_response(7, FAN_ALLOW), CONTENT, LINUX_6_14)
    assert (response.fd, response.decision_errno, response.length, response.probe) == (7, 0, 8, False)


STEPS = st.tuples(st.sampled_from(("add", "add", "take", "remove")), st.integers(3, 5), st.integers(0, 3))


@given(st.lists(STEPS, max_size=40))
def test_answers_go_to_the_events_of_a_number_in_the_order_read(steps: list[tuple[str, int, int]]) -> None:
    events: UnansweredEvents[int] = UnansweredEvents()
    expected: dict[int, list[int]] = defaultdict(list)
    for event, (step, number, position) in enumerate(steps):
        of_number = expected[number]
        if step == "add":
            events.add(number, event)
            of_number.append(event)
        elif step == "take" and of_number:
            assert events.take(number) == of_number.pop(0)
        elif step == "take":
            assert error_of(events.take, number) == errno.ENOENT
        else:
            one = of_number.pop(position) if position < len(of_number) else -1
            events.remove(number, one)
    for number, of_number in expected.items():
        assert [events.take(number) for _ in of_number] == of_number
        assert error_of(events.take, number) == errno.ENOENT


def test_forgotten_events_are_not_answered() -> None:
    events: UnansweredEvents[str] = UnansweredEvents()
    for event in ("first", "second"):
        events.add(7, event)
    events.clear()
    assert error_of(events.take, 7) == errno.ENOENT
