"""Reads, writes and other accesses of content: asks the listeners about each, then does it on the backing.

The rule that must never break: no byte of a watched file goes to an accessor or into the kernel's page cache unless an allowed event covered
it.
"""

import errno
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fusehsm.emulator.attribute_cache import AttributeCache
from fusehsm.emulator.backing_writes import BackingWriter
from fusehsm.emulator.explain import Explainer, Explanation
from fusehsm.emulator.handles import Direction, HandleTable, OpenFile
from fusehsm.emulator.listeners import Listeners
from fusehsm.emulator.page_cache import DROPS_WRITTEN_PAGES, StalePages
from fusehsm.emulator.passing import PassingCalls
from fusehsm.emulator.refusals import Refusals
from fusehsm.events import STRENGTH, Access, AccessKind, Armed
from fusehsm.fanotify.abi import FAN_ACCESS, FAN_MODIFY
from fusehsm.fanotify.marks import Subject
from fusehsm.linux import proc
from fusehsm.linux.file_io import BackingReader, Buffer
from fusehsm.linux.ranges import RangeSet
from fusehsm.linux.syscalls import FALLOC_FL_KEEP_SIZE, kernel_version
from fusehsm.overlay.overlay import Caller, Node, Overlay


class Content:
    """The accesses of the content of one mount's files.

    In every method `tid` is the accessing thread, 0 where the engine does not know it.
    """

    def __init__(
        self,
        overlay: Overlay,
        listeners: Listeners,
        handles: HandleTable[Node],
        stale: StalePages,
        attributes: AttributeCache,
        explainer: Explainer,
        subject_of: Callable[[Node], Subject],
    ) -> None:
        self._overlay = overlay
        self._listeners = listeners
        self._handles = handles
        self._stale = stale
        self._attributes = attributes
        self._explainer = explainer
        self._subject_of = subject_of
        self._filled: dict[int, RangeSet] = {}
        # Node ids: no event of a mapping covers later fills of the node (open_through_cache()).
        self._asks_each_fill: set[int] = set()
        #: Calls that pass through the page cache.
        self.passing = PassingCalls(stale)
        self._reader = BackingReader()
        self._writer = BackingWriter(overlay, explainer)
        self._refusals = Refusals(explainer)
        self._keeps_written_pages = kernel_version() < DROPS_WRITTEN_PAGES

    def forgotten(self, node_id: int) -> None:
        """Forget a node, as the kernel has forgotten it and its pages."""
        self._filled.pop(node_id, None)
        self._asks_each_fill.discard(node_id)
        self._refusals.forgotten(node_id)

    def dropped(self, node: Node) -> None:
        """A node's pages are about to be dropped, because it may have been evicted. Its mappings must be asked for again."""
        self._filled.pop(node.id, None)

    async def open_through_cache(self, node: Node) -> None:
        """A file whose accesses are those of single calls is about to be opened through the page cache, while pages of it wait for a listener.

        It sees the cached pages without a request. So no page may be in the cache that an older event has let in: from now on each fill is asked
        for, and the pages that do not wait are dropped. Only the first such open pays for that.
        """
        if node.id not in self._asks_each_fill:
            self._asks_each_fill.add(node.id)
            self.forget_announced(self._handles.of_node(node))
            await self._stale.drop_but(node, self._attributes.filling(node))

    def opened_past_cache(self, node: Node) -> None:
        """A file has been opened past the page cache, and its open drops all pages of the node."""
        if node.id in self._asks_each_fill and all(
            file.direct or not file.exact for file in self._handles.of_node(node)
        ):
            self._asks_each_fill.discard(node.id)

    @asynccontextmanager
    async def changing(self, node: Node, *, content: bool = True) -> AsyncIterator[None]:
        """Context manager around a change of a node: of its `content`, or of its attributes only.

        A change that fails may have been made in part, but the kernel takes a failed call to have changed nothing. So on OSError it is told
        to drop what it has cached of the node.
        """
        try:
            yield
        except OSError:
            await (self._stale.drop_changed(node) if content else self._stale.inval_attributes(node))
            raise

    def changed_unseen(self, node: Node) -> None:
        """A node was changed after its accessor had got EINTR, so the kernel does not know of the change: drop what it has cached."""
        self._stale.drop_changed_soon(node)

    def ask(
        self, access: Access, subject: Subject, node: Node, armed: Armed, *, only: int = 0
    ) -> Coroutine[Any, Any, bool]:
        """listeners.ask(), which also keeps the kernel's cached attributes of the node valid."""
        return self._attributes.asking(
            node, self._listeners.ask(access, subject, node, armed=armed, only=only)
        )

    def notify(self, access: Access, subject: Subject, node: Node) -> None:
        """listeners.notify(), which also keeps the kernel's cached attributes of the node valid."""
        if self._listeners.notify(access, subject, node):
            self._attributes.notified(node)

    async def seen(self, node: Node, tid: int, file: OpenFile[Node] | None = None) -> Subject:
        """The node as marks see it that a waiting thread accesses, with the mount where that matters."""
        subject = self._subject_of(node)
        if self._listeners.tells_mounts:
            subject = subject._replace(mount=await self._explainer.mount_of(node, tid, file))
        return subject

    def _seen_before(self, file: OpenFile[Node]) -> Subject:
        """seen(), as far as it is known by now."""
        return self._subject_of(file.node)._replace(mount=file.mount)

    async def read(
        self, file: OpenFile[Node], offset: int, size: int, tid: int = 0, fills: bool | None = None
    ) -> Buffer:
        """Up to `size` bytes at `offset`; fewer only at the end of the file. Raises OSError.

        `fills`: whether the bytes are for the page cache, None where the engine does not say.
        """
        listeners = self._listeners
        refusing = self._refusals.may_refuse(file)
        if listeners.idle and not refusing:
            if fills is not False:
                self._stale.taint(file.node.id)
            return await self._read_backing(file, offset, size)
        subject = self._subject_of(file.node)
        who = self._explainer.accessor(file, tid)
        if file.exact:
            explanation = await self._explainer.read(file, offset, size, who, fills)
        else:
            fill = Access(AccessKind.FILL, offset, size, who.pid, who.tid, leaves=who.certain)
            explanation = Explanation((fill,), who.tid, Direction.READ, fills=True)
        if explanation.fills and refusing:
            self._refusals.check(file, explanation, offset, size, who, heard=listeners.hears_content(subject))
        allowed = not explanation.accesses
        if listeners.tells_mounts and explanation.accesses and not explanation.fills:
            # A page in the cache is for the accesses by every mount.
            subject = await self.seen(file.node, who.known_tid, file)
        if explanation.fills:
            self._attributes.begin_filling(file.node, offset, size)
        try:
            for access in explanation.accesses:
                allowed |= await self.ask(access, subject, file.node, _armed(file))
            if explanation.fills and not allowed and file.exact and listeners.attended(subject):
                # In patch-v2 the fault of a writable mapping makes an event for writing only. But its page can be read, too.
                fill = Access(AccessKind.FILL, offset, size, who.pid, who.tid, leaves=who.certain)
                allowed = await self.ask(fill, subject, file.node, _armed(file))
        except OSError as error:
            # A killed accessor does not ask again, and others must not be refused for that.
            if explanation.fills and error.errno not in (None, errno.EINTR):
                self._refusals.add(file, explanation, offset, size, error.errno, who)
            raise
        finally:
            if explanation.fills:
                self._attributes.end_filling(file.node, offset, size)
        if explanation.fills and not allowed and self._refusals.may_refuse(file):
            # Its listener has gone without an answer.
            self._refusals.check(file, explanation, offset, size, who, heard=listeners.hears_content(subject))
        if allowed:
            self._allowed(file, explanation)
        elif listeners.notified & FAN_ACCESS and explanation.grant is not None:
            # One call makes one notification, in however many pieces it comes.
            self._begun(file, explanation)
        if explanation.fills or (fills is None and self._explainer.is_fill(offset, size)):
            if allowed:
                self._stale.asked_for(file.node.id)
            else:
                self._stale.taint(file.node.id)
        if fills is None and not file.direct:
            self._filled.setdefault(file.node.id, RangeSet()).add(offset, offset + size)
        data = await self._read_backing(file, offset, size)
        if listeners.notified & FAN_ACCESS and len(data):
            self._notify(explanation, subject, file.node)
        if explanation.passing is not None:
            grant = file.grants.get((explanation.tid, explanation.direction))
            repeats = grant.repeats if grant is not None else 0
            self.passing.keep_asking(file, *explanation.passing, offset, size, repeats)
        return data

    def _notify(self, explanation: Explanation, subject: Subject, node: Node) -> None:
        """Make the notifications of a call whose first piece has just succeeded."""
        if not explanation.continues:
            for access in explanation.accesses:
                self.notify(access, subject, node)

    @staticmethod
    def _begun(file: OpenFile[Node], explanation: Explanation) -> None:
        assert explanation.grant is not None
        explanation.grant.allowed = False
        file.grants[explanation.tid, explanation.direction] = explanation.grant

    def _allowed(self, file: OpenFile[Node], explanation: Explanation) -> None:
        if explanation.grant is not None:
            grant = explanation.grant
            grant.allowed = True
            if explanation.passing or grant.anywhere or grant.end > grant.next_offset:
                file.grants[explanation.tid, explanation.direction] = grant
            else:
                file.grants.pop((explanation.tid, explanation.direction), None)
        if explanation.announces and self._maps_are_asked_for and file.node.id not in self._asks_each_fill:
            for start, end in explanation.announces:
                file.announced.add(start, end)

    async def _read_backing(self, file: OpenFile[Node], offset: int, size: int) -> Buffer:
        with self._handles.backing(file) as descriptor:
            return await self._reader.read(descriptor, offset, size)

    async def write(
        self,
        file: OpenFile[Node],
        offset: int,
        data: Buffer,
        tid: int = 0,
        *,
        caller: Caller | None = None,
        strips: int | None = None,
        write_back: bool | None = None,
        appends: bool | None = None,
        durable: int = 0,
    ) -> int:
        """Write `data` at `offset`; returns the number of bytes written. Raises OSError.

        `caller`: the accessor, with whose rights it is written (None: the opener's, or the owner's where the opener is not known). `strips`: the
        user whose write takes set-id bits away (None: the opener). `write_back`: whether the page cache writes, None where the engine does not
        say. `appends`: whether the open file has O_APPEND now, None where the engine does not say. `durable`: RWF_DSYNC or RWF_SYNC of
        pwritev2(2), or 0.
        """
        if appends is not None and appends != file.appends:
            # The accessor has used F_SETFL (fcntl(2)), which makes no request.
            file.flags ^= os.O_APPEND
        listeners = self._listeners
        explanation = None
        if (
            not write_back
            and not listeners.idle
            and (file.armed is not Armed.NO or listeners.asks_unarmed or listeners.notified & FAN_MODIFY)
        ):
            explanation = await self._ask_write(file, offset, len(data), tid, write_back)
        with self._handles.backing(file) as descriptor:
            # pyfuse3 hides the writer: then the user and the thread that opened the file count.
            await self._before_change(
                file.node, descriptor, file.uid if strips is None else strips, tid or file.tid
            )
            try:
                written, elsewhere = await self._writer.write(
                    file,
                    descriptor,
                    offset,
                    data,
                    tid,
                    write_back=write_back,
                    appends=appends,
                    durable=durable,
                    caller=caller or _opener(file, descriptor),
                )
            except OSError:
                # The pages now differ from the file. Some may be locked until this request is answered.
                self._stale.drop_changed_soon(file.node, offset, len(data))
                raise
        if elsewhere:
            self._stale.drop_changed_soon(file.node, offset, len(data))
        if self._keeps_written_pages and file.direct and written:
            await self._stale.drop_written(file.node, offset, offset + written)
        await self.modified(file.node, offset, offset + written)
        if explanation is not None and listeners.notified & FAN_MODIFY and written:
            self._notify(explanation, self._seen_before(file), file.node)
        return written

    async def _before_change(self, node: Node, descriptor: int, uid: int, tid: int) -> None:
        if self._overlay.before_write(node, descriptor, uid, tid):
            # With the old mode cached, the kernel would execute the file with its owner's rights.
            await self._stale.inval_attributes(node)

    async def _ask_write(
        self, file: OpenFile[Node], offset: int, size: int, tid: int, write_back: bool | None
    ) -> Explanation | None:
        """The explanation of a WRITE, once it is allowed; None for write-back by the page cache."""
        who = self._explainer.accessor(file, tid)
        explanation = await self._explainer.write(file, offset, size, who)
        if explanation is None:
            filled = self._filled.get(file.node.id)
            if (
                write_back is None
                and not file.direct
                and filled is not None
                and filled.covers(offset, offset + size)
            ):
                # Write-back of a mapping. Memory reclaim waits for it, so it must never wait for a listener. The event of the page's fill
                # has covered it.
                return None
            explanation = Explanation(
                (Access(AccessKind.WRITE, offset, size, who.pid, who.tid),), who.tid, Direction.WRITE
            )
        subject = await self.seen(file.node, who.known_tid, file)
        if not file.direct:
            # The kernel keeps the pages of a write through the page cache locked until it is answered.
            self._attributes.begin_filling(file.node, offset, size)
        try:
            for access in explanation.accesses:
                await self.ask(access, subject, file.node, _armed(file))
        finally:
            if not file.direct:
                self._attributes.end_filling(file.node, offset, size)
        # Also when no listener was asked: a write reads no content, and its pieces are one call.
        self._allowed(file, explanation)
        return explanation

    async def map(
        self, node: Node, offset: int, length: int, flags: int, tid: int, *, writable: bool
    ) -> None:
        """Ask for a mapping at mmap(2), for which FUSE makes no request. `flags` are the open file's flags of open(2). Raises OSError."""
        pid = proc.process_of(tid)
        # The open file cannot be identified. Of those that fit, the accessor's own are likeliest, and the one that is armed for most counts.
        files = [
            file
            for file in self._handles.of_node(node)
            if file.exact and (file.flags ^ flags) & os.O_ACCMODE == 0
        ]
        files = [file for file in files if file.pid == pid] or files
        if self._listeners.idle or not files:
            return
        armed = max((_armed(file) for file in files), key=STRENGTH.__getitem__)
        access = Access(AccessKind.MAP, offset, length, pid, tid, writable=writable)
        if (
            await self.ask(access, await self.seen(node, tid), node, armed)
            and self._maps_are_asked_for
            and node.id not in self._asks_each_fill
        ):
            for file in files:
                file.announced.add(offset, offset + length)

    @property
    def _maps_are_asked_for(self) -> bool:
        """Whether the event of a mapping covers its later faults. Not so in a dialect in which every fault makes its own event."""
        return all(dialect.map_event for dialect in self._listeners.dialects)

    async def truncate(self, node: Node, size: int, tid: int) -> None:
        """Ask for a truncation to `size` bytes, which the caller then makes. Raises OSError."""
        if self._listeners.idle:
            return
        access = Access(AccessKind.TRUNCATE, size, 0, proc.process_of(tid), tid, writable=True)
        # Truncation asks by path: how the file was armed does not matter (docs/facts.md, section 5).
        await self.ask(access, await self.seen(node, tid), node, Armed.ALL)

    async def allocate(
        self, file: OpenFile[Node], mode: int, offset: int, length: int, caller: Caller
    ) -> None:
        """fallocate(2) by an accessor. Raises OSError."""
        tid = caller.pid
        access = None
        if not self._listeners.idle:
            who = self._explainer.accessor(file, tid)
            access = Access(AccessKind.FALLOCATE, offset, length, who.pid, who.tid)
            await self.ask(access, await self.seen(file.node, tid, file), file.node, _armed(file))
        async with self.changing(file.node):
            with self._handles.backing(file) as descriptor:
                await self._before_change(file.node, descriptor, caller.uid, tid)
                await self._writer.allocate(descriptor, mode, offset, length, caller)
        if not mode & FALLOC_FL_KEEP_SIZE:
            file.node.made_as_long_as(offset + length)
        await self.modified(file.node)
        if access is not None:
            self.notify(access, self._seen_before(file), file.node)

    async def copy(
        self,
        source: OpenFile[Node],
        source_offset: int,
        target: OpenFile[Node],
        target_offset: int,
        length: int,
        caller: Caller,
    ) -> int:
        """copy_file_range(2) by an accessor; returns the number of bytes copied. Raises OSError."""
        tid = caller.pid
        asked: list[tuple[OpenFile[Node], Access]] = []
        if not self._listeners.idle:
            for file, kind, offset in (
                (source, AccessKind.READ, source_offset),
                (target, AccessKind.WRITE, target_offset),
            ):
                who = self._explainer.accessor(file, tid)
                access = Access(kind, offset, length, who.pid, who.tid)
                await self.ask(access, await self.seen(file.node, tid, file), file.node, _armed(file))
                asked.append((file, access))
        async with self.changing(target.node):
            with self._handles.backing(source) as readable, self._handles.backing(target) as writable:
                await self._before_change(target.node, writable, caller.uid, tid)
                copied = await self._writer.copy(
                    readable, source_offset, writable, target_offset, length, caller
                )
        target.node.made_as_long_as(target_offset + copied)
        await self.modified(target.node)
        if copied:
            for file, access in asked:
                self.notify(access, self._seen_before(file), file.node)
        return copied

    def seek(self, file: OpenFile[Node], offset: int, whence: int, tid: int = 0) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE by thread `tid`; returns the new offset. Raises OSError.

        All of a watched file is data, because programs skip holes without a read. Only the listener, which fills them, sees them.
        """
        with self._handles.backing(file) as descriptor:
            subject = self._subject_of(file.node)
            if not self._listeners.watches(subject) or self._listeners.is_filled_by(subject, tid):
                return os.lseek(descriptor, offset, whence)
            size = os.fstat(descriptor).st_size
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return offset if whence == os.SEEK_DATA else size

    async def synchronise(self, file: OpenFile[Node], data_only: bool) -> None:
        """fsync(2) or fdatasync(2) of an open file. Raises OSError."""
        with self._handles.backing(file) as descriptor:
            await self._reader.synchronise(descriptor, data_only)

    async def modified(self, node: Node, start: int = 0, end: int = 0) -> None:
        """The node's content has changed: remove the ignore marks that do not survive this, and drop the pages that came in unasked.

        [`start`, `end`) are the bytes whose pages the kernel keeps locked until the request is answered.
        """
        changed = [group.marks.modified(node.id, node.parents()) for group in self._listeners.groups]
        if any(changed):
            await self._stale.drop_heard_but(node, start, end)

    def forget_announced(self, files: Iterable[OpenFile[Node]]) -> None:
        """Ask again for faults of mappings that were announced under other marks: the content may have been evicted since."""
        for file in files:
            file.announced.clear()

    @staticmethod
    def forget_grants(files: Iterable[OpenFile[Node]]) -> None:
        """Ask again for further pieces of calls that were allowed before the content was dropped."""
        for file in files:
            file.grants.clear()


def _opener(file: OpenFile[Node], descriptor: int) -> Caller:
    if not file.stateless:
        return Caller(file.uid, file.gid, file.tid)
    owner = os.fstat(descriptor)
    return Caller(owner.st_uid, owner.st_gid, 0)


def _armed(file: OpenFile[Node]) -> Armed:
    assert isinstance(file.armed, Armed)
    return file.armed
