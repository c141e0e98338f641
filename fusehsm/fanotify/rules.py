"""Argument checks of fanotify_init(2), fanotify_mark(2), read(2) and write(2) on a group, errno for errno.

Every check raises OSError with the errno of the real kernel (docs/facts.md, sections 1, 2, 6 and 7) and a message with the cause.
The emulator, its clients and the supervisor all use these checks, so they cannot differ.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from fusehsm.fanotify.abi import (
    AUDIT_RULE_LENGTH,
    FAN_ALLOW,
    FAN_AUDIT,
    FAN_CLASS_CONTENT,
    FAN_CLASS_MASK,
    FAN_CLASS_NOTIF,
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_DENY,
    FAN_ENABLE_AUDIT,
    FAN_ERRNO_MASK,
    FAN_ERRNO_SHIFT,
    FAN_EVENT_FLAGS,
    FAN_INFO,
    FAN_MARK_ADD,
    FAN_MARK_COMMAND_MASK,
    FAN_MARK_DONT_FOLLOW,
    FAN_MARK_EVICTABLE,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORE_BITS,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_INODE,
    FAN_MARK_MNTNS,
    FAN_MARK_ONLYDIR,
    FAN_MARK_TYPE_MASK,
    FAN_NOFD,
    FAN_NONBLOCK,
    FAN_ONDIR,
    FAN_REPORT_DIR_FID,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_FID,
    FAN_REPORT_FID_BITS,
    FAN_REPORT_MNT,
    FAN_REPORT_NAME,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TARGET_FID,
    FAN_REPORT_TID,
    FAN_RESPONSE_INFO_AUDIT_RULE,
    FAN_UNLIMITED_MARKS,
    FAN_UNLIMITED_QUEUE,
    NOTIFICATION_EVENTS,
    O_LARGEFILE,
    RESPONSE_LENGTH,
    Dialect,
    decode_response,
)

_INIT_FLAGS: Final = (
    FAN_CLOEXEC
    | FAN_NONBLOCK
    | FAN_CLASS_MASK
    | FAN_UNLIMITED_QUEUE
    | FAN_UNLIMITED_MARKS
    | FAN_ENABLE_AUDIT
    | FAN_REPORT_PIDFD
    | FAN_REPORT_TID
    | FAN_REPORT_FID_BITS
    | FAN_REPORT_FD_ERROR
    | FAN_REPORT_MNT
)
_EVENT_F_FLAGS: Final = (
    os.O_ACCMODE
    | os.O_APPEND
    | os.O_NONBLOCK
    | os.O_SYNC  # two bits, one of them is O_DSYNC; the kernel accepts each of them alone
    | O_LARGEFILE
    | os.O_NOATIME
    | os.O_CLOEXEC
)
_MARK_FLAGS: Final = (
    FAN_MARK_COMMAND_MASK
    | FAN_MARK_TYPE_MASK
    | FAN_MARK_DONT_FOLLOW
    | FAN_MARK_ONLYDIR
    | FAN_MARK_IGNORE_BITS
    | FAN_MARK_IGNORED_SURV_MODIFY
    | FAN_MARK_EVICTABLE
)
_RESPONSE_BITS: Final = FAN_ALLOW | FAN_DENY | FAN_AUDIT | FAN_INFO | FAN_ERRNO_MASK << FAN_ERRNO_SHIFT
_INFO_HEADER: Final = struct.Struct("=BBH")


class ObjectKind(enum.Enum):
    """The kind of the object that a mark is set on."""

    REGULAR = enum.auto()
    DIRECTORY = enum.auto()
    #: A FIFO, a device, a socket, or a symbolic link itself.
    OTHER = enum.auto()


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A valid response."""

    #: The descriptor of the event that is answered.
    fd: int
    #: The errno of the denial; 0 allows.
    decision_errno: int
    #: The value that write(2) returns, in bytes.
    length: int
    #: FAN_AUDIT was given.
    audit: bool
    #: The descriptor was FAN_NOFD: the response answers no event.
    probe: bool


EventT = TypeVar("EventT")


class UnansweredEvents(Generic[EventT]):
    """The events that a listener has read and not answered, by the number of their descriptor, which is all that a response names.

    A listener may close a descriptor before it answers, and a later event then gets the same number. Such a number names several
    events, and answers go to them in the order in which they were read (kernel: ``process_access_response``).
    """

    __slots__ = ("_first", "_later")

    def __init__(self) -> None:
        self._first: dict[int, EventT] = {}
        self._later: dict[int, deque[EventT]] = {}

    def add(self, number: int, event: EventT) -> None:
        """An event has been read with a descriptor of that number."""
        if number in self._first:
            self._later.setdefault(number, deque()).append(event)
        else:
            self._first[number] = event

    def take(self, number: int) -> EventT:
        """Remove the event that an answer with that number is for. Raises OSError ENOENT when there is none."""
        event = self._first.pop(number, None)
        if event is None:
            raise _invalid(f"fanotify response: no event with fd {number} waits for an answer", errno.ENOENT)
        if self._later:
            self._advance(number)
        return event

    def remove(self, number: int, event: EventT) -> None:
        """Remove one event, wherever it stands among those with that number; does nothing when it is not there."""
        if self._first.get(number) == event:
            del self._first[number]
            self._advance(number)
        elif event in self._later.get(number, ()):
            self._later[number].remove(event)
            if not self._later[number]:
                del self._later[number]

    def _advance(self, number: int) -> None:
        later = self._later.get(number)
        if later:
            self._first[number] = later.popleft()
            if not later:
                del self._later[number]

    def clear(self) -> None:
        """Forget everything."""
        self._first.clear()
        self._later.clear()


def _invalid(message: str, error: int = errno.EINVAL) -> OSError:
    return OSError(error, message)


def check_init(flags: int, event_f_flags: int) -> None:
    """The checks of fanotify_init(2) for a privileged caller. Raises OSError EINVAL."""
    if flags & ~_INIT_FLAGS:
        raise _invalid(f"fanotify_init flags {flags:#x}: unknown bits {flags & ~_INIT_FLAGS:#x}")
    if flags & FAN_CLASS_MASK == FAN_CLASS_MASK:
        raise _invalid(f"fanotify_init flags {flags:#x}: two classes")
    if flags & FAN_REPORT_PIDFD and flags & FAN_REPORT_TID:
        raise _invalid("fanotify_init flags: FAN_REPORT_PIDFD and FAN_REPORT_TID exclude each other")
    notif = flags & FAN_CLASS_MASK == FAN_CLASS_NOTIF
    fid = flags & FAN_REPORT_FID_BITS
    if flags & FAN_REPORT_MNT and (not notif or fid or flags & FAN_REPORT_FD_ERROR):
        raise _invalid(
            "fanotify_init flags: FAN_REPORT_MNT goes only with FAN_CLASS_NOTIF and without FAN_REPORT_*FID"
        )
    if fid and not notif:
        raise _invalid(
            "fanotify_init flags: FAN_REPORT_*FID and FAN_REPORT_NAME go only with FAN_CLASS_NOTIF"
        )
    if fid & FAN_REPORT_NAME and not fid & FAN_REPORT_DIR_FID:
        raise _invalid("fanotify_init flags: FAN_REPORT_NAME needs FAN_REPORT_DIR_FID")
    if fid & FAN_REPORT_TARGET_FID and (~fid & (FAN_REPORT_NAME | FAN_REPORT_FID)):
        raise _invalid("fanotify_init flags: FAN_REPORT_TARGET_FID needs FAN_REPORT_FID and FAN_REPORT_NAME")
    if event_f_flags & ~_EVENT_F_FLAGS:
        raise _invalid(
            f"fanotify_init event_f_flags {event_f_flags:#o}: cannot have {event_f_flags & ~_EVENT_F_FLAGS:#o}"
        )
    if event_f_flags & os.O_ACCMODE == os.O_ACCMODE:
        raise _invalid(f"fanotify_init event_f_flags {event_f_flags:#o}: access mode 3")


def check_mark(
    group_flags: int, dialect: Dialect, flags: int, mask: int, object_kind: ObjectKind | None
) -> None:
    """The checks of fanotify_mark(2) that do not depend on the group's marks.

    ``object_kind`` None: only the checks before the kernel looks up the path; FAN_MARK_FLUSH has no others. Raises OSError EINVAL,
    ENOTDIR or EISDIR. ENOENT and EEXIST come from :meth:`fusehsm.fanotify.marks.MarkTable.modify`.
    """
    _check_mark_flags(flags, mask)
    _check_mask(group_flags, dialect, flags, mask)
    if object_kind is not None and flags & FAN_MARK_ADD:
        _check_object(dialect, flags, mask, object_kind)


def _check_mark_flags(flags: int, mask: int) -> None:
    command = flags & FAN_MARK_COMMAND_MASK
    if flags & ~_MARK_FLAGS:
        raise _invalid(f"fanotify_mark flags {flags:#x}: unknown bits {flags & ~_MARK_FLAGS:#x}")
    if command == 0 or command & (command - 1):
        raise _invalid(f"fanotify_mark flags {flags:#x}: exactly one of ADD, REMOVE and FLUSH is needed")
    if flags & FAN_MARK_TYPE_MASK == FAN_MARK_MNTNS:
        raise _invalid("fanotify_mark flags: FAN_MARK_MNTNS needs a group with FAN_REPORT_MNT")
    if command == FAN_MARK_FLUSH and flags & ~(FAN_MARK_TYPE_MASK | FAN_MARK_FLUSH):
        raise _invalid(f"fanotify_mark flags {flags:#x}: FAN_MARK_FLUSH takes only a mark type")
    if command != FAN_MARK_FLUSH and not mask:
        raise _invalid("fanotify_mark: an empty mask")
    if flags & FAN_MARK_IGNORE_BITS == FAN_MARK_IGNORE_BITS:
        raise _invalid("fanotify_mark flags: FAN_MARK_IGNORE and FAN_MARK_IGNORED_MASK exclude each other")
    if flags & FAN_MARK_EVICTABLE and flags & FAN_MARK_TYPE_MASK != FAN_MARK_INODE:
        raise _invalid("fanotify_mark flags: FAN_MARK_EVICTABLE goes only with inode marks")


def _check_mask(group_flags: int, dialect: Dialect, flags: int, mask: int) -> None:
    # A group without FAN_REPORT_*FID can have only events with a path. Other event bits are EINVAL, as unknown bits are.
    known = NOTIFICATION_EVENTS | dialect.permission | FAN_EVENT_FLAGS
    if mask & ~known:
        raise _invalid(
            f"fanotify_mark mask {mask:#x}: {dialect.name} groups without FIDs cannot have {mask & ~known:#x}"
        )
    group_class = group_flags & FAN_CLASS_MASK
    if mask & dialect.permission and group_class == FAN_CLASS_NOTIF:
        raise _invalid(
            "fanotify_mark mask: permission events need FAN_CLASS_CONTENT or FAN_CLASS_PRE_CONTENT"
        )
    if mask & dialect.pre_content and group_class == FAN_CLASS_CONTENT:
        raise _invalid("fanotify_mark mask: pre-content events need FAN_CLASS_PRE_CONTENT")
    if not dialect.directory_events and _after_ignore(flags, mask) & FAN_ONDIR and mask & dialect.pre_content:
        raise _invalid(
            "fanotify_mark mask: FAN_PRE_ACCESS cannot be combined with FAN_ONDIR: directories have no such events"
        )


def _after_ignore(flags: int, mask: int) -> int:
    # FAN_MARK_IGNORED_MASK has no event flags. The kernel removes them before all other checks.
    return mask & ~FAN_EVENT_FLAGS if flags & FAN_MARK_IGNORE_BITS and not flags & FAN_MARK_IGNORE else mask


def _check_object(dialect: Dialect, flags: int, mask: int, object_kind: ObjectKind) -> None:
    # The order is the kernel's: first fanotify_events_supported(), then the FAN_MARK_IGNORE check of do_fanotify_mark().
    directory = object_kind is ObjectKind.DIRECTORY
    inode_mark = flags & FAN_MARK_TYPE_MASK == FAN_MARK_INODE
    if dialect.kind_check_first:
        _check_kind(dialect, mask, object_kind)
    if inode_mark and not directory and flags & FAN_MARK_IGNORE and mask & FAN_EVENT_FLAGS:
        raise _invalid(
            "fanotify_mark: FAN_ONDIR and FAN_EVENT_ON_CHILD of a FAN_MARK_IGNORE need a directory",
            errno.ENOTDIR,
        )
    if not dialect.kind_check_first:
        _check_kind(dialect, mask, object_kind)
    if flags & FAN_MARK_IGNORE and not flags & FAN_MARK_IGNORED_SURV_MODIFY:
        if not inode_mark:
            raise _invalid(
                "fanotify_mark: FAN_MARK_IGNORE on a mount or filesystem needs FAN_MARK_IGNORED_SURV_MODIFY"
            )
        if directory:
            message = "fanotify_mark: FAN_MARK_IGNORE on a directory needs FAN_MARK_IGNORED_SURV_MODIFY"
            raise _invalid(message, errno.EISDIR)


def _check_kind(dialect: Dialect, mask: int, object_kind: ObjectKind) -> None:
    if mask & dialect.pre_content and object_kind is ObjectKind.OTHER:
        raise _invalid("fanotify_mark: pre-content events exist only for regular files and directories")
    if mask & dialect.pre_modify and object_kind is ObjectKind.DIRECTORY:
        # Patch 05 checks the kind of the path for every type of mark.
        raise _invalid(
            "fanotify_mark: FAN_PRE_MODIFY cannot be set through a directory; name a regular file",
            errno.EISDIR,
        )


def parse_response(
    data: bytes | bytearray | memoryview, group_flags: int, dialect: Dialect
) -> ParsedResponse:
    """The checks of write(2) on a group (kernel: ``process_access_response``). Raises OSError EINVAL.

    Only the first response counts. The bytes after it count only if it has FAN_INFO; then they are an audit rule record.
    """
    if len(data) < RESPONSE_LENGTH:
        raise _invalid(f"fanotify response: {len(data)} bytes, not {RESPONSE_LENGTH}")
    fd, response = decode_response(data)
    if response & ~_RESPONSE_BITS:
        raise _invalid(f"fanotify response {response:#x}: unknown bits {response & ~_RESPONSE_BITS:#x}")
    decision_errno = _decision(response, group_flags, dialect)
    audit = bool(response & FAN_AUDIT)
    if audit and not group_flags & FAN_ENABLE_AUDIT:
        raise _invalid("fanotify response: FAN_AUDIT needs a group with FAN_ENABLE_AUDIT")
    length = RESPONSE_LENGTH
    if response & FAN_INFO:
        _check_audit_rule(data[RESPONSE_LENGTH:])
        length += AUDIT_RULE_LENGTH
        if fd == FAN_NOFD:
            return ParsedResponse(fd, decision_errno, length, audit, probe=True)
    if fd < 0:
        raise _invalid(f"fanotify response: fd {fd}")
    return ParsedResponse(fd, decision_errno, length, audit, probe=False)


def _decision(response: int, group_flags: int, dialect: Dialect) -> int:
    decision = response & (FAN_ALLOW | FAN_DENY)
    error = response >> FAN_ERRNO_SHIFT & FAN_ERRNO_MASK
    if decision == FAN_ALLOW:
        if error:
            raise _invalid(f"fanotify response {response:#x}: FAN_ALLOW with errno {error}")
        return 0
    if decision != FAN_DENY:
        raise _invalid(f"fanotify response {response:#x}: exactly one of FAN_ALLOW and FAN_DENY is needed")
    if not error:
        return errno.EPERM
    if group_flags & FAN_CLASS_MASK != FAN_CLASS_PRE_CONTENT:
        raise _invalid(f"fanotify response {response:#x}: an errno needs a group of FAN_CLASS_PRE_CONTENT")
    if error not in dialect.deny_errnos:
        names = ", ".join(sorted(errno.errorcode[number] for number in dialect.deny_errnos))
        raise _invalid(f"fanotify response {response:#x}: errno {error} is none of {names}")
    return error


def _check_audit_rule(record: bytes | bytearray | memoryview) -> None:
    if len(record) != AUDIT_RULE_LENGTH:
        raise _invalid(
            f"fanotify response: FAN_INFO with a record of {len(record)} bytes, not {AUDIT_RULE_LENGTH}"
        )
    info_type, pad, length = _INFO_HEADER.unpack_from(record)
    if (info_type, pad, length) != (FAN_RESPONSE_INFO_AUDIT_RULE, 0, AUDIT_RULE_LENGTH):
        raise _invalid(
            f"fanotify response: FAN_INFO with a record of type {info_type}, pad {pad}, length {length}"
        )


def fill_buffer(lengths: Iterable[int], size: int) -> int:
    """The number of queued events that fit whole and in order into a read(2) of ``size`` bytes.

    ``lengths`` has the length of each event in bytes. Raises BlockingIOError (EAGAIN) if there are no events, for every size, and
    OSError EINVAL if the first event does not fit.
    """
    left = size
    fitting = 0
    for length in lengths:
        if length > left:
            if not fitting:
                raise _invalid(f"fanotify read of {size} bytes: the next event has {length}")
            return fitting
        left -= length
        fitting += 1
    if not fitting:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fitting
