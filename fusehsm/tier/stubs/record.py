"""What is kept on disk of a stub that has been filled, in part or wholly: the extended attribute `user.fusehsm.resident` on the file itself.

Why it is safe. A block's bit is set after its content has been written and before anybody is let at it, so whoever is killed in between leaves at
most a block without a bit that has some right content; and while somebody serves, nobody but the filler writes to a block without a bit, as every
access waits for the bit first. So content is only ever put into *holes* of blocks without a bit, never over data, and data that is found there is
either the store's or in doubt (tier/stubs/residue.py).

What a power cut takes away are bits (harmless) or the data of blocks whose bits are there. Hence SYNCED, which is set only after the data has been
brought to the disk: without it, and on another mount than the record was written on (`place`), a hole in a block with a bit counts as lost. It is
fetched again if the file is as it was filled, and refused if somebody has modified it, who may have wanted the hole.

What explains the file's size and times: the record's, or OPEN, which says that it was being served when the record was written, so that fills and
the user's writes were to be expected. Anything else was done while nobody served, and is the user's. Not to be told apart from what was done while
somebody served: that after a kill on the real kernel, or in its moment, a file was made shorter and then longer again. A mount lets nobody do so.

`recorded_ns` stands for the change time, which no attribute can hold, as setting the attribute sets it: the record was written at that time or
within SETTLING after it, so a change time outside is of somebody else's change.
"""

import errno
import os
import struct
from dataclasses import dataclass
from enum import IntFlag
from hashlib import blake2b
from typing import Final

from fusehsm.tier.stubs.mark import StubMark

NAME: Final = "user.fusehsm.resident"
SETTLING: Final = 20_000_000  # nanoseconds; the kernel's coarse clock has ticks of up to 10 ms

# Format, flags, log2 of the block size, (room), the mark's and the place's digests, size, limit, mtime, time of writing; the blocks' bits follow.
_HEAD: Final = struct.Struct("<BBBx8s8sQQQQ")
_FORMAT: Final = 1
_ALL_BITS: Final = (1 << 64) - 1
# All attributes of an ext4 inode share 4 KiB; this leaves room for others.
_MOST_BLOCKS: Final = 16_384
_SMALLEST_SHIFT: Final = 12  # of --block-size; a file on Linux has less than 1 << 63 bytes
_LARGEST_SHIFT: Final = 62


class Flags(IntFlag):
    """OPEN: it was being served. MODIFIED: the user has written to it. SYNCED: all blocks with a bit are on the disk. UNEXPLAINED: the user's, and
    what is a hole must not be read. COMPLETE: every block is here. RACED: it has been filled since it was last known that nobody wrote, so the time
    of a modification may be lost: it is not to be taken away, as if it had been modified."""

    NONE = 0
    OPEN = 1
    MODIFIED = 2
    SYNCED = 4
    UNEXPLAINED = 8
    COMPLETE = 16
    RACED = 32


class Blocks:
    """Which blocks of a file are here: a set of numbers below `number`, counted."""

    __slots__ = ("_bits", "here", "number")

    def __init__(self, number: int, bits: bytes = b"", *, full: bool = False) -> None:
        """`bits`: as to_bytes() gives them, padded or cut to fit."""
        self.number = number
        size = -(-number // 8)
        self._bits = bytearray(b"\xff" * size if full else bits[:size].ljust(size, b"\0"))
        if number % 8:
            self._bits[-1] &= (1 << number % 8) - 1
        self.here = int.from_bytes(self._bits, "little").bit_count()

    def __contains__(self, block: int) -> bool:
        return bool(self._bits[block >> 3] >> (block & 7) & 1)

    def add(self, block: int) -> None:
        """Say that it is here."""
        if block not in self:
            self._bits[block >> 3] |= 1 << (block & 7)
            self.here += 1

    def discard(self, block: int) -> None:
        """Say that it is not here."""
        if block in self:
            self._bits[block >> 3] &= ~(1 << (block & 7))
            self.here -= 1

    def copy(self) -> "Blocks":
        """The same blocks."""
        return Blocks(self.number, bytes(self._bits))

    def missing(self, first: int, end: int) -> list[int]:
        """The blocks of [first, end) that are not here, ascending."""
        if self.is_full:
            return []
        return [block for block in range(first, min(end, self.number)) if block not in self]

    @property
    def is_full(self) -> bool:
        return self.here == self.number

    def to_bytes(self) -> bytes:
        """A bit for each block, without the zero bytes at the end."""
        return bytes(self._bits).rstrip(b"\0")


def block_size_for(size: int, wanted: int) -> int:
    """The block size for a file of `size` bytes: `wanted` (a power of two), doubled until the record is small enough to be kept."""
    while size > wanted * _MOST_BLOCKS:
        wanted *= 2
    return wanted


def digest_of(mark: StubMark) -> bytes:
    """What binds a record to a mark: a stub that was planted anew has none of the old one's content."""
    fields = (mark.inode, mark.generation, mark.size, mark.mtime_ns, mark.path, mark.version)
    return blake2b(repr(fields).encode(), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class Record:
    """`mark` and `place`: digests (8 bytes). `size` and `limit` in bytes: the file's, and the smallest that it ever had, beyond which nothing is the
    store's. `mtime_ns`, `recorded_ns`: nanoseconds since 1970. `bits`: of the blocks (Blocks.to_bytes)."""

    mark: bytes
    place: bytes
    flags: Flags
    block_size: int
    size: int
    limit: int
    mtime_ns: int
    recorded_ns: int
    bits: bytes

    def blocks(self) -> Blocks:
        """The blocks that are here."""
        return Blocks(-(-self.limit // self.block_size), self.bits, full=bool(self.flags & Flags.COMPLETE))

    def settled(self, ctime_ns: int) -> bool:
        """Whether a file with that change time has not been changed since the record was written."""
        return self.recorded_ns <= ctime_ns <= self.recorded_ns + SETTLING

    def write(self, fd: int) -> None:
        """Put it on the file. Raises OSError ENOSPC or EDQUOT where there is no room for it."""
        head = _HEAD.pack(
            _FORMAT,
            self.flags,
            self.block_size.bit_length() - 1,
            self.mark,
            self.place,
            self.size,
            self.limit,
            self.mtime_ns & _ALL_BITS,
            self.recorded_ns,
        )
        os.setxattr(fd, NAME, head + self.bits)


def read(fd: int, mark: StubMark) -> Record | None:
    """The record on a file with that mark; None where there is none, it belongs to another mark or format, or it tells something impossible.

    The file's owner may have written it, so no number of it is used before it has been looked at.
    """
    try:
        value = os.getxattr(fd, NAME)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise
    if len(value) < _HEAD.size or value[0] != _FORMAT:
        return None
    _, flags, shift, of_mark, place, size, limit, mtime_ns, recorded_ns = _HEAD.unpack_from(value)
    bits = value[_HEAD.size :]
    if of_mark != digest_of(mark) or not _SMALLEST_SHIFT <= shift <= _LARGEST_SHIFT:
        return None
    blocks = -(-limit >> shift)
    # Nothing beyond the stub's own size has ever been the store's, and block_size_for() has kept the blocks few.
    if limit > mark.size or blocks > _MOST_BLOCKS or len(bits) > -(-blocks // 8):
        return None
    return Record(of_mark, place, Flags(flags), 1 << shift, size, limit, mtime_ns, recorded_ns, bits)


def remove(fd: int) -> None:
    """Take the record off a file."""
    try:
        os.removexattr(fd, NAME)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
