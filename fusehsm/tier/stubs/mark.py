"""The mark of a stub: an extended attribute on the file itself, and the file's identity, independent of its name.

The mark is an attribute, not a database beside the tree. An attribute is part of the inode: it is made, renamed, linked and removed together with
the file, in the same transactions of the file system's journal. So no crash leaves one without the other, and `rm -r` or `mv` of a part of the tree
needs no other step. The mark's 56 bytes fit into an inode of 256 bytes, so a stub needs no block. A longer value takes 4 KiB on ext4, 400 MB for
100,000 stubs (docs/facts.md, section 18). For this reason the mark holds the store's path and version as digests: fusehsm only asks whether they are
equal. The path of a renamed stub is found by the digests of the paths in the store's list.

A mark is bound to:

* inode number and generation. A copy with the attribute (cp -a, rsync -X, a restored backup) is no stub: a user may want to keep its zeros.
* size and modification time. A file that is written, truncated or touched by other ways than fusehsm belongs to the user. A fill keeps the
  modification time, because a fill is no modification.

A file is a stub only if its mark holds (`describes`) and the file has no data at all (`is_all_hole`). Every other file is a user's content. A valid
mark on a file with data means: filled, in part or wholly, from that version of that path. The record (tier/stubs/record.py) tells which blocks are
here. Mounts of fusehsm hide and refuse both attributes; on the real kernel users see those in user.*.

Root's marks are in trusted.*, where no other user can write (tier/stubs/tree.py). Marks in user.* prove nothing to root: every user who may write to
the file may set them.

PENDING says that populate is about to change the size or time of a stub. If populate is killed in between, the file is still a stub.
"""

import errno
import fcntl
import hashlib
import os
import struct
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Final, Self

from fusehsm.tier.stubs.tree import Namespace

# Format number, flags, (room for more), generation, inode, size, mtime, digests of path and version.
_LAYOUT: Final = struct.Struct("<BBHIQQQ12s12s")
_FORMAT: Final = 2
# The first format, in user.* only. It differs in its number, and has no flag but PENDING.
_FIRST_FORMAT: Final = 1
_ALL_BITS: Final = (1 << 64) - 1  # a time may be before 1970 or after 2554; only equality is asked
_FS_IOC_GETVERSION: Final = 0x80087601  # linux/fs.h

Key = tuple[int, int, int]  # device, inode, generation


class Flags(IntFlag):
    """Bits of a mark. Others are kept for later, for example for a file whose content is here completely, which then needs no record."""

    NONE = 0
    # Size and time are being changed, and may differ from the mark's.
    PENDING = 1


@dataclass(frozen=True, slots=True)
class StubMark:
    """The fields of a mark."""

    # Inode number (st_ino).
    inode: int
    # Generation of the inode (FS_IOC_GETVERSION), 0 where the file system has none.
    generation: int
    # Bytes.
    size: int
    # Nanoseconds since 1970, modulo 2**64.
    mtime_ns: int
    # Digest of the path in the store, 12 bytes.
    path: bytes
    # Digest of the version in the store, 12 bytes.
    version: bytes
    # State of the mark.
    flags: Flags = Flags.NONE

    @classmethod
    def of(cls, fd: int, path: str, version: str | None) -> Self:
        """The mark for the file `fd` as it is now, a stub of that path and version in the store."""
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
        """Whether the mark was made for this file, and only fusehsm has changed the file since; `status` is its fstat(2)."""
        if (self.inode, self.generation) != (status.st_ino, generation(fd)):
            return False
        if self.is_pending:
            return True
        return (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns & _ALL_BITS)

    @property
    def is_pending(self) -> bool:
        return bool(self.flags & Flags.PENDING)

    def pending(self) -> Self:
        """The same mark with the flag PENDING."""
        return replace(self, flags=self.flags | Flags.PENDING)

    def write(self, fd: int, namespace: Namespace) -> None:
        """Set the mark on a file that the caller may write to. Raises OSError EOPNOTSUPP where the file system has no such attributes."""
        os.setxattr(
            fd,
            namespace.stub,
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


def read(fd: int, namespace: Namespace) -> StubMark | None:
    """The mark on a file that is open for reading; None if there is no mark, or one of an unknown format."""
    try:
        value = os.getxattr(fd, namespace.stub)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise
    if len(value) != _LAYOUT.size or not (
        value[0] == _FORMAT or (value[0] == _FIRST_FORMAT and namespace is Namespace.USER)
    ):
        return None
    _, flags, _, number, inode, size, mtime_ns, path, version = _LAYOUT.unpack(value)
    return StubMark(inode, number, size, mtime_ns, path, version, Flags(flags))


def digest(text: str) -> bytes:
    """The digest of a path or a version in a mark: 96 bits of BLAKE2b, so that no two in a store are equal by chance."""
    return hashlib.blake2b(os.fsencode(text), digest_size=12).digest()


def generation(fd: int) -> int:
    """The inode's generation; 0 where the file system has none. It changes when an inode number is used again (docs/facts.md, section 18)."""
    try:
        value = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))
    except OSError:
        return 0
    (number,) = struct.unpack_from("=I", value)
    return int(number)


def is_all_hole(fd: int) -> bool:
    """Whether the file has no data; its size does not matter."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return True
    return False


def key_of(fd: int, status: os.stat_result) -> Key:
    """The key of an open file; `status` is its fstat(2)."""
    return status.st_dev, status.st_ino, generation(fd)
