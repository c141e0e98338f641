"""Starts a command under a filter. It is a program of its own, run by path with the standard library alone, so that it starts fast.

Its argument is the number of a socket to the supervisor. From there it takes its orders (marshal). There it sends the filter's descriptor, or a
failure: a step's name and an errno. A successful exec closes the socket.
"""

import ctypes
import errno
import marshal
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
FAILURE = struct.Struct("=16si")  # the step, an errno


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> None:
    """Take the orders, set up, and become the command."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    orders: dict[str, Any] = marshal.loads(control.recv(1 << 20))
    step = "directory"
    try:
        os.chdir(orders["directory"])
        step = "filter"
        descriptor, killable = _install(orders["program"], orders["seccomp"], orders["flags"])
        socket.send_fds(
            control, [FAILURE.pack(b"running" if killable else b"interruptible", 0)], [descriptor]
        )
        os.close(descriptor)
        _restore(orders)
        step = "command"
        os.execvp(orders["command"][0], orders["command"])
    except OSError as error:
        control.send(FAILURE.pack(step.encode(), error.errno or errno.EIO))
        os._exit(127)


def _install(program: bytes, seccomp: int, flags: list[int]) -> tuple[int, bool]:
    """Install the filter. Returns its descriptor, and whether the kernel took the first of the `flags` (older kernels know fewer)."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program, len(program))
    structure = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_char_p))
    may_without = os.geteuid() == 0
    number = 0
    for position, each in enumerate(flags):
        for promise in (False, True) if may_without else (True,):
            # An ordinary user must not deceive a set-id program by its answers to that program's system calls.
            if promise:
                libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            descriptor = int(libc.syscall(seccomp, _SET_MODE_FILTER, each, ctypes.byref(structure)))
            if descriptor >= 0:
                return descriptor, position == 0
            number = ctypes.get_errno()
            if number != errno.EACCES:
                break
        if number != errno.EINVAL:
            break
    raise OSError(number, os.strerror(number))


def _restore(orders: dict[str, Any]) -> None:
    """Undo the settings that Python and the supervisor have made for themselves."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    for number in orders["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_NOFILE, orders["descriptors"])
    # Without the supervisor, which answers its calls, the command could not even map a library.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != orders["supervisor"]:
        os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, orders["blocked"])


if __name__ == "__main__":
    main()
