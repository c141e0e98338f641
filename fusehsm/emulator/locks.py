"""The locks that accessors take on files of the mount, flock(2) and fcntl(2), held on the backing where other processes see them.

The kernel names the owner of each lock by a number: a process's table of descriptors for fcntl(2), an open file for flock(2) and for open file
description locks. Here each owner has a descriptor of its own on the backing, because locks through one descriptor never exclude each other.

A lock ends with an unlock, or with its open file (RELEASE). A process's fcntl(2) lock also ends when the process closes the descriptor, while
other processes may keep the open file. FLUSH would tell that, but it takes the inode's lock at every close(2), and costs a round trip. So
/proc is asked instead: at once where the lock is in the way of another accessor, else periodically.

A wait for a lock is a try after each unlock, and after a short time for the locks of processes outside of the mount. It ends at the first signal,
as in the kernel.
"""

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import trio

from fusehsm.emulator.handles import HandleTable, OpenFile
from fusehsm.emulator.shares import Shares
from fusehsm.emulator.waiting import KillWatch
from fusehsm.linux import proc, system_call
from fusehsm.overlay.attributes import path_of
from fusehsm.overlay.overlay import Node

LAST_BYTE: Final = (1 << 63) - 1  # OFFSET_MAX: a lock up to there has no end
# struct flock (fcntl(2)) of 64-bit programs: type, whence, start, length (0: no end), pid.
_FLOCK: Final = struct.Struct("=hh4xqqi4x")
_KINDS: Final = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}
_SETLK, _SETLKW, _OFD_SETLKW = 6, 7, 38  # fcntl(2), on all 64-bit architectures
# Seconds between two tries, if a process outside of the mount may hold the lock. They grow.
_SHORTEST, _LONGEST = 0.01, 0.1
# Each lock is looked at for each new one of its file, and each wait several times a second. So they are bounded by the loop's time, not by memory.
_MOST_LOCKS: Final = 8192
_MOST_WAITS: Final = 1024


@dataclass(frozen=True, slots=True)
class Lock:
    """What one call asks for, or what stands in its way."""

    #: F_RDLCK (shared), F_WRLCK (exclusive) or F_UNLCK.
    kind: int
    #: The first and the last byte.
    start: int = 0
    end: int = LAST_BYTE
    #: The process that asks for it, or holds it; 0 where that is not known.
    pid: int = 0
    #: Whether it is that of flock(2), which lies on the whole file.
    whole: bool = False

    def conflicts(self, other: "Lock") -> bool:
        """Whether two owners cannot have both."""
        return (
            self.whole == other.whole
            and fcntl.F_WRLCK in (self.kind, other.kind)
            and self.start <= other.end
            and other.start <= self.end
        )

    def packed(self) -> bytes:
        """struct flock."""
        length = 0 if self.end == LAST_BYTE else self.end - self.start + 1
        return _FLOCK.pack(self.kind, os.SEEK_SET, self.start, length, 0)


@dataclass(slots=True, eq=False)
class _Held:
    """The locks of one owner on one file."""

    #: The file.
    node: Node
    #: The kernel's number of the owner.
    owner: int
    #: The owner's descriptor on the backing.
    descriptor: int
    #: The user that has taken the first, and who counts as the holder of all.
    uid: int
    #: The open files through which they were taken, by handle.
    handles: set[int]
    #: Those of fcntl(2), which never overlap, and that of flock(2).
    locks: list[Lock] = field(default_factory=list)
    #: The (process, descriptor) through which a process took those of fcntl(2); None for other owners, and where /proc does not tell.
    place: tuple[int, int] | None = None
    #: Whether the owner is known to be an open file, and not a process.
    of_file: bool = False

    def note(self, lock: Lock) -> None:
        """The owner has taken or given back a lock."""
        kept = []
        for old in self.locks:
            if old.whole != lock.whole or old.end < lock.start or lock.end < old.start:
                kept.append(old)
                continue
            if old.start < lock.start:
                kept.append(Lock(old.kind, old.start, lock.start - 1, old.pid, old.whole))
            if lock.end < old.end:
                kept.append(Lock(old.kind, lock.end + 1, old.end, old.pid, old.whole))
        if lock.kind != fcntl.F_UNLCK:
            kept.append(lock)
        self.locks = kept


@dataclass(slots=True, eq=False)
class _Waiter:
    """One accessor that waits for a lock."""

    #: The open file.
    file: OpenFile[Node]
    #: The kernel's number of the owner that it is to have.
    owner: int
    #: The lock.
    lock: Lock
    #: The thread.
    tid: int
    #: Cancelled to end the wait with EINTR.
    scope: trio.CancelScope
    #: When the wait began, in monotonic seconds.
    since: float = field(default_factory=time.monotonic)


class FileLocks:
    """The locks of one mount's files. At most `limit` owners have some at once, because each needs a descriptor.

    An ordinary user has a share of the owners, of the locks and of the waits for one.
    """

    def __init__(self, handles: HandleTable[Node], limit: int) -> None:
        self._handles = handles
        self._limit = limit
        self._owners = Shares(limit, errno.ENOLCK)
        self._locks = Shares(_MOST_LOCKS, errno.ENOLCK)
        self._waits = Shares(_MOST_WAITS, errno.ENOLCK)
        self._held: dict[tuple[Node, int], _Held] = {}
        self._of_node: dict[Node, list[_Held]] = {}
        # Those that end when a process closes a descriptor.
        self._placed: dict[tuple[Node, int], _Held] = {}
        self._waiters: dict[int, _Waiter] = {}
        # Set, and removed, when a lock of the node ends.
        self._news: dict[Node, trio.Event] = {}
        #: The mount's (major, minor), once it exists.
        self.device = (0, 0)
        self.watch = KillWatch(self._placed, self._end_if_closed)
        """Ends the locks of processes that have closed the descriptor."""

    # Calls

    def get(self, file: OpenFile[Node], owner: int, lock: Lock) -> Lock | None:
        """A lock that is in the way of that one (F_GETLK); None if there is none. Raises OSError."""
        for held, found in self._in_the_way(file.node, owner, lock):
            # The pid of an open file description lock is -1 (fcntl(2)), which a FUSE server cannot say.
            return Lock(found.kind, found.start, found.end, 0 if held.of_file else found.pid)
        return self._outside(file, owner, lock)

    def set(self, file: OpenFile[Node], owner: int, lock: Lock, tid: int, uid: int) -> None:
        """Take or give back a lock, for a user's thread. Raises BlockingIOError (EAGAIN) when another owner has one that excludes it, and OSError
        ENOLCK, also for a user who has their share already."""
        held = self._held.get((file.node, owner))
        if held is None:
            if lock.kind == fcntl.F_UNLCK:
                return
            held = self._new(file, owner, uid)
        before = held.locks
        try:
            if lock.kind != fcntl.F_UNLCK:
                self._locks.check(held.uid)
            if lock.kind != fcntl.F_UNLCK and not lock.whole:
                self._let_through(held, lock)
                self._make_usable(held, file, lock)
            self._apply(held, lock)
            if lock.kind != fcntl.F_UNLCK:
                held.handles.add(file.handle)
                if not lock.whole:
                    self._place(held, lock, tid)
        finally:
            self._locks.change(held.uid, len(held.locks) - len(before))
            if not held.locks:
                self._drop(held)
            if before and held.locks != before:
                self._tell(file.node)

    async def wait(
        self, file: OpenFile[Node], owner: int, lock: Lock, tid: int, uid: int, request: int
    ) -> None:
        """Take a lock for a user's thread as soon as no other owner has one that excludes it; `request` is a number for interrupt().

        Raises OSError EINTR after interrupt(), EDEADLK if the processes that are in the way wait for this one, ENOLCK, also for a user who has
        their share of locks or waits already.
        """
        pause = _SHORTEST
        self._waits.take(uid)
        with trio.CancelScope() as scope:
            waiter = self._waiters[request] = _Waiter(file, owner, lock, tid, scope)
            try:
                while True:
                    try:
                        self.set(file, owner, lock, tid, uid)
                    except BlockingIOError:
                        pass
                    else:
                        return
                    if self._waits_for_itself(waiter):
                        raise OSError(errno.EDEADLK, os.strerror(errno.EDEADLK))
                    with trio.move_on_after(pause):
                        await self._news.setdefault(file.node, trio.Event()).wait()
                    pause = min(pause * 1.5, _LONGEST)
            finally:
                del self._waiters[request]
                self._waits.give_back(uid)
                if not any(other.file.node is file.node for other in self._waiters.values()):
                    self._news.pop(file.node, None)
        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

    def interrupt(self, request: int) -> bool:
        """The thread behind a request has got a signal, which ends its wait; returns whether it waits for a lock."""
        waiter = self._waiters.get(request)
        if waiter is not None:
            waiter.scope.cancel()
        return waiter is not None

    def released(self, file: OpenFile[Node]) -> None:
        """No process has the open file any more: the locks that were taken through it end."""
        for held in list(self._of_node.get(file.node, ())):
            if file.handle in held.handles:
                held.handles.remove(file.handle)
                if not held.handles:
                    self._end(held)

    def close(self) -> None:
        """The mount has ended, and every lock with it."""
        for held in list(self._held.values()):
            self._end(held)

    # Owners

    def _new(self, file: OpenFile[Node], owner: int, uid: int) -> _Held:
        self._owners.check(uid)
        if len(self._held) >= self._limit:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        # With the accessor's access mode: a writer of a running program's file would be refused, and would keep others from running it.
        mode = file.flags & os.O_ACCMODE
        held = _Held(
            file.node, owner, self._open(file, os.O_RDWR if mode == os.O_WRONLY else mode), uid, set()
        )
        self._owners.take(uid)
        self._held[file.node, owner] = held
        self._of_node.setdefault(file.node, []).append(held)
        return held

    def _open(self, file: OpenFile[Node], mode: int) -> int:
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        with self._handles.backing(file) as descriptor:
            try:
                return os.open(path_of(descriptor), mode | flags)
            except PermissionError:
                # An ordinary server may lack the right to read.
                return os.open(path_of(descriptor), file.flags & os.O_ACCMODE | flags)

    def _make_usable(self, held: _Held, file: OpenFile[Node], lock: Lock) -> None:
        """Open the owner's descriptor for writing, too, if the lock needs that: a process may lock a file through several open files."""
        mode = fcntl.fcntl(held.descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == os.O_RDWR or mode == (os.O_WRONLY if lock.kind == fcntl.F_WRLCK else os.O_RDONLY):
            return
        try:
            wider = self._open(file, os.O_RDWR)
        except OSError:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from None
        # All locks so far are shared, so both descriptors can have them, and nobody gets in between.
        for old in held.locks:
            fcntl.fcntl(wider, fcntl.F_OFD_SETLK, old.packed())
        os.close(held.descriptor)
        held.descriptor = wider

    @staticmethod
    def _apply(held: _Held, lock: Lock) -> None:
        if not lock.whole:
            fcntl.fcntl(held.descriptor, fcntl.F_OFD_SETLK, lock.packed())
            held.note(lock)
            return
        try:
            fcntl.flock(held.descriptor, _KINDS[lock.kind] | fcntl.LOCK_NB)
        except BlockingIOError:
            # flock(2) first removes the lock that the owner has.
            held.note(Lock(fcntl.F_UNLCK, whole=True))
            raise
        held.note(lock)

    def _place(self, held: _Held, lock: Lock, tid: int) -> None:
        command = system_call.fcntl_of(tid)
        if command is None:
            return
        held.of_file = command[1] not in (_SETLK, _SETLKW)
        if not held.of_file:
            held.place = lock.pid, command[0]
            self._placed[held.node, held.owner] = held
            if self.watch.sleeps:
                self.watch.wake()

    def _end(self, held: _Held) -> None:
        """All locks of an owner end."""
        self._drop(held)
        self._tell(held.node)

    def _drop(self, held: _Held) -> None:
        if self._held.pop((held.node, held.owner), None) is None:
            return
        self._owners.give_back(held.uid)
        self._locks.change(held.uid, -len(held.locks))
        self._placed.pop((held.node, held.owner), None)
        others = self._of_node[held.node]
        others.remove(held)
        if not others:
            del self._of_node[held.node]
        os.close(held.descriptor)

    def _tell(self, node: Node) -> None:
        news = self._news.pop(node, None)
        if news is not None:
            news.set()

    def _end_if_closed(self, held: _Held) -> bool:
        """End the locks of a process that has closed its descriptor; returns whether it has."""
        assert held.place is not None
        pid, descriptor = held.place
        # The process's first thread may have ended, and has no descriptors then.
        for tid in (pid, *proc.threads_of(pid)):
            # Not by /proc/PID/fdinfo: it may wait, and the process may have put anything there.
            found = proc.file_of(tid, descriptor)
            if found is not None:
                if found == (self.device, held.node.id):
                    return False
                break
        else:
            if not proc.is_gone(pid) and not os.access(f"/proc/{pid}/fd", os.R_OK):
                return False  # another user's process, of which nothing is known
        self._end(held)
        return True

    # Conflicts

    def _in_the_way(self, node: Node, owner: int, lock: Lock) -> Iterator[tuple[_Held, Lock]]:
        for held in self._of_node.get(node, ()):
            if held.owner != owner:
                for other in held.locks:
                    if other.conflicts(lock):
                        yield held, other

    def _let_through(self, asking: _Held, lock: Lock) -> None:
        for held in {held for held, _ in self._in_the_way(asking.node, asking.owner, lock)}:
            if held.place is not None:
                self._end_if_closed(held)

    def _outside(self, file: OpenFile[Node], owner: int, lock: Lock) -> Lock | None:
        """A lock of fcntl(2) that a process outside of the mount has, and that is in the way."""
        if lock.whole:
            return None
        held = self._held.get((file.node, owner))
        with self._handles.backing(file) as descriptor:
            asked = descriptor if held is None else held.descriptor
            kind, _, start, length, pid = _FLOCK.unpack(fcntl.fcntl(asked, fcntl.F_OFD_GETLK, lock.packed()))
        if kind == fcntl.F_UNLCK:
            return None
        return Lock(kind, start, start + length - 1 if length else LAST_BYTE, max(pid, 0))

    def _waits_for_itself(self, waiter: _Waiter) -> bool:
        """Whether the processes that are in the way wait for this one (posix_locks_deadlock() in the kernel)."""
        if waiter.lock.whole:
            return False
        seen: set[int] = set()
        others = [waiter]
        while others:
            other = others.pop()
            for held, _ in self._in_the_way(other.file.node, other.owner, other.lock):
                if held.owner == waiter.owner:
                    # The kernel leaves open file description locks out: their owner may be several processes.
                    command = system_call.fcntl_of(waiter.tid)
                    return command is None or command[1] != _OFD_SETLKW
                if held.owner not in seen:
                    seen.add(held.owner)
                    others += [
                        w for w in self._waiters.values() if w.owner == held.owner and not w.lock.whole
                    ]
        return False

    # Status

    def describe(self, path_of_node: Callable[[Node], bytes]) -> list[dict[str, object]]:
        """The accessors that wait for a lock as JSON-able objects, each with the processes that hold it, as far as they are known."""
        now = time.monotonic()
        found = []
        for waiter in self._waiters.values():
            lock, node = waiter.lock, waiter.file.node
            holders = {other.pid for _, other in self._in_the_way(node, waiter.owner, lock)}
            if not holders:
                outside = self._outside(waiter.file, waiter.owner, lock)
                holders = {outside.pid} if outside is not None and outside.pid else set()
            found.append(
                {
                    "pid": lock.pid,
                    "path": os.fsdecode(path_of_node(node)),
                    "kind": "flock" if lock.whole else "fcntl",
                    "exclusive": lock.kind == fcntl.F_WRLCK,
                    "seconds": now - waiter.since,
                    "holders": sorted(holders),
                }
            )
        return found
