"""Finds the object of a path as a thread of the command sees it: with that thread's root, working directory, descriptors and rights."""

import ctypes
import errno
import os
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from fusehsm.backends.lookup import FoundObject, found, look_up, look_up_in_root
from fusehsm.linux import proc, syscalls
from fusehsm.linux.syscalls import AT_FDCWD
from fusehsm.supervisor import tasks
from fusehsm.supervisor.notifier import CallIsOver
from fusehsm.supervisor.numbers import Architecture

_CLONE_FS: Final = 0x200
_CLONE_NEWNS: Final = 0x20000

_NOTHING: Final = re.compile(rb"/(?:\.?/)+")  # "//" and "/./" stay in the same directory


def of_this_process(path: bytes, tid: int) -> bytes:
    """Replace /proc/self, /proc/thread-self and /dev/fd in a path by that thread's own; here they would mean the supervisor.

    A symbolic link of another name that leads there is not noticed.
    """
    process = b"/proc/%d" % proc.process_of(tid)
    path = _NOTHING.sub(b"/", path)
    for ours, theirs in (
        (b"/proc/self", process),
        (b"/proc/thread-self", b"%s/task/%d" % (process, tid)),
        (b"/dev/fd", process + b"/fd"),
    ):
        if path == ours or path.startswith(ours + b"/"):
            return theirs + path[len(ours) :]
    return path


def find(architecture: Architecture, tid: int, flags: int, dirfd: int, path: bytes | None) -> FoundObject:
    """The object that fanotify_mark(2) of that thread is to mark, with the errnos of backends/lookup.py.

    May wait for the file systems on the way. Raises CallIsOver if the thread has gone.
    """
    rights = tasks.rights_of(tid)
    if rights is None:
        raise CallIsOver
    with ExitStack() as opened:

        def hold(where: str, missing: int) -> int:
            try:
                descriptor = os.open(f"/proc/{tid}/{where}", os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                raise OSError(missing, os.strerror(missing)) from None
            opened.callback(os.close, descriptor)
            return descriptor

        if path is None:
            descriptor = _descriptor(tid, dirfd)
            if rights == _OUR_RIGHTS:
                return found(flags, descriptor)
            return _in_its_place(lambda: found(flags, descriptor), architecture, None, None, rights)
        start = hold("cwd", errno.ENOENT)
        if dirfd != AT_FDCWD and not path.startswith(b"/"):
            start = hold(f"fd/{dirfd}", errno.EBADF)
        root = hold("root", errno.ESRCH)
        here = _same_namespace(tid) and os.path.samestat(os.fstat(root), os.stat("/"))
        if here and rights == _OUR_RIGHTS:
            return look_up(flags, start, path)
        if not here and os.geteuid() != 0 and not path.startswith(b"/proc/"):
            # Only root may enter another root or mount namespace.
            where = b"" if path.startswith(b"/") else os.readlink(b"/proc/self/fd/%d" % start) + b"/"
            return look_up_in_root(flags, root, where + path)
        if os.geteuid() != 0:
            return look_up(flags, start, path)
        namespace = None if here else opened.enter_context(open(f"/proc/{tid}/ns/mnt", "rb"))
        return _in_its_place(
            lambda: look_up(flags, start, path),
            architecture,
            None if here else root,
            None if namespace is None else namespace.fileno(),
            rights,
        )


def _descriptor(tid: int, dirfd: int) -> int:
    """A descriptor in this process of the object that the thread's descriptor is open on."""
    descriptor = None if dirfd < 0 else proc.descriptor_of(tid, dirfd)
    if descriptor is None or descriptor.flags & os.O_PATH:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return os.open(f"/proc/{tid}/fd/{dirfd}", os.O_PATH | os.O_CLOEXEC)


def _same_namespace(tid: int) -> bool:
    return os.readlink(f"/proc/{tid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")


def _own_rights() -> tasks.Rights:
    rights = tasks.rights_of(os.getpid())
    assert rights is not None
    return rights


_OUR_RIGHTS: Final = _own_rights()


def _in_its_place(
    look: Callable[[], FoundObject],
    architecture: Architecture,
    root: int | None,
    namespace: int | None,
    rights: tasks.Rights,
) -> FoundObject:
    """Call `look` in a new thread with another root and other rights. Linux keeps both for each thread, and they end with it."""
    outcome: list[FoundObject | BaseException] = []

    def in_thread() -> None:
        try:
            if root is not None:
                syscalls.unshare(_CLONE_FS)
                assert namespace is not None
                if os.geteuid() == 0:
                    syscalls.setns(namespace, _CLONE_NEWNS)
                os.fchdir(root)
                os.chroot(".")
            _take(architecture, rights)
            outcome.append(look())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=in_thread, daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _take(architecture: Architecture, rights: tasks.Rights) -> None:
    """Open files with these rights from now on, in this thread alone. glibc's own functions would change every thread."""
    if rights == _OUR_RIGHTS:
        return
    groups = (ctypes.c_uint * len(rights.groups))(*rights.groups)
    syscalls.system_call(architecture.setgroups, len(groups), groups)
    # These two return the former id, not whether they have succeeded.
    for number, wanted in ((architecture.setfsgid, rights.gid), (architecture.setfsuid, rights.uid)):
        syscalls.system_call(number, wanted)
        if syscalls.system_call(number, wanted) != wanted:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
