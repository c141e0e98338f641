"""One stub while it is served: which of its blocks are here, and how content comes and goes, so that its record is true at every moment.

Its methods block (they write to the file and wait for each other), so all but the questions belong into threads. The descriptors that they want are
of events, or others whose use makes no events.

What a mapping writes on the real kernel is told by the file's times alone, and a fill sets these back. So whoever had a file that was filled open
for writing counts as having written to it.

Not to be seen by any listener, and so the one thing that can go wrong: open(2) with O_TRUNC asks nobody, and when it happens in the very moment of a
fill, what is written makes the file long again. It is noticed by the size, unless the fill was of the file's last block.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Self

from fusehsm import filesystem_calls as syscalls
from fusehsm.tier import residency, stub_mark
from fusehsm.tier.holes import holes
from fusehsm.tier.residency import Blocks, Flags, Record, block_size_for, digest_of
from fusehsm.tier.stub_mark import Mark

PINNED = "user.fusehsm.pinned"

_TRIES = 3  # at a record whose time is right

_log = logging.getLogger(__name__)


class StubFile:
    """Public attributes are for reading. `path`: where it was seen last, below the destination. `size`, `limit`: bytes, the file's and the smallest
    that it ever had: beyond `limit` nothing is the store's. `modified`: by the user, or perhaps by them. `unexplained`: changed while nobody
    served it, so that its holes must not be read. `may_hide_changes`: it has been filled, which sets its times back, so that they need not tell
    of a change by a mapping. `used_ns`: when it was last asked for."""

    __slots__ = (
        "_ctime_ns",
        "_is_open",
        "_lock",
        "_mtime_ns",
        "_place",
        "block_size",
        "blocks",
        "changes",
        "limit",
        "mark",
        "may_hide_changes",
        "modified",
        "path",
        "pinned",
        "recorded",
        "size",
        "synced",
        "unexplained",
        "used_ns",
    )

    def __init__(self, mark: Mark, status: os.stat_result, path: str, place: bytes, block_size: int) -> None:
        self.mark = mark
        self.path = path
        self.block_size = block_size
        self.size = self.limit = status.st_size
        self.blocks = Blocks(-(-self.limit // block_size))
        self.modified = False
        self.unexplained = False
        self.pinned = False
        self.may_hide_changes = False
        self.recorded = False
        self.synced = False
        self.changes = 0
        self.used_ns = status.st_atime_ns
        self._is_open = False
        self._mtime_ns = status.st_mtime_ns
        self._ctime_ns = status.st_ctime_ns
        self._place = place
        self._lock = threading.Lock()

    @classmethod
    def recover(cls, fd: int, path: str, place: bytes, block_size: int) -> Self | None:
        """What is known of the file from before; None if it is no stub and none that was filled, but somebody's own.

        `place`: of the mount (place.py); `block_size`: for files that have no record yet. Raises OSError EIO for a stub that is not finished.
        """
        mark = stub_mark.read(fd)
        status = os.fstat(fd)
        if mark is None or (mark.inode, mark.generation) != (status.st_ino, stub_mark.generation(fd)):
            return None
        record = residency.read(fd, mark)
        file = cls(
            mark,
            status,
            path,
            place,
            block_size_for(status.st_size, block_size) if record is None else record.block_size,
        )
        file.pinned = is_pinned(fd)
        if record is not None:
            file._continue(fd, record, status)
        elif mark.is_pending:
            raise OSError(errno.EIO, "populate was interrupted while it made this stub; run it again", path)
        elif not mark.describes(fd, status):
            file.unexplained = file.modified = True
        elif not stub_mark.is_all_hole(fd):
            file.modified = True  # whatever it is, nobody has recorded it; it stays
        return file

    def _continue(self, fd: int, record: Record, status: os.stat_result) -> None:
        as_recorded = (status.st_size, status.st_mtime_ns) == (record.size, record.mtime_ns)
        self.recorded = self.may_hide_changes = True
        self.synced = bool(record.flags & Flags.SYNCED)
        self.modified = (
            bool(record.flags & Flags.MODIFIED) or not as_recorded or not record.settled(status.st_ctime_ns)
        )
        self.unexplained = bool(record.flags & Flags.UNEXPLAINED) or not (
            as_recorded or record.flags & Flags.OPEN
        )
        self.limit = record.limit
        self.blocks = record.blocks()
        self._shrink(status.st_size)
        if not self.synced and record.place != self._place:
            lost = [block for block in range(self.blocks.number) if self._has_hole(fd, block)]
            for block in lost:
                if block in self.blocks:
                    self.blocks.discard(block)
                    self.unexplained = self.unexplained or self.modified

    # Questions

    def missing(self, offset: int, end: int) -> list[int]:
        """The blocks of [offset, end) that are not here, ascending."""
        end = min(end, self.limit)
        if offset >= end or self.blocks.is_full:
            return []
        return self.blocks.missing(offset // self.block_size, -(-end // self.block_size))

    @property
    def is_complete(self) -> bool:
        """Whether nothing is to be fetched any more."""
        return self.blocks.is_full and not self.unexplained

    @property
    def resident(self) -> int:
        """Bytes that are here, by blocks."""
        return min(self.blocks.here * self.block_size, self.limit) + self.size - self.limit

    def lacks(self, fd: int, offset: int, end: int) -> bool:
        """Whether there is a hole in [offset, end) in a block that is not here."""
        return any(
            next(holes(fd, max(offset, start), min(end, start + self.block_size, self.limit)), None)
            for block in self.missing(offset, end)
            for start in [block * self.block_size]
        )

    def _has_hole(self, fd: int, block: int) -> bool:
        start = block * self.block_size
        return next(holes(fd, start, min(start + self.block_size, self.limit)), None) is not None

    # Changes

    def look(self, fd: int, status: os.stat_result) -> None:
        """Take note of a size that the file has come to have. To be called before the access that tells of it goes on: whatever makes a file grow
        makes an event first, so no growth can hide a truncation."""
        with self._lock:
            self._note(status)
            self._record(fd)

    def user_modified(self, fd: int) -> None:
        """Take note that the user has written to it."""
        with self._lock:
            self.modified = True
            self._note(os.fstat(fd))
            self._record(fd)

    def fill(
        self,
        fd: int,
        first: int,
        end: int,
        pieces: Iterable[tuple[int, bytes]],
        wanted: Callable[[], bool],
    ) -> int:
        """Put content into the holes of the blocks [first, end): pieces as (offset, data); what they leave out is a hole in the store, too. Returns
        how many bytes were written.

        Does nothing if `wanted` says no by now, nor to blocks that have come meanwhile. Raises OSError ENOSPC, EDQUOT or EIO of the disk: the
        blocks then count as not here.
        """
        with self._lock:
            if not wanted():
                return 0
            before = os.fstat(fd)
            self._note(before)
            if not self._is_open:
                self._record(fd)
            written = 0
            self.may_hide_changes = True
            try:
                for offset, data in pieces:
                    written += self._fill_holes(fd, offset, data, first, end)
            finally:
                os.utime(fd, ns=(time.time_ns(), self._mtime_ns))  # a fill is no modification
            if os.fstat(fd).st_size > before.st_size:
                self.unexplained = self.modified = True
                self._write_record(fd)
                raise OSError(errno.EIO, "was truncated in the moment of its being filled", self.path)
            if self.modified:
                os.fdatasync(
                    fd
                )  # a hole would not be fetched again after a power cut: it might be the user's
            self.synced = self.modified
            for block in range(first, min(end, self.blocks.number)):
                self.blocks.add(block)
            self._record(fd)
            return written

    def _fill_holes(self, fd: int, offset: int, data: bytes, first: int, end: int) -> int:
        whole = memoryview(data)
        written = 0
        for start, stop in holes(fd, offset, min(offset + len(data), self.limit)):
            for block in self.blocks.missing(
                max(first, start // self.block_size), min(end, -(-stop // self.block_size))
            ):
                at = max(start, block * self.block_size)
                part = whole[at - offset : min(stop, (block + 1) * self.block_size) - offset]
                written += _write_all(fd, part, at, self.path)
        return written

    def seal(self, fd: int, changes: int) -> None:
        """Record that all blocks are on the disk, which the caller has seen to since `changes` were all; nothing if there are others."""
        with self._lock:
            if self.changes == changes and not self.synced:
                self.synced = True
                self._record(fd)

    def rest(self, fd: int) -> None:
        """Record that it is not served any more."""
        with self._lock:
            if self._is_open:
                self._note(os.fstat(fd))
                self._is_open = False
                self._write_record(fd)

    def empty(self, fd: int, sync: Callable[[], None]) -> int:
        """Take the content away; `fd` belongs to someone who knows that nobody else has the file open (a lease). Returns how many bytes became free.

        `sync` brings the record to the disk, before anything is taken away that it would tell of. Raises OSError EBUSY with the reason if it is not
        to be: modified, unexplained, pinned, of a version that is not the store's.
        """
        with self._lock:
            status = os.fstat(fd)
            self._note(status)
            self.expect_evictable()
            kept = status.st_blocks
            self.blocks = Blocks(self.blocks.number)
            self.synced = False
            self._record(fd)
            sync()
            if status.st_size:
                # To the end of its last page, which would be zeroed in part otherwise, and may be on its way in a pipe or a socket (splice(2)).
                syscalls.fallocate(fd, _PUNCH, 0, -(-status.st_size // _LARGEST_PAGE) * _LARGEST_PAGE)
            os.utime(fd, ns=(status.st_atime_ns, self._mtime_ns))
            residency.remove(fd)
            after = os.fstat(fd)
            self.recorded = self._is_open = self.may_hide_changes = False
            self._ctime_ns = after.st_ctime_ns
            return (kept - after.st_blocks) * 512

    def pin(self, fd: int, pinned: bool) -> bool:
        """Let it stay here whatever happens, or not any more; whether that is news."""
        with self._lock:
            if self.pinned == pinned:
                return False
            self._note(os.fstat(fd))
            if pinned:
                os.setxattr(fd, PINNED, b"")
            else:
                os.removexattr(fd, PINNED)
            self.pinned = pinned
            self._ctime_ns = os.fstat(fd).st_ctime_ns
            if self.recorded:
                self._write_record(fd)
            return True

    def expect_evictable(self) -> None:
        """Raise OSError EBUSY with the reason if its content is not to be taken away."""
        if self.pinned:
            raise OSError(errno.EBUSY, "is pinned; unpin it first", self.path)
        if self.unexplained or self.modified or self.limit < self.size:
            raise OSError(errno.EBUSY, "is modified: its content is nowhere else", self.path)

    def _note(self, status: os.stat_result) -> None:
        """Compare with what was there after the last change of ours; `status` is the file's now."""
        if (status.st_size, status.st_mtime_ns, status.st_ctime_ns) != (
            self.size,
            self._mtime_ns,
            self._ctime_ns,
        ):
            self.modified = True
            self._mtime_ns = status.st_mtime_ns
            self.size = status.st_size
            self._shrink(status.st_size)

    def _shrink(self, size: int) -> None:
        if size < self.limit:
            self.limit = size
            self.blocks = Blocks(-(-size // self.block_size), self.blocks.to_bytes())

    def _record(self, fd: int) -> None:
        if self.unexplained:
            return  # what is on the disk must go on being unexplained
        self._is_open = True
        self.changes += 1
        self._write_record(fd)

    def _write_record(self, fd: int) -> None:
        flags = Flags.NONE
        for condition, flag in (
            (self._is_open, Flags.OPEN),
            (self.modified, Flags.MODIFIED),
            (self.synced, Flags.SYNCED),
            (self.unexplained, Flags.UNEXPLAINED),
            (self.blocks.is_full, Flags.COMPLETE),
        ):
            if condition:
                flags |= flag
        bits = b"" if self.blocks.is_full else self.blocks.to_bytes()
        for _ in range(_TRIES):
            record = Record(
                digest_of(self.mark),
                self._place,
                flags,
                self.block_size,
                self.size,
                self.limit,
                self._mtime_ns,
                time.time_ns() - _TICK,
                bits,
            )
            record.write(fd)
            status = os.fstat(fd)
            if record.settled(status.st_ctime_ns):
                break
        self.recorded = True
        self._ctime_ns = status.st_ctime_ns


_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE (fallocate(2))
_LARGEST_PAGE = 1 << 16  # bytes, of what Linux runs on
_TICK = 10_000_000  # nanoseconds that the clock of file systems may lag behind


def is_pinned(fd: int) -> bool:
    """Whether the user wants it to stay here."""
    try:
        os.getxattr(fd, PINNED)
    except OSError:
        return False
    return True


def _write_all(fd: int, data: memoryview, offset: int, path: str) -> int:
    written = 0
    while written < len(data):
        count = os.pwrite(fd, data[written:], offset + written)
        if not count:
            raise OSError(errno.ENOSPC, "no room to fill it", path)
        written += count
    return written
