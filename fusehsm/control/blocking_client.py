"""The client's end of the control socket for threads: calls block, and no event loop is needed."""

import contextlib
import errno
import socket
import threading
from collections.abc import Sequence
from typing import Any

from fusehsm.control import socket as control_socket
from fusehsm.control.protocol import Request, encode_request
from fusehsm.linux.mountinfo import Mount

_FINISH = 2.0  # seconds


class BlockingConnection:
    """A connection to the server of a mount. Several threads may use it; their requests go one after the other."""

    def __init__(self, mount: Mount) -> None:
        """Connect. Raises OSError with one line, ENOTCONN if no server serves the mount."""
        self._socket = control_socket.connect(mount)
        self._destination = mount.mount_point
        self._turn = threading.Lock()

    def request(self, request: Request, descriptors: Sequence[int] = ()) -> tuple[dict[str, Any], int | None]:
        """Send a request, with `descriptors`, and wait. Returns the result and the descriptor that came with it, or None.

        Raises the OSError of the server's answer, and OSError ENOTCONN if the mount is gone or hang_up() was called.
        """
        with self._turn, control_socket.Reply(self._socket) as reply:
            try:
                socket.send_fds(self._socket, [encode_request(request)], descriptors)
                while not reply.receive():
                    pass
                return reply.result()
            except (ConnectionError, ValueError):
                raise self.gone() from None

    def gone(self) -> OSError:
        """The error to raise when the server does not answer any more."""
        return OSError(errno.ENOTCONN, f"{self._destination}: the mount is gone")

    def hang_up(self) -> None:
        """Make the request that waits in another thread fail, and every later one."""
        with contextlib.suppress(OSError):  # the server hung up first
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def is_alive(self) -> bool:
        """Whether the server has not hung up. Only valid while no request waits."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def finish(self) -> None:
        """End the connection and wait, for 2 seconds at most, until the server has cleaned up. The group's waiting events are settled then."""
        with contextlib.suppress(OSError):  # the server is gone, or does not answer
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(_FINISH)
            self._socket.recv(1)

    def close(self) -> None:
        """Close the socket. No request may be waiting."""
        self._socket.close()
