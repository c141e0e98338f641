"""What an access makes, dialect by dialect; the mainline rows are held against the kernel in test_kernel_events.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusehsm.events import (
    Access,
    AccessKind,
    Armed,
    Event,
    EventShape,
    align_outward,
    arm,
    heard_when,
    notification,
    shapes,
)
from fusehsm.fanotify.abi import (
    DIALECTS,
    FAN_ACCESS,
    FAN_CLOSE_NOWRITE,
    FAN_CLOSE_WRITE,
    FAN_MODIFY,
    FAN_OPEN,
    FAN_OPEN_EXEC,
    LINUX_6_14,
    PATCH_V1,
    PATCH_V2,
    Dialect,
)
from tests.support.event_rows import EVENT_ROWS, OFFSET_LIMIT, PAGE, A, EventRow, Expected, O, P, X
from tests.support.row_tests import row_names

OLD_P, OLD_M = PATCH_V2.pre_access, PATCH_V2.pre_modify
POSTINGS = pytest.mark.parametrize("dialect", [PATCH_V2, PATCH_V1], ids=lambda dialect: dialect.name)
EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def plain(access: Access, dialect: Dialect, page_size: int = PAGE) -> list[Expected]:
    return [(shape.mask, shape.offset, shape.count) for shape in shapes(access, dialect, page_size)]


@pytest.mark.parametrize("row", EVENT_ROWS, ids=row_names)
def test_mainline(row: EventRow) -> None:
    made = [event for access in row.accesses for event in plain(access, LINUX_6_14)]
    assert made == list(row.expected)


R, W, T, F = AccessKind.READ, AccessKind.WRITE, AccessKind.TRUNCATE, AccessKind.FALLOCATE


@POSTINGS
@pytest.mark.parametrize(
    ("access", "expected"),
    [
        (Access(R, 100, 7), [(A, None, None), (OLD_P, 100, 7)]),
        (Access(R, 4095, 2), [(A, None, None), (OLD_P, 4095, 2)]),
        (Access(R, 0, 0), [(A, None, None), (OLD_P, 0, 0)]),
        (Access(R, 100, 0), [(A, None, None), (OLD_P, 100, 0)]),
        (Access(R, 0, 2**31 - 1), [(A, None, None), (OLD_P, 0, 2**31 - 1)]),
        (Access(W, 100, 7), [(OLD_M, 100, 7)]),
        (Access(W, 5, 0), [(OLD_M, 5, 0)]),
        (Access(F, 4097, 10000), [(OLD_M, 4097, 10000)]),
        (Access(T, 5000), []),
        (Access(AccessKind.OPEN), [(O, None, None), (OLD_P, 0, 0)]),
        (Access(AccessKind.OPEN, writable=True), [(O, None, None), (OLD_M, 0, 0)]),
        (Access(AccessKind.OPEN, exec=True), [(X, None, None), (O, None, None), (OLD_P, 0, 0)]),
        (Access(AccessKind.OPEN, directory=True), [(O, None, None), (OLD_P, 0, 0)]),
        (Access(AccessKind.READ_DIRECTORY, 3, directory=True), [(A, None, None), (OLD_P, 3, 0)]),
        (Access(AccessKind.MAP, 4096, 10000), []),
        (Access(AccessKind.MAP, 4096, 10000, writable=True), []),
        (Access(AccessKind.FILL, 5000, 100), [(OLD_P, 4096, 4096)]),
    ],
)
def test_the_postings(dialect: Dialect, access: Access, expected: list[Expected]) -> None:
    assert plain(access, dialect) == expected


@pytest.mark.parametrize(
    ("dialect", "writable", "expected"),
    [
        (LINUX_6_14, False, []),
        (LINUX_6_14, True, []),
        (PATCH_V2, False, [(A, None, None), (OLD_P, 8192, 4096)]),
        (PATCH_V2, True, [(OLD_M, 8192, 4096)]),
        (PATCH_V1, False, [(A, None, None), (OLD_P, 8192, 4096)]),
        (PATCH_V1, True, [(OLD_M, 8192, 4096)]),
    ],
)
def test_page_faults(dialect: Dialect, writable: bool, expected: list[Expected]) -> None:
    assert plain(Access(AccessKind.FAULT, 8192, 4096, writable=writable), dialect) == expected


@EVERY_DIALECT
@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
@given(offset=st.integers(0, OFFSET_LIMIT), count=st.integers(0, 2**40))
def test_a_fill_is_always_asked_for_and_covered(
    dialect: Dialect, page_size: int, offset: int, count: int
) -> None:
    (shape,) = shapes(Access(AccessKind.FILL, offset, count), dialect, page_size)
    assert shape.mask == dialect.pre_access
    assert shape.offset is not None
    assert shape.count is not None
    assert shape.offset <= offset
    assert shape.offset + shape.count >= offset + count
    assert shape.offset % page_size == shape.count % page_size == 0
    for armed in Armed:
        assert heard_when(shape, armed, dialect)


@EVERY_DIALECT
@given(offset=st.integers(0, 2**40), count=st.integers(1, 2**32), writable=st.booleans())
def test_a_fault_or_its_mapping_is_asked_for(
    dialect: Dialect, offset: int, count: int, writable: bool
) -> None:
    """The rule that must never break: bytes of a mapping are covered by the mapping's event, or by the fault's."""
    mapped = shapes(Access(AccessKind.MAP, offset, count, writable=writable), dialect, PAGE)
    faulted = shapes(Access(AccessKind.FAULT, offset, count, writable=writable), dialect, PAGE)
    covering = [shape for shape in (*mapped, *faulted) if shape.mask & dialect.pre_content]
    assert len(covering) == 1
    assert covering[0].offset is not None
    assert covering[0].count is not None
    assert covering[0].offset <= offset
    assert covering[0].offset + covering[0].count >= offset + count


@given(
    offset=st.integers(0, OFFSET_LIMIT), count=st.integers(0, 2**40), page_size=st.sampled_from([4096, 65536])
)
def test_aligning_outward(offset: int, count: int, page_size: int) -> None:
    start, length = align_outward(offset, count, page_size)
    assert start % page_size == length % page_size == 0
    assert start <= offset < start + page_size
    assert 0 <= start + length - (offset + count) < page_size


@pytest.mark.parametrize(("offset", "count"), [(2**64 - 4096, 4096), (2**64 - 1, 2**64 - 1), (2**63, 2**63)])
def test_ranges_stay_64_bit_numbers(offset: int, count: int) -> None:
    """mmap(2) takes offsets up to 2**64: what comes of them must go into a record."""
    start, length = align_outward(offset, count, PAGE)
    assert 0 <= start < 2**64
    assert 0 <= length < 2**64


@pytest.mark.parametrize(
    ("watched", "armed"),
    [
        (0, Armed.NO),
        (0x20, Armed.NO),
        (O, Armed.NO),
        (O | X, Armed.NO),
        (P, Armed.PRE),
        (P | O | X, Armed.PRE),
        (A, Armed.ALL),
        (P | A, Armed.ALL),
        (OLD_P, Armed.NO),  # another dialect's bit
    ],
)
def test_arming(watched: int, armed: Armed) -> None:
    assert arm(watched, LINUX_6_14) is armed


@POSTINGS
@pytest.mark.parametrize("watched", [0, O, OLD_P, OLD_M, A])
def test_the_postings_arm_everything(dialect: Dialect, watched: int) -> None:
    assert arm(watched, dialect) is Armed.ALL


@pytest.mark.parametrize(
    ("kind", "armed", "heard"),
    [
        (AccessKind.READ, Armed.NO, []),
        (AccessKind.READ, Armed.PRE, [P]),
        (AccessKind.READ, Armed.ALL, [P, A]),
        (AccessKind.WRITE, Armed.NO, []),
        (AccessKind.WRITE, Armed.PRE, [P]),
        (AccessKind.FALLOCATE, Armed.NO, []),
        (AccessKind.FALLOCATE, Armed.PRE, [P]),
        (AccessKind.MAP, Armed.NO, []),
        (AccessKind.MAP, Armed.PRE, [P]),
        (AccessKind.TRUNCATE, Armed.NO, [P]),  # by path: always
        (AccessKind.OPEN, Armed.NO, [O]),  # what was watched decides, not how the file ends up armed
        (AccessKind.FILL, Armed.NO, [P]),
        (AccessKind.READ_DIRECTORY, Armed.NO, []),
        (AccessKind.READ_DIRECTORY, Armed.PRE, []),
        (AccessKind.READ_DIRECTORY, Armed.ALL, [A]),
    ],
)
def test_what_an_armed_file_raises(kind: AccessKind, armed: Armed, heard: list[int]) -> None:
    made = shapes(Access(kind, 100, 10), LINUX_6_14, PAGE)
    assert [shape.mask for shape in made if heard_when(shape, armed, LINUX_6_14)] == heard


@POSTINGS
@given(
    kind=st.sampled_from(AccessKind),
    armed=st.sampled_from(Armed),
    writable=st.booleans(),
    offset=st.integers(0, 2**40),
)
def test_files_of_the_postings_raise_everything(
    dialect: Dialect, kind: AccessKind, armed: Armed, writable: bool, offset: int
) -> None:
    for shape in shapes(Access(kind, offset, 10, writable=writable), dialect, PAGE):
        assert heard_when(shape, armed, dialect)


@EVERY_DIALECT
@given(
    kind=st.sampled_from(AccessKind),
    offset=st.integers(0, 2**40),
    count=st.integers(0, 2**33),
    writable=st.booleans(),
    exec_=st.booleans(),
)
def test_every_shape_is_one_permission_event(
    dialect: Dialect, kind: AccessKind, offset: int, count: int, writable: bool, exec_: bool
) -> None:
    for shape in shapes(Access(kind, offset, count, writable=writable, exec=exec_), dialect, PAGE):
        assert shape.mask & dialect.permission == shape.mask
        assert shape.mask.bit_count() == 1
        assert (
            (shape.offset is not None) == (shape.count is not None) == bool(shape.mask & dialect.pre_content)
        )


def test_shapes_are_equal_by_mask_and_range() -> None:
    assert EventShape(P, 0, 4096) == EventShape(P, 0, 4096, needs_arming=False)
    assert EventShape(P, 0, 4096) != EventShape(P, 0, 8192)


def test_event_names() -> None:
    assert Event(P | O, 1, 2, "/x", 0, 4096).names == ["OPEN_PERM", "PRE_ACCESS"]
    assert Event(OLD_M, 1, 2, "/x", 0, 4096, PATCH_V1).names == ["PRE_MODIFY"]


@pytest.mark.parametrize(
    ("access", "mask"),
    [
        (Access(AccessKind.OPEN), FAN_OPEN),
        (Access(AccessKind.OPEN, writable=True), FAN_OPEN),
        (Access(AccessKind.OPEN, exec=True), FAN_OPEN | FAN_OPEN_EXEC),
        (Access(AccessKind.OPEN, directory=True), FAN_OPEN),
        (Access(AccessKind.READ, 0, 100), FAN_ACCESS),
        (Access(AccessKind.READ, 0, 100, paged=True), FAN_ACCESS),
        (Access(AccessKind.READ_DIRECTORY, directory=True), FAN_ACCESS),
        (Access(AccessKind.WRITE, 0, 100), FAN_MODIFY),
        (Access(AccessKind.FALLOCATE, 0, 100), FAN_MODIFY),
        (Access(AccessKind.TRUNCATE, 100), 0),
        (Access(AccessKind.MAP, 0, 4096), 0),
        (Access(AccessKind.FAULT, 0, 4096), 0),
        (Access(AccessKind.FILL, 0, 4096), 0),
        (Access(AccessKind.CLOSE), FAN_CLOSE_NOWRITE),
        (Access(AccessKind.CLOSE, writable=True), FAN_CLOSE_WRITE),
    ],
)
def test_notifications(access: Access, mask: int) -> None:
    assert notification(access) == mask


@EVERY_DIALECT
def test_nobody_is_asked_for_a_close(dialect: Dialect) -> None:
    assert shapes(Access(AccessKind.CLOSE), dialect, 4096) == ()
