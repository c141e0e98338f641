"""What an accessor did, and which events of a dialect that makes, in order. Who wants other events changes this file.

Sources: facts measured on Linux 6.18 (mainline dialect), the series' patches 02, 03, 06, 10 and 13 (patch-v2; the first
posting has the same hooks, its page faults' in patch 10).
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
    """What kind of thing an accessor does to a file."""

    OPEN = enum.auto()
    READ = enum.auto()
    WRITE = enum.auto()
    TRUNCATE = enum.auto()
    FALLOCATE = enum.auto()
    #: A mapping's whole range, at mmap() or, where that cannot be seen, at its first fault.
    MAP = enum.auto()
    #: One faulting page or range.
    FAULT = enum.auto()
    #: A page-cache fill that nothing else explains: read-ahead, fadvise, an unarmed file.
    FILL = enum.auto()
    READ_DIRECTORY = enum.auto()
    #: The last descriptor of an open file is closed, and it is mapped nowhere.
    CLOSE = enum.auto()


# Not frozen, which would double what every event costs here; nobody changes one.
@dataclass(slots=True, unsafe_hash=True)
class Access:
    """One access, with the numbers of the accessor's own call, in bytes.

    ``offset`` is, by kind: READ, WRITE, FALLOCATE: where the call starts (O_APPEND: the file position, not the end of
    file); TRUNCATE: the new size; MAP, FAULT, FILL: the range's start; READ_DIRECTORY: the directory's position.
    ``writable``: OPEN, CLOSE: opened for writing; MAP, FAULT: a shared and writable mapping. ``exec``: OPEN by execve(2).
    ``unnamed``: OPEN with O_TMPFILE. ``paged``: READ: served through the page cache (sendfile), whole pages of which are then there for everybody.
    ``pid`` is the process, ``tid`` the thread. ``leaves``: of the page cache, by a thread that is known to be the one; killed, it need not wait for
    an answer to be gone, and leaves a locked page.
    """

    kind: AccessKind
    offset: int = 0
    count: int = 0
    pid: int = 0
    tid: int = 0
    writable: bool = False
    exec: bool = False
    directory: bool = False
    unnamed: bool = False
    paged: bool = False
    leaves: bool = False


@dataclass(slots=True, unsafe_hash=True)  # not frozen: see Access
class EventShape:
    """One event to be asked: one bit of a mask, and the range in bytes (None: an event without a range record).

    ``needs_arming``: False for events that do not depend on what was watched when the file was opened: those of open()
    itself, of truncation (by path), and of page-cache fills. ``with_pre_content``: only where pre-content events are watched
    for on the file itself, its mount or its filesystem, by whomever.
    """

    mask: int
    offset: int | None
    count: int | None
    needs_arming: bool = field(default=True, compare=False)
    with_pre_content: bool = field(default=False, compare=False)


class Armed(enum.Enum):
    """Which events an open file makes, settled when it was opened."""

    NO = enum.auto()
    #: Pre-content events, but never ACCESS_PERM.
    PRE = enum.auto()
    ALL = enum.auto()


#: The more events the higher.
STRENGTH: Final = {Armed.NO: 0, Armed.PRE: 1, Armed.ALL: 2}

_OPEN_PERM: Final = EventShape(FAN_OPEN_PERM, None, None, needs_arming=False)
_OPEN_EXEC_PERM: Final = EventShape(FAN_OPEN_EXEC_PERM, None, None, needs_arming=False)
_ACCESS_PERM: Final = EventShape(FAN_ACCESS_PERM, None, None)
# Patch 10: a fault does not get as far as its events where fsnotify_file_has_pre_content_watches() says no. Its pre-content
# event is asked of parents' marks too, for which that function does not look: no page comes in unasked.
_FAULT_ACCESS_PERM: Final = EventShape(FAN_ACCESS_PERM, None, None, with_pre_content=True)


def align_outward(offset: int, count: int, page_size: int) -> tuple[int, int]:
    """(offset, count) widened to whole pages as ``fsnotify_pre_content`` does it, in 64-bit unsigned arithmetic.

    A count of 0 stays 0 on a page's first byte and becomes one page anywhere else (measured: pread of 0 bytes at 0 and
    at 100; truncation to a page multiple and to anything else). Not clipped to the end of file.
    """
    start = offset & -page_size
    end = offset + count + page_size - 1 & -page_size
    return start & _U64, end - start & _U64


def shapes(access: Access, dialect: Dialect, page_size: int) -> tuple[EventShape, ...]:
    """The events that this access makes, in the kernel's order; each is asked only of groups whose marks hear it.

    The first denial ends the sequence. FILL always gives PRE_ACCESS over whole pages, in every dialect: no byte may
    enter the page cache unless an event covered it. ``page_size`` in bytes.
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
            # mmap() makes no ACCESS_PERM (measured).
            return (_ranged(dialect.pre_access, access, dialect, page_size),) if dialect.map_event else ()
        case AccessKind.FAULT:
            return _fault_shapes(access, dialect, page_size)
        case AccessKind.FILL:
            return (_fill_shape(access, dialect, page_size),)
        case AccessKind.READ_DIRECTORY:
            if not dialect.directory_events:
                return (_ACCESS_PERM,)
            # iterate_dir() names no count: fsnotify_file_perm() passes the position and 0.
            return (_ACCESS_PERM, EventShape(dialect.pre_access, access.offset, 0))
        case AccessKind.CLOSE:
            return ()


def notification(access: Access) -> int:
    """The mask of the one notification that this access makes when it has succeeded, and moved bytes if that is what it does; 0: none.

    Measured on 6.18 for groups without FAN_REPORT_*FID, which hear nothing of truncation (the kernel's event of it has no path) and of
    mappings. An execve(2) makes a single event of two bits.
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
    # Patch 03: after any truncation, a chance to fill the whole file: range 0+0. In do_open(), where O_TMPFILE never comes.
    bit = dialect.write_bit if access.writable else dialect.pre_access
    return (*asked, EventShape(bit, 0, 0, needs_arming=False))


def _truncate_shapes(access: Access, dialect: Dialect, page_size: int) -> tuple[EventShape, ...]:
    if not dialect.truncate_event:
        return ()
    # do_truncate() names the new size and a count of 0: one page, or nothing at a page's first byte.
    offset, count = align_outward(access.offset, 0, page_size)
    return (EventShape(dialect.write_bit, offset, count, needs_arming=False),)


def _fault_shapes(access: Access, dialect: Dialect, page_size: int) -> tuple[EventShape, ...]:
    if dialect.map_event:
        return ()
    # Patch 13 asks for the page that faulted, ACCESS_PERM too when it is read (as posted).
    offset, count = align_outward(access.offset, access.count, page_size)
    if access.writable:
        return (EventShape(dialect.write_bit, offset, count),)
    return (_FAULT_ACCESS_PERM, EventShape(dialect.pre_access, offset, count))


def _fill_shape(access: Access, dialect: Dialect, page_size: int) -> EventShape:
    offset, count = align_outward(access.offset, access.count, page_size)
    return EventShape(dialect.pre_access, offset, count, needs_arming=False)


def arm(watched_mask: int, dialect: Dialect) -> Armed:
    """How a file is armed that is opened while the marks on it, of all groups together, watch for this mask.

    Measured on 6.18: ACCESS_PERM (of a CONTENT or PRE_CONTENT group) arms for both kinds, PRE_ACCESS for itself only,
    OPEN_PERM and OPEN_EXEC_PERM for nothing.
    """
    if not dialect.arms_at_open or watched_mask & FAN_ACCESS_PERM:
        return Armed.ALL
    return Armed.PRE if watched_mask & dialect.pre_content else Armed.NO


def heard_when(shape: EventShape, armed: Armed, dialect: Dialect) -> bool:
    """Whether a file armed thus makes this event at all."""
    if armed is Armed.ALL or not shape.needs_arming or not dialect.arms_at_open:
        return True
    return armed is Armed.PRE and shape.mask & dialect.pre_content != 0


@dataclass(frozen=True, slots=True)
class Event:
    """What a handler is given: one event that waits for its return.

    ``fd`` is open on the file (fill through it: that makes no events), ``path`` is the accessor's, ``offset`` and
    ``count`` are bytes, None for an event without a range.
    """

    mask: int
    pid: int
    fd: int
    path: str
    offset: int | None
    count: int | None
    dialect: Dialect = field(default=LINUX_6_14, repr=False)

    @property
    def names(self) -> list[str]:
        """The names of the mask's bits, without FAN_."""
        return mask_names(self.mask, self.dialect)
