"""Calls that send bytes through the page cache (sendfile(2), splice(2)): the next such call of the same bytes must make a READ again.

O_DIRECT on the accessor's open file does that (do_splice_read(), Linux 6.5 and later). On a file with FOPEN_DIRECT_IO the flag changes nothing else.
To set it, the mount takes a duplicate of the accessor's descriptor. Where it cannot, the page is dropped a moment after the answer.

The accessor may put another file at that number at any moment, for example one of a file system that never answers a close(2). So the file is looked
at first, without taking it, and again once it is taken. A file that was taken in error is closed in a thread. An accessor can cause such a loss on
purpose, so the threads for that are few, and a user who causes some is left to the other way for good.
"""

import fcntl
import os
from collections import OrderedDict
from contextlib import suppress
from typing import Final

import trio

from fusehsm.emulator.handles import OpenFile
from fusehsm.emulator.page_cache import StalePages
from fusehsm.linux import proc
from fusehsm.overlay.overlay import Node

# Delay before a page is dropped. The call must have had it, and the kernel does not report that. A call whose page is dropped too early asks for it
# again (docs/facts.md, section 13); each time it does, the delay grows.
_PASSING_SECONDS: Final = 0.0002
_MOST_DOUBLINGS: Final = 10
_MOST_LOSSES: Final = 3  # of a user
_MOST_CLOSING: Final = 8  # threads that close a foreign file, of all users
_MOST_LOSERS: Final = 1024  # users that are remembered


class PassingCalls:
    """The calls of one mount that pass through the page cache. `stale` drops pages."""

    def __init__(self, stale: StalePages) -> None:
        #: The mount's (major, minor), once it exists.
        self.device = (0, 0)
        self._stale = stale
        # By user: how many foreign files were taken, oldest loser first.
        self._losses: OrderedDict[int, int] = OrderedDict()
        # The users whose foreign files are being closed.
        self._closing: list[int] = []

    def keep_asking(
        self, file: OpenFile[Node], pid: int, descriptor: int, offset: int, size: int, repeats: int
    ) -> None:
        """Ensure that the next call that sends `size` bytes at `offset` asks again, although they are about to enter the page cache.

        A process's descriptor is where its call has found the file. `repeats`: how often the call has asked for its first page.
        """
        if not file.bypasses:
            file.bypasses = self._bypass(pid, descriptor, file.node.id)
        if not file.bypasses:
            delay = _PASSING_SECONDS * 2 ** min(repeats, _MOST_DOUBLINGS)
            self._stale.inval_range_later(file.node, offset, size, delay)

    def _bypass(self, pid: int, descriptor: int, inode: int) -> bool:
        """Set O_DIRECT on a process's open file, if that is the file with this inode number; returns whether it is set."""
        wanted = self.device, inode
        user = proc.user_of(pid)
        if user is None or not self._may_lose(user) or proc.file_of(pid, descriptor) != wanted:
            return False
        ours = proc.borrow(pid, descriptor)
        if ours < 0:
            return False
        is_set = False
        if proc.file_of(os.getpid(), ours) == wanted:
            with suppress(OSError):
                fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_DIRECT)
                is_set = True
            # In a thread: close(2) may send FLUSH, to this process.
            trio.lowlevel.start_thread_soon(lambda: os.close(ours), lambda outcome: None)
        else:
            self._close_foreign(ours, user)
        return is_set

    def _may_lose(self, user: int) -> bool:
        return (
            self._losses.get(user, 0) < _MOST_LOSSES
            and user not in self._closing
            and len(self._closing) < _MOST_CLOSING
        )

    def _close_foreign(self, descriptor: int, user: int) -> None:
        self._losses[user] = self._losses.pop(user, 0) + 1
        if len(self._losses) > _MOST_LOSERS:
            self._losses.popitem(last=False)
        self._closing.append(user)
        token = trio.lowlevel.current_trio_token()

        def closed(outcome: object) -> None:
            # In the thread, possibly after the end of the event loop.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._closing.remove, user)

        trio.lowlevel.start_thread_soon(lambda: os.close(descriptor), closed)
