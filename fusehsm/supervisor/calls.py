"""What each system call does that the filter has us answer, errno for errno as on a group of the kernel's own.

A descriptor with a reserved number need not be a group's: what is something else goes on in the kernel.
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

from fusehsm.abi import (
    FAN_CLOEXEC,
    FAN_INFO,
    FAN_REPORT_FID_BITS,
    FAN_REPORT_MNT,
    RESPONSE_LENGTH,
    Dialect,
    decode_response,
)
from fusehsm.backends.lookup import FoundObject
from fusehsm.supervisor import memory, tasks
from fusehsm.supervisor.delivery import Reading
from fusehsm.supervisor.groups import SupervisedGroup
from fusehsm.supervisor.lookup import find, of_this_process
from fusehsm.supervisor.mappings import Mappings
from fusehsm.supervisor.notifier import Call, CallIsOver, Notifier
from fusehsm.supervisor.numbers import Architecture
from fusehsm.supervisor.parked import ParkedCalls
from fusehsm.supervisor.readiness import Bell, Closings

MOST_GROUPS: Final = 128  # as fs.fanotify.max_user_groups

_INT: Final = struct.Struct("=i")
_PATH_MAX: Final = 4096
_MOST_BYTES: Final = 0x7FFF_F000  # MAX_RW_COUNT
_LARGEST_RESPONSE: Final = 4096  # what is longer is wrong whatever follows
_SEEK_MAX: Final = 4
_NO_POSITION: Final = 0xFFFF_FFFF_FFFF_FFFF  # preadv2(2) as readv(2)

_F_SETPIPE_SZ: Final = 1031  # linux/fcntl.h
_F_GETPIPE_SZ: Final = 1032

_log = logging.getLogger(__name__)


class _GoOn(Exception):
    """The kernel is to do the call."""


class Calls:
    """Answers calls; may be used by any number of threads at once. `dialect` None: nobody has said. `descriptors`: the reserved numbers."""

    def __init__(
        self,
        notifier: Notifier,
        architecture: Architecture,
        dialect: Dialect | None,
        descriptors: range,
        *,
        killable: bool,
    ) -> None:
        self._notifier = notifier
        self._architecture = architecture
        self._dialect = dialect
        self._descriptors = descriptors
        self._parked = ParkedCalls(notifier, killable=killable)
        self._mappings = Mappings(self._parked)
        self._closings = Closings()
        self._groups: dict[str, SupervisedGroup] = {}
        self._lock = threading.Lock()
        # From looking for a free number to its use.
        self._numbering = threading.Lock()
        table: list[tuple[int | None, Callable[[Call], int]]] = [
            (architecture.fanotify_init, self._fanotify_init),
            (architecture.fanotify_mark, self._fanotify_mark),
            (architecture.mmap, self._mmap),
            (architecture.write, self._write),
            (architecture.writev, self._writev),
            (architecture.pwritev2, self._pwritev2),
            (architecture.ioctl, self._ioctl),
            (architecture.fcntl, self._fcntl),
            (architecture.dup, self._dup),
            (architecture.dup2, self._dup2),
            (architecture.dup3, self._dup3),
            (architecture.lseek, self._lseek),
        ]
        self._refused = {
            architecture.fallocate: errno.ENODEV,
            architecture.splice: errno.EINVAL,
            architecture.tee: errno.EINVAL,
            architecture.vmsplice: errno.EBADF,
        }
        table += [(number, self._refuse) for number in self._refused]
        self._table = {number: function for number, function in table if number is not None}
        self._reads = {
            architecture.read: self._read_parts,
            architecture.readv: self._readv_parts,
            architecture.preadv2: self._preadv2_parts,
        }

    def close(self) -> None:
        """Close every group: what waits for an answer is let pass before the mounts go."""
        with self._lock:
            groups = list(self._groups.values())
        for group in groups:
            group.close()

    def answer(self, call: Call) -> None:
        """Do a call and answer it; never raises."""
        try:
            if call.number in self._reads:
                self._read(call)
            else:
                self._notifier.succeed(call, self._table[call.number](call))
        except _GoOn:
            self._finish(lambda: self._notifier.go_on(call))
        except CallIsOver:
            pass
        except OSError as error:
            number = error.errno or errno.EIO
            self._finish(lambda: self._notifier.fail(call, number))
        except Exception:
            # A mistake of ours costs this call, and nothing else.
            _log.exception("system call %d of thread %d failed", call.number, call.tid)
            self._finish(lambda: self._notifier.fail(call, errno.EIO))

    @staticmethod
    def _finish(respond: Callable[[], None]) -> None:
        with contextlib.suppress(CallIsOver, OSError):  # nobody is there to hear it
            respond()

    def _group(self, call: Call) -> SupervisedGroup:
        """The group that the call's first argument is. Raises _GoOn where it is none."""
        name = tasks.pipe_of(call.tid, call.signed(0))
        group = None if name is None else self._groups.get(name)
        if group is None:
            raise _GoOn
        return group

    def _mmap(self, call: Call) -> int:
        self._mappings.ask(call)
        raise _GoOn

    # Groups

    def _fanotify_init(self, call: Call) -> int:
        flags, event_f_flags = call.unsigned(0), call.unsigned(1)
        if flags & (FAN_REPORT_FID_BITS | FAN_REPORT_MNT):
            raise _GoOn  # they have no permission events, and the kernel's own notify on our mounts as on any other
        with self._lock:
            if len(self._groups) >= MOST_GROUPS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            bell = Bell()
            try:
                group = SupervisedGroup(flags, event_f_flags, self._dialect, bell)
            except OSError:
                bell.close()
                raise
            self._groups[bell.name] = group
        try:
            number = self._place(call, group, close_on_exec=bool(flags & FAN_CLOEXEC))
        except BaseException:
            self._forget(group)
            group.unheld()
            raise
        self._closings.watch(bell, lambda: self._unheld(group))
        return number

    def _unheld(self, group: SupervisedGroup) -> None:
        self._forget(group)
        group.unheld()
        self._parked.look_now()

    def _forget(self, group: SupervisedGroup) -> None:
        with self._lock:
            self._groups.pop(group.bell.name, None)

    def _place(
        self,
        call: Call,
        group: SupervisedGroup,
        *,
        close_on_exec: bool,
        number: int | None = None,
        lowest: int = 0,
    ) -> int:
        """Give the process a descriptor of a group: at `number`, else at a free one of the reserved, from `lowest` on. Raises OSError EMFILE."""
        with group.bell.reading_end() as reading, self._numbering:
            if number is None:
                free = (
                    number
                    for number in self._descriptors
                    if number >= lowest and not tasks.is_open(call.tid, number)
                )
                number = next(free, None)
                if number is None:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._notifier.check(call)
            return self._notifier.add_descriptor(call, reading, close_on_exec=close_on_exec, number=number)

    def _fanotify_mark(self, call: Call) -> int:
        group = self._group(call)
        _, _, mask, _, address, *_ = call.arguments
        flags, dirfd = call.unsigned(1), call.signed(3)

        def look_up() -> FoundObject:
            path = memory.read_string(call.tid, address, _PATH_MAX) if address else None
            self._notifier.check(call)
            if path is not None:
                path = of_this_process(path, call.tid)
            return find(self._architecture, call.tid, flags, dirfd, path)

        group.mark(flags, mask, look_up)
        return 0

    # Reading and writing

    def _read(self, call: Call) -> None:
        group = self._group(call)
        reading = Reading(self._notifier, self._parked, call, group)
        try:
            parts = self._reads[call.number](call)
            # Of several parts that are all empty the kernel does not even ask the group.
            total = reading.into(parts) if call.number == self._architecture.read or _size(parts) else 0
            group.show_readiness()
            self._notifier.succeed(call, total)
        except CallIsOver:
            reading.undo()
            group.show_readiness()
            raise
        except OSError:
            group.show_readiness()
            raise
        reading.settle()

    @staticmethod
    def _read_parts(call: Call) -> list[tuple[int, int]]:
        return [(call.arguments[1], min(call.arguments[2], _MOST_BYTES))]

    def _readv_parts(self, call: Call) -> list[tuple[int, int]]:
        return self._parts(call)

    def _preadv2_parts(self, call: Call) -> list[tuple[int, int]]:
        self._check_position(call)
        return self._parts(call)

    def _parts(self, call: Call) -> list[tuple[int, int]]:
        parts = memory.read_vector(call.tid, call.arguments[1], call.arguments[2])
        self._notifier.check(call)
        return parts

    @staticmethod
    def _check_position(call: Call) -> None:
        if call.arguments[3] != _NO_POSITION:
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
        if call.unsigned(5):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def _write(self, call: Call) -> int:
        return self._respond(call, self._group(call), [(call.arguments[1], call.arguments[2])])

    def _writev(self, call: Call) -> int:
        return self._respond(call, self._group(call), self._parts(call))

    def _pwritev2(self, call: Call) -> int:
        group = self._group(call)
        self._check_position(call)
        return self._respond(call, group, self._parts(call))

    def _respond(self, call: Call, group: SupervisedGroup, parts: list[tuple[int, int]]) -> int:
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

    def _response(self, call: Call, address: int, size: int) -> bytes:
        """The bytes of a response; of what follows it only as many as matter."""
        try:
            data = memory.read(call.tid, address, min(size, RESPONSE_LENGTH))
            if len(data) == RESPONSE_LENGTH and decode_response(data)[1] & FAN_INFO:
                rest = min(size, _LARGEST_RESPONSE) - RESPONSE_LENGTH
                data += memory.read(call.tid, address + RESPONSE_LENGTH, rest)
        except ProcessLookupError:
            raise CallIsOver from None
        self._notifier.check(call)
        return data

    def _lseek(self, call: Call) -> int:
        self._group(call)
        if call.unsigned(2) > _SEEK_MAX:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return 0

    def _refuse(self, call: Call) -> int:
        """What the kernel does to a pipe, and to no group."""
        self._group(call)
        number = self._refused[call.number]
        raise OSError(number, os.strerror(number))

    # Descriptors

    def _ioctl(self, call: Call) -> int:
        group = self._group(call)
        request, address = call.unsigned(1), call.arguments[2]
        if request == termios.FIONREAD:
            self._notifier.check(call)
            memory.write(call.tid, address, _INT.pack(group.queued_bytes))
            return 0
        if request == termios.FIONBIO:
            group.nonblocking = any(memory.read(call.tid, address, _INT.size))
            return 0
        raise _GoOn

    def _fcntl(self, call: Call) -> int:
        group = self._group(call)
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
            )  # what the process holds is a pipe, but it should not know
        raise _GoOn

    def _dup(self, call: Call) -> int:
        return self._place(call, self._group(call), close_on_exec=False)

    def _dup2(self, call: Call) -> int:
        if call.signed(0) == call.signed(1):
            raise _GoOn
        return self._duplicate_to(call, self._group(call), close_on_exec=False)

    def _dup3(self, call: Call) -> int:
        group = self._group(call)
        if call.signed(0) == call.signed(1) or call.unsigned(2) & ~os.O_CLOEXEC:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._duplicate_to(call, group, close_on_exec=bool(call.unsigned(2) & os.O_CLOEXEC))

    def _duplicate_to(self, call: Call, group: SupervisedGroup, *, close_on_exec: bool) -> int:
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


def _size(parts: list[tuple[int, int]]) -> int:
    return sum(size for _, size in parts)


def _limit_of_descriptors(tid: int) -> int:
    try:
        soft, _ = resource.prlimit(tid, resource.RLIMIT_NOFILE)
    except OSError:
        raise CallIsOver from None
    return soft
