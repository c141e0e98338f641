"""Starts a command under a filter. It is a program of its own, run by path with the standard library alone, so that it starts fast.

Its argument is the number of a socket to the supervisor (launcher.py). From there it takes its orders (marshal). There it sends the filter's
descriptor, or a failure: a step's name and an errno. A successful exec closes the socket.

With --listener it first makes the command's view: a mount namespace in which each directory is what the overlay covers elsewhere. That takes two
steps. Before the overlays are mounted it copies the mounts below them twice, and sends a descriptor of each copy. One is for the command; the overlay
serves the other, in which nothing that the command mounts appears. Afterwards it puts the first ones over the overlays, in its own namespace alone.
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

VIEW = "view"  # the key of the first step's orders
_CLONE_NEWNS = 0x20000
_CLONE_NEWUSER = 0x10000000
# The same numbers on every architecture (include/uapi/asm-generic/unistd.h).
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18
_MOUNT_ATTR = struct.Struct("=4Q")  # set, clear, propagation, userns_fd

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
FAILURE = struct.Struct("=16si")  # the step, an errno

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> None:
    """Take the orders, set up, and become the command."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    views: list[tuple[int, str]] = []
    step = VIEW
    try:
        orders = _take_orders(control)
        if VIEW in orders:
            _enter_namespace(orders["user"])
            views = [(_copy(place), place) for place in orders[VIEW]]
            served = [_copy(place) for place in orders[VIEW]]
            socket.send_fds(
                control, [FAILURE.pack(VIEW.encode(), 0)], [*(copy for copy, _ in views), *served]
            )
            for copy in served:
                os.close(copy)
            orders = _take_orders(control)
        for copy, place in views:
            _put_over(copy, place)
        step = "directory"
        os.chdir(orders["directory"])
        step = "filter"
        descriptor, killable = _install(orders["program"], orders["seccomp"], orders["flags"])
        # The filter stops sendmsg(2) otherwise, and nobody answers yet (filters.py).
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", descriptor))
        message = FAILURE.pack(b"running" if killable else b"interruptible", 0)
        control.sendmsg([message], [rights], socket.MSG_CONFIRM)
        os.close(descriptor)
        _restore(orders)
        step = "command"
        os.execvp(orders["command"][0], orders["command"])
    except OSError as error:
        control.send(FAILURE.pack(step.encode(), error.errno or errno.EIO))
        os._exit(127)


def _take_orders(control: socket.socket) -> dict[str, Any]:
    data = control.recv(1 << 20)
    if not data:
        os._exit(127)  # the supervisor has given up
    orders: dict[str, Any] = marshal.loads(data)
    return orders


def _enter_namespace(user: bool) -> None:
    """Enter a mount namespace; with `user`, in a user namespace too, without which an ordinary user may not do that."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)))
    if user:
        # Each id stays what it is. The kernel wants the first line before an ordinary user may map a group.
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)


def _copy(place: str) -> int:
    """A descriptor of a private copy of the mounts at and below a place. It is mounted nowhere yet."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    copy = _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(place), flags))
    # A shared copy would get every overlay that is mounted on its original.
    private = _MOUNT_ATTR.pack(0, 0, _MS_PRIVATE, 0)
    flags = _AT_EMPTY_PATH | _AT_RECURSIVE
    if _libc.syscall(_SYS_MOUNT_SETATTR, copy, b"", flags, private, len(private)) < 0:
        if ctypes.get_errno() != errno.ENOSYS:
            raise _error()
        # Before Linux 5.12.
        path = b"/proc/self/fd/%d" % copy
        _check(_libc.mount(b"none", path, None, ctypes.c_ulong(_MS_PRIVATE | _MS_REC), None))
    return copy


def _put_over(copy: int, place: str) -> None:
    """Mount a copy on its place, over the overlay where that has come into this namespace."""
    target = os.fsencode(place)
    # A shared overlay would pass on what is mounted over it. EINVAL: no mount is here.
    _libc.mount(b"none", target, None, ctypes.c_ulong(_MS_PRIVATE), None)
    _check(_libc.syscall(_SYS_MOVE_MOUNT, copy, b"", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH))
    os.close(copy)


def _check(result: int) -> int:
    if result < 0:
        raise _error()
    return result


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _install(program: bytes, seccomp: int, flags: list[int]) -> tuple[int, bool]:
    """Install the filter. Returns its descriptor, and whether the kernel took the first of the `flags` (older kernels know fewer)."""
    buffer = ctypes.create_string_buffer(program, len(program))
    structure = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_char_p))
    may_without = os.geteuid() == 0
    number = 0
    for position, each in enumerate(flags):
        for promise in (False, True) if may_without else (True,):
            # An ordinary user must not deceive a set-id program by its answers to that program's system calls.
            if promise:
                _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            descriptor = int(_libc.syscall(seccomp, _SET_MODE_FILTER, each, ctypes.byref(structure)))
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
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != orders["supervisor"]:
        os.kill(os.getpid(), signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, orders["blocked"])


if __name__ == "__main__":
    main()
