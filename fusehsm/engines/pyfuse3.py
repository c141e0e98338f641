"""The engine `pyfuse3`: passes the requests of the library pyfuse3 to the gate.

pyfuse3 hides the caller of READ and WRITE (docs/facts.md, section 12) and INTERRUPT, and cannot set fields of INIT. So this engine takes the
accessor to be a thread of the process that opened the file. It finds killed accessors by periodic checks.
"""

import errno
import functools
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from fusehsm.emulator.gate import Gate
from fusehsm.emulator.handles import OpenFile
from fusehsm.emulator.page_cache import CacheControl
from fusehsm.engines import fuse_mount
from fusehsm.engines.base import MountRefused
from fusehsm.engines.cache_policy import CachePolicy
from fusehsm.engines.filesystem import Filesystem
from fusehsm.linux.file_io import Buffer
from fusehsm.linux.fuse_settings import ReadAhead, raise_background_limit
from fusehsm.linux.suspension import is_cancellation
from fusehsm.overlay.overlay import AttributeChanges, Caller, Node

log = logging.getLogger(__name__)

# A mount option that libfuse does not know.
_NO_LINKS = "nosymfollow"

_Parameters = ParamSpec("_Parameters")
_ResultT = TypeVar("_ResultT")


def _errors_to_fuse(
    operation: Callable[_Parameters, Coroutine[Any, Any, _ResultT]],
) -> Callable[_Parameters, Coroutine[Any, Any, _ResultT]]:
    """Decorator that answers an OSError with its errno and any other exception with EIO: one failed request must not end the mount."""

    @functools.wraps(operation)
    async def wrapper(*arguments: _Parameters.args, **keywords: _Parameters.kwargs) -> _ResultT:
        try:
            return await operation(*arguments, **keywords)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except FUSEError:
            raise
        except BaseException as error:
            if is_cancellation(error):
                raise
            log.exception("%s failed", operation.__name__)
            raise FUSEError(errno.EIO) from None

    return wrapper


class Operations(pyfuse3.Operations):
    """The requests of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    # The kernel checks permissions, so it must know the backing's ACLs. By mode bits alone it would admit a group that an ACL excludes.
    enable_acl = True

    def __init__(self, gate: Gate, policy: CachePolicy) -> None:
        super().__init__()
        self._gate = gate
        self._overlay = gate.overlay
        self._policy = policy
        self._filesystem = Filesystem(gate)

    # Answers

    def _attributes(self, node: Node, status: os.stat_result) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.id
        entry.generation = node.generation
        entry.entry_timeout = self._policy.entry_timeout()
        entry.attr_timeout = self._policy.attr_timeout(node, status)
        entry.st_mode = status.st_mode
        entry.st_nlink = status.st_nlink
        entry.st_uid = status.st_uid
        entry.st_gid = status.st_gid
        entry.st_rdev = status.st_rdev
        entry.st_size = status.st_size
        entry.st_blksize = status.st_blksize
        entry.st_blocks = self._policy.blocks(node, status)
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = self._policy.mtime(node, status)
        entry.st_ctime_ns = status.st_ctime_ns
        return entry

    def _absent(self, parent: Node) -> EntryAttributes:
        """The negative entry of a name that does not exist, for the kernel to cache."""
        entry = EntryAttributes()
        entry.st_ino = 0
        entry.entry_timeout = self._policy.negative_timeout(parent)
        entry.attr_timeout = 0
        return entry

    @staticmethod
    def _caller(context: RequestContext) -> Caller:
        return Caller(context.uid, context.gid, context.pid, context.umask)

    # Names

    @_errors_to_fuse
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        found = self._filesystem.lookup(parent_inode, name)
        return self._attributes(*found) if found else self._absent(self._overlay.node(parent_inode))

    async def forget(self, inode_list: Iterable[tuple[int, int]]) -> None:
        try:
            for node_id, count in inode_list:
                if self._gate.forget(node_id, count):
                    self._policy.forgotten(node_id)
        except BaseException:  # FORGET has no answer, and an exception would end pyfuse3
            log.exception("forget failed")

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
        return self._attributes(*self._filesystem.mknod(parent_inode, name, mode, rdev, self._caller(ctx)))

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
        return self._attributes(
            *await self._filesystem.link(inode, new_parent_inode, new_name, self._caller(ctx))
        )

    @_errors_to_fuse
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._overlay.unlink(self._overlay.node(parent_inode), name, self._caller(ctx))

    @_errors_to_fuse
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        self._overlay.rmdir(self._overlay.node(parent_inode), name, self._caller(ctx))

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
        await self._filesystem.rename(
            parent_inode_old, name_old, parent_inode_new, name_new, flags, self._caller(ctx)
        )

    # Files

    def _file_info(self, file: OpenFile[Node], *, keep_cache: bool) -> FileInfo:
        keep_cache = self._policy.keep_cache(file) and keep_cache
        direct = file.direct or self._policy.appends_past_cache(file)
        return FileInfo(fh=file.handle, direct_io=direct, keep_cache=keep_cache)

    @_errors_to_fuse
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        node = self._overlay.node(inode)
        file, keep_cache = await self._gate.open(node, flags, self._caller(ctx))
        return self._file_info(file, keep_cache=keep_cache)

    @_errors_to_fuse
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        file, keep_cache, found = await self._filesystem.create(
            parent_inode, name, flags, mode, self._caller(ctx), _inval_entry
        )
        return self._file_info(file, keep_cache=keep_cache), self._attributes(*found)

    @_errors_to_fuse
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]
        gate = self._gate
        # pyfuse3 takes any contiguous buffer.
        return await gate.content.read(gate.handles.get(fh), off, size)

    @_errors_to_fuse
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        gate = self._gate
        return await gate.content.write(gate.handles.get(fh), off, buf)

    @_errors_to_fuse
    async def flush(self, fh: int) -> None:
        # The kernel then stops sending FLUSH, which saves a round trip for every close(2).
        raise FUSEError(errno.ENOSYS)

    @_errors_to_fuse
    async def release(self, fh: int) -> None:
        self._gate.release(fh)

    @_errors_to_fuse
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._gate.content.synchronise(self._gate.handles.get(fh), datasync)

    # Directories

    @_errors_to_fuse
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return await self._filesystem.opendir(inode, ctx.pid)

    @_errors_to_fuse
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        stream = await self._filesystem.readdir(fh, start_id)
        with closing(stream.entries(start_id, dots=True)) as entries:
            for entry in entries:
                # A reply that fits counts as a lookup of the entry, one that does not fit does not.
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
        self._filesystem.releasedir(fh)

    @_errors_to_fuse
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self._filesystem.fsyncdir(fh, data_only=datasync)

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
        return self._filesystem.getxattr(inode, name)

    @_errors_to_fuse
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        self._overlay.setxattr(self._overlay.node(inode), name, value, caller=self._caller(ctx))

    @_errors_to_fuse
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return self._overlay.listxattr(self._overlay.node(inode), self._caller(ctx))

    @_errors_to_fuse
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self._overlay.removexattr(self._overlay.node(inode), name, self._caller(ctx))


def _inval_entry(parent_id: int, name: bytes) -> None:
    pyfuse3.invalidate_entry_async(parent_id, name, ignore_enoent=True)


class KernelCaches:
    """`page_cache.CacheControl` through pyfuse3 and sysfs."""

    def __init__(self, device: tuple[int, int]) -> None:
        self._read_ahead = ReadAhead(device)

    def inval_inode(self, node_id: int) -> None:
        pyfuse3.invalidate_inode(node_id)

    def inval_range(self, node_id: int, offset: int, size: int) -> None:
        # pyfuse3 cannot drop a range.
        pyfuse3.invalidate_inode(node_id)

    def inval_attributes(self, node_id: int) -> None:
        pyfuse3.invalidate_inode(node_id, attr_only=True)

    def set_page_exact(self, exact: bool) -> None:
        # Without root, a fault brings in up to 128 KiB, and its event covers that range.
        self._read_ahead.switch(off=exact)


class PyFuse3:
    """The engine `pyfuse3`; implements `base.Engine`."""

    def __init__(self, gate: Gate, *, private: bool) -> None:
        self._gate = gate
        self._operations = Operations(gate, CachePolicy(gate, private=private))

    def mount(self, mount_point: str, options: frozenset[str]) -> None:
        with _captured_stderr() as complaint:
            try:
                pyfuse3.init(self._operations, mount_point, {*options} - {_NO_LINKS})
            except RuntimeError as error:
                reason = complaint().strip().splitlines()
                raise MountRefused(
                    f"{mount_point}: {reason[-1] if reason else error}; see fusehsm doctor"
                ) from None
        if _NO_LINKS in options:
            try:
                fuse_mount.set_flags(mount_point, options)
            except MountRefused:
                pyfuse3.close()
                raise

    def caches(self, device: tuple[int, int]) -> CacheControl:
        # pyfuse3 cannot set max_background in INIT.
        raise_background_limit(device)
        return KernelCaches(device)

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._gate.listeners.kill_watch.run)
            nursery.start_soon(self._gate.leases.kill_watch.run)
            # Accesses that wait must never use up all tasks, so the limit is practically none.
            await pyfuse3.main(min_tasks=4, max_tasks=1_000_000)
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        pyfuse3.terminate()

    def close(self) -> None:
        # libfuse would unmount by path, and another filesystem may be mounted there by now.
        pyfuse3.close(unmount=False)

    def requests(self) -> dict[str, int]:
        return {}


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Context manager that captures stderr, where libfuse reports why a mount failed. It gives a function that returns the text."""
    with tempfile.TemporaryFile() as catch:
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(catch.fileno(), 2)

        def text() -> str:
            catch.seek(0)
            return catch.read().decode(errors="replace")

        try:
            yield text
        finally:
            os.dup2(saved, 2)
            os.close(saved)
