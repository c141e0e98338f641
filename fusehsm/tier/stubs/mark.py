"""How a stub is known as a stub: the extended attribute `user.fusehsm.stub` on the file itself.

Why an attribute and not a database beside the tree: it is part of the inode, so it is made, renamed, linked and removed together with the file, in
the same transactions of the file system's journal, and no crash leaves one without the other. Nothing has to be kept in step, and `rm -r` or
`mv` of a part of the tree just work. Its 56 bytes fit into an inode of 256 bytes, so that a stub needs no block of its own (on ext4 a longer value
takes 4 KiB each: 400 MB for 100,000 stubs), which is why the store's path and version are here as digests: only equality is ever asked, and the path
of a stub that has been renamed is found again by the digests of the paths in the store's list.

What it is bound to, and against what:

* inode number and generation, so that a copy that took the attribute along (cp -a, rsync -X, a restored backup) is no stub: its zeros may be
  what somebody wanted to keep;
* size and modification time, so that whatever wrote, truncated or touched the file by other ways than fusehsm makes it the user's. The
  engine keeps the modification time when it fills, as a fill is no modification.

A file is a stub only if its mark holds (`describes`) and it has no data at all (`is_all_hole`); everything else is somebody's content. A valid
mark on a file with data says: filled, in part or wholly, from that version of that path. Which parts are here is to be told in an attribute of its
own next to this one (`user.fusehsm.*`, which fusehsm's mounts hide and refuse; on the real kernel users see it).

Whoever may write to a file may set its mark, so root, who would fetch for them what is not theirs, does not believe every mark
(tier/fetch/suspicion.py).

PENDING says that populate is about to give a stub another size or time, so that one which was killed in between is still a stub.
"""

import errno
import fcntl
import hashlib
import os
import struct
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Final, Self

NAME: Final = "user.fusehsm.stub"

# Format number, flags, (room for more), generation, inode, size, mtime, digests of path and version.
_LAYOUT: Final = struct.Struct("<BBHIQQQ12s12s")
_FORMAT: Final = 1
_ALL_BITS: Final = (1 << 64) - 1  # of a time, which may be before 1970 or after 2554: only equality is asked
_FS_IOC_GETVERSION: Final = 0x80087601  # linux/fs.h


class Flags(IntFlag):
    """PENDING: size and time are being changed and need not be the mark's."""

    NONE = 0
    PENDING = 1


@dataclass(frozen=True, slots=True)
class StubMark:
    """`size` in bytes, `mtime_ns` in nanoseconds since 1970; `path` and `version` are digests (12 bytes)."""

    inode: int
    generation: int
    size: int
    mtime_ns: int
    path: bytes
    version: bytes
    flags: Flags = Flags.NONE

    @classmethod
    def of(cls, fd: int, path: str, version: str | None) -> Self:
        """The mark for what `fd` is now, as a stub of that path and version in the store."""
        status = os.fstat(fd)
        return cls(
            status.st_ino,
            generation(fd),
            status.st_size,
            status.st_mtime_ns & _ALL_BITS,
            digest(path),
            digest(version or ""),
        )

    def describes(self, fd: int, status: os.stat_result) -> bool:
        """Whether the mark was made for this very file and nobody else has changed it since; `status` is its fstat(2)."""
        if (self.inode, self.generation) != (status.st_ino, generation(fd)):
            return False
        if self.is_pending:
            return True
        return (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns & _ALL_BITS)

    @property
    def is_pending(self) -> bool:
        return bool(self.flags & Flags.PENDING)

    def pending(self) -> Self:
        """The same mark, saying that size and time are being changed."""
        return replace(self, flags=self.flags | Flags.PENDING)

    def write(self, fd: int) -> None:
        """Put it on a file that the caller may write to. EOPNOTSUPP where the file system has no such attributes."""
        os.setxattr(
            fd,
            NAME,
            _LAYOUT.pack(
                _FORMAT,
                self.flags,
                0,
                self.generation,
                self.inode,
                self.size,
                self.mtime_ns,
                self.path,
                self.version,
            ),
        )


def read(fd: int) -> StubMark | None:
    """The mark on a file that is open for reading; None where there is none, or one that this version does not understand."""
    try:
        value = os.getxattr(fd, NAME)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise
    if len(value) != _LAYOUT.size or value[0] != _FORMAT:
        return None
    _, flags, _, number, inode, size, mtime_ns, path, version = _LAYOUT.unpack(value)
    return StubMark(inode, number, size, mtime_ns, path, version, Flags(flags))


def digest(text: str) -> bytes:
    """What a mark keeps of a path or a version: 96 bits of BLAKE2b, too many for two of a store's to be alike by chance."""
    return hashlib.blake2b(os.fsencode(text), digest_size=12).digest()


def generation(fd: int) -> int:
    """The inode's generation, which an inode number that is used again does not keep; 0 where the file system has none to tell."""
    try:
        value = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))
    except OSError:
        return 0
    (number,) = struct.unpack_from("=I", value)
    return int(number)


def is_all_hole(fd: int) -> bool:
    """Whether the file has no data, whatever its size."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return True
    return False
