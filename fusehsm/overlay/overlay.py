"""The filesystem: every POSIX operation on nodes of the backing, without any events.

Methods are synchronous and raise OSError with the backing's errno. ESTALE means that the name no longer leads to the
node, upon which the kernel looks it up again. Only one thread (that of the event loop) may call them; operations on
descriptors alone may run in any thread. The kernel checks permissions (default_permissions) before it sends a request.

Promises: no operation reaches anything outside the source. A new object belongs to the accessor from its first moment.
A write by an ordinary user clears set-id bits, although a root server makes the write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Final

from fusehsm.linux import proc, syscalls
from fusehsm.linux.file_io import Buffer, is_allocated
from fusehsm.linux.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from fusehsm.overlay import attributes
from fusehsm.overlay.attributes import TIME_NOW, AttributeChanges, path_of
from fusehsm.overlay.credentials import Caller, Impersonation
from fusehsm.overlay.directory import DirectoryEntry, DirectoryStream, OpenStreams
from fusehsm.overlay.nodes import ROOT_ID, Node
from fusehsm.overlay.reach import Reach, stale

__all__ = [
    "RENAME_EXCHANGE",
    "RENAME_NOREPLACE",
    "ROOT_ID",
    "TIME_NOW",
    "AttributeChanges",
    "Caller",
    "DirectoryEntry",
    "DirectoryStream",
    "Node",
    "Overlay",
]

# The open flags of an accessor that the backing file gets, too. Not O_APPEND: pwrite(2) ignores its offset on such a descriptor, also after the
# accessor has cleared the flag with F_SETFL; each appending write sets RWF_APPEND (emulator/backing_writes.py). Not O_DIRECT: it would need
# aligned buffers here, and the engine provides what it promises. Not 0x20 (__FMODE_EXEC), O_NOFOLLOW, O_CREAT ...
_BACKING_FLAGS: Final = os.O_ACCMODE | os.O_DSYNC | os.O_SYNC | os.O_NOATIME
# A listener's event fd also gets these, if event_f_flags of fanotify_init(2) has them.
_EVENT_FLAGS: Final = _BACKING_FLAGS | os.O_APPEND | os.O_NONBLOCK
# The file systems that overwrite where the content lies, and say so where they do not: ext2, ext3, ext4 and XFS (linux/magic.h).
_IN_PLACE: Final = (0xEF53, 0x58465342)
_PATH_ONLY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CAPABILITY: Final = b"security.capability"


class Overlay:
    """The tree below the directory `source`.

    `directories`: how many directory descriptors to keep, and how many directories that are being read to have open.
    `pins`: how many removed files that the kernel still knows keep a descriptor, beyond those that are open (for the others
    see overlay/reach.py). `trust_seconds`: how long a directory is used without walking its names again.
    """

    def __init__(
        self, source: str | bytes, *, directories: int = 64, pins: int = 256, trust_seconds: float = 1.0
    ) -> None:
        self._reach = Reach(source, directories=directories, pins=pins, trust_seconds=trust_seconds)
        self._table = self._reach.table
        self._impersonation = Impersonation()
        self._streams = OpenStreams(directories)
        self.root = self._table.root
        #: A descriptor of the source as the listener's mount shows it, for open_for_view(); None where the listener has none.
        self.event_root: int | None = None

    def close(self) -> None:
        """Close every descriptor that the overlay keeps. Descriptors that it has returned belong to the callers."""
        self._reach.close()

    def is_pinned(self, node: Node) -> bool:
        """Whether a file can be opened although it has no name any more."""
        return self._reach.is_pinned(node)

    # Nodes

    @property
    def node_count(self) -> int:
        """How many nodes are known, the root included."""
        return len(self._table)

    def known_nodes(self) -> list[Node]:
        """All known nodes, the root included."""
        return list(self._table)

    def open_root(self) -> int:
        """A new descriptor of the backing's root directory; the caller closes it."""
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._reach.root_fd)

    def node_of_backing(self, major: int, minor: int, inode: int) -> Node | None:
        """The node of the existing backing file with that device and inode number; None if the kernel does not know it."""
        node = self._table.known_as(os.makedev(major, minor), inode)
        try:
            if node is not None:
                # It may be of an earlier file with that number.
                self._reach.status(node)
        except OSError:
            return None
        return node

    def node(self, node_id: int) -> Node:
        """The node of an id. Raises OSError ESTALE when it is not known (any more)."""
        node = self._table.get(node_id)
        if node is None:
            raise stale()
        return node

    def remember(self, node: Node) -> None:
        """Count one reference: the kernel got the node in a reply, or a user of the overlay needs it to stay in the table."""
        node.lookups += 1

    def forget(self, node: Node, count: int = 1) -> bool:
        """Drop `count` references; returns whether the node has left the table. It may stay because of its children."""
        self._table.forget(node, count)
        return self._table.get(node.id) is not node

    def on_removed(self, call: Callable[[Node], None] | None) -> None:
        """Set the function that is called with every node whose inode number now belongs to a new file. All state that is
        kept by its id (marks, caches) is invalid then."""
        self._table.on_reused = None if call is None else lambda old, new: call(old)

    def open_files_from(self, provider: Callable[[Node], int | None]) -> None:
        """Set the function that gives a descriptor of a node without names. The descriptor still belongs to the provider."""
        self._reach.open_fd_of = provider

    def relative_path(self, node: Node) -> bytes:
        """The path below the source by the name seen last; b"" for the root. After a removal " (deleted)" is appended, as in
        the kernel."""
        names = []
        current: Node | None = node
        deleted = False
        while current is not None and current.parent is not None:
            names.append(current.name)
            deleted = deleted or not current.linked
            current = current.parent
        path = b"/".join(reversed(names))
        return path + b" (deleted)" if deleted else path

    # Names

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Find `name` in `parent`, and count one reference. Raises OSError ENOENT when there is none."""
        if name in (b".", b".."):
            node = parent if name == b"." or parent.parent is None else parent.parent
            status = self._reach.status(node)
        else:
            dir_fd = self._directory(parent, name)
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            node = self._table.enter(status, parent, name, dir_fd)
        node.lookups += 1
        return node, status

    def find(self, path: bytes) -> Node:
        """The node at a path below the source, through no symbolic link; counts one reference. Raises OSError as lookup()."""
        node = self.root
        self.remember(node)
        for name in filter(None, path.split(b"/")):
            try:
                child, _ = self.lookup(node, name)
            finally:
                self.forget(node)
            node = child
        return node

    def readlink(self, node: Node) -> bytes:
        """The target of a symbolic link. Raises OSError EINVAL for other nodes."""
        if node.kind != stat.S_IFLNK:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), node.name)
        fd = self._reach.path_fd(node)
        try:
            return os.readlink(b"", dir_fd=fd)
        finally:
            os.close(fd)

    def symlink(
        self, parent: Node, name: bytes, target: bytes, caller: Caller
    ) -> tuple[Node, os.stat_result]:
        """Make a symbolic link to `target`; counts one reference."""
        dir_fd = self._directory(parent, name)
        with self._impersonation.as_caller(caller):
            os.symlink(target, name, dir_fd=dir_fd)
        return self._created(parent, name, dir_fd)

    def mkdir(self, parent: Node, name: bytes, mode: int, caller: Caller) -> tuple[Node, os.stat_result]:
        """Make a directory with `mode` (the umask already applied); counts one reference."""
        dir_fd = self._directory(parent, name)
        with self._impersonation.as_caller(caller):
            os.mkdir(name, mode, dir_fd=dir_fd)
        return self._created(parent, name, dir_fd)

    def mknod(
        self, parent: Node, name: bytes, mode: int, rdev: int, caller: Caller
    ) -> tuple[Node, os.stat_result]:
        """Make a file, fifo, socket or device node by the S_IFMT bits of `mode`; counts one reference."""
        dir_fd = self._directory(parent, name)
        mode = self._creation_mode(dir_fd, mode, caller)
        with self._impersonation.as_caller(caller):
            os.mknod(name, mode, rdev, dir_fd=dir_fd)
        return self._created(parent, name, dir_fd)

    def link(
        self, node: Node, new_parent: Node, new_name: bytes, caller: Caller | None = None
    ) -> tuple[Node, os.stat_result]:
        """Give `node` another name on behalf of `caller`; counts one reference."""
        dir_fd = self._directory(new_parent, new_name)
        fd = self._reach.path_fd(node)
        try:
            # Through the magic link, so that the new name is for exactly this inode, even if it is a symbolic link.
            with self._impersonation.as_caller(caller):
                os.link(path_of(fd), new_name, dst_dir_fd=dir_fd, follow_symlinks=True)
            status = os.fstat(fd)
        finally:
            os.close(fd)
        self._table.add_link(node, new_parent, new_name)
        self._reach.unpin(node)
        node.lookups += 1
        return node, status

    def unlink(self, parent: Node, name: bytes, caller: Caller | None = None) -> None:
        """Remove a name that is not that of a directory, on behalf of `caller` (None: the server itself)."""
        dir_fd = self._directory(parent, name)
        node, fd = self._doomed(dir_fd, name)
        try:
            with self._impersonation.as_caller(caller):
                os.unlink(name, dir_fd=dir_fd)
        except BaseException:
            _close(fd)
            raise
        self._gone(node, parent, name, fd)

    def rmdir(self, parent: Node, name: bytes, caller: Caller | None = None) -> None:
        """Remove an empty directory, on behalf of `caller`."""
        dir_fd = self._directory(parent, name)
        node, fd = self._doomed(dir_fd, name)
        try:
            with self._impersonation.as_caller(caller):
                os.rmdir(name, dir_fd=dir_fd)
        except BaseException:
            _close(fd)
            raise
        self._gone(node, parent, name, fd)

    def rename(
        self,
        old_parent: Node,
        old_name: bytes,
        new_parent: Node,
        new_name: bytes,
        flags: int = 0,
        caller: Caller | None = None,
    ) -> None:
        """renameat2(2) with RENAME_NOREPLACE, RENAME_EXCHANGE or 0, on behalf of `caller`. Raises OSError EINVAL for other flags."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), old_name)
        old_dir_fd = self._directory(old_parent, old_name)
        new_dir_fd = self._directory(new_parent, new_name)
        status = os.stat(old_name, dir_fd=old_dir_fd, follow_symlinks=False)
        moving = self._table.known(status, old_dir_fd, old_name)
        displaced, fd = self._doomed(new_dir_fd, new_name)
        try:
            with self._impersonation.as_caller(caller):
                if flags:
                    syscalls.rename(old_dir_fd, old_name, new_dir_fd, new_name, flags)
                else:
                    os.rename(old_name, new_name, src_dir_fd=old_dir_fd, dst_dir_fd=new_dir_fd)
        except BaseException:
            _close(fd)
            raise
        if displaced is not None and displaced is moving:
            # Two names of one inode: rename(2) does nothing, and an exchange changes nothing.
            _close(fd)
            return
        if moving is not None:
            self._table.add_link(moving, new_parent, new_name)
            self._table.drop_link(moving, old_parent, old_name)
        if not flags & RENAME_EXCHANGE:
            self._gone(displaced, new_parent, new_name, fd)
            return
        _close(fd)
        if displaced is not None:
            self._table.add_link(displaced, old_parent, old_name)
            self._table.drop_link(displaced, new_parent, new_name)

    # Attributes

    def getattr(self, node: Node, fd: int | None = None) -> os.stat_result:
        """stat(2) of the node, through `fd` (any open file of it) where it is given."""
        return self._reach.status(node) if fd is None else os.fstat(fd)

    def birth_time(self, node: Node) -> tuple[int, int] | None:
        """The file's birth time as (seconds since 1970, nanoseconds); None where the backing does not store it."""
        fd = self._reach.path_fd(node)
        try:
            born = syscalls.birth_time(fd, b"")
        finally:
            os.close(fd)
        return None if born is None else struct.unpack("=qI", born)

    def setattr(
        self,
        node: Node,
        changes: AttributeChanges,
        fd: int | None = None,
        caller: Caller | None = None,
        *,
        opened: bool = True,
    ) -> tuple[Node, os.stat_result]:
        """Change attributes with the rights of `caller` (None: the server's own); returns the node and its new status.

        `fd` is any open file of the node. If it is the caller's (`opened`) and open for writing, a truncation needs no permission to open the
        file, as with ftruncate(2). Raises OSError EOPNOTSUPP for the mode of a symbolic link.
        """
        if changes.mode is not None and node.kind == stat.S_IFLNK:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), node.name)
        if fd is not None:
            return node, self._apply(changes, fd, caller, through=opened)
        fd = self._reach.path_fd(node)
        try:
            return node, self._apply(changes, fd, caller)
        finally:
            os.close(fd)

    def _apply(
        self, changes: AttributeChanges, fd: int, caller: Caller | None, *, through: bool = False
    ) -> os.stat_result:
        if changes.mode is not None and attributes.only_drops_set_id(fd, changes.mode):
            # Before a write or truncation the kernel asks for this in the name of a user who need not own the file, unless it leaves it to the
            # server (FUSE_HANDLE_KILLPRIV).
            attributes.apply(AttributeChanges(mode=changes.mode), fd)
            changes = replace(changes, mode=None)
            if changes == AttributeChanges():
                return os.fstat(
                    fd
                )  # a request that is without any change from the beginning means another thing
        with self._impersonation.rights_of(caller, fd):
            attributes.apply(changes, fd, through=through)
        return os.fstat(fd)

    def access(self, node: Node, mode: int) -> bool:
        """access(2) with the server's own rights. With default_permissions the kernel does not send this request."""
        fd = self._reach.path_fd(node)
        try:
            return os.access(path_of(fd), mode)
        finally:
            os.close(fd)

    def statfs(self, node: Node | None = None) -> os.statvfs_result:
        """statvfs(3) of the filesystem that holds the node (None: the root)."""
        if node is None:
            return os.fstatvfs(self._reach.root_fd)
        fd = self._reach.path_fd(node)
        try:
            return os.fstatvfs(fd)
        finally:
            os.close(fd)

    # Files

    def open(self, node: Node, flags: int, caller: Caller | None = None) -> int:
        """Open the node's backing file with the access mode, O_TRUNC and O_SYNC of `flags`; the caller closes the descriptor.

        It opens exactly this inode, so no other file is truncated. O_TRUNC is done with the rights of `caller` (None: the server's own).
        Raises BlockingIOError (EAGAIN) while another process's lease on the file is being broken; otherwise OSError as open(2),
        and for anything but a regular file: EISDIR for a directory, ELOOP for a symbolic link, ENXIO for the rest.
        """
        self._check_openable(node)
        fd = self._reach.path_fd(node)
        try:
            # O_NONBLOCK, so that it does not wait for the end of a lease. On the descriptor of a regular file it changes nothing.
            kept = flags & (_BACKING_FLAGS | os.O_TRUNC)
            path, backing_flags = path_of(fd), kept | os.O_CLOEXEC | os.O_NONBLOCK
            if flags & os.O_TRUNC:
                opened = self._truncated(fd, backing_flags, caller)
                node.told_size = 0
                return opened
            try:
                return self._reach.open(path, backing_flags)
            except OSError as error:
                if error.errno != errno.EPERM or not flags & os.O_APPEND:
                    raise
                # The file is append-only (chattr(1)).
                return self._reach.open(path, backing_flags | os.O_APPEND)
        finally:
            os.close(fd)

    def _truncated(self, fd: int, flags: int, caller: Caller | None) -> int:
        path = path_of(fd)
        try:
            with self._impersonation.rights_of(caller, fd):
                return self._reach.open(path, flags)
        except PermissionError:
            # open(2) with O_CREAT of a new file asks for no permission. It may arrive as MKNOD and OPEN, and there is nothing to truncate.
            opened = self._reach.open(path, flags & ~os.O_TRUNC)
            if os.fstat(opened).st_size:
                os.close(opened)
                raise
            return opened

    def create(
        self, parent: Node, name: bytes, flags: int, mode: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """Create and open a regular file; counts one reference. Returns the node, its status and a descriptor, which the caller closes.

        The kernel sends CREATE for names that it takes to be free. If a file exists by now, the accessor's permission for it is
        not checked. This then raises OSError EEXIST with O_EXCL, otherwise ESTALE, upon which the kernel looks the name up again
        and opens the file with all checks.
        """
        dir_fd = self._directory(parent, name)
        mode = self._creation_mode(dir_fd, mode, caller)
        backing_flags = flags & _BACKING_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with self._impersonation.as_caller(caller):
                fd = self._reach.open(name, backing_flags, mode, dir_fd=dir_fd)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            raise stale(name) from None
        try:
            status = os.fstat(fd)
            node = self._table.enter(status, parent, name, dir_fd)
        except BaseException:
            os.close(fd)
            raise
        node.lookups += 1
        return node, status, fd

    def create_unnamed(
        self, parent: Node, flags: int, mode: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """Create and open a regular file without a name (O_TMPFILE); counts one reference. Returns as create()."""
        directory = path_of(self._reach.directory_fd(parent))
        mode = self._creation_mode(self._reach.directory_fd(parent), mode, caller)
        backing_flags = flags & (_BACKING_FLAGS | os.O_EXCL) | os.O_TMPFILE | os.O_CLOEXEC
        with self._impersonation.as_caller(caller):
            fd = self._reach.open(directory, backing_flags, mode)
        try:
            status = os.fstat(fd)
            node = self._table.enter_unnamed(status, parent, fd)
            node.lookups += 1
            self._reach.pin(node, self._reach.open(path_of(fd), os.O_PATH | os.O_CLOEXEC))
        except BaseException:
            os.close(fd)
            raise
        return node, status, fd

    def open_for_event(self, node: Node, flags: int, fd: int | None = None) -> int:
        """An event fd for a listener, opened with its event_f_flags (fanotify_init(2)) in `flags`. Raises OSError.

        O_CLOEXEC is always set, and O_LARGEFILE as on every descriptor of a 64-bit process. Only files and directories can be
        opened, and directories for reading only: the kernel opens them for writing, too, but open(2) cannot. `fd`: any open file
        of the node, or O_PATH, which saves a walk of its names. Where another process's lease would make it wait, it is BlockingIOError.
        """
        if node.kind != stat.S_IFDIR:
            self._check_openable(node)
        else:
            flags &= ~os.O_ACCMODE
        flags = flags & _EVENT_FLAGS | os.O_LARGEFILE | os.O_CLOEXEC
        # O_NONBLOCK, so that it does not wait for the end of a lease.
        if fd is not None:
            opened = self._reach.open(path_of(fd), flags | os.O_NONBLOCK)
        else:
            fd = self._reach.path_fd(node)
            try:
                opened = self._reach.open(path_of(fd), flags | os.O_NONBLOCK)
            finally:
                os.close(fd)
        if not flags & os.O_NONBLOCK:
            os.set_blocking(opened, True)
        return opened

    def open_for_view(self, node: Node, flags: int, fd: int | None = None) -> int:
        """open_for_event() through the listener's own mount of the source, so that the mount id is the listener's, too.

        Where the node's names lead elsewhere on that mount, it is opened as for others. Needs `event_root`.
        """
        found = self._path_below_event_root(node)
        if found is None:
            return self.open_for_event(node, flags, fd)
        try:
            return self.open_for_event(node, flags, found)
        finally:
            os.close(found)

    def _path_below_event_root(self, node: Node) -> int | None:
        assert self.event_root is not None
        path = self.relative_path(node) or b"."
        resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
        try:
            found = syscalls.openat2(self.event_root, path, _PATH_ONLY, resolve)
        except OSError:
            return None
        if self._table.is_node(node, os.fstat(found), found, b""):
            return found
        os.close(found)
        return None

    def open_alone(self, node: Node) -> int:
        """A descriptor, for reading and writing, of a regular file that no other process has open or mapped on the backing.

        The caller closes it. Raises BlockingIOError (EAGAIN) when another process has the file open, as far as the backing can tell
        (syscalls.take_lease()).
        """
        try:
            # O_NONBLOCK, so that it does not wait for the end of another lease.
            fd = self.open_for_event(node, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ETXTBSY:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
            raise
        try:
            try:
                syscalls.take_lease(fd)
            except BlockingIOError:
                raise
            except OSError:
                pass  # the backing has no leases, or the file belongs to another user
            else:
                syscalls.give_lease_back(fd)
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def change_time(self, node: Node) -> int | None:
        """The node's st_ctime, in nanoseconds; None where stat(2) fails."""
        try:
            return self._reach.status(node).st_ctime_ns
        except OSError:
            return None

    def is_being_written(self, node: Node) -> bool:
        """Whether any process has the node's backing file open for writing or mapped writable; True where that is unknown.

        On overlayfs mappings are not seen.
        """
        if not node.is_regular:
            return False
        try:
            # O_NONBLOCK, so that it does not wait for the end of a lease.
            fd = self.open_for_event(node, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return True
        try:
            return syscalls.is_open_for_writing(fd)
        except OSError:
            return True
        finally:
            os.close(fd)

    def before_write(self, node: Node, fd: int, caller_uid: int, caller_tid: int) -> bool:
        """Clear set-id bits before a write for user `caller_uid`, unless that is root; returns whether there were any. `caller_tid`: the
        thread that writes, 0 if it is not known.

        The kernel clears file capabilities at every write, and set-id bits at the writes of an ordinary server.
        """
        if caller_uid == 0 or not self._impersonation.privileged:
            return False
        return attributes.clear_privileges(fd, partial(proc.is_member, caller_tid))

    def write(
        self,
        node: Node,
        caller: Caller,
        fd: int,
        data: Buffer,
        offset: int,
        how: int = 0,
        may_grow: bool = True,
    ) -> int:
        """pwritev2(2) with the rights of `caller` to space; returns the number of bytes written. `how`: RWF_* flags. Raises OSError.

        `may_grow`: False where the file is known to reach as far as the write.
        """
        impersonation = self._impersonation
        if impersonation.is_own(caller) or (
            not may_grow and self._overwrites_in_place(node, fd) and is_allocated(fd, offset, len(data))
        ):
            # Between the two a process that uses SRC may free what it has here. Then this takes no more than that.
            return os.pwritev(fd, [data], offset, how) if how else os.pwrite(fd, data, offset)
        return impersonation.write(caller, fd, data, offset, how)

    @staticmethod
    def _overwrites_in_place(node: Node, fd: int) -> bool:
        device = node.device
        if device.overwrites_in_place is None:
            device.overwrites_in_place = syscalls.filesystem_type(fd) in _IN_PLACE
        return device.overwrites_in_place

    def rights_of(self, caller: Caller) -> AbstractContextManager[None]:
        """Context manager in which this thread, which may be any, acts with the rights of `caller`. Raises OSError."""
        return self._impersonation.rights_of(caller)

    @staticmethod
    def before_placing(fd: int) -> None:
        """Clear O_APPEND of a backing file before a write at an offset, which that flag would override.

        Raises OSError EPERM for an append-only file. open() sets the flag on no other file.
        """
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_APPEND:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_APPEND)

    @staticmethod
    def fsync(fd: int, data_only: bool = False) -> None:
        """fsync(2), or fdatasync(2)."""
        (os.fdatasync if data_only else os.fsync)(fd)

    # Directories

    def opendir(self, node: Node) -> DirectoryStream:
        """Open a directory for reading."""
        return DirectoryStream(node, partial(self._open_directory, node), self._table, self._streams)

    def _open_directory(self, node: Node) -> int:
        return self._reach.open(
            path_of(self._reach.directory_fd(node)),
            os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NONBLOCK,
        )

    # Extended attributes

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """The value of an extended attribute. Raises OSError ENODATA when there is none, and for fusehsm's own."""
        attributes.hide_own(name, errno.ENODATA)
        fd = self._reach.path_fd(node)
        try:
            return os.getxattr(path_of(fd), name)
        finally:
            os.close(fd)

    def setxattr(
        self, node: Node, name: bytes, value: bytes, flags: int = 0, caller: Caller | None = None
    ) -> None:
        """Set an extended attribute; `flags` is 0, os.XATTR_CREATE or os.XATTR_REPLACE.

        It is done with the rights of `caller` (None: the server's own). Raises OSError EOPNOTSUPP for fusehsm's own, an error that cp -a ignores.
        """
        attributes.hide_own(name, errno.EOPNOTSUPP)
        fd = self._reach.path_fd(node)
        try:
            with self._impersonation.rights_of(caller, fd):
                os.setxattr(path_of(fd), name, value, flags)
        finally:
            os.close(fd)

    def listxattr(self, node: Node, caller: Caller | None = None) -> list[bytes]:
        """Names of the extended attributes, without fusehsm's own; for an ordinary `caller` without trusted.* (xattr(7))."""
        fd = self._reach.path_fd(node)
        try:
            names = [
                name
                for name in map(os.fsencode, os.listxattr(path_of(fd)))
                if not name.startswith(attributes.OWN_XATTRS)
            ]
        finally:
            os.close(fd)
        if caller is not None and caller.uid != 0:
            names = [name for name in names if not name.startswith(b"trusted.")]
        return names

    def removexattr(self, node: Node, name: bytes, caller: Caller | None = None) -> None:
        """Remove an extended attribute, as setxattr(). Raises OSError ENODATA when there is none, and for fusehsm's own."""
        attributes.hide_own(name, errno.ENODATA)
        fd = self._reach.path_fd(node)
        try:
            with self._impersonation.rights_of(caller, fd):
                try:
                    os.removexattr(path_of(fd), name)
                    return
                except PermissionError:
                    # The kernel asks for this in the name of whoever is about to write, who need not own the file.
                    if name != _CAPABILITY or not os.access(path_of(fd), os.W_OK, effective_ids=True):
                        raise
            os.removexattr(path_of(fd), name)
        finally:
            os.close(fd)

    # Helpers

    def _directory(self, parent: Node, name: bytes) -> int:
        # The source's ".." is outside.
        if b"/" in name or name in (b"", b".", b".."):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
        return self._reach.directory_fd(parent)

    @staticmethod
    def _check_openable(node: Node) -> None:
        # The kernel opens fifos, sockets and devices of a FUSE mount by itself, without a request.
        if node.kind == stat.S_IFREG:
            return
        code = {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}.get(node.kind, errno.ENXIO)
        raise OSError(code, os.strerror(code), node.name)

    def _creation_mode(self, dir_fd: int, mode: int, caller: Caller) -> int:
        """The mode of a new object, without set-id bits that its creator may not set (mode_strip_sgid() in the kernel)."""
        if not mode & (stat.S_ISUID | stat.S_ISGID):
            return mode
        if not self._impersonation.allows_suid(caller):
            return mode & ~(stat.S_ISUID | stat.S_ISGID)
        if mode & stat.S_ISGID and mode & stat.S_IXGRP and self._impersonation.is_ordinary(caller):
            directory = os.fstat(dir_fd)
            if directory.st_mode & stat.S_ISGID and not caller.in_group(directory.st_gid):
                return mode & ~stat.S_ISGID
        return mode

    def _created(self, parent: Node, name: bytes, dir_fd: int) -> tuple[Node, os.stat_result]:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        node = self._table.enter(status, parent, name, dir_fd)
        node.lookups += 1
        return node, status

    def _doomed(self, dir_fd: int, name: bytes) -> tuple[Node | None, int]:
        """The known node of a name that is about to be removed, and a descriptor (O_PATH) of it; (None, -1) without such a node."""
        try:
            fd = self._reach.open(name, _PATH_ONLY, dir_fd=dir_fd)
        except OSError:
            return None, -1
        node = self._table.known(os.fstat(fd), fd, b"")
        if node is None:
            os.close(fd)
            return None, -1
        return node, fd

    def _gone(self, node: Node | None, parent: Node, name: bytes, fd: int) -> None:
        if node is None:
            return
        self._table.drop_link(node, parent, name)
        if node.linked or node.lookups == 0:
            os.close(fd)
        else:
            self._reach.pin(node, fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
