"""The rows of hearing_rows.py, worked out by our own rules: what an overlay would do, without an overlay."""

from collections.abc import Iterable

from fusehsm.events import Access, AccessKind, Armed, arm, heard_when, shapes
from fusehsm.fanotify.abi import FAN_MARK_FLUSH, LINUX_6_14
from fusehsm.fanotify.marks import MarkTable, Subject
from fusehsm.fanotify.rules import ObjectKind, check_mark
from tests.support.hearing_rows import DIRECTORIES, LETTERS, PARENTS, Mark

INODES = {name: number for number, name in enumerate(PARENTS, start=10)}
PAGE = 4096


def subject(target: str) -> Subject:
    """The target as marks see it."""
    parent = PARENTS[target]
    parents = () if parent is None else (INODES[parent],)
    return Subject(INODES[target], parents, target in DIRECTORIES)


def marked(marks: Iterable[Mark], group_class: int) -> MarkTable:
    """A table with these marks, each checked as a call."""
    table = MarkTable(LINUX_6_14)
    for mark in marks:
        set_mark(table, group_class, mark)
    return table


def set_mark(table: MarkTable, group_class: int, mark: Mark) -> None:
    """One fanotify_mark(2)."""
    flags, mask, target = mark
    is_dir = target in DIRECTORIES
    kind = ObjectKind.DIRECTORY if is_dir else ObjectKind.REGULAR
    check_mark(group_class, LINUX_6_14, flags, mask, kind)
    if flags & FAN_MARK_FLUSH:
        table.flush(flags)
    else:
        table.modify(flags, mask, INODES[target], opened_for_write=False, is_dir=is_dir)


def armed(tables: Iterable[MarkTable], target: str) -> Armed:
    """How the target is armed when it is opened under the marks of these groups."""
    watched = 0
    for table in tables:
        watched |= table.watched(subject(target))
    return arm(watched, LINUX_6_14)


def heard(table: MarkTable, access: Access, how: Armed, target: str) -> str:
    """The events of one access, as letters."""
    return "".join(
        LETTERS[shape.mask]
        for shape in shapes(access, LINUX_6_14, PAGE)
        if heard_when(shape, how, LINUX_6_14) and table.hears(shape.mask, subject(target))
    )


def predicted(table: MarkTable, access: str, target: str) -> str:
    """What a group with these marks is told when the target is accessed in one of the ways of HearingRow."""
    return "".join(_predicted_one(table, part, target) for part in access.split(", "))


def _predicted_one(table: MarkTable, access: str, target: str) -> str:
    how = armed([table], target)
    is_dir = target in DIRECTORIES
    told = heard(table, Access(AccessKind.OPEN, writable=access == "write", directory=is_dir), how, target)
    match access:
        case "read":
            told += heard(table, Access(AccessKind.READ, 0, 10), how, target)
        case "write":
            told += heard(table, Access(AccessKind.WRITE, 0, 10), how, target)
            table.modified(INODES[target], subject(target).parents)
        case "list":
            told += 2 * heard(table, Access(AccessKind.READ_DIRECTORY, directory=True), how, target)
    return told
