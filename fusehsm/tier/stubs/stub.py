"""One stub while it is served: it knows which blocks are here, puts content in and takes it away. Its record is true at every moment.

The methods block: they write to the file and wait for each other. So all methods except those under "Questions" belong into threads. They need the
descriptor of an event, or another one whose use makes no events.

On the real kernel only the file's times tell of a write through a mapping, and a fill sets the times back. So if a process has a filled file open for
writing, the file counts as modified.

No listener can see the moment of a truncation: open(2) with O_TRUNC makes no pre-content event. A fill in the same moment must not make the file long
again (tier/stubs/content.py). If it may have done so, the file is in doubt from then on.

When a listener is killed, the kernel lets every waiting access go on. So a block without a bit may hold a user's write into a hole, with zeros around
it. A fill compares the data that it finds there with the store's content (tier/stubs/content.py).
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
from fusehsm.linux.syscalls import PAGE_SIZE
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs import record as residency
from fusehsm.tier.stubs.content import (
    Residue,
    doubtful,
    extents_of,
    forget_clean_pages,
    holes,
    may_have_grown_to,
    residue,
    unfilled,
    write_without_growing,
)
from fusehsm.tier.stubs.mark import StubMark
from fusehsm.tier.stubs.record import Blocks, Flags, Record, block_size_for, digest_of
from fusehsm.tier.stubs.tree import Namespace, Tree

_CAPABILITIES = "security.capability"

TRIES = 3  # to write a record whose time is right


class InDoubt(OSError):
    """A missing part of a file cannot be told apart from a hole that the user made, so nothing is put there. The errno is EIO."""


class Unbelieved(OSError):
    """A file has a mark that any user may have written, so it may be a stub, or not. The errno is EIO; strerror is "cause; fix"."""


def may_be_written(fd: int) -> bool:
    """Whether a process may have the file open for writing."""
    try:
        return syscalls.is_open_for_writing(fd)
    except OSError:
        return True


def mark_of(fd: int, status: os.stat_result, path: str, tree: Tree) -> tuple[StubMark, Namespace] | None:
    """The mark that was made for this inode, and its namespace; None if there is none. Waits for no lock that a user can hold. Raises Unbelieved."""
    key = status.st_ino, stub_mark.generation(fd)

    def mark_in(namespace: Namespace) -> StubMark | None:
        mark = stub_mark.read(fd, namespace)
        return None if mark is None or (mark.inode, mark.generation) != key else mark

    for namespace in tree.believed:
        if (mark := mark_in(namespace)) is not None:
            return mark, namespace
    if Namespace.USER not in tree.believed and mark_in(Namespace.USER) is not None:
        raise Unbelieved(errno.EIO, _UNBELIEVED, path)
    return None


class StubFile:
    """A served stub, of one inode. Callers read the public attributes. They set only `used_ns`, and `modified` when they see a write."""

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
        "namespace",
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
        self,
        mark: StubMark,
        namespace: Namespace,
        status: os.stat_result,
        path: str,
        place: bytes,
        block_size: int,
    ) -> None:
        """`status`: the file's fstat(2); `path`: below the destination; `place`: of the mount (tier/stubs/tree.py); `block_size`: bytes."""
        self.mark = mark
        # The namespace of the mark, and of all other attributes.
        self.namespace = namespace
        # The last path at which the file was seen, below the destination.
        self.path = path
        # Bytes.
        self.block_size = block_size
        # Bytes: the file's size, and the smallest size that it ever had. Beyond `limit` no content is the store's.
        self.size = self.limit = status.st_size
        # The blocks that are here.
        self.blocks = Blocks(-(-self.limit // block_size))
        # The user has changed the file, or may have.
        self.modified = False
        # The file was changed while no fetch served it. Its holes must not be read.
        self.unexplained = False
        # The user wants the content to stay.
        self.pinned = False
        # A fill has set the file's times back, so they may not tell of a write through a mapping.
        self.may_hide_changes = False
        # The file has a record.
        self.recorded = False
        # All blocks with a bit are on the disk.
        self.synced = False
        # The record lacks a change. No access may go on before the record has it (look()).
        self.unrecorded = False
        # Number of changes to the record, for seal().
        self.changes = 0
        # Time of the last access, nanoseconds since 1970.
        self.used_ns = status.st_atime_ns
        # The record says that the file is being served.
        self._is_open = False
        # Filled since fetch last knew that no process had the file open for writing.
        self._raced = False
        # The file's times after the last change of ours, nanoseconds since 1970.
        self._mtime_ns = status.st_mtime_ns
        self._ctime_ns = status.st_ctime_ns
        self._place = place
        self._lock = threading.Lock()

    @classmethod
    def recover(cls, fd: int, path: str, tree: Tree, block_size: int) -> Self | None:
        """The stub with its state from mark and record; None if the file is neither a stub nor a filled one, but a user's own.

        `block_size`: bytes, for files without a record. Raises OSError EIO if populate has not finished the stub, Unbelieved if root does not
        believe its mark.
        """
        status = os.fstat(fd)
        found = mark_of(fd, status, path, tree)
        if found is None:
            return None
        mark, namespace = found
        record = residency.read(fd, mark, namespace)
        file = cls(
            mark,
            namespace,
            status,
            path,
            tree.place,
            block_size_for(status.st_size, block_size) if record is None else record.block_size,
        )
        file.pinned = is_pinned(fd, namespace)
        if record is not None:
            file._continue(fd, record, status)
        elif mark.is_pending:
            raise OSError(errno.EIO, "populate was interrupted while it made this stub; run it again", path)
        elif not mark.describes(fd, status):
            file.unexplained = file.modified = True
        elif not stub_mark.is_all_hole(fd):
            file.modified = True  # no record explains the data, so it stays
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

    def missing(self, offset: int, end: int, most: int | None = None) -> list[int]:
        """The numbers of the blocks, ascending, that contain a byte of [offset, end) and are not here; the first `most` of them, if given.

        `offset` and `end` are in bytes. Bytes from `limit` on are not the store's, so they are never missing.
        """
        end = min(end, self.limit)
        if offset >= end or self.blocks.is_full:
            return []
        return self.blocks.missing(offset // self.block_size, -(-end // self.block_size), most)

    @property
    def is_complete(self) -> bool:
        """Whether every block is here and nothing is left to fetch."""
        return self.blocks.is_full and not self.unexplained

    @property
    def resident(self) -> int:
        """Bytes that are here, counted by blocks."""
        return min(self.blocks.here * self.block_size, self.limit) + self.size - self.limit

    def lacks(self, fd: int, offset: int, end: int) -> bool:
        """Whether the right content of a part of [offset, end), in bytes, is unknown because the file was changed while no fetch served it."""
        return self.doubt(fd, offset, end) is not None

    def doubt(self, fd: int, offset: int, end: int) -> tuple[int, int] | None:
        """The first part of the file, as (start, end) in bytes, for which lacks() is true; None if there is none.

        It looks at no more than the range and the pages next to it: a file may have a million holes.
        """
        # Whether a page may be written only in part depends on the pages next to it.
        near = max(offset // PAGE_SIZE - 1, 0) * PAGE_SIZE, (-(-end // PAGE_SIZE) + 1) * PAGE_SIZE
        for first, last in extents_of(self.missing(*near)):
            start = max(first * self.block_size, near[0])
            stop = min(last * self.block_size, self.limit, near[1])
            for part in doubtful(fd, start, stop):
                if part[0] < end and offset < part[1]:
                    return part
        return None

    def _has_hole(self, fd: int, block: int) -> bool:
        start = block * self.block_size
        return next(holes(fd, start, min(start + self.block_size, self.limit)), None) is not None

    # Changes

    def look(self, fd: int) -> None:
        """Record the file's new size. The caller calls it before it answers the event. Each growth makes an event first, so no growth can hide a
        truncation. Raises OSError ENOSPC or EDQUOT if the record cannot be written."""
        with self._lock:
            self._note(os.fstat(fd))
            if self.unrecorded:
                self._record(fd)

    def user_modified(self, fd: int, written: bool = True) -> None:
        """Record that the user has written to the file (or, without `written`, may have done so) for the first time. Raises as look()."""
        with self._lock:
            status = os.fstat(fd)
            if written and (status.st_mtime_ns, status.st_ctime_ns) == (self._mtime_ns, self._ctime_ns):
                # A fill at the same time has set the old time again.
                os.utime(fd, ns=(status.st_atime_ns, time.time_ns()))
                status = os.fstat(fd)
            self._note(status)
            self.modified = True
            self._record_modification(fd)

    def _record_modification(self, fd: int) -> None:
        # After a power cut a hole in a modified file is not fetched again, as it may be the user's. So all that is here must be on the disk.
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
        part: tuple[int, int] | None = None,
    ) -> int:
        """Put content into the holes of the blocks [first, end). Returns the number of bytes written.

        `pieces`: (offset, data); a range that they leave out is a hole in the store, too. `wanted`: if it returns False, nothing is done. Blocks
        that are here by now are left alone. `part`: the (start, end) in bytes that `pieces` are of, if it is not all. The blocks count as here only
        after the part with their end, so the caller puts in all other parts first. Raises OSError ENOSPC, EDQUOT or EIO of the disk, InDoubt if
        the blocks may hold the user's data. The blocks then count as not here.
        """
        with self._lock:
            if not wanted():
                return 0
            before = os.fstat(fd)
            self._note(before)
            self._expect_explained()
            pieces = list(pieces)
            start, stop = part or (first * self.block_size, end * self.block_size)
            if self._find_residue(fd, first, end, pieces, start, stop):
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
                # A write that fails with ENOSPC leaves zeros that count as data.
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
            if stop >= min(end * self.block_size, self.limit):
                for block in range(first, min(end, blocks.number)):
                    blocks.add(block)
            # First the record, then the bit. An access that sees the bit may make a hole. Without the record, it would be filled after a kill.
            self._record(fd, blocks)
            self.blocks = blocks
            return written

    def _expect_explained(self) -> None:
        if self.unexplained:
            raise InDoubt(errno.EIO, "was changed while no fetch served it", self.path)

    def _find_residue(
        self, fd: int, first: int, end: int, pieces: list[tuple[int, bytes]], start: int, stop: int
    ) -> bool:
        """Whether [start, stop), in bytes, of blocks that are not here holds data of the user. Raises InDoubt if that is unknown."""
        users = False
        for block in self.blocks.missing(first, end):
            begin = max(block * self.block_size, start)
            match residue(fd, begin, min((block + 1) * self.block_size, self.limit, stop), pieces):
                case Residue.USERS:
                    users = True
                case Residue.UNKNOWN:
                    raise InDoubt(errno.EIO, _WRITTEN_UNSERVED, self.path)
        return users

    def _expect_not_grown(self, fd: int, before: int, after: int, parts: list[tuple[int, int]]) -> None:
        """If a fill that wrote these parts may have undone a truncation, punch the parts and raise InDoubt. Sizes in bytes."""
        if not any(may_have_grown_to(after, before, stop) for _, stop in parts):
            return
        _make_holes(fd, parts)
        self.unexplained = self.modified = True
        self._write_record(fd)
        raise InDoubt(errno.EIO, "was truncated while it was filled", self.path)

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

    def seal(self, fd: int, changes: int, may_be_written: Callable[[int], bool] = may_be_written) -> None:
        """Record that all blocks are on the disk: the caller has synced them after reading `changes`. Does nothing if there are newer changes.

        `may_be_written`: as the function of that name, which leases the file for a moment. Meanwhile no group can open the file for an event.
        """
        with self._lock:
            if self.changes == changes and not self.synced:
                self.synced = True
                self._raced = self._raced and may_be_written(fd)
                self._record(fd)

    def rest(self, fd: int) -> None:
        """Record that the file is not served any more. Raises OSError ENOSPC or EDQUOT."""
        with self._lock:
            if self._is_open:
                self._note(os.fstat(fd))
                self._is_open = False
                self._write_record(fd)

    def punch(self, fd: int, sync: Callable[[], None]) -> int:
        """Punch all content of the file. Returns the number of bytes that became free on the disk.

        The caller must hold a lease with `fd`, so that no other process has the file open. `sync` brings the new record to the disk before the
        punch. Raises OSError EBUSY with the reason if the content must stay: the file is modified, unexplained, pinned, or was truncated. Raises
        OSError EIO if the file system keeps some content.
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
                # To the end of the last page. A punch of a part of a page writes zeros into the page, which may be in a pipe or a socket
                # (splice(2)), and zeros that stay count as content.
                syscalls.fallocate(fd, _PUNCH, 0, -(-status.st_size // _LARGEST_PAGE) * _LARGEST_PAGE)
                if not stub_mark.is_all_hole(fd):
                    self.unexplained = self.modified = True
                    self._write_record(fd)
                    raise OSError(errno.EIO, "the file system has not let all of its content go", self.path)
            os.utime(fd, ns=(status.st_atime_ns, self._mtime_ns))
            residency.remove(fd, self.namespace)
            after = os.fstat(fd)
            self.recorded = self._is_open = self.may_hide_changes = False
            self._ctime_ns = after.st_ctime_ns
            return (kept - after.st_blocks) * 512

    def pin(self, fd: int, pinned: bool) -> bool:
        """Set or clear the pin, which keeps the content here. Returns whether the state has changed. Raises OSError of setxattr(2)."""
        with self._lock:
            if self.pinned == pinned:
                return False
            self._note(os.fstat(fd))
            if pinned:
                os.setxattr(fd, self.namespace.pinned, b"")
            else:
                os.removexattr(fd, self.namespace.pinned)
            self.pinned = pinned
            self._ctime_ns = os.fstat(fd).st_ctime_ns
            if self.recorded:
                self._write_record(fd)
            return True

    def expect_evictable(self) -> None:
        """Raise OSError EBUSY with the reason if the content must stay."""
        if self.pinned:
            raise OSError(errno.EBUSY, "is pinned; unpin it first", self.path)
        if self.unexplained or self.modified or self.limit < self.size:
            raise OSError(errno.EBUSY, "is modified: the store does not have its content", self.path)

    def _note(self, status: os.stat_result) -> None:
        """Compare the file with its state after the last change of ours; a difference is the user's. `status`: its fstat(2) now."""
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
            self.unrecorded = False  # the record on the disk must keep UNEXPLAINED
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
        for _ in range(TRIES):
            record = Record(
                digest_of(self.mark),
                self._place,
                flags,
                self.block_size,
                self.size,
                self.limit,
                self._mtime_ns,
                time.time_ns() - TICK,
                bits,
            )
            record.write(fd, self.namespace)
            status = os.fstat(fd)
            if record.settled(status.st_ctime_ns):
                break
        self.recorded = True
        self.unrecorded = False
        self._ctime_ns = status.st_ctime_ns


_WRITTEN_UNSERVED = "was written to, where it lacks content, while no fetch served it; end fetch, save what you need of it, remove it, populate again"
_UNBELIEVED = "its mark was written by an ordinary user or an older fusehsm; run `fusehsm populate` as root, which takes right marks over"
_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE (fallocate(2))
_LARGEST_PAGE = 1 << 16  # bytes, of all machines that Linux runs on
TICK = 10_000_000  # nanoseconds; the clock of file systems may be that much behind


def is_pinned(fd: int, namespace: Namespace) -> bool:
    """Whether the file is pinned."""
    try:
        os.getxattr(fd, namespace.pinned)
    except OSError:
        return False
    return True


def _make_holes(fd: int, parts: list[tuple[int, int]]) -> None:
    for start, stop in parts:
        syscalls.fallocate(fd, _PUNCH, start, stop - start)


def _privileges(fd: int, status: os.stat_result) -> Callable[[], None]:
    """A function that restores the set-user-id and set-group-id bits and the capabilities, which write(2) clears."""
    capabilities = None
    with suppress(OSError):  # there are none, or we may not read them
        capabilities = os.getxattr(fd, _CAPABILITIES)

    def restore() -> None:
        with suppress(OSError):
            if status.st_mode & (stat.S_ISUID | stat.S_ISGID) and os.fstat(fd).st_mode != status.st_mode:
                os.fchmod(fd, stat.S_IMODE(status.st_mode))
            if capabilities is not None:
                os.setxattr(fd, _CAPABILITIES, capabilities)

    return restore
