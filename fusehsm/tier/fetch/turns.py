"""Threads for calls that a user can make wait, and the limits of what such calls may take.

A user who writes to a file from memory that never comes holds that file's lock in the kernel for as long as they like. lseek(2) with SEEK_DATA,
write(2), setxattr(2) and utimensat(2) of that file then wait, and nothing can interrupt them. So fetch makes such calls in threads, and limits them:

* One thread for each file. All others wait for it in the event loop, where a wait can end.
* A few threads for each owner of files. Users cannot lock the files of root for long enough to need that, but readers can, so root has more.
* A deadline for each call. The thread is left alone then, and keeps its place until the kernel lets it go.
* A share of the accesses that wait at once, for each user who waits for files that do not answer.

A store's file may be such a file, too, so the requests for one owner's files do not take all connections.
"""

import errno
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NoReturn, TypeVar, cast

import trio

from fusehsm.linux.file_io import SharedDescriptor
from fusehsm.linux.proc import user_of
from fusehsm.tier.fetch.failures import passed_over
from fusehsm.tier.stubs.mark import Key

_THREADS: Final = 8  # of the files of one user
_TRUSTED_THREADS: Final = 128  # of the files of root, or of fetch's own user
_SLOW: Final = 1.0  # seconds that a call on a file takes before the file counts as one that does not answer
_SLOW_STORE: Final = 5.0  # seconds, of a request to the store
_INTERVAL: Final = 1.0  # seconds between two looks at those who wait
_SHARE: Final = 8  # one user's part of the waiting accesses is 1/8

PATIENCE: Final = 2.0
"""Seconds for a call on a file that no access waits for, and for an open by a path."""

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Stuck(OSError):
    """A file does not answer, because another process holds its lock. The errno is the one to refuse an access with."""


@dataclass(slots=True)
class _File:
    """The calls on one file."""

    # One thread at a time.
    turn: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    # trio's time when the thread began; infinity if there is none.
    since: float = math.inf
    # trio's times when the requests to the store began that are under way.
    requests: dict[object, float] = field(default_factory=dict)
    # Number of tasks and threads that use this object.
    uses: int = 0


class User:
    """The limits of the files of one owner."""

    __slots__ = ("buffers", "connections", "prefetches", "since", "turn", "uses")

    def __init__(self, threads: int, connections: int, share: int) -> None:
        """`threads`: most calls on files at once; `connections`: most requests to the store of all owners, `share`: of this one."""
        # Calls on files.
        self.turn = trio.CapacityLimiter(threads)
        # Requests to the store.
        self.connections = trio.CapacityLimiter(share)
        # Fills that have content in memory.
        self.buffers = trio.CapacityLimiter(connections)
        # Fills for which no access waits.
        self.prefetches = trio.CapacityLimiter(max(connections // 2, 1))
        # trio's times when the calls on files began that are under way, the oldest first.
        self.since: dict[object, float] = {}
        # Number of tasks and threads that use this object.
        self.uses = 0


@dataclass(slots=True)
class _Waiting:
    """An access that waits."""

    # The process; 0 if it is in another namespace.
    pid: int
    # The file, and its owner.
    key: Key
    uid: int
    # Ends the wait.
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    # The user who has started the process, once that was asked for; -1 if it is unknown.
    user: int | None = None


class Turns:
    """The threads of a fetch for calls on files and for requests to the store, and the accesses that wait for them."""

    def __init__(self, deadline: float, denial: int, connections: int, most_waiting: int) -> None:
        """`deadline`: seconds for one call on a file; `denial`: the errno beyond it; `connections`: most requests to the store at once;
        `most_waiting`: most accesses that can wait at once."""
        self._deadline = deadline
        self._denial = denial
        self.connections = trio.CapacityLimiter(connections)
        self._share = max(most_waiting // _SHARE, 1)
        self._files: dict[Key, _File] = {}
        self._users: dict[int, User] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._trusted = {0, os.geteuid()}

    # Threads

    async def on_file(
        self,
        key: Key,
        uid: int,
        fd: int,
        path: str,
        call: Callable[[int], _T],
        patience: float | None = None,
    ) -> _T:
        """As run(), for call(descriptor). The descriptor is a copy of `fd`, which the caller may close if the call goes on alone."""
        try:
            descriptor = SharedDescriptor(os.dup(fd))
        except OSError as error:
            raise OSError(self._denial, f"cannot be used: {error.strerror}", path) from None

        def perform() -> tuple[_T] | None:
            if not descriptor.hold():
                return None  # given up before the thread began
            try:
                return (call(descriptor.number),)
            finally:
                descriptor.close()

        try:
            result = await self.run(key, uid, path, perform, patience)
        finally:
            descriptor.release()
        if result is None:
            raise self._stuck(path)
        return result[0]

    async def run(
        self, key: Key, uid: int, path: str, call: Callable[[], _T], patience: float | None = None
    ) -> _T:
        """call() in a thread, when it is the turn of the file `key` of user `uid`. `patience`: seconds, instead of the deadline.

        Raises Stuck beyond the deadline, or at once if an earlier call is beyond its own. The call, if it has begun, then goes on alone.
        """
        patience = self._deadline if patience is None else patience
        with self.using(key, uid):
            self._expect_an_answer(key, path, patience)
            with trio.move_on_after(patience):
                return await trio.to_thread.run_sync(
                    call, abandon_on_cancel=True, limiter=self._limiter(_Turn(self, key, uid))
                )
        raise self._stuck(path)

    @asynccontextmanager
    async def turn(self, key: Key, uid: int, path: str) -> AsyncIterator[None]:
        """The file's turn, for a body that must not be left alone in the middle. Raises Stuck beyond PATIENCE."""
        with self.using(key, uid):
            self._expect_an_answer(key, path, PATIENCE)
            turn, borrower = _Turn(self, key, uid), object()
            has_turn = False
            with trio.move_on_after(PATIENCE):
                await turn.acquire_on_behalf_of(borrower)
                has_turn = True
            if not has_turn:
                raise self._stuck(path)
            try:
                yield
            finally:
                turn.release_on_behalf_of(borrower)

    async def from_store(self, key: Key, uid: int, call: Callable[[], _T]) -> _T:
        """call() in a thread: a request to the store for the file `key` of user `uid`. If the task is cancelled, the thread is left alone."""
        with self.using(key, uid):
            return await trio.to_thread.run_sync(
                call, abandon_on_cancel=True, limiter=self._limiter(_Request(self, key, uid))
            )

    @contextmanager
    def using(self, key: Key, uid: int) -> Iterator[User]:
        """The limits of user `uid`, for a task about the file `key`."""
        user = self.enter(key, uid)[1]
        try:
            yield user
        finally:
            self.leave(key, uid)

    def enter(self, key: Key, uid: int) -> tuple[_File, User]:
        """Begin to use a file and its owner. Each call wants a call of leave()."""
        file, user = self._files.setdefault(key, _File()), self._users.get(uid)
        if user is None:
            total = int(self.connections.total_tokens)
            is_trusted = uid in self._trusted
            threads = _TRUSTED_THREADS if is_trusted else _THREADS
            self._users[uid] = user = User(threads, total, total if is_trusted else max(total * 3 // 4, 1))
        file.uses += 1
        user.uses += 1
        return file, user

    def leave(self, key: Key, uid: int) -> None:
        """End a use."""
        file, user = self._files[key], self._users[uid]
        file.uses -= 1
        user.uses -= 1
        if not file.uses:
            del self._files[key]
        if not user.uses:
            del self._users[uid]

    @staticmethod
    def _limiter(limiter: "_Limiter") -> trio.CapacityLimiter:
        return cast(trio.CapacityLimiter, limiter)  # trio calls no other methods

    # Those who wait

    def is_stuck(self, key: Key, uid: int) -> bool:
        """Whether the file `key` of user `uid` does not answer, or calls on other files of that owner take all threads that the owner can have."""
        now = trio.current_time()
        file, user = self._files.get(key), self._users.get(uid)
        if file is not None:
            if now - file.since > _SLOW:
                return True
            # Only who owns the store's file can keep a request to it waiting.
            if uid not in self._trusted and any(
                now - begun > _SLOW_STORE for begun in file.requests.values()
            ):
                return True
        if user is not None and user.turn.available_tokens == 0:
            return now - next(iter(user.since.values()), now) > _SLOW
        return False

    @contextmanager
    def waiting(self, pid: int, key: Key, uid: int, path: str) -> Iterator[None]:
        """A body in which an access of process `pid` waits for the file `key` of user `uid`.

        Raises Stuck, also in the middle of the body, if the process's user has more than a share of the accesses that wait for stuck files.
        """
        access = _Waiting(pid, key, uid)
        if self.is_stuck(key, uid):
            of_user = sum(
                self._user_of(other) == self._user_of(access)
                for other in self._waiting.values()
                if self.is_stuck(other.key, other.uid)
            )
            if of_user >= self._share:
                raise self._stuck(path)
        self._waiting[id(access)] = access
        try:
            with access.scope:
                yield
        finally:
            del self._waiting[id(access)]
        if access.scope.cancelled_caught:
            raise self._stuck(path)

    async def watch(self) -> None:
        """Look after those who wait. Never returns."""
        while True:
            await trio.sleep(_INTERVAL)
            with passed_over("those who wait were not looked after this time", _log):
                self._end_surplus()

    def _end_surplus(self) -> None:
        """End the waits for stuck files that are beyond their users' shares, the latest ones."""
        counts: Counter[int] = Counter()
        for access in self._waiting.values():
            if self.is_stuck(access.key, access.uid):
                user = self._user_of(access)
                counts[user] += 1
                if counts[user] > self._share:
                    access.scope.cancel()

    def _user_of(self, access: _Waiting) -> int:
        if access.user is None:
            user = user_of(access.pid) if access.pid > 0 else None
            access.user = -1 if user is None else user
        return access.user

    def _expect_an_answer(self, key: Key, path: str, patience: float) -> None:
        if trio.current_time() - self._files[key].since > patience:
            raise self._stuck(path)

    def _stuck(self, path: str) -> Stuck:
        return Stuck(self._denial, "does not answer: another process holds its lock", path)


class _Limiter:
    """A limiter for trio that stands for two: it takes the first, then the second. trio gives both back when the thread ends, also one that was left
    alone."""

    def __init__(self, turns: Turns, key: Key, uid: int) -> None:
        self._turns = turns
        self._key = key
        self._uid = uid

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        file, user = self._turns.enter(self._key, self._uid)
        first, second = self._limiters(file, user)
        try:
            await first.acquire_on_behalf_of(borrower)
            try:
                await second.acquire_on_behalf_of(borrower)
            except BaseException:
                first.release_on_behalf_of(borrower)
                raise
        except BaseException:
            self._turns.leave(self._key, self._uid)
            raise
        self._began(file, user, borrower)

    def release_on_behalf_of(self, borrower: object) -> None:
        file, user = self._turns.enter(self._key, self._uid)
        self._ended(file, user, borrower)
        for limiter in reversed(self._limiters(file, user)):
            limiter.release_on_behalf_of(borrower)
        for _ in range(2):  # for the uses that began here and in acquire_on_behalf_of()
            self._turns.leave(self._key, self._uid)

    def _limiters(self, file: _File, user: User) -> tuple[trio.CapacityLimiter, trio.CapacityLimiter]:
        raise NotImplementedError

    def _began(self, file: _File, user: User, borrower: object) -> None:
        raise NotImplementedError

    def _ended(self, file: _File, user: User, borrower: object) -> None:
        raise NotImplementedError


class _Turn(_Limiter):
    """The limiter of a call on a file: the file's thread, then one of its owner's."""

    def _limiters(self, file: _File, user: User) -> tuple[trio.CapacityLimiter, trio.CapacityLimiter]:
        return file.turn, user.turn

    def _began(self, file: _File, user: User, borrower: object) -> None:
        file.since = user.since[borrower] = trio.current_time()

    def _ended(self, file: _File, user: User, borrower: object) -> None:
        file.since = math.inf
        del user.since[borrower]


class _Request(_Limiter):
    """The limiter of a request to the store: one of the owner's connections, then one of all."""

    def _limiters(self, file: _File, user: User) -> tuple[trio.CapacityLimiter, trio.CapacityLimiter]:
        return user.connections, self._turns.connections

    def _began(self, file: _File, user: User, borrower: object) -> None:
        file.requests[borrower] = trio.current_time()

    def _ended(self, file: _File, user: User, borrower: object) -> None:
        del file.requests[borrower]


class Stalled(Exception):
    """A call in a thread has not gone on for a time."""


async def watched(call: Callable[[], _T], pulse: Callable[[], object], patience: float) -> _T:
    """call() in a thread, as long as it goes on: pulse() must return another value each time that `patience` seconds have passed.

    Raises Stalled if it does not. The thread then goes on alone.
    """
    results: list[Callable[[], _T]] = []
    async with trio.open_nursery() as nursery:

        async def perform() -> None:
            try:
                value = await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=_NO_LIMIT)
            except Exception as error:
                results.append(partial(_raise, error))
            else:
                results.append(lambda: value)
            nursery.cancel_scope.cancel()

        nursery.start_soon(perform)
        last: object = None
        while (now := pulse()) != last:
            last = now
            await trio.sleep(patience)
        nursery.cancel_scope.cancel()
    if not results:
        raise Stalled
    return results[0]()


async def opened(call: Callable[[], int], path: str) -> int:
    """The descriptor that call() opens, in a thread. Raises OSError EBUSY if it takes too long. The descriptor is closed then."""
    lock = threading.Lock()
    descriptors: list[int] = []
    is_wanted = True

    def perform() -> None:
        fd = call()
        with lock:
            if is_wanted:
                descriptors.append(fd)
                return
        os.close(fd)

    done = False
    try:
        with trio.move_on_after(PATIENCE):
            await trio.to_thread.run_sync(perform, abandon_on_cancel=True, limiter=_NO_LIMIT)
            done = True
    finally:
        with lock:
            is_wanted = done
            if not done:
                for fd in descriptors:
                    os.close(fd)
    if not done:
        raise OSError(errno.EBUSY, "does not answer: another process holds its lock", path)
    return descriptors[0]


def _raise(error: Exception) -> NoReturn:
    raise error


class _NoLimit:
    """A limiter without a limit: the callers have limits of their own."""

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        pass

    def release_on_behalf_of(self, borrower: object) -> None:
        pass


_NO_LIMIT: Final = cast(trio.CapacityLimiter, _NoLimit())
