"""Threads that read what an accessor can keep from being read: its memory, mappings, open files, and paths as it sees them.

Each such read may take as long as the accessor likes: its memory may be a mapping of a file system that never answers, and its mmap lock and the lock
of an epoll(7) descriptor may be held while such memory is touched. So each read has a deadline, after which the thread is left alone. A user has few
threads: when all of them hang, the other users have theirs.
"""

from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

import trio

from fusehsm.linux import proc

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")

# How long to wait for a read, with its turn; seconds.
DEADLINE: Final = 0.5
MOST_OF_A_USER: Final = 8
MOST: Final = 64


class AccessorThreads:
    """The threads of one mount."""

    def __init__(self) -> None:
        self._of_user: dict[int, trio.CapacityLimiter] = {}

    async def run(
        self, tid: int, read: Callable[[*_Arguments], _Result], *arguments: *_Arguments
    ) -> _Result | None:
        """What `read(*arguments)`, which is about thread `tid`, returns in a thread; None if it does not return in time, or all threads are stuck."""
        user = proc.user_of(tid)
        if user is None:
            return None  # the thread is gone
        limiter = self._of_user.get(user)
        if limiter is None:
            self._forget_idle()
            limiter = self._of_user[user] = trio.CapacityLimiter(MOST_OF_A_USER)
        # One who waits for a turn of the same user takes over a thread that counts already.
        if limiter.available_tokens and self._used() >= MOST:
            return None
        with trio.move_on_after(DEADLINE):
            return await trio.to_thread.run_sync(read, *arguments, abandon_on_cancel=True, limiter=limiter)
        return None

    def _used(self) -> int:
        return sum(limiter.borrowed_tokens for limiter in self._of_user.values())

    def _forget_idle(self) -> None:
        for user, limiter in list(self._of_user.items()):
            if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
                del self._of_user[user]
