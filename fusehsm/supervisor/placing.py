"""Gives processes of the command descriptors of groups, at numbers at which the filter stops their calls.

With `--any-descriptor` the filter stops the calls on all numbers. Otherwise it stops those on some numbers, which are reserved for groups. A group
that a program puts at another number cannot be read there, and this module says so once, on stderr.
"""

import errno
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final
from weakref import WeakSet

from fusehsm.supervisor import tasks
from fusehsm.supervisor.groups import SupervisedGroup
from fusehsm.supervisor.notifier import CallIsOver, Notifier, TrappedCall

#: The reserved numbers below 1024, with which select(2) works; in a program with few descriptors allowed some are low enough.
LOW_WINDOWS: Final = (range(960, 1024), range(480, 512), range(224, 256), range(112, 128), range(56, 64))
#: Above, the last numbers of each block are reserved, for programs with thousands of open files.
BLOCK: Final = 1024
RESERVED_OF_BLOCK: Final = 32
#: No number is reserved from here on.
END_OF_RESERVED: Final = 1 << 20

_MESSAGE_HEADER: Final = struct.Struct("=QI4xQQQQ")  # struct msghdr up to the length of its control data
_EACH_OF_SEVERAL: Final = 64  # bytes, struct mmsghdr
_MOST_MESSAGES: Final = 1024  # UIO_MAXIOV
_CONTROL_HEADER: Final = struct.Struct("=Qii")  # struct cmsghdr
_SOL_SOCKET: Final = 1
_SCM_RIGHTS: Final = 1
_MOST_CONTROL: Final = 4096  # bytes; SCM_RIGHTS carries at most 253 descriptors

_log = logging.getLogger(__name__)


def is_reserved(number: int) -> bool:
    """Whether the filter stops the calls on that number."""
    if number < BLOCK:
        return any(number in window for window in LOW_WINDOWS)
    return number < END_OF_RESERVED and number % BLOCK >= BLOCK - RESERVED_OF_BLOCK


def reserved_numbers(limit: int) -> Iterator[int]:
    """The reserved numbers below `limit`, the best first.

    Each window is taken from the top: the kernel gives the lowest number to a thread that opens a file meanwhile. High blocks come last, as a
    process with a high number has a large table.
    """
    blocks = range(BLOCK, min(limit, END_OF_RESERVED), BLOCK)
    for window in (
        *LOW_WINDOWS,
        *(range(block + BLOCK - RESERVED_OF_BLOCK, block + BLOCK) for block in blocks),
    ):
        yield from reversed(range(window.start, min(window.stop, limit)))


class Placing:
    """Places descriptors of groups. `any_descriptor`: the filter stops the calls on all numbers.

    `find` gives the group of a thread's descriptor; None if it has none.
    """

    def __init__(
        self,
        notifier: Notifier,
        find: Callable[[int, int], SupervisedGroup | None],
        *,
        any_descriptor: bool,
    ) -> None:
        self._notifier = notifier
        self._find = find
        self._any_descriptor = any_descriptor
        # Held from the search for a free number until its use.
        self._numbering = threading.Lock()
        self._told_full = False
        self._told: WeakSet[SupervisedGroup] = WeakSet()

    def place(
        self, call: TrappedCall, group: SupervisedGroup, *, close_on_exec: bool, lowest: int = 0
    ) -> int:
        """Give the process a descriptor of a group; returns its number, from `lowest` on. Raises OSError EMFILE, CallIsOver."""
        with group.bell.descriptor() as descriptor, self._numbering:
            number = None if self._any_descriptor else self._free_number(call, lowest)
            self._notifier.check(call)
            return self._notifier.add_descriptor(call, descriptor, close_on_exec=close_on_exec, number=number)

    def _free_number(self, call: TrappedCall, lowest: int) -> int:
        limit = limit_of(call)
        for number in reserved_numbers(limit):
            if number >= lowest and not tasks.is_open(call.tid, number):
                return number
        if not self._told_full:
            self._told_full = True
            _log.warning(
                "process %d gets no fanotify descriptor (EMFILE): below its limit of %d no number is free at which a group's calls can be told "
                "from others; raise ulimit -n, or run it with --any-descriptor",
                call.tid,
                limit,
            )
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    # A group at a number that is not reserved

    def note_copy(self, call: TrappedCall, group: SupervisedGroup, number: int) -> None:
        """A process is about to copy a group to that number (dup2(2))."""
        if not is_reserved(number) and 0 <= number < limit_of(call):
            self._tell(
                group,
                "process %d copies a fanotify group to descriptor %d, where it cannot be read (EINVAL): its calls there cannot be told from others; "
                "run it with --any-descriptor",
                call.tid,
                number,
            )

    def note_messages(self, call: TrappedCall, count: int) -> None:
        """A process is about to send so many messages (sendmsg(2), sendmmsg(2)), which may carry a group."""
        for descriptor in self._descriptors_sent(call, min(count, _MOST_MESSAGES)):
            group = self._find(call.tid, descriptor)
            if group is not None:
                self._tell_handed(call, group)

    def note_theft(self, call: TrappedCall) -> None:
        """A process is about to take a descriptor of another one (pidfd_getfd(2)), which may be a group."""
        process = tasks.process_behind(call.tid, call.signed(0))
        group = None if process is None else self._find(process, call.signed(1))
        if group is not None:
            self._tell_handed(call, group)

    def _tell_handed(self, call: TrappedCall, group: SupervisedGroup) -> None:
        self._tell(
            group,
            "process %d hands a fanotify group from process to process: the receiver cannot read it (EINVAL), as its calls cannot be told from "
            "others; run it with --any-descriptor",
            call.tid,
        )

    def _descriptors_sent(self, call: TrappedCall, count: int) -> list[int]:
        found: list[int] = []
        if not count:
            return found
        try:
            headers = tasks.read_memory(
                call.tid, call.arguments[1], (count - 1) * _EACH_OF_SEVERAL + _MESSAGE_HEADER.size
            )
            for number in range(count):
                *_, address, size = _MESSAGE_HEADER.unpack_from(headers, number * _EACH_OF_SEVERAL)
                if address:
                    found += descriptors_in(tasks.read_memory(call.tid, address, min(size, _MOST_CONTROL)))
        except OSError:
            return []
        self._notifier.check(call)
        return found

    def _tell(self, group: SupervisedGroup, text: str, *arguments: object) -> None:
        """Log a warning, once for each group."""
        if group not in self._told:
            self._told.add(group)
            _log.warning(text, *arguments)


def descriptors_in(control: bytes) -> list[int]:
    """The descriptors in the control data of a message (cmsg(3))."""
    found: list[int] = []
    place = 0
    while place + _CONTROL_HEADER.size <= len(control):
        length, level, kind = _CONTROL_HEADER.unpack_from(control, place)
        if length < _CONTROL_HEADER.size:
            break
        if (level, kind) == (_SOL_SOCKET, _SCM_RIGHTS):
            data = control[place + _CONTROL_HEADER.size : place + length]
            found += struct.unpack_from(f"={len(data) // 4}i", data)
        place += length + -length % 8
    return found


def limit_of(call: TrappedCall) -> int:
    """The lowest number that no new descriptor of the calling process may have. Raises CallIsOver."""
    try:
        return tasks.limit_of_descriptors(call.tid)
    except OSError:
        raise CallIsOver from None
