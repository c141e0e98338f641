"""The gate between accessors and content: no byte passes before the listeners have allowed it.

One way down, one way back: an engine hands in what an accessor does to a node or an open file; the gate works out the exact access, asks the
groups, waits, and then lets the overlay do it or raises the listener's errno.

The rule that must never break: no byte of a watched file goes to an accessor or into the kernel's page cache unless an allowed event covered
it. Pages that got into the cache while nobody watched ("tainted" nodes) are dropped when a mark comes to cover them.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fusehsm import caller, rules
from fusehsm.abi import (
    FAN_ACCESS_PERM,
    FAN_MARK_ADD,
    FAN_MARK_FLUSH,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
    Dialect,
)
from fusehsm.backing_reads import BackingReader, Buffer
from fusehsm.events import Access, AccessKind, Armed
from fusehsm.explain import Explainer, Explanation
from fusehsm.group import Group, Pending
from fusehsm.handles import DeniedFill, Direction, HandleTable, OpenFile
from fusehsm.listeners import Listeners
from fusehsm.marks import Subject
from fusehsm.overlay import AttributeChanges, Caller, Node, Overlay
from fusehsm.ranges import RangeSet
from fusehsm.stale import CacheControl, StalePages
from fusehsm.unattended import EventTimeout, UnattendedPolicy

_FMODE_EXEC = 0x20  # open flag of execve (include/linux/fs.h); FUSE passes it on
_PERMISSION_EVENTS = FAN_OPEN_PERM | FAN_OPEN_EXEC_PERM | FAN_ACCESS_PERM
# The kernel asks up to three times for a page that was refused: read-ahead, then the page alone, then once more with the mmap lock held (measured
# on 6.18, within 0.3 ms). A call that goes on can be told from the same call made again; a fault cannot, so only time tells.
_FILL_REPEATS = 2
_SAME_CALL_SECONDS = 1.0
_SAME_FAULT_SECONDS = 0.05


class Gate:
    """The content operations of one mount.

    `destination` is the mount point (events show paths under it), `exact` the event mode, `page_size` in bytes, `open_limit` how many backing
    files may be open for handles at once.
    """

    def __init__(
        self,
        overlay: Overlay,
        *,
        destination: str,
        exact: bool,
        dialect: Dialect,
        unattended: UnattendedPolicy,
        event_timeout: EventTimeout | None,
        page_size: int,
        open_limit: int,
    ) -> None:
        self.overlay = overlay
        self.destination = destination
        self.exact = exact
        self.default_dialect = dialect
        self.listeners = Listeners(dialect, page_size, self._event_path, unattended, event_timeout)
        self.handles: HandleTable[Node] = HandleTable(overlay.open, open_limit)
        self._destination = os.fsencode(destination).rstrip(b"/")
        self._page_size = page_size
        self._explainer = Explainer(page_size, self._size_of)
        self._stale = StalePages(overlay, self.listeners, self.subject)
        self._filled: dict[int, RangeSet] = {}
        self._reader = BackingReader()
        overlay.open_files_from(self._open_descriptor)
        overlay.on_removed(self._replaced)

    def mounted(self, device: tuple[int, int], cache: CacheControl) -> None:
        """The mount stands: `device` is its (major, minor), `cache` how to reach the kernel's caches of it."""
        self._stale.cache = cache
        self._explainer.device = device

    @property
    def events_mode(self) -> str:
        """`exact` or `first-access`, as on the command line."""
        return "exact" if self.exact else "first-access"

    def _open_descriptor(self, node: Node) -> int | None:
        for file in self.handles.of_node(node):
            if file.descriptor is not None:
                return file.descriptor
        return None

    def _size_of(self, node_id: int) -> int | None:
        try:
            return self.overlay.getattr(self.overlay.node(node_id)).st_size
        except OSError:
            return None

    def _replaced(self, node: Node) -> None:
        """The node's inode number has become another file's: what is known by the number is void."""
        self.forgotten(node.id)
        for group in self.listeners.groups:
            group.marks.forget(node.id)

    # Groups and marks

    def add_group(self, group: Group) -> None:
        """A listener has made a group."""
        self.listeners.add(group)

    def remove_group(self, group: Group) -> None:
        """A listener has closed its group, or died."""
        self.listeners.remove(group)
        self._forget_announced(None)
        self._adjust_read_ahead()
        # With --unattended deny or hold, what it had told to ignore is watched now.
        self._stale.drop_heard_soon()

    async def mark(self, group: Group, flags: int, mask: int, node: Node | None) -> None:
        """fanotify_mark(2) on a node of this mount (None: with FAN_MARK_FLUSH). Raises OSError as the kernel does, and EOPNOTSUPP for the
        permission events that first-access mode cannot make."""
        if flags & FAN_MARK_FLUSH:
            rules.check_mark(group.flags, group.dialect, flags, mask, rules.ObjectKind.DIRECTORY)
            group.marks.flush(flags)
            await self._marks_changed(group, None)
            return
        assert node is not None
        kind = self.object_kind(node)
        rules.check_mark(group.flags, group.dialect, flags, mask, kind)
        if flags & FAN_MARK_ADD and mask & _PERMISSION_EVENTS and not self.exact:
            raise OSError(
                errno.EOPNOTSUPP,
                "first-access mode has no OPEN_PERM, OPEN_EXEC_PERM or ACCESS_PERM; mount with --events exact",
            )
        opened_for_write = any(file.writable for file in self.handles.of_node(node))
        group.marks.modify(flags, mask, node.id, opened_for_write=opened_for_write, is_dir=node.is_dir)
        await self._marks_changed(group, node)

    async def _marks_changed(self, group: Group, node: Node | None) -> None:
        self._adjust_read_ahead()
        self._forget_announced(None if node is None or node.is_dir else node)
        await self._stale.drop(self._stale.covered_by(group, node))
        self.listeners.marks_changed()

    def _forget_announced(self, node: Node | None) -> None:
        """What mappings (of one file, or None: all) announced under other marks is asked for again: it may have been evicted since."""
        for file in self.handles if node is None else self.handles.of_node(node):
            file.announced.clear()

    @staticmethod
    def object_kind(node: Node) -> rules.ObjectKind:
        """What fanotify_mark's checks want to know of a node."""
        if node.is_dir:
            return rules.ObjectKind.DIRECTORY
        return rules.ObjectKind.REGULAR if node.is_regular else rules.ObjectKind.OTHER

    def _adjust_read_ahead(self) -> None:
        if self._stale.cache is not None and self.exact:
            self._stale.cache.set_page_exact(any(not group.marks.empty for group in self.listeners.groups))

    async def moved(self, parent: Node, name: bytes) -> None:
        """A file has got a name there: a mark on the directory may cover it now."""
        if self.listeners.idle:
            return
        try:
            node, _ = self.overlay.lookup(parent, name)
        except OSError:
            return
        if self.overlay.forget(node, 1):
            self.forgotten(node.id)
        else:
            await self._stale.drop_heard([node])

    async def drop(self, node: Node) -> None:
        """Drop a node's cached pages, and forget what its mappings announced: its next access makes an event again."""
        self._forget_announced(node)
        self._filled.pop(node.id, None)
        await self._stale.drop_all_of(node)

    def subject(self, node: Node) -> Subject:
        """The node as marks see it."""
        return Subject(node.id, node.parents(), node.is_dir)

    def watches(self, node: Node) -> bool:
        """Whether a fill by a listener may change the node behind the kernel's back: its attributes must not be cached then."""
        return not self.listeners.idle and self.listeners.watches(self.subject(node))

    def may_deny_new(self, parent: Node) -> bool:
        """Whether a file that somebody creates in `parent` may be denied to him, and yet be there."""
        return not self.listeners.idle and self.listeners.asks_at_open(Subject(-1, (parent.id,), False))

    def open_event_fd(self, group: Group, pending: Pending) -> int:
        """A new descriptor of the event's file on the backing, by the group's event_f_flags. Raises OSError."""
        node = pending.target
        assert isinstance(node, Node)
        return self.overlay.open_for_event(node, group.event_f_flags, self._open_descriptor(node))

    def _event_path(self, node: object) -> bytes:
        assert isinstance(node, Node)
        try:
            relative = self.overlay.relative_path(node)
        except OSError:
            return self._destination
        return self._destination + b"/" + relative if relative else self._destination

    # Open files

    async def open(self, node: Node, flags: int, tid: int, uid: int) -> tuple[OpenFile[Node], bool]:
        """Open a node; returns the open file and whether the pages that the kernel has of it may stay. Raises OSError."""
        executing = bool(flags & _FMODE_EXEC)
        flags &= ~(_FMODE_EXEC | os.O_DIRECT)
        if self.listeners.idle:
            descriptor = self.overlay.open(node, flags, uid)
            if flags & os.O_TRUNC:
                self._modified(node)
            return self._opened(node, flags, descriptor, Armed.NO, False, tid, 0, uid), True
        access, subject, armed = await self._ask_to_open(node, flags, tid, executing=executing)
        descriptor = self.overlay.open(node, flags, uid)
        if flags & os.O_TRUNC:
            self._modified(node)
        return await self._open_armed(access, subject, node, flags, descriptor, armed, uid)

    async def created(
        self, node: Node, flags: int, descriptor: int, tid: int, uid: int
    ) -> tuple[OpenFile[Node], bool]:
        """A file has just been created and opened: it stays created even if its open is denied, as in the kernel."""
        flags &= ~(_FMODE_EXEC | os.O_DIRECT)
        if self.listeners.idle:
            return self._opened(node, flags, descriptor, Armed.NO, False, tid, 0, uid), True
        try:
            access, subject, armed = await self._ask_to_open(node, flags, tid, executing=False)
        except BaseException:
            os.close(descriptor)
            raise
        return await self._open_armed(access, subject, node, flags, descriptor, armed, uid)

    async def _ask_to_open(
        self, node: Node, flags: int, tid: int, *, executing: bool
    ) -> tuple[Access, Subject, Armed]:
        """Ask for the permission to open; what was asked, about what, and how the file is armed. Raises OSError when it is denied."""
        subject = self.subject(node)
        # The kernel arms the file before it asks: a mark that a listener sets while it holds this open comes too late.
        armed = self.listeners.armed(subject)
        access = Access(
            AccessKind.OPEN,
            pid=caller.process_of(tid),
            tid=tid,
            writable=flags & os.O_ACCMODE != os.O_RDONLY,
            exec=executing,
            directory=node.is_dir,
        )
        await self.listeners.ask(
            access, subject, node, armed=Armed.ALL, only=FAN_OPEN_PERM | FAN_OPEN_EXEC_PERM
        )
        return access, subject, armed

    async def _open_armed(
        self,
        access: Access,
        subject: Subject,
        node: Node,
        flags: int,
        descriptor: int,
        armed: Armed,
        uid: int,
    ) -> tuple[OpenFile[Node], bool]:
        try:
            await self.listeners.ask(access, subject, node, armed=Armed.ALL, only=~_PERMISSION_EVENTS)
        except BaseException:
            os.close(descriptor)
            raise
        heard = self.listeners.hears_content(subject)
        direct = self.exact and armed is not Armed.NO and heard
        # Opening without keep_cache makes the kernel drop the node's pages: those that came in unasked, and, so that every new mapping makes
        # its event as in the kernel, those of a direct_io file.
        keep = not direct and not (heard and node in self._stale)
        return self._opened(node, flags, descriptor, armed, direct, access.tid, access.pid, uid), keep

    def _opened(
        self,
        node: Node,
        flags: int,
        descriptor: int,
        armed: Armed,
        direct: bool,
        tid: int,
        pid: int,
        uid: int,
    ) -> OpenFile[Node]:
        return self.handles.add(
            node, flags, descriptor, armed=armed, direct=direct, tid=tid, pid=pid, uid=uid
        )

    def release(self, handle: int) -> None:
        """The kernel has closed an open file."""
        self.handles.release(handle)

    def forgotten(self, node_id: int) -> None:
        """The kernel has forgotten a node, its pages with it."""
        self._stale.forget(node_id)
        self._filled.pop(node_id, None)

    # Content

    async def read(self, file: OpenFile[Node], offset: int, size: int) -> Buffer:
        """Up to `size` bytes at `offset`; fewer only at the end of the file. Raises OSError."""
        listeners = self.listeners
        if listeners.idle:
            self._stale.taint(file.node.id)
            return await self._read_backing(file, offset, size)
        subject = self.subject(file.node)
        _name_process(file)
        if file.direct:
            explanation = await self._explainer.read(file, offset, size)
        else:
            fill = Access(AccessKind.FILL, offset, size, file.pid, file.tid)
            explanation = Explanation((fill,), file.tid, Direction.READ, fills=True)
        if explanation.fills and file.denied is not None:
            self._deny_repeat(file, explanation, offset, size)
        allowed = not explanation.accesses
        try:
            for access in explanation.accesses:
                allowed |= await listeners.ask(access, subject, file.node, armed=_armed(file))
            if explanation.fills and not allowed and file.direct and listeners.attended(subject):
                # A writable mapping's fault is asked for by writing alone (patch-v2), and what it brings in can be read.
                fill = Access(AccessKind.FILL, offset, size, file.pid, file.tid)
                allowed = await listeners.ask(fill, subject, file.node, armed=_armed(file))
        except OSError as error:
            if explanation.fills and error.errno is not None:
                self._denied(file, explanation, offset, size, error.errno)
            raise
        if allowed:
            self._allowed(file, explanation)
        elif explanation.fills or self._explainer.is_fill(offset, size):
            self._stale.taint(file.node.id)
        if not file.direct:
            self._filled.setdefault(file.node.id, RangeSet()).add(offset, offset + size)
        return await self._read_backing(file, offset, size)

    def _allowed(self, file: OpenFile[Node], explanation: Explanation) -> None:
        if explanation.grant is not None:
            if explanation.grant.end > explanation.grant.next_offset:
                file.grants[explanation.tid, explanation.direction] = explanation.grant
            else:
                file.grants.pop((explanation.tid, explanation.direction), None)
        # Where every fault makes its own event, a mapping announces nothing.
        if all(dialect.map_event for dialect in self.listeners.dialects):
            for start, end in explanation.announces:
                file.announced.add(start, end)

    def _denied(
        self, file: OpenFile[Node], explanation: Explanation, offset: int, size: int, number: int
    ) -> None:
        waits = self._explainer.blocked_in(file, explanation.call)
        in_call = waits is not None and waits[0].number != caller.PAGE_FAULT
        window = _SAME_CALL_SECONDS if in_call else _SAME_FAULT_SECONDS
        file.denied = DeniedFill(
            waits, offset, offset + size, number, _FILL_REPEATS, time.monotonic() + window
        )

    def _deny_repeat(self, file: OpenFile[Node], explanation: Explanation, offset: int, size: int) -> None:
        denied = file.denied
        assert denied is not None
        if denied.repeats_left <= 0 or time.monotonic() > denied.expires:
            file.denied = None
            return
        overlaps = offset < denied.end and denied.start < offset + size
        if overlaps and self._explainer.blocked_in(file, explanation.call) == denied.waits:
            denied.repeats_left -= 1
            raise OSError(denied.errno, os.strerror(denied.errno))

    async def _read_backing(self, file: OpenFile[Node], offset: int, size: int) -> Buffer:
        with self.handles.backing(file) as descriptor:
            return await self._reader.read(descriptor, offset, size)

    async def write(self, file: OpenFile[Node], offset: int, data: bytes) -> int:
        """Write `data` at `offset`; returns the number of bytes written. Raises OSError."""
        if not self.listeners.idle and (file.armed is not Armed.NO or self.listeners.asks_unarmed):
            await self._ask_write(file, offset, len(data))
        with self.handles.backing(file) as descriptor:
            self.overlay.before_write(file.node, descriptor, file.uid)
            written = os.pwrite(descriptor, data, offset)
        self._modified(file.node)
        return written

    async def _ask_write(self, file: OpenFile[Node], offset: int, size: int) -> None:
        _name_process(file)
        explanation = self._explainer.write(file, offset, size)
        if explanation is None:
            filled = self._filled.get(file.node.id)
            if not file.direct and filled is not None and filled.covers(offset, offset + size):
                # Write-back of a mapping: memory reclaim waits for it, so it must never wait for a listener. The event that let the page in
                # has covered it.
                return
            explanation = Explanation(
                (Access(AccessKind.WRITE, offset, size, file.pid, file.tid),), file.tid, Direction.WRITE
            )
        subject = self.subject(file.node)
        for access in explanation.accesses:
            await self.listeners.ask(access, subject, file.node, armed=_armed(file))
        # Also when nobody was asked: a write takes nothing out, and its pieces are one call.
        self._allowed(file, explanation)

    def _modified(self, node: Node) -> None:
        changed = [group.marks.modified(node.id, node.parents()) for group in self.listeners.groups]
        if any(changed):
            # Not waited for: the kernel may hold pages of it locked until this write is answered.
            self._stale.drop_heard_soon()

    async def set_attributes(
        self, node: Node, changes: AttributeChanges, handle: int | None, caller_: Caller
    ) -> tuple[Node, os.stat_result]:
        """Change attributes; a new size is a truncation, which is asked for. Raises OSError."""
        if changes.size is not None and not self.listeners.idle:
            access = Access(
                AccessKind.TRUNCATE,
                changes.size,
                0,
                caller.process_of(caller_.pid),
                caller_.pid,
                writable=True,
            )
            # Truncation is asked by path: how the file was armed does not matter (measured on 6.18).
            await self.listeners.ask(access, self.subject(node), node, armed=Armed.ALL)
        with self._usable(node, handle) as descriptor:
            result = self.overlay.setattr(node, changes, descriptor, caller_)
        if changes.size is not None:
            self._modified(node)
        return result

    @contextmanager
    def _usable(self, node: Node, handle: int | None) -> Iterator[int | None]:
        file = (
            self.handles.get(handle) if handle is not None else next(iter(self.handles.of_node(node)), None)
        )
        if file is None:
            yield None
            return
        with self.handles.backing(file) as descriptor:
            yield descriptor

    async def open_directory(self, node: Node, tid: int) -> None:
        """Somebody opens a directory. Raises OSError when it is denied."""
        if not self.listeners.idle:
            access = Access(AccessKind.OPEN, 0, 0, caller.process_of(tid), tid, directory=True)
            await self.listeners.ask(access, self.subject(node), node, armed=Armed.ALL)

    async def read_directory(self, node: Node, tid: int) -> None:
        """Somebody reads entries of a directory. Raises OSError when it is denied."""
        if not self.listeners.idle:
            access = Access(AccessKind.READ_DIRECTORY, 0, 0, caller.process_of(tid), tid, directory=True)
            await self.listeners.ask(access, self.subject(node), node, armed=Armed.ALL)

    def file_status(self, handle: int) -> os.stat_result:
        """fstat(2) of an open file's backing."""
        with self.handles.backing(self.handles.get(handle)) as descriptor:
            return os.fstat(descriptor)

    async def synchronise(self, handle: int, data_only: bool) -> None:
        """fsync(2) or fdatasync(2) of an open file. Raises OSError."""
        with self.handles.backing(self.handles.get(handle)) as descriptor:
            await self._reader.synchronise(descriptor, data_only)

    # What the control socket shows

    def status(self) -> dict[str, object]:
        """The mount's state as JSON-able values."""
        return {
            "destination": self.destination,
            "events": self.events_mode,
            "abi": self.default_dialect.name,
            "nodes": self.overlay.node_count,
            "open_files": len(self.handles),
            "groups": self.listeners.describe(),
            "waiting": list(self.listeners.waiting()),
        }

    def release_held(self) -> int:
        """Let go every access that is parked for a group to come; returns how many."""
        return self.listeners.release()

    def close(self) -> None:
        """The mount has ended."""
        self.listeners.abandon()
        self.handles.close()
        self._explainer.close()


def _name_process(file: OpenFile[Node]) -> None:
    """Whose process opened it: looked up when it is first needed, as most files are opened while nobody listens."""
    if not file.pid:
        file.pid = caller.process_of(file.tid)


def _armed(file: OpenFile[Node]) -> Armed:
    assert isinstance(file.armed, Armed)
    return file.armed
