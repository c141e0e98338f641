"""Acts of ordinary users for a differential of rights: the same tree and the same acts in a plain directory and through a mount.

All that happens follows from a case's random numbers, so both sides do the same. An act gives what the call returned, or its errno.
"""

import os
import random
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fusehsm.linux import syscalls
from tests.support.posix_trees import outcome

ValueT = TypeVar("ValueT")
#: user, group, supplementary groups; none is root.
USERS = ((54321, 54321, (54400,)), (54322, 54322, ()), (54321, 54400, (54322, 54321)))
_IDS = (0, 54321, 54322, 54400, 55555)
_MODES = (
    0o000,
    0o111,
    0o400,
    0o444,
    0o600,
    0o644,
    0o660,
    0o666,
    0o755,
    0o777,
    0o2644,
    0o2755,
    0o2777,
    0o4755,
    0o6777,
    0o2666,
    0o6666,
)
_DIRECTORY_MODES = (0o700, 0o711, 0o755, 0o770, 0o777, 0o1777, 0o2775, 0o2777, 0o3777, 0o333, 0o1755)
_UMASKS = (0, 0o022, 0o077, 0o777, 0o002)
_DIRECTORIES = ("", "d0/", "d1/", "d2/", "d0/sub/")
_NAMES = ("f0", "f1", "f2", "new0", "new1", "dir0", "link", "fifo")
_TARGETS = ("f0", "d1", "d1/f0", "../f1", "nothing", "d2/new0")
_KEYS = (
    "user.one",
    "user.two",
    "trusted.one",
    "security.one",
    "security.capability",
    "system.posix_acl_access",
    "system.posix_acl_default",
)
_FLAGS = (
    os.O_RDONLY,
    os.O_WRONLY,
    os.O_RDWR,
    os.O_WRONLY | os.O_TRUNC,
    os.O_RDWR | os.O_APPEND,
    os.O_RDONLY | os.O_NOATIME,
)
_CAPABILITY = bytes.fromhex("0000000201000000000000000000000000000000")  # cap_chown, as setcap(8) writes it
_LONG_AGO = 1_000_000_000_123_456_789  # nanoseconds


def make_tree(root: Path, choose: random.Random, acls: bool) -> None:
    """Files and directories of several owners. `acls`: some have access control lists."""
    _give(root, choose, (0o777, 0o1777, 0o2777, 0o3777))
    for directory in _DIRECTORIES:
        place = root / directory
        if directory:
            place.mkdir()
        for name in ("f0", "f1", "f2"):
            (place / name).write_bytes(b"content" * choose.choice((0, 1, 1000)))
            _give(place / name, choose, _MODES)
        if choose.random() < 0.3:
            os.setxattr(place / "f1", "user.one", b"value")
        if choose.random() < 0.2:
            os.setxattr(place / "f2", "security.capability", _CAPABILITY)
        if acls and choose.random() < 0.4:
            os.setxattr(place / "f0", "system.posix_acl_access", _acl(choose))
        if acls and directory and choose.random() < 0.4:
            os.setxattr(place, "system.posix_acl_default", _acl(choose))
    for directory in reversed(_DIRECTORIES[1:]):
        _give(root / directory, choose, _DIRECTORY_MODES)


def _give(path: Path, choose: random.Random, modes: Sequence[int]) -> None:
    os.chown(path, choose.choice(_IDS), choose.choice(_IDS))
    path.chmod(choose.choice(modes))


def _acl(choose: random.Random) -> bytes:
    """An access control list as its attribute has it (include/uapi/linux/posix_acl_xattr.h): owner, one user, group, one group, mask, others."""
    nobody = 0xFFFFFFFF
    entries = (
        (0x01, nobody),
        (0x02, choose.choice(_IDS)),
        (0x04, nobody),
        (0x08, choose.choice(_IDS)),
        (0x10, nobody),
        (0x20, nobody),
    )
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, choose.randrange(8), number) for tag, number in entries
    )


@dataclass(frozen=True, slots=True)
class Stage:
    """What one process does, as one user."""

    #: Of USERS.
    user: tuple[int, int, tuple[int, ...]]
    #: What the acts follow from.
    seed: int
    #: How many acts.
    acts: int

    def perform(self, root: Path) -> list[tuple[str, object]]:
        """Do it; each act in words, and what came of it."""
        try:
            os.chdir(root)
        except PermissionError as error:  # the one before has closed it
            return [("chdir", error.errno)]
        acts = Acts()
        return [acts.one(random.Random(f"{self.seed} {number}")) for number in range(self.acts)]


class Acts:
    """The acts of one process in its working directory."""

    def __init__(self) -> None:
        self._choose = random.Random()  # of the act: one that fails early does not change those that follow
        self._words: list[str] = []
        self._fd = -1  # the file that was opened last

    def one(self, choose: random.Random) -> tuple[str, object]:
        """One act, in words, and what came of it."""
        self._choose = choose
        name, act = choose.choice(_ACTS)
        self._words = [name]
        result = outcome(act, self)
        return " ".join(self._words), result

    def _path(self) -> str:
        path = self._choose.choice(_DIRECTORIES) + self._choose.choice(_NAMES)
        self._words.append(path)
        return path

    def _any(self, values: Sequence[ValueT]) -> ValueT:
        value = self._choose.choice(values)
        self._words.append(oct(value) if isinstance(value, int) else str(value)[:40])
        return value

    def create(self) -> object:
        path, mode = self._path(), self._any(_MODES)
        flags = os.O_CREAT | self._any((*_FLAGS, os.O_WRONLY | os.O_EXCL))
        fd = os.open(path, flags, mode)
        self._hold(fd)
        return _told(os.fstat(fd))

    def open(self) -> object:
        path = self._path()
        fd = os.open(path, self._any(_FLAGS) | os.O_NONBLOCK)
        self._hold(fd)
        return _told(os.fstat(fd))

    def _hold(self, fd: int) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def write(self) -> object:
        return os.pwrite(self._fd, b"written" * self._any((0, 1, 1000)), self._any((0, 10, 5000)))

    def read(self) -> object:
        return os.pread(self._fd, 100, self._any((0, 10, 5000)))

    def fchmod(self) -> None:
        os.fchmod(self._fd, self._any(_MODES))

    def fchown(self) -> None:
        os.fchown(self._fd, self._any((-1, *_IDS)), self._any((-1, *_IDS)))

    def ftruncate(self) -> None:
        os.ftruncate(self._fd, self._any((0, 3, 10_000)))

    def truncate(self) -> None:
        path = self._path()
        os.truncate(path, self._any((0, 3, 10_000)))

    def mkdir(self) -> object:
        path = self._path()
        os.mkdir(path, self._any(_DIRECTORY_MODES))
        return _told(os.stat(path))

    def mknod(self) -> object:
        path = self._path()
        kind = self._any((stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK, stat.S_IFCHR))
        os.mknod(path, kind | self._any(_MODES), os.makedev(1, 3) if kind == stat.S_IFCHR else 0)
        return _told(os.stat(path))

    def unlink(self) -> None:
        os.unlink(self._path())

    def rmdir(self) -> None:
        path = self._path()
        os.rmdir(self._any((path, "d0/sub", "d2")))

    def rename(self) -> None:
        path = self._path()
        target = self._any((self._path(), "d2", "d0/sub"))
        syscalls.rename(-100, os.fsencode(path), -100, os.fsencode(target), self._any((0, 0, 1, 2)))

    def link(self) -> object:
        path = self._path()
        target = self._path()
        os.link(path, target, follow_symlinks=False)
        return _told(os.lstat(target))

    def symlink(self) -> None:
        path = self._path()
        os.symlink(self._any(_TARGETS), path)

    def chmod(self) -> object:
        path = self._any((self._path(), "d0", "d1", "d2", "."))
        os.chmod(path, self._any((*_MODES, *_DIRECTORY_MODES)))
        return _told(os.stat(path))

    def chown(self) -> None:
        path = self._any((self._path(), "d0", "d1"))
        who = self._any((-1, *_IDS)), self._any((-1, *_IDS))
        os.chown(path, *who, follow_symlinks=self._choose.random() < 0.5)

    def utimes(self) -> None:
        path = self._path()
        times = self._any(((_LONG_AGO, _LONG_AGO), None, (_LONG_AGO, 1)))
        os.utime(path, ns=times) if times else os.utime(path)

    def setxattr(self) -> None:
        path, key = self._path(), self._any(_KEYS)
        value = _acl(self._choose) if "acl" in key else self._any((b"", b"value", _CAPABILITY))
        os.setxattr(path, key, value, self._any((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE)))

    def getxattr(self) -> object:
        path = self._path()
        return os.getxattr(path, self._any(_KEYS))

    def listxattr(self) -> object:
        return sorted(os.listxattr(self._path()))

    def removexattr(self) -> None:
        path = self._path()
        os.removexattr(path, self._any(_KEYS))

    def stat(self) -> object:
        return _told(os.lstat(self._path()))

    def access(self) -> object:
        path = self._path()
        return os.access(path, self._choose.randrange(8), effective_ids=self._choose.random() < 0.5)

    def list(self) -> object:
        return sorted(os.listdir(self._any((".", "d0", "d1", "d2", "d0/sub"))))

    def umask(self) -> object:
        return os.umask(self._any(_UMASKS))


def _told(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_nlink,
        0 if stat.S_ISDIR(status.st_mode) else status.st_size,
    )


_ACTS: list[tuple[str, Callable[[Acts], object]]] = [
    (name, act) for name, act in vars(Acts).items() if not name.startswith("_") and name != "one"
]
