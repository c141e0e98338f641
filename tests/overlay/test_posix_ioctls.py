"""ioctl(2) of files: one expectation, held against a plain ext4 directory and against mounts over others."""

import errno
import fcntl
import os
import struct
import subprocess
from pathlib import Path

import pytest

from fusehsm.overlay.ioctls import (
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_GETFSLABEL,
    FS_IOC_GETVERSION,
    FS_IOC_SETFLAGS,
)
from tests.overlay.test_posix import make
from tests.support.engines import diverges
from tests.support.posix_trees import Errno, Tree, outcome

pytestmark = pytest.mark.fuse

IMMUTABLE, APPEND, NODUMP, NOATIME, JOURNAL_DATA, EXTENTS = 0x10, 0x20, 0x40, 0x80, 0x4000, 0x80000
XFLAG_NODUMP, XFLAG_IMMUTABLE = 0x80, 0x8
FSXATTR = struct.Struct("=IIIII8x")
# Of terminals, disks and whole file systems; numbers of nobody; and one of the file system that would swap two files' content.
FOREIGN = (0x5401, 0x1260, 0x4008_7A01, 0xC018_7A02, 0x8004_7AFF, 0x0000_7A03)
NOT_FOR_MOUNTS = (0xC028_660F, 0x4004_6610, 0x4100_9432)  # EXT4_IOC_MOVE_EXT, _RESIZE_FS, FS_IOC_SETFSLABEL


def flags_of(path: str | Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int(struct.unpack("=I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4])[0]) & ~EXTENTS
    finally:
        os.close(fd)


def set_flags(path: str | Path, flags: int) -> object:
    fd = os.open(path, os.O_RDONLY)
    try:
        present = struct.unpack("=I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4])[0] & EXTENTS
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", flags | present))
        return None
    finally:
        os.close(fd)


def ioctl(path: str | Path, command: int, argument: bytes) -> object:
    fd = os.open(path, os.O_RDONLY)
    try:
        return fcntl.ioctl(fd, command, argument)
    finally:
        os.close(fd)


def passes_on(tree: Tree) -> bool:
    return not diverges("ioctls of files", tree.engine)


def test_flags(tree: Tree) -> None:
    def act(path: Path) -> object:
        os.mkdir(path / "directory")
        found = []
        for name in (make(path / "file"), str(path / "directory")):
            before = os.stat(name).st_ctime_ns
            found += [
                outcome(set_flags, name, NODUMP | NOATIME),
                outcome(flags_of, name),
                outcome(set_flags, name, NODUMP),
                outcome(flags_of, name),
                os.stat(name).st_ctime_ns >= before,
                os.stat(name).st_ctime_ns == os.stat(tree.backing / os.path.relpath(name, path)).st_ctime_ns,
            ]
        return found

    refused = Errno(errno.ENOTTY)
    each = [None, NODUMP | NOATIME, None, NODUMP, True, True]
    # From Linux 6.17 on the kernel has one errno for all that cannot, and shows ENOTTY of it.
    assert tree.run(act) == (each if passes_on(tree) else [*[refused] * 4, True, True]) * 2


def test_lsattr_and_chattr(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")
        changed = subprocess.run(["chattr", "+d", name], capture_output=True, timeout=20)
        listed = subprocess.run(["lsattr", name], capture_output=True, timeout=20, text=True)
        return changed.returncode == 0, listed.returncode == 0 and "d" in listed.stdout.split()[0]

    assert tree.run(act) == (passes_on(tree),) * 2


def test_extended_flags(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")
        found = outcome(ioctl, name, FS_IOC_FSGETXATTR, bytes(FSXATTR.size))
        if isinstance(found, Errno):
            return found
        assert isinstance(found, bytes)
        xflags, *rest = FSXATTR.unpack(found)
        assert ioctl(name, FS_IOC_FSSETXATTR, FSXATTR.pack(xflags | XFLAG_NODUMP, *rest)) is not None
        return (
            flags_of(name),
            # This file system has no project quotas.
            outcome(ioctl, name, FS_IOC_FSSETXATTR, FSXATTR.pack(xflags, rest[0], rest[1], 7, rest[3])),
        )

    expected = (NODUMP, Errno(errno.EOPNOTSUPP)) if passes_on(tree) else Errno(errno.ENOTTY)
    assert tree.run(act) == expected


def test_generation_and_label(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")
        pairs = [
            [outcome(ioctl, place, command, bytes(size)) for place in (name, tree.backing / "file")]
            for command, size in ((FS_IOC_GETVERSION, 8), (FS_IOC_GETFSLABEL, 256))
        ]
        return [one if isinstance(one, Errno) else one == other for one, other in pairs]

    assert tree.run(act) == [True if passes_on(tree) else Errno(errno.ENOTTY)] * 2


def test_rights(tree: Tree) -> None:
    """An ordinary user changes flags of own files, and neither those of others nor those that need a capability."""

    def prepare(path: Path) -> None:
        os.chmod(path, 0o777)
        make(path / "root's")

    def act(path: Path) -> object:
        mine = make(path / "mine")
        os.mkdir(path / "directory")
        return [
            outcome(set_flags, mine, NODUMP),
            outcome(set_flags, mine, NODUMP | IMMUTABLE),
            outcome(set_flags, mine, NODUMP | APPEND),
            outcome(set_flags, mine, NODUMP | JOURNAL_DATA),
            outcome(ioctl, mine, FS_IOC_FSSETXATTR, FSXATTR.pack(XFLAG_IMMUTABLE, 0, 0, 0, 0)),
            outcome(set_flags, path / "directory", IMMUTABLE),
            outcome(flags_of, mine),
            outcome(flags_of, path / "root's"),
            outcome(set_flags, path / "root's", NODUMP),
            outcome(ioctl, path / "root's", FS_IOC_FSSETXATTR, FSXATTR.pack(XFLAG_NODUMP, 0, 0, 0, 0)),
        ]

    tree.run(prepare)
    denied, refused = Errno(errno.EPERM), Errno(errno.ENOTTY)
    may = [None, *[denied] * 5, NODUMP, 0, denied, denied]
    assert tree.as_user(act) == (may if passes_on(tree) else [*[refused] * 9, denied])
    assert tree.run(lambda path: outcome(flags_of, path / "root's")) == (0 if passes_on(tree) else refused)


def test_immutable_and_append_only(tree: Tree) -> None:
    if not passes_on(tree):
        tree.run(lambda path: make(path / "file", b"contentmore"))
        return

    def act(path: Path) -> object:
        name = make(path / "file", b"content")
        found = []
        try:
            found.append(outcome(set_flags, name, IMMUTABLE))
            found.append(outcome(os.open, name, os.O_WRONLY))
            found.append(outcome(os.unlink, name))
            found.append(outcome(os.chmod, name, 0o600))
            found.append(outcome(set_flags, name, APPEND))
            found.append(outcome(os.truncate, name, 1))
            fd = os.open(name, os.O_WRONLY | os.O_APPEND)
            found.append(os.write(fd, b"more"))
            os.close(fd)
        finally:
            set_flags(name, 0)
        return found, Path(name).read_bytes()

    denied = Errno(errno.EPERM)
    assert tree.run(act) == ([None, denied, denied, denied, None, denied, 4], b"contentmore")


def test_all_others_are_refused(tree: Tree) -> None:
    numbers = FOREIGN if tree.is_native else (*FOREIGN, *NOT_FOR_MOUNTS)

    def act(path: Path) -> object:
        os.mkdir(path / "directory")
        return {
            outcome(ioctl, name, number, bytes(256))
            for name in (make(path / "file"), path / "directory")
            for number in numbers
        }

    assert tree.run(act) == {Errno(errno.ENOTTY)}
