"""A client's end of the control socket for threads, which wait in it, and need no event loop."""

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
    """A connection to the server of a mount; requests go one after the other, whoever makes them."""

    def __init__(self, mount: Mount) -> None:
        """Connect. Raises OSError with one line, ENOTCONN where nobody serves the mount."""
        self._socket = control_socket.connect(mount)
        self._destination = mount.mount_point
        self._turn = threading.Lock()

    def request(self, request: Request, descriptors: Sequence[int] = ()) -> tuple[dict[str, Any], int | None]:
        """The result of a request, which `descriptors` go along with, and the descriptor that came with it, if any. Raises the OSError that
        the server answers with, and ENOTCONN when the mount is gone or hang_up() was called."""
        with self._turn, control_socket.Reply(self._socket) as reply:
            try:
                socket.send_fds(self._socket, [encode_request(request)], descriptors)
                while not reply.receive():
                    pass
                return reply.result()
            except (ConnectionError, ValueError):
                raise self.gone() from None

    def gone(self) -> OSError:
        """What to raise when the server does not answer any more."""
        return OSError(errno.ENOTCONN, f"{self._destination}: the mount is gone")

    def hang_up(self) -> None:
        """Have the request that waits, in another thread, fail, and every later one."""
        with contextlib.suppress(OSError):  # the server was quicker
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def is_alive(self) -> bool:
        """Whether the server has not hung up; while no request is waiting."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def finish(self) -> None:
        """Tell the server that this is all, and wait until it has put everything away: what a group owed is settled then."""
        with contextlib.suppress(OSError):  # it is gone, or does not answer
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(_FINISH)
            self._socket.recv(1)

    def close(self) -> None:
        """Close; no request may be waiting."""
        self._socket.close()
