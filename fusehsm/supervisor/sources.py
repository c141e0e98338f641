"""The events of one mount for a group of the command: the mount's own group, and its connection for marks."""

import errno
import logging
import os
import socket
from dataclasses import dataclass, field
from typing import NamedTuple

from fusehsm.control.blocking_client import BlockingConnection
from fusehsm.control.event_stream import EventStream, Received
from fusehsm.control.protocol import VERSION, Hello
from fusehsm.fanotify.abi import FAN_NONBLOCK, Dialect
from fusehsm.linux.mountinfo import Mount
from fusehsm.supervisor.readiness import Bell

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Source:
    """A group's connection to one mount, on which it has marks: the place that its events come from."""

    #: The mount.
    mount: Mount
    #: For marks.
    connection: BlockingConnection
    #: The events of the mount's own group.
    stream: EventStream
    #: The threads whose process the mount knows as a reader of the events.
    readers: set[int] = field(default_factory=set)

    @classmethod
    def connect(
        cls, mount: Mount, flags: int, event_f_flags: int, dialect: Dialect, bell: Bell, *, told_dialect: bool
    ) -> "Source":
        """Make a group on the mount, whose events ring the bell. `flags`, `event_f_flags`: those of fanotify_init(2).

        `told_dialect`: the user chose the dialect. Raises OSError ENOTCONN if the mount has no server, EINVAL if it speaks another dialect.
        """
        connection = BlockingConnection(mount)
        try:
            name = dialect.name
            hello = Hello(VERSION, flags | FAN_NONBLOCK, event_f_flags, name if told_dialect else None)
            result, descriptor = connection.request(hello, [bell.fileno()])
            if descriptor is None:
                raise connection.gone()
            events = socket.socket(fileno=descriptor)
            if result["dialect"] != name:
                events.close()
                raise refused(
                    errno.EINVAL,
                    f"{mount.mount_point} speaks {result['dialect']}, where a mark's bits mean something else than in {name}: "
                    f"say what the command speaks, with --abi {result['dialect']} or --abi {name}",
                )
        except BaseException:
            connection.close()
            raise
        stream = EventStream(events, flags, dialect, connection.gone, close_on_exec=True)
        return cls(mount, connection, stream)

    def close(self) -> None:
        """End the connection, without waiting. The mount then removes the group's marks; its --unattended decides the unanswered events."""
        self.connection.hang_up()
        self.stream.close()

    def finish(self) -> None:
        """close(), and wait, for 2 seconds at most, until the mount has removed the marks and decided the unanswered events."""
        self.stream.close()
        self.connection.finish()
        self.connection.hang_up()


class Outstanding(NamedTuple):
    """A permission event that the command has not answered."""

    #: The mount of the event.
    source: Source
    #: The event.
    received: Received
    #: When the command read it, seconds of time.monotonic(); 0 if it has not.
    since: float


def refused(number: int, why: str) -> OSError:
    """Log the reason for a refusal, and make its OSError. The command gets only the errno; the log is for the user."""
    _log.warning("%s", why)
    return OSError(number, os.strerror(number))
