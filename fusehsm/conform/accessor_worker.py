"""The other side of accessor.py: a process that forks workers, which run operations on files. It imports only the standard library, to fork fast.

Its argument is the descriptor number of a control socket. All processes end when that socket is closed.
"""

import ctypes
import errno
import fcntl
import marshal
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1
FORK = struct.Struct(
    "=cii"
)  # b"f", uid, gid (-1: unchanged); the message carries the descriptor of the worker's connection
STATUS = struct.Struct("=ci4x")  # b"s", pid of a worker that has ended
NUMBER = struct.Struct("=i")


# Operations. The functions of the module os can be called by name too.


def pread(descriptor: int, size: int, offset: int) -> bytes:
    """One pread(2); the result may be short."""
    return os.pread(descriptor, size, offset)


def read_file(path: str) -> bytes:
    """The whole file, read with read(2) calls of 1 MiB."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces = []
        while piece := os.read(descriptor, 1 << 20):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def pread_path(path: str, size: int, offset: int) -> bytes:
    """open(2) for reading, one pread(2), close(2)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def pwrite_path(path: str, data: bytes, offset: int) -> int:
    """open(2) for writing, one pwrite(2), close(2)."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        return os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


_MAPPINGS: dict[int, mmap.mmap] = {}


def map_file(
    descriptor: int, length: int, offset: int = 0, shared: bool = False, writable: bool = False
) -> int:
    """mmap(2). Returns the number of the mapping for `touch`, `put` and `unmap`."""
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapping = mmap.mmap(descriptor, length, flags=flags, prot=protection, offset=offset)
    number = max(_MAPPINGS, default=0) + 1
    _MAPPINGS[number] = mapping
    return number


def touch(number: int, offset: int, size: int = 1) -> bytes:
    """The bytes of a mapping at `offset`. A denied page fault kills this process with SIGBUS."""
    return _MAPPINGS[number][offset : offset + size]


def put(number: int, offset: int, data: bytes) -> None:
    """Write through a mapping."""
    _MAPPINGS[number][offset : offset + len(data)] = data


def unmap(number: int) -> None:
    """munmap(2)."""
    _MAPPINGS.pop(number).close()


def execute(path: str, *arguments: str) -> tuple[int, bytes]:
    """Run a program in a child. Returns its exit status (negative: a signal, as in subprocess) and its output. Raises the OSError of execve(2)."""
    done = subprocess.run([path, *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, done.stdout


def thread_id() -> int:
    """gettid(2)."""
    return threading.get_native_id()


def _prepared_libc() -> ctypes.CDLL:
    prepared = ctypes.CDLL(None, use_errno=True)
    prepared.mmap.restype = prepared.mremap.restype = ctypes.c_void_p
    prepared.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    prepared.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    return prepared


libc = _prepared_libc()

_NAMES: dict[str, Any] = {
    "libc": libc,
    "os": os,
    "errno": errno,
    "fcntl": fcntl,
    "mmap": mmap,
    "signal": signal,
    "socket": socket,
    "stat": stat,
    "subprocess": subprocess,
    "sys": sys,
    "threading": threading,
    "time": time,
    "resource": resource,
    "ctypes": ctypes,
    "struct": struct,
}


def _operation(name: str | None, code: bytes | None, defaults: tuple[Any, ...] | None) -> Callable[..., Any]:
    if code is not None:
        return types.FunctionType(
            marshal.loads(code), {**_NAMES, "__builtins__": __builtins__}, argdefs=defaults
        )
    assert name is not None
    found = globals().get(name)
    operation: Callable[..., Any] = found if isinstance(found, types.FunctionType) else getattr(os, name)
    return operation


def _work(connection: Connection, uid: int, gid: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if gid >= 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
    if uid >= 0:
        os.setresuid(uid, uid, uid)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # again: setuid(2) has cleared it
    # The default action of SIGINT ends the process at once. With Python's handler it would wait for the answer to its event.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        try:
            name, code, defaults, arguments = connection.recv()
        except (EOFError, OSError):
            return
        outcome: tuple[bool, Any]
        try:
            outcome = (True, _operation(name, code, defaults)(*arguments))
        except BaseException as error:
            outcome = (False, error)
        try:
            connection.send(outcome)
        except (OSError, EOFError):
            return
        except Exception as error:
            connection.send((False, TypeError(f"{outcome[1]!r} cannot be sent back: {error}")))


def main() -> None:
    """Serve requests for workers until the control socket is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        if message[:1] == b"s":
            _, pid = STATUS.unpack(message)
            control.send(NUMBER.pack(os.waitpid(pid, 0)[1]))
            continue
        _, uid, gid = FORK.unpack(message)
        pid = os.fork()
        if pid == 0:
            control.close()
            try:
                _work(Connection(descriptors[0]), uid, gid)
            finally:
                os._exit(0)
        os.close(descriptors[0])
        pidfd = os.pidfd_open(pid)
        socket.send_fds(control, [NUMBER.pack(pid)], [pidfd])
        os.close(pidfd)


if __name__ == "__main__":
    main()
