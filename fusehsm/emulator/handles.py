"""Open files of the mount: what each was opened for, what its accesses have announced, and its file on the backing.

The kernel may hold far more files open on the mount than this process may hold descriptors, so the backing files of idle handles are
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

from fusehsm.linux.ranges import RangeSet

NodeT = TypeVar("NodeT", bound=Hashable)

# Flags that do something to a file besides opening it: not repeated when a handle's backing file is opened again.
_ONCE_ONLY = os.O_CREAT | os.O_EXCL | os.O_TRUNC


class Direction(Enum):
    """Which way a transfer goes, seen from the accessor."""

    READ = "read"
    WRITE = "write"


@dataclass(slots=True)
class Grant:
    """A system call that has been let pass: the pieces in which FUSE splits it make no further events.

    `call` identifies the call while it lasts (compared with ==), None when it could not be looked at; bytes [start, end) were allowed
    and `next_offset` is where its next piece begins. Not `allowed`: the call has begun, but nobody was asked, and its pieces are accesses
    like others. For a call that goes through the page cache,
    `progress` is how far its thread had come, and `repeats` how often it has come back for its first page.
    """

    call: object
    start: int
    end: int
    next_offset: int
    anywhere: bool
    progress: tuple[bool, int] | None = None
    repeats: int = 0
    allowed: bool = True


@dataclass(slots=True)
class DeniedFill:
    """A page-cache fill that was refused: the kernel asks more than once for one access, and the repeats get the same answer unasked,
    also when the group that refused it has gone.

    `waits` says what the accessor waits in (compared with ==); bytes [start, end) were refused with `errno`; `expires` in seconds of the
    monotonic clock.
    """

    waits: object
    start: int
    end: int
    errno: int
    repeats_left: int
    expires: float


@dataclass(slots=True, eq=False)
class OpenFile(Generic[NodeT]):
    """One open file description of the mount.

    `flags` as in open(2); `tid`, `pid` (0: not looked up yet) and `uid` are the opener's; `direct`: opened with FOPEN_DIRECT_IO; `armed`
    is the events' word for which accesses make events; `standing`: it stands for all of its node's, none of which is known; `denied`: the
    fill that was refused last, by thread, the oldest first; `bypasses`: the kernel does not send it through the page cache any more;
    `tells_closer`: somebody is to be told who closes it, and `closer` is the (process, thread) that has closed a descriptor of it last.
    """

    handle: int
    node: NodeT
    flags: int
    armed: object
    direct: bool
    tid: int
    pid: int
    uid: int
    announced: RangeSet = field(default_factory=RangeSet)
    grants: dict[tuple[int, Direction], Grant] = field(default_factory=dict)
    denied: dict[int, DeniedFill] = field(default_factory=dict)
    known_descriptor: tuple[int, int] | None = None
    descriptor: int | None = None
    users: int = 0
    stateless: bool = False
    released: bool = False
    bypasses: bool = False
    tells_closer: bool = False
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
    """A context manager written out: one made of a generator costs twice as much, for every read and write."""

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
    """Every open file, by handle number; at most `limit` of them keep their backing file open.

    `is_kept` tells whether `open_backing` can open a file that has no name any more.
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
    ) -> OpenFile[NodeT]:
        """Register an open file that owns `descriptor` from now on."""
        file = OpenFile(self._next_handle, node, flags, armed, direct, tid, pid, uid, descriptor=descriptor)
        self._next_handle += 1
        self._files[file.handle] = file
        self._of_node.setdefault(node, []).append(file)
        self._recent[file.handle] = file
        self._close_idle()
        return file

    def stateless(self, node: NodeT, armed: object, *, writing: bool) -> OpenFile[NodeT]:
        """The one that stands for all open files of a node whose openings nobody tells us of, for reading or for writing; its backing
        file is opened on demand, and it goes with that or with its node."""
        file = self._standing.get((node, writing))
        if file is None:
            flags = os.O_WRONLY if writing else os.O_RDONLY
            file = OpenFile(self._next_handle, node, flags, armed, False, 0, 0, 0, stateless=True)
            self._next_handle += 1
            self._stand(file)
        return file

    def stand_by(self, file: OpenFile[NodeT]) -> None:
        """Let an open file, which nobody will release, stand for its node from now on."""
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
        """The kernel has forgotten a node: nothing needs to stand for it."""
        for file in self.of_node(node):
            if file.stateless:
                self.release(file.handle)

    def get(self, handle: int) -> OpenFile[NodeT]:
        """The open file of a handle number that the kernel uses. Raises OSError EBADF when there is none."""
        try:
            return self._files[handle]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def of_node(self, node: NodeT) -> list[OpenFile[NodeT]]:
        """The open files of one node, in the order of their opening."""
        return list(self._of_node.get(node, ()))

    def release(self, handle: int) -> OpenFile[NodeT]:
        """Forget a handle and close its backing file, as soon as nobody uses that: a killed accessor's file is closed while a thread may
        still be at work for it. Raises OSError EBADF for a handle that does not exist."""
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
        """`with` it: the descriptor of its backing file, kept open inside the block. Raises OSError when it cannot be opened again."""
        if file.descriptor is None:
            if file.released and not file.stateless:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            file.descriptor = self._open_backing(file.node, file.flags & ~_ONCE_ONLY)
            if file.stateless:
                # It may have gone while somebody waited for a listener.
                self._stand(file)
            self._recent[file.handle] = file
            self._close_idle()
        elif len(self._files) > self._limit and not file.released:
            self._recent.move_to_end(file.handle)
        return _InUse(file)

    def _close_idle(self) -> None:
        excess = len(self._recent) - self._limit
        if excess <= 0:
            return
        for handle, file in list(itertools.islice(self._recent.items(), excess + 8)):
            if excess <= 0:
                break
            if file.users or not _could_be_reopened(file, self._is_kept):
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
    """What it can stand for: False is reading, True is writing."""
    return {os.O_RDONLY: (False,), os.O_WRONLY: (True,)}.get(file.flags & os.O_ACCMODE, (False, True))


def _could_be_reopened(file: OpenFile[NodeT], is_kept: Callable[[NodeT], bool]) -> bool:
    """Not a file that nothing leads to, nor one whose mode an ordinary server passed only because it has just created it."""
    if file.descriptor is None:
        return False
    if os.fstat(file.descriptor).st_nlink == 0 and not (os.geteuid() == 0 and is_kept(file.node)):
        return False
    # Access mode 3 (for ioctl alone, open(2)) wants both.
    needed = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(file.flags & os.O_ACCMODE, os.R_OK | os.W_OK)
    return os.geteuid() == 0 or os.access(f"/proc/self/fd/{file.descriptor}", needed)
