"""Calls of fanotify_init(2) and fanotify_mark(2), and responses, with what comes of each: one table for our rules and the real kernel.

`test_rules.py` and `test_marks.py` hold the rows against fusehsm, `test_kernel_rules.py` holds the same rows against the running kernel.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_ALLOW,
    FAN_AUDIT,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLASS_PRE_CONTENT,
    FAN_DENY,
    FAN_ENABLE_AUDIT,
    FAN_EVENT_ON_CHILD,
    FAN_INFO,
    FAN_MARK_ADD,
    FAN_MARK_DONT_FOLLOW,
    FAN_MARK_EVICTABLE,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORE_SURV,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MARK_ONLYDIR,
    FAN_MARK_REMOVE,
    FAN_ONDIR,
    FAN_OPEN,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TID,
    LINUX_6_14,
    O_LARGEFILE,
    deny_errno,
    encode_audit_rule,
    encode_response,
)

NOTIF, CONTENT, PRE = FAN_CLASS_NOTIF, FAN_CLASS_CONTENT, FAN_CLASS_PRE_CONTENT
CLASSES = {"NOTIF": NOTIF, "CONTENT": CONTENT, "PRE": PRE}
P, A, O, X = LINUX_6_14.pre_access, FAN_ACCESS_PERM, FAN_OPEN_PERM, FAN_OPEN_EXEC_PERM  # noqa: E741 (the names of the tables)
ALL_PERM = P | A | O | X
EOC, ONDIR = FAN_EVENT_ON_CHILD, FAN_ONDIR
ADD, REMOVE, FLUSH = FAN_MARK_ADD, FAN_MARK_REMOVE, FAN_MARK_FLUSH
MOUNT, FS = FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM
IGNORED, IGNORE, SURV = FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORE, FAN_MARK_IGNORED_SURV_MODIFY
IGNORE_SURV, EVICTABLE = FAN_MARK_IGNORE_SURV, FAN_MARK_EVICTABLE
EINVAL, ENOENT, EEXIST, ENOTDIR, EISDIR = (
    errno.EINVAL,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)

# fanotify_init: class NOTIF, CONTENT and PRE alike unless said; 0 where it succeeds.

_GOOD_INIT_FLAGS = [0x1, 0x2, 0x10, 0x20, 0x40, FAN_REPORT_PIDFD, FAN_REPORT_TID, FAN_REPORT_FD_ERROR]
_FID_FLAGS = [0x200, 0x400, 0x600, 0x800, 0xC00, 0xE00, 0x1000, 0x1E00, 0x1A00, 0x1C00]
_FID_GOOD_FOR_NOTIF = {0x200, 0x400, 0x600, 0xC00, 0xE00, 0x1E00}


def init_rows() -> Iterator[tuple[int, int, int]]:
    """(flags, event_f_flags, errno) of fanotify_init(2) as root."""
    for group_class in CLASSES.values():
        yield group_class, os.O_RDONLY, 0
        for flag in _GOOD_INIT_FLAGS:
            yield group_class | flag, os.O_RDONLY, 0
        yield group_class | 0x2173, os.O_RDONLY, 0
        yield group_class | 0x20F3, os.O_RDONLY, 0
        yield group_class | FAN_REPORT_PIDFD | FAN_REPORT_TID, os.O_RDONLY, EINVAL
        for flag in _FID_FLAGS:
            known = group_class == NOTIF and flag in _FID_GOOD_FOR_NOTIF
            yield group_class | flag, os.O_RDONLY, 0 if known else EINVAL
        yield group_class | 0x4000, os.O_RDONLY, 0 if group_class == NOTIF else EINVAL
        yield group_class | 0x4200, os.O_RDONLY, EINVAL
        yield group_class | 0x6000, os.O_RDONLY, EINVAL
        for bit in range(15, 32):
            yield group_class | 1 << bit, os.O_RDONLY, EINVAL
    for flags in (CONTENT | PRE, CONTENT | PRE | 0x2, CONTENT | PRE | 0x200):
        yield flags, os.O_RDONLY, EINVAL
    good = os.O_APPEND | os.O_NONBLOCK | os.O_SYNC | O_LARGEFILE | os.O_NOATIME | os.O_CLOEXEC
    for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        yield PRE, mode, 0
        yield PRE, mode | good, 0
        for bit in range(2, 32):
            yield PRE, mode | 1 << bit, 0 if good >> bit & 1 else EINVAL
    yield PRE, os.O_ACCMODE, EINVAL


# fanotify_mark


@dataclass(frozen=True, slots=True)
class Step:
    """One call: its flags, mask, what it names ("file", "dir", "fifo", "device", "socket", "link") and its errno, 0 for success."""

    flags: int
    mask: int
    target: str
    errno: int


@dataclass(frozen=True, slots=True)
class MarkRow:
    """Calls on a new group, one after the other. `written`: another process has the file open for writing all the time."""

    name: str
    group_class: int
    steps: tuple[Step, ...]
    written: bool = False


# What inode, mount and filesystem marks are set through.
_TARGETS = [
    ("file", 0, "file"),
    ("dir", 0, "dir"),
    ("mount", MOUNT, "dir"),
    ("filesystem", FS, "dir"),
    ("mount-by-file", MOUNT, "file"),
]

_CLASS_MASK = [  # mask, NOTIF, CONTENT, PRE: the same for every target
    ("P", P, EINVAL, EINVAL, 0),
    ("P|O|A|X", ALL_PERM, EINVAL, EINVAL, 0),
    ("O", O, EINVAL, 0, 0),
    ("A", A, EINVAL, 0, 0),
    ("X", X, EINVAL, 0, 0),
    ("P|ONDIR", P | ONDIR, EINVAL, EINVAL, EINVAL),
    ("P|O|ONDIR", P | O | ONDIR, EINVAL, EINVAL, EINVAL),
    ("P|EOC", P | EOC, EINVAL, EINVAL, 0),
    ("O|A|X|ONDIR|EOC", O | A | X | ONDIR | EOC, EINVAL, 0, 0),
    ("OPEN", FAN_OPEN, 0, 0, 0),
    ("OPEN|P", FAN_OPEN | P, EINVAL, EINVAL, 0),
    ("CREATE", 0x100, EINVAL, EINVAL, EINVAL),
    ("MOVE_SELF", 0x800, EINVAL, EINVAL, EINVAL),
    ("Q_OVERFLOW", 0x4000, EINVAL, EINVAL, EINVAL),
    ("FS_ERROR", 0x8000, EINVAL, EINVAL, EINVAL),
    ("FS_ERROR|P", 0x8000 | P, EINVAL, EINVAL, EINVAL),
    ("ONDIR", ONDIR, 0, 0, 0),
    ("EOC", EOC, 0, 0, 0),
    ("ONDIR|EOC", ONDIR | EOC, 0, 0, 0),
    ("nothing", 0, EINVAL, EINVAL, EINVAL),
]

_UNKNOWN_MASK_BITS = [
    0x2000,
    0x80000,
    0x200000,
    *(1 << bit for bit in range(22, 27)),
    0x10000000,
    0x20000000,
    0x80000000,
]
_UNKNOWN_MASK_BITS += [1 << bit for bit in range(32, 64)]

_IGNORE = [  # flags, mask; errno for file, dir, and mount or filesystem; class PRE
    ("IGNORED P", IGNORED, P, 0, 0, 0),
    ("IGNORED P|ONDIR", IGNORED, P | ONDIR, 0, 0, 0),
    ("IGNORED P|EOC", IGNORED, P | EOC, 0, 0, 0),
    ("IGNORED|SURV P", IGNORED | SURV, P, 0, 0, 0),
    ("IGNORED|SURV P|ONDIR", IGNORED | SURV, P | ONDIR, 0, 0, 0),
    ("IGNORE|SURV P", IGNORE_SURV, P, 0, 0, 0),
    ("IGNORE P", IGNORE, P, 0, EISDIR, EINVAL),
    ("IGNORE P|ONDIR", IGNORE, P | ONDIR, EINVAL, EINVAL, EINVAL),
    ("IGNORE|SURV P|ONDIR", IGNORE_SURV, P | ONDIR, EINVAL, EINVAL, EINVAL),
    ("IGNORE P|EOC", IGNORE, P | EOC, ENOTDIR, EISDIR, EINVAL),
    ("IGNORE|SURV P|EOC", IGNORE_SURV, P | EOC, ENOTDIR, 0, 0),
    ("IGNORE|SURV O|ONDIR", IGNORE_SURV, O | ONDIR, ENOTDIR, 0, 0),
    ("IGNORE|IGNORED", IGNORE | IGNORED, P, EINVAL, EINVAL, EINVAL),
    ("EVICTABLE", EVICTABLE, P, 0, 0, EINVAL),
    ("EVICTABLE|IGNORE|SURV", EVICTABLE | IGNORE_SURV, P, 0, 0, EINVAL),
    ("SURV without ignore", SURV, P, 0, 0, 0),
]

_FLAGS = [  # whole flags with mask P on a file, class PRE
    ("no command", 0, EINVAL),
    ("ADD|REMOVE", ADD | REMOVE, EINVAL),
    ("ADD|FLUSH", ADD | FLUSH, EINVAL),
    ("bit 0x800", ADD | 0x800, EINVAL),
    ("bit 0x1000", ADD | 0x1000, EINVAL),
    ("bit 0x80000000", ADD | 0x80000000, EINVAL),
    ("MNTNS", ADD | 0x110, EINVAL),
    ("FLUSH", FLUSH, 0),
    ("FLUSH mount", FLUSH | MOUNT, 0),
    ("FLUSH filesystem", FLUSH | FS, 0),
    ("FLUSH|ONLYDIR", FLUSH | FAN_MARK_ONLYDIR, EINVAL),
    ("FLUSH|IGNORE", FLUSH | IGNORE, EINVAL),
    ("FLUSH|SURV", FLUSH | SURV, EINVAL),
]

# fmt: off
_SEQUENCES: list[tuple[str, list[tuple[int, int, str, int]]]] = [
    ("REMOVE never marked", [(REMOVE, P, t, ENOENT) for t in ("file", "dir", "fifo")]),
    ("REMOVE never marked mount, filesystem",
     [(REMOVE | MOUNT, P, "dir", ENOENT), (REMOVE | FS, P, "dir", ENOENT)]),
    ("REMOVE mask 0", [(ADD, P, "file", 0), (REMOVE, 0, "file", EINVAL)]),
    ("REMOVE a bit it lacks, the last, again",
     [(ADD, P, "file", 0), (REMOVE, O, "file", 0), (REMOVE, P, "file", 0), (REMOVE, P, "file", ENOENT)]),
    ("REMOVE P from P|EOC of a directory",
     [(ADD, P | EOC, "dir", 0), (REMOVE, P, "dir", 0), (REMOVE, P, "dir", 0), (REMOVE, EOC, "dir", 0),
      (REMOVE, EOC, "dir", ENOENT)]),
    ("REMOVE P from P|EOC of a file",
     [(ADD, P | EOC, "file", 0), (REMOVE, P, "file", 0), (REMOVE, P, "file", ENOENT)]),
    ("EOC alone makes a mark on a file",
     [(ADD, EOC, "file", 0), (REMOVE, P, "file", 0), (REMOVE, P, "file", ENOENT)]),
    ("ONDIR alone stays",
     [(ADD, ONDIR, "file", 0), (REMOVE, P, "file", 0), (REMOVE, ONDIR, "file", 0),
      (REMOVE, P, "file", ENOENT)]),
    ("REMOVE|IGNORED from a directory with event flags only",
     [(ADD, ONDIR | EOC, "dir", 0), (REMOVE | IGNORED, P, "dir", 0), (REMOVE, P, "dir", ENOENT)]),
    ("REMOVE|IGNORED from a file with event flags only",
     [(ADD, ONDIR, "file", 0), (REMOVE | IGNORED, P, "file", 0), (REMOVE, P, "file", 0)]),
    ("ADD twice",
     [(ADD, P, "file", 0), (ADD, P, "file", 0), (ADD, O, "file", 0), (REMOVE, P, "file", 0),
      (REMOVE, O, "file", 0), (REMOVE, O, "file", ENOENT)]),
    ("ADD P to ONDIR", [(ADD, O | ONDIR, "dir", 0), (ADD, P, "dir", EEXIST)]),
    ("ADD ONDIR to P", [(ADD, P, "dir", 0), (ADD, O | ONDIR, "dir", EEXIST)]),
    ("ADD P to ONDIR of a filesystem",
     [(ADD | FS, ONDIR, "dir", 0), (ADD | FS, P, "dir", EEXIST), (ADD | MOUNT, P, "dir", 0)]),
    ("ADD ONDIR to P of a filesystem", [(ADD | FS, P, "dir", 0), (ADD | FS, ONDIR, "dir", EEXIST)]),
    ("ignoring ONDIR on a mark with P",
     [(ADD, P, "dir", 0), (ADD | IGNORE_SURV, O | ONDIR, "dir", EEXIST),
      (ADD | IGNORED, O | ONDIR, "dir", 0)]),
    ("FLUSH takes one type",
     [(ADD, P, "file", 0), (ADD | FS, P, "dir", 0), (ADD | MOUNT, P, "dir", 0), (FLUSH | FS, 0, "file", 0),
      (REMOVE | FS, P, "dir", ENOENT), (REMOVE | MOUNT, P, "dir", 0), (REMOVE, P, "file", 0)]),
    ("FLUSH takes all inodes",
     [(ADD, P, "file", 0), (ADD, P, "dir", 0), (FLUSH, P, "file", 0), (REMOVE, P, "file", ENOENT),
      (REMOVE, P, "dir", ENOENT)]),
    ("IGNORED then IGNORE",
     [(ADD | IGNORED, P, "file", 0), (ADD | IGNORE, P, "file", 0), (ADD | IGNORED, P, "file", EEXIST)]),
    ("IGNORE then IGNORED", [(ADD | IGNORE_SURV, P, "dir", 0), (ADD | IGNORED, P, "dir", EEXIST)]),
    ("IGNORE|SURV then IGNORE", [(ADD | IGNORE_SURV, P, "file", 0), (ADD | IGNORE, P, "file", EEXIST)]),
    ("IGNORE then IGNORE|SURV",
     [(ADD | IGNORE, P, "file", 0), (ADD | IGNORE_SURV, P, "file", 0), (ADD | IGNORE, P, "file", EEXIST)]),
    ("REMOVE|IGNORED removes an IGNORE mark",
     [(ADD | IGNORE_SURV, P, "file", 0), (REMOVE | IGNORED, P, "file", 0),
      (REMOVE | IGNORED, P, "file", ENOENT)]),
    ("EVICTABLE then plain",
     [(ADD | EVICTABLE, P, "file", 0), (ADD, P, "file", 0), (ADD | EVICTABLE, P, "file", EEXIST)]),
    ("plain then EVICTABLE", [(ADD, P, "file", 0), (ADD | EVICTABLE, O, "file", EEXIST)]),
    ("a mask and an ignore mask are one mark",
     [(ADD, O, "file", 0), (ADD | IGNORED | SURV, P, "file", 0), (REMOVE, O, "file", 0),
      (REMOVE, O, "file", 0), (REMOVE | IGNORED, P, "file", 0), (REMOVE, O, "file", ENOENT)]),
]

_WRITTEN: list[tuple[str, list[tuple[int, int, str, int]]]] = [
    ("an ignore mark without SURV is not made",
     [(ADD | IGNORED, P, "file", 0), (REMOVE | IGNORED, P, "file", ENOENT)]),
    ("nor with IGNORE", [(ADD | IGNORE, P, "file", 0), (REMOVE | IGNORED, P, "file", ENOENT)]),
    ("with SURV it is", [(ADD | IGNORED | SURV, P, "file", 0), (REMOVE | IGNORED, P, "file", 0)]),
    ("a mask is", [(ADD, P, "file", 0), (REMOVE, P, "file", 0)]),
    ("that of a filesystem is", [(ADD | FS | IGNORED, P, "file", 0), (REMOVE | FS | IGNORED, P, "file", 0)]),
]
# fmt: on


def mark_rows() -> Iterator[MarkRow]:
    """Everything that fanotify_mark(2) was tried with."""
    for name, mask, *errors in _CLASS_MASK:
        for (class_name, group_class), error in zip(CLASSES.items(), errors, strict=True):
            for target_name, flags, target in _TARGETS:
                step = Step(ADD | flags, mask, target, error)
                yield MarkRow(f"{class_name} {name} {target_name}", group_class, (step,))
    for bit in _UNKNOWN_MASK_BITS:
        steps = tuple(
            Step(command, mask, "file", EINVAL) for command in (ADD, REMOVE, FLUSH) for mask in (bit, bit | P)
        )
        yield MarkRow(f"mask bit {bit:#x}", PRE, steps)
    for target in ("fifo", "device", "socket", "link"):
        no_follow = FAN_MARK_DONT_FOLLOW if target == "link" else 0
        steps = (Step(ADD | no_follow, P, target, EINVAL), Step(ADD | no_follow, O | A | X, target, 0))
        yield MarkRow(f"on a {target}", PRE, steps)
    for name, flags, mask, *errors in _IGNORE:
        for target_name, type_flag, target in _TARGETS:
            error = errors[2] if type_flag else errors[target == "dir"]
            yield MarkRow(f"{name} {target_name}", PRE, (Step(ADD | flags | type_flag, mask, target, error),))
    for class_name in ("NOTIF", "CONTENT"):
        steps = tuple(Step(ADD | flags, P, "file", EINVAL) for flags in (IGNORED, IGNORE, IGNORE_SURV))
        yield MarkRow(f"{class_name} ignoring P", CLASSES[class_name], steps)
    for name, flags, error in _FLAGS:
        yield MarkRow(name, PRE, (Step(flags, P, "file", error),))
    yield MarkRow("FLUSH mask 0", PRE, (Step(FLUSH, 0, "file", 0),))
    yield MarkRow(
        "FLUSH P of NOTIF", NOTIF, (Step(FLUSH, P, "file", EINVAL), Step(REMOVE, P, "file", EINVAL))
    )
    for name, calls in _SEQUENCES:
        yield MarkRow(name, PRE, tuple(Step(*call) for call in calls))
    for name, calls in _WRITTEN:
        yield MarkRow(
            f"file open for writing: {name}", PRE, tuple(Step(*call) for call in calls), written=True
        )


# Responses to one outstanding event


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """What is written: a response with the event's fd (or `fd`), then `tail`, cut to `size` bytes. What comes: `result`, the bytes taken or
    minus the errno; `decision`, what the accessor gets (None: it goes on waiting)."""

    name: str
    group_flags: int
    response: int
    result: int
    decision: int | None
    tail: bytes = b""
    fd: int | None = None
    size: int | None = None

    def data(self, event_fd: int) -> bytes:
        """The bytes to be written."""
        whole = encode_response(event_fd if self.fd is None else self.fd, self.response) + self.tail
        return whole[: self.size]


def errno_rows(group_class: int) -> Iterator[ResponseRow]:
    """FAN_DENY with every errno that goes into a response: those that are refused first."""
    accepted = _GOOD_ERRNOS if group_class == PRE else set()
    for number in sorted(range(1, 256), key=accepted.__contains__):
        result, decision = (8, number) if number in accepted else (-EINVAL, None)
        yield ResponseRow(f"DENY errno {number}", group_class, deny_errno(number), result, decision)


RULE = encode_audit_rule(1, 1, 1)
_AUDIT = PRE | FAN_ENABLE_AUDIT
_GOOD_ERRNOS = {1, 5, 11, 16, 26, 28, 122}


def response_rows() -> Iterator[ResponseRow]:
    """Everything that write(2) to a group was tried with."""
    bad = -EINVAL
    for group_class in (CONTENT, PRE):
        name = "PRE" if group_class == PRE else "CONTENT"
        yield ResponseRow(f"{name} ALLOW", group_class, FAN_ALLOW, 8, 0)
        yield ResponseRow(f"{name} DENY", group_class, FAN_DENY, 8, errno.EPERM)
    for response in (
        0,
        FAN_ALLOW | FAN_DENY,
        4,
        8,
        FAN_ALLOW | 0x40,
        FAN_DENY | 0x80,
        FAN_ALLOW | 0x800000,
        0x80000000,
        5 << 24,
    ):
        yield ResponseRow(f"response {response:#x}", PRE, response, bad, None)
    for number in (1, 5, 128, 255):
        yield ResponseRow(f"ALLOW errno {number}", PRE, FAN_ALLOW | number << 24, bad, None)
    for size in (0, 1, 4, 7):
        yield ResponseRow(f"{size} bytes", PRE, FAN_ALLOW, bad, None, size=size)
    yield ResponseRow("12 bytes", PRE, FAN_ALLOW, 8, 0, tail=bytes(4))
    yield ResponseRow("two responses", PRE, FAN_DENY, 8, errno.EPERM, tail=encode_response(0, FAN_ALLOW))
    yield ResponseRow("record without FAN_INFO", PRE, FAN_ALLOW, 8, 0, tail=RULE)
    for fd in (-1, -2, -9, -(2**31)):
        yield ResponseRow(f"fd {fd}", PRE, FAN_ALLOW, bad, None, fd=fd)
        yield ResponseRow(f"fd {fd} DENY EIO", PRE, deny_errno(5), bad, None, fd=fd)
    yield ResponseRow("fd of nothing", PRE, FAN_ALLOW, -ENOENT, None, fd=30000)
    yield from _audit_rows(bad)
    yield from _probe_rows(bad)


def _audit_rows(bad: int) -> Iterator[ResponseRow]:
    yield ResponseRow("AUDIT", PRE, FAN_ALLOW | FAN_AUDIT, bad, None)
    yield ResponseRow("AUDIT|INFO", PRE, FAN_ALLOW | FAN_AUDIT | FAN_INFO, bad, None, tail=RULE)
    yield ResponseRow("enabled: AUDIT", _AUDIT, FAN_ALLOW | FAN_AUDIT, 8, 0)
    yield ResponseRow(
        "enabled: AUDIT|INFO", _AUDIT, FAN_DENY | FAN_AUDIT | FAN_INFO, 24, errno.EPERM, tail=RULE
    )
    records = {
        "no record": b"",
        "short record": RULE[:15],
        "long record": RULE + b"\0",
        "type 9": b"\x09" + RULE[1:],
        "type 0": b"\x00" + RULE[1:],
        "pad 1": RULE[:1] + b"\x01" + RULE[2:],
        "length 12": RULE[:2] + b"\x0c\x00" + RULE[4:],
        "length 17": RULE[:2] + b"\x11\x00" + RULE[4:],
    }
    for group_flags, name in ((PRE, ""), (_AUDIT, "enabled: ")):
        yield ResponseRow(f"{name}INFO", group_flags, FAN_ALLOW | FAN_INFO, 24, 0, tail=RULE)
        yield ResponseRow(f"{name}INFO DENY EIO", group_flags, deny_errno(5) | FAN_INFO, 24, 5, tail=RULE)
        for what, record in records.items():
            yield ResponseRow(f"{name}INFO {what}", group_flags, FAN_ALLOW | FAN_INFO, bad, None, tail=record)


def _probe_rows(bad: int) -> Iterator[ResponseRow]:
    for group_class, name in ((CONTENT, "CONTENT"), (PRE, "PRE")):
        yield ResponseRow(
            f"{name} probe ALLOW", group_class, FAN_ALLOW | FAN_INFO, 24, None, tail=RULE, fd=-1
        )
        yield ResponseRow(f"{name} probe DENY", group_class, FAN_DENY | FAN_INFO, 24, None, tail=RULE, fd=-1)
        for number in (5, 11, 2):
            result = 24 if group_class == PRE and number != 2 else bad
            response = deny_errno(number) | FAN_INFO
            yield ResponseRow(
                f"{name} probe errno {number}", group_class, response, result, None, tail=RULE, fd=-1
            )
    yield ResponseRow("probe, other negative fd", PRE, FAN_ALLOW | FAN_INFO, bad, None, tail=RULE, fd=-2)
    yield ResponseRow("probe with 8 more bytes", PRE, FAN_ALLOW | FAN_INFO, bad, None, tail=bytes(8), fd=-1)
