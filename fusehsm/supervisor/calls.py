"""Does each system call that the filter hands over, with the errnos that a group of the kernel would give.

A descriptor on which the filter stops a call need not be a group's. A call on a descriptor of another kind goes on in the kernel. So do the calls
that do the same on the epoll(7) file that stands for a group: they are not even stopped (lseek, fallocate, splice, tee, vmsplice).

Each call that is being answered has a thread: a call that waits for memory, a file system or a listener delays no other. The threads receive
the calls themselves, so that the usual call is answered without a switch of threads.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
import termios
import threading
from collections.abc import Callable
from typing import Final

from fusehsm.backends.lookup import FoundObject
from fusehsm.fanotify.abi import (
    FAN_CLOEXEC,
    FAN_ENABLE_AUDIT,
    FAN_INFO,
    FAN_REPORT_FID_BITS,
    FAN_REPORT_MNT,
    RESPONSE_LENGTH,
    Dialect,
    decode_response,
)
from fusehsm.linux import proc, security_modules
from fusehsm.supervisor import tasks
from fusehsm.supervisor.deadlocks import DeadlockWatch
from fusehsm.supervisor.delivery import Reading
from fusehsm.supervisor.groups import Leaving, SupervisedGroup
from fusehsm.supervisor.lookup import find, of_this_process
from fusehsm.supervisor.mappings import Mappings
from fusehsm.supervisor.notifier import CallIsOver, Ended, Notifier, TrappedCall
from fusehsm.supervisor.numbers import Architecture
from fusehsm.supervisor.own_accesses import OwnAccesses
from fusehsm.supervisor.parked import ParkedCalls
from fusehsm.supervisor.placing import Placing, limit_of
from fusehsm.supervisor.readiness import Bell, Closings
from fusehsm.supervisor.view import Target, View

MOST_GROUPS: Final = 128  # the default of fs.fanotify.max_user_groups

_INT: Final = struct.Struct("=i")
_CAP_SYS_ADMIN: Final = 21  # linux/capability.h
_CAP_AUDIT_WRITE: Final = 29
_PATH_MAX: Final = 4096
_MOST_BYTES: Final = 0x7FFF_F000  # MAX_RW_COUNT
_LARGEST_RESPONSE: Final = 4096  # a longer response is wrong, whatever its further bytes are
_NO_POSITION: Final = 0xFFFF_FFFF_FFFF_FFFF  # preadv2(2) without an offset, as readv(2)

# ioctl(2) requests that the kernel answers for files of any kind (do_vfs_ioctl())
_OF_EVERY_FILE: Final = {
    0x2,
    0x5450,
    0x5451,
    0x5452,
    0x5460,
}  # FIGETBSZ, FIONCLEX, FIOCLEX, FIOASYNC, FIOQSIZE
_OF_INODES: Final = (
    b"\x15\x94Xf"  # types of requests: FS_IOC_GETFSUUID, FICLONE, FS_IOC_FSGETXATTR, FS_IOC_GETFLAGS
)

_MOST_THREADS: Final = 8192  # threads; further calls wait until one is free
_IDLE_THREADS: Final = 4  # idle threads that are kept
_STACK_SIZE: Final = 512 * 1024  # bytes

_log = logging.getLogger(__name__)


class _GoOn(Exception):
    """Raised to let the kernel do the call."""


class Calls:
    """Answers calls. Any number of threads may use it at once.

    `dialect`: None if none was chosen. `any_descriptor`: the filter stops the calls on all descriptors.
    """

    def __init__(
        self,
        notifier: Notifier,
        architecture: Architecture,
        dialect: Dialect | None,
        view: View | None = None,
        *,
        any_descriptor: bool,
        killable: bool,
        deadlock_timeout: float = 0,
    ) -> None:
        """`deadlock_timeout`: seconds that the command may wait for itself, 0 for no limit."""
        self._notifier = notifier
        self._view = view
        self._architecture = architecture
        self._dialect = dialect
        self._parked = ParkedCalls(notifier, killable=killable)
        self._mappings = Mappings(self._parked)
        self._closings = Closings()
        self._placing = Placing(notifier, self._find, any_descriptor=any_descriptor)
        self._groups: dict[SupervisedGroup, None] = {}
        # The group that the last call at a number meant: the next one most likely means it, too.
        self._last_at: dict[int, SupervisedGroup] = {}
        self._lock = threading.Lock()
        self._told_of_file_ids = False
        OwnAccesses(self._all_groups, deadlock_timeout)
        if deadlock_timeout:
            DeadlockWatch(self._all_groups, deadlock_timeout, architecture.kcmp)
        on_groups: list[tuple[int | None, Callable[[TrappedCall, SupervisedGroup], int]]] = [
            (architecture.write, self._write),
            (architecture.writev, self._writev),
            (architecture.pwritev2, self._pwritev2),
            (architecture.ioctl, self._ioctl),
            (architecture.fcntl, self._fcntl),
            (architecture.dup, self._dup),
            (architecture.dup2, self._dup2),
            (architecture.dup3, self._dup2),
        ]
        self._on_groups = {number: function for number, function in on_groups if number is not None}
        self._notes = {
            architecture.sendmsg: lambda call: self._placing.note_messages(call, 1),
            architecture.sendmmsg: lambda call: self._placing.note_messages(call, call.unsigned(2)),
            architecture.pidfd_getfd: self._placing.note_theft,
        }
        self._reads = {
            architecture.read: self._read_parts,
            architecture.readv: self._parts,
            architecture.preadv2: self._preadv2_parts,
        }

    def close(self) -> None:
        """Close every group. Accesses that wait for an answer are allowed before the mounts go."""
        for group in self._all_groups():
            group.close()

    def _all_groups(self) -> list[SupervisedGroup]:
        with self._lock:
            return list(self._groups)

    def answer(self, call: TrappedCall, *, may_wait: bool = True) -> None:
        """Do a call and answer it. Raises nothing. With `may_wait` false, a call that would have to wait for others fails with ENOMEM."""
        try:
            if call.number == self._architecture.mmap:
                self._mappings.ask(call, may_wait=may_wait)
                raise _GoOn
            if call.number == self._architecture.fanotify_init:
                self._notifier.succeed(call, self._fanotify_init(call))
                return
            if call.number in self._notes:
                if self._groups and may_wait:
                    self._notes[call.number](call)
                raise _GoOn
            group = self._group(call)
            with group.in_use():
                if call.number in self._reads:
                    self._read(call, group, may_wait=may_wait)
                elif call.number == self._architecture.fanotify_mark:
                    self._notifier.succeed(call, self._fanotify_mark(call, group, may_wait=may_wait))
                else:
                    self._notifier.succeed(call, self._on_groups[call.number](call, group))
        except _GoOn:
            self._finish(lambda: self._notifier.go_on(call))
        except CallIsOver:
            pass
        except OSError as error:
            number = error.errno or errno.EIO
            self._finish(lambda: self._notifier.fail(call, number))
        except Exception:
            # A bug in the supervisor fails this call, and nothing else.
            _log.exception("system call %d of thread %d failed", call.number, call.tid)
            self._finish(lambda: self._notifier.fail(call, errno.EIO))

    @staticmethod
    def _finish(respond: Callable[[], None]) -> None:
        with contextlib.suppress(CallIsOver, OSError):  # the caller is gone
            respond()

    def _group(self, call: TrappedCall) -> SupervisedGroup:
        """The group of the call's first argument. Raises _GoOn if that is not a group."""
        group = self._find(call.tid, call.signed(0)) if self._groups else None
        if group is None:
            raise _GoOn
        return group

    def _find(self, tid: int, number: int) -> SupervisedGroup | None:
        """The group at a thread's descriptor; None if there is none."""
        if number < 0:
            return None
        last = self._last_at.get(number)
        with self._lock:
            groups = sorted(self._groups, key=lambda group: group is not last)
        for group in groups:
            watches = tasks.watches(self._architecture.kcmp, tid, number, group.bell.reading)
            if group.closed:
                continue  # its pipe's number may mean nothing, or another pipe, by now
            if watches is None:
                return None
            if watches:
                self._last_at[number] = group
                return group
        return None

    # Groups

    def _fanotify_init(self, call: TrappedCall) -> int:
        flags, event_f_flags = call.unsigned(0), call.unsigned(1)
        if flags & (FAN_REPORT_FID_BITS | FAN_REPORT_MNT):
            # Such groups have no permission events. The kernel's own notify on fusehsm mounts, too, if the marks are on files and directories.
            self._tell_of_file_ids()
            raise _GoOn
        self._check_traceable(call)
        if not self._is_privileged(call, _CAP_SYS_ADMIN) or (
            flags & FAN_ENABLE_AUDIT and not self._is_privileged(call, _CAP_AUDIT_WRITE)
        ):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if len(self._groups) >= MOST_GROUPS:
            self._closings.look()
        with self._lock:
            if len(self._groups) >= MOST_GROUPS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            bell = Bell(self._closings, lambda: self._ask_to_leave(group))
            try:
                group = SupervisedGroup(
                    flags, event_f_flags, self._dialect, bell, lambda: self._ask_to_leave(group)
                )
            except OSError:
                bell.close()
                raise
            self._groups[group] = None
        try:
            return self._placing.place(call, group, close_on_exec=bool(flags & FAN_CLOEXEC))
        except BaseException:
            self._forget(group)
            group.close()
            bell.close()
            raise

    def _tell_of_file_ids(self) -> None:
        """Say once which marks fail with ENODEV. Their fanotify_mark(2) cannot be seen: the kernel gives their group any number."""
        with self._lock:
            told, self._told_of_file_ids = self._told_of_file_ids, True
        if not told and self._view is None:
            _log.warning(
                "groups with FAN_REPORT_FID and its like cannot mark a mount or file system of fusehsm (ENODEV): mark files and "
                "directories, or use --listener"
            )

    @staticmethod
    def _check_traceable(call: TrappedCall) -> None:
        """Raise PermissionError, and say why, where events cannot be written into the caller's memory."""
        try:
            tasks.check_traceable(call.tid)
        except PermissionError:
            cause = security_modules.refusal_to_trace(call.tid)
            _log.warning("process %d gets no fanotify group (EPERM): %s", call.tid, cause)
            raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from None

    def _is_privileged(self, call: TrappedCall, capability: int) -> bool:
        """Whether the caller has the capability that the kernel would ask for.

        An ordinary user counts as root over its own mounts. With a supervisor of root the caller's capabilities count: otherwise a process that has
        given up root would reach root's files through it.
        """
        return os.geteuid() != 0 or proc.has_capability(call.tid, capability)

    def _ask_to_leave(self, group: SupervisedGroup) -> None:
        """End the group if no process holds it. Called when that was so a moment ago."""
        if group.leave() is Leaving.OVER:
            self._forget(group)
            self._parked.look_now()

    def _forget(self, group: SupervisedGroup) -> None:
        with self._lock:
            self._groups.pop(group, None)
            self._last_at = {number: last for number, last in self._last_at.items() if last is not group}

    def _fanotify_mark(self, call: TrappedCall, group: SupervisedGroup, *, may_wait: bool) -> int:
        if not may_wait:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        _, _, mask, _, address, *_ = call.arguments
        flags, dirfd = call.unsigned(1), call.signed(3)

        def look_up() -> FoundObject:
            path = tasks.read_string(call.tid, address, _PATH_MAX) if address else None
            self._notifier.check(call)
            if path is not None:
                path = of_this_process(path, call.tid)
            return find(self._architecture, call.tid, flags, dirfd, path)

        def targets(found: FoundObject) -> list[Target] | None:
            return [] if self._view is None else self._view.targets(flags, found, call.tid)

        group.mark(
            flags,
            mask,
            look_up,
            privileged=lambda: self._is_privileged(call, _CAP_SYS_ADMIN),
            targets=targets,
        )
        return 0

    # Reading and writing

    def _read(self, call: TrappedCall, group: SupervisedGroup, *, may_wait: bool) -> None:
        reading = Reading(self._notifier, self._parked, call, group, may_wait)
        try:
            parts = self._reads[call.number](call)
            # If all parts are empty, the kernel does not even ask the group.
            total = reading.into(parts) if call.number == self._architecture.read or _size(parts) else 0
            self._notifier.succeed(call, total)
        except CallIsOver:
            reading.undo()
            raise
        reading.settle()

    @staticmethod
    def _read_parts(call: TrappedCall) -> list[tuple[int, int]]:
        return [(call.arguments[1], min(call.arguments[2], _MOST_BYTES))]

    def _preadv2_parts(self, call: TrappedCall) -> list[tuple[int, int]]:
        self._check_position(call)
        return self._parts(call)

    def _parts(self, call: TrappedCall) -> list[tuple[int, int]]:
        parts = tasks.read_vector(call.tid, call.arguments[1], call.arguments[2])
        self._notifier.check(call)
        return parts

    @staticmethod
    def _check_position(call: TrappedCall) -> None:
        if call.arguments[3] != _NO_POSITION:
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
        if call.unsigned(5):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def _write(self, call: TrappedCall, group: SupervisedGroup) -> int:
        return self._respond(call, group, [(call.arguments[1], call.arguments[2])])

    def _writev(self, call: TrappedCall, group: SupervisedGroup) -> int:
        return self._respond(call, group, self._parts(call))

    def _pwritev2(self, call: TrappedCall, group: SupervisedGroup) -> int:
        self._check_position(call)
        return self._respond(call, group, self._parts(call))

    def _respond(self, call: TrappedCall, group: SupervisedGroup, parts: list[tuple[int, int]]) -> int:
        if not _size(parts) and call.number != self._architecture.write:
            return 0
        total = 0
        for address, size in parts:
            try:
                taken = group.respond(self._response(call, address, size))
            except OSError:
                if total:
                    break
                raise
            total += taken
            if taken != size:
                break
        return total

    def _response(self, call: TrappedCall, address: int, size: int) -> bytes:
        """The bytes of a response, and of any further bytes only as many as matter."""
        try:
            data = tasks.read_memory(call.tid, address, min(size, RESPONSE_LENGTH))
            if len(data) == RESPONSE_LENGTH and decode_response(data)[1] & FAN_INFO:
                rest = min(size, _LARGEST_RESPONSE) - RESPONSE_LENGTH
                data += tasks.read_memory(call.tid, address + RESPONSE_LENGTH, rest)
        except ProcessLookupError:
            raise CallIsOver from None
        self._notifier.check(call)
        return data

    # Descriptors

    def _ioctl(self, call: TrappedCall, group: SupervisedGroup) -> int:
        request, address = call.unsigned(1), call.arguments[2]
        if request == termios.FIONREAD:
            self._notifier.check(call)
            tasks.write_memory(call.tid, address, _INT.pack(group.queued_bytes))
            return 0
        if request == termios.FIONBIO:
            group.nonblocking = any(tasks.read_memory(call.tid, address, _INT.size))
            return 0
        if request in _OF_EVERY_FILE or request >> 8 & 0xFF in _OF_INODES:
            raise _GoOn
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))  # an epoll file says EINVAL

    def _fcntl(self, call: TrappedCall, group: SupervisedGroup) -> int:
        command, argument = call.unsigned(1), call.unsigned(2)
        if command == fcntl.F_GETFL:
            return os.O_RDWR | (os.O_NONBLOCK if group.nonblocking else 0)
        if command == fcntl.F_SETFL:
            group.nonblocking = bool(argument & os.O_NONBLOCK)
            return 0
        if argument >= limit_of(call):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._placing.place(
            call, group, close_on_exec=command == fcntl.F_DUPFD_CLOEXEC, lowest=argument
        )

    def _dup(self, call: TrappedCall, group: SupervisedGroup) -> int:
        return self._placing.place(call, group, close_on_exec=False)

    def _dup2(self, call: TrappedCall, group: SupervisedGroup) -> int:
        # The kernel makes the copy; at a reserved number it works as the original does.
        self._placing.note_copy(call, group, call.signed(1))
        raise _GoOn


def _size(parts: list[tuple[int, int]]) -> int:
    return sum(size for _, size in parts)


class Workers:
    """Answers every call until no process runs under the filter any more."""

    def __init__(self, notifier: Notifier, calls: Calls) -> None:
        self._notifier = notifier
        self._calls = calls
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        threading.stack_size(_STACK_SIZE)
        self._start()

    def _start(self) -> bool:
        """Start one more thread if the limits on threads allow it; returns whether it was started."""
        if self._threads >= _MOST_THREADS:
            return False
        try:
            threading.Thread(target=self._work, name="worker", daemon=True).start()
        except RuntimeError:
            return False
        self._threads += 1
        self._idle += 1
        return True

    def _work(self) -> None:
        while True:
            try:
                call = self._notifier.receive()
            except Ended:
                return
            with self._lock:
                self._idle -= 1
                # The last thread that receives calls must not wait for the effect of another call.
                may_wait = self._idle > 0 or self._start()
            self._calls.answer(call, may_wait=may_wait)
            with self._lock:
                if self._idle >= _IDLE_THREADS:
                    self._threads -= 1
                    return
                self._idle += 1
