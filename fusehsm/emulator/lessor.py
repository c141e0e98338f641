"""Granting leases of a mount's files, and taking them back: with everything that the kernel has cached of them."""

import errno
import os
from collections.abc import Awaitable, Callable

import trio

from fusehsm.emulator.handles import HandleTable
from fusehsm.emulator.leases import Lease, Leases
from fusehsm.overlay.overlay import Node, Overlay

# The kernel tells of a close(2) a moment after it: how often, and after how many seconds, to look again whether a file is still open.
_CLOSING_LOOKS, _CLOSING_SECONDS = 10, 0.005


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
        self.sees_opens = True
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
        if not self.sees_opens:
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
