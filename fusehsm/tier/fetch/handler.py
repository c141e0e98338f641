"""The handler of `fusehsm fetch`: fills what an access is about to touch, then lets it go on, or refuses it with an errno.

Everybody who waits for a block waits for the same fill; it goes on when those who wanted it are killed, and what a store delivers after everybody
has been refused is thrown away.
"""

import contextlib
import errno
import logging
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import trio

from fusehsm.backends.base import Group
from fusehsm.events import Event
from fusehsm.fanotify.abi import (
    FAN_CLOSE_WRITE,
    FAN_MARK_ADD,
    FAN_MARK_EVICTABLE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MODIFY,
)
from fusehsm.linux.file_io import SharedDescriptor
from fusehsm.tier.fetch.catalog import Catalog, Origin, below, where
from fusehsm.tier.fetch.readahead import Streams
from fusehsm.tier.fetch.retry import BackOff, RateLimiter
from fusehsm.tier.fetch.suspicion import suspicion
from fusehsm.tier.stores.base import Store, StoreChanged, shorter
from fusehsm.tier.stubs.extents import extents_of
from fusehsm.tier.stubs.identity import Key, key_of
from fusehsm.tier.stubs.stub import InDoubt, StubFile

_IGNORE = FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY | FAN_MARK_EVICTABLE
_CHANGES = FAN_MODIFY | FAN_CLOSE_WRITE
# What waiting does not mend. ENOSPC and EDQUOT are of the destination's disk and are told as they are.
_FINAL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS))
_AT_ONCE = 16  # fills of one access
_COMPLAINT_INTERVAL = 5.0  # seconds between two lines about the same store


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """`block_size`, `prefetch_window` and `span` (the most that one request asks for ahead of a reader) in bytes, `deadline` in seconds, `rate` in
    bytes a second or None; `denial`: the errno when a store does not answer; `connections`: requests at once; `ignore_after`: events of a complete
    file before no more are asked for."""

    block_size: int = 1 << 20
    prefetch_window: int = 32 << 20
    span: int = 4 << 20
    deadline: float = 60.0
    denial: int = errno.EIO
    rate: int | None = None
    connections: int = 16
    ignore_after: int = 0


@dataclass(slots=True)
class Totals:
    """What a run has done. `fetched`: bytes read from the store; `filled`: bytes written to stubs; `prefetched`: bytes nobody had asked for yet."""

    events: int = 0
    requests: int = 0
    fetched: int = 0
    filled: int = 0
    prefetched: int = 0
    retries: int = 0
    denied: int = 0
    completed: int = 0


class _Fill:
    """Blocks [first, end) of a file on their way, for somebody who waits or as a prefetch. `error`: what to refuse with, once `done`.
    `abandoned`: nobody wants it any more."""

    __slots__ = ("_attempts", "_queue", "abandoned", "done", "end", "error", "first", "is_prefetch")

    def __init__(self, first: int, end: int, *, is_prefetch: bool) -> None:
        self.first = first
        self.end = end
        self.is_prefetch = is_prefetch
        self.done = trio.Event()
        self.error: OSError | None = None
        self.abandoned = False
        self._queue: trio.CancelScope | None = None
        self._attempts: trio.CancelScope | None = None

    @contextlib.asynccontextmanager
    async def turn(self, prefetches: trio.CapacityLimiter) -> AsyncIterator[None]:
        """A prefetch's turn among the others; at once when somebody comes to want it."""
        has_turn = False
        with trio.CancelScope() as self._queue:
            if self.is_prefetch:
                await prefetches.acquire_on_behalf_of(self)
                has_turn = True
        self._queue = None
        try:
            yield
        finally:
            if has_turn:
                prefetches.release_on_behalf_of(self)

    def attempts(self, deadline: float) -> trio.CancelScope:
        """What bounds the attempts to that many seconds."""
        self._attempts = trio.move_on_after(deadline)
        return self._attempts

    def demand(self, deadline: float) -> None:
        """Somebody wants it, and waits for so many seconds from now."""
        if not self.is_prefetch:
            return
        self.is_prefetch = False
        if self._queue is not None:
            self._queue.cancel()
        if self._attempts is not None:
            self._attempts.deadline = trio.current_time() + deadline


@dataclass(slots=True)
class Served:
    """What the fetcher knows of one inode. `file` is None for what is no stub: it is the user's own. `origin`, `version`: of the store's file, once
    they were asked for. `ignored`: the events of which it wants none.
    `idle_events`: those for which nothing was left to be fetched. `evicting` is there while its content is being taken away: accesses wait for it."""

    file: StubFile | None
    streams: Streams | None = None
    origin: Origin | None = None
    version: str | None = None
    fills: dict[int, _Fill] = field(default_factory=dict)
    ignored: int = 0
    active: int = 0  # accesses that are being answered
    idle_events: int = 0
    evicting: trio.Event | None = None
    complained: bool = False


class Fetcher:
    """An event handler (fusehsm.serve). Its tasks run in `nursery`."""

    def __init__(
        self,
        store: Store,
        destination: str,
        place: bytes,
        policy: Policy,
        nursery: trio.Nursery,
        touched: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """`destination`: the absolute path that events' paths begin with; `place`: tier/stubs/identity.py; `touched(path, offset, end)` hears
        what is asked for."""
        self.totals = Totals()
        self.group: Group | None = None
        self.policy = policy
        self.served: dict[Key, Served] = {}
        self.filled = trio.Event()  # set when there is more, then replaced: for those who watch the size
        self.under_way: dict[_Fill, StubFile] = {}  # the oldest first
        self._store = store
        self._catalog = Catalog(store)
        self._destination = destination
        self.place = place
        self._nursery = nursery
        self._touched = touched
        self._allowance = RateLimiter(policy.rate)
        self._threads = trio.CapacityLimiter(policy.connections)
        self._prefetches = trio.CapacityLimiter(max(policy.connections // 2, 1))
        self._own_pid = os.getpid()
        # Who is not root asks the store with no more than the own rights.
        self._is_root = os.geteuid() == 0
        self._quiet_until = 0.0
        self._meeting = threading.Lock()

    # Events

    async def __call__(self, event: Event) -> None:
        """Return when what the event is about is here; an OSError refuses it."""
        if event.pid == self._own_pid and not event.mask & event.dialect.permission:
            return  # what we do is no modification
        status = os.fstat(event.fd)
        if not stat.S_ISREG(status.st_mode):
            return
        self.totals.events += 1
        try:
            await self._serve(event, status)
        except OSError:
            self.totals.denied += 1
            raise

    async def _serve(self, event: Event, status: os.stat_result) -> None:
        key = key_of(event.fd, status)
        served = self.served.get(key) or self._meet(key, event, status)
        file = served.file
        if file is None:
            await self._ignore(served, event.fd, event.dialect.pre_content | _CHANGES)
            return
        while served.evicting is not None:
            await served.evicting.wait()
        served.active += 1
        try:
            await self._serve_stub(served, file, event, status)
        finally:
            served.active -= 1

    async def _serve_stub(self, served: Served, file: StubFile, event: Event, status: os.stat_result) -> None:
        file.used_ns = time.time_ns()
        if status.st_size != file.size or file.unrecorded:
            await trio.to_thread.run_sync(file.look, event.fd)
        if event.mask & FAN_MODIFY or (event.mask & FAN_CLOSE_WRITE and file.may_hide_changes):
            if not file.modified:
                file.modified = True  # at once: whoever is about to evict it must know
                await trio.to_thread.run_sync(file.user_modified, event.fd, bool(event.mask & FAN_MODIFY))
            await self._ignore(served, event.fd, _CHANGES)
        if event.offset is None or event.count is None or not event.mask & event.dialect.permission:
            return
        # A clone of a whole file is announced as the empty range at 0.
        end = min(event.offset + event.count or file.limit, file.limit)
        await self.recall(served, event.fd, event.offset, end)
        if file.is_complete:
            served.idle_events += 1
            if served.idle_events > self.policy.ignore_after:
                # Again where that was done before: the mark has gone with an inode that the kernel had no room for.
                served.idle_events = 0
                served.ignored &= ~event.dialect.pre_content
                await self._ignore(served, event.fd, event.dialect.pre_content)

    def _meet(self, key: Key, event: Event, status: os.stat_result) -> Served:
        path = below(self._destination, event.path.removesuffix(" (deleted)" if not status.st_nlink else ""))
        return self.meet(key, event.fd, path or "")

    def meet(self, key: Key, fd: int, path: str) -> Served:
        """What is known of a file, from now on, seen at `path` below the destination. From any thread: an inode must never be known twice."""
        with self._meeting:
            served = self.served.get(key)
            if served is None:
                file = StubFile.recover(fd, path, self.place, self.policy.block_size)
                served = Served(file)
                if file is not None:
                    served.streams = Streams(file.block_size, self.policy.prefetch_window)
                self.served[key] = served
            return served

    async def _ignore(self, served: Served, fd: int, mask: int) -> None:
        """Have no events of these kinds any more of what nothing will be fetched for: it then costs no more than any file."""
        if self.group is None or mask & ~served.ignored == 0:
            return
        served.ignored |= mask
        try:
            await self.group.mark(_IGNORE, served.ignored, fd)
        except OSError as error:  # only slower
            _log.debug("no ignore mark: %s", error.strerror)

    # Content

    async def recall(self, served: Served, fd: int, offset: int, end: int) -> None:
        """Return when [offset, end) is here. Raises OSError with what to refuse an access with."""
        file = served.file
        assert file is not None
        if self._touched is not None:
            self._touched(file.path, offset, end)
        missing = file.missing(offset, end)
        if missing and file.unexplained:
            self._expect_no_holes(served, fd, offset, end)
            return
        ahead = end, end
        if served.streams is not None:
            ahead = served.streams.note(offset, end)
        # A mapping may be larger than what there are descriptors for.
        most = max(_AT_ONCE * self.policy.span // file.block_size, 1)
        while missing:
            waits = self._start(served, fd, missing[:most], is_prefetch=False)
            if len(missing) <= most:
                self._prefetch(served, fd, *ahead)
            await self._wait(waits)
            missing = file.missing(offset, end)
            if missing and file.unexplained:
                self._expect_no_holes(served, fd, offset, end)
                return
        self._prefetch(served, fd, *ahead)

    def _expect_no_holes(self, served: Served, fd: int, offset: int, end: int) -> None:
        file = served.file
        assert file is not None
        if not file.lacks(fd, offset, end):
            return
        if not served.complained:
            served.complained = True
            _log.error(
                "%s: was changed while nobody served it, so what it lacks cannot be read; save what you need of it, remove it, populate again",
                file.path,
            )
        raise OSError(errno.EIO, "was changed while nobody served it", file.path)

    def _start(self, served: Served, fd: int, missing: Sequence[int], *, is_prefetch: bool) -> set[_Fill]:
        """The fills of these blocks, those that are on their way already and new ones."""
        fills = {served.fills[block] for block in missing if block in served.fills}
        if not is_prefetch:
            for fill in fills:
                fill.demand(self.policy.deadline)
        file = served.file
        assert file is not None
        most = max(self.policy.span // file.block_size, 1)
        for first, end in extents_of([block for block in missing if block not in served.fills], most):
            fill = _Fill(first, end, is_prefetch=is_prefetch)
            try:
                own_fd = os.dup(fd)
            except OSError as error:
                if is_prefetch or fills:
                    break  # more when these have come
                raise OSError(errno.EIO, f"cannot be filled: {error.strerror}", file.path) from None
            for block in range(first, end):
                served.fills[block] = fill
            fills.add(fill)
            self._nursery.start_soon(self._carry_out, served, own_fd, fill)
        return fills

    def _prefetch(self, served: Served, fd: int, offset: int, end: int) -> None:
        file = served.file
        assert file is not None
        missing = [block for block in file.missing(offset, end) if block not in served.fills]
        if missing:
            self._start(served, fd, missing, is_prefetch=True)

    async def _wait(self, fills: set[_Fill]) -> None:
        for fill in fills:
            await fill.done.wait()
            if fill.error is not None:
                raise fill.error

    async def _carry_out(self, served: Served, fd: int, fill: _Fill) -> None:
        assert served.file is not None
        self.under_way[fill] = served.file
        try:
            async with fill.turn(self._prefetches):
                size = (
                    min(fill.end * served.file.block_size, served.file.limit)
                    - fill.first * served.file.block_size
                )
                # Outside the deadline, which is the store's: that it takes long is the user's wish.
                if wait := self._allowance.take(max(size, 0)):
                    await trio.sleep(wait)
                await self._try_until_deadline(served, fd, fill)
        except OSError as error:
            fill.error = error
        except Exception:
            # A mistake of ours, or of a library that a store is made of: it must not end serving.
            _log.exception("%s: cannot be filled", served.file.path)
            fill.error = OSError(errno.EIO, "cannot be filled", served.file.path)
        finally:
            fill.abandoned = True
            del self.under_way[fill]
            os.close(fd)
            for block in range(fill.first, fill.end):
                if served.fills.get(block) is fill:
                    del served.fills[block]
            fill.done.set()

    async def _try_until_deadline(self, served: Served, fd: int, fill: _Fill) -> None:
        back_off = BackOff()
        file = served.file
        assert file is not None
        failure: OSError | None = None
        with fill.attempts(self.policy.deadline):
            while True:
                try:
                    await self._transfer(served, fd, fill)
                    return
                except (StoreChanged, InDoubt) as error:
                    self._complain(served, error)
                    raise OSError(errno.EIO, error.strerror, error.filename) from None
                except _Suspicious as error:
                    self._complain(served, error)
                    raise OSError(self.policy.denial, error.strerror, error.filename) from None
                except OSError as error:
                    if error.errno in _FINAL:
                        _log.error("%s: cannot be filled: %s", file.path, error.strerror)
                        raise
                    failure = error
                if fill.is_prefetch:
                    break  # whoever wants it will try again
                self.totals.retries += 1
                self._warn(failure)
                await trio.sleep(back_off.wait())
        why = "does not answer" if failure is None else where(failure)
        if not fill.is_prefetch:
            self._complain(
                served, OSError(errno.EIO, f"given up after {self.policy.deadline:g} s: {why}", file.path)
            )
        raise OSError(self.policy.denial, why, file.path)

    async def _transfer(self, served: Served, fd: int, fill: _Fill) -> None:
        # The thread may be left alone with a store that hangs: it has a descriptor of its own then.
        descriptor = SharedDescriptor(os.dup(fd))
        try:
            written, fetched = await trio.to_thread.run_sync(
                self._read_and_fill,
                served,
                descriptor,
                fill,
                abandon_on_cancel=True,
                limiter=self._threads,
            )
        except trio.Cancelled:
            fill.abandoned = True
            raise
        finally:
            descriptor.release()
        self.totals.requests += 1
        self.totals.fetched += fetched
        self.totals.filled += written
        if fill.is_prefetch:
            self.totals.prefetched += fetched
        file = served.file
        if file is not None and file.is_complete:
            self.totals.completed += 1
        self.filled.set()
        self.filled = trio.Event()

    def _read_and_fill(self, served: Served, descriptor: SharedDescriptor, fill: _Fill) -> tuple[int, int]:
        if not descriptor.hold():
            return 0, 0
        try:
            file = served.file
            assert file is not None
            start, end = fill.first * file.block_size, min(fill.end * file.block_size, file.limit)
            if start >= end:
                return 0, 0  # truncated meanwhile
            origin, version, data = served.origin, served.version, None
            if origin is None:
                served.origin = origin = self._catalog.origin(file.mark, file.path)
            self._expect_no_forgery(descriptor.number, file, origin)
            path = origin.path
            if version is None:
                version, data = self._catalog.version_and_range(file.mark, path, start, end - start)
                served.version = version
            if data is None:
                pieces = list(self._store.content(path, start, end - start, version))
            elif len(data) == end - start:
                pieces = [(start, data)]
            else:
                raise shorter(self._store, path)
            self._expect_no_forgery(descriptor.number, file, origin)  # it may have been given away meanwhile
            written = file.fill(descriptor.number, fill.first, fill.end, pieces, lambda: not fill.abandoned)
            return written, sum(len(data) for _, data in pieces)
        finally:
            descriptor.close()

    def _expect_no_forgery(self, fd: int, file: StubFile, origin: Origin) -> None:
        if self._is_root and (why := suspicion(os.fstat(fd), origin)) is not None:
            raise _Suspicious(self.policy.denial, why, file.path)

    def _complain(self, served: Served, error: OSError) -> None:
        if not served.complained:
            served.complained = True
            _log.error("%s", where(error))

    def _warn(self, error: OSError) -> None:
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _COMPLAINT_INTERVAL
            _log.warning("trying again: %s", where(error))


class _Suspicious(OSError):
    """A mark may be forged: the file is not to be filled, "cause; mend"."""
