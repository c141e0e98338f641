"""A listener in a process of its own that does what a workload says. It imports only the standard library, to start fast.

Its arguments are the watched directory and the number of a descriptor from which it reads its order: an `Order`, pickled. It opens "file", makes a
group, sets the mark, prints its pid and runs the order's function, which gets a `Listener`. Then it allows all further events until its stdin is
closed. Each line that it prints is the repr() of a tuple, for listener.py.
"""

import ctypes
import errno
import fcntl
import marshal
import mmap
import os
import pickle
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

PAGE = 4096
PRE_ACCESS = 0x00100000
_MARK_ADD = 0x1
_PRE_CONTENT = 0x8 | 0x1 | 0x10  # FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE
_METADATA = struct.Struct("=IBBHQii")  # fanotify(7), struct fanotify_event_metadata
_LONGEST_EVENT = _METADATA.size + 24  # with struct fanotify_event_info_range: no read(2) returns two
_RESPONSE = struct.Struct("=iI")
_ALLOW = 1
_DENY = 2
_LOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit systems

_Result = TypeVar("_Result")

# Words of the lines on stdout
PID, EVENT, DID, FAILED = "pid", "event", "did", "failed"


@dataclass(frozen=True, slots=True)
class Event:
    """One event that waits for its answer."""

    #: The event's descriptor.
    fd: int
    #: The process that made the access.
    pid: int


class Listener:
    """The listener, for functions of workloads. All that it hears, does and answers is a line on stdout."""

    def __init__(self, directory: str, mark: str | None, flags: int, mask: int) -> None:
        self.directory = directory
        #: A descriptor of "file" from before the mark, for reading and writing: its accesses make no events.
        self.own = os.open(self.path(), os.O_RDWR | os.O_CLOEXEC)
        self.group = libc.fanotify_init(_PRE_CONTENT, os.O_RDWR)
        if mark is not None:
            libc.fanotify_mark(self.group, _MARK_ADD | flags, ctypes.c_uint64(mask), -100, self.path(mark))

    def path(self, name: str = "file") -> str:
        """The path of a file in the directory; "" is the directory."""
        return os.path.join(self.directory, name).rstrip("/")

    def hear(self, *, silently: bool = False) -> Event:
        """Read the next event."""
        data = os.read(self.group, _LONGEST_EVENT)
        _, _, _, _, _, fd, pid = _METADATA.unpack_from(data)
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self.directory)
        if not silently:
            tell(EVENT, data, path, pid)
        return Event(fd, pid)

    def answer(self, event: Event, error: int = 0, *, silently: bool = False) -> None:
        """Allow it, or deny it with an errno, and close its descriptor. No line may follow before the next event, or the end of ended()."""
        if not silently:
            tell(DID, "answer", "ALLOW" if not error else errno.errorcode[error])
        os.write(self.group, _RESPONSE.pack(event.fd, _ALLOW if not error else _DENY | error << 24))
        os.close(event.fd)

    def ended(self, *, silently: bool = False) -> None:
        """Allow all further events, and return when the accessors have done their part."""
        waiting = select.poll()
        waiting.register(self.group, select.POLLIN)
        waiting.register(0, select.POLLIN)
        while True:
            ready = dict(waiting.poll())
            if self.group in ready:
                self.answer(self.hear(silently=silently), silently=silently)
            elif 0 in ready and not os.read(0, 1):
                return

    def say(self, what: str, value: object) -> None:
        """A line with a value that is the same in every run."""
        tell(DID, what, value)

    def do(self, what: str, call: Callable[..., _Result], *arguments: Any) -> _Result | None:
        """Make a call; a line has its result, or its errno. Returns the result, or None if it failed."""
        try:
            result = call(*arguments)
        except OSError as error:
            tell(FAILED, what, errno.errorcode.get(error.errno or 0, repr(error)))
            return None
        tell(DID, what, result)
        return result


# Calls that Python does not have. Each raises OSError.


class _Libc:
    """The C library. A function that returns -1 raises its OSError; str and bytes are paths."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> int:
            done = function(*(os.fsencode(each) if isinstance(each, str) else each for each in arguments))
            if done == -1:
                raise OSError(ctypes.get_errno(), name)
            return int(done)

        return call


libc = _Libc()


def content(start: int, count: int) -> bytes:
    """What a fill writes to these bytes of a file."""
    return bytes(place % 251 + place // PAGE % 5 for place in range(start, start + count))


def fill(descriptor: int, start: int, count: int) -> int:
    """pwrite(2) of the content of these bytes."""
    return os.pwrite(descriptor, content(start, count), start)


def mount_of(descriptor: int) -> str:
    """The number of the descriptor's mount."""
    with open(f"/proc/self/fdinfo/{descriptor}") as info:
        return next(line.split()[1] for line in info if line.startswith("mnt_id:"))


def file_handle(place: int, path: str = "", flags: int = 0x1000) -> bytes:
    """name_to_handle_at(2), by default of the descriptor itself (AT_EMPTY_PATH): length, type, handle."""
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 136)
    libc.name_to_handle_at(place, path, handle, ctypes.byref(ctypes.c_int()), flags)
    return handle.raw[: 8 + int.from_bytes(handle.raw[:4], sys.byteorder)]


def lock(descriptor: int, command: int, kind: int, start: int = 0, count: int = 0) -> int:
    """fcntl(2) with a lock of that kind on a range. Returns the kind that it gives back."""
    given = fcntl.fcntl(descriptor, command, _LOCK.pack(kind, os.SEEK_SET, start, count, 0))
    return int(_LOCK.unpack(given)[0])


def data_in(descriptor: int) -> list[str]:
    """The extents of data by SEEK_DATA and SEEK_HOLE, and the number of st_blocks."""
    found = []
    place, end = 0, os.fstat(descriptor).st_size
    while place < end:
        try:
            start = os.lseek(descriptor, place, os.SEEK_DATA)
        except OSError as error:
            found.append(errno.errorcode[error.errno or 0])
            break
        place = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append(f"{start}-{place}")
    return [*found, f"{os.fstat(descriptor).st_blocks} blocks"]


def extents(descriptor: int) -> int:
    """The number of extents by FS_IOC_FIEMAP."""
    request = bytearray(struct.pack("=QQIIII", 0, 1 << 63, 1, 0, 0, 0))  # FIEMAP_FLAG_SYNC; count only
    fcntl.ioctl(descriptor, 0xC020660B, request)
    return int(struct.unpack("=QQIIII", request)[3])


def in_child(call: Callable[[], int | None]) -> str:
    """Run `call()` in a child. Returns "0", or the name of its errno."""
    child = os.fork()
    if child == 0:
        number = 0
        try:
            call()
        except OSError as error:
            number = error.errno or 255
        os._exit(number)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return errno.errorcode.get(number, str(number))


def tell(*words: object) -> None:
    """Print one line for listener.py, with one write(2)."""
    os.write(1, repr(words).encode() + b"\n")


_NAMES: dict[str, Any] = {
    name: value
    for name, value in globals().items()
    if not name.startswith("_") or isinstance(value, types.ModuleType)
} | {"signal": signal, "mmap": mmap, "stat": stat, "socket": socket, "threading": threading, "time": time}


@dataclass(frozen=True, slots=True)
class Order:
    """The part of a workload that the listener does. It is sent as a tuple."""

    #: marshal's data of the function's code.
    code: bytes
    #: The function's arguments after the listener.
    arguments: tuple[Any, ...]
    #: The name of the object to mark; None: no mark.
    mark: str | None
    #: Flags of the mark in addition to FAN_MARK_ADD.
    flags: int
    #: The mark's mask.
    mask: int


def main() -> None:
    """Do what the order says."""
    with open(int(sys.argv[2]), "rb") as orders:
        order = Order(*pickle.load(orders))
    listener = Listener(sys.argv[1], order.mark, order.flags, order.mask)
    tell(PID, os.getpid())
    act = types.FunctionType(marshal.loads(order.code), {**_NAMES, "__builtins__": __builtins__})
    act(listener, *order.arguments)
    listener.ended()


if __name__ == "__main__":
    main()
