"""Marks and the events that an access then makes for their group: one table for our MarkTable and for the real kernel.

A row's marks are set on a new group, then one access is made. Targets and what they are: "top", a directory; "file" in it; "dir" in it;
"child", a file in dir, and "sub", an empty directory in dir. Events are letters: O, X, A, P as in OPEN_PERM, OPEN_EXEC_PERM, ACCESS_PERM,
PRE_ACCESS.
"""

from dataclasses import dataclass

from tests.support.rule_rows import (
    ADD,
    ALL_PERM,
    CONTENT,
    EOC,
    FS,
    IGNORE_SURV,
    IGNORED,
    MOUNT,
    ONDIR,
    PRE,
    REMOVE,
    SURV,
    A,
    O,
    P,
    X,
)

PARENTS = {"file": "top", "dir": "top", "child": "dir", "sub": "dir", "top": None}
DIRECTORIES = {"top", "dir", "sub"}
LETTERS = {O: "O", X: "X", A: "A", P: "P"}

Mark = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class HearingRow:
    """`access`: "read" (open, pread, close) or "write" (open, pwrite, close) or "list" (open, getdents twice, close) of `target`, or
    "write, read"."""

    name: str
    marks: tuple[Mark, ...]
    access: str
    target: str
    expected: str
    group_class: int = PRE


def _row(
    name: str, marks: list[Mark], access: str, target: str, expected: str, group_class: int = PRE
) -> HearingRow:
    return HearingRow(name, tuple(marks), access, target, expected, group_class)


OA = O | A
SURVIVING = IGNORED | SURV

# fmt: off
HEARING_ROWS = [
    _row("inode", [(ADD, ALL_PERM, "child")], "read", "child", "OPA"),
    _row("inode, write", [(ADD, ALL_PERM, "child")], "write", "child", "OP"),
    _row("inode of another file", [(ADD, ALL_PERM, "file")], "read", "child", ""),
    _row("P only", [(ADD, P, "child")], "read", "child", "P"),
    _row("O only", [(ADD, O, "child")], "read", "child", "O"),
    _row("A only", [(ADD, A, "child")], "read", "child", "A"),
    _row("A only, CONTENT", [(ADD, OA, "child")], "read", "child", "OA", CONTENT),
    _row("mount", [(ADD | MOUNT, ALL_PERM, "top")], "read", "child", "OPA"),
    _row("filesystem", [(ADD | FS, ALL_PERM, "file")], "read", "child", "OPA"),
    _row("all three: once each",
         [(ADD, ALL_PERM, "child"), (ADD | MOUNT, ALL_PERM, "top"), (ADD | FS, ALL_PERM, "top")],
         "read", "child", "OPA"),
    _row("masks are united", [(ADD, O, "child"), (ADD | MOUNT, A, "top"), (ADD | FS, P, "top")], "read", "child", "OPA"),
    _row("parent without EOC", [(ADD, ALL_PERM, "dir")], "read", "child", ""),
    _row("parent with EOC", [(ADD, ALL_PERM | EOC, "dir")], "read", "child", "OPA"),
    _row("grandparent with EOC", [(ADD, ALL_PERM | EOC, "top")], "read", "child", ""),
    _row("parent and inode", [(ADD, P | EOC, "dir"), (ADD, O, "child")], "read", "child", "OP"),
    _row("removed", [(ADD | FS, ALL_PERM, "top"), (REMOVE | FS, ALL_PERM, "top")], "read", "child", ""),
    _row("partly removed", [(ADD | FS, ALL_PERM, "top"), (REMOVE | FS, OA, "top")], "read", "child", "P"),

    _row("listing without ONDIR", [(ADD | FS, OA, "top")], "list", "sub", ""),
    _row("listing with ONDIR", [(ADD | FS, OA | ONDIR, "top")], "list", "sub", "OAA"),
    _row("listing, inode", [(ADD, OA | ONDIR, "sub")], "list", "sub", "OAA"),
    _row("listing, P too", [(ADD, OA | ONDIR, "sub"), (ADD | FS, P, "top")], "list", "sub", "OAA"),
    _row("listing, parent with EOC", [(ADD, OA | EOC, "dir")], "list", "sub", ""),
    _row("listing, parent with EOC and ONDIR", [(ADD, OA | EOC | ONDIR, "dir")], "list", "sub", "OAA"),
    _row("ONDIR on one mark only", [(ADD, O | ONDIR, "sub"), (ADD | FS, A, "top")], "list", "sub", "O"),
    _row("reading a file with ONDIR", [(ADD | FS, OA | ONDIR, "top")], "read", "child", "OA"),

    _row("inode ignores P", [(ADD | FS, ALL_PERM, "top"), (ADD | SURVIVING, P, "child")], "read", "child", "OA"),
    _row("inode ignores P, IGNORE", [(ADD | FS, ALL_PERM, "top"), (ADD | IGNORE_SURV, P, "child")], "read", "child", "OA"),
    _row("mount ignores P", [(ADD | FS, ALL_PERM, "top"), (ADD | MOUNT | IGNORE_SURV, P, "top")], "read", "child", "OA"),
    _row("filesystem ignores P", [(ADD, ALL_PERM, "child"), (ADD | FS | SURVIVING, P, "top")], "read", "child", "OA"),
    _row("another inode ignores P", [(ADD | FS, ALL_PERM, "top"), (ADD | SURVIVING, P, "file")], "read", "child", "OPA"),
    _row("no longer ignored",
         [(ADD | FS, ALL_PERM, "top"), (ADD | SURVIVING, P, "child"), (REMOVE | IGNORED, P, "child")],
         "read", "child", "OPA"),
    _row("parent ignores P, IGNORED", [(ADD | FS, ALL_PERM, "top"), (ADD | SURVIVING, P | EOC, "dir")], "read", "child", "OPA"),
    _row("parent ignores P, IGNORE|EOC",
         [(ADD | FS, ALL_PERM, "top"), (ADD | IGNORE_SURV, P | EOC, "dir")], "read", "child", "OA"),
    _row("parent ignores P, IGNORE without EOC",
         [(ADD | FS, ALL_PERM, "top"), (ADD | IGNORE_SURV, P, "dir")], "read", "child", "OPA"),
    _row("parent watches children and ignores P, IGNORED",
         [(ADD, ALL_PERM | EOC, "dir"), (ADD | SURVIVING, P, "dir")], "read", "child", "OA"),
    _row("parent watches children, IGNORE without EOC",
         [(ADD, ALL_PERM | EOC, "dir"), (ADD | IGNORE_SURV, P, "dir")], "read", "child", "OPA"),
    _row("listing ignored, IGNORED", [(ADD | FS, OA | ONDIR, "top"), (ADD | SURVIVING, O, "sub")], "list", "sub", "AA"),
    _row("listing ignored, IGNORE without ONDIR",
         [(ADD | FS, OA | ONDIR, "top"), (ADD | IGNORE_SURV, O, "sub")], "list", "sub", "OAA"),
    _row("listing ignored, IGNORE|ONDIR",
         [(ADD | FS, OA | ONDIR, "top"), (ADD | IGNORE_SURV, O | ONDIR, "sub")], "list", "sub", "AA"),

    _row("a write ends ignoring", [(ADD | FS, P, "top"), (ADD | IGNORED, P, "child")], "write, read", "child", "P"),
    _row("a write spares SURV", [(ADD | FS, P, "top"), (ADD | SURVIVING, P, "child")], "write, read", "child", ""),
    _row("a write to the file ends its filesystem's ignoring",
         [(ADD, P, "child"), (ADD | FS | IGNORED, P, "top")], "write, read", "child", "P"),
    _row("a write to the file ends its mount's ignoring",
         [(ADD, P, "child"), (ADD | MOUNT | IGNORED, P, "top")], "write, read", "child", "P"),
    _row("a write to the file ends its parent's ignoring",
         [(ADD, P | EOC, "dir"), (ADD | IGNORED, P, "dir")], "write, read", "child", "P"),
    _row("a write elsewhere does not end a file's ignoring",
         [(ADD | FS, P, "top"), (ADD | IGNORED, P, "file")], "write, read", "child", "PP"),
]


@dataclass(frozen=True, slots=True)
class ArmingRow:
    """`before`: marks of a first group while "child" is opened for reading and writing; then that group goes if `closed`. A second group with
    all permission events on the filesystem hears `read` of pread, and P of ftruncate always."""

    name: str
    before: tuple[Mark, ...]
    read: str
    group_class: int = PRE
    closed: bool = False


ARMING_ROWS = [
    ArmingRow("nothing", (), ""),
    ArmingRow("O and X", ((ADD, O | X, "child"),), ""),
    ArmingRow("O of CONTENT", ((ADD, O, "child"),), "", CONTENT),
    ArmingRow("P of another inode", ((ADD, P, "file"),), ""),
    ArmingRow("A of another inode", ((ADD, A, "file"),), ""),
    ArmingRow("P", ((ADD, P, "child"),), "P"),
    ArmingRow("P of the parent with EOC", ((ADD, P | EOC, "dir"),), "P"),
    ArmingRow("P of the parent without EOC", ((ADD, P, "dir"),), ""),
    ArmingRow("P of the filesystem", ((ADD | FS, P, "top"),), "P"),
    ArmingRow("P of the mount", ((ADD | MOUNT, P, "top"),), "P"),
    ArmingRow("P, group closed", ((ADD, P, "child"),), "P", closed=True),
    ArmingRow("P that is ignored", ((ADD | FS, P, "top"), (ADD | SURVIVING, P, "child")), "P"),
    ArmingRow("A", ((ADD, A, "child"),), "PA"),
    ArmingRow("A of CONTENT", ((ADD, A, "child"),), "PA", CONTENT),
    ArmingRow("A of CONTENT, filesystem, group closed", ((ADD | FS, A, "top"),), "PA", CONTENT, closed=True),
    ArmingRow("P here, A there", ((ADD, P, "child"), (ADD | FS, A, "top")), "PA"),
    # What is only ignored arms as well.
    ArmingRow("only an ignore mark for P", ((ADD | SURVIVING, P, "child"),), "P"),
    ArmingRow("only an ignore mark for A", ((ADD | SURVIVING, A, "child"),), "PA"),
    ArmingRow("only an ignore mark of the parent", ((ADD | IGNORE_SURV, P | EOC, "dir"),), "P"),
    ArmingRow("only an ignore mark of the parent without EOC", ((ADD | IGNORE_SURV, P, "dir"),), ""),
]
# fmt: on
