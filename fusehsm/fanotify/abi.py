"""The constants and binary layouts of fanotify, and the differences between the three dialects of pre-content events.

Values are those of ``include/uapi/linux/fanotify.h`` (fanotify(7), fanotify_init(2), fanotify_mark(2)). A record's
integers are in the machine's own byte order, as in the kernel. Nothing here does I/O.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

# fanotify_init(2): flags
FAN_CLOEXEC: Final = 0x00000001
FAN_NONBLOCK: Final = 0x00000002
FAN_CLASS_NOTIF: Final = 0x00000000
FAN_CLASS_CONTENT: Final = 0x00000004
FAN_CLASS_PRE_CONTENT: Final = 0x00000008
FAN_CLASS_MASK: Final = FAN_CLASS_CONTENT | FAN_CLASS_PRE_CONTENT
FAN_UNLIMITED_QUEUE: Final = 0x00000010
FAN_UNLIMITED_MARKS: Final = 0x00000020
FAN_ENABLE_AUDIT: Final = 0x00000040
FAN_REPORT_PIDFD: Final = 0x00000080
FAN_REPORT_TID: Final = 0x00000100
FAN_REPORT_FID: Final = 0x00000200
FAN_REPORT_DIR_FID: Final = 0x00000400
FAN_REPORT_NAME: Final = 0x00000800
FAN_REPORT_TARGET_FID: Final = 0x00001000
FAN_REPORT_FD_ERROR: Final = 0x00002000
FAN_REPORT_MNT: Final = 0x00004000
FAN_REPORT_FID_BITS: Final = FAN_REPORT_FID | FAN_REPORT_DIR_FID | FAN_REPORT_NAME | FAN_REPORT_TARGET_FID

# fanotify_mark(2): flags
FAN_MARK_ADD: Final = 0x00000001
FAN_MARK_REMOVE: Final = 0x00000002
FAN_MARK_DONT_FOLLOW: Final = 0x00000004
FAN_MARK_ONLYDIR: Final = 0x00000008
FAN_MARK_INODE: Final = 0x00000000
FAN_MARK_MOUNT: Final = 0x00000010
FAN_MARK_FILESYSTEM: Final = 0x00000100
FAN_MARK_MNTNS: Final = 0x00000110
FAN_MARK_TYPE_MASK: Final = FAN_MARK_MNTNS
FAN_MARK_IGNORED_MASK: Final = 0x00000020
FAN_MARK_IGNORED_SURV_MODIFY: Final = 0x00000040
FAN_MARK_FLUSH: Final = 0x00000080
FAN_MARK_EVICTABLE: Final = 0x00000200
FAN_MARK_IGNORE: Final = 0x00000400
FAN_MARK_IGNORE_SURV: Final = FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY
FAN_MARK_COMMAND_MASK: Final = FAN_MARK_ADD | FAN_MARK_REMOVE | FAN_MARK_FLUSH
FAN_MARK_IGNORE_BITS: Final = FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORE

# Events and event flags. The values of FAN_PRE_ACCESS and FAN_PRE_MODIFY depend on the dialect: see Dialect.
FAN_ACCESS: Final = 0x00000001
FAN_MODIFY: Final = 0x00000002
FAN_ATTRIB: Final = 0x00000004
FAN_CLOSE_WRITE: Final = 0x00000008
FAN_CLOSE_NOWRITE: Final = 0x00000010
FAN_OPEN: Final = 0x00000020
FAN_MOVED_FROM: Final = 0x00000040
FAN_MOVED_TO: Final = 0x00000080
FAN_CREATE: Final = 0x00000100
FAN_DELETE: Final = 0x00000200
FAN_DELETE_SELF: Final = 0x00000400
FAN_MOVE_SELF: Final = 0x00000800
FAN_OPEN_EXEC: Final = 0x00001000
FAN_Q_OVERFLOW: Final = 0x00004000
FAN_FS_ERROR: Final = 0x00008000
FAN_OPEN_PERM: Final = 0x00010000
FAN_ACCESS_PERM: Final = 0x00020000
FAN_OPEN_EXEC_PERM: Final = 0x00040000
FAN_EVENT_ON_CHILD: Final = 0x08000000
FAN_RENAME: Final = 0x10000000
FAN_ONDIR: Final = 0x40000000
FAN_CLOSE: Final = FAN_CLOSE_WRITE | FAN_CLOSE_NOWRITE
FAN_EVENT_FLAGS: Final = FAN_ONDIR | FAN_EVENT_ON_CHILD

#: Permission events that every dialect has, also for FAN_CLASS_CONTENT groups.
CONTENT_PERM_EVENTS: Final = FAN_OPEN_PERM | FAN_ACCESS_PERM | FAN_OPEN_EXEC_PERM
#: Notifications that a group without FAN_REPORT_*FID may ask for (kernel: FANOTIFY_PATH_EVENTS).
NOTIFICATION_EVENTS: Final = FAN_ACCESS | FAN_MODIFY | FAN_CLOSE | FAN_OPEN | FAN_OPEN_EXEC

# fanotify_init(2): event_f_flags
#: The kernel's flag of open(2), which differs between architectures. C libraries of 64-bit machines, and so Python, show 0 (asm/fcntl.h).
O_LARGEFILE: Final = 0o400000 if platform.machine() == "aarch64" else 0o100000

# Responses
FAN_ALLOW: Final = 0x01
FAN_DENY: Final = 0x02
FAN_AUDIT: Final = 0x10
FAN_INFO: Final = 0x20
FAN_NOFD: Final = -1
FAN_ERRNO_SHIFT: Final = 24
FAN_ERRNO_MASK: Final = 0xFF
FAN_RESPONSE_INFO_NONE: Final = 0
FAN_RESPONSE_INFO_AUDIT_RULE: Final = 1

# Records
FANOTIFY_METADATA_VERSION: Final = 3
FAN_EVENT_METADATA_LEN: Final = 24
FAN_EVENT_INFO_TYPE_PIDFD: Final = 4
FAN_EVENT_INFO_TYPE_RANGE: Final = 6
PIDFD_RECORD_LENGTH: Final = 8
#: Offsets in an event, in bytes: in struct fanotify_event_metadata and, if has_pidfd(), in the pidfd record that follows it.
EVENT_MASK_OFFSET: Final = 8
EVENT_FD_OFFSET: Final = 16
EVENT_PID_OFFSET: Final = 20
EVENT_PIDFD_OFFSET: Final = FAN_EVENT_METADATA_LEN + 4
RESPONSE_LENGTH: Final = 8
AUDIT_RULE_LENGTH: Final = 16

#: The errnos that a denial of a FAN_CLASS_PRE_CONTENT group may carry (docs/facts.md, section 6).
DENY_ERRNOS: Final = frozenset(
    (errno.EPERM, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETXTBSY, errno.ENOSPC, errno.EDQUOT)
)

_METADATA: Final = struct.Struct("=IBBHQii")
_INFO_HEADER: Final = struct.Struct("=BBH")
_PIDFD_RECORD: Final = struct.Struct("=BBHi")
_RESPONSE: Final = struct.Struct("=iI")
_U64: Final = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class RangeLayout:
    """The places of offset and count in a range record (``fanotify_event_info_range``), both in bytes."""

    #: The whole record, with its header.
    record: struct.Struct
    #: The count stands before the offset.
    count_first: bool
    #: The largest count that its field can hold.
    largest_count: int

    @property
    def length(self) -> int:
        """The length of the whole record in bytes, with its header."""
        return self.record.size


#: header, u32 padding, u64 offset, u64 count: mainline, and the second posting of the series.
WIDE_RANGE: Final = RangeLayout(struct.Struct("=BBH4xQQ"), count_first=False, largest_count=_U64)
#: header, u32 count, u64 offset: the first posting.
NARROW_RANGE: Final = RangeLayout(struct.Struct("=BBHIQ"), count_first=True, largest_count=0xFFFF_FFFF)


@dataclass(frozen=True, slots=True)
class Dialect:
    """One version of the pre-content interface. Every difference between the versions is a field here."""

    #: The name, as the option --abi takes it.
    name: str
    #: The bit of the event FAN_PRE_ACCESS.
    pre_access: int
    #: The bit of the event FAN_PRE_MODIFY; 0 if the dialect has no such event.
    pre_modify: int
    #: The layout of the range record.
    range_layout: RangeLayout
    #: True: ranges are widened to whole pages (kernel: ``fsnotify_pre_content``). False: they have the accessor's own numbers.
    aligns_ranges: bool
    #: True: open(2) decides whether a file is armed (kernel: ``file_set_fsnotify_mode_from_watchers``). False: every file is armed.
    arms_at_open: bool
    #: open(2) makes a pre-content event of its own, range 0+0, after OPEN_PERM.
    open_event: bool
    #: True: a read makes its pre-content event before ACCESS_PERM. False: after it.
    pre_content_first: bool
    #: A truncation makes a pre-content event.
    truncate_event: bool
    #: True: mmap(2) makes one event for the whole mapping, and page faults make none. False: each page fault makes its own event.
    map_event: bool
    #: True: directories make pre-content events for marks with FAN_ONDIR. False: FAN_ONDIR with such a bit is an error.
    directory_events: bool
    #: True: FAN_MARK_ADD of pre-content events checks the object's kind before the event flags of a FAN_MARK_IGNORE. False: after them.
    #: This decides between EINVAL and ENOTDIR where both are due (kernel: ``fanotify_events_supported``).
    kind_check_first: bool
    #: The errnos that a FAN_CLASS_PRE_CONTENT group may put into a denial: the same seven in all dialects (kernel:
    #: ``process_access_response``; docs/facts.md, section 6).
    deny_errnos: frozenset[int] = DENY_ERRNOS

    @property
    def pre_content(self) -> int:
        """The bits of all pre-content events."""
        return self.pre_access | self.pre_modify

    @property
    def permission(self) -> int:
        """The bits of all events that need an answer (kernel: ``FANOTIFY_PERM_EVENTS``)."""
        return CONTENT_PERM_EVENTS | self.pre_access | self.pre_modify

    @property
    def write_bit(self) -> int:
        """The bit of the event before a write."""
        return self.pre_modify or self.pre_access


LINUX_6_14: Final = Dialect(
    name="linux-6.14",
    pre_access=0x00100000,
    pre_modify=0,
    range_layout=WIDE_RANGE,
    aligns_ranges=True,
    arms_at_open=True,
    open_event=False,
    pre_content_first=True,
    truncate_event=True,
    map_event=True,
    directory_events=False,
    kind_check_first=True,
)
PATCH_V2: Final = Dialect(
    name="patch-v2",
    pre_access=0x00080000,
    pre_modify=0x00100000,
    range_layout=WIDE_RANGE,
    aligns_ranges=False,
    arms_at_open=False,
    open_event=True,
    pre_content_first=False,
    truncate_event=False,
    map_event=False,
    directory_events=True,
    kind_check_first=False,
)
# The bits are those of programs for this version (its proof of concept, remote-fetch.c). Its own headers had 0x00100000 and 0x00200000;
# the second posting changed them.
PATCH_V1: Final = Dialect(
    name="patch-v1",
    pre_access=0x00080000,
    pre_modify=0x00100000,
    range_layout=NARROW_RANGE,
    aligns_ranges=False,
    arms_at_open=False,
    open_event=True,
    pre_content_first=False,
    truncate_event=False,
    map_event=False,
    directory_events=True,
    kind_check_first=False,
)
DIALECTS: Final[Mapping[str, Dialect]] = MappingProxyType(
    {dialect.name: dialect for dialect in (LINUX_6_14, PATCH_V2, PATCH_V1)}
)


@dataclass(frozen=True, slots=True)
class RawEvent:
    """One decoded event."""

    #: The event's bits.
    mask: int
    #: The event's descriptor; with FAN_REPORT_FD_ERROR it may be a negative errno.
    fd: int
    #: The accessor: a process, with FAN_REPORT_TID a thread.
    pid: int
    #: The start of the range in bytes; None without a range record.
    offset: int | None
    #: The length of the range in bytes; None without a range record.
    count: int | None
    #: The pidfd of the accessor; None without a pidfd record.
    pidfd: int | None
    #: The length of the event with all its records, in bytes.
    length: int


def has_pidfd(event: bytes | bytearray) -> bool:
    """Whether the bytes of one event have a pidfd record."""
    return len(event) > FAN_EVENT_METADATA_LEN and event[FAN_EVENT_METADATA_LEN] == FAN_EVENT_INFO_TYPE_PIDFD


def event_length(dialect: Dialect, *, has_range: bool, has_pidfd: bool) -> int:
    """The number of bytes that :func:`encode_event` makes (kernel: ``fanotify_event_len``)."""
    length = FAN_EVENT_METADATA_LEN
    if has_range:
        length += dialect.range_layout.record.size
    if has_pidfd:
        length += PIDFD_RECORD_LENGTH
    return length


def encode_event(
    dialect: Dialect,
    mask: int,
    fd: int,
    pid: int,
    *,
    range_: tuple[int, int] | None = None,
    pidfd: int | None = None,
) -> bytes:
    """The bytes that read(2) of a group returns: metadata, then PIDFD record, then RANGE record (docs/facts.md, section 3).

    ``range_`` is (offset, count) in bytes. A count that is too large for a narrow record becomes the largest that the record can hold.
    """
    length = event_length(dialect, has_range=range_ is not None, has_pidfd=pidfd is not None)
    data = _METADATA.pack(length, FANOTIFY_METADATA_VERSION, 0, FAN_EVENT_METADATA_LEN, mask, fd, pid)
    if pidfd is not None:
        data += _PIDFD_RECORD.pack(FAN_EVENT_INFO_TYPE_PIDFD, 0, PIDFD_RECORD_LENGTH, pidfd)
    if range_ is not None:
        layout = dialect.range_layout
        offset, count = range_
        if layout.count_first:
            first, second = min(count, layout.largest_count), offset
        else:
            first, second = offset, count
        data += layout.record.pack(FAN_EVENT_INFO_TYPE_RANGE, 0, layout.record.size, first, second)
    return data


def decode_events(dialect: Dialect, buffer: bytes | bytearray | memoryview) -> list[RawEvent]:
    """All events in a buffer that read(2) of a group filled.

    Info records of other types are skipped, as fanotify(7) requires of listeners. Raises ValueError, with the place in bytes,
    if the buffer is not a whole number of well-formed events.
    """
    events: list[RawEvent] = []
    end = len(buffer)
    start = 0
    while start < end:
        if end - start < FAN_EVENT_METADATA_LEN:
            raise ValueError(
                f"event at byte {start}: {end - start} bytes left, metadata takes {FAN_EVENT_METADATA_LEN}"
            )
        length, version, _, metadata_length, mask, fd, pid = _METADATA.unpack_from(buffer, start)
        if version != FANOTIFY_METADATA_VERSION:
            raise ValueError(
                f"event at byte {start}: metadata version {version}, not {FANOTIFY_METADATA_VERSION}"
            )
        if not FAN_EVENT_METADATA_LEN <= metadata_length <= length <= end - start:
            raise ValueError(
                f"event at byte {start}: length {length}, metadata {metadata_length}, left {end - start}"
            )
        offset: int | None = None
        count: int | None = None
        pidfd: int | None = None
        place = start + metadata_length
        event_end = start + length
        while place < event_end:
            if event_end - place < _INFO_HEADER.size:
                raise ValueError(f"info record at byte {place}: cut short")
            info_type, _, info_length = _INFO_HEADER.unpack_from(buffer, place)
            if not _INFO_HEADER.size <= info_length <= event_end - place:
                raise ValueError(
                    f"info record at byte {place}: length {info_length}, left {event_end - place}"
                )
            if info_type == FAN_EVENT_INFO_TYPE_RANGE:
                layout = dialect.range_layout
                if info_length != layout.record.size:
                    raise ValueError(
                        f"range record at byte {place}: length {info_length}, {dialect.name} has {layout.record.size}"
                    )
                _, _, _, first, second = layout.record.unpack_from(buffer, place)
                offset, count = (second, first) if layout.count_first else (first, second)
            elif info_type == FAN_EVENT_INFO_TYPE_PIDFD:
                if info_length != PIDFD_RECORD_LENGTH:
                    raise ValueError(
                        f"pidfd record at byte {place}: length {info_length}, not {PIDFD_RECORD_LENGTH}"
                    )
                pidfd = _PIDFD_RECORD.unpack_from(buffer, place)[3]
            place += info_length
        events.append(RawEvent(mask, fd, pid, offset, count, pidfd, length))
        start = event_end
    return events


def encode_response(fd: int, response: int) -> bytes:
    """``struct fanotify_response``: the answer that a listener writes to its group."""
    return _RESPONSE.pack(fd, response)


def decode_response(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """(fd, response) of the first eight bytes. Raises struct.error if there are fewer."""
    fd, response = _RESPONSE.unpack_from(data)
    return fd, response


def encode_audit_rule(rule_number: int, subject_trust: int, object_trust: int) -> bytes:
    """``struct fanotify_response_info_audit_rule``: the record that follows a response with FAN_INFO."""
    return struct.pack(
        "=BBHIII",
        FAN_RESPONSE_INFO_AUDIT_RULE,
        0,
        AUDIT_RULE_LENGTH,
        rule_number,
        subject_trust,
        object_trust,
    )


def deny_errno(error: int) -> int:
    """``FAN_DENY_ERRNO(error)``: the response that denies with this errno."""
    return FAN_DENY | (error & FAN_ERRNO_MASK) << FAN_ERRNO_SHIFT


_EVENT_NAMES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "ACCESS": FAN_ACCESS,
        "MODIFY": FAN_MODIFY,
        "ATTRIB": FAN_ATTRIB,
        "CLOSE_WRITE": FAN_CLOSE_WRITE,
        "CLOSE_NOWRITE": FAN_CLOSE_NOWRITE,
        "OPEN": FAN_OPEN,
        "MOVED_FROM": FAN_MOVED_FROM,
        "MOVED_TO": FAN_MOVED_TO,
        "CREATE": FAN_CREATE,
        "DELETE": FAN_DELETE,
        "DELETE_SELF": FAN_DELETE_SELF,
        "MOVE_SELF": FAN_MOVE_SELF,
        "OPEN_EXEC": FAN_OPEN_EXEC,
        "Q_OVERFLOW": FAN_Q_OVERFLOW,
        "FS_ERROR": FAN_FS_ERROR,
        "OPEN_PERM": FAN_OPEN_PERM,
        "ACCESS_PERM": FAN_ACCESS_PERM,
        "OPEN_EXEC_PERM": FAN_OPEN_EXEC_PERM,
        "EVENT_ON_CHILD": FAN_EVENT_ON_CHILD,
        "RENAME": FAN_RENAME,
        "ONDIR": FAN_ONDIR,
    }
)


def _names(dialect: Dialect) -> dict[str, int]:
    names = dict(_EVENT_NAMES)
    names["PRE_ACCESS"] = dialect.pre_access
    if dialect.pre_modify:
        names["PRE_MODIFY"] = dialect.pre_modify
    return names


def parse_mask(names: Iterable[str], dialect: Dialect) -> int:
    """The mask with the bits of these names; "CLOSE" stands for both CLOSE events.

    Upper and lower case are the same, and FAN_ may be left out. Raises ValueError with the first name that the dialect does not have.
    """
    known = _names(dialect) | {"CLOSE": FAN_CLOSE}
    mask = 0
    for name in names:
        bit = known.get(name.strip().upper().removeprefix("FAN_"))
        if bit is None:
            raise ValueError(
                f"mask name {name!r}: {dialect.name} has no such event; it has {', '.join(known)}"
            )
        mask |= bit
    return mask


def mask_names(mask: int, dialect: Dialect) -> list[str]:
    """The names of a mask's bits without FAN_, the lowest bit first. A bit without a name is given as a hexadecimal number."""
    by_bit = {bit: name for name, bit in _names(dialect).items()}
    bits = (1 << position for position in range(mask.bit_length()) if mask >> position & 1)
    return [by_bit.get(bit) or f"{bit:#x}" for bit in bits]
