"""Wraps the system calls that Python's os module lacks, and tells the kernel's version. Each function is small and raises OSError with the
kernel's errno.

libc is opened here. (supervisor/launch.py opens it again, because it runs by its path with the standard library alone. So do the programs
of conform/, which test system calls.)

The functions take file descriptors and bytes and keep nothing between calls. The callers keep whether the kernel has a call at all. Calls
that only touch kernel memory go through PyDLL: to release the interpreter lock costs more than the call. Calls that may wait for a disk go
through CDLL.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

AT_FDCWD: Final = -100

# openat2(2), linux/openat2.h
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10
RESOLVE_CACHED: Final = 0x20  # Linux 5.12

# renameat2(2), linux/fs.h
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4

FALLOC_FL_KEEP_SIZE: Final = 1  # fallocate(2), linux/falloc.h

MS_BIND: Final = 0x1000  # mount(2)
MS_REC: Final = 0x4000
MS_REMOUNT: Final = 0x20
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2  # umount2(2)

# utimensat(2)
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2

PAGE_SIZE: Final = mmap.PAGESIZE  # bytes

OVERLAYFS_SUPER_MAGIC: Final = 0x794C7630  # linux/magic.h

_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_BTIME: Final = 0x800
_STATX_BTIME_OFFSET: Final = 0x50
_STATX_MNT_ID_UNIQUE: Final = 0x4000
_STATX_INODE_OFFSET: Final = 0x20
_STATX_DEVICE_OFFSET: Final = 0x88  # of stx_dev_major, stx_dev_minor and stx_mnt_id
# These numbers are the same on every architecture (include/uapi/asm-generic/unistd.h).
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_SYS_OPENAT2: Final = 437
_SYS_PIDFD_GETFD: Final = 438
_SYS_FACCESSAT2: Final = 439
_AT_EACCESS: Final = 0x200
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_CAPABILITY_VERSION_3: Final = 0x20080522
_EPOLL_CTL_ADD: Final = 1
_EPOLL_EVENT: Final = struct.Struct(
    "=IQ" if os.uname().machine == "x86_64" else "=I4xQ"
)  # packed on x86-64 only
_KCMP_EPOLL_TFD: Final = 7  # linux/kcmp.h
_KCMP_SLOT: Final = struct.Struct("=III")
_NANOSECONDS: Final = 1_000_000_000

_libc: Final[Any] = ctypes.CDLL(None, use_errno=True)
_fast_libc: Final[Any] = ctypes.PyDLL(None, use_errno=True)

_syscall: Final[Any] = _libc.syscall
_syscall.restype = ctypes.c_long
_renameat2: Final[Any] = _libc.renameat2
_renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_utimensat: Final[Any] = _libc.utimensat
_utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
_statx: Final[Any] = _fast_libc.statx
_statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
_name_to_handle_at: Final[Any] = _fast_libc.name_to_handle_at
_name_to_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
_fallocate: Final[Any] = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_mmap: Final[Any] = _fast_libc.mmap
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mmap.restype = ctypes.c_void_p
_munmap: Final[Any] = _fast_libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_getdents64: Final[Any] = _libc.getdents64
_getdents64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_getdents64.restype = ctypes.c_ssize_t
_fstatfs: Final[Any] = _libc.fstatfs
_fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_fanotify_init: Final[Any] = _libc.fanotify_init
_fanotify_init.argtypes = [ctypes.c_uint, ctypes.c_uint]
_fanotify_mark: Final[Any] = _libc.fanotify_mark
_fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]
_mount: Final[Any] = _libc.mount
_mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_umount2: Final[Any] = _libc.umount2
_umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_epoll_ctl: Final[Any] = _libc.epoll_ctl
_epoll_ctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p]
_process_vm_readv: Final[Any] = _libc.process_vm_readv
_process_vm_writev: Final[Any] = _libc.process_vm_writev
for _function in (_process_vm_readv, _process_vm_writev):
    _function.argtypes = [
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
    _function.restype = ctypes.c_ssize_t


def _error(path: bytes | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)


def _check(result: int, path: bytes | None = None) -> int:
    if result < 0:
        raise _error(path)
    return result


# Files and directories


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int) -> int:
    """openat2(2): open `path` below `dir_fd` and return the descriptor. Raises OSError ENOSYS before Linux 5.6."""
    how = struct.pack("=QQQ", flags, 0, resolve)
    fd: int = _syscall(_SYS_OPENAT2, dir_fd, path, how, ctypes.c_size_t(len(how)))
    if fd < 0:
        raise _error(path)
    return fd


def have_openat2() -> bool:
    """Whether openat2(2) works. Old kernels answer ENOSYS, old seccomp filters of containers EPERM."""
    try:
        os.close(openat2(AT_FDCWD, b"/", os.O_PATH | os.O_CLOEXEC, 0))
    except OSError:
        return False
    return True


def rename(old_dir_fd: int, old: bytes, new_dir_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2): `flags` is RENAME_NOREPLACE, RENAME_EXCHANGE or 0."""
    if _renameat2(old_dir_fd, old, new_dir_fd, new, flags) < 0:
        raise _error(old)


def set_times(path: bytes | int, atime_ns: int | None, mtime_ns: int | None, *, now: int) -> None:
    """utimensat(2) on a path, which is followed, or on a descriptor. Times are nanoseconds since 1970; None leaves a time alone; the value `now`
    asks for the kernel's present time, which needs write permission only."""
    times = b"".join(_timespec(value, now) for value in (atime_ns, mtime_ns))
    fd, name = (path, None) if isinstance(path, int) else (AT_FDCWD, path)
    if _utimensat(fd, name, times, 0) < 0:
        raise _error(name)


def _timespec(value: int | None, now: int) -> bytes:
    if value is None:
        return struct.pack("=qq", 0, UTIME_OMIT)
    if value == now:
        return struct.pack("=qq", 0, UTIME_NOW)
    return struct.pack("=qq", *divmod(value, _NANOSECONDS))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). `mode` is 0 or FALLOC_FL_*; `offset` and `length` are bytes."""
    if _fallocate(fd, mode, offset, length) < 0:
        raise _error()


def copy(source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
    """copy_file_range(2) if the filesystem has it, else read and write. Returns the number of bytes copied: less than `length` (bytes) at the
    source's end, or after a MiB."""
    try:
        return os.copy_file_range(source, target, length, source_offset, target_offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
    data = os.pread(source, min(length, 1 << 20), source_offset)
    return os.pwrite(target, data, target_offset)


def may_read(descriptor: int) -> bool:
    """Whether the calling thread, with its effective rights, may read the descriptor's file. An O_PATH descriptor will do."""
    if _syscall(_SYS_FACCESSAT2, descriptor, b"", os.R_OK, _AT_EACCESS | _AT_EMPTY_PATH) == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):
        return os.access(f"/proc/self/fd/{descriptor}", os.R_OK, effective_ids=True)
    return False


def birth_time(dir_fd: int, name: bytes) -> bytes | None:
    """The creation time of `name` (not followed) as statx(2)'s 12 bytes; None if the filesystem keeps none."""
    buffer = ctypes.create_string_buffer(256)
    if _statx(dir_fd, name, _AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH, _STATX_BTIME, buffer) < 0:
        raise _error(name)
    (mask,) = struct.unpack_from("=I", buffer)
    if not mask & _STATX_BTIME:
        return None
    return buffer.raw[_STATX_BTIME_OFFSET : _STATX_BTIME_OFFSET + 12]


def unique_mount_id(fd: int) -> int | None:
    """The unique number of the mount that `fd` was opened on; None before Linux 6.8. No other mount gets it until the next boot. Sends no
    request to the filesystem's server."""
    return mount_and_device(fd)[0]


def mount_and_device(fd: int) -> tuple[int | None, tuple[int, int]]:
    """unique_mount_id(), and (major, minor) of the file system's device. Sends no request to the filesystem's server."""
    buffer = _known(fd)
    (mask,) = struct.unpack_from("=I", buffer)
    major, minor, number = struct.unpack_from("=IIQ", buffer, _STATX_DEVICE_OFFSET)
    return number if mask & _STATX_MNT_ID_UNIQUE else None, (major, minor)


def device_and_inode(fd: int) -> tuple[tuple[int, int], int]:
    """(major, minor) of the file system's device, and the inode number. Sends no request to the filesystem's server, as fstat(2) would."""
    buffer = _known(fd)
    (inode,) = struct.unpack_from("=Q", buffer, _STATX_INODE_OFFSET)
    major, minor = struct.unpack_from("=II", buffer, _STATX_DEVICE_OFFSET)
    return (major, minor), inode


def _known(fd: int) -> ctypes.Array[ctypes.c_char]:
    """The struct statx of an open file, of what the kernel knows without asking a server."""
    buffer = ctypes.create_string_buffer(256)
    if _statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_MNT_ID_UNIQUE, buffer) < 0:
        raise _error()
    return buffer


def syncfs(fd: int) -> None:
    """syncfs(2): write all of the filesystem that `fd` is on to its disk."""
    if _libc.syncfs(fd) < 0:
        raise _error()


class FileHandles:
    """name_to_handle_at(2) with one buffer for all calls, so for one thread at a time.

    The buffer's size field keeps the last call's size, which saves a write. A filesystem that needs more answers EOVERFLOW and tells the size.
    """

    _LARGEST: Final = 128  # MAX_HANDLE_SZ

    def __init__(self) -> None:
        self._buffer = (ctypes.c_char * (8 + self._LARGEST))()
        self._mount_id = ctypes.c_int()
        self._address = ctypes.addressof(self._buffer)
        self._mount_id_address = ctypes.addressof(self._mount_id)
        self._size = ctypes.c_uint32.from_buffer(self._buffer)
        self._bytes = memoryview(self._buffer).cast("B")

    def read(self, dir_fd: int, name: bytes) -> memoryview:
        """The type and the bytes of `name`'s handle, valid until the next call. `name` is not followed; b"" is `dir_fd` itself.

        Raises OSError EOPNOTSUPP if the filesystem has no handles. Needs no privilege.
        """
        flags = 0 if name else _AT_EMPTY_PATH
        if _name_to_handle_at(dir_fd, name, self._address, self._mount_id_address, flags) < 0:
            if ctypes.get_errno() != errno.EOVERFLOW:
                raise _error(name)
            if self._size.value > self._LARGEST:
                self._size.value = self._LARGEST
            if _name_to_handle_at(dir_fd, name, self._address, self._mount_id_address, flags) < 0:
                raise _error(name)
        return self._bytes[4 : 8 + self._size.value]


_DIRENT: Final = struct.Struct("=QqHB")  # d_ino, d_off, d_reclen, d_type; the name follows, NUL-terminated


def directory_entries(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> list[tuple[bytes, int, int, int]]:
    """getdents64(2): the next entries as (name, S_IFMT bits or 0, inode number, offset of the next entry).

    The list is empty at the end of the directory.
    """
    length: int = _getdents64(fd, buffer, len(buffer))
    if length < 0:
        raise _error()
    data = ctypes.string_at(buffer, length)
    entries = []
    position = 0
    while position < length:
        inode, offset, record_length, kind = _DIRENT.unpack_from(data, position)
        name_at = position + _DIRENT.size
        entries.append((data[name_at : data.index(b"\0", name_at)], kind << 12, inode, offset))
        position += record_length
    return entries


# Leases (F_SETLEASE, fcntl(2))

# A broken lease in /proc/PID/fdinfo (proc_pid_fdinfo(5)). While the holder may still end it in time, the line says BREAKING.
_DOWNGRADED = re.compile(r"LEASE\s+ACTIVE\s+READ\b")


def is_open_for_writing(fd: int) -> bool:
    """Whether the file of `fd` is open for writing, or mapped writable, anywhere. `fd` itself is open for reading only.

    The kernel grants a read lease only if it is not (fcntl(2)). The file's owner or CAP_LEASE may ask. Raises OSError if the answer is unknown.
    """
    # A process that opens the file while the lease stands makes a signal for us. SIGURG is ignored by default; SIGIO would kill us.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def take_lease(descriptor: int) -> None:
    """Take a write lease (F_WRLCK) on an open file: no other process has it open or mapped.

    A process that opens it later waits, for fs.lease-break-time at most (docs/facts.md, section 17). Raises BlockingIOError (EAGAIN) if the file
    is open elsewhere, OSError EACCES if the caller is not its owner and lacks CAP_LEASE, EINVAL if the filesystem has no leases.
    """
    # As above. The lease makes this process the file's owner for signals; without an owner there is no signal.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, 0)


def lease_is_wanted(descriptor: int) -> bool:
    """Whether a process waits for the lease to end, or has waited so long that the kernel has broken it."""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_WRLCK


def give_lease_back(descriptor: int) -> bool:
    """End the lease; False if the kernel has broken it."""
    # If a reader waited for too long, the kernel has turned the write lease into a read lease, which is still there.
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:
        if any(_DOWNGRADED.search(line) for line in lines):
            return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return False
    return True


def lease_break_seconds() -> float:
    """The longest wait for a lease in seconds (/proc/sys/fs/lease-break-time, proc_sys_fs(5)); 45 if the file cannot be read."""
    try:
        with open("/proc/sys/fs/lease-break-time", encoding="ascii") as setting:
            return float(setting.read())
    except (OSError, ValueError):
        return 45.0


# Mappings


def map_page(fd: int) -> int:
    """mmap(2) of a file's first page without any access (PROT_NONE); returns the address. (Python's mmap keeps a descriptor.)"""
    address: int | None = _mmap(None, PAGE_SIZE, 0, mmap.MAP_SHARED, fd, 0)  # 0: PROT_NONE
    if address is None or address == ctypes.c_void_p(-1).value:
        raise _error()
    return address


def unmap_page(address: int) -> None:
    """munmap(2) of map_page()'s page."""
    if _munmap(address, PAGE_SIZE) < 0:
        raise _error()


@contextmanager
def mapped_for_reading(fd: int, offset: int, length: int) -> Iterator[int]:
    """mmap(2) of whole pages of a file, private; yields the address.

    `offset` and `length` are bytes. The range may reach beyond the end of the file, where a touch is SIGBUS. (Python's mmap refuses that.)
    """
    address: int | None = _mmap(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, offset)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise _error()
    try:
        yield address
    finally:
        _munmap(address, length)


def filesystem_type(fd: int) -> int:
    """The f_type of fstatfs(2)."""
    buffer = ctypes.create_string_buffer(256)
    if _fstatfs(fd, buffer) < 0:
        raise _error()
    (kind,) = struct.unpack_from("@l", buffer)
    return int(kind) & 0xFFFFFFFF


# Groups and mounts


def fanotify_init(flags: int, event_f_flags: int) -> int:
    """fanotify_init(2); returns the new group's descriptor."""
    return _check(_fanotify_init(flags, event_f_flags))


def fanotify_mark(fd: int, flags: int, mask: int, dirfd: int = AT_FDCWD, path: bytes | None = None) -> None:
    """fanotify_mark(2). `path` None marks the object of `dirfd`."""
    _check(_fanotify_mark(fd, flags, mask, dirfd, path), path)


def mount(
    source: bytes, target: bytes, filesystem_type: bytes | None, flags: int, data: bytes | None = None
) -> None:
    """mount(2)."""
    _check(_mount(source, target, filesystem_type, flags, data), target)


def umount2(target: bytes, flags: int) -> None:
    """umount2(2)."""
    _check(_umount2(target, flags), target)


def new_filesystem(filesystem_type: bytes) -> int:
    """fsopen(2) and fsmount(2): a descriptor of the root of a new filesystem of that type, which is not mounted anywhere."""
    context = _check(_syscall(_SYS_FSOPEN, filesystem_type, _FSOPEN_CLOEXEC))
    try:
        _check(_syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0))
        return _check(_syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0))
    finally:
        os.close(context)


# Processes and threads


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _check(_libc.prctl(option, value, 0, 0, 0))


def system_call(number: int, *arguments: object) -> int:
    """A system call by its number. It affects this thread alone, where libc's function would change every thread."""
    return _check(_syscall(number, *arguments))


def unshare(flags: int) -> None:
    """unshare(2) of this thread."""
    _check(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """setns(2) of this thread."""
    _check(_libc.setns(fd, kind))


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """pidfd_getfd(2): a duplicate of another process's descriptor. Raises OSError ENOSYS before Linux 5.6."""
    return _check(_syscall(_SYS_PIDFD_GETFD, pidfd, descriptor, 0))


_VECTOR: Final = struct.Struct("=QQ")  # struct iovec


def add_to_epoll(epoll: int, descriptor: int, events: int, data: int) -> None:
    """EPOLL_CTL_ADD of epoll_ctl(2) with 64 bits of data, of which Python's own call sets only 32."""
    _check(_epoll_ctl(epoll, _EPOLL_CTL_ADD, descriptor, _EPOLL_EVENT.pack(events, data)))


def is_target_of_epoll(kcmp: int, descriptor: int, tid: int, epoll: int) -> bool:
    """Whether our `descriptor`, by that very number, is watched by the epoll file at descriptor `epoll` of a thread.

    `kcmp` is the number of kcmp(2). Raises OSError: EINVAL if that file is no epoll file, EBADF if it is closed, ESRCH, EPERM, ENOSYS. May wait
    while the epoll file asks its other targets.
    """
    slot = _KCMP_SLOT.pack(epoll, descriptor, 0)
    result = _syscall(
        ctypes.c_long(kcmp),
        ctypes.c_long(os.getpid()),
        ctypes.c_long(tid),
        ctypes.c_long(_KCMP_EPOLL_TFD),
        ctypes.c_ulong(descriptor),
        slot,
    )
    if result < 0 and ctypes.get_errno() == errno.ENOENT:
        return False
    return _check(result) == 0


def read_memory(tid: int, address: int, size: int) -> bytes:
    """process_vm_readv(2): up to `size` bytes at an address in the process of that thread."""
    buffer = ctypes.create_string_buffer(size)
    here, there = _VECTOR.pack(ctypes.addressof(buffer), size), _VECTOR.pack(address, size)
    done = _check(_process_vm_readv(tid, here, 1, there, 1, 0))
    return buffer.raw[:done]


def write_memory(tid: int, address: int, data: bytes | bytearray) -> int:
    """process_vm_writev(2): write bytes at an address in the process of that thread; returns the number of bytes written."""
    buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
    here, there = _VECTOR.pack(ctypes.addressof(buffer), len(data)), _VECTOR.pack(address, len(data))
    return _check(_process_vm_writev(tid, here, 1, there, 1, 0))


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel; (0, 0) if its release string does not begin with two numbers."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
