"""Finds the accesses behind FUSE requests: the system call behind a READ or WRITE of an armed file, with its exact range.

This module asks no listener and decides nothing. `Explainer` finds the accesses; events.py says which events they make.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fusehsm.emulator.accessor_threads import AccessorThreads
from fusehsm.emulator.handles import Direction, Grant, OpenFile
from fusehsm.events import Access, AccessKind
from fusehsm.fanotify.marks import MAIN, MountKey
from fusehsm.linux import call_mount, proc, security_modules, system_call
from fusehsm.overlay.overlay import Node

log = logging.getLogger(__name__)

# A splice(2) runs for 5,000 to 10,000 ns before it asks again for a page that was dropped too early (docs/facts.md, section 13). Before a new
# call the caller itself has run, too. splice(2) is the only such call that /proc/<tid>/io does not count.
_COMES_BACK = 15_000
# The accessing thread is not searched for in processes with more threads.
_MOST_THREADS = 256


@dataclass(slots=True)
class Accessor:
    """The thread that makes a request."""

    #: Its process.
    pid: int
    #: The thread; if it is not `certain`, the one that opened the file.
    tid: int
    #: Whether the engine has named the thread. If not, another thread of the process may be the accessor.
    certain: bool
    #: The system call that a certain thread waits in; None where it was not looked up.
    call: system_call.SystemCall | None = None

    @property
    def known_tid(self) -> int:
        """The thread, 0 when it is not known."""
        return self.tid if self.certain else 0


@dataclass(slots=True)
class Explanation:
    """The accesses behind one request."""

    #: In order; empty when an earlier event of the same call or mapping covered the request.
    accesses: tuple[Access, ...]
    #: The accessing thread, 0 when it is not known.
    tid: int
    #: Which way the bytes go.
    direction: Direction
    #: The grant to remember for (`tid`, `direction`) when the accesses are allowed.
    grant: Grant | None = None
    #: Byte ranges [start, end) that a mapping will touch without further events.
    announces: tuple[tuple[int, int], ...] = ()
    #: The system call that the accessor waits in; None where it was not looked up.
    call: system_call.SystemCall | None = None
    #: Whether the bytes go into the page cache.
    fills: bool = False
    #: The (process, descriptor) of a call that only passes through the page cache (sendfile). The next such call must ask again.
    passing: tuple[int, int] | None = None
    #: Whether the request is a further piece of a call that has been seen.
    continues: bool = False


class Explainer:
    """Explains the requests of one mount.

    `page_size` is in bytes. `size_of` gives the size of a node of the mount in bytes, None where there is no such node. `device` is the
    mount's (major, minor), as in /proc/<pid>/maps, and `main_mount` the mount that the daemon made; both are set once the mount exists.
    """

    def __init__(self, page_size: int, size_of: Callable[[int], int | None]) -> None:
        self.device = (0, 0)
        self.main_mount: MountKey | None = None
        self._size_of = size_of
        self._page_size = page_size
        self._calls = system_call.CallReader(refused=self._tell_of_refusal)
        self._told_of_refusal = False
        self._threads = AccessorThreads()

    def _tell_of_refusal(self, tid: int) -> None:
        """Say once that an accessor's system call may not be looked at."""
        if not self._told_of_refusal:
            self._told_of_refusal = True
            log.warning(
                "note: process %d may not be looked at, so its events have the ranges of FUSE's requests and not of its calls: %s",
                tid,
                security_modules.refusal_to_trace(tid),
            )

    def close(self) -> None:
        """Close the files of /proc that are kept open."""
        self._calls.close()

    async def mount_of(self, node: Node, tid: int, file: OpenFile[Node] | None = None) -> MountKey | None:
        """The mount by which a thread that waits now accesses a node; None where it cannot be told. `file`: the open file, where there is one."""
        if file is not None and file.mount is not None:
            return file.mount
        call = self._calls.identify(tid)[1] if tid else None
        if call is None:
            return None
        found = call_mount.by_descriptor(call, self.device, node.id)
        if found is None and call_mount.has_path(call):
            # It reads the accessor's memory, and may look up names on this mount.
            found = await self._threads.run(
                tid, call_mount.by_path, call, self.device, node.id, node.parents()
            )
        if found is None:
            return None
        mount = MountKey(found.number, found.unique)
        if self.main_mount is not None and mount.is_same(self.main_mount):
            mount = MAIN
        if file is not None and not file.stateless:
            file.mount = mount
        return mount

    def is_fill(self, offset: int, size: int) -> bool:
        """Whether a READ may be a page-cache fill: a fill consists of whole pages."""
        return not (offset % self._page_size or size % self._page_size)

    def accessor(self, file: OpenFile[Node], tid: int) -> Accessor:
        """The accessor of a request: the thread `tid` that the engine names; with 0, the thread that opened the file."""
        if tid:
            if not file.exact:
                # Every request is one access then, whichever call it is part of.
                return Accessor(proc.process_of(tid), tid, True)
            process, call = self._calls.identify(tid)
            return Accessor(process, tid, True, call)
        if not file.pid:
            # Looked up when it is first needed, as most files are opened while there is no listener.
            file.pid = proc.process_of(file.tid)
        return Accessor(file.pid, file.tid, False)

    async def read(
        self, file: OpenFile[Node], offset: int, size: int, who: Accessor, fills: bool | None = None
    ) -> Explanation:
        """The accesses behind a READ of `size` bytes at `offset` of a file that was opened with FOPEN_DIRECT_IO.

        `fills`: whether the READ is for the page cache (it has no FUSE_READ_LOCKOWNER; docs/facts.md, section 12), None where the engine does
        not say.
        """
        transfer, call = await self._transfer(file, offset, size, Direction.READ, who, fills)
        if transfer is not None and call is not None:
            return self._moved(file, call, transfer, offset, size, Direction.READ, who, fills)
        if self.is_fill(offset, size) if fills is None else fills:
            fault = await self._fault(file, call, offset, size, who)
            if fault is not None:
                return fault
        access = Access(AccessKind.READ, offset, size, who.pid, who.tid)
        if call is not None and call.number == system_call.IO_URING_ENTER and who.certain:
            return self._by_io_uring(file, call, access)
        return Explanation((access,), who.known_tid, Direction.READ)

    def _by_io_uring(self, file: OpenFile[Node], call: system_call.SystemCall, access: Access) -> Explanation:
        """The accesses behind a READ of an io_uring(7) request, whose range no call shows.

        After a read that ended at the end of the file, io_uring reads on there before it completes the request (Linux before 6.18; measured on
        6.1 and 6.12). That READ gives no byte, and is part of the same access.
        """
        start, end = access.offset, access.offset + access.count
        grant = file.grants.get((call.tid, Direction.READ))
        if grant is not None and grant.call == call and grant.start < start and grant.end == end:
            size = self._size_of(file.node.id)
            if size is not None and start >= size:
                return Explanation((), call.tid, Direction.READ, call=call, continues=True)
        grant = Grant(call, start, end, end, anywhere=True)
        return Explanation((access,), call.tid, Direction.READ, grant, call=call)

    async def write(self, file: OpenFile[Node], offset: int, size: int, who: Accessor) -> Explanation | None:
        """The accesses behind a WRITE; None when no thread that may have made it is in a system call that writes this file."""
        transfer, call = await self._transfer(file, offset, size, Direction.WRITE, who, None)
        if transfer is None or call is None:
            return None
        return self._moved(file, call, transfer, offset, size, Direction.WRITE, who)

    async def appends(self, file: OpenFile[Node], tid: int) -> bool | None:
        """Whether the call behind a WRITE writes at the end of the file; None where no call that writes this file is seen."""
        if tid:
            seen = self._calls.identify(tid)[1]
            calls = [] if seen is None else [seen]
        else:
            calls = [*self._calls_of(self.accessor(file, 0))]
        for call in calls:
            side = system_call.appending(call)
            if side is None or proc.file_of(call.tid, side[0]) != (self.device, file.node.id):
                continue
            if side[1] is not None:
                return side[1]
            shown = await self._threads.run(call.tid, call.look_at, side[0])
            return None if shown is None else bool(shown.flags & os.O_APPEND)
        return None

    def _calls_of(self, who: Accessor) -> Iterator[system_call.SystemCall]:
        """The system calls of the threads that may have made the request."""
        if who.certain:
            certain = who.call or self._calls.read(who.tid)
            if certain is not None:
                yield certain
            return
        call = self._calls.read(who.tid)
        if call is not None:
            yield call
        others = proc.threads_of(who.pid)
        if len(others) <= _MOST_THREADS:
            for tid in others:
                if tid != who.tid and (call := self._calls.read(tid)) is not None:
                    yield call

    async def _transfer(
        self,
        file: OpenFile[Node],
        offset: int,
        size: int,
        direction: Direction,
        who: Accessor,
        fills: bool | None,
    ) -> tuple[system_call.Transfer | None, system_call.SystemCall | None]:
        """The range and the call of the transfer that the request belongs to; else (None, the call of a thread that seems to be faulting)."""
        faulting = None
        for call in self._calls_of(who):
            transfer = await self._side_of(call, direction)
            if transfer is not None and fills and not file.direct:
                transfer.paged = True
            if (
                transfer is not None
                and (not fills or transfer.paged)
                and self._fits(file, call, transfer, offset, size)
            ):
                appends = direction is Direction.WRITE and (file.appends or transfer.appends)
                if transfer.offset is None and (transfer.paged or appends):
                    await self._threads.run(call.tid, call.look_at, transfer.descriptor)
                return transfer, call
            if faulting is None or (
                call.number == system_call.PAGE_FAULT and faulting.number != system_call.PAGE_FAULT
            ):
                faulting = call
        return None, faulting

    async def _side_of(
        self, call: system_call.SystemCall, direction: Direction
    ) -> system_call.Transfer | None:
        side = system_call.reading if direction is Direction.READ else system_call.writing
        if not system_call.reads_memory(call):
            return side(call)
        # The accessor's memory may be a mapping of this mount, and its mmap lock may be held until this request is answered.
        return await self._threads.run(call.tid, _looked_at, side, call)

    def _fits(
        self,
        file: OpenFile[Node],
        call: system_call.SystemCall,
        transfer: system_call.Transfer,
        offset: int,
        size: int,
    ) -> bool:
        """Whether a request can be a piece of that transfer. Checks the range first, then the file of the call's descriptor."""
        start, end = transfer.offset, offset + size
        if transfer.paged:
            if start is not None and end <= self._page_down(start):
                return False
        elif size > transfer.count or (
            start is not None
            and not (file.appends or transfer.appends)
            and not (start <= offset and end <= start + transfer.count)
        ):
            return False
        known = (call.tid, transfer.descriptor)
        if file.known_descriptor == known:
            return True
        if proc.file_of(call.tid, transfer.descriptor) != (self.device, file.node.id):
            return False
        file.known_descriptor = known
        return True

    def _moved(
        self,
        file: OpenFile[Node],
        call: system_call.SystemCall,
        transfer: system_call.Transfer,
        offset: int,
        size: int,
        direction: Direction,
        who: Accessor,
        fills: bool | None = None,
    ) -> Explanation:
        if fills is None:
            fills = transfer.paged and direction is Direction.READ
        grant = file.grants.get((call.tid, direction))
        passing = (who.pid, transfer.descriptor) if fills and who.certain else None
        is_known = grant is not None and grant.call == call
        progress = self._progress(who, call) if passing or is_known else None
        if (
            grant is not None
            and is_known
            and not (fills is False and self._begins(call, transfer, offset, direction))
            and self._continues(grant, offset, size, progress, passing=passing is not None)
        ):
            grant.next_offset = offset + size
            grant.repeats += offset == grant.start
            grant.progress = progress
            if grant.allowed:
                return Explanation(
                    (), call.tid, direction, call=call, fills=fills, passing=passing, continues=True
                )
        else:
            grant = None
        if transfer.source is not None:
            transfer = self._cut(call, transfer, *transfer.source)
        start = transfer.offset
        appends = direction is Direction.WRITE and (file.appends or transfer.appends)
        if start is None:
            start = offset
            if transfer.paged or appends:
                descriptor = call.opened(transfer.descriptor)
                start = offset if descriptor is None else descriptor.position
        kind = AccessKind.READ if direction is Direction.READ else AccessKind.WRITE
        accesses = [Access(kind, start, transfer.count, who.pid, call.tid, paged=fills, leaves=fills)]
        end = start + transfer.count
        if fills:
            # Pages that read-ahead brings in beyond the call's range become readable for every process.
            start = min(self._page_down(start), offset)
            covered = self._page_up(end)
            if offset + size > covered or offset < self._page_down(accesses[0].offset):
                accesses.append(Access(AccessKind.FILL, offset, size, who.pid, call.tid, leaves=True))
            end = max(covered, offset + size)
        elif appends:
            # The pieces of an appending write follow each other from the end of the file; the file position does not matter.
            start, end = offset, offset + transfer.count
        elif not (start <= offset and offset + size <= end):
            # The accessor has changed the offset in its memory, or the file position, since the kernel looked at it.
            start, end = offset, offset + size
            accesses = [Access(kind, start, size, who.pid, call.tid)]
        if not transfer.paged and start == offset and end == offset + size:
            # The request is the whole call. A sendfile(2) that found less continues at the end of the file (Linux 6.1).
            return Explanation(tuple(accesses), call.tid, direction, call=call)
        anywhere = fills or transfer.paged or transfer.offset is not None
        if progress is None:
            progress = self._progress(who, call)
        return Explanation(
            tuple(accesses),
            call.tid,
            direction,
            grant or Grant(call, start, end, offset + size, anywhere, progress),
            call=call,
            fills=fills,
            passing=passing,
            continues=grant is not None,
        )

    @staticmethod
    def _begins(
        call: system_call.SystemCall, transfer: system_call.Transfer, offset: int, direction: Direction
    ) -> bool:
        """Whether the request is the first of a call that bypasses the page cache, though most calls of its kind go through it."""
        if not transfer.paged or direction is not Direction.READ:
            return False
        if transfer.offset is not None:
            return offset == transfer.offset
        descriptor = call.opened(transfer.descriptor)
        return descriptor is None or offset == descriptor.position

    def _cut(
        self,
        call: system_call.SystemCall,
        transfer: system_call.Transfer,
        descriptor: int,
        offset: int | None,
    ) -> system_call.Transfer:
        """The transfer of a copy, shortened to the end of its source as generic_copy_file_checks() in the kernel does."""
        source = call.opened(descriptor)
        size = None if source is None or source.inode is None else self._size_of(source.inode)
        if source is None or size is None:
            return transfer
        left = size - (source.position if offset is None else offset)
        return replace(transfer, count=min(transfer.count, left)) if left > 0 else transfer

    @staticmethod
    def _progress(who: Accessor, call: system_call.SystemCall) -> tuple[bool, int] | None:
        """The progress of the thread: (True, number of calls it has finished), or (False, nanoseconds it has run) for a call that is not
        counted. None when neither can be seen."""
        counted = system_call.is_counted(call)
        value = proc.calls_finished(who.pid, call.tid) if counted else proc.run_time(call.tid)
        return None if value is None else (counted, value)

    @staticmethod
    def _continues(
        grant: Grant, offset: int, size: int, progress: tuple[bool, int] | None, *, passing: bool
    ) -> bool:
        if offset + size > grant.end:
            return False
        since, before, counted = None, grant.progress, progress is not None and progress[0]
        if progress is not None and before is not None and progress[0] is before[0]:
            since = progress[1] - before[1]
        if counted and since:
            return False  # the same call, made again
        if offset != grant.start:
            return offset == grant.next_offset or (grant.anywhere and offset > grant.start)
        # Pages that a call passes through the page cache are dropped behind it. The call asks again for a page that was dropped too early.
        return passing and since is not None and (counted or since < _COMES_BACK)

    def blocked_in(
        self, who: Accessor, call: system_call.SystemCall | None = None
    ) -> tuple[system_call.SystemCall, int | None] | None:
        """A value that identifies the call in which the accessor waits; None when it does not wait.

        Values compare equal as long as the same call continues. `call` is the call, where it is known already.
        """
        if call is None:
            call = next(self._calls_of(who), None)
        return None if call is None else (call, proc.calls_finished(who.pid, call.tid))

    async def _fault(
        self, file: OpenFile[Node], call: system_call.SystemCall | None, offset: int, size: int, who: Accessor
    ) -> Explanation | None:
        """Explain a page-cache fill of a direct_io file by a touched mapping or by advice (posix_fadvise(2), readahead(2)).

        None when no mapping of the accessor explains it.
        """
        tid = call.tid if call is not None else who.known_tid
        leaves = who.certain or (call is not None and call.number == system_call.PAGE_FAULT)
        fill = Access(AccessKind.FILL, offset, size, who.pid, tid, leaves=leaves)
        if call is not None and system_call.is_advice(call):
            return Explanation((fill,), tid, Direction.READ, call=call, fills=True)
        if file.announced.covers(offset, offset + size):
            return Explanation((), tid, Direction.READ, call=call, fills=True)
        mapping = await self._mapping(file, offset, size, who)
        if mapping is None:
            if not who.certain and (call is None or call.number != system_call.PAGE_FAULT):
                return None
            return Explanation((fill,), tid, Direction.READ, call=call, fills=True)
        writable = mapping.writable and mapping.shared
        start, end = mapping.offset, mapping.offset + mapping.length
        accesses = [
            Access(AccessKind.MAP, start, mapping.length, who.pid, tid, writable=writable, leaves=leaves),
            Access(AccessKind.FAULT, offset, size, who.pid, tid, writable=writable, leaves=leaves),
        ]
        announces = [(start, end)]
        if offset < start or offset + size > end:
            accesses.append(fill)
            announces.append((offset, offset + size))
        return Explanation(
            tuple(accesses), tid, Direction.READ, announces=tuple(announces), call=call, fills=True
        )

    async def _mapping(
        self, file: OpenFile[Node], offset: int, size: int, who: Accessor
    ) -> proc.Mapping | None:
        mappings = (
            await self._threads.run(who.pid, proc.mappings_of, who.pid, self.device, file.node.id) or []
        )
        # The fault's address is not known. The newest mapping of those bytes is the likeliest, and each of them covers the bytes.
        fitting = [
            m for m in mappings if m.offset < offset + size and offset < m.offset + self._page_up(m.length)
        ]
        unannounced = [m for m in fitting if not file.announced.covers(m.offset, m.offset + m.length)]
        return next(iter(unannounced or fitting), None)

    def _page_down(self, value: int) -> int:
        return value - value % self._page_size

    def _page_up(self, value: int) -> int:
        return -(-value // self._page_size) * self._page_size


def _looked_at(
    side: Callable[[system_call.SystemCall], system_call.Transfer | None], call: system_call.SystemCall
) -> system_call.Transfer | None:
    """One side of a call, and what its open files say where the file position counts; for a thread."""
    transfer = side(call)
    if transfer is not None:
        if transfer.offset is None and transfer.paged:
            call.look_at(transfer.descriptor)
        if transfer.source is not None:
            call.look_at(transfer.source[0])
    return transfer
