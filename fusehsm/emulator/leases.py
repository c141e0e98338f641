"""Leases of a mount's files: while a file is leased, no process has it open, and a process that opens or truncates it waits.

Leases is the table of the leases and their waiters. Lessor grants leases and takes them back, and drops what the kernel has cached of their
files.

A lease is what F_SETLEASE with F_WRLCK is on the kernel's own filesystems (fcntl(2); docs/facts.md, section 17), by the same rules. It is
refused while a process has the file open. An open with O_NONBLOCK fails instead of waiting. After a wait of fs.lease-break-time the lease is
broken, and its holder is told so.

Other processes may hold the kernel's leases on the backing files. An open that breaks one of those must not keep the other requests waiting:
retry().
"""

import errno
import os
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from fusehsm.emulator.handles import HandleTable
from fusehsm.emulator.waiting import KillWatch
from fusehsm.linux import proc, syscalls
from fusehsm.overlay.overlay import Node, Overlay

# RELEASE comes a moment after close(2): how often to check again whether a file is still open, and after how many seconds.
_CLOSING_LOOKS, _CLOSING_SECONDS = 10, 0.005

# Between two tries to open a file that another process has leased; seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.1

NodeT = TypeVar("NodeT", bound=Hashable)
_ResultT = TypeVar("_ResultT")


@dataclass(slots=True, eq=False)
class Lease(Generic[NodeT]):
    """One lease."""

    #: The leased file.
    node: NodeT
    #: When it breaks, in seconds of trio's clock; None until an accessor has waited for it.
    breaks_at: float | None = None
    #: Whether it was broken.
    broken: bool = False
    #: Set when it is given back or broken.
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def wanted(self) -> bool:
        """Whether an accessor waits, or has waited, for its end."""
        return self.breaks_at is not None


@dataclass(slots=True, eq=False)
class _LeaseWaiter(Generic[NodeT]):
    """One accessor that waits for the end of a lease."""

    #: The lease.
    lease: Lease[NodeT]
    #: The accessor's thread.
    tid: int
    #: Cancelled to end the wait with `errno`.
    scope: trio.CancelScope
    #: The error that ends the wait, 0: none.
    errno: int = 0


class Leases(Generic[NodeT]):
    """The leases of one mount, at most one for each node. `break_seconds` gives the longest wait for a lease, in seconds."""

    def __init__(self, break_seconds: Callable[[], float] = syscalls.lease_break_seconds) -> None:
        self._break_seconds = break_seconds
        self._held: dict[NodeT, Lease[NodeT]] = {}
        self._entering: dict[NodeT, int] = {}
        self._waiters: dict[int, _LeaseWaiter[NodeT]] = {}
        self.kill_watch = KillWatch(self._waiters, _let_die)

    def __contains__(self, node: NodeT) -> bool:
        return node in self._held

    def take(self, node: NodeT) -> Lease[NodeT]:
        """Lease a node that no process has open. Raises BlockingIOError (EAGAIN) when it is leased already, or about to be opened."""
        if node in self._held or node in self._entering:
            raise BlockingIOError(errno.EAGAIN, "a process opens the file, or has leased it; try again later")
        lease = self._held[node] = Lease(node)
        return lease

    def end(self, lease: Lease[NodeT]) -> None:
        """End a lease, because it is given back or broken. A second call does nothing."""
        if self._held.get(lease.node) is lease:
            del self._held[lease.node]
            lease.ended.set()

    @contextmanager
    def entering(self, node: NodeT) -> Iterator[None]:
        """Context manager around an open of the node. Inside it, the node cannot be leased."""
        self._entering[node] = self._entering.get(node, 0) + 1
        try:
            yield
        finally:
            left = self._entering.pop(node) - 1
            if left:
                self._entering[node] = left

    async def wait(self, node: NodeT, tid: int, *, patient: bool = True) -> None:
        """Wait until the node is not leased. Returns at once if it is not.

        Raises OSError EINTR when the accessor (thread `tid`) is being killed, and EIO when the mount ends. An accessor that is not `patient`
        (O_NONBLOCK) does not wait: for it this raises OSError EAGAIN.
        """
        while (lease := self._held.get(node)) is not None:
            now = trio.current_time()
            if lease.breaks_at is None:
                lease.breaks_at = now + self._break_seconds()
            if now >= lease.breaks_at:
                lease.broken = True
                self.end(lease)
            elif not patient:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            else:
                await self._wait_for(lease, lease.breaks_at, tid)

    async def retry(self, node: NodeT, tid: int, action: Callable[[], _ResultT]) -> _ResultT:
        """Try again what failed with BlockingIOError because another process holds a lease on the backing file, until the lease has ended.

        The first try has begun to break the lease. Nothing tells of its end, and a thread that waits for it could not be stopped. Raises
        OSError as wait(), and BlockingIOError if it lasts much longer than fs.lease-break-time.
        """
        end, pause = trio.current_time() + 2 * self._break_seconds(), _FIRST_PAUSE
        while True:
            await self._wait_for(Lease(node), trio.current_time() + pause, tid)
            try:
                return action()
            except BlockingIOError:
                if trio.current_time() > end:
                    raise
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _wait_for(self, lease: Lease[NodeT], deadline: float, tid: int) -> None:
        with trio.CancelScope(deadline=deadline) as scope:
            waiter = _LeaseWaiter(lease, tid, scope)
            self._waiters[id(waiter)] = waiter
            if self.kill_watch.sleeps:
                self.kill_watch.wake()
            try:
                await lease.ended.wait()
            finally:
                del self._waiters[id(waiter)]
        if waiter.errno:
            raise OSError(waiter.errno, os.strerror(waiter.errno))

    def interrupted(self, tid: int) -> None:
        """A thread is being killed: end its wait, if it waits here, with EINTR."""
        for waiter in list(self._waiters.values()):
            if waiter.tid == tid:
                _let_go(waiter, errno.EINTR)

    def abandon(self) -> None:
        """The mount ends: every wait ends with EIO."""
        for waiter in list(self._waiters.values()):
            _let_go(waiter, errno.EIO)

    def describe(self, path_of: Callable[[NodeT], bytes]) -> list[dict[str, object]]:
        """The leases as JSON-able objects: the path of each, and how many accessors wait for it."""
        return [
            {
                "path": os.fsdecode(path_of(lease.node)),
                "waiting": sum(waiter.lease is lease for waiter in self._waiters.values()),
            }
            for lease in self._held.values()
        ]


def _let_go(waiter: _LeaseWaiter[NodeT], number: int) -> None:
    waiter.errno = number
    waiter.scope.cancel()


def _let_die(waiter: _LeaseWaiter[NodeT]) -> bool:
    """End the wait of an accessor if it is being killed; returns whether it is."""
    if not waiter.tid or not proc.is_being_killed(waiter.tid):
        return False
    _let_go(waiter, errno.EINTR)
    return True


class Lessor:
    """The lessor of one mount's files.

    `drop` drops the kernel's cached pages and attributes of a node. `drop_attributes_soon` begins to drop the attributes, without waiting.
    `forget` drops so many references to the node of an id.
    """

    def __init__(
        self,
        overlay: Overlay,
        handles: HandleTable[Node],
        leases: Leases[Node],
        *,
        drop: Callable[[Node], Awaitable[None]],
        drop_attributes_soon: Callable[[Node], None],
        forget: Callable[[int, int], object],
    ) -> None:
        self.stateful_open = True
        """Whether the kernel tells of every open(2): the engine's to say."""
        self._overlay = overlay
        self._handles = handles
        self._leases = leases
        self._drop = drop
        self._drop_attributes_soon = drop_attributes_soon
        self._forget = forget

    async def grant(self, node: Node) -> tuple[Lease[Node], int]:
        """Lease a file, as F_SETLEASE does with F_WRLCK.

        While the lease lasts, no process has the file open or mapped, the kernel caches nothing of it, and a process that opens or truncates
        it waits. Returns the lease, and a descriptor of the backing file for reading and writing, which the caller closes.

        RELEASE comes only when an open file is mapped nowhere and none of its requests is in progress. So a check of the open files is
        enough. Raises OSError EAGAIN while a process has the file open, here or on the backing; EINVAL for a file that is not regular;
        EOPNOTSUPP where the kernel sends no OPEN.
        """
        if not node.is_regular:
            raise OSError(errno.EINVAL, "only regular files can be leased")
        if not self.stateful_open:
            raise OSError(
                errno.EOPNOTSUPP,
                "first-access mode with a private cache cannot tell whether a file is open; mount with --events exact",
            )
        for _ in range(_CLOSING_LOOKS):
            if not self._handles.of_node(node):
                break
            await trio.sleep(_CLOSING_SECONDS)
        if self._handles.of_node(node):
            raise BlockingIOError(errno.EAGAIN, "a process has the file open or mapped; try again later")
        lease = self._leases.take(node)
        # Otherwise the kernel could forget the node, and then know the file by another node, which is not leased.
        self._overlay.remember(node)
        try:
            descriptor = self._overlay.open_alone(node)
            try:
                await self._drop(node)
            except BaseException:
                os.close(descriptor)
                raise
        except BaseException:
            self._end(lease)
            raise
        return lease, descriptor

    async def take_back(self, lease: Lease[Node]) -> None:
        """The holder gives a lease back. Raises OSError ETIMEDOUT if the lease was broken."""
        try:
            # The kernel cannot have cached pages during the lease, but attributes, which may be out of date.
            await self._drop(lease.node)
        except OSError:
            if not lease.broken:
                raise
        finally:
            self._end(lease)
        if lease.broken:
            raise OSError(
                errno.ETIMEDOUT, "the lease was broken: an open(2) of the file had waited for too long"
            )

    def abandon(self, lease: Lease[Node]) -> None:
        """The holder of a lease has gone, perhaps in the middle of a change."""
        self._drop_attributes_soon(lease.node)
        self._end(lease)

    def _end(self, lease: Lease[Node]) -> None:
        self._leases.end(lease)
        self._forget(lease.node.id, 1)
