"""Marks, row by row: errors of sequences, who hears what, what arms; the kernel is asked the same rows in test_kernel_*.py."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusehsm.events import Access, AccessKind
from fusehsm.fanotify.abi import (
    FAN_ACCESS,
    FAN_MARK_FLUSH,
    FAN_MODIFY,
    FAN_OPEN,
    LINUX_6_14,
    PATCH_V1,
    PATCH_V2,
    Dialect,
)
from fusehsm.fanotify.marks import MarkTable, Subject
from fusehsm.fanotify.rules import ObjectKind, check_mark
from tests.support.hearing_model import armed, heard, marked, predicted
from tests.support.hearing_rows import ARMING_ROWS, HEARING_ROWS, ArmingRow, HearingRow
from tests.support.row_tests import error_of, row_names
from tests.support.rule_rows import (
    ADD,
    ALL_PERM,
    EEXIST,
    ENOENT,
    EOC,
    EVICTABLE,
    FLUSH,
    FS,
    IGNORE_SURV,
    IGNORED,
    MOUNT,
    ONDIR,
    PRE,
    REMOVE,
    SURV,
    A,
    MarkRow,
    O,
    P,
    mark_rows,
)

KINDS = {"file": ObjectKind.REGULAR, "dir": ObjectKind.DIRECTORY}
INODES = {name: number for number, name in enumerate(("file", "dir", "fifo", "device", "socket", "link"), 1)}
FILE = Subject(5, (2,), False)
DIRECTORY = Subject(6, (2,), True)


@pytest.mark.parametrize("row", list(mark_rows()), ids=row_names)
def test_calls(row: MarkRow) -> None:
    table = MarkTable(LINUX_6_14)

    def call(flags: int, mask: int, target: str) -> None:
        kind = KINDS.get(target, ObjectKind.OTHER)
        check_mark(row.group_class, LINUX_6_14, flags, mask, kind)
        if flags & FAN_MARK_FLUSH:
            table.flush(flags)
            return
        written = row.written and target == "file"
        is_dir = kind is ObjectKind.DIRECTORY
        table.modify(flags, mask, INODES[target], opened_for_write=written, is_dir=is_dir)

    found = [error_of(call, step.flags, step.mask, step.target) for step in row.steps]
    assert found == [step.errno for step in row.steps]


@pytest.mark.parametrize("row", HEARING_ROWS, ids=row_names)
def test_hearing(row: HearingRow) -> None:
    table = marked(row.marks, row.group_class)
    assert predicted(table, row.access, row.target) == row.expected


@pytest.mark.parametrize("row", ARMING_ROWS, ids=row_names)
def test_arming(row: ArmingRow) -> None:
    first = marked(row.before, row.group_class)
    how = armed([first], "child")
    second = marked([(ADD | FS, ALL_PERM, "top")], PRE)
    assert heard(second, Access(AccessKind.READ, 0, 10), how, "child") == row.read
    assert heard(second, Access(AccessKind.TRUNCATE, 5), how, "child") == "P"


def table_with(*calls: tuple[int, int, int | None], dialect: Dialect = LINUX_6_14) -> MarkTable:
    table = MarkTable(dialect)
    for flags, mask, inode in calls:
        table.modify(flags, mask, inode, opened_for_write=False)
    return table


# Several names: any known parent may have been the way


def linked(*parents: int) -> Subject:
    return Subject(5, parents, False)


def test_one_watching_parent_is_enough() -> None:
    table = table_with((ADD, P | EOC, 2), (ADD, O | EOC, 3))
    assert table.hears(P, linked(2, 9))
    assert table.hears(P, linked(9, 2))
    assert table.hears(O, linked(2, 3))
    assert not table.hears(P, linked(3, 9))
    assert not table.hears(P, linked())
    assert table.watched(linked(9, 3, 2)) == P | O


def test_a_parent_ignores_only_together_with_all_others() -> None:
    table = table_with(
        (ADD | FS, P, None), (ADD | IGNORE_SURV, P | EOC, 2), (ADD | IGNORE_SURV, P | O | EOC, 3)
    )
    assert not table.hears(P, linked(2))
    assert not table.hears(P, linked(2, 3))
    assert table.hears(P, linked(2, 9))
    assert table.hears(P, linked(9))
    assert table.hears(P, linked())


# The rest of the interface


def test_the_table_says_what_it_holds() -> None:
    table = table_with(
        (ADD, P | EOC, 7),
        (ADD | IGNORED | SURV, O, 7),
        (ADD | EVICTABLE, O | ONDIR, 3),
        (ADD | FS, ALL_PERM, None),
        (ADD | MOUNT | IGNORE_SURV, A | ONDIR, None),
    )
    described = table.describe()
    assert json.loads(json.dumps(described)) == described
    assert [(m["type"], m["inode"], m["mflags"], m["mask"], m["ignored_mask"]) for m in described] == [
        ("filesystem", None, 0, ALL_PERM, 0),
        ("mount", None, 0x440, 0, A | ONDIR),
        ("inode", 3, EVICTABLE, O | ONDIR, 0),
        ("inode", 7, SURV, P | EOC, O),
    ]
    assert described[3]["events"] == ["PRE_ACCESS", "EVENT_ON_CHILD"]
    assert described[3]["ignored_events"] == ["OPEN_PERM"]


def test_empty() -> None:
    for call in ((ADD, P, 5), (ADD | FS, P, None), (ADD | MOUNT, P, None), (ADD | IGNORED | SURV, P, 5)):
        table = MarkTable()
        assert table.empty
        table.modify(*call, opened_for_write=False)
        assert not table.empty
        table.modify(REMOVE | call[0] & ~ADD, P, call[2], opened_for_write=False)
        assert table.empty


def test_clear() -> None:
    table = table_with((ADD, P, 5), (ADD | FS, P, None), (ADD | MOUNT, P, None))
    table.clear()
    assert table.empty
    assert not table.hears(P, FILE)
    assert table.watched(FILE) == 0


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (FLUSH, ["filesystem", "mount"]),
        (FLUSH | MOUNT, ["filesystem", "inode"]),
        (FLUSH | FS, ["mount", "inode"]),
    ],
)
def test_flush_takes_one_type(flags: int, left: list[str]) -> None:
    table = table_with((ADD, P, 5), (ADD | FS, P, None), (ADD | MOUNT, P, None))
    table.flush(flags)
    assert [mark["type"] for mark in table.describe()] == left
    assert table.hears(P, FILE)


def test_forget() -> None:
    table = table_with((ADD, P, 5), (ADD, P | EOC, 2))
    table.forget(5)
    table.forget(99)
    assert table.hears(P, FILE)
    table.forget(2)
    assert not table.hears(P, FILE)
    assert table.empty


def test_a_copy_is_on_its_own() -> None:
    table = table_with((ADD, P, 5), (ADD | FS, O, None), (ADD | MOUNT, A, None), dialect=PATCH_V2)
    twin = table.copy()
    assert twin.describe() == table.describe()
    assert twin.dialect is PATCH_V2
    assert [twin.hears(bit, FILE) for bit in (P, O, A)] == [True] * 3
    table.modify(ADD, O, 5, opened_for_write=False)
    table.modify(ADD | FS, P, None, opened_for_write=False)
    table.modify(ADD | MOUNT, P, None, opened_for_write=False)
    assert [mark["mask"] for mark in twin.describe()] == [O, A, P]
    table.clear()
    assert twin.hears(A, FILE)


def test_a_write_elsewhere_ends_what_covers_everything() -> None:
    table = table_with((ADD, P, 5), (ADD | FS | IGNORED, P, None))
    assert not table.hears(P, FILE)
    assert table.modified(99)
    assert table.hears(P, FILE)
    assert not table.modified(99)


def test_a_write_spares_the_marks_themselves() -> None:
    table = table_with((ADD, P, 5), (ADD | IGNORED, O, 5))
    assert table.modified(5)
    assert [(m["mask"], m["ignored_mask"]) for m in table.describe()] == [(P, 0)]


def test_a_write_spares_a_parent_that_does_not_watch_its_children() -> None:
    table = table_with((ADD, O, 2), (ADD | IGNORED, P, 2))
    assert not table.modified(5, (2,))
    assert [m["ignored_mask"] for m in table.describe()] == [P]


def test_notifications_bits_are_heard_like_others() -> None:
    table = table_with((ADD | FS, FAN_OPEN | P, None))
    assert table.hears(FAN_OPEN, FILE)
    assert not table.hears(FAN_OPEN, DIRECTORY)


def test_which_bits_of_a_mask_are_heard() -> None:
    table = table_with((ADD | FS, FAN_OPEN | P, None), (ADD, FAN_ACCESS, 5), (ADD | IGNORE_SURV, FAN_OPEN, 5))
    assert table.heard(FAN_OPEN | FAN_ACCESS | FAN_MODIFY, FILE) == FAN_ACCESS
    assert table.heard(FAN_OPEN | FAN_ACCESS, Subject(7, (2,), False)) == FAN_OPEN


def test_evictable_marks_go_with_their_inode() -> None:
    table = table_with(
        (ADD | EVICTABLE, FAN_OPEN, 5),
        (ADD | EVICTABLE, FAN_OPEN, 6),
        (ADD, FAN_ACCESS, 6),
        (ADD, FAN_OPEN, 7),
    )
    for inode in (5, 6, 7, 8):
        table.evicted(inode)
    assert [mark["inode"] for mark in table.describe()] == [6, 7]


def test_which_notifications_are_asked_for_anywhere() -> None:
    table = table_with(
        (ADD | FS, FAN_OPEN | P, None), (ADD, FAN_ACCESS, 5), (ADD | IGNORE_SURV, FAN_MODIFY, 5)
    )
    assert table.notified == FAN_OPEN | FAN_ACCESS
    table.flush(0)
    assert table.notified == FAN_OPEN
    table.clear()
    assert table.notified == 0


def test_watched_has_events_only() -> None:
    table = table_with((ADD | FS, O | ONDIR, None), (ADD, A | EOC, 2))
    assert table.watched(FILE) == table.watched(DIRECTORY) == O | A


@pytest.mark.parametrize("dialect", [PATCH_V2, PATCH_V1], ids=lambda dialect: dialect.name)
def test_the_postings_have_events_of_directories(dialect: Dialect) -> None:
    bit = dialect.pre_access
    table = table_with((ADD, bit, 6), (ADD, ONDIR, 6), (ADD | FS, dialect.pre_modify, None), dialect=dialect)
    assert table.hears(bit, DIRECTORY)
    assert not table.hears(dialect.pre_modify, DIRECTORY)
    assert table.hears(dialect.pre_modify, FILE)


def test_mainline_has_none() -> None:
    table = table_with((ADD, ONDIR, 6))
    assert error_of(table.modify, ADD, P, 6, opened_for_write=False) == EEXIST
    assert not table.hears(P, DIRECTORY)


def test_a_failed_call_changes_nothing() -> None:
    table = table_with((ADD, P, 6))
    before = table.describe()
    assert error_of(table.modify, ADD, O | ONDIR, 6, opened_for_write=False) == EEXIST
    assert error_of(table.modify, REMOVE, P, 7, opened_for_write=False) == ENOENT
    assert table.describe() == before


# Any marks whatever, against the definition written out the long way

calls = st.tuples(
    st.sampled_from([ADD, ADD | FS, ADD | MOUNT]),
    st.sampled_from([0, IGNORED | SURV, IGNORE_SURV]),
    st.sets(st.sampled_from([P, O, A, EOC]), min_size=1).map(sum)
    | st.sets(st.sampled_from([O, A, ONDIR, EOC]), min_size=1).map(sum),
    st.sampled_from([2, 5, 6]),
)


def by_definition(table: MarkTable, bit: int, subject: Subject) -> bool:
    """fanotify_group_event_mask() from what describe() says."""
    asked = ignored = 0
    for mark in table.describe():
        own = mark["inode"] in (None, subject.inode)
        if not own and mark["inode"] not in subject.parents:
            continue
        mask, ignore, flags = (int(str(mark[key])) for key in ("mask", "ignored_mask", "mflags"))
        ignore_flags = ignore if flags & 0x400 else ONDIR | mask & EOC
        if (not subject.is_dir or mask & ONDIR) and (own or mask & EOC):
            asked |= mask
        if (not subject.is_dir or ignore_flags & ONDIR) and (own or ignore_flags & EOC):
            ignored |= ignore
    return bool(bit & asked & ~ignored)


@given(
    calls=st.lists(calls, max_size=8),
    subject=st.sampled_from([FILE, DIRECTORY]),
    bit=st.sampled_from([P, O, A]),
)
def test_hearing_is_the_kernels_definition(
    calls: list[tuple[int, int, int, int]], subject: Subject, bit: int
) -> None:
    table = MarkTable(LINUX_6_14)
    for flags, ignore, mask, inode in calls:
        error_of(table.modify, flags | ignore, mask, inode, opened_for_write=False)
    assert table.hears(bit, subject) == by_definition(table, bit, subject)
