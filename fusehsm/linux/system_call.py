"""Tells the system call that an accessor's thread waits in, from /proc/<tid>/syscall (proc(5)).

FUSE tells a server the range of a request, not of the system call behind it: large transfers arrive in pieces, sendfile(2) arrives as
whole pages, O_APPEND arrives at the end of the file (docs/facts.md, section 11). While the request is unanswered, the accessor's thread is
blocked in that system call, and /proc still holds its number and arguments.

Every function returns None if /proc does not tell: the thread is gone, is running, or may not be looked at (Yama, another user's process).
The caller then uses the request's own range.
"""

import mmap
import os
import platform
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from fusehsm.linux.proc import Descriptor, descriptor_of, memory_at, process_of

PAGE_FAULT = -1  # SystemCall.number of a thread that is blocked outside any system call
IO_URING_ENTER = 426  # on every architecture
_MEMORY_POINTER = struct.Struct("=q")
_IOVEC = struct.Struct("=QQ")
_IOV_MAX = 1024
# import_iovec() cuts a vector's sum to this before the event; a plain buffer is cut after it (docs/facts.md, section 9).
_MAX_RW_COUNT = 0x7FFFFFFF & -mmap.PAGESIZE
_RWF_APPEND, _RWF_NOAPPEND = 0x10, 0x20


@dataclass(frozen=True, slots=True)
class _Numbers:
    """System call numbers of one architecture (its unistd.h)."""

    read: int
    pread64: int
    readv: int
    preadv: int
    preadv2: int
    write: int
    pwrite64: int
    writev: int
    pwritev: int
    pwritev2: int
    sendfile: int
    splice: int
    copy_file_range: int
    fadvise64: int
    readahead: int
    ioctl: int
    fcntl: int


_NUMBERS = {
    "x86_64": _Numbers(0, 17, 19, 295, 327, 1, 18, 20, 296, 328, 40, 275, 326, 221, 187, 16, 72),
    "aarch64": _Numbers(63, 67, 65, 69, 286, 64, 68, 66, 70, 287, 71, 76, 285, 223, 213, 29, 25),
}
_HERE = _NUMBERS.get(platform.machine())
_FILE_ATTR = (468, 469)  # file_getattr(2), file_setattr(2), on every architecture


@dataclass(slots=True)
class SystemCall:
    """The system call that a thread is blocked in, as read for one request.

    Two values are equal as long as the thread is in the same call: the stack pointer is compared, too.
    """

    #: The thread.
    tid: int
    #: The call's number; PAGE_FAULT if the thread is blocked outside any system call, and then there are no arguments.
    number: int
    #: The six arguments, as registers.
    arguments: tuple[int, ...]
    #: The thread's stack pointer.
    stack_pointer: int
    #: The thread's program counter.
    program_counter: int
    #: The answers of look_at().
    _opened: dict[int, Descriptor | None] = field(default_factory=dict, compare=False, repr=False)

    def look_at(self, descriptor: int) -> Descriptor | None:
        """The state of the thread's open file of that number, read once for this call. Can block (descriptor_of())."""
        if descriptor not in self._opened:
            self._opened[descriptor] = descriptor_of(self.tid, descriptor)
        return self._opened[descriptor]

    def opened(self, descriptor: int) -> Descriptor | None:
        """What look_at() has found; None if it has not been called, or not returned."""
        return self._opened.get(descriptor)


@dataclass(slots=True)
class Transfer:
    """One side of a call that moves bytes from or to a file."""

    #: The thread's descriptor of the file.
    descriptor: int
    #: Bytes; None if the call uses the file position.
    offset: int | None
    #: Bytes.
    count: int
    #: The kernel serves the call through the page cache, whatever the open file's flags are (sendfile, splice, copy_file_range).
    paged: bool
    #: This one call writes at the end of the file (RWF_APPEND).
    appends: bool = False
    #: The (descriptor, offset) of the source, whose end of file cuts `count` (copy_file_range).
    source: tuple[int, int | None] | None = None


# A request can reach the server a moment before its thread has fallen asleep.
_RUNS = [b"running"]
_FALLING_ASLEEP = 200_000  # nanoseconds


class CallReader:
    """Reads /proc/<tid>/syscall. Keeps up to `limit` of those files open, because to open one costs more than to read it."""

    def __init__(self, limit: int = 64, refused: Callable[[int], None] | None = None) -> None:
        """`refused` is called with a thread whose call may not be looked at."""
        self._limit = limit
        self._refused = refused
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._processes: dict[int, int] = {}

    def identify(self, tid: int) -> tuple[int, SystemCall | None]:
        """The process of a thread that waits for an answer, and the call as read() tells it."""
        call = self.read(tid, _FALLING_ASLEEP)
        process = self._processes.get(tid)
        if process is None:
            process = process_of(tid)
            if tid in self._descriptors:
                # The thread id belongs to this thread for as long as its file can be read.
                self._processes[tid] = process
        return process, call

    def read(self, tid: int, patience: int = 0) -> SystemCall | None:
        """The call that `tid` is blocked in.

        None if the thread still runs after `patience` nanoseconds, is gone, or may not be looked at.
        """
        descriptor = self._descriptors.get(tid)
        if descriptor is None:
            try:
                descriptor = os.open(f"/proc/{tid}/syscall", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self._note(tid, error)
                return None
            self._descriptors[tid] = descriptor
            if len(self._descriptors) > self._limit:
                self._drop(next(iter(self._descriptors)))
        else:
            self._descriptors.move_to_end(tid)
        try:
            words = os.pread(descriptor, 256, 0).split()
            if words == _RUNS and patience:
                until = time.monotonic_ns() + patience
                while words == _RUNS and time.monotonic_ns() < until:
                    os.sched_yield()
                    words = os.pread(descriptor, 256, 0).split()
        except OSError as error:
            # The thread has died (another may have its id now), or belongs to another user since an execve.
            self._drop(tid)
            self._note(tid, error)
            return None
        if len(words) == 9:
            numbers = [int(word, 16) for word in words[1:]]
            return SystemCall(tid, int(words[0]), tuple(numbers[:6]), numbers[6], numbers[7])
        if len(words) == 3:
            return SystemCall(tid, PAGE_FAULT, (), int(words[1], 16), int(words[2], 16))
        return None

    def _note(self, tid: int, error: OSError) -> None:
        if self._refused is not None and isinstance(error, PermissionError):
            self._refused(tid)

    def _drop(self, tid: int) -> None:
        self._processes.pop(tid, None)
        os.close(self._descriptors.pop(tid))

    def close(self) -> None:
        """Close all files kept open."""
        for tid in list(self._descriptors):
            self._drop(tid)


def _vector_count(tid: int, address: int, entries: int) -> int | None:
    if not 0 < entries <= _IOV_MAX:
        return None
    data = memory_at(tid, address, entries * _IOVEC.size)
    return None if data is None else min(sum(length for _, length in _IOVEC.iter_unpack(data)), _MAX_RW_COUNT)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _pointed_offset(tid: int, pointer: int) -> tuple[bool, int | None]:
    """(known, offset) of an `off_t *` argument. A null pointer means the file position."""
    if pointer == 0:
        return True, None
    data = memory_at(tid, pointer, _MEMORY_POINTER.size)
    return (False, None) if data is None else (True, _MEMORY_POINTER.unpack(data)[0])


def _pointed(call: SystemCall, descriptor: int, pointer: int, count: int) -> Transfer | None:
    known, offset = _pointed_offset(call.tid, pointer)
    return Transfer(descriptor, offset, count, paged=True) if known else None


def _vectored(call: SystemCall, offset: int | None, flags: int = 0) -> Transfer | None:
    descriptor, address, entries = call.arguments[:3]
    count = _vector_count(call.tid, address, entries)
    appends = bool(flags & _RWF_APPEND)
    return None if count is None else Transfer(descriptor, offset, count, paged=False, appends=appends)


def _copied(call: SystemCall, *, target: bool) -> Transfer | None:
    """One side of copy_file_range(2)."""
    source, source_pointer, destination, destination_pointer, count = call.arguments[:5]
    known, offset = _pointed_offset(call.tid, source_pointer)
    if not known:
        return None
    whence = (source, offset)
    if target:
        source = destination
        known, offset = _pointed_offset(call.tid, destination_pointer)
    return Transfer(source, offset, count, paged=True, source=whence) if known else None


def _plain(call: SystemCall, numbers: tuple[int, int, int, int, int]) -> Transfer | None:
    """The transfer of read(2), pread(2), readv(2), preadv(2), preadv2(2), or of the matching write calls. `numbers`: those five calls."""
    scalar, scalar_at, vector, vector_at, vector_at_flags = numbers
    number, arguments = call.number, call.arguments
    if number == scalar:
        return Transfer(arguments[0], None, arguments[2], paged=False)
    if number == scalar_at:
        return Transfer(arguments[0], _signed(arguments[3]), arguments[2], paged=False)
    if number == vector:
        return _vectored(call, None)
    if number == vector_at:
        return _vectored(call, _signed(arguments[3]))
    if number == vector_at_flags:
        offset = _signed(arguments[3])
        return _vectored(call, None if offset == -1 else offset, arguments[5])
    return None


def reading(call: SystemCall) -> Transfer | None:
    """The file range that `call` reads; None if it is not a call that reads a file.

    May read the accessor's memory (vectors, pointed-to offsets), never its files.
    """
    if _HERE is None or call.number == PAGE_FAULT:
        return None
    here, arguments = _HERE, call.arguments
    if call.number == here.sendfile:
        return _pointed(call, arguments[1], arguments[2], arguments[3])
    if call.number == here.splice:
        return _pointed(call, arguments[0], arguments[1], arguments[4])
    if call.number == here.copy_file_range:
        return _copied(call, target=False)
    return _plain(call, (here.read, here.pread64, here.readv, here.preadv, here.preadv2))


def reads_memory(call: SystemCall) -> bool:
    """Whether reading() or writing() must read the accessor's memory for that call. That can block, as mappings_of() can."""
    here = _HERE
    if here is None:
        return False
    number = call.number
    if number in (here.sendfile, here.splice, here.copy_file_range):
        return True
    return number in (here.readv, here.preadv, here.preadv2, here.writev, here.pwritev, here.pwritev2)


def writing(call: SystemCall) -> Transfer | None:
    """The file range that `call` writes; None if it is not a call that writes a file."""
    if _HERE is None or call.number == PAGE_FAULT:
        return None
    here, arguments = _HERE, call.arguments
    if call.number == here.sendfile:
        return Transfer(arguments[0], None, arguments[3], paged=True)
    if call.number == here.splice:
        return _pointed(call, arguments[2], arguments[3], arguments[4])
    if call.number == here.copy_file_range:
        return _copied(call, target=True)
    return _plain(call, (here.write, here.pwrite64, here.writev, here.pwritev, here.pwritev2))


def appending(call: SystemCall) -> tuple[int, bool | None] | None:
    """(descriptor, at the end) of a call that writes; None for other calls. `at the end` is None if the open file's flags decide."""
    here = _HERE
    if here is None or call.number == PAGE_FAULT:
        return None
    number, arguments = call.number, call.arguments
    if number == here.pwritev2 and arguments[5] & (_RWF_APPEND | _RWF_NOAPPEND):
        return arguments[0], bool(arguments[5] & _RWF_APPEND)
    writes = number in (here.write, here.pwrite64, here.writev, here.pwritev, here.pwritev2)
    return (arguments[0], None) if writes else None


def is_counted(call: SystemCall) -> bool:
    """Whether calls_finished() counts `call` when it returns."""
    return _HERE is not None and call.number != _HERE.splice


def is_advice(call: SystemCall) -> bool:
    """Whether `call` only asks the kernel to read ahead: posix_fadvise(2), readahead(2)."""
    return _HERE is not None and call.number in (_HERE.fadvise64, _HERE.readahead)


def call_of(tid: int, patience: int = 0) -> SystemCall | None:
    """CallReader.read(), once."""
    with closing(CallReader()) as reader:
        return reader.read(tid, patience)


def is_in_ioctl(tid: int) -> bool:
    """Whether a thread waits in ioctl(2), or in file_getattr(2) or file_setattr(2), which are the same for a file's flags."""
    call = call_of(tid)
    return call is not None and _HERE is not None and call.number in (_HERE.ioctl, *_FILE_ATTR)


def fcntl_of(tid: int) -> tuple[int, int] | None:
    """The descriptor and the command of the fcntl(2) that a thread waits in; None if it does not."""
    call = call_of(tid, _FALLING_ASLEEP)
    if call is None or _HERE is None or call.number != _HERE.fcntl:
        return None
    return call.arguments[0] & 0xFFFFFFFF, call.arguments[1] & 0xFFFFFFFF
