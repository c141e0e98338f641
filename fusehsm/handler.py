"""The handler API: calls one function for every access. The function allows the access by returning and denies it by raising OSError.

An event costs little: the worker that finds an event also handles it, in the same task. Another worker is woken (or made) to watch the group
only when the handler first suspends. A handler that never suspends costs no task switch at all.
"""

import errno
import inspect
import logging
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, cast

import trio

from fusehsm.backends.base import Group
from fusehsm.events import Event
from fusehsm.fanotify.abi import FAN_Q_OVERFLOW
from fusehsm.linux.file_io import SharedDescriptor
from fusehsm.linux.suspension import ReadingTurn, is_cancellation, noting_suspension

AsyncHandler = Callable[[Event], Coroutine[Any, Any, None]]
Handler = AsyncHandler | Callable[[Event], Awaitable[None] | None]

_EXITS = (SystemExit, KeyboardInterrupt)
_REPORT_INTERVAL = 5.0  # seconds between two log lines about files that cannot be opened

_log = logging.getLogger(__name__)

# The errnos of read() after which the group is of no more use. Every other errno is about one event whose file could not be opened. The
# group has denied that event already.
GROUP_IS_GONE = frozenset((errno.EBADF, errno.EINVAL, errno.ENOTCONN))


async def serve(group: Group, handler: Handler, *, limit: int = 64, exits: bool = True) -> None:
    """Call `handler(event)` for every event of `group`, at most `limit` at once, until cancelled.

    A coroutine function runs as a task, any other function in a thread. A return allows the access. An OSError with an errno that fanotify can
    deny with (EPERM, EIO, EAGAIN, EBUSY, ETXTBSY, ENOSPC, EDQUOT) denies the access with it. Every other exception denies with EIO and is
    logged. SystemExit and KeyboardInterrupt deny with EIO and are raised on, unless `exits` is false: then they are failures of the handler,
    like others. serve owns the event's descriptor and closes it when the handler has finished. The handler also gets events that want no
    answer; its result has no effect on them.

    A cancellation denies with EIO the events that were read and not answered. A thread cannot be cancelled: it goes on until it ends by itself,
    and its descriptor stays open until then. Raises OSError if the group is closed or its mount is gone, ValueError for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: at least one handler must be allowed to run")
    server: _Server | None = None
    try:
        async with trio.open_nursery() as nursery:
            server = _Server(group, handler, limit, exits, nursery)
            if _is_coroutine_function(handler):
                group.offer(server.handle_offered)
            server.start_worker()
    finally:
        if server is not None:
            server.deny_the_rest()
    if server.failure is not None:
        raise server.failure


class _Server:
    def __init__(
        self, group: Group, handler: Handler, limit: int, exits: bool, nursery: trio.Nursery
    ) -> None:
        self._group = group
        self._handler = handler
        self._limit = limit
        self._exits = exits
        self._nursery = nursery
        self._handle = self._handle_as_task if _is_coroutine_function(handler) else self._handle_in_thread
        self._threads = trio.CapacityLimiter(limit)
        self._running = 0
        self._room = trio.lowlevel.ParkingLot()
        self._workers = 0
        self._turn = ReadingTurn(self.start_worker)
        self._taken: deque[Event] = deque()
        self._quiet_until = -math.inf  # monotonic seconds
        self.failure: OSError | None = None  # the reason why the group is of no more use

    def start_worker(self) -> None:
        if self._workers < self._limit:
            self._workers += 1
            self._nursery.start_soon(self._work)

    def deny_the_rest(self) -> None:
        for event in self._taken:
            self._finish(event, errno.EIO)
        self._taken.clear()

    async def _work(self) -> None:
        worker = object()
        while True:
            while self._turn.reader is not worker:
                await self._turn.wait(worker)
            event = await self._next_event()
            if event.fd < 0:
                self._report_lost(event)
            else:
                await self._handle(event)

    async def _next_event(self) -> Event:
        while not self._taken:
            try:
                await self._group.wait_readable()
                self._taken.extend(self._group.take_events())
            except BlockingIOError:
                pass  # another reader of the group took it, or its accessor was killed
            except trio.ClosedResourceError:
                await self._end(OSError(errno.EBADF, "the group is closed"))
            except OSError as error:
                if error.errno in GROUP_IS_GONE:
                    await self._end(error)
                self._report_unopened(error.errno or 0)
        return self._taken.popleft()

    def _report_lost(self, event: Event) -> None:
        if event.mask & FAN_Q_OVERFLOW:
            _log.warning(
                "the event queue overflowed: accesses were allowed without asking (FAN_UNLIMITED_QUEUE avoids it)"
            )
        else:
            self._report_unopened(-event.fd)

    def _report_unopened(self, number: int) -> None:
        # Not each: any user can lease a file of theirs, and read it again and again.
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _REPORT_INTERVAL
            report_unopened(number)

    async def _end(self, failure: OSError) -> NoReturn:
        self.failure = failure
        self._nursery.cancel_scope.cancel()
        await trio.sleep_forever()
        raise AssertionError  # not reached: the scope is cancelled

    async def _handle_as_task(self, event: Event) -> None:
        await self._handle_noting(event, self._turn.pass_on)

    async def handle_offered(self, event: Event) -> None:
        """Handle an event that the group offers without a read, in the task that waits for its answer."""
        await self._handle_noting(event, None)

    async def _handle_noting(self, event: Event, note: Callable[[], None] | None) -> None:
        error = errno.EIO
        try:
            while self._running >= self._limit:
                if note is not None:
                    note()
                    note = None
                await self._room.park()
            self._running += 1
            try:
                coroutine = cast(AsyncHandler, self._handler)(event)
                if note is None:
                    await coroutine
                else:
                    await noting_suspension(coroutine, note)
            finally:
                self._running -= 1
                if self._room:
                    self._room.unpark()
            error = 0
        except BaseException as exception:
            if self._ends_with(exception):
                raise
            error = _errno_of(exception, event)
        finally:
            self._finish(event, error)

    async def _handle_in_thread(self, event: Event) -> None:
        descriptor = SharedDescriptor(event.fd)

        def call() -> tuple[Awaitable[None] | None]:
            if not descriptor.hold():
                return (None,)  # cancelled before this thread began to run
            try:
                return (self._handler(event),)  # in a tuple: trio refuses a thread that returns a coroutine
            finally:
                descriptor.release()

        error = errno.EIO
        self._turn.pass_on()
        try:
            (result,) = await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)
            if inspect.isawaitable(result):
                await result  # a plain function around a coroutine function
            error = 0
        except BaseException as exception:
            if self._ends_with(exception):
                raise
            error = _errno_of(exception, event)
        finally:
            self._finish(event, error, descriptor.release)

    def _ends_with(self, exception: BaseException) -> bool:
        """Whether a handler's exception ends serve(), too. Its event is denied before."""
        if is_cancellation(exception):
            return True
        if isinstance(exception, BaseExceptionGroup):
            return self._exits and exception.subgroup(_EXITS) is not None
        return self._exits and isinstance(exception, _EXITS)

    def _finish(self, event: Event, error: int, close: Callable[[], None] | None = None) -> None:
        """Close the event's descriptor, then answer.

        The order has two reasons. An accessor that executes the file gets ETXTBSY while a writable descriptor is left (docs/facts.md, section 17).
        And close(2) may report that the content did not reach its disk. No event is read from the group in between, so the number cannot name
        another event yet.
        """
        try:
            if close is None:
                os.close(event.fd)
            else:
                close()
        except OSError as failure:
            # EBADF: the handler has closed it. It should not, but that does no harm.
            if failure.errno != errno.EBADF and not error:
                error = _errno_of(failure, event)
        if not event.mask & self._group.permission_events:
            return
        try:
            self._group.answer(event, error)
        except OSError as failure:
            if failure.errno not in GROUP_IS_GONE:  # the next read reports that
                _log.warning("%s: the answer was not taken: %s", event.path, failure.strerror)


def _is_coroutine_function(handler: Handler) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)


def _errno_of(exception: BaseException, event: Event) -> int:
    """The errno to deny with after a handler's exception. Logs every exception that is not a plain denial."""
    cause = exception
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]  # a nursery inside the handler wraps the exception of its one task
    if isinstance(cause, OSError) and cause.errno in event.dialect.deny_errnos:
        return cause.errno
    consequence = ", so the access is denied with EIO" if event.mask & event.dialect.permission else ""
    _log.error("%s: the handler failed%s", event.path, consequence, exc_info=exception)
    return errno.EIO


def report_unopened(number: int) -> None:
    """Log that an access was denied because its event's file could not be opened for the listener. `number`: the errno."""
    _log.warning("an access was denied: its file cannot be opened for the listener: %s", os.strerror(number))
