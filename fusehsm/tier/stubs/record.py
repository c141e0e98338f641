"""The record of a stub that has been filled, in part or wholly: an extended attribute on the file itself, in the
namespace of the mark.

A block's bit is set after the block's content has been written, and before any access to the block goes on. A fetch that is killed in between leaves
at most a block without a bit that has some right content. While fetch serves, only a fill writes to a block without a bit: every access waits for
the bit first. So fetch puts content only into *holes* of blocks without a bit, never over data. Data in such a block is either the store's or in
doubt (tier/stubs/content.py).

A power cut loses bits, which is harmless, or the data of blocks with bits. For this reason SYNCED is set only after the data is on the disk. Without
SYNCED, and on another mount than that of the record (`place`), a hole in a block with a bit counts as lost. Fetch fetches it again if the file is as
it was filled. It refuses access if the file is modified, because the user may have wanted the hole.

The file's size and times are explained if they are the record's, or if the record says OPEN: fetch served the file when the record was written, so
fills and the user's writes are expected. Any other change was made while no fetch served the file, and is the user's. One change cannot be told
apart: after a kill on the real kernel, or in its moment, a file is made shorter and then longer again. A mount does not permit this.

`recorded_ns` stands for the change time. No attribute can hold the change time, because setxattr(2) sets it. The record was written at `recorded_ns`
or within SETTLING after it; a change time outside that range is of another change.
"""

import errno
import os
import re
import struct
import zlib
from dataclasses import dataclass
from enum import IntFlag
from hashlib import blake2b
from typing import Final

from fusehsm.tier.stubs.mark import StubMark
from fusehsm.tier.stubs.tree import Namespace

SETTLING: Final = 20_000_000  # nanoseconds; the kernel's coarse clock has ticks of up to 10 ms

# Format, flags, log2 of the block size, (room), the mark's and the place's digests, size, limit, mtime, time of writing; the blocks' bits follow.
_HEAD: Final = struct.Struct("<BBBx8s8sQQQQ")
_FORMAT: Final = 1
_ALL_BITS: Final = (1 << 64) - 1
# All attributes of an ext4 inode share 4 KiB; this leaves room for others. Longer bits are compressed.
_LONGEST_BITS: Final = 2048
_LARGEST_BLOCK: Final = 1 << 24  # bytes; a reader of one byte waits for a block
_MOST_BLOCKS: Final = 1 << 20
_NOT_FULL: Final = re.compile(b"[^\xff]")
_SMALLEST_SHIFT: Final = 12  # of --block-size; a file on Linux is shorter than 1 << 63 bytes
_LARGEST_SHIFT: Final = 62


class Flags(IntFlag):
    """Bits of a record."""

    NONE = 0
    # The file was being served.
    OPEN = 1
    # The user has written to the file.
    MODIFIED = 2
    # All blocks with a bit are on the disk.
    SYNCED = 4
    # The file is the user's, and its holes must not be read.
    UNEXPLAINED = 8
    # Every block is here.
    COMPLETE = 16
    # A fill has set the modification time back, and a process may have had the file open for writing. A modification may
    # be hidden, so the file counts as modified and is not evicted.
    RACED = 32
    # The bits are compressed (zlib). Only on the disk.
    COMPRESSED = 64


class Blocks:
    """The blocks of a file that are here: a set of block numbers below `number`. `here` is their count."""

    __slots__ = ("_bits", "here", "number")

    def __init__(self, number: int, bits: bytes = b"", *, full: bool = False) -> None:
        """`bits`: as from to_bytes(), padded or cut to fit. `full`: all blocks are here."""
        self.number = number
        size = -(-number // 8)
        self._bits = bytearray(b"\xff" * size if full else bits[:size].ljust(size, b"\0"))
        if number % 8:
            self._bits[-1] &= (1 << number % 8) - 1
        self.here = int.from_bytes(self._bits, "little").bit_count()

    def __contains__(self, block: int) -> bool:
        return bool(self._bits[block >> 3] >> (block & 7) & 1)

    def add(self, block: int) -> None:
        """Note that the block is here."""
        if block not in self:
            self._bits[block >> 3] |= 1 << (block & 7)
            self.here += 1

    def discard(self, block: int) -> None:
        """Note that the block is not here."""
        if block in self:
            self._bits[block >> 3] &= ~(1 << (block & 7))
            self.here -= 1

    def copy(self) -> "Blocks":
        """An independent copy."""
        return Blocks(self.number, bytes(self._bits))

    def missing(self, first: int, end: int, most: int | None = None) -> list[int]:
        """The blocks of [first, end) that are not here, ascending; the first `most` of them, if given."""
        found: list[int] = []
        block, end = first, 0 if self.is_full else min(end, self.number)
        while block < end and len(found) != most:
            if not block % 8:
                # A file may have a million blocks.
                match = _NOT_FULL.search(self._bits, block // 8)
                if match is None:
                    break
                if match.start() > block // 8:
                    block = match.start() * 8
                    continue
            if block not in self:
                found.append(block)
            block += 1
        return found

    @property
    def is_full(self) -> bool:
        return self.here == self.number

    def to_bytes(self) -> bytes:
        """One bit a block, the lowest first, without the zero bytes at the end."""
        return bytes(self._bits).rstrip(b"\0")


def block_size_for(size: int, wanted: int) -> int:
    """The block size in bytes for a file of `size` bytes: `wanted` (a power of two), doubled until the record fits into an attribute.

    It becomes no larger than 16 MiB. Above 256 GiB the record of a file with very many parts may not fit, and fills then fail with ENOSPC. Raises
    OSError EFBIG for a file of more than 1,048,576 such blocks (16 TiB).
    """
    while size > wanted * 8 * _LONGEST_BITS and wanted < _LARGEST_BLOCK:
        wanted *= 2
    if size > wanted * _MOST_BLOCKS:
        raise OSError(errno.EFBIG, f"has more than {_MOST_BLOCKS:,} blocks of {wanted:,} bytes")
    return wanted


def digest_of(mark: StubMark) -> bytes:
    """The digest (8 bytes) that binds a record to a mark. A stub that populate made again has none of the old stub's content."""
    fields = (mark.inode, mark.generation, mark.size, mark.mtime_ns, mark.path, mark.version)
    return blake2b(repr(fields).encode(), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of a record."""

    # digest_of() the mark, 8 bytes.
    mark: bytes
    # The mount on which the record was written, 8 bytes (tree.place_of).
    place: bytes
    # State of the file.
    flags: Flags
    # Bytes, a power of two.
    block_size: int
    # Size of the file in bytes.
    size: int
    # The smallest size in bytes that the file ever had. Beyond it no content is the store's.
    limit: int
    # Modification time, nanoseconds since 1970.
    mtime_ns: int
    # Time of writing the record, nanoseconds since 1970.
    recorded_ns: int
    # The blocks that are here (Blocks.to_bytes).
    bits: bytes

    def blocks(self) -> Blocks:
        """The blocks that are here."""
        return Blocks(-(-self.limit // self.block_size), self.bits, full=bool(self.flags & Flags.COMPLETE))

    def settled(self, ctime_ns: int) -> bool:
        """Whether a file with that change time (nanoseconds) is unchanged since the record was written."""
        return self.recorded_ns <= ctime_ns <= self.recorded_ns + SETTLING

    def write(self, fd: int, namespace: Namespace) -> None:
        """Set the record on the file. Raises OSError ENOSPC or EDQUOT if there is no room for it."""
        flags, bits = self.flags, self.bits
        if len(bits) > _LONGEST_BITS:
            flags, bits = flags | Flags.COMPRESSED, zlib.compress(bits, 1)
        head = _HEAD.pack(
            _FORMAT,
            flags,
            self.block_size.bit_length() - 1,
            self.mark,
            self.place,
            self.size,
            self.limit,
            self.mtime_ns & _ALL_BITS,
            self.recorded_ns,
        )
        os.setxattr(fd, namespace.resident, head + bits)


def read(fd: int, mark: StubMark, namespace: Namespace) -> Record | None:
    """The record on a file with that mark; None if there is none, if it has another mark or format, or if a value is impossible.

    The file's owner may have written the record, so every number is checked before use.
    """
    try:
        value = os.getxattr(fd, namespace.resident)
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
    # Beyond the stub's own size no content is the store's, and block_size_for() limits the number of blocks.
    if limit > mark.size or blocks > _MOST_BLOCKS:
        return None
    longest = -(-blocks // 8)
    if flags & Flags.COMPRESSED:
        flags &= ~Flags.COMPRESSED
        try:
            bits = zlib.decompressobj().decompress(bits, longest + 1)
        except zlib.error:
            return None
    if len(bits) > longest:
        return None
    return Record(of_mark, place, Flags(flags), 1 << shift, size, limit, mtime_ns, recorded_ns, bits)


def remove(fd: int, namespace: Namespace) -> None:
    """Remove the record from a file, if there is one."""
    try:
        os.removexattr(fd, namespace.resident)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
