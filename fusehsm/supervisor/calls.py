"""Does each system call that the filter hands over, with the errnos that a group of the kernel would give.

A descriptor with a reserved number need not be a group's. A call on a descriptor of another kind goes on in the kernel.

Each call that is being answered has a thread: a call that waits for memory, a file system or a listener delays no other. The threads receive
the calls themselves, so that the usual call is answered without a switch of threads.
"""

import contextlib
import errno
import fcntl
import logging
import os
import resource
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
from fusehsm.supervisor import tasks
from fusehsm.supervisor.delivery import Reading
from fusehsm.supervisor.groups import Leaving, SupervisedGroup
from fusehsm.supervisor.lookup import find, of_this_process
from fusehsm.supervisor.mappings import Mappings
from fusehsm.supervisor.notifier import CallIsOver, Ended, Notifier, TrappedCall
from fusehsm.supervisor.numbers import Architecture
from fusehsm.supervisor.parked import ParkedCalls
from fusehsm.supervisor.readiness import Bell, Closings
from fusehsm.supervisor.view import Target, View

MOST_GROUPS: Final = 128  # the default of fs.fanotify.max_user_groups

_INT: Final = struct.Struct("=i")
_CAP_SYS_ADMIN: Final = 21  # linux/capability.h
_CAP_AUDIT_WRITE: Final = 29
_PATH_MAX: Final = 4096
_MOST_BYTES: Final = 0x7FFF_F000  # MAX_RW_COUNT
_LARGEST_RESPONSE: Final = 4096  # a longer response is wrong, whatever its further bytes are
_SEEK_MAX: Final = 4
_NO_POSITION: Final = 0xFFFF_FFFF_FFFF_FFFF  # preadv2(2) without an offset, as readv(2)

_F_SETPIPE_SZ: Final = 1031  # linux/fcntl.h
_F_GETPIPE_SZ: Final = 1032

_MOST_THREADS: Final = 8192  # threads; further calls wait until one is free
_IDLE_THREADS: Final = 4  # idle threads that are kept
_STACK_SIZE: Final = 512 * 1024  # bytes

_log = logging.getLogger(__name__)


class _GoOn(Exception):
    """Raised to let the kernel do the call."""


class Calls:
    """Answers calls. Any number of threads may use it at once. `dialect`: None if none was chosen. `descriptors`: the reserved numbers."""

    def __init__(
        self,
        notifier: Notifier,
        architecture: Architecture,
        dialect: Dialect | None,
        descriptors: range,
        view: View | None = None,
        *,
        killable: bool,
    ) -> None:
        self._notifier = notifier
        self._view = view
        self._architecture = architecture
        self._dialect = dialect
        self._descriptors = descriptors
        self._parked = ParkedCalls(notifier, killable=killable)
        self._mappings = Mappings(self._parked)
        self._closings = Closings()
        self._groups: dict[str, SupervisedGroup] = {}
        self._lock = threading.Lock()
        # Held from the search for a free number until its use.
        self._numbering = threading.Lock()
        on_groups: list[tuple[int | None, Callable[[TrappedCall, SupervisedGroup], int]]] = [
            (architecture.write, self._write),
            (architecture.writev, self._writev),
            (architecture.pwritev2, self._pwritev2),
            (architecture.ioctl, self._ioctl),
            (architecture.fcntl, self._fcntl),
            (architecture.dup, self._dup),
            (architecture.dup2, self._dup2),
            (architecture.dup3, self._dup3),
            (architecture.lseek, self._lseek),
            (architecture.fallocate, _refuse_with(errno.ENODEV)),
            (architecture.splice, _refuse_with(errno.EINVAL)),
            (architecture.tee, _refuse_with(errno.EINVAL)),
            (architecture.vmsplice, _refuse_with(errno.EBADF)),
        ]
        self._on_groups = {number: function for number, function in on_groups if number is not None}
        self._reads = {
            architecture.read: self._read_parts,
            architecture.readv: self._parts,
            architecture.preadv2: self._preadv2_parts,
        }

    def close(self) -> None:
        """Close every group. Accesses that wait for an answer are allowed before the mounts go."""
        with self._lock:
            groups = list(self._groups.values())
        for group in groups:
            group.close()

    def answer(self, call: TrappedCall, *, may_wait: bool = True) -> None:
        """Do a call and answer it. Raises nothing. With `may_wait` false, a call that would have to wait for others fails with ENOMEM."""
        try:
            if call.number == self._architecture.mmap:
                self._mappings.ask(call, may_wait=may_wait)
                raise _GoOn
            if call.number == self._architecture.fanotify_init:
                self._notifier.succeed(call, self._fanotify_init(call))
                return
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
        name = tasks.pipe_of(call.tid, call.signed(0))
        group = None if name is None else self._groups.get(name)
        if group is None:
            raise _GoOn
        return group

    # Groups

    def _fanotify_init(self, call: TrappedCall) -> int:
        flags, event_f_flags = call.unsigned(0), call.unsigned(1)
        if flags & (FAN_REPORT_FID_BITS | FAN_REPORT_MNT):
            raise _GoOn  # such groups have no permission events, and the kernel's own notify on fusehsm mounts as on any other
        if not self._is_privileged(call, _CAP_SYS_ADMIN) or (
            flags & FAN_ENABLE_AUDIT and not self._is_privileged(call, _CAP_AUDIT_WRITE)
        ):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        with self._lock:
            if len(self._groups) >= MOST_GROUPS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            bell = Bell()
            try:
                group = SupervisedGroup(
                    flags, event_f_flags, self._dialect, bell, lambda: self._ask_to_leave(group)
                )
            except OSError:
                bell.close()
                raise
            self._groups[bell.name] = group
        try:
            number = self._place(call, group, close_on_exec=bool(flags & FAN_CLOEXEC))
        except BaseException:
            self._forget(group)
            group.close()
            bell.close()
            raise
        self._watch(group)
        return number

    def _is_privileged(self, call: TrappedCall, capability: int) -> bool:
        """Whether the caller has the capability that the kernel would ask for.

        An ordinary user counts as root over its own mounts. With a supervisor of root the caller's capabilities count: otherwise a process that has
        given up root would reach root's files through it.
        """
        return os.geteuid() != 0 or tasks.capabilities_of(call.tid).has(capability)

    def _watch(self, group: SupervisedGroup) -> None:
        self._closings.watch(group.bell, lambda: self._ask_to_leave(group))

    def _ask_to_leave(self, group: SupervisedGroup) -> None:
        """End the group if no process holds it. Called when that was so a moment ago."""
        leaving = group.leave()
        if leaving is Leaving.OVER:
            self._forget(group)
            self._parked.look_now()
        elif leaving is Leaving.STAYS:
            self._watch(group)

    def _forget(self, group: SupervisedGroup) -> None:
        with self._lock:
            self._groups.pop(group.bell.name, None)

    def _place(
        self,
        call: TrappedCall,
        group: SupervisedGroup,
        *,
        close_on_exec: bool,
        number: int | None = None,
        lowest: int = 0,
    ) -> int:
        """Give the process a descriptor of a group: at `number`, else at a free reserved number from `lowest` on. Raises OSError EMFILE."""
        with group.bell.reading_end() as reading, self._numbering:
            if number is None:
                free = (
                    number
                    for number in (reversed(self._descriptors) if not lowest else self._descriptors)
                    # From the top: the kernel gives the lowest number to a thread that opens a file meanwhile.
                    if number >= lowest and not tasks.is_open(call.tid, number)
                )
                number = next(free, None)
                if number is None:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._notifier.check(call)
            return self._notifier.add_descriptor(call, reading, close_on_exec=close_on_exec, number=number)

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

    @staticmethod
    def _lseek(call: TrappedCall, group: SupervisedGroup) -> int:
        if call.unsigned(2) > _SEEK_MAX:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return 0

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
        raise _GoOn

    def _fcntl(self, call: TrappedCall, group: SupervisedGroup) -> int:
        command, argument = call.unsigned(1), call.unsigned(2)
        if command == fcntl.F_GETFL:
            return os.O_RDWR | (os.O_NONBLOCK if group.nonblocking else 0)
        if command == fcntl.F_SETFL:
            group.nonblocking = bool(argument & os.O_NONBLOCK)
            return 0
        if command in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC):
            if argument >= _limit_of_descriptors(call.tid):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return self._place(call, group, close_on_exec=command == fcntl.F_DUPFD_CLOEXEC, lowest=argument)
        if command in (_F_SETPIPE_SZ, _F_GETPIPE_SZ):
            raise OSError(
                errno.EBADF, os.strerror(errno.EBADF)
            )  # the process holds a pipe, but it should not know
        raise _GoOn

    def _dup(self, call: TrappedCall, group: SupervisedGroup) -> int:
        return self._place(call, group, close_on_exec=False)

    def _dup2(self, call: TrappedCall, group: SupervisedGroup) -> int:
        if call.signed(0) == call.signed(1):
            raise _GoOn
        return self._duplicate_to(call, group, close_on_exec=False)

    def _dup3(self, call: TrappedCall, group: SupervisedGroup) -> int:
        if call.signed(0) == call.signed(1) or call.unsigned(2) & ~os.O_CLOEXEC:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._duplicate_to(call, group, close_on_exec=bool(call.unsigned(2) & os.O_CLOEXEC))

    def _duplicate_to(self, call: TrappedCall, group: SupervisedGroup, *, close_on_exec: bool) -> int:
        number = call.signed(1)
        if number not in self._descriptors:
            lowest, highest = self._descriptors[0], self._descriptors[-1]
            _log.warning(
                "process %d wants a fanotify group at descriptor %d, and has EBADF: only at %d to %d can its calls be told apart",
                call.tid,
                number,
                lowest,
                highest,
            )
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._place(call, group, close_on_exec=close_on_exec, number=number)


def _refuse_with(number: int) -> Callable[[TrappedCall, SupervisedGroup], int]:
    """A function that refuses, with that errno, calls that the kernel does on a pipe and not on a group."""

    def refuse(call: TrappedCall, group: SupervisedGroup) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


def _size(parts: list[tuple[int, int]]) -> int:
    return sum(size for _, size in parts)


def _limit_of_descriptors(tid: int) -> int:
    try:
        soft, _ = resource.prlimit(tid, resource.RLIMIT_NOFILE)
    except OSError:
        raise CallIsOver from None
    return soft


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
