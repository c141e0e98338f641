"""Leases of a mount's files: while one stands, its file is open nowhere, and whoever opens or truncates it waits.

Leases is the table of those that stand, and those who wait for them; Lessor grants them and takes them back, with everything that the kernel
has cached of their files.

What F_SETLEASE with F_WRLCK is on the kernel's own filesystems (fcntl(2)), by the same rules: it is refused while anybody has the file open;
O_NONBLOCK fails instead of waiting; when somebody has waited for fs.lease-break-time, the lease is broken, and who held it is told so.
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

# The kernel tells of a close(2) a moment after it: how often, and after how many seconds, to look again whether a file is still open.
_CLOSING_LOOKS, _CLOSING_SECONDS = 10, 0.005

NodeT = TypeVar("NodeT", bound=Hashable)


@dataclass(slots=True, eq=False)
class Lease(Generic[NodeT]):
    """One lease. `breaks_at`: when it breaks, by trio's clock; None until somebody has waited for it."""

    node: NodeT
    breaks_at: float | None = None
    broken: bool = False
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits, or has waited, for its end."""
        return self.breaks_at is not None


@dataclass(slots=True, eq=False)
class _LeaseWaiter(Generic[NodeT]):
    """An accessor (thread `tid`) that waits; `scope` is cancelled to end that with `errno`."""

    lease: Lease[NodeT]
    tid: int
    scope: trio.CancelScope
    errno: int = 0


class Leases(Generic[NodeT]):
    """Those of one mount, at most one a node. `break_seconds` tells for how long one may keep somebody waiting."""

    def __init__(self, break_seconds: Callable[[], float] = syscalls.lease_break_seconds) -> None:
        self._break_seconds = break_seconds
        self._held: dict[NodeT, Lease[NodeT]] = {}
        self._entering: dict[NodeT, int] = {}
        self._waiters: dict[int, _LeaseWaiter[NodeT]] = {}
        self.kill_watch = KillWatch(self._waiters, _let_die)

    def __contains__(self, node: NodeT) -> bool:
        return node in self._held

    def take(self, node: NodeT) -> Lease[NodeT]:
        """Lease a node that nobody has open. Raises BlockingIOError (EAGAIN) when somebody else has leased it, or is about to open it."""
        if node in self._held or node in self._entering:
            raise BlockingIOError(errno.EAGAIN, "somebody opens the file, or has leased it")
        lease = self._held[node] = Lease(node)
        return lease

    def end(self, lease: Lease[NodeT]) -> None:
        """Give a lease back, or break it; again: does nothing."""
        if self._held.get(lease.node) is lease:
            del self._held[lease.node]
            lease.ended.set()

    @contextmanager
    def entering(self, node: NodeT) -> Iterator[None]:
        """Inside, somebody is about to have the node open: it cannot be leased any more."""
        self._entering[node] = self._entering.get(node, 0) + 1
        try:
            yield
        finally:
            left = self._entering.pop(node) - 1
            if left:
                self._entering[node] = left

    async def wait(self, node: NodeT, tid: int, *, patient: bool = True) -> None:
        """Wait until the node is not leased, and go on at once where it is not.

        Raises OSError EINTR when the accessor (thread `tid`) is being killed, EIO when the mount ends, and EAGAIN instead of waiting for one
        that is not `patient` (O_NONBLOCK).
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
        """A thread is being killed: if it waits here, it is let go with EINTR."""
        for waiter in list(self._waiters.values()):
            if waiter.tid == tid:
                _let_go(waiter, errno.EINTR)

    def abandon(self) -> None:
        """The mount ends: whoever waits fails with EIO."""
        for waiter in list(self._waiters.values()):
            _let_go(waiter, errno.EIO)

    def describe(self, path_of: Callable[[NodeT], bytes]) -> list[dict[str, object]]:
        """The leases, and how many wait for each: JSON-able objects."""
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
    """End the wait of an accessor that is being killed; whether it is."""
    if not waiter.tid or not proc.is_being_killed(waiter.tid):
        return False
    _let_go(waiter, errno.EINTR)
    return True


class Lessor:
    """One mount's. `drop` makes the kernel forget what it has cached of a node, `drop_attributes_soon` begins with the attributes; `forget`
    takes back a reference to the node of an id."""

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
        """Lease a file, as F_SETLEASE does with F_WRLCK: nobody has it open or mapped, nothing of it is cached, and who opens or truncates
        it waits. Also returns a descriptor of its content on the backing, for reading and writing, which is the caller's to close.

        An open file is closed for us only when it is mapped nowhere, and nothing is being read or written for it any more, so that to know
        the open files is enough. Raises OSError EAGAIN while anybody has it open, here or on the backing; EINVAL where it is no regular file;
        EOPNOTSUPP where the kernel does not tell of opens.
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
            raise BlockingIOError(errno.EAGAIN, "somebody has the file open or mapped")
        lease = self._leases.take(node)
        # Or the kernel could forget it, and know the file as another node, which is not leased.
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
        """Its holder gives a lease back. Raises OSError ETIMEDOUT when it had been broken."""
        try:
            # No page can have come in while it stood, but attributes, which may not be true any more.
            await self._drop(lease.node)
        except OSError:
            if not lease.broken:
                raise
        finally:
            self._end(lease)
        if lease.broken:
            raise OSError(errno.ETIMEDOUT, "the lease was broken: somebody had waited for too long")

    def abandon(self, lease: Lease[Node]) -> None:
        """The holder of a lease has gone, in the middle of whatever it did."""
        self._drop_attributes_soon(lease.node)
        self._end(lease)

    def _end(self, lease: Lease[Node]) -> None:
        self._leases.end(lease)
        self._forget(lease.node.id, 1)
