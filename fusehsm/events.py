"""The table of events: each access of an accessor makes these events of a dialect, in this order. Other events need a change here only.

Sources: for linux-6.14, docs/facts.md, sections 3 to 5, 9 and 10, measured on Linux 6.18. For patch-v2, the patches 02, 03, 06, 10 and 13 of the
series. The first posting (patch-v1) has the same hooks; its hooks for page faults are in patch 10.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from fusehsm.fanotify.abi import (
    FAN_ACCESS,
    FAN_ACCESS_PERM,
    FAN_CLOSE_NOWRITE,
    FAN_CLOSE_WRITE,
    FAN_MODIFY,
    FAN_OPEN,
    FAN_OPEN_EXEC,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
    LINUX_6_14,
    Dialect,
    mask_names,
)

_U64: Final = 0xFFFF_FFFF_FFFF_FFFF


class AccessKind(enum.Enum):
    """The kind of an access."""

    OPEN = enum.auto()
    READ = enum.auto()
    WRITE = enum.auto()
    TRUNCATE = enum.auto()
    FALLOCATE = enum.auto()
    #: A mapping, with its whole range: at mmap(2) or, where mmap(2) cannot be seen, at its first page fault.
    MAP = enum.auto()
    #: A page fault, with the page or the range that it needs.
    FAULT = enum.auto()
    #: A page-cache fill without another cause: read-ahead, posix_fadvise(2), an unarmed file.
    FILL = enum.auto()
    READ_DIRECTORY = enum.auto()
    #: The close of the last descriptor of an open file that is not mapped.
    CLOSE = enum.auto()


# A frozen dataclass would double the cost of each event here. No code changes an Access.
@dataclass(slots=True, unsafe_hash=True)
class Access:
    """One access, with the numbers of the accessor's own call, in bytes."""

    kind: AccessKind
    #: READ, WRITE, FALLOCATE: the start of the call's range (O_APPEND: the file position, not the end of the file); TRUNCATE: the new
    #: size; MAP, FAULT, FILL: the start of the range; READ_DIRECTORY: the position in the directory.
    offset: int = 0
    #: The length of the range; 0 for kinds without one.
    count: int = 0
    #: The accessor's process.
    pid: int = 0
    #: The accessor's thread.
    tid: int = 0
    #: OPEN, CLOSE: opened for writing; MAP, FAULT: a shared and writable mapping.
    writable: bool = False
    #: OPEN by execve(2).
    exec: bool = False
    #: The file is a directory.
    directory: bool = False
    #: OPEN with O_TMPFILE.
    unnamed: bool = False
    #: READ through the page cache (sendfile(2)): every process can see the whole pages afterwards.
    paged: bool = False
    #: A fill of the page cache by a thread that is known: when it is killed, it can go before it is answered, and leaves a locked page.
    leaves: bool = False


@dataclass(slots=True, unsafe_hash=True)  # not frozen: see Access
class EventShape:
    """One event of an access, before it is known which groups hear it."""

    #: One bit of a mask.
    mask: int
    #: The start of the range in bytes; None for an event without a range record.
    offset: int | None
    #: The length of the range in bytes; None for an event without a range record.
    count: int | None
    #: False for events that do not depend on how the file was armed: those of open(2) itself, of truncation and of page-cache fills.
    needs_arming: bool = field(default=True, compare=False)
    #: True: the event comes only if a group watches pre-content events of the file itself, its mount or its file system.
    with_pre_content: bool = field(default=False, compare=False)


class Armed(enum.Enum):
    """The events that an open file makes. open(2) decides it (docs/facts.md, section 5)."""

    #: Neither pre-content events nor ACCESS_PERM.
    NO = enum.auto()
    #: Pre-content events, but never ACCESS_PERM.
    PRE = enum.auto()
    #: Pre-content events and ACCESS_PERM.
    ALL = enum.auto()


#: More events, higher number.
STRENGTH: Final = {Armed.NO: 0, Armed.PRE: 1, Armed.ALL: 2}

_OPEN_PERM: Final = EventShape(FAN_OPEN_PERM, None, None, needs_arming=False)
_OPEN_EXEC_PERM: Final = EventShape(FAN_OPEN_EXEC_PERM, None, None, needs_arming=False)
_ACCESS_PERM: Final = EventShape(FAN_ACCESS_PERM, None, None)
# Patch 10: a fault makes no events where fsnotify_file_has_pre_content_watches() is false. That function ignores the marks of parents.
# Here parents' marks hear the pre-content event of a fault too, so no page comes in without an event.
_FAULT_ACCESS_PERM: Final = EventShape(FAN_ACCESS_PERM, None, None, with_pre_content=True)


def align_outward(offset: int, count: int, page_size: int) -> tuple[int, int]:
    """(offset, count) widened to whole pages as ``fsnotify_pre_content`` does it, in 64-bit unsigned arithmetic.

    A count of 0 stays 0 on a page's first byte and becomes one page anywhere else (docs/facts.md, section 9: pread of 0 bytes at 0
    and at 100, truncation). The range is not clipped to the end of the file.
    """
    start = offset & -page_size
    end = offset + count + page_size - 1 & -page_size
    return start & _U64, end - start & _U64


def shapes(access: Access, dialect: Dialect, page_size: int) -> tuple[EventShape, ...]:
    """The events of this access, in the kernel's order. Each goes only to groups whose marks hear it.

    The first denial ends the sequence. FILL makes PRE_ACCESS over whole pages in every dialect: no byte may enter the page cache
    without an event that covers it. ``page_size`` is in bytes.
    """
    match access.kind:
        case AccessKind.OPEN:
            return _open_shapes(access, dialect)
        case AccessKind.READ:
            pre_access = _ranged(dialect.pre_access, access, dialect, page_size)
            return (pre_access, _ACCESS_PERM) if dialect.pre_content_first else (_ACCESS_PERM, pre_access)
        case AccessKind.WRITE | AccessKind.FALLOCATE:
            return (_ranged(dialect.write_bit, access, dialect, page_size),)
        case AccessKind.TRUNCATE:
            return _truncate_shapes(access, dialect, page_size)
        case AccessKind.MAP:
            # mmap(2) makes no ACCESS_PERM (docs/facts.md, section 9).
            return (_ranged(dialect.pre_access, access, dialect, page_size),) if dialect.map_event else ()
        case AccessKind.FAULT:
            return _fault_shapes(access, dialect, page_size)
        case AccessKind.FILL:
            return (_fill_shape(access, dialect, page_size),)
        case AccessKind.READ_DIRECTORY:
            if not dialect.directory_events:
                return (_ACCESS_PERM,)
            # iterate_dir() has no count: fsnotify_file_perm() gets the position and 0.
            return (_ACCESS_PERM, EventShape(dialect.pre_access, access.offset, 0))
        case AccessKind.CLOSE:
            return ()


def notification(access: Access) -> int:
    """The mask of the one notification of this access; 0: none. It is due when the access has succeeded; a read or write must have moved bytes.

    It is for groups without FAN_REPORT_*FID. They hear nothing of mappings, nor of truncation, because the kernel's event of it has no
    path. execve(2) makes one event with two bits (docs/facts.md, section 10).
    """
    match access.kind:
        case AccessKind.OPEN:
            return FAN_OPEN | FAN_OPEN_EXEC if access.exec else FAN_OPEN
        case AccessKind.READ | AccessKind.READ_DIRECTORY:
            return FAN_ACCESS
        case AccessKind.WRITE | AccessKind.FALLOCATE:
            return FAN_MODIFY
        case AccessKind.CLOSE:
            return FAN_CLOSE_WRITE if access.writable else FAN_CLOSE_NOWRITE
        case AccessKind.TRUNCATE | AccessKind.MAP | AccessKind.FAULT | AccessKind.FILL:
            return 0


def _ranged(bit: int, access: Access, dialect: Dialect, page_size: int) -> EventShape:
    if not dialect.aligns_ranges and not access.paged:
        return EventShape(bit, access.offset, access.count)
    return EventShape(bit, *align_outward(access.offset, access.count, page_size))


def _open_shapes(access: Access, dialect: Dialect) -> tuple[EventShape, ...]:
    asked = (_OPEN_EXEC_PERM, _OPEN_PERM) if access.exec else (_OPEN_PERM,)
    if not dialect.open_event or access.unnamed:
        return asked
    # Patch 03: after a truncation by open(2), an event with the range 0+0 lets the listener fill the whole file. It is in do_open(), which
    # O_TMPFILE never reaches.
    bit = dialect.write_bit if access.writable else dialect.pre_access
    return (*asked, EventShape(bit, 0, 0, needs_arming=False))


def _truncate_shapes(access: Access, dialect: Dialect, page_size: int) -> tuple[EventShape, ...]:
    if not dialect.truncate_event:
        return ()
    # do_truncate() passes the new size and a count of 0: the event has one page, or count 0 on a page's first byte.
    offset, count = align_outward(access.offset, 0, page_size)
    return (EventShape(dialect.write_bit, offset, count, needs_arming=False),)


def _fault_shapes(access: Access, dialect: Dialect, page_size: int) -> tuple[EventShape, ...]:
    if dialect.map_event:
        return ()
    # Patch 13 makes an event for the page of the fault; for a read fault it makes ACCESS_PERM too.
    offset, count = align_outward(access.offset, access.count, page_size)
    if access.writable:
        return (EventShape(dialect.write_bit, offset, count),)
    return (_FAULT_ACCESS_PERM, EventShape(dialect.pre_access, offset, count))


def _fill_shape(access: Access, dialect: Dialect, page_size: int) -> EventShape:
    offset, count = align_outward(access.offset, access.count, page_size)
    return EventShape(dialect.pre_access, offset, count, needs_arming=False)


def arm(watched_mask: int, dialect: Dialect) -> Armed:
    """How open(2) arms a file if this is the united mask of all groups' marks on it.

    ACCESS_PERM arms for both kinds of events, PRE_ACCESS for itself only, OPEN_PERM and OPEN_EXEC_PERM for none (docs/facts.md, section 5).
    """
    if not dialect.arms_at_open or watched_mask & FAN_ACCESS_PERM:
        return Armed.ALL
    return Armed.PRE if watched_mask & dialect.pre_content else Armed.NO


def heard_when(shape: EventShape, armed: Armed, dialect: Dialect) -> bool:
    """Whether a file that is armed in this way makes this event."""
    if armed is Armed.ALL or not shape.needs_arming or not dialect.arms_at_open:
        return True
    return armed is Armed.PRE and shape.mask & dialect.pre_content != 0


@dataclass(frozen=True, slots=True)
class Event:
    """One event for a handler. The access waits until the handler returns."""

    #: The event's bit, for example fusehsm.PRE_ACCESS.
    mask: int
    #: The accessor's process.
    pid: int
    #: A descriptor of the file. Reads and writes through it make no events, so it is for filling the file.
    fd: int
    #: The path of the file as the accessor sees it.
    path: str
    #: The start of the range in bytes; None for an event without a range.
    offset: int | None
    #: The length of the range in bytes; None for an event without a range.
    count: int | None
    #: The version of the interface that gives the bits of ``mask`` their names.
    dialect: Dialect = field(default=LINUX_6_14, repr=False)

    @property
    def names(self) -> list[str]:
        """The names of the mask's bits, without FAN_."""
        return mask_names(self.mask, self.dialect)
