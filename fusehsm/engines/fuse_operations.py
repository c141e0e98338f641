"""The FUSE requests of the engine `devfuse`: decodes each, does it, and encodes its answer.

A method of the table returns the answer's body, or a coroutine for it where the answer may wait for a listener or a disk. It raises OSError to
answer with an errno, and struct.error or ValueError for a request that the kernel does not send. Opcodes without a method get ENOSYS. The
kernel remembers that, and works without the request (POLL, BMAP), or does it by itself (file locks).
"""

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any, Final

from fusehsm.emulator.gate import Gate
from fusehsm.emulator.handles import OpenFile
from fusehsm.engines import fuse_protocol as protocol
from fusehsm.engines.cache_policy import CachePolicy
from fusehsm.engines.filesystem import Filesystem, Found
from fusehsm.engines.fuse_protocol import Attribute, Attributes, Init, Opcode, Request
from fusehsm.fanotify.abi import O_LARGEFILE
from fusehsm.linux import system_call
from fusehsm.overlay.directory import DirectoryStream
from fusehsm.overlay.overlay import TIME_NOW, AttributeChanges, Caller, Node

Body = bytes | bytearray | memoryview
Answer = Coroutine[Any, Any, Body]
Method = Callable[[Request], Body | Answer]

_DONE: Final = b""
_SECOND: Final = 1_000_000_000  # nanoseconds
_STREAMS: Final = 64  # streams kept of directories that are read without OPENDIR
_LARGEST_READ: Final = protocol.MAX_PAGES * os.sysconf("SC_PAGESIZE")  # bytes
_RWF_DSYNC, _RWF_SYNC = 0x2, 0x4  # pwritev2(2)


class Operations:
    """The requests of one mount. `stateful_open`: whether the kernel is to send OPEN and OPENDIR. `inval_entry` makes the kernel drop what it
    has cached of a name in a directory, and does not wait."""

    def __init__(
        self,
        gate: Gate,
        policy: CachePolicy,
        *,
        stateful_open: bool,
        inval_entry: Callable[[int, bytes], None],
    ) -> None:
        self._gate = gate
        self._overlay = gate.overlay
        self._content = gate.content
        self._handles = gate.handles
        self._policy = policy
        self._filesystem = Filesystem(gate)
        self._stateful_open = stateful_open
        self._inval_entry = inval_entry
        self._streams: OrderedDict[int, DirectoryStream] = OrderedDict()
        self._makes_by_opening = stateful_open or os.geteuid() != 0
        self.negotiated = Init(0)
        #: Whether the kernel sends FLUSH at close(2), for the files that need it only (FOPEN_NOFLUSH, Linux 5.16).
        self.tells_closers = False

    def table(self) -> dict[int, Method]:
        """The method that answers each opcode."""
        return {
            Opcode.LOOKUP: self.lookup,
            Opcode.FORGET: self.forget,
            Opcode.BATCH_FORGET: self.batch_forget,
            Opcode.GETATTR: self.getattr,
            Opcode.SETATTR: self.setattr,
            Opcode.STATX: self.statx,
            Opcode.READLINK: self.readlink,
            Opcode.SYMLINK: self.symlink,
            Opcode.MKNOD: self.mknod,
            Opcode.MKDIR: self.mkdir,
            Opcode.UNLINK: self.unlink,
            Opcode.RMDIR: self.rmdir,
            Opcode.RENAME: self.rename,
            Opcode.RENAME2: self.rename2,
            Opcode.LINK: self.link,
            Opcode.OPEN: self.open,
            Opcode.CREATE: self.create,
            Opcode.TMPFILE: self.tmpfile,
            Opcode.READ: self.read,
            Opcode.WRITE: self.write,
            Opcode.FLUSH: self.flush,
            Opcode.RELEASE: self.release,
            Opcode.FSYNC: self.fsync,
            Opcode.FALLOCATE: self.fallocate,
            Opcode.LSEEK: self.lseek,
            Opcode.COPY_FILE_RANGE: self.copy_file_range,
            Opcode.COPY_FILE_RANGE_64: self.copy_file_range_64,
            Opcode.OPENDIR: self.opendir,
            Opcode.READDIR: self.readdir,
            Opcode.READDIRPLUS: self.readdirplus,
            Opcode.RELEASEDIR: self.releasedir,
            Opcode.FSYNCDIR: self.fsyncdir,
            Opcode.IOCTL: self.ioctl,
            Opcode.STATFS: self.statfs,
            Opcode.ACCESS: self.access,
            Opcode.SETXATTR: self.setxattr,
            Opcode.GETXATTR: self.getxattr,
            Opcode.LISTXATTR: self.listxattr,
            Opcode.REMOVEXATTR: self.removexattr,
            Opcode.DESTROY: lambda request: _DONE,
        }

    # Answers

    def _attributes(self, node: Node, status: os.stat_result) -> Attributes:
        policy = self._policy
        return Attributes(
            node.id,
            node.generation,
            policy.attr_timeout(node, status),
            status,
            policy.blocks(node, status),
            policy.mtime(node, status),
        )

    def _entry(self, found: Found) -> bytes:
        return protocol.entry_out(self._attributes(*found), self._policy.entry_timeout())

    @staticmethod
    def _caller(request: Request, umask: int = 0) -> Caller:
        return Caller(request.uid, request.gid, request.pid, umask)

    # Names

    def lookup(self, request: Request) -> bytes:
        (name,) = protocol.names_in(request.body, 0, 1)
        found = self._filesystem.lookup(request.node_id, name)
        if found is None:
            return protocol.absent_out(self._policy.negative_timeout(self._overlay.node(request.node_id)))
        return self._entry(found)

    def forget(self, request: Request) -> bytes:
        (count,) = protocol.FORGET_IN.unpack_from(request.body)
        self._forget(request.node_id, count)
        return _DONE

    def batch_forget(self, request: Request) -> bytes:
        count, _ = protocol.BATCH_FORGET_IN.unpack_from(request.body)
        start, size = protocol.BATCH_FORGET_IN.size, protocol.FORGET_ONE.size
        for node_id, lookups in protocol.FORGET_ONE.iter_unpack(request.body[start : start + count * size]):
            self._forget(node_id, lookups)
        return _DONE

    def _forget(self, node_id: int, count: int) -> None:
        if self._gate.forget(node_id, count):
            self._policy.forgotten(node_id)
        stream = self._streams.get(node_id)
        # A directory without lookups may stay in the table because of its children.
        if stream is not None and stream.node.lookups == 0:
            del self._streams[node_id]
            stream.close()

    def readlink(self, request: Request) -> bytes:
        return self._overlay.readlink(self._overlay.node(request.node_id))

    def symlink(self, request: Request) -> bytes:
        name, target = protocol.names_in(request.body, 0, 2)
        parent = self._overlay.node(request.node_id)
        return self._entry(self._overlay.symlink(parent, name, target, self._caller(request)))

    def mknod(self, request: Request) -> bytes:
        mode, device, umask, _ = protocol.MKNOD_IN.unpack_from(request.body)
        (name,) = protocol.names_in(request.body, protocol.MKNOD_IN.size, 1)
        number = protocol.number_of_device(device)
        return self._entry(
            self._filesystem.mknod(request.node_id, name, mode, number, self._caller(request, umask))
        )

    def mkdir(self, request: Request) -> bytes:
        mode, umask = protocol.MKDIR_IN.unpack_from(request.body)
        (name,) = protocol.names_in(request.body, protocol.MKDIR_IN.size, 1)
        parent = self._overlay.node(request.node_id)
        return self._entry(self._overlay.mkdir(parent, name, mode, self._caller(request, umask)))

    def unlink(self, request: Request) -> bytes:
        (name,) = protocol.names_in(request.body, 0, 1)
        self._overlay.unlink(self._overlay.node(request.node_id), name, self._caller(request))
        return _DONE

    def rmdir(self, request: Request) -> bytes:
        (name,) = protocol.names_in(request.body, 0, 1)
        self._overlay.rmdir(self._overlay.node(request.node_id), name, self._caller(request))
        return _DONE

    def rename(self, request: Request) -> Answer:
        (new_parent,) = protocol.RENAME_IN.unpack_from(request.body)
        names = protocol.names_in(request.body, protocol.RENAME_IN.size, 2)
        return self._rename(request, new_parent, names, 0)

    def rename2(self, request: Request) -> Answer:
        new_parent, flags, _ = protocol.RENAME2_IN.unpack_from(request.body)
        names = protocol.names_in(request.body, protocol.RENAME2_IN.size, 2)
        return self._rename(request, new_parent, names, flags)

    async def _rename(self, request: Request, new_parent: int, names: list[bytes], flags: int) -> bytes:
        caller = self._caller(request)
        await self._filesystem.rename(request.node_id, names[0], new_parent, names[1], flags, caller)
        return _DONE

    async def link(self, request: Request) -> bytes:
        (node_id,) = protocol.LINK_IN.unpack_from(request.body)
        (name,) = protocol.names_in(request.body, protocol.LINK_IN.size, 1)
        return self._entry(await self._filesystem.link(node_id, request.node_id, name, self._caller(request)))

    # Attributes

    def getattr(self, request: Request) -> bytes:
        node = self._overlay.node(request.node_id)
        return protocol.attr_out(self._attributes(node, self._overlay.getattr(node)))

    def statx(self, request: Request) -> bytes:
        protocol.STATX_IN.unpack_from(request.body)
        node = self._overlay.node(request.node_id)
        attributes = self._attributes(node, self._overlay.getattr(node))
        return protocol.statx_out(attributes, self._overlay.birth_time(node))

    async def setattr(self, request: Request) -> bytes:
        fields = protocol.SETATTR_IN.unpack_from(request.body)
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = fields
        changes = AttributeChanges(
            mode=stat.S_IMODE(mode) if valid & Attribute.MODE else None,
            uid=uid if valid & Attribute.UID else None,
            gid=gid if valid & Attribute.GID else None,
            size=size if valid & Attribute.SIZE else None,
            atime_ns=_time(valid, Attribute.ATIME, Attribute.ATIME_NOW, atime, atime_ns),
            mtime_ns=_time(valid, Attribute.MTIME, Attribute.MTIME_NOW, mtime, mtime_ns),
        )
        node = self._overlay.node(request.node_id)
        named = handle if valid & Attribute.FH else None
        found = await self._gate.set_attributes(node, changes, named, self._caller(request))
        return protocol.attr_out(self._attributes(*found))

    async def ioctl(self, request: Request) -> bytes:
        handle, flags, command, _, takes, gives = protocol.IOCTL_IN.unpack_from(request.body)
        answer = await self._filesystem.ioctl(
            request.node_id,
            0 if flags & protocol.IOCTL_DIR else handle,
            command,
            bytes(request.body[protocol.IOCTL_IN.size :][:takes]),
            gives,
            self._caller(request),
        )
        return protocol.IOCTL_OUT.pack(0, 0, 0, 0) + answer

    def statfs(self, request: Request) -> bytes:
        found = self._overlay.statfs()
        return protocol.STATFS_OUT.pack(
            found.f_blocks,
            found.f_bfree,
            found.f_bavail,
            found.f_files,
            found.f_ffree,
            found.f_bsize,
            found.f_namemax,
            found.f_frsize,
        )

    def access(self, request: Request) -> bytes:
        mask, _ = protocol.ACCESS_IN.unpack_from(request.body)
        if not self._overlay.access(self._overlay.node(request.node_id), mask):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return _DONE

    # Files

    def _file(self, node_id: int, handle: int, *, writing: bool) -> OpenFile[Node]:
        if handle:
            return self._handles.get(handle)
        return self._gate.stateless_open(self._overlay.node(node_id), writing=writing)

    def _opened(self, file: OpenFile[Node], *, keep_cache: bool) -> bytes:
        flags = 0
        if file.direct:
            flags |= protocol.FOPEN_DIRECT_IO | protocol.FOPEN_PARALLEL_DIRECT_WRITES
        elif self._policy.appends_past_cache(file):
            flags |= protocol.FOPEN_DIRECT_IO
        if self._policy.keep_cache(file) and keep_cache:
            flags |= protocol.FOPEN_KEEP_CACHE
        if self.tells_closers and not file.tells_closer:
            # No FLUSH is needed. Without it the kernel writes back a mapping's pages at munmap(2) or msync(2), not at close(2).
            flags |= protocol.FOPEN_NOFLUSH
        return protocol.OPEN_OUT.pack(file.handle, flags, 0)

    async def open(self, request: Request) -> bytes:
        if not self._stateful_open and self.negotiated & Init.NO_OPEN_SUPPORT:
            raise _no_such_call()
        flags, _ = protocol.OPEN_IN.unpack_from(request.body)
        node = self._overlay.node(request.node_id)
        if _is_for_ioctl(flags, request.pid):
            file, keep_cache = self._gate.open_for_ioctl(node, flags, self._caller(request)), True
        else:
            file, keep_cache = await self._gate.open(node, flags, self._caller(request))
        return self._opened(file, keep_cache=keep_cache)

    async def create(self, request: Request) -> bytes:
        flags, mode, umask, _ = protocol.CREATE_IN.unpack_from(request.body)
        (name,) = protocol.names_in(request.body, protocol.CREATE_IN.size, 1)
        if not self._makes_by_opening:
            raise _no_such_call()
        file, keep_cache, found = await self._filesystem.create(
            request.node_id, name, flags, mode, self._caller(request, umask), self._inval_entry
        )
        return self._entry(found) + self._made(file, keep_cache=keep_cache)

    def _made(self, file: OpenFile[Node], *, keep_cache: bool) -> bytes:
        if self._stateful_open:
            return self._opened(file, keep_cache=keep_cache)
        # Once OPEN has been answered ENOSYS, old kernels never send RELEASE for such a file.
        self._handles.stand_by(file)
        return protocol.OPEN_OUT.pack(0, protocol.FOPEN_KEEP_CACHE, 0)

    async def tmpfile(self, request: Request) -> bytes:
        flags, mode, umask, _ = protocol.CREATE_IN.unpack_from(request.body)
        caller = self._caller(request, umask)
        parent = self._overlay.node(request.node_id)
        node, status, descriptor = self._overlay.create_unnamed(parent, flags, mode, caller)
        try:
            file, keep_cache = await self._gate.created(node, flags, descriptor, caller, unnamed=True)
        except BaseException:
            self._gate.forget(node.id, 1)
            raise
        return self._entry((node, status)) + self._made(file, keep_cache=keep_cache)

    def read(self, request: Request) -> Answer:
        handle, offset, size, flags, _, _, _ = protocol.READ_IN.unpack_from(request.body)
        if size > _LARGEST_READ:
            raise ValueError(f"READ of {size} bytes")
        file = self._file(request.node_id, handle, writing=False)
        return self._content.read(file, offset, size, request.pid, not flags & protocol.READ_LOCKOWNER)

    async def write(self, request: Request) -> bytes:
        handle, offset, size, how, _, flags, _ = protocol.WRITE_IN.unpack_from(request.body)
        data = request.body[protocol.WRITE_IN.size :]
        if len(data) != size:
            raise ValueError(f"WRITE of {size} bytes with {len(data)}")
        written = await self._content.write(
            self._file(request.node_id, handle, writing=True),
            offset,
            data,
            request.pid,
            # The page cache writes for nobody in particular.
            caller=None if how & protocol.WRITE_CACHE else self._caller(request),
            strips=self._strips(request, how),
            write_back=bool(how & protocol.WRITE_CACHE),
            appends=None if how & protocol.WRITE_CACHE else bool(flags & os.O_APPEND),
            durable=_RWF_SYNC if flags & os.O_SYNC == os.O_SYNC else _RWF_DSYNC if flags & os.O_DSYNC else 0,
        )
        return protocol.SIZE_OUT.pack(written, 0)

    def _strips(self, request: Request, how: int) -> int:
        """The user whose write takes set-id bits away, 0 for none. With HANDLE_KILLPRIV_V2 the kernel decides whether they go."""
        if self.negotiated & Init.HANDLE_KILLPRIV_V2:
            # Also for root without CAP_FSETID; -1 stands for that user.
            return (request.uid or -1) if how & protocol.WRITE_KILL_SUIDGID else 0
        return request.uid

    def flush(self, request: Request) -> bytes:
        if not self.tells_closers:
            # This saves a round trip for every close(2).
            raise _no_such_call()
        handle = protocol.FLUSH_IN.unpack_from(request.body)[0]
        self._gate.flushed(handle, request.pid)
        return _DONE

    def release(self, request: Request) -> bytes:
        handle = protocol.RELEASE_IN.unpack_from(request.body)[0]
        if handle:
            self._gate.release(handle)
        return _DONE

    async def fsync(self, request: Request) -> bytes:
        handle, flags, _ = protocol.FSYNC_IN.unpack_from(request.body)
        opened = [] if handle else self._handles.of_node(self._overlay.node(request.node_id))
        # Any open file of the node will do. A file that may only be written could not be opened for reading.
        file = opened[0] if opened else self._file(request.node_id, handle, writing=False)
        await self._content.synchronise(file, bool(flags & protocol.FSYNC_FDATASYNC))
        return _DONE

    async def fallocate(self, request: Request) -> bytes:
        handle, offset, length, mode, _ = protocol.FALLOCATE_IN.unpack_from(request.body)
        file = self._file(request.node_id, handle, writing=True)
        await self._content.allocate(file, mode, offset, length, self._caller(request))
        return _DONE

    def lseek(self, request: Request) -> bytes:
        handle, offset, whence, _ = protocol.LSEEK_IN.unpack_from(request.body)
        file = self._file(request.node_id, handle, writing=False)
        found = self._content.seek(file, offset, whence, request.pid)
        return protocol.OFFSET_OUT.pack(found)

    async def copy_file_range(self, request: Request) -> bytes:
        return protocol.SIZE_OUT.pack(await self._copy(request), 0)

    async def copy_file_range_64(self, request: Request) -> bytes:
        return protocol.OFFSET_OUT.pack(await self._copy(request))

    async def _copy(self, request: Request) -> int:
        fields = protocol.COPY_FILE_RANGE_IN.unpack_from(request.body)
        handle, offset, target_id, target_handle, target_offset, length, _ = fields
        source = self._file(request.node_id, handle, writing=False)
        target = self._file(target_id, target_handle, writing=True)
        return await self._content.copy(source, offset, target, target_offset, length, self._caller(request))

    # Directories

    async def opendir(self, request: Request) -> bytes:
        if not self._stateful_open and self.negotiated & Init.NO_OPENDIR_SUPPORT:
            raise _no_such_call()
        flags, _ = protocol.OPEN_IN.unpack_from(request.body)
        silent = _is_for_ioctl(flags, request.pid)
        handle = await self._filesystem.opendir(request.node_id, request.pid, silent=silent)
        return protocol.OPEN_OUT.pack(handle, 0, 0)

    async def readdir(self, request: Request) -> bytes:
        return await self._entries(request, plus=False)

    async def readdirplus(self, request: Request) -> bytes:
        return await self._entries(request, plus=True)

    async def _entries(self, request: Request, *, plus: bool) -> bytes:
        handle, offset, size, _, _, _, _ = protocol.READ_IN.unpack_from(request.body)
        if handle:
            stream = await self._filesystem.readdir(handle, offset, request.pid)
        else:
            stream = self._unopened_directory(request)
        answer = bytearray()
        with closing(stream.entries(offset, dots=True)) as entries:
            for entry in entries:
                record = protocol.directory_entry(
                    entry.node.id, entry.next_offset, entry.name, entry.status.st_mode or entry.node.kind
                )
                is_known = plus and entry.status.st_mode != 0 and entry.name not in (b".", b"..")
                if is_known:
                    record = self._entry((entry.node, entry.status)) + record
                elif plus:
                    # Node 0: the kernel lists the name and caches nothing.
                    record = protocol.absent_out(0) + record
                if len(answer) + len(record) > min(size, _LARGEST_READ):
                    break
                answer += record
                if is_known:
                    self._overlay.remember(entry.node)
        return bytes(answer)

    def _unopened_directory(self, request: Request) -> DirectoryStream:
        """The stream of a directory for which the kernel has sent no OPENDIR."""
        node = self._overlay.node(request.node_id)
        stream = self._streams.get(node.id)
        if stream is not None and stream.node is not node:
            # The node id now belongs to another directory.
            self._streams.pop(node.id).close()
            stream = None
        if stream is None:
            stream = self._overlay.opendir(node)
            self._streams[request.node_id] = stream
            if len(self._streams) > _STREAMS:
                self._streams.popitem(last=False)[1].close()
        else:
            self._streams.move_to_end(request.node_id)
        return stream

    def releasedir(self, request: Request) -> bytes:
        handle = protocol.RELEASE_IN.unpack_from(request.body)[0]
        if handle:
            self._filesystem.releasedir(handle)
        return _DONE

    def fsyncdir(self, request: Request) -> bytes:
        handle, flags, _ = protocol.FSYNC_IN.unpack_from(request.body)
        data_only = bool(flags & protocol.FSYNC_FDATASYNC)
        if handle:
            self._filesystem.fsyncdir(handle, data_only=data_only)
        else:
            self._unopened_directory(request).synchronise(data_only)
        return _DONE

    # Extended attributes

    def getxattr(self, request: Request) -> bytes:
        size, _ = protocol.GETXATTR_IN.unpack_from(request.body)
        (name,) = protocol.names_in(request.body, protocol.GETXATTR_IN.size, 1)
        return _sized(self._filesystem.getxattr(request.node_id, name), size)

    def setxattr(self, request: Request) -> bytes:
        size, flags = protocol.SETXATTR_IN.unpack_from(request.body)
        (name,) = protocol.names_in(request.body, protocol.SETXATTR_IN.size, 1)
        start = protocol.SETXATTR_IN.size + len(name) + 1
        value = bytes(request.body[start : start + size])
        if len(value) != size:
            raise ValueError(f"SETXATTR of {size} bytes with {len(value)}")
        node = self._overlay.node(request.node_id)
        self._overlay.setxattr(node, name, value, flags, self._caller(request))
        return _DONE

    def listxattr(self, request: Request) -> bytes:
        size, _ = protocol.GETXATTR_IN.unpack_from(request.body)
        names = self._overlay.listxattr(self._overlay.node(request.node_id), self._caller(request))
        return _sized(b"".join(name + b"\0" for name in names), size)

    def removexattr(self, request: Request) -> bytes:
        (name,) = protocol.names_in(request.body, 0, 1)
        self._overlay.removexattr(self._overlay.node(request.node_id), name, self._caller(request))
        return _DONE


def _no_such_call() -> OSError:
    """The error ENOSYS: the kernel stops sending that request for the whole connection."""
    return OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _is_for_ioctl(flags: int, tid: int) -> bool:
    """Whether OPEN or OPENDIR is not for an open(2): the kernel opens an inode for itself in ioctl(2) (fuse_priv_ioctl_prepare()).

    Then the request lacks O_LARGEFILE, which every open(2) of a 64-bit program has.
    """
    return not flags & O_LARGEFILE and system_call.is_in_ioctl(tid)


def _time(valid: int, given: Attribute, now: Attribute, seconds: int, nanoseconds: int) -> int | None:
    if valid & now:
        return TIME_NOW
    if not valid & given:
        return None
    # The protocol's times are unsigned words that hold signed seconds.
    signed = seconds - (1 << 64) if seconds >> 63 else seconds
    return signed * _SECOND + nanoseconds


def _sized(value: bytes, size: int) -> bytes:
    """A value, or its length if `size` is 0. Raises OSError ERANGE when the value does not fit into `size` bytes."""
    if size == 0:
        return protocol.SIZE_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value
