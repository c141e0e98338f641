"""The gate between accessors and content: it asks the listeners about each access before it lets a byte pass.

An engine calls the gate for each operation of an accessor on a node or an open file. The gate finds the exact access, asks the groups, and
waits. Then it lets the overlay do the operation, or raises the listener's errno.

The rule that must never break: no byte of a watched file goes to an accessor or into the kernel's page cache unless an allowed event covered
it. Pages that entered the cache unwatched (of "tainted" nodes) are dropped when a mark comes to cover them.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from fusehsm.emulator.attribute_cache import AttributeCache
from fusehsm.emulator.content import Content
from fusehsm.emulator.explain import Explainer
from fusehsm.emulator.group import Group, Pending
from fusehsm.emulator.handles import HandleTable, OpenFile
from fusehsm.emulator.leases import Leases, Lessor
from fusehsm.emulator.listeners import Listeners
from fusehsm.emulator.locks import FileLocks
from fusehsm.emulator.page_cache import CacheControl, StalePages
from fusehsm.events import Access, AccessKind, Armed
from fusehsm.fanotify import rules
from fusehsm.fanotify.abi import (
    CONTENT_PERM_EVENTS,
    FAN_ACCESS,
    FAN_CLOSE,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_MOUNT,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
    Dialect,
)
from fusehsm.fanotify.marks import MAIN, MountKey, Subject
from fusehsm.fanotify.policy import EventTimeout, UnattendedPolicy
from fusehsm.linux import proc
from fusehsm.linux.mountinfo import MountId
from fusehsm.overlay.overlay import AttributeChanges, Caller, Node, Overlay

_FMODE_EXEC = 0x20  # open flag of execve (include/linux/fs.h); FUSE passes it on


class Gate:
    """The operations of one mount that listeners may hear of.

    `destination`: the mount point; events show paths under it. `events`: the event mode, "exact", "per-file" (exact for the files that a group
    hears call by call, first-access for all others) or "first-access". `page_size`: in bytes. `open_limit`: how many backing files may be open
    for handles at once. `direct`: in exact mode, unwatched files bypass the page cache, too. A file that is opened before it is marked then
    reads and writes as on the real kernel: it asks no listener, and waits for no accessor that does.
    """

    def __init__(
        self,
        overlay: Overlay,
        *,
        destination: str,
        events: str,
        dialect: Dialect,
        unattended: UnattendedPolicy,
        event_timeout: EventTimeout | None,
        page_size: int,
        open_limit: int,
        direct: bool = False,
    ) -> None:
        self.overlay = overlay
        self.destination = destination
        self.events_mode = events
        #: Whether there are events of single calls, at least for some files.
        self.exact = events != "first-access"
        self._per_file = events == "per-file"
        self._all_direct = direct and events == "exact"
        self.default_dialect = dialect
        self.listeners = Listeners(
            dialect, page_size, self._event_path, unattended, event_timeout, notifies=self.exact
        )
        self.handles: HandleTable[Node] = HandleTable(overlay.open, open_limit, overlay.is_pinned)
        self.leases: Leases[Node] = Leases()
        self.locks = FileLocks(self.handles, open_limit // 2)
        self.requests: Callable[[], dict[str, int]] = dict
        """How many requests of each kind have come: the engine's to say."""
        self._destination = os.fsencode(destination).rstrip(b"/")
        self._page_size = page_size
        self._own_pid = os.getpid()
        self._explainer = Explainer(page_size, self._size_of)
        self._stale = StalePages(overlay, self.listeners, self.subject)
        self.attributes = AttributeCache(overlay, self.listeners, self._stale, self.subject)
        self.content = Content(
            overlay,
            self.listeners,
            self.handles,
            self._stale,
            self.attributes,
            self._explainer,
            self.subject,
        )
        self.lessor = Lessor(
            overlay,
            self.handles,
            self.leases,
            drop=self.drop,
            drop_attributes_soon=self._stale.drop_attributes_soon,
            forget=self.forget,
        )
        overlay.open_files_from(self.open_descriptor)
        overlay.on_removed(self._replaced)

    def mounted(self, device: tuple[int, int], cache: CacheControl, mount: MountId | None = None) -> None:
        """The mount exists now: `device` is its (major, minor), `cache` controls the kernel's caches of it, `mount` is its id."""
        self._stale.cache = cache
        self._explainer.device = device
        self.locks.device = device
        self.content.passing.device = device
        self._explainer.main_mount = None if mount is None else MountKey(mount.number, mount.unique)

    def open_descriptor(self, node: Node) -> int | None:
        """A descriptor of the backing file, if an open file has one; it stays that file's."""
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
        """The node's inode number now belongs to another file: drop all state that is kept by that number."""
        self.forgotten(node)
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
        # With --unattended deny or hold, files that its ignore marks excluded are watched now.
        self._stale.drop_heard_soon()

    async def mark(
        self, group: Group, flags: int, mask: int, node: Node | None, mount: MountKey = MAIN
    ) -> None:
        """fanotify_mark(2) on a node of this mount (None: with FAN_MARK_FLUSH), which was found by `mount`.

        Raises OSError as the kernel does, and EOPNOTSUPP for the permission events that first-access mode cannot make.
        """
        if flags & FAN_MARK_FLUSH:
            rules.check_mark(group.flags, group.dialect, flags, mask, rules.ObjectKind.DIRECTORY)
            unheard = self._stale.unheard(None)
            group.marks.flush(flags)
            await self._marks_changed(group, None, unheard)
            return
        assert node is not None
        kind = self.object_kind(node)
        rules.check_mark(group.flags, group.dialect, flags, mask, kind)
        if flags & FAN_MARK_ADD and mask & CONTENT_PERM_EVENTS and not self.exact:
            raise OSError(
                errno.EOPNOTSUPP,
                "first-access mode has no OPEN_PERM, OPEN_EXEC_PERM or ACCESS_PERM; mount with --events exact",
            )
        opened_for_write = any(file.writable for file in self.handles.of_node(node))
        # A mark on the mount or its filesystem may be set by the path of any file in it.
        touched = None if flags & (FAN_MARK_MOUNT | FAN_MARK_FILESYSTEM) else node
        unheard = self._stale.unheard(touched)
        main = self._explainer.main_mount
        group.marks.modify(
            flags,
            mask,
            node.id,
            opened_for_write=opened_for_write,
            is_dir=node.is_dir,
            mount=MAIN if main is None or mount.is_same(main) else mount,
        )
        await self._marks_changed(group, touched, unheard)

    async def _marks_changed(self, group: Group, node: Node | None, unheard: list[Node]) -> None:
        self._adjust_read_ahead()
        self._forget_announced(None if node is None or node.is_dir else node)
        await self._stale.drop(self._stale.covered_by(group, node), unheard)
        self.listeners.marks_changed()

    def _forget_announced(self, node: Node | None) -> None:
        self.content.forget_announced(self.handles if node is None else self.handles.of_node(node))

    @staticmethod
    def object_kind(node: Node) -> rules.ObjectKind:
        """The kind of a node, for the checks of fanotify_mark(2)."""
        if node.is_dir:
            return rules.ObjectKind.DIRECTORY
        return rules.ObjectKind.REGULAR if node.is_regular else rules.ObjectKind.OTHER

    def _adjust_read_ahead(self) -> None:
        if self._stale.cache is not None and self.exact:
            marks = [group.marks for group in self.listeners.groups]
            if self._per_file:
                needed = any(each.permissions or each.notified & FAN_ACCESS for each in marks)
            else:
                needed = any(not each.empty for each in marks)
            self._stale.cache.set_page_exact(needed)

    async def moved(self, parent: Node, name: bytes) -> None:
        """A file has got the name `name` in `parent`, whose marks may cover it now."""
        if self.listeners.idle:
            return
        try:
            node, _ = self.overlay.lookup(parent, name)
        except OSError:
            return
        if self.overlay.forget(node, 1):
            self.forgotten(node)
        else:
            await self._stale.drop_heard([node])

    async def map(
        self, node: Node, offset: int, length: int, flags: int, tid: int, *, writable: bool
    ) -> None:
        """Ask for a mapping of `length` bytes at `offset` of an open file. Thread `tid` waits for the answer. `flags` are the file's flags of
        open(2). Raises OSError when the mapping is denied."""
        await self.content.map(node, offset, length, flags, tid, writable=writable)

    async def drop(self, node: Node) -> None:
        """Drop a node's cached pages, and forget the ranges that its mappings announced. Its next access makes an event again."""
        self._forget_announced(node)
        self.content.forget_grants(self.handles.of_node(node))
        self.content.dropped(node)
        await self._stale.drop_all_of(node)

    def subject(self, node: Node) -> Subject:
        """The node as marks see it, by whatever mount it is accessed."""
        return Subject(node.id, node.parents(), node.is_dir, None)

    def watches(self, node: Node) -> bool:
        """Whether a listener may fill the node without the kernel's knowledge. Its attributes must not be cached then."""
        return not self.listeners.idle and self.listeners.watches(self.subject(node))

    def may_deny_new(self, parent: Node) -> bool:
        """Whether open(2) of a file that is created in `parent` may be denied, although the file then exists."""
        return not self.listeners.idle and self.listeners.asks_at_open(Subject(-1, (parent.id,), False))

    def open_event_fd(self, group: Group, pending: Pending) -> int:
        """Open the event's file on the backing with the group's event_f_flags; the caller closes the descriptor. Raises OSError."""
        node = pending.target
        assert isinstance(node, Node)
        opened = self.open_descriptor(node)
        if self.overlay.event_root is not None:
            return self.overlay.open_for_view(node, group.event_f_flags, opened)
        return self.overlay.open_for_event(node, group.event_f_flags, opened)

    def _event_path(self, node: object) -> bytes:
        assert isinstance(node, Node)
        try:
            relative = self.overlay.relative_path(node)
        except OSError:
            return self._destination
        return self._destination + b"/" + relative if relative else self._destination

    # Open files

    async def open(self, node: Node, flags: int, caller: Caller) -> tuple[OpenFile[Node], bool]:
        """Open a node for an accessor; returns the open file, and keep_cache: whether the kernel's cached pages of it may stay. Raises OSError."""
        with self.leases.entering(node):
            if not flags & os.O_TRUNC:
                return await self._open(node, flags, caller)
            # An open(2) that fails may have cleared set-id bits, or may be denied after the truncation.
            async with self.content.changing(node, content=False):
                return await self._open(node, flags, caller)

    async def _open(self, node: Node, flags: int, caller: Caller) -> tuple[OpenFile[Node], bool]:
        tid = caller.pid
        executing = bool(flags & _FMODE_EXEC)
        patient = not flags & os.O_NONBLOCK
        flags &= ~(_FMODE_EXEC | os.O_DIRECT)
        asked = None
        if not self.listeners.idle:
            asked = await self._ask_to_open(node, flags, tid, executing=executing)
        if node in self.leases:
            # The kernel also asks listeners first (do_dentry_open()).
            await self.leases.wait(node, tid, patient=patient)
        try:
            descriptor = self.overlay.open(node, flags, caller)
        except BlockingIOError:
            if not patient:
                raise
            descriptor = await self.leases.retry(node, tid, partial(self.overlay.open, node, flags, caller))
        if flags & os.O_TRUNC:
            await self.content.modified(node)
        if asked is None:
            return self._opened(node, flags, descriptor, Armed.NO, self._all_direct, caller, 0), True
        access, subject, armed = asked
        return await self._open_armed(access, subject, node, flags, descriptor, armed, caller)

    def open_for_ioctl(self, node: Node, flags: int, caller: Caller) -> OpenFile[Node]:
        """Open a node for an ioctl(2) of a file that is open already: the kernel does so for itself, and no event is made. Raises OSError."""
        descriptor = self.overlay.open(node, flags, caller)
        file = self._opened(node, flags, descriptor, Armed.ALL, self._all_direct, caller, 0)
        file.silent = True
        return file

    async def created(
        self, node: Node, flags: int, descriptor: int, caller: Caller, *, unnamed: bool = False
    ) -> tuple[OpenFile[Node], bool]:
        """A file has just been created and opened (`unnamed`: by O_TMPFILE). Returns as open(). Raises OSError when its open is denied: then it
        stays created, as in the kernel (docs/facts.md, section 4), and `descriptor` is closed."""
        flags &= ~(_FMODE_EXEC | os.O_DIRECT)
        if self.listeners.idle:
            return self._opened(node, flags, descriptor, Armed.NO, self._all_direct, caller, 0), True
        with self.leases.entering(node):
            try:
                access, subject, armed = await self._ask_to_open(
                    node, flags, caller.pid, executing=False, unnamed=unnamed
                )
            except BaseException:
                os.close(descriptor)
                raise
            return await self._open_armed(access, subject, node, flags, descriptor, armed, caller)

    async def _ask_to_open(
        self, node: Node, flags: int, tid: int, *, executing: bool, unnamed: bool = False
    ) -> tuple[Access, Subject, Armed]:
        """Ask for permission to open; returns the access, its subject, and how the file is armed. Raises OSError when it is denied."""
        subject = await self.content.seen(node, tid)
        # The kernel arms the file before it asks (docs/facts.md, section 5). A mark that is set while this open waits comes too late.
        armed = self.listeners.armed(subject)
        access = Access(
            AccessKind.OPEN,
            pid=proc.process_of(tid),
            tid=tid,
            writable=_may_write(flags),
            exec=executing,
            directory=node.is_dir,
            unnamed=unnamed,
        )
        await self.content.ask(access, subject, node, Armed.ALL, only=FAN_OPEN_PERM | FAN_OPEN_EXEC_PERM)
        return access, subject, armed

    async def _open_armed(
        self,
        access: Access,
        subject: Subject,
        node: Node,
        flags: int,
        descriptor: int,
        armed: Armed,
        caller: Caller,
    ) -> tuple[OpenFile[Node], bool]:
        try:
            await self.content.ask(access, subject, node, Armed.ALL, only=~CONTENT_PERM_EVENTS)
        except BaseException:
            os.close(descriptor)
            raise
        # Also if it is not heard by this mount: a page that it brought into the cache would be shown by every mount.
        heard = self.listeners.hears_content(subject._replace(mount=None))
        # Reads that the page cache serves make no request, so they could make no notification either.
        by_call = not self._per_file or self.listeners.asks_by_call(subject)
        direct = self._all_direct or (
            self.exact
            and (
                (armed is not Armed.NO and heard and by_call)
                or self.listeners.hears_notification(FAN_ACCESS, subject)
            )
        )
        # Without keep_cache the kernel drops the node's pages. Pages that came in unasked must go. Pages of a direct_io file go so that every
        # new mapping makes its event, as in the kernel. They stay while one of them waits for a listener: this open(2) would wait, too, and
        # could not be killed. Nor could a process that maps a direct_io file meanwhile: mmap(2) drops the node's pages with the process's memory
        # locked (fuse_file_mmap() in the kernel). So a file that can be mapped is opened through the cache then.
        tainted = heard and node in self._stale
        filling = self.attributes.is_filling(node)
        meanwhile = direct and filling and not tainted and flags & os.O_ACCMODE != os.O_WRONLY
        if meanwhile:
            try:
                await self.content.open_through_cache(node)
            except BaseException:
                os.close(descriptor)
                raise
        keep_cache = not tainted and (not direct or filling)
        file = self._opened(node, flags, descriptor, armed, direct and not meanwhile, caller, access.pid)
        if meanwhile:
            file.exact = True
        elif not keep_cache:
            self.content.opened_past_cache(node)
        file.mount = subject.mount
        if self.listeners.notified:
            file.tells_closer = self.listeners.hears_notification(FAN_CLOSE, subject)
            self.content.notify(access, subject, node)
        return file, keep_cache

    def _opened(
        self,
        node: Node,
        flags: int,
        descriptor: int,
        armed: Armed,
        direct: bool,
        caller: Caller,
        pid: int,
    ) -> OpenFile[Node]:
        return self.handles.add(
            node,
            flags,
            descriptor,
            armed=armed,
            direct=direct,
            tid=caller.pid,
            pid=pid,
            uid=caller.uid,
            gid=caller.gid,
        )

    def flushed(self, handle: int, tid: int) -> None:
        """A thread has closed a descriptor of an open file. Raises OSError EBADF for an unknown handle."""
        file = self.handles.get(handle)
        if file.tells_closer:
            pid = proc.process_of(tid)
            # This process also closes descriptors: those that it duplicates from accessors to set O_DIRECT.
            if pid != self._own_pid:
                file.closer = pid, tid

    def release(self, handle: int) -> None:
        """The kernel has released an open file: its last descriptor is closed, and it is mapped nowhere. Raises OSError EBADF."""
        file = self.handles.get(handle)
        if self.listeners.notified & FAN_CLOSE and not file.silent:
            pid, tid = file.closer or (file.pid or proc.process_of(file.tid), file.tid)
            access = Access(AccessKind.CLOSE, pid=pid, tid=tid, writable=_may_write(file.flags))
            # The file must still be open: it may have no name any more by which it could be opened for a listener.
            self.content.notify(access, self.subject(file.node)._replace(mount=file.mount), file.node)
        self.locks.released(file)
        self.handles.release(handle)

    def forget(self, node_id: int, count: int) -> bool:
        """Drop `count` of the kernel's references to a node; returns whether the node has left the table with this call."""
        try:
            node = self.overlay.node(node_id)
        except OSError:
            return False
        gone = self.overlay.forget(node, count)
        if gone:
            self.forgotten(node)
        return gone

    def forgotten(self, node: Node) -> None:
        """Forget a node, as the kernel has forgotten it and its pages."""
        for group in self.listeners.groups:
            group.marks.evicted(node.id)
        self._stale.forget(node.id)
        self.content.forgotten(node.id)
        self.attributes.forgotten(node.id)
        self.handles.forget(node)

    def interrupted(self, tid: int) -> bool:
        """A waiting thread has got a signal; returns whether the signal kills it. Then its waits end with EINTR."""
        if not self.listeners.interrupted(tid):
            return False
        self.leases.interrupted(tid)
        return True

    def changed_unseen(self, node_id: int) -> None:
        """A node was changed for an accessor that had already got EINTR."""
        with suppress(OSError):
            self.content.changed_unseen(self.overlay.node(node_id))

    def left(self, tid: int) -> bool:
        """Whether a thread that asked for a page fill is being killed or is dead. Then its waits end with EINTR."""
        return self.listeners.left(tid)

    def stateless_open(self, node: Node, *, writing: bool) -> OpenFile[Node]:
        """The stateless open file of a node, where the kernel sends no OPEN (FUSE_NO_OPEN_SUPPORT). It stands for all open files of the node,
        and is armed for everything, as their arming is not known."""
        return self.handles.stateless(node, Armed.ALL, writing=writing)

    # Attributes and directories

    async def set_attributes(
        self, node: Node, changes: AttributeChanges, handle: int | None, caller_: Caller
    ) -> tuple[Node, os.stat_result]:
        """Change attributes, through the accessor's open file where it names one (None: by path; 0: a stateless one). A new size is a
        truncation, about which listeners are asked. Raises OSError."""
        if changes.size is not None:
            await self.content.truncate(node, changes.size, caller_.pid)
            if node in self.leases:
                await self.leases.wait(node, caller_.pid)
        async with self.content.changing(node, content=changes.size is not None):
            with self._usable(node, handle) as descriptor:
                change = partial(
                    self.overlay.setattr, node, changes, descriptor, caller_, opened=handle is not None
                )
                try:
                    result = change()
                except BlockingIOError:
                    result = await self.leases.retry(node, caller_.pid, change)
        self.attributes.told(*result)
        if changes.size is not None:
            await self.content.modified(node)
        return result

    @contextmanager
    def _usable(self, node: Node, handle: int | None) -> Iterator[int | None]:
        if handle is None:
            # Any will do to reach the inode.
            opened = (file for file in self.handles.of_node(node) if file.descriptor is not None)
            file = next(opened, None)
        else:
            # Only ftruncate(2) names an open file.
            file = self.handles.get(handle) if handle else self.stateless_open(node, writing=True)
        if file is None:
            yield None
            return
        with self.handles.backing(file) as descriptor:
            yield descriptor

    async def open_directory(self, node: Node, tid: int) -> None:
        """Ask about open(2) of a directory. Raises OSError when it is denied."""
        if not self.listeners.idle:
            access = Access(AccessKind.OPEN, 0, 0, proc.process_of(tid), tid, directory=True)
            await self.listeners.ask(access, await self.content.seen(node, tid), node, armed=Armed.ALL)

    def notify_of_directory(self, kind: AccessKind, node: Node, tid: int) -> None:
        """Make the notification of a directory that has been opened, read or closed."""
        if self.listeners.notified:
            access = Access(kind, pid=proc.process_of(tid), tid=tid, directory=True)
            self.content.notify(access, self.subject(node), node)

    async def read_directory(self, node: Node, position: int, tid: int) -> None:
        """Ask about a read of entries of a directory from `position` on. Raises OSError when it is denied."""
        if not self.listeners.idle:
            access = Access(AccessKind.READ_DIRECTORY, position, 0, proc.process_of(tid), tid, directory=True)
            await self.listeners.ask(access, await self.content.seen(node, tid), node, armed=Armed.ALL)

    def file_status(self, handle: int) -> os.stat_result:
        """fstat(2) of an open file's backing."""
        with self.handles.backing(self.handles.get(handle)) as descriptor:
            return os.fstat(descriptor)

    # Status, for the control socket

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
            "locks": self.locks.describe(self._event_path),
            "leases": self.leases.describe(self._event_path),
            "requests": self.requests(),
        }

    def release_held(self) -> int:
        """Let every access pass that waits for a group to come (--unattended hold); returns how many these are."""
        return self.listeners.release()

    def close(self) -> None:
        """The mount has ended."""
        self.listeners.abandon()
        self.leases.abandon()
        self.locks.close()
        self.handles.close()
        self._explainer.close()


def _may_write(flags: int) -> bool:
    """Whether a file with those flags of open(2) is open for writing. With access mode 3 it is not: that is for ioctl(2) only (FMODE_WRITER)."""
    return flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)
