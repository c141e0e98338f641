"""Defines the interface of a fanotify group for every source of events. Listeners, the handler API and the supervisor use it.

It has two levels. `mark`, `read` and `write` are fanotify's own calls, with the kernel's byte layouts and errors. `take_events` and `answer`
do the same with values. A backend that has no bytes (daemon/handler_group.py) overrides them and saves the conversion.
"""

import abc
import errno
import os
import types
from collections.abc import Callable, Coroutine
from typing import Any, Self

from fusehsm.events import Event
from fusehsm.fanotify.abi import (
    FAN_ALLOW,
    FAN_CLASS_PRE_CONTENT,
    FAN_DENY,
    FAN_REPORT_PIDFD,
    Dialect,
    RawEvent,
    decode_events,
    deny_errno,
    encode_response,
    event_length,
)
from fusehsm.linux.syscalls import AT_FDCWD

__all__ = ["AT_FDCWD", "AnyPath", "Group", "check_open_flags"]

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Group(abc.ABC):
    """An open fanotify group. No method blocks the calling thread: read() raises BlockingIOError on an empty queue.

    Attributes: `flags` and `event_f_flags` of fanotify_init(2) (with FAN_NONBLOCK), `dialect` of the group's masks and events.
    """

    def __init__(self, flags: int, event_f_flags: int, dialect: Dialect) -> None:
        self.flags = flags
        self.event_f_flags = event_f_flags
        self.dialect = dialect
        self._denies_with_errno = bool(flags & FAN_CLASS_PRE_CONTENT)
        self._largest_event = event_length(dialect, has_range=True, has_pidfd=bool(flags & FAN_REPORT_PIDFD))
        self.permission_events = dialect.permission

    @abc.abstractmethod
    def fileno(self) -> int:
        """A descriptor that polls readable exactly when read() would not raise BlockingIOError."""

    @abc.abstractmethod
    async def mark(
        self, flags: int, mask: int, dirfd: int = AT_FDCWD, path: str | bytes | None = None
    ) -> None:
        """fanotify_mark(2). The mark is in effect when it returns. Raises OSError with the kernel's errno."""

    @abc.abstractmethod
    async def backing(self, path: AnyPath, flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
        """open(2) of a file by its path, for the listener's own work on it. Returns a descriptor, which the caller closes; it is close-on-exec.

        On a fusehsm mount the file is opened below the overlay: neither the open nor any access through the descriptor makes an event. Pages that the
        mount's cache has already stay there until drop(). On the real kernel nothing lies below: the caller's open and accesses make events where the
        file is marked, its own group's marks included, and the caller must answer them.

        Raises OSError as open(2), with the caller's rights; EINVAL for O_CREAT and O_TMPFILE; on a fusehsm mount EXDEV for a path that is not on
        this group's mount, and ENOTCONN if the mount is gone.
        """

    @abc.abstractmethod
    def read(self, size: int) -> bytes:
        """read(2): as many whole events as fit into `size` bytes. Each has a descriptor of its own, which the caller owns.

        Raises BlockingIOError if the queue is empty. Raises OSError EINVAL if the first event does not fit; the errno of open(2) if the first
        event's file cannot be opened (its accessor was denied with EPERM); ENOTCONN if the emulated mount is gone.
        """

    @abc.abstractmethod
    def write(self, data: bytes) -> int:
        """write(2) of one response; returns the number of bytes taken. Raises OSError EINVAL or ENOENT as the kernel does."""

    @abc.abstractmethod
    def event_path(self, raw_event: RawEvent) -> str:
        """The accessor's path of an event that read() returned and that is not answered yet. Raises nothing."""

    @abc.abstractmethod
    async def wait_readable(self) -> None:
        """Return when read() would not raise BlockingIOError; a checkpoint. One task at a time.

        Raises trio.ClosedResourceError if the group is closed, before or during the wait.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the group, which removes its marks. A second call does nothing.

        Its unanswered events are allowed (fanotify(7)); on a mount, --unattended decides those of a pre-content group.
        """

    def take_events(self) -> list[Event]:
        """The next event as a value (two, if two short ones are queued). Raises the errors of read()."""
        events = []
        for raw in decode_events(self.dialect, self.read(self._largest_event)):
            if raw.pidfd is not None and raw.pidfd >= 0:
                os.close(raw.pidfd)
            path = self.event_path(raw) if raw.fd >= 0 else ""
            events.append(Event(raw.mask, raw.pid, raw.fd, path, raw.offset, raw.count, self.dialect))
        return events

    def answer(self, event: Event, error: int) -> None:
        """Allow an event's access (`error` 0) or deny it with one of the dialect's errnos. Raises OSError as write() does.

        A group below FAN_CLASS_PRE_CONTENT cannot name an errno: an access that it denies fails with EPERM.
        """
        if not error:
            response = FAN_ALLOW
        elif self._denies_with_errno:
            response = deny_errno(error)
        else:
            response = FAN_DENY
        self.write(encode_response(event.fd, response))

    def offer(self, handle: Callable[[Event], Coroutine[Any, Any, None]]) -> None:  # noqa: B027
        """Offer to handle events, answers included, in the task that makes them. A group need not use the offer."""

    def checked_errno(self, error: int) -> int:
        """The errno with which the access fails after the answer `error`. Raises OSError EINVAL if write() of that response would."""
        if error and not self._denies_with_errno:
            return errno.EPERM
        if error and error not in self.dialect.deny_errnos:
            raise OSError(errno.EINVAL, f"errno {error} cannot be denied with")
        return error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()


def check_open_flags(flags: int) -> None:
    """Raise OSError EINVAL for flags that make a file: below the overlay the mount would not learn of it."""
    if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(
            errno.EINVAL, "O_CREAT and O_TMPFILE make no file below the overlay: make it on the mount"
        )
