"""One stub while it is served: which of its blocks are here, and how content comes and goes, so that its record is true at every moment.

Its methods block (they write to the file and wait for each other), so all but the questions belong into threads. The descriptors that they want are
of events, or others whose use makes no events.

What a mapping writes on the real kernel is told by the file's times alone, and a fill sets these back. So whoever had a file that was filled open
for writing counts as having written to it.

Not to be seen by any listener: the moment in which a truncation happens (open(2) with O_TRUNC asks nobody). When it is the moment of a fill, what is
written must not make the file long again (tier/stubs/writer.py); where it may have done so, the file is in doubt from then on.

A kernel whose listener is killed lets everything go on that waits for it, so a block without a bit may hold what a user has written into a hole, with
zeros around it. So what a fill finds there is compared with the store's content (tier/stubs/residue.py).
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Self

from fusehsm.linux import syscalls
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs import record as residency
from fusehsm.tier.stubs.extents import extents_of, holes
from fusehsm.tier.stubs.mark import StubMark
from fusehsm.tier.stubs.record import Blocks, Flags, Record, block_size_for, digest_of
from fusehsm.tier.stubs.residue import Residue, doubtful, forget_clean_pages, residue, unfilled
from fusehsm.tier.stubs.writer import may_have_grown_to, write_without_growing

PINNED = "user.fusehsm.pinned"
_CAPABILITIES = "security.capability"

_TRIES = 3  # at a record whose time is right


class InDoubt(OSError):
    """What a file lacks cannot be told from what its user wanted, so nothing is put there. EIO."""


class StubFile:
    """Public attributes are for reading. `path`: where it was seen last, below the destination. `size`, `limit`: bytes, the file's and the smallest
    that it ever had: beyond `limit` nothing is the store's. `modified`: by the user, or perhaps by them. `unexplained`: changed while nobody
    served it, so that its holes must not be read. `may_hide_changes`: it has been filled, which sets its times back, so that they need not tell
    of a change by a mapping. `unrecorded`: there is something that the record lacks, and no access may go on before it is there (look()).
    `used_ns`: when it was last asked for."""

    __slots__ = (
        "_ctime_ns",
        "_is_open",
        "_lock",
        "_mtime_ns",
        "_place",
        "_raced",
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
        "unrecorded",
        "used_ns",
    )

    def __init__(
        self, mark: StubMark, status: os.stat_result, path: str, place: bytes, block_size: int
    ) -> None:
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
        self.unrecorded = False
        self.changes = 0
        self.used_ns = status.st_atime_ns
        self._is_open = False
        self._raced = False  # filled since it was last known that nobody wrote
        self._mtime_ns = status.st_mtime_ns
        self._ctime_ns = status.st_ctime_ns
        self._place = place
        self._lock = threading.Lock()

    @classmethod
    def recover(cls, fd: int, path: str, place: bytes, block_size: int) -> Self | None:
        """What is known of the file from before; None if it is no stub and none that was filled, but somebody's own.

        `place`: of the mount (tier/stubs/identity.py); `block_size`: for files that have no record yet. Raises OSError EIO for a stub that is
        not finished.
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
        self.unrecorded = not as_recorded
        self.synced = bool(record.flags & Flags.SYNCED)
        was_modified = (
            bool(record.flags & Flags.MODIFIED) or not as_recorded or not record.settled(status.st_ctime_ns)
        )
        self._raced = bool(record.flags & Flags.RACED)
        self.modified = was_modified or self._raced
        self.unexplained = bool(record.flags & Flags.UNEXPLAINED) or not (
            as_recorded or record.flags & Flags.OPEN
        )
        self.limit = record.limit
        self.blocks = record.blocks()
        self._shrink(status.st_size)
        if not self.synced and record.place != self._place:
            forget_clean_pages(fd)
            lost = [block for block in range(self.blocks.number) if self._has_hole(fd, block)]
            for block in lost:
                if block in self.blocks:
                    self.blocks.discard(block)
                    self.unexplained = self.unexplained or was_modified

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
        """Whether there is something in [offset, end) that nobody knows, as the file was changed while nobody served it."""
        blocks = self.missing(0, self.limit) if self.missing(offset, end) else []
        return any(
            start < end and offset < stop
            for first, last in extents_of(blocks)
            for start, stop in doubtful(fd, first * self.block_size, min(last * self.block_size, self.limit))
        )

    def _has_hole(self, fd: int, block: int) -> bool:
        start = block * self.block_size
        return next(holes(fd, start, min(start + self.block_size, self.limit)), None) is not None

    # Changes

    def look(self, fd: int) -> None:
        """Take note of a size that the file has come to have. To be called before the access that tells of it goes on: whatever makes a file grow
        makes an event first, so no growth can hide a truncation. Raises OSError ENOSPC or EDQUOT if that cannot be recorded."""
        with self._lock:
            self._note(os.fstat(fd))
            if self.unrecorded:
                self._record(fd)

    def user_modified(self, fd: int, written: bool = True) -> None:
        """Take note that the user has written to it, for the first time, or (not `written`) may have done so."""
        with self._lock:
            status = os.fstat(fd)
            if written and (status.st_mtime_ns, status.st_ctime_ns) == (self._mtime_ns, self._ctime_ns):
                # A fill that was at work in the same moment has put the old time back.
                os.utime(fd, ns=(status.st_atime_ns, time.time_ns()))
                status = os.fstat(fd)
            self._note(status)
            self.modified = True
            self._record_modification(fd)

    def _record_modification(self, fd: int) -> None:
        # All that is here goes to the disk: a hole would not be fetched again after a power cut, it might be the user's.
        os.fdatasync(fd)
        self.synced = True
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

        Does nothing if `wanted` says no by now, nor to blocks that have come meanwhile. Raises OSError ENOSPC, EDQUOT or EIO of the disk, InDoubt
        for what may be the user's: the blocks then count as not here.
        """
        with self._lock:
            if not wanted():
                return 0
            before = os.fstat(fd)
            self._note(before)
            self._expect_explained()
            pieces = list(pieces)
            if self._find_residue(fd, first, end, pieces):
                self.modified = True
            if self.unrecorded or not self._is_open or not self._raced:
                self._raced = True
                self._record(fd)
            written = 0
            self.may_hide_changes = True
            parts: list[tuple[int, int]] = []
            restore = _privileges(fd, before)
            try:
                for offset, data in pieces:
                    written += self._fill_holes(fd, offset, data, first, end, before.st_size, parts)
            except OSError:
                # Where a write fails for want of room the kernel leaves zeros, as data.
                _make_holes(fd, parts)
                raise
            finally:
                restore()
                os.utime(fd, ns=(time.time_ns(), self._mtime_ns))  # a fill is no modification
                after = os.fstat(fd)
                self._ctime_ns = after.st_ctime_ns
            if after.st_size != before.st_size:
                self._expect_not_grown(fd, before.st_size, after.st_size, parts)
                self._note(after)
            if self.modified:
                os.fdatasync(fd)  # as _record_modification does
            self.synced = self.modified
            blocks = self.blocks.copy()
            for block in range(first, min(end, blocks.number)):
                blocks.add(block)
            # In this order: who sees the bit may write or make a hole, and it would be filled after a kill if the record came later.
            self._record(fd, blocks)
            self.blocks = blocks
            return written

    def _expect_explained(self) -> None:
        if self.unexplained:
            raise InDoubt(errno.EIO, "was changed while nobody served it", self.path)

    def _find_residue(self, fd: int, first: int, end: int, pieces: list[tuple[int, bytes]]) -> bool:
        """Whether there is something of the user's in blocks that are not here. Raises InDoubt if it cannot be told."""
        users = False
        for block in self.blocks.missing(first, end):
            start = block * self.block_size
            match residue(fd, start, min(start + self.block_size, self.limit), pieces):
                case Residue.USERS:
                    users = True
                case Residue.UNKNOWN:
                    raise InDoubt(errno.EIO, _WRITTEN_UNSERVED, self.path)
        return users

    def _expect_not_grown(self, fd: int, before: int, after: int, parts: list[tuple[int, int]]) -> None:
        """Raise InDoubt if a fill that wrote these parts of a file may have undone a truncation, and take away what it wrote. Sizes in bytes."""
        if not any(may_have_grown_to(after, before, stop) for _, stop in parts):
            return
        _make_holes(fd, parts)
        self.unexplained = self.modified = True
        self._write_record(fd)
        raise InDoubt(errno.EIO, "was truncated in the moment of its being filled", self.path)

    def _fill_holes(
        self,
        fd: int,
        offset: int,
        data: bytes,
        first: int,
        end: int,
        size: int,
        parts: list[tuple[int, int]],
    ) -> int:
        whole = memoryview(data)
        written = 0
        for start, stop in unfilled(fd, offset, min(offset + len(data), self.limit)):
            for block in self.blocks.missing(
                max(first, start // self.block_size), min(end, -(-stop // self.block_size))
            ):
                at = max(start, block * self.block_size)
                part = whole[at - offset : min(stop, (block + 1) * self.block_size) - offset]
                parts.append((at, at + len(part)))
                written += write_without_growing(fd, part, at, size, self.path)
        return written

    def seal(self, fd: int, changes: int) -> None:
        """Record that all blocks are on the disk, which the caller has seen to since `changes` were all; nothing if there are others."""
        with self._lock:
            if self.changes == changes and not self.synced:
                self.synced = True
                self._raced = self._raced and _may_be_written(fd)
                self._record(fd)

    def rest(self, fd: int) -> None:
        """Record that it is not served any more."""
        with self._lock:
            if self._is_open:
                self._note(os.fstat(fd))
                self._is_open = False
                self._write_record(fd)

    def punch(self, fd: int, sync: Callable[[], None]) -> int:
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
            self.synced = self._raced = False
            self._record(fd)
            sync()
            if status.st_size:
                # To the end of its last page, which would be zeroed in part otherwise, and may be on its way in a pipe or a socket (splice(2));
                # zeros that stay count as content.
                syscalls.fallocate(fd, _PUNCH, 0, -(-status.st_size // _LARGEST_PAGE) * _LARGEST_PAGE)
                if not stub_mark.is_all_hole(fd):
                    self.unexplained = self.modified = True
                    self._write_record(fd)
                    raise OSError(errno.EIO, "the file system has not let all of its content go", self.path)
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
            self.unrecorded = self.modified = True
            self._mtime_ns = status.st_mtime_ns
            self._ctime_ns = status.st_ctime_ns
            self.size = status.st_size
            self._shrink(status.st_size)

    def _shrink(self, size: int) -> None:
        if size < self.limit:
            self.limit = size
            self.blocks = Blocks(-(-size // self.block_size), self.blocks.to_bytes())

    def _record(self, fd: int, blocks: Blocks | None = None) -> None:
        if self.unexplained:
            self.unrecorded = False  # what is on the disk must go on being unexplained
            return
        self._is_open = True
        self.changes += 1
        self._write_record(fd, blocks)

    def _write_record(self, fd: int, blocks: Blocks | None = None) -> None:
        blocks = self.blocks if blocks is None else blocks
        self.unrecorded = True
        flags = Flags.NONE
        for condition, flag in (
            (self._is_open, Flags.OPEN),
            (self.modified, Flags.MODIFIED),
            (self.synced, Flags.SYNCED),
            (self.unexplained, Flags.UNEXPLAINED),
            (blocks.is_full, Flags.COMPLETE),
            (self._raced, Flags.RACED),
        ):
            if condition:
                flags |= flag
        bits = b"" if blocks.is_full else blocks.to_bytes()
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
        self.unrecorded = False
        self._ctime_ns = status.st_ctime_ns


_WRITTEN_UNSERVED = "was written to while nobody served it, where it lacked content; end fetch, save what you need of it, remove it, populate again"
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


def _make_holes(fd: int, parts: list[tuple[int, int]]) -> None:
    for start, stop in parts:
        syscalls.fallocate(fd, _PUNCH, start, stop - start)


def _may_be_written(fd: int) -> bool:
    """Whether somebody may have the file open for writing."""
    try:
        return syscalls.is_open_for_writing(fd)
    except OSError:
        return True


def _privileges(fd: int, status: os.stat_result) -> Callable[[], None]:
    """What gives a program its set-user-id, set-group-id and capabilities back, which write(2) takes away."""
    capabilities = None
    with suppress(OSError):  # there are none, or they are not ours to see
        capabilities = os.getxattr(fd, _CAPABILITIES)

    def restore() -> None:
        with suppress(OSError):
            if status.st_mode & (stat.S_ISUID | stat.S_ISGID) and os.fstat(fd).st_mode != status.st_mode:
                os.fchmod(fd, stat.S_IMODE(status.st_mode))
            if capabilities is not None:
                os.setxattr(fd, _CAPABILITIES, capabilities)

    return restore
