"""The filesystem: every POSIX operation on the backing, node by node; it knows nothing of events.

Methods are synchronous and raise OSError with the backing's own errno; ESTALE says that the name no longer leads to the
node, upon which the kernel looks it up again. They are meant for one thread (the event loop's); operations on
descriptors alone may run in any. Permissions were checked by the kernel (default_permissions) before a request arrives.

Promises: nothing outside the source is ever reached; a new object belongs to the accessor from its first moment; set-id
bits do not survive an ordinary user's write although a root server does the writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from typing import Final

from fusehsm.linux import syscalls
from fusehsm.linux.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from fusehsm.overlay import attributes
from fusehsm.overlay.attributes import TIME_NOW, AttributeChanges, path_of
from fusehsm.overlay.credentials import Caller, Impersonation
from fusehsm.overlay.directory import DirectoryEntry, DirectoryStream
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

# What of an accessor's open flags the backing file gets. Not O_APPEND: pwrite(2) ignores its offset on such a descriptor, also
# after the accessor took the flag off with F_SETFL; what appends says so when it writes (emulator/backing_writes.py). Not O_DIRECT: it would ask
# for aligned buffers here, and its promise is the engine's to keep. Not 0x20 (__FMODE_EXEC), O_NOFOLLOW, O_CREAT ...
_BACKING_FLAGS: Final = os.O_ACCMODE | os.O_DSYNC | os.O_SYNC | os.O_NOATIME
# A listener gets what it asked fanotify_init(2) for.
_EVENT_FLAGS: Final = _BACKING_FLAGS | os.O_APPEND | os.O_NONBLOCK
_PATH_ONLY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ACL_ACCESS: Final = b"system.posix_acl_access"


class Overlay:
    """The tree below the directory `source`.

    `directories`: how many directory descriptors to keep. `pins`: how many removed files that the kernel still knows
    keep one, beyond those that are open (the others: overlay/unlinked.py). `trust_seconds`: how long a directory is taken to be where it was last
    found.
    """

    def __init__(
        self, source: str | bytes, *, directories: int = 64, pins: int = 256, trust_seconds: float = 1.0
    ) -> None:
        self._reach = Reach(source, directories=directories, pins=pins, trust_seconds=trust_seconds)
        self._table = self._reach.table
        self._impersonation = Impersonation()
        self.root = self._table.root

    def close(self) -> None:
        """Close every descriptor the overlay keeps; those it gave away are their owners'."""
        self._reach.close()

    def is_pinned(self, node: Node) -> bool:
        """Whether a file that has no name any more can be opened all the same."""
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
        """A new descriptor of the backing's root directory."""
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._reach.root_fd)

    def node_of_backing(self, major: int, minor: int, inode: int) -> Node | None:
        """The node of a file of the backing, None if it is not one that the kernel knows of."""
        return self._table.known_as(os.makedev(major, minor), inode)

    def node(self, node_id: int) -> Node:
        """The node of an id the kernel uses; ESTALE when it is not known (any more)."""
        node = self._table.get(node_id)
        if node is None:
            raise stale()
        return node

    def remember(self, node: Node) -> None:
        """Count one reference: the kernel got the node in a reply, or someone wants it to stay known."""
        node.lookups += 1

    def forget(self, node: Node, count: int = 1) -> bool:
        """Take back `count` references; True when the node left the table (it may stay for the sake of its children)."""
        self._table.forget(node, count)
        return self._table.get(node.id) is not node

    def on_removed(self, call: Callable[[Node], None] | None) -> None:
        """`call` is called with every node whose inode number turned out to belong to a new file: what is kept by its
        id (marks, caches) is void."""
        self._table.on_reused = None if call is None else lambda old, new: call(old)

    def open_files_from(self, provider: Callable[[Node], int | None]) -> None:
        """Let `provider` lend a descriptor of a node whose names are gone (it stays open after use)."""
        self._reach.open_fd_of = provider

    def relative_path(self, node: Node) -> bytes:
        """Path below the source by the name seen last, b"" for the root, " (deleted)" appended as the kernel does."""
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
        """Find `name` in `parent` and count one reference. ENOENT when there is none."""
        if name in (b".", b".."):
            node = parent if name == b"." or parent.parent is None else parent.parent
            status = self._reach.status(node)
        else:
            dir_fd = self._directory(parent, name)
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            node = self._table.enter(status, parent, name, dir_fd)
        node.lookups += 1
        return node, status

    def readlink(self, node: Node) -> bytes:
        """Where a symbolic link points; EINVAL for anything else."""
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
        return self._created(parent, name, dir_fd, 0)

    def mkdir(self, parent: Node, name: bytes, mode: int, caller: Caller) -> tuple[Node, os.stat_result]:
        """Make a directory with `mode` (the umask already applied); counts one reference."""
        dir_fd = self._directory(parent, name)
        with self._impersonation.as_caller(caller):
            os.mkdir(name, mode, dir_fd=dir_fd)
        return self._created(parent, name, dir_fd, mode)

    def mknod(
        self, parent: Node, name: bytes, mode: int, rdev: int, caller: Caller
    ) -> tuple[Node, os.stat_result]:
        """Make a file, fifo, socket or device node by the S_IFMT bits of `mode`; counts one reference."""
        dir_fd = self._directory(parent, name)
        mode = self._creation_mode(dir_fd, mode, caller)
        with self._impersonation.as_caller(caller):
            os.mknod(name, mode, rdev, dir_fd=dir_fd)
        return self._created(parent, name, dir_fd, mode)

    def link(self, node: Node, new_parent: Node, new_name: bytes) -> tuple[Node, os.stat_result]:
        """Give `node` another name; counts one reference."""
        dir_fd = self._directory(new_parent, new_name)
        fd = self._reach.path_fd(node)
        try:
            # Through the magic link, so that it is this very inode, be it a symbolic link itself.
            os.link(path_of(fd), new_name, dst_dir_fd=dir_fd, follow_symlinks=True)
            status = os.fstat(fd)
        finally:
            os.close(fd)
        self._table.add_link(node, new_parent, new_name)
        self._reach.unpin(node)
        node.lookups += 1
        return node, status

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove a name that is not a directory."""
        dir_fd = self._directory(parent, name)
        node, fd = self._doomed(dir_fd, name)
        try:
            os.unlink(name, dir_fd=dir_fd)
        except BaseException:
            _close(fd)
            raise
        self._gone(node, parent, name, fd)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove an empty directory."""
        dir_fd = self._directory(parent, name)
        node, fd = self._doomed(dir_fd, name)
        try:
            os.rmdir(name, dir_fd=dir_fd)
        except BaseException:
            _close(fd)
            raise
        self._gone(node, parent, name, fd)

    def rename(
        self, old_parent: Node, old_name: bytes, new_parent: Node, new_name: bytes, flags: int = 0
    ) -> None:
        """renameat2(2) with RENAME_NOREPLACE, RENAME_EXCHANGE or 0; other flags are EINVAL."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), old_name)
        old_dir_fd = self._directory(old_parent, old_name)
        new_dir_fd = self._directory(new_parent, new_name)
        status = os.stat(old_name, dir_fd=old_dir_fd, follow_symlinks=False)
        moving = self._table.known(status)
        displaced, fd = self._doomed(new_dir_fd, new_name)
        try:
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
        """stat(2) of the node, through `fd` where one is given (any open file of it)."""
        return self._reach.status(node) if fd is None else os.fstat(fd)

    def birth_time(self, node: Node) -> tuple[int, int] | None:
        """When the file was made, in seconds since 1970 and nanoseconds; None where the backing does not keep that."""
        fd = self._reach.path_fd(node)
        try:
            born = syscalls.birth_time(fd, b"")
        finally:
            os.close(fd)
        return None if born is None else struct.unpack("=qI", born)

    def setattr(
        self, node: Node, changes: AttributeChanges, fd: int | None = None, caller: Caller | None = None
    ) -> tuple[Node, os.stat_result]:
        """Change attributes on behalf of `caller` (None: the server itself), through `fd` where one is given (any open
        file of the node: truncation then works without permission to open it for writing, as ftruncate(2)).

        EOPNOTSUPP for the mode of a symbolic link.
        """
        if changes.mode is not None and node.kind == stat.S_IFLNK:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), node.name)
        ordinary = caller if caller is not None and self._impersonation.is_ordinary(caller) else None
        if fd is not None:
            attributes.apply(changes, fd, ordinary)
            return node, os.fstat(fd)
        fd = self._reach.path_fd(node)
        try:
            attributes.apply(changes, fd, ordinary)
            return node, os.fstat(fd)
        finally:
            os.close(fd)

    def access(self, node: Node, mode: int) -> bool:
        """access(2) as the server (with default_permissions the kernel asks nobody)."""
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

    def open(self, node: Node, flags: int, caller_uid: int = 0) -> int:
        """Open the node's backing file with the access mode, O_TRUNC and O_SYNC of `flags`; the descriptor is the
        caller's to close. Nothing but this very inode is ever opened, so nothing else is truncated or woken.

        With O_TRUNC set-id bits go unless `caller_uid` is 0.
        """
        self._check_openable(node)
        fd = self._reach.path_fd(node)
        try:
            if flags & os.O_TRUNC and caller_uid != 0 and self._impersonation.privileged:
                attributes.clear_privileges(fd)
            path, backing_flags = path_of(fd), flags & (_BACKING_FLAGS | os.O_TRUNC) | os.O_CLOEXEC
            try:
                opened = self._reach.open(path, backing_flags)
            except OSError as error:
                if error.errno != errno.EPERM or not flags & os.O_APPEND:
                    raise
                # It can only be appended to (chattr(1)).
                opened = self._reach.open(path, backing_flags | os.O_APPEND)
            if flags & os.O_TRUNC:
                node.told_size = 0
            return opened
        finally:
            os.close(fd)

    def create(
        self, parent: Node, name: bytes, flags: int, mode: int, caller: Caller
    ) -> tuple[Node, os.stat_result, int]:
        """Create and open a regular file; counts one reference, and the descriptor is the caller's to close.

        The kernel asks this for names it takes to be free. Where there is a file now, nobody has checked the accessor's
        rights to it: EEXIST with O_EXCL, else ESTALE, upon which the kernel looks again and opens it properly.
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
            if attributes.restore_mode(path_of(fd), mode, status, path_of(dir_fd)):
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
        """Create and open a regular file without a name (O_TMPFILE); counts one reference, and the descriptor is the caller's to close."""
        directory = path_of(self._reach.directory_fd(parent))
        mode = self._creation_mode(self._reach.directory_fd(parent), mode, caller)
        backing_flags = flags & (_BACKING_FLAGS | os.O_EXCL) | os.O_TMPFILE | os.O_CLOEXEC
        with self._impersonation.as_caller(caller):
            fd = self._reach.open(directory, backing_flags, mode)
        try:
            attributes.restore_mode(path_of(fd), mode, os.fstat(fd), directory)
            status = os.fstat(fd)
            node = self._table.enter_unnamed(status, parent, fd)
            node.lookups += 1
            self._reach.pin(node, self._reach.open(path_of(fd), os.O_PATH | os.O_CLOEXEC))
        except BaseException:
            os.close(fd)
            raise
        return node, status, fd

    def open_for_event(self, node: Node, flags: int, fd: int | None = None) -> int:
        """A descriptor for a listener, opened by its event_f_flags (fanotify_init(2)); O_CLOEXEC always, O_LARGEFILE as
        every descriptor of a 64-bit process. Files and directories only, directories for reading: the kernel opens its own
        for writing, too, but open(2) does not. `fd`: any open file of the node, which saves finding it by its names."""
        if node.kind != stat.S_IFDIR:
            self._check_openable(node)
        else:
            flags &= ~os.O_ACCMODE
        flags = flags & _EVENT_FLAGS | os.O_LARGEFILE | os.O_CLOEXEC
        if fd is not None:
            return self._reach.open(path_of(fd), flags)
        fd = self._reach.path_fd(node)
        try:
            return self._reach.open(path_of(fd), flags)
        finally:
            os.close(fd)

    def open_alone(self, node: Node) -> int:
        """A descriptor of a regular file, for reading and writing, that nobody else has open or mapped on the backing; it is the caller's to
        close. Raises BlockingIOError (EAGAIN) when somebody has, as far as the backing tells (syscalls.take_lease())."""
        try:
            # Not to wait for somebody's lease.
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
                pass  # a backing without leases, or somebody else's file
            else:
                syscalls.give_lease_back(fd)
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def change_time(self, node: Node) -> int | None:
        """When the node was last changed in any way (st_ctime), in nanoseconds; None where nobody can tell."""
        try:
            return self._reach.status(node).st_ctime_ns
        except OSError:
            return None

    def is_being_written(self, node: Node) -> bool:
        """Whether somebody, known here or not, has the node's backing file open for writing or mapped writable; True where nobody can tell.
        Of files on overlayfs mappings are not seen."""
        if not node.is_regular:
            return False
        try:
            # Not to wait for somebody's lease.
            fd = self.open_for_event(node, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return True
        try:
            return syscalls.is_open_for_writing(fd)
        except OSError:
            return True
        finally:
            os.close(fd)

    def before_write(self, node: Node, fd: int, caller_uid: int) -> bool:
        """To be called before writing for user `caller_uid`: takes set-id bits away unless he is root, and returns whether there
        were any. (File capabilities go with any write; an ordinary server's own writes clear everything.)"""
        return caller_uid != 0 and self._impersonation.privileged and attributes.clear_privileges(fd)

    @staticmethod
    def before_placing(fd: int) -> None:
        """To be called before writing at an offset, which a backing file with O_APPEND would ignore. EPERM for a file that can only be appended
        to (open() gives that flag to no other)."""
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
        fd = self._reach.open(
            path_of(self._reach.directory_fd(node)),
            os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NONBLOCK,
        )
        return DirectoryStream(node, fd, self._table)

    # Extended attributes

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Value of an extended attribute; ENODATA when there is none, and for fusehsm's own."""
        attributes.hide_own(name, errno.ENODATA)
        fd = self._reach.path_fd(node)
        try:
            return os.getxattr(path_of(fd), name)
        finally:
            os.close(fd)

    def setxattr(
        self, node: Node, name: bytes, value: bytes, flags: int = 0, caller: Caller | None = None
    ) -> None:
        """Set an extended attribute; `flags` is 0, os.XATTR_CREATE or os.XATTR_REPLACE. EOPNOTSUPP for fusehsm's own (which cp -a takes well)."""
        attributes.hide_own(name, errno.EOPNOTSUPP)
        fd = self._reach.path_fd(node)
        try:
            os.setxattr(path_of(fd), name, value, flags)
            if name == _ACL_ACCESS and caller is not None and self._impersonation.is_ordinary(caller):
                attributes.clear_foreign_sgid(fd, caller)
        finally:
            os.close(fd)

    def listxattr(self, node: Node, caller: Caller | None = None) -> list[bytes]:
        """Names of the extended attributes, fusehsm's own left out; an ordinary `caller` is not shown trusted.* (xattr(7))."""
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

    def removexattr(self, node: Node, name: bytes) -> None:
        """Remove an extended attribute; ENODATA when there is none, and for fusehsm's own."""
        attributes.hide_own(name, errno.ENODATA)
        fd = self._reach.path_fd(node)
        try:
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
        # The kernel opens fifos, sockets and devices of a FUSE mount by itself, and never asks for them.
        if node.kind == stat.S_IFREG:
            return
        code = {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}.get(node.kind, errno.ENXIO)
        raise OSError(code, os.strerror(code), node.name)

    def _creation_mode(self, dir_fd: int, mode: int, caller: Caller) -> int:
        """The mode without set-id bits its maker may not give (mode_strip_sgid() in the kernel)."""
        if not mode & (stat.S_ISUID | stat.S_ISGID):
            return mode
        if not self._impersonation.allows_suid(caller):
            return mode & ~(stat.S_ISUID | stat.S_ISGID)
        if mode & stat.S_ISGID and mode & stat.S_IXGRP and self._impersonation.is_ordinary(caller):
            directory = os.fstat(dir_fd)
            if directory.st_mode & stat.S_ISGID and not caller.in_group(directory.st_gid):
                return mode & ~stat.S_ISGID
        return mode

    def _created(self, parent: Node, name: bytes, dir_fd: int, mode: int) -> tuple[Node, os.stat_result]:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        node = self._table.enter(status, parent, name, dir_fd)
        node.lookups += 1
        if mode & 0o777 & ~status.st_mode:
            fd = os.open(name, _PATH_ONLY, dir_fd=dir_fd)
            try:
                if node.matches(os.fstat(fd)):
                    attributes.restore_mode(path_of(fd), mode, status, path_of(dir_fd))
                    status = os.fstat(fd)
            finally:
                os.close(fd)
        return node, status

    def _doomed(self, dir_fd: int, name: bytes) -> tuple[Node | None, int]:
        """The known node of a name about to go, and a descriptor (O_PATH) of it, or -1."""
        try:
            fd = self._reach.open(name, _PATH_ONLY, dir_fd=dir_fd)
        except OSError:
            return None, -1
        node = self._table.known(os.fstat(fd))
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
