"""Reads the state of processes and threads from /proc/<pid>/ (proc(5)): whether they live, what they may, their descriptors, mappings and memory.

Every function returns None, or says so, if /proc does not tell: the thread is gone, or may not be looked at (Yama, another user's process).
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fusehsm.linux import syscalls

_SIGKILL_BIT = 1 << 8
_WITHOUT_TAG = (1 << 56) - 1  # no address of a program is higher
# Signals whose default action does not end the process (signal(7)): it ignores the signal, stops or continues.
_NOT_FATAL_BY_DEFAULT = sum(1 << (number - 1) for number in (17, 18, 19, 20, 21, 22, 23, 28))


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An open file as /proc/<tid>/fdinfo shows it."""

    #: The file position in bytes.
    position: int
    #: The flags of open(2).
    flags: int
    #: The mount that the file is on.
    mount_id: int
    #: The inode number on that mount; None if it cannot be told.
    inode: int | None


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapped range of a file in a process."""

    #: The address of the first byte.
    start: int
    #: The offset in the file, bytes.
    offset: int
    #: Bytes.
    length: int
    #: The process may write to it.
    writable: bool
    #: It is MAP_SHARED.
    shared: bool


def _read_proc(path: str, size: int = 4096) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(descriptor, size)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _read_status(tid: int) -> bytes | None:
    """All of /proc/TID/status. The list of a thread's groups, up to 65536 of them (setgroups(2)), stands before its signals and capabilities."""
    text = _read_proc(f"/proc/{tid}/status")
    return _read_proc(f"/proc/{tid}/status", 1 << 20) if text and len(text) == 4096 else text


def _status_field(text: bytes, name: bytes, base: int) -> int | None:
    start = text.find(b"\n" + name + b":")
    if start < 0:
        return None
    end = text.find(b"\n", start + 1)
    return int(text[start + len(name) + 2 : end], base)


def _status_words(text: bytes, name: bytes) -> list[bytes]:
    start = text.find(b"\n" + name + b":") + len(name) + 2
    return text[start : text.find(b"\n", start)].split()


def process_of(tid: int) -> int:
    """The process id (thread group id) of a thread; the thread's own id if /proc does not tell any more."""
    text = _read_status(tid)
    process = _status_field(text, b"Tgid", 10) if text else None
    return process if process is not None else tid


def started(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None if it is gone. With its number it names a process for good."""
    text = _read_proc(f"/proc/{pid}/stat")
    # The name in parentheses may contain anything.
    return int(text.rpartition(b")")[2].split()[19]) if text else None


def shares_our_user_namespace(tid: int) -> bool:
    """Whether a thread is in this process's user namespace. False for a thread that cannot be looked at."""
    try:
        return os.readlink(f"/proc/{tid}/ns/user") == os.readlink("/proc/self/ns/user")
    except OSError:
        return False


def user_of(tid: int) -> int | None:
    """The user who has started a thread's process (its real user id): of a set-user-ID program not the file's owner. None if it is gone."""
    text = _read_status(tid)
    return int(_status_words(text, b"Uid")[0]) if text else None


def has_capability(tid: int, number: int) -> bool:
    """Whether a thread has that effective capability (linux/capability.h) in this process's user namespace. False if it cannot be looked at."""
    text = _read_status(tid) if shares_our_user_namespace(tid) else None
    return bool(text and (_status_field(text, b"CapEff", 16) or 0) >> number & 1)


def is_member(tid: int, gid: int) -> bool:
    """Whether a group is a thread's own for files, or a supplementary one (in_group_p() in the kernel). False if the thread cannot be looked at."""
    text = _read_status(tid)
    if not text:
        return False
    return b"%d" % gid in (_status_words(text, b"Gid")[3], *_status_words(text, b"Groups"))


def rights(tid: int, uid: int) -> tuple[list[int], int]:
    """The supplementary groups of a thread and its effective capabilities (a bit each) in the thread's own user namespace.

    None where they cannot be told, or where the thread is not one of that user (fsuid) any more.
    """
    text = _read_status(tid)
    if not text or int(_status_words(text, b"Uid")[3]) != uid:
        return [], 0
    groups = [int(word) for word in _status_words(text, b"Groups")]
    return groups, _status_field(text, b"CapEff", 16) or 0


def has_user(tid: int, uid: int) -> bool:
    """Whether that user exists in a thread's user namespace, which is not this process's own (user_namespaces(7)). False if it cannot be told."""
    return _is_mapped(_read_proc(f"/proc/{tid}/uid_map", 1 << 16), uid)


def has_group(tid: int, gid: int) -> bool:
    """The same of a group."""
    return _is_mapped(_read_proc(f"/proc/{tid}/gid_map", 1 << 16), gid)


def _is_mapped(text: bytes | None, number: int) -> bool:
    extents = (line.split() for line in (text or b"").splitlines())
    return any(int(first) <= number < int(first) + int(length) for _, first, length in extents)


def threads_of(pid: int) -> list[int]:
    """The threads of a process; empty if the process is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def children_of(pid: int) -> list[int]:
    """The children of a process; none if it has gone, or if this kernel does not list them (CONFIG_PROC_CHILDREN)."""
    found: list[int] = []
    for tid in threads_of(pid):
        found += map(int, (_read_proc(f"/proc/{tid}/task/{tid}/children", 1 << 16) or b"").split())
    return found


def is_being_killed(tid: int) -> bool:
    """Whether a fatal signal is pending on a thread, which then waits for an answer only to die.

    A signal that the process handles does not count: a thread that waits for fanotify's or FUSE's answer goes on waiting then
    (docs/facts.md, section 8).
    """
    text = _read_status(tid)
    if not text:
        return False
    pending = (_status_field(text, b"SigPnd", 16) or 0) | (_status_field(text, b"ShdPnd", 16) or 0)
    if not pending:
        return False
    if pending & _SIGKILL_BIT:
        return True
    held_back = 0
    for name in (b"SigBlk", b"SigIgn", b"SigCgt"):
        held_back |= _status_field(text, name, 16) or 0
    return bool(pending & ~held_back & ~_NOT_FATAL_BY_DEFAULT)


def is_gone(tid: int) -> bool:
    """Whether a thread has ended. False for a thread that this process may not look at."""
    try:
        os.kill(tid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    text = _read_status(tid)
    return text is not None and (b"\nState:\tZ" in text or b"\nState:\tX" in text)


def calls_finished(pid: int, tid: int) -> int | None:
    """The number of read and write calls that a thread has finished. It tells one long call from the same call made again."""
    text = _read_proc(f"/proc/{pid}/task/{tid}/io")
    reads = _status_field(text, b"syscr", 10) if text else None
    writes = _status_field(text, b"syscw", 10) if text else None
    return None if reads is None or writes is None else reads + writes


def voluntary_switches(tid: int) -> int | None:
    """How often a thread has given up its processor to wait (getrusage(2), ru_nvcsw); None if the kernel does not tell."""
    text = _read_status(tid)
    return _status_field(text, b"voluntary_ctxt_switches", 10) if text else None


def run_time(tid: int) -> int | None:
    """The run time in nanoseconds of a thread that is blocked now; None if the kernel does not tell."""
    text = _read_proc(f"/proc/{tid}/schedstat")
    return int(text.split(None, 1)[0]) if text else None


def memory_at(tid: int, address: int, size: int) -> bytes | None:
    """`size` bytes at an address of a thread's memory; None if not all of them can be read. May wait as long as the memory does.

    The topmost byte of the address may be a tag (arm64: Documentation/arch/arm64/tagged-address-abi.rst), which is no part of a place in the file.
    """
    try:
        descriptor = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.pread(descriptor, size, address & _WITHOUT_TAG)
    except (OSError, OverflowError):
        return None
    finally:
        os.close(descriptor)
    return data if len(data) == size else None


def string_at(read: Callable[[int, int], bytes], address: int, limit: int) -> bytes:
    """The string at an address, without its final NUL, which must come within `limit` bytes; `read` gives (address, size) bytes of the memory.

    Raises OSError ENAMETOOLONG, and the errors of `read`.
    """
    text = b""
    while len(text) < limit:
        # Not past the end of a page: the next page may not be there.
        size = min(limit - len(text), mmap.PAGESIZE - (address + len(text)) % mmap.PAGESIZE)
        piece, nul, _ = read(address + len(text), size).partition(b"\0")
        text += piece
        if nul:
            return text
    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def file_of(tid: int, descriptor: int) -> tuple[tuple[int, int], int] | None:
    """The device (major, minor) and the inode number of a thread's descriptor; None if it is closed, or cannot be told.

    Sends no request to the file's server, takes no lock of the file, and does not keep it open.
    """
    try:
        opened = os.open(f"/proc/{tid}/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return syscalls.device_and_inode(opened)
    except OSError:
        return None
    finally:
        os.close(opened)


def descriptor_of(tid: int, descriptor: int) -> Descriptor | None:
    """The state of a thread's descriptor; None if it is closed. The inode number tells whether it is the file of a request.

    Can block for as long as the thread's process likes, because the kernel locks an epoll(7) descriptor to show it: call it off the event loop.
    """
    text = _read_proc(f"/proc/{tid}/fdinfo/{descriptor}")
    if not text:
        return None
    fields: dict[bytes, bytes] = {}
    for line in text.splitlines():
        name, _, value = line.partition(b":")
        fields[name] = value.strip()
    try:
        inode = int(fields[b"ino"]) if b"ino" in fields else inode_of(tid, descriptor)
        return Descriptor(int(fields[b"pos"]), int(fields[b"flags"], 8), int(fields[b"mnt_id"]), inode)
    except (KeyError, ValueError):
        return None


def inode_of(tid: int, descriptor: int) -> int | None:
    """The inode number of file_of(). /proc/PID/fdinfo has it from Linux 5.14 on."""
    found = file_of(tid, descriptor)
    return None if found is None else found[1]


def borrow(pid: int, descriptor: int) -> int:
    """A duplicate of a process's descriptor, or -1. It needs pidfd_getfd(2) (Linux 5.6) and the right to trace the process.

    close(2) of it sends FLUSH to the file's server and may wait for that, also if the process has put another file there meanwhile.
    """
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return -1
    try:
        return syscalls.pidfd_getfd(process, descriptor)
    except OSError:
        return -1
    finally:
        os.close(process)


def mappings_of(pid: int, device: tuple[int, int], inode: int) -> list[Mapping]:
    """The mappings of one file in a process. `device` (major, minor) and `inode` are the numbers that the kernel shows for the file.

    Can block while the accessor holds its mmap lock: call it off the event loop, with a deadline.
    """
    wanted = f"{device[0]:02x}:{device[1]:02x} {inode}".encode()
    found = []
    for line in _lines_of(f"/proc/{pid}/maps"):
        if wanted not in line:
            continue
        addresses, rights, offset, shown_device, shown_inode = line.split(None, 5)[:5]
        if shown_device + b" " + shown_inode != wanted:
            continue
        start, end = (int(address, 16) for address in addresses.split(b"-"))
        found.append(Mapping(start, int(offset, 16), end - start, b"w" in rights, b"s" in rights))
    return found


def _lines_of(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as lines:
            yield from lines
    except OSError:
        return
