"""From FUSE requests to accesses: which system call, with which exact range, is behind a READ or WRITE of an armed file.

Nothing here asks or decides: `Explainer` says what an accessor is doing, events.py says which events that makes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import trio

from fusehsm import caller
from fusehsm.events import Access, AccessKind
from fusehsm.handles import Direction, Grant, OpenFile
from fusehsm.overlay import Node

# How long an accessor's mmap lock may keep us from reading its mappings; seconds.
_MAPS_DEADLINE = 0.5
# No process with more threads than this is searched for the one that is accessing.
_MOST_THREADS = 256


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is behind one request.

    `accesses`: in order; empty when an earlier event of the same call or mapping covered the request. `tid`: the accessing thread, 0 when it
    is not known. `grant`: what to remember, under `direction`, when it is allowed. `announces`: byte ranges [start, end) that a mapping will
    touch without further events. `call`: what the accessor waits in, where that was looked at. `fills`: bytes go into the page cache.
    """

    accesses: tuple[Access, ...]
    tid: int
    direction: Direction
    grant: Grant | None = None
    announces: tuple[tuple[int, int], ...] = ()
    call: caller.Call | None = None
    fills: bool = False


class Explainer:
    """Explains the requests of one mount.

    `page_size` in bytes; `size_of` gives the size of a node of the mount in bytes, None where there is no such node; `device`, set once
    mounted, is the mount's (major, minor) by which the kernel names its files in /proc/<pid>/maps.
    """

    def __init__(self, page_size: int, size_of: Callable[[int], int | None]) -> None:
        self.device = (0, 0)
        self._size_of = size_of
        self._page_size = page_size
        self._calls = caller.CallReader()
        self._maps_limiter = trio.CapacityLimiter(64)

    def close(self) -> None:
        """Close what is kept open."""
        self._calls.close()

    def is_fill(self, offset: int, size: int) -> bool:
        """Whether a READ may be a page-cache fill: those are whole pages."""
        return not (offset % self._page_size or size % self._page_size)

    async def read(self, file: OpenFile[Node], offset: int, size: int) -> Explanation:
        """What is behind a READ of `size` bytes at `offset` on a file that was opened with FOPEN_DIRECT_IO."""
        transfer, call = self._transfer(file, offset, size, Direction.READ)
        if transfer is not None and call is not None:
            return self._moved(file, call, transfer, offset, size, Direction.READ)
        if self.is_fill(offset, size):
            fault = await self._fault(file, call, offset, size)
            if fault is not None:
                return fault
        access = Access(AccessKind.READ, offset, size, file.pid, file.tid)
        return Explanation((access,), 0, Direction.READ)

    def write(self, file: OpenFile[Node], offset: int, size: int) -> Explanation | None:
        """What is behind a WRITE; None when no thread of the opener is in a system call that writes this file."""
        transfer, call = self._transfer(file, offset, size, Direction.WRITE)
        if transfer is None or call is None:
            return None
        return self._moved(file, call, transfer, offset, size, Direction.WRITE)

    def _threads(self, file: OpenFile[Node]) -> Iterator[int]:
        yield file.tid
        others = caller.threads_of(file.pid)
        if len(others) <= _MOST_THREADS:
            yield from (tid for tid in others if tid != file.tid)

    def _transfer(
        self, file: OpenFile[Node], offset: int, size: int, direction: Direction
    ) -> tuple[caller.Transfer | None, caller.Call | None]:
        """The call that the request belongs to, with its range; else (None, the call of a thread that seems to be faulting)."""
        faulting = None
        for tid in self._threads(file):
            call = self._calls.read(tid)
            if call is None:
                continue
            transfer = caller.reading(call) if direction is Direction.READ else caller.writing(call)
            if transfer is not None and self._fits(file, tid, transfer, offset, size):
                return transfer, call
            if faulting is None or (
                call.number == caller.PAGE_FAULT and faulting.number != caller.PAGE_FAULT
            ):
                faulting = call
        return None, faulting

    def _fits(
        self, file: OpenFile[Node], tid: int, transfer: caller.Transfer, offset: int, size: int
    ) -> bool:
        """Whether a request can be a piece of that transfer: by its range, then by the file that the call names."""
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
        known = (tid, transfer.descriptor)
        if file.known_descriptor == known:
            return True
        descriptor = caller.descriptor_of(tid, transfer.descriptor)
        if descriptor is None or descriptor.inode not in (None, file.node.id):
            return False
        file.known_descriptor = known
        return True

    def _moved(
        self,
        file: OpenFile[Node],
        call: caller.Call,
        transfer: caller.Transfer,
        offset: int,
        size: int,
        direction: Direction,
    ) -> Explanation:
        fills = transfer.paged and direction is Direction.READ
        grant = file.grants.get((call.tid, direction))
        if grant is not None and grant.call == call and self._continues(grant, offset, size):
            grant.next_offset = offset + size
            return Explanation((), call.tid, direction, call=call, fills=fills)
        if transfer.source is not None:
            transfer = self._cut(call.tid, transfer, *transfer.source)
        start = transfer.offset
        appends = direction is Direction.WRITE and (file.appends or transfer.appends)
        if start is None:
            start = offset
            if transfer.paged or appends:
                descriptor = caller.descriptor_of(call.tid, transfer.descriptor)
                start = offset if descriptor is None else descriptor.position
        kind = AccessKind.READ if direction is Direction.READ else AccessKind.WRITE
        accesses = [Access(kind, start, transfer.count, file.pid, call.tid, paged=fills)]
        end = start + transfer.count
        if fills:
            # What read-ahead brings in beyond the call's own range becomes readable for everybody.
            start = min(self._page_down(start), offset)
            covered = self._page_up(end)
            if offset + size > covered or offset < self._page_down(accesses[0].offset):
                accesses.append(Access(AccessKind.FILL, offset, size, file.pid, call.tid))
            end = max(covered, offset + size)
        elif appends:
            # The pieces of an appending write follow each other from the end of the file, wherever the file position was.
            start, end = offset, offset + transfer.count
        anywhere = fills or transfer.offset is not None
        return Explanation(
            tuple(accesses),
            call.tid,
            direction,
            Grant(call, start, end, offset + size, anywhere),
            call=call,
            fills=fills,
        )

    def _cut(
        self, tid: int, transfer: caller.Transfer, descriptor: int, offset: int | None
    ) -> caller.Transfer:
        """What is left of a copy that its source's end of file cuts short: the kernel's generic_copy_file_checks()."""
        source = caller.descriptor_of(tid, descriptor)
        size = None if source is None or source.inode is None else self._size_of(source.inode)
        if source is None or size is None:
            return transfer
        left = size - (source.position if offset is None else offset)
        return replace(transfer, count=min(transfer.count, left)) if left > 0 else transfer

    @staticmethod
    def _continues(grant: Grant, offset: int, size: int) -> bool:
        if offset == grant.start or offset + size > grant.end:
            return False
        return offset == grant.next_offset or (grant.anywhere and offset > grant.start)

    def blocked_in(
        self, file: OpenFile[Node], call: caller.Call | None = None
    ) -> tuple[caller.Call, int | None] | None:
        """What a thread of the opener waits in (`call`, where that is known already), equal as long as it goes on; None when none waits."""
        if call is None:
            call = next(
                (found for tid in self._threads(file) if (found := self._calls.read(tid)) is not None), None
            )
        return None if call is None else (call, caller.calls_finished(file.pid, call.tid))

    async def _fault(
        self, file: OpenFile[Node], call: caller.Call | None, offset: int, size: int
    ) -> Explanation | None:
        """A page-cache fill of a direct_io file: a touched mapping, or advice; None when no mapping of the opener explains it."""
        tid = call.tid if call is not None else 0
        if call is not None and caller.is_advice(call):
            fill = Access(AccessKind.FILL, offset, size, file.pid, tid)
            return Explanation((fill,), tid, Direction.READ, call=call, fills=True)
        if file.announced.covers(offset, offset + size):
            return Explanation((), tid, Direction.READ, call=call, fills=True)
        mapping = await self._mapping(file, offset, size)
        if mapping is None:
            if call is None or call.number != caller.PAGE_FAULT:
                return None
            fill = Access(AccessKind.FILL, offset, size, file.pid, tid)
            return Explanation((fill,), tid, Direction.READ, call=call, fills=True)
        writable = mapping.writable and mapping.shared
        start, end = mapping.offset, mapping.offset + mapping.length
        accesses = [
            Access(AccessKind.MAP, start, mapping.length, file.pid, tid, writable=writable),
            Access(AccessKind.FAULT, offset, size, file.pid, tid, writable=writable),
        ]
        announces = [(start, end)]
        if offset < start or offset + size > end:
            accesses.append(Access(AccessKind.FILL, offset, size, file.pid, tid))
            announces.append((offset, offset + size))
        return Explanation(
            tuple(accesses), tid, Direction.READ, announces=tuple(announces), call=call, fills=True
        )

    async def _mapping(self, file: OpenFile[Node], offset: int, size: int) -> caller.Mapping | None:
        mappings: list[caller.Mapping] = []
        with trio.move_on_after(_MAPS_DEADLINE):
            mappings = await trio.to_thread.run_sync(
                caller.mappings_of,
                file.pid,
                self.device,
                file.node.id,
                abandon_on_cancel=True,
                limiter=self._maps_limiter,
            )
        # Without the fault's address the newest mapping of those bytes is the likeliest; any of them covers what is about to be read.
        fitting = [
            m for m in mappings if m.offset < offset + size and offset < m.offset + self._page_up(m.length)
        ]
        unannounced = [m for m in fitting if not file.announced.covers(m.offset, m.offset + m.length)]
        return next(iter(unannounced or fitting), None)

    def _page_down(self, value: int) -> int:
        return value - value % self._page_size

    def _page_up(self, value: int) -> int:
        return -(-value // self._page_size) * self._page_size
