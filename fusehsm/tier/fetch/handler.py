"""The handler of `fusehsm fetch`: fills the range of an access, then lets the access go on, or refuses it with an errno.

All accesses that wait for a block wait for the same fill. The fill goes on if their accessors are killed. Content that a store delivers after the
accesses have been refused is thrown away.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
from fusehsm.tier.fetch.catalog import Catalog, Origin, below, suspicion, where
from fusehsm.tier.fetch.failures import BackOff, RateLimiter
from fusehsm.tier.fetch.readahead import Streams
from fusehsm.tier.fetch.served import Fill, Served, overlap
from fusehsm.tier.fetch.turns import Stuck, Turns
from fusehsm.tier.stores.base import Store, StoreChanged, shorter
from fusehsm.tier.stubs.content import extents_of
from fusehsm.tier.stubs.mark import Key, key_of
from fusehsm.tier.stubs.stub import InDoubt, StubFile, Unbelieved, mark_of
from fusehsm.tier.stubs.tree import Namespace, Tree

_IGNORE = FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY | FAN_MARK_EVICTABLE
_CHANGES = FAN_MODIFY | FAN_CLOSE_WRITE
# Errors of the destination's disk that a later try does not fix. The accessor gets them unchanged.
_FINAL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS))
_AT_ONCE = 16  # fills of one access at the same time
_COMPLAINT_INTERVAL = 5.0  # seconds between two log lines about the store


_log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings of a fetcher."""

    # Bytes.
    block_size: int = 1 << 20
    # Bytes: the largest window that is fetched ahead of a reader.
    prefetch_window: int = 32 << 20
    # Bytes: the most that one fill reads in one request.
    span: int = 4 << 20
    # Seconds for the attempts of one fill.
    deadline: float = 60.0
    # Errno of a refused access when the store does not answer.
    denial: int = errno.EIO
    # Bytes a second, None without limit.
    rate: int | None = None
    # Most requests at once.
    connections: int = 16
    # Events of a complete file before its events are ignored.
    ignore_after: int = 0
    # Most accesses that wait at once.
    handlers: int = 1000
    # Files to remember, beside those that are being used or have a record to close.
    most_known: int = 4096


@dataclass(slots=True)
class Totals:
    """The counts of a run."""

    # Events of regular files.
    events: int = 0
    # Successful requests to the store.
    requests: int = 0
    # Bytes read from the store.
    fetched: int = 0
    # Bytes written to stubs.
    filled: int = 0
    # Bytes read from the store before an access asked for them.
    prefetched: int = 0
    # Attempts that failed and were repeated.
    retries: int = 0
    # Refused accesses.
    denied: int = 0
    # Files that became complete.
    completed: int = 0


class Fetcher:
    """The event handler (fusehsm.serve). Its tasks run in `nursery`."""

    def __init__(
        self,
        store: Store,
        destination: str,
        tree: Tree,
        policy: Policy,
        nursery: trio.Nursery,
        touched: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """`destination`: the absolute path with which the events' paths begin; `touched(path, offset, end)`: called for each access, in bytes."""
        self.totals = Totals()
        self.group: Group | None = None
        self.policy = policy
        self.served: dict[Key, Served] = {}
        self.filled = trio.Event()  # set after each fill, then replaced; --max-size waits for it
        self.under_way: dict[Fill, StubFile] = {}  # fills that run, the oldest first
        self._store = store
        self._catalog = Catalog(store)
        self._destination = destination
        self.tree = tree
        self._nursery = nursery
        self._touched = touched
        self._allowance = RateLimiter(policy.rate)
        self.turns = Turns(policy.deadline, policy.denial, policy.connections, policy.handlers)
        self._own_pid = os.getpid()
        # Only root asks the store with more rights than the user of a file has.
        self._is_root = os.geteuid() == 0
        self._quiet_until = 0.0
        self._has_complained_of_old = False
        self._forget_at = 0  # size of `served` at which to forget files

    # Events

    async def __call__(self, event: Event) -> None:
        """Return when the event's range is here. Raises OSError to refuse the access."""
        if event.pid == self._own_pid and not event.mask & event.dialect.permission:
            return  # our own writes are no modification
        status = os.fstat(event.fd)
        if not stat.S_ISREG(status.st_mode):
            return
        self.totals.events += 1
        try:
            await self._serve(event, status)
        except OSError as error:
            self.totals.denied += 1
            if not isinstance(error, Unbelieved):
                raise
            self._complain_of_old(error)
            raise OSError(self.policy.denial, error.strerror, error.filename) from None

    async def _serve(self, event: Event, status: os.stat_result) -> None:
        key = key_of(event.fd, status)
        served = self.served.get(key) or await self._meet(key, event, status)
        served.uid = status.st_uid
        served.is_removed = not status.st_nlink
        file = served.file
        if file is None:
            await self._ignore(served, event.fd, event.dialect.pre_content | _CHANGES)
            return
        served.active += 1  # before the first wait: it must not be forgotten
        try:
            while served.evicting is not None:
                await served.evicting.wait()
            await self._serve_stub(served, file, event, status)
        finally:
            served.active -= 1
            self._forget_removed(served)

    def _forget_removed(self, served: Served) -> None:
        if served.is_removed and served.may_be_forgotten:
            self.served.pop(served.key, None)

    async def _serve_stub(self, served: Served, file: StubFile, event: Event, status: os.stat_result) -> None:
        file.used_ns = time.time_ns()
        is_change = event.mask & FAN_MODIFY or (event.mask & FAN_CLOSE_WRITE and file.may_hide_changes)
        is_first = is_change and not file.modified
        if is_first:
            file.modified = True  # at once: an eviction that begins now must see it
        if status.st_size != file.size or file.unrecorded:
            await self._on_file(served, event, file.look)
        if is_change:
            if is_first:
                await self._record_modification(served, file, event)
            await self._ignore(served, event.fd, _CHANGES)
        if event.offset is None or event.count is None or not event.mask & event.dialect.permission:
            return
        # The event of a clone of a whole file has the empty range at 0.
        end = min(event.offset + event.count or file.limit, file.limit)
        await self.recall(served, event, event.offset, end)
        if file.is_complete:
            served.idle_events += 1
            if served.idle_events > self.policy.ignore_after:
                # Also if it was ignored before: the kernel drops the (evictable) mark together with the inode.
                served.idle_events = 0
                served.ignored &= ~event.dialect.pre_content
                await self._ignore(served, event.fd, event.dialect.pre_content)

    async def _record_modification(self, served: Served, file: StubFile, event: Event) -> None:
        is_write = bool(event.mask & FAN_MODIFY)
        try:
            await self._on_file(served, event, lambda fd: file.user_modified(fd, is_write))
        except Stuck:
            file.unrecorded = True  # the next access records it
            raise

    async def _on_file(self, served: Served, event: Event, call: Callable[[int], _T]) -> _T:
        """call(descriptor) in a thread, for an access, or another event, that waits for it. Raises Stuck."""
        path = "" if served.file is None else served.file.path
        with self.turns.waiting(event.pid, served.key, served.uid, path):
            return await self.turns.on_file(served.key, served.uid, event.fd, path, call)

    async def _meet(self, key: Key, event: Event, status: os.stat_result) -> Served:
        path = (
            below(self._destination, event.path.removesuffix(" (deleted)" if not status.st_nlink else ""))
            or ""
        )
        if mark_of(event.fd, status, path, self.tree) is None:
            # Reading an attribute waits for no lock that a user can hold. Most files that users make take no thread.
            return self._add(Served(key, status.st_uid, None))
        with self.turns.waiting(event.pid, key, status.st_uid, path):
            return await self.meet(key, status.st_uid, event.fd, path)

    async def meet(self, key: Key, uid: int, fd: int, path: str, patience: float | None = None) -> Served:
        """The Served of a file of user `uid` at `path` below the destination, made at the first call. `patience`: seconds, instead of the deadline.

        Raises as StubFile.recover(), and Stuck.
        """

        def recover(fd: int) -> StubFile | None:
            return StubFile.recover(fd, path, self.tree, self.policy.block_size)

        served = self.served.get(key)
        if served is None:
            file = await self.turns.on_file(key, uid, fd, path, recover, patience)
            served = self.served.get(key)  # another task may have been faster
            if served is None:
                served = self._add(Served(key, uid, file))
                if file is not None:
                    served.streams = Streams(file.block_size, self.policy.prefetch_window)
        return served

    def _add(self, served: Served) -> Served:
        """Remember what is known of an inode, and forget others that need not be known: whoever makes files must not fill our memory."""
        present = self.served.setdefault(served.key, served)
        surplus = len(self.served) - self.policy.most_known
        if surplus > 0 and len(self.served) >= self._forget_at:
            idle = [other for other in self.served.values() if other.may_be_forgotten]
            for other in idle[: surplus + self.policy.most_known // 8]:
                if other is not present:
                    del self.served[other.key]
            # If nearly all is needed, the next look is not made at the next file already.
            self._forget_at = len(self.served) + self.policy.most_known // 8
        return present

    async def _ignore(self, served: Served, fd: int, mask: int) -> None:
        """Ignore these kinds of events of a file for which no fetch is necessary. An access then costs no more than with any file."""
        if self.group is None or mask & ~served.ignored == 0:
            return
        served.ignored |= mask
        try:
            await self.group.mark(_IGNORE, served.ignored, fd)
        except OSError as error:  # the file is only slower
            _log.debug("no ignore mark: %s", error.strerror)

    # Content

    async def recall(self, served: Served, event: Event, offset: int, end: int) -> None:
        """Return when [offset, end), in bytes, is here. Raises the OSError to refuse an access with."""
        file, fd = served.file, event.fd
        assert file is not None
        if self._touched is not None:
            self._touched(file.path, offset, end)
        # In portions: a mapping may need more fills than there are descriptors.
        most = max(_AT_ONCE * self.policy.span // file.block_size, 1)
        missing = file.missing(offset, end, most + 1)
        if missing and file.unexplained:
            await self._expect_no_holes(served, event, offset, end)
            return
        ahead = end, end
        if served.streams is not None:
            ahead = served.streams.note(offset, end)
        while missing:
            waits = self._start(served, fd, missing[:most], is_prefetch=False)
            if len(missing) <= most:
                self._prefetch(served, fd, *ahead)
            with self.turns.waiting(event.pid, served.key, served.uid, file.path):
                await self._wait(waits)
            missing = file.missing(offset, end, most + 1)
            if missing and file.unexplained:
                await self._expect_no_holes(served, event, offset, end)
                return
        self._prefetch(served, fd, *ahead)

    async def _expect_no_holes(self, served: Served, event: Event, offset: int, end: int) -> None:
        file = served.file
        assert file is not None
        status = os.fstat(event.fd)
        times = status.st_mtime_ns, status.st_ctime_ns
        # A refusal holds until the file changes. Otherwise each access to the same hole would take a thread.
        if served.doubt is None or served.doubt_times != times or not overlap(served.doubt, (offset, end)):
            served.doubt = await self._on_file(served, event, lambda fd: file.doubt(fd, offset, end))
            served.doubt_times = times
        if served.doubt is None:
            return
        if not served.complained:
            served.complained = True
            _log.error(
                "%s: was changed while no fetch served it, so the rest of it cannot be fetched; save what you need of it, remove it, populate again",
                file.path,
            )
        raise OSError(errno.EIO, "was changed while no fetch served it", file.path)

    def _start(self, served: Served, fd: int, missing: Sequence[int], *, is_prefetch: bool) -> set[Fill]:
        """The fills of these blocks: those under way, and new ones, which are started. Raises OSError EIO if there is no descriptor."""
        fills = {served.fills[block] for block in missing if block in served.fills}
        if not is_prefetch:
            for fill in fills:
                fill.demand(self.policy.deadline)
        file = served.file
        assert file is not None
        most = max(self.policy.span // file.block_size, 1)
        for first, end in extents_of([block for block in missing if block not in served.fills], most):
            fill = Fill(first, end, is_prefetch=is_prefetch)
            try:
                own_fd = os.dup(fd)
            except OSError as error:
                if is_prefetch or fills:
                    break  # the caller asks again when these have ended
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

    async def _wait(self, fills: set[Fill]) -> None:
        for fill in fills:
            await fill.done.wait()
            if fill.error is not None:
                raise fill.error

    async def _carry_out(self, served: Served, fd: int, fill: Fill) -> None:
        assert served.file is not None
        self.under_way[fill] = served.file
        try:
            with self.turns.using(served.key, served.uid) as user:
                async with fill.turn(user.prefetches):
                    size = (
                        min(fill.end * served.file.block_size, served.file.limit)
                        - fill.first * served.file.block_size
                    )
                    # Outside the deadline, which is for the store: the user wants this delay.
                    if wait := self._allowance.take(max(size, 0)):
                        await trio.sleep(wait)
                    await self._try_until_deadline(served, fd, fill)
        except OSError as error:
            fill.error = error
        except Exception:
            # A bug of ours or of a store's library must not end the serving.
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
            self._forget_removed(served)

    async def _try_until_deadline(self, served: Served, fd: int, fill: Fill) -> None:
        back_off = BackOff()
        file = served.file
        assert file is not None
        failure: OSError | None = None
        with fill.attempts(self.policy.deadline):
            while True:
                try:
                    await self._transfer(served, fd, fill)
                    return
                except Stuck as error:
                    self._complain(served, error)
                    raise
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
                    break  # an access that wants it tries again
                self.totals.retries += 1
                self._warn(failure)
                await trio.sleep(back_off.wait())
        why = "does not answer" if failure is None else where(failure)
        if not fill.is_prefetch:
            self._complain(
                served, OSError(errno.EIO, f"given up after {self.policy.deadline:g} s: {why}", file.path)
            )
        raise OSError(self.policy.denial, why, file.path)

    async def _transfer(self, served: Served, fd: int, fill: Fill) -> None:
        file = served.file
        assert file is not None
        written = fetched = 0
        try:
            with self.turns.using(served.key, served.uid) as user:
                # Content in memory is limited for each owner: a file that does not answer keeps it there.
                async with user.buffers:
                    # A later attempt goes on where an earlier one has failed.
                    start = fill.first * file.block_size + fill.filled
                    end = min(fill.end * file.block_size, file.limit)
                    for place in range(start, end, self.policy.span):
                        part = place, min(place + self.policy.span, end)
                        count, length = await self._fill_part(served, file, fd, fill, part)
                        written += count
                        fetched += length
                        self.totals.requests += 1
                        fill.filled += part[1] - part[0]
        except trio.Cancelled:
            fill.abandoned = True
            raise
        self.totals.fetched += fetched
        self.totals.filled += written
        if fill.is_prefetch:
            self.totals.prefetched += fetched
        if file.is_complete:
            self.totals.completed += 1
        self.filled.set()
        self.filled = trio.Event()

    async def _fill_part(
        self, served: Served, file: StubFile, fd: int, fill: Fill, part: tuple[int, int]
    ) -> tuple[int, int]:
        """Fetch a part (start, end) of a fill, in bytes: a block may be larger than what is kept in memory. Returns the bytes written and fetched."""
        pieces = await self._ask_store(served, fd, part)
        written = await self.turns.on_file(
            served.key,
            served.uid,
            fd,
            file.path,
            lambda fd: file.fill(fd, fill.first, fill.end, pieces, lambda: not fill.abandoned, part),
        )
        return written, sum(len(data) for _, data in pieces)

    async def _ask_store(self, served: Served, fd: int, part: tuple[int, int]) -> list[tuple[int, bytes]]:
        # If the store hangs, the thread is abandoned. So it has a descriptor of its own.
        descriptor = SharedDescriptor(os.dup(fd))
        try:
            return await self.turns.from_store(
                served.key, served.uid, lambda: self._read(served, descriptor, *part)
            )
        finally:
            descriptor.release()

    def _read(
        self, served: Served, descriptor: SharedDescriptor, start: int, end: int
    ) -> list[tuple[int, bytes]]:
        """The content of [start, end), in bytes, as (offset, data)."""
        if not descriptor.hold():
            return []
        try:
            file = served.file
            assert file is not None
            end = min(end, file.limit)
            if start >= end:
                return []  # truncated meanwhile
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
            self._expect_no_forgery(descriptor.number, file, origin)  # its owner may have changed meanwhile
            return pieces
        finally:
            descriptor.close()

    def _expect_no_forgery(self, fd: int, file: StubFile, origin: Origin) -> None:
        # A mark in trusted.* is root's, so it may name any file of the store.
        if file.namespace is Namespace.TRUSTED or not self._is_root:
            return
        if (why := suspicion(os.fstat(fd), origin)) is not None:
            raise _Suspicious(self.policy.denial, why, file.path)

    def _complain_of_old(self, error: Unbelieved) -> None:
        # Once: a whole tree may have such marks.
        if not self._has_complained_of_old:
            self._has_complained_of_old = True
            _log.error("%s", where(error))

    def _complain(self, served: Served, error: OSError) -> None:
        if not served.complained:
            served.complained = True
            _log.error("%s", where(error))

    def _warn(self, error: OSError) -> None:
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _COMPLAINT_INTERVAL
            _log.warning("trying again: %s", where(error))


class _Suspicious(OSError):
    """A mark may be forged, so the file must not be filled. strerror is "cause; fix"."""
