"""Leases of a mount's files: while one stands, its file is open nowhere, and whoever opens or truncates it waits.

What F_SETLEASE with F_WRLCK is on the kernel's own filesystems (fcntl(2)), by the same rules: it is refused while anybody has the file open;
O_NONBLOCK fails instead of waiting; when somebody has waited for fs.lease-break-time, the lease is broken, and who held it is told so.
"""

import errno
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from fusehsm.emulator.waiting import KillWatch
from fusehsm.linux import proc as caller
from fusehsm.linux import syscalls

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
    if not waiter.tid or not caller.is_being_killed(waiter.tid):
        return False
    _let_go(waiter, errno.EINTR)
    return True
