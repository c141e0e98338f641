"""The table of the mount's open files: the flags of each, the ranges that its accesses have announced, and its backing file.

The kernel may hold far more files open on the mount than this process may hold descriptors. So the backing files of idle handles are
closed, least recently used first, and opened again on demand.
"""

import errno
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from fusehsm.fanotify.marks import MountKey
from fusehsm.linux.ranges import RangeSet

NodeT = TypeVar("NodeT", bound=Hashable)

# Flags that change a file when it is opened. They are left out when a handle's backing file is opened again.
_ONCE_ONLY = os.O_CREAT | os.O_EXCL | os.O_TRUNC


class Direction(Enum):
    """The direction of a transfer, as the accessor sees it."""

    READ = "read"
    WRITE = "write"


@dataclass(slots=True)
class Grant:
    """A system call that has been allowed: the pieces into which FUSE splits it make no further events."""

    #: Identifies the call while it lasts (compared with ==); None when it could not be seen.
    call: object
    #: Bytes [start, end) were allowed.
    start: int
    end: int
    #: The offset at which its next piece begins.
    next_offset: int
    #: Whether a piece may begin at any offset of the range, and not at `next_offset` only.
    anywhere: bool
    #: The progress of its thread at the last piece: see Explainer._progress().
    progress: tuple[bool, int] | None = None
    #: How often a call that goes through the page cache has asked again for its first page.
    repeats: int = 0
    #: False: the call has begun, but no listener was asked, and its further pieces are accesses like others.
    allowed: bool = True


@dataclass(slots=True)
class DeniedFill:
    """A page-cache fill that was denied.

    The kernel repeats the READ of one denied access (docs/facts.md, section 13). The repeats get the same errno and make no event, also
    when the group that denied the first has gone.
    """

    #: Identifies the call or the fault in which the accessor waits (compared with ==).
    waits: object
    #: Bytes [start, end) were denied.
    start: int
    end: int
    #: The answer.
    errno: int
    #: How many repeats still get it.
    repeats_left: int
    #: Until when they get it, in monotonic seconds.
    expires: float
    #: How often the thread had waited (proc.voluntary_switches()), None if that decides nothing.
    switches: int | None = None
    #: Until when they get it if the thread has waited for nothing else in between, in monotonic seconds.
    expires_awake: float = 0.0


@dataclass(slots=True, eq=False)
class OpenFile(Generic[NodeT]):
    """One open file description of the mount."""

    #: The number by which the kernel names it.
    handle: int
    #: Its file.
    node: NodeT
    #: Its flags of open(2).
    flags: int
    #: Which of its accesses make events (events.Armed).
    armed: object
    #: Whether it was opened with FOPEN_DIRECT_IO.
    direct: bool
    #: The thread that opened it.
    tid: int
    #: The process that opened it, 0: not looked up yet.
    pid: int
    #: The user that opened it.
    uid: int
    #: That user's group.
    gid: int
    #: Bytes whose page-cache fills an allowed event of a mapping has covered.
    announced: RangeSet = field(default_factory=RangeSet)
    #: The grants of calls in progress, by thread and direction.
    grants: dict[tuple[int, Direction], Grant] = field(default_factory=dict)
    #: The mount by which it was opened; None where that is not known (yet).
    mount: MountKey | None = None
    #: The last denied fill of each thread, oldest first.
    denied: dict[int, DeniedFill] = field(default_factory=dict)
    #: The (thread, descriptor) that was last seen to name this file.
    known_descriptor: tuple[int, int] | None = None
    #: The descriptor of its backing file, None while that is closed.
    descriptor: int | None = None
    #: How many blocks are using the descriptor.
    users: int = 0
    #: Whether it stands for all open files of its node, which are not known one by one (FUSE_NO_OPEN_SUPPORT).
    stateless: bool = False
    #: Whether its handle has left the table.
    released: bool = False
    #: Whether its accesses are those of single calls. So it is for a direct file, and for one that is opened while a page of its file waits.
    exact: bool = False
    #: Whether the kernel sends it past the page cache now.
    bypasses: bool = False
    #: Whether a listener is to be notified when it is closed.
    tells_closer: bool = False
    #: Whether the kernel has opened it for itself. Then its open and its close make no event.
    silent: bool = False
    #: The (process, thread) that has closed a descriptor of it last.
    closer: tuple[int, int] | None = None

    @property
    def appends(self) -> bool:
        """Whether it was opened with O_APPEND."""
        return bool(self.flags & os.O_APPEND)

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class _InUse(Generic[NodeT]):
    """The context manager of HandleTable.backing(). It is a class because a generator costs twice as much for each read and write."""

    __slots__ = ("_file",)

    def __init__(self, file: OpenFile[NodeT]) -> None:
        self._file = file

    def __enter__(self) -> int:
        self._file.users += 1
        assert self._file.descriptor is not None
        return self._file.descriptor

    def __exit__(self, *_: object) -> None:
        file = self._file
        file.users -= 1
        if file.released and not file.users and file.descriptor is not None:
            os.close(file.descriptor)
            file.descriptor = None


class HandleTable(Generic[NodeT]):
    """All open files, by handle number. At most `limit` of them keep their backing file open.

    `open_backing` opens the backing file of a node with flags of open(2). `is_kept`: whether it can do so for a file without a name.
    """

    def __init__(
        self,
        open_backing: Callable[[NodeT, int], int],
        limit: int,
        is_kept: Callable[[NodeT], bool] = lambda node: False,
    ) -> None:
        self._open_backing = open_backing
        self._is_kept = is_kept
        self._limit = max(limit, 8)
        self._files: dict[int, OpenFile[NodeT]] = {}
        self._recent: OrderedDict[int, OpenFile[NodeT]] = OrderedDict()
        self._of_node: dict[NodeT, list[OpenFile[NodeT]]] = {}
        self._standing: dict[tuple[NodeT, bool], OpenFile[NodeT]] = {}
        self._next_handle = 1

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[OpenFile[NodeT]]:
        return iter(self._files.values())

    def add(
        self,
        node: NodeT,
        flags: int,
        descriptor: int,
        *,
        armed: object,
        direct: bool,
        tid: int,
        pid: int,
        uid: int,
        gid: int,
    ) -> OpenFile[NodeT]:
        """Add an open file, which owns `descriptor` from now on.

        Raises OSError ENFILE, and closes it, for an ordinary user who has half of the descriptors in files that cannot be closed and opened again.
        """
        file = OpenFile(
            self._next_handle, node, flags, armed, direct, tid, pid, uid, gid, descriptor=descriptor
        )
        file.exact = direct
        self._next_handle += 1
        self._files[file.handle] = file
        self._of_node.setdefault(node, []).append(file)
        self._recent[file.handle] = file
        self._close_idle(file)
        if len(self._recent) > self._limit and uid and self._has_more_than_a_share(uid):
            self.release(file.handle)
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        return file

    def _has_more_than_a_share(self, uid: int) -> bool:
        lasting = (
            file.uid == uid and not _could_be_reopened(file, self._is_kept) for file in self._recent.values()
        )
        return sum(lasting) > self._limit // 2

    def stateless(self, node: NodeT, armed: object, *, writing: bool) -> OpenFile[NodeT]:
        """The stateless open file of a node, for reading or for writing.

        It stands for all open files of a node for which the kernel sends no OPEN. Its backing file is opened on demand. It leaves the table
        when that is closed, or with its node.
        """
        file = self._standing.get((node, writing))
        if file is None:
            flags = os.O_WRONLY if writing else os.O_RDONLY
            file = OpenFile(self._next_handle, node, flags, armed, False, 0, 0, 0, 0, stateless=True)
            self._next_handle += 1
            self._stand(file)
        return file

    def stand_by(self, file: OpenFile[NodeT]) -> None:
        """Make an open file the stateless one of its node, because the kernel will send no RELEASE for it."""
        file.stateless = True
        self._stand(file)

    def _stand(self, file: OpenFile[NodeT]) -> None:
        file.released = False
        if file.handle not in self._files:
            self._files[file.handle] = file
            self._of_node.setdefault(file.node, []).append(file)
        for writing in _uses(file):
            self._standing.setdefault((file.node, writing), file)

    def forget(self, node: NodeT) -> None:
        """The kernel has forgotten a node: release its stateless open files."""
        for file in self.of_node(node):
            if file.stateless:
                self.release(file.handle)

    def get(self, handle: int) -> OpenFile[NodeT]:
        """The open file of a handle number. Raises OSError EBADF when there is none."""
        try:
            return self._files[handle]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def of_node(self, node: NodeT) -> list[OpenFile[NodeT]]:
        """The open files of one node, in the order of their opening."""
        return list(self._of_node.get(node, ()))

    def release(self, handle: int) -> OpenFile[NodeT]:
        """Remove a handle, and close its backing file as soon as no block uses it. Raises OSError EBADF for an unknown handle.

        A killed accessor's file is released while a thread may still be at work on it.
        """
        file = self.get(handle)
        del self._files[handle]
        self._recent.pop(handle, None)
        siblings = self._of_node[file.node]
        siblings.remove(file)
        if not siblings:
            del self._of_node[file.node]
        if file.stateless:
            for writing in _uses(file):
                if self._standing.get((file.node, writing)) is file:
                    del self._standing[file.node, writing]
        file.released = True
        if file.descriptor is not None and not file.users:
            os.close(file.descriptor)
            file.descriptor = None
        return file

    def backing(self, file: OpenFile[NodeT]) -> "_InUse[NodeT]":
        """Context manager that gives the descriptor of the backing file, kept open inside the block. Raises OSError when it cannot be
        opened again."""
        if file.descriptor is None:
            if file.released and not file.stateless:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            file.descriptor = self._open_backing(file.node, file.flags & ~_ONCE_ONLY)
            if file.stateless:
                # It may have left the table while an accessor waited for a listener.
                self._stand(file)
            self._recent[file.handle] = file
            self._close_idle(file)
        elif len(self._files) > self._limit and not file.released:
            self._recent.move_to_end(file.handle)
        return _InUse(file)

    def _close_idle(self, used: OpenFile[NodeT]) -> None:
        """Close those that were used least recently, but not `used`, which is about to be."""
        excess = len(self._recent) - self._limit
        if excess <= 0:
            return
        for handle, file in list(itertools.islice(self._recent.items(), excess + 8)):
            if excess <= 0:
                break
            if file is used or file.users or not _could_be_reopened(file, self._is_kept):
                # So that the next time others are looked at.
                self._recent.move_to_end(handle)
                continue
            assert file.descriptor is not None
            os.close(file.descriptor)
            file.descriptor = None
            del self._recent[handle]
            excess -= 1
            if file.stateless:
                self.release(handle)

    def close(self) -> None:
        """Close every backing file."""
        for handle in list(self._files):
            self.release(handle)


def _uses(file: OpenFile[NodeT]) -> tuple[bool, ...]:
    """The uses that a stateless open file can serve: False is reading, True is writing."""
    return {os.O_RDONLY: (False,), os.O_WRONLY: (True,)}.get(file.flags & os.O_ACCMODE, (False, True))


def _could_be_reopened(file: OpenFile[NodeT], is_kept: Callable[[NodeT], bool]) -> bool:
    """Whether the backing file can be opened again: not a file without a name that is not kept, nor one whose mode denies an ordinary
    server the access that it had only as the file's creator."""
    if file.descriptor is None:
        return False
    if os.fstat(file.descriptor).st_nlink == 0 and not (os.geteuid() == 0 and is_kept(file.node)):
        return False
    # Access mode 3 (for ioctl(2) only; see open(2)) needs both.
    needed = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(file.flags & os.O_ACCMODE, os.R_OK | os.W_OK)
    return os.geteuid() == 0 or os.access(f"/proc/self/fd/{file.descriptor}", needed)
