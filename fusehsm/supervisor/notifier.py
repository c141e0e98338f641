"""Receives system calls of the command and sends the answers (seccomp_unotify(2))."""

import contextlib
import errno
import fcntl
import os
import select
import struct
from typing import Final, NamedTuple

_NOTIFICATION: Final = struct.Struct("=QII iIQ 6Q")  # id, tid, flags; struct seccomp_data
_RESPONSE: Final = struct.Struct("=QqiI")  # id, value, error, flags
_ADDED: Final = struct.Struct("=QIIII")  # id, flags, source, target, flags of the target
_ID: Final = struct.Struct("=Q")

_RECEIVE: Final = 0xC0502100  # SECCOMP_IOCTL_NOTIF_RECV
_SEND: Final = 0xC0182101  # SECCOMP_IOCTL_NOTIF_SEND
_IS_VALID: Final = 0x40082102  # SECCOMP_IOCTL_NOTIF_ID_VALID
_ADD: Final = 0x40182103  # SECCOMP_IOCTL_NOTIF_ADDFD
_SET_FLAGS: Final = 0x40082104  # SECCOMP_IOCTL_NOTIF_SET_FLAGS
_SYNC_WAKE_UP: Final = 1  # SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
_CONTINUE: Final = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_AT_NUMBER: Final = 1  # SECCOMP_ADDFD_FLAG_SETFD


class Ended(Exception):
    """No process runs under the filter any more."""


class CallIsOver(Exception):
    """The call has ended unanswered: its thread was killed, or (before Linux 5.19) a signal has interrupted it."""


class TrappedCall(NamedTuple):
    """A system call that waits for the supervisor's answer."""

    #: The kernel's number for this call.
    id: int
    #: The thread that waits.
    tid: int
    #: The system call's number.
    number: int
    #: Its six arguments, as unsigned 64-bit numbers.
    arguments: tuple[int, ...]

    def unsigned(self, position: int) -> int:
        """An argument of type unsigned int."""
        return self.arguments[position] & 0xFFFF_FFFF

    def signed(self, position: int) -> int:
        """An argument of type int."""
        value = self.arguments[position] & 0xFFFF_FFFF
        return value - (1 << 32) if value >> 31 else value


class Notifier:
    """Owns the filter's descriptor. Any number of threads may use it at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        with contextlib.suppress(
            OSError
        ):  # Linux 6.6: a thread that gets its answer runs at once, on this CPU
            fcntl.ioctl(descriptor, _SET_FLAGS, _SYNC_WAKE_UP)

    def receive(self) -> TrappedCall:
        """Wait for the next call. Raises Ended."""
        while True:
            buffer = bytearray(_NOTIFICATION.size)
            try:
                fcntl.ioctl(self._descriptor, _RECEIVE, buffer)
            except OSError as error:
                # Its thread was killed meanwhile, or no process is left. EINTR can come after this process was stopped.
                if error.errno not in (errno.ENOENT, errno.EINTR):
                    raise
                if self.has_ended():
                    raise Ended from None
                continue
            number, tid, _, call, _, _, *arguments = _NOTIFICATION.unpack(buffer)
            return TrappedCall(number, tid, call, tuple(arguments))

    def has_ended(self) -> bool:
        """Whether no process runs under the filter any more."""
        poll = select.poll()
        poll.register(self._descriptor, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def is_valid(self, call: TrappedCall) -> bool:
        """Whether the call still waits. If so, `tid` was still its thread's a moment ago."""
        try:
            fcntl.ioctl(self._descriptor, _IS_VALID, _ID.pack(call.id))
        except OSError:
            return False
        return True

    def check(self, call: TrappedCall) -> None:
        """Raise CallIsOver if the call does not wait any more."""
        if not self.is_valid(call):
            raise CallIsOver

    def succeed(self, call: TrappedCall, value: int) -> None:
        """Make the call return `value`. Raises CallIsOver."""
        self._respond(call, value, 0, 0)

    def fail(self, call: TrappedCall, number: int) -> None:
        """Make the call fail with the errno `number`. Raises CallIsOver."""
        self._respond(call, 0, -number, 0)

    def go_on(self, call: TrappedCall) -> None:
        """Let the kernel do the call. Raises CallIsOver."""
        self._respond(call, 0, 0, _CONTINUE)

    def _respond(self, call: TrappedCall, value: int, error: int, flags: int) -> None:
        try:
            fcntl.ioctl(self._descriptor, _SEND, _RESPONSE.pack(call.id, value, error, flags))
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
            raise CallIsOver from None

    def add_descriptor(
        self, call: TrappedCall, descriptor: int, *, close_on_exec: bool, number: int | None = None
    ) -> int:
        """Give the call's process a copy of our descriptor: at `number`, replacing what is there, or at the lowest free number.

        Returns the number. Raises OSError EMFILE if the process may have no more, CallIsOver.
        """
        flags, target = (0, 0) if number is None else (_AT_NUMBER, number)
        cloexec = os.O_CLOEXEC if close_on_exec else 0
        # Mutable, because otherwise ioctl() returns the buffer and not the number.
        request = bytearray(_ADDED.pack(call.id, flags, descriptor, target, cloexec))
        try:
            return int(fcntl.ioctl(self._descriptor, _ADD, request))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINPROGRESS, errno.ESRCH):
                raise CallIsOver from None
            if error.errno == errno.EBADF:  # the number is above the process's limit
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from None
            raise
