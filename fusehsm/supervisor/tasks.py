"""Reads the state of a thread of the command from /proc, and reads and writes the memory of its process (process_vm_readv(2)).

No function for the state touches another file system, so none of them waits. A function for the memory may wait as long as the memory does: a
mapping of a file on a fusehsm mount waits for that same listener. So only the call's own thread uses these, with no lock held, while it waits
for an answer. Each raises OSError: EFAULT as the kernel would, ESRCH if the thread has gone.
"""

import errno
import functools
import os
import re
import resource
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fusehsm.linux import mountinfo, proc, syscalls

_FIELD = re.compile(rb"^([A-Za-z_]+):[ \t]*(.*)$", re.MULTILINE)
_SIGNAL_FIELDS = (b"SigPnd", b"ShdPnd", b"SigBlk")
_EPOLL_TARGET: Final = re.compile(rb"^tfd:.* ino:([0-9a-f]+) ", re.MULTILINE)
_PIDFD: Final = re.compile(rb"^Pid:\t(-?[0-9]+)$", re.MULTILINE)
_VECTOR: Final = struct.Struct("=QQ")
_MOST_PARTS: Final = 1024  # UIO_MAXIOV
_USUAL_STATUS: Final = 8192  # bytes of /proc/TID/status


@dataclass(frozen=True, slots=True)
class Signals:
    """Signals that wait for a thread and are not blocked there, as bit masks (bit 0: signal 1)."""

    #: The signals of the thread.
    own: int
    #: The signals of its process.
    shared: int
    #: The process id.
    process: int
    #: The number of threads in the process.
    threads: int


@dataclass(frozen=True, slots=True)
class Rights:
    """The ids with which a thread opens files."""

    #: The filesystem user id.
    uid: int
    #: The filesystem group id.
    gid: int
    #: The supplementary groups.
    groups: tuple[int, ...]


def watches(kcmp: int, tid: int, number: int, descriptor: int) -> bool | None:
    """Whether the epoll(7) file at `number` watches our pipe end `descriptor`; None if that is no epoll file, or is closed.

    May wait while the epoll file asks its other targets.
    """
    try:
        return syscalls.is_target_of_epoll(kcmp, descriptor, tid, number)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            return None
    # A kernel without kcmp(2), or a container that forbids it.
    try:
        if os.readlink(f"/proc/{tid}/fd/{number}") != "anon_inode:[eventpoll]":
            return None
        with open(f"/proc/{tid}/fdinfo/{number}", "rb") as file:
            inodes = _EPOLL_TARGET.findall(file.read())
        return b"%x" % os.fstat(descriptor).st_ino in inodes
    except OSError:
        return None


def is_open(tid: int, descriptor: int) -> bool:
    """Whether the descriptor is in use."""
    return os.path.lexists(f"/proc/{tid}/fd/{descriptor}")


def open_numbers(tid: int) -> list[int]:
    """The numbers of the descriptors in use; none if the thread has gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{tid}/fd")]
    except OSError:
        return []


def process_behind(tid: int, pidfd: int) -> int | None:
    """The process of a pidfd that the thread holds; None if it has ended, or the descriptor is of another kind."""
    try:
        with open(f"/proc/{tid}/fdinfo/{pidfd}", "rb") as file:
            found = _PIDFD.search(file.read())
    except OSError:
        return None
    return None if found is None or int(found[1]) <= 0 else int(found[1])


def limit_of_descriptors(tid: int) -> int:
    """The lowest number that no new descriptor may have (RLIMIT_NOFILE)."""
    soft, _ = resource.prlimit(tid, resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def signals_of(tid: int) -> Signals | None:
    """The signals that wait for a thread; None if it has gone."""
    fields = _status(tid)
    if fields is None:
        return None
    own, shared, blocked = (int(fields.get(name, b"0"), 16) for name in _SIGNAL_FIELDS)
    return Signals(own & ~blocked, shared & ~blocked, int(fields[b"Tgid"]), int(fields[b"Threads"]))


def is_stopping(process: int) -> bool:
    """Whether a signal has stopped a thread of the process."""
    return any((_status(tid) or {}).get(b"State", b"").startswith(b"T") for tid in proc.threads_of(process))


def switches_of(tid: int) -> int:
    """How often a thread has given up its CPU to wait; -1 if it has gone."""
    fields = _status(tid)
    return -1 if fields is None else int(fields[b"voluntary_ctxt_switches"])


def is_uninterruptible(tid: int) -> bool:
    """Whether a thread waits so that no signal wakes it, as for a lock or a page."""
    return (_status(tid) or {}).get(b"State", b"").startswith(b"D")


def takers_of_shared_signals(process: int) -> list[int]:
    """The threads of a process that the kernel may give a signal of the process."""
    takers = []
    for tid in proc.threads_of(process):
        fields = _status(tid)
        if fields is not None and not fields[b"State"].startswith((b"Z", b"X")):
            shared, blocked = (int(fields[name], 16) for name in (b"ShdPnd", b"SigBlk"))
            if shared & ~blocked:
                takers.append(tid)
    return takers


def rights_of(tid: int) -> Rights | None:
    """The rights of a thread; None if it has gone."""
    fields = _status(tid)
    if fields is None:
        return None
    groups = tuple(sorted(int(group) for group in fields[b"Groups"].split()))
    return Rights(int(fields[b"Uid"].split()[3]), int(fields[b"Gid"].split()[3]), groups)


def _status(tid: int) -> dict[bytes, bytes] | None:
    try:
        with open(f"/proc/{tid}/status", "rb", buffering=0) as file:
            text = file.read(_USUAL_STATUS)
            if text and len(text) == _USUAL_STATUS:
                # The thread has many groups, up to 65536 (setgroups(2)), and other fields come after them.
                text += file.read()
            return dict(_FIELD.findall(text or b""))
    except (OSError, ValueError):
        return None


def mount_of(tid: int, mount_id: int) -> mountinfo.Mount | None:
    """The mount of that number in the thread's mount namespace; None if there is none."""
    try:
        mounts = list(mountinfo.read_mounts(tid))
    except OSError:
        return None
    return next((mount for mount in mounts if mount.mount_id == mount_id), None)


def _fault() -> OSError:
    return OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def check_traceable(tid: int) -> None:
    """Raise PermissionError where this process may not look at that thread's descriptors and memory (ptrace(2), PTRACE_MODE_READ and _ATTACH).

    Everything else here needs both.
    """
    try:
        os.readlink(f"/proc/{tid}/cwd")
        syscalls.read_memory(tid, 0, 1)
    except PermissionError:
        raise
    except OSError:  # EFAULT: no memory is at that address; or the thread has gone
        pass


# When the accesses to memory began that are going on, by the supervisor's thread.
_accesses: dict[int, float] = {}


@contextmanager
def _access() -> Iterator[None]:
    thread = threading.get_ident()
    _accesses[thread] = time.monotonic()
    try:
        yield
    finally:
        del _accesses[thread]


def longest_access() -> float:
    """For how many seconds the longest access to a process's memory has gone on; 0 if there is none. A page of it may be one of a file that waits."""
    begun = list(_accesses.values())
    return time.monotonic() - min(begun) if begun else 0.0


def read_memory(tid: int, address: int, size: int) -> bytes:
    """`size` bytes at an address in the process of that thread."""
    if not size:
        return b""
    with _access():
        data = syscalls.read_memory(tid, address, size)
    if len(data) != size:
        raise _fault()
    return data


def write_memory(tid: int, address: int, data: bytes | bytearray) -> None:
    """Write bytes at an address in the process of that thread."""
    with _access():
        written = syscalls.write_memory(tid, address, data)
    if written != len(data):
        raise _fault()


def read_string(tid: int, address: int, limit: int) -> bytes:
    """The string at an address, without its final NUL, which must come within `limit` bytes. Also raises OSError ENAMETOOLONG."""
    return proc.string_at(functools.partial(read_memory, tid), address, limit)


def read_vector(tid: int, address: int, count: int) -> list[tuple[int, int]]:
    """The (address, size) of each part of a struct iovec array. Also raises OSError EINVAL as readv(2) does."""
    if count > _MOST_PARTS:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    parts = list(_VECTOR.iter_unpack(read_memory(tid, address, count * _VECTOR.size)))
    if any(length >> 63 for _, length in parts):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return parts
