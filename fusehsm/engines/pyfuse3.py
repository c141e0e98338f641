"""The gate as `pyfuse3.Operations`.

What this engine cannot know (pyfuse3 hands on neither the caller of READ and WRITE nor INTERRUPT, and cannot set INIT fields): the accessor is
taken to be a thread of the process that opened the file; accessors that are being killed are noticed by looking.
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Iterable
from contextlib import closing, suppress
from typing import Any, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from fusehsm.backing_reads import Buffer
from fusehsm.filesystem_calls import RENAME_EXCHANGE
from fusehsm.gate import Gate
from fusehsm.overlay import AttributeChanges, Caller, DirectoryStream, Node

log = logging.getLogger(__name__)

_FOREVER = 1e9  # seconds; FUSE has no other word for "until I say so"
_READ_AHEAD_KB = 128
_Parameters = ParamSpec("_Parameters")
_ResultT = TypeVar("_ResultT")


def _errors_to_fuse(
    operation: Callable[_Parameters, Coroutine[Any, Any, _ResultT]],
) -> Callable[_Parameters, Coroutine[Any, Any, _ResultT]]:
    """FUSE answers OSError with its errno, and anything else with EIO: one failing request must not end the mount."""

    @functools.wraps(operation)
    async def wrapper(*arguments: _Parameters.args, **keywords: _Parameters.kwargs) -> _ResultT:
        try:
            return await operation(*arguments, **keywords)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("%s failed", operation.__name__)
            raise FUSEError(errno.EIO) from None

    return wrapper


class Operations(pyfuse3.Operations):
    """One mount's requests. `private` tells that the backing changes only through the mount or through event fds."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    # The kernel checks rights, so it must know the backing's ACLs: by mode bits alone it would let a group in that an ACL keeps out.
    enable_acl = True

    def __init__(self, gate: Gate, *, private: bool) -> None:
        super().__init__()
        self._gate = gate
        self._overlay = gate.overlay
        self._timeout = _FOREVER if private else 1.0
        self._private = private
        self._directories: dict[int, tuple[DirectoryStream, Node, int]] = {}
        self._next_directory = 1
        self._versions: dict[int, tuple[int, int]] = {}
        # An ordinary user cannot open for writing what he has just made with mode 0444, unless he makes it by opening it.
        self._opens_new_files = os.geteuid() == 0

    # Answers

    def _attributes(self, node: Node, status: os.stat_result) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.id
        entry.generation = node.generation
        entry.entry_timeout = self._timeout
        watched = self._gate.watches(node)
        entry.attr_timeout = 0 if watched else self._timeout
        entry.st_mode = status.st_mode
        entry.st_nlink = status.st_nlink
        entry.st_uid = status.st_uid
        entry.st_gid = status.st_gid
        entry.st_rdev = status.st_rdev
        entry.st_size = status.st_size
        entry.st_blksize = status.st_blksize
        # tar -S takes a file without a single block for one hole and never reads it.
        entry.st_blocks = status.st_blocks or int(watched and status.st_size > 0 and node.is_regular)
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = status.st_mtime_ns
        entry.st_ctime_ns = status.st_ctime_ns
        return entry

    def _absent(self, parent: Node) -> EntryAttributes:
        """A name that does not exist, for the kernel to remember; not where a denied O_CREAT would leave a file that it never hears of."""
        entry = EntryAttributes()
        entry.st_ino = 0
        entry.entry_timeout = 0 if self._gate.may_deny_new(parent) else self._timeout
        entry.attr_timeout = 0
        return entry

    @staticmethod
    def _caller(context: RequestContext) -> Caller:
        return Caller(context.uid, context.gid, context.pid, context.umask)

    # Names

    @_errors_to_fuse
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self._overlay.node(parent_inode)
        try:
            node, status = self._overlay.lookup(parent, name)
        except FileNotFoundError:
            return self._absent(parent)
        return self._attributes(node, status)

    async def forget(self, inode_list: Iterable[tuple[int, int]]) -> None:
        for node_id, count in inode_list:
            try:
                gone = self._overlay.forget(self._overlay.node(node_id), count)
            except OSError:
                continue
            if gone:
                self._gate.forgotten(node_id)
                self._versions.pop(node_id, None)

    @_errors_to_fuse
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        node = self._overlay.node(inode)
        return self._attributes(node, self._overlay.getattr(node))

    @_errors_to_fuse
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        changes = AttributeChanges(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        node = self._overlay.node(inode)
        return self._attributes(*await self._gate.set_attributes(node, changes, fh, self._caller(ctx)))

    @_errors_to_fuse
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return self._overlay.readlink(self._overlay.node(inode))

    @_errors_to_fuse
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        try:
            made = self._overlay.mknod(self._overlay.node(parent_inode), name, mode, rdev, self._caller(ctx))
        except FileExistsError:
            if not stat.S_ISREG(mode):
                raise
            # Made behind the kernel's back. This may be an open(2) without O_EXCL (see create): ESTALE makes the kernel look again.
            raise FUSEError(errno.ESTALE) from None
        return self._attributes(*made)

    @_errors_to_fuse
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(
            *self._overlay.mkdir(self._overlay.node(parent_inode), name, mode, self._caller(ctx))
        )

    @_errors_to_fuse
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._attributes(
            *self._overlay.symlink(self._overlay.node(parent_inode), name, target, self._caller(ctx))
        )

    @_errors_to_fuse
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        new_parent = self._overlay.node(new_parent_inode)
        answer = self._overlay.link(self._overlay.node(inode), new_parent, new_name)
        await self._gate.moved(new_parent, new_name)
        return self._attributes(*answer)

    @_errors_to_fuse
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._overlay.unlink(self._overlay.node(parent_inode), name)

    @_errors_to_fuse
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._overlay.rmdir(self._overlay.node(parent_inode), name)

    @_errors_to_fuse
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        old_parent, new_parent = self._overlay.node(parent_inode_old), self._overlay.node(parent_inode_new)
        self._overlay.rename(old_parent, name_old, new_parent, name_new, flags)
        await self._gate.moved(new_parent, name_new)
        if flags & RENAME_EXCHANGE:
            await self._gate.moved(old_parent, name_old)

    # Files

    def _file_info(self, handle: int, node: Node, *, direct: bool, keep: bool) -> FileInfo:
        return FileInfo(fh=handle, direct_io=direct, keep_cache=keep and self._unchanged(handle, node))

    def _unchanged(self, handle: int, node: Node) -> bool:
        """Whether the file is as it was when the kernel last cached pages of it; only the mount changes a private backing."""
        if self._private:
            return True
        status = self._gate.file_status(handle)
        version = (status.st_mtime_ns, status.st_size)
        known = self._versions.get(node.id)
        self._versions[node.id] = version
        return known == version

    @_errors_to_fuse
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        node = self._overlay.node(inode)
        file, keep = await self._gate.open(node, flags, ctx.pid, ctx.uid)
        return self._file_info(file.handle, node, direct=file.direct, keep=keep)

    @_errors_to_fuse
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        parent = self._overlay.node(parent_inode)
        if self._opens_new_files and self._gate.may_deny_new(parent):
            # The kernel locks the directory until CREATE is answered, so a listener's answer must not be waited for here: its own lookups
            # would wait for it. After ENOSYS the kernel makes files with MKNOD, for good, and opens them when it has let the lock go.
            raise FUSEError(errno.ENOSYS)
        node, status, descriptor = self._overlay.create(parent, name, flags, mode, self._caller(ctx))
        try:
            file, keep = await self._gate.created(node, flags, descriptor, ctx.pid, ctx.uid)
        except BaseException:
            # The kernel never hears of the node, so nothing will forget it; nor may it go on believing that there is no such name. It holds
            # the directory's lock until we have answered, hence asynchronously.
            self._overlay.forget(node, 1)
            pyfuse3.invalidate_entry_async(parent_inode, name, ignore_enoent=True)
            raise
        return self._file_info(file.handle, node, direct=file.direct, keep=keep), self._attributes(
            node, status
        )

    @_errors_to_fuse
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]
        gate = self._gate
        # pyfuse3 takes any contiguous buffer.
        return await gate.read(gate.handles.get(fh), off, size)

    @_errors_to_fuse
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        gate = self._gate
        return await gate.write(gate.handles.get(fh), off, buf)

    @_errors_to_fuse
    async def flush(self, fh: int) -> None:
        # The kernel then stops sending FLUSH: a round trip less for every close(2).
        raise FUSEError(errno.ENOSYS)

    @_errors_to_fuse
    async def release(self, fh: int) -> None:
        self._gate.release(fh)

    @_errors_to_fuse
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._gate.synchronise(fh, datasync)

    # Directories

    @_errors_to_fuse
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        node = self._overlay.node(inode)
        await self._gate.open_directory(node, ctx.pid)
        handle = self._next_directory
        self._next_directory += 1
        self._directories[handle] = (self._overlay.opendir(node), node, ctx.pid)
        return handle

    @_errors_to_fuse
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        stream, node, tid = self._directories[fh]
        await self._gate.read_directory(node, tid)
        with closing(stream.entries(start_id, dots=True)) as entries:
            for entry in entries:
                # A reply that was taken counts as a lookup of the entry, one that did not fit does not.
                if not pyfuse3.readdir_reply(
                    token,
                    entry.name,
                    self._attributes(entry.node, entry.status),
                    entry.next_offset,
                ):
                    break
                if entry.name not in (b".", b".."):
                    self._overlay.remember(entry.node)

    @_errors_to_fuse
    async def releasedir(self, fh: int) -> None:
        self._directories.pop(fh)[0].close()

    @_errors_to_fuse
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self._directories[fh][0].synchronise(datasync)

    # The rest

    @_errors_to_fuse
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        backing = self._overlay.statfs()
        answer = StatvfsData()
        for name in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
            "f_namemax",
        ):
            setattr(answer, name, getattr(backing, name))
        return answer

    @_errors_to_fuse
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return self._overlay.access(self._overlay.node(inode), mode)

    @_errors_to_fuse
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return self._overlay.getxattr(self._overlay.node(inode), name)

    @_errors_to_fuse
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        self._overlay.setxattr(self._overlay.node(inode), name, value, caller=self._caller(ctx))

    @_errors_to_fuse
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return self._overlay.listxattr(self._overlay.node(inode), self._caller(ctx))

    @_errors_to_fuse
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self._overlay.removexattr(self._overlay.node(inode), name)


class KernelCaches:
    """`gate.CacheControl` through pyfuse3 and sysfs."""

    def __init__(self, device: tuple[int, int]) -> None:
        self._read_ahead = f"/sys/class/bdi/{device[0]}:{device[1]}/read_ahead_kb"
        self._exact = False

    def drop_pages(self, node_id: int) -> None:
        pyfuse3.invalidate_inode(node_id)

    def drop_attributes(self, node_id: int) -> None:
        pyfuse3.invalidate_inode(node_id, attr_only=True)

    def set_page_exact(self, exact: bool) -> None:
        # Only root may; without it, faults bring in up to 128 KiB, and the events say so.
        if exact is self._exact:
            return
        self._exact = exact
        with suppress(OSError), open(self._read_ahead, "w", encoding="ascii") as setting:
            setting.write("0" if exact else str(_READ_AHEAD_KB))


def mount(operations: Operations, mount_point: str, options: set[str]) -> None:
    """Mount; raises RuntimeError when fuse_session_mount fails (it has then printed why on stderr)."""
    pyfuse3.init(operations, mount_point, options)


async def serve() -> None:
    """Answer requests until the filesystem is unmounted. Waiting events must never use up the tasks, so there may be any number."""
    await pyfuse3.main(min_tasks=4, max_tasks=1_000_000)


def stop() -> None:
    """Make `serve` return."""
    pyfuse3.terminate()


def close(*, unmount: bool) -> None:
    """Free the session, after `serve` has returned."""
    pyfuse3.close(unmount=unmount)
