"""The client's end of the control socket for trio tasks: requests and their replies."""

import contextlib
import errno
import os
import socket
from typing import Any

import trio

from fusehsm.control import socket as control_socket
from fusehsm.control.protocol import Request, encode_request
from fusehsm.linux.mountinfo import Mount


class ControlConnection:
    """A connection to the server of a mount. Several tasks may use it; their requests go one after the other."""

    def __init__(
        self, connection: socket.socket, destination: str, largest: int = control_socket.LARGEST_REPLY
    ) -> None:
        """`destination`: the mount point, for errors. `largest`: bytes of a reply."""
        connection.setblocking(False)
        self._socket = connection
        self._destination = destination
        self._largest = largest
        self._turn = trio.Lock()

    @classmethod
    async def open(cls, mount: Mount) -> "ControlConnection":
        """Connect to the mount's server. Raises OSError with one line, ENOTCONN if there is no server."""
        # In a thread: connect(2) waits while the server's backlog is full, and this event loop may run that server.
        connection = await trio.to_thread.run_sync(control_socket.connect, mount)
        is_foreign = control_socket.is_foreign(mount)
        largest = control_socket.LARGEST_FOREIGN_REPLY if is_foreign else control_socket.LARGEST_REPLY
        return cls(connection, mount.mount_point, largest)

    async def request(
        self, request: Request, *, takes_descriptor: bool = True
    ) -> tuple[dict[str, Any], int | None]:
        """Send a request and wait. Returns the result and the descriptor that came with it, or None, also if not `takes_descriptor`.

        Raises the OSError of the server's answer, and OSError ENOTCONN if the mount is gone. A cancelled request closes the connection, because the
        next reply could not be matched to a request.
        """
        async with self._turn:
            with control_socket.Reply(
                self._socket, self._largest, takes_descriptor=takes_descriptor
            ) as reply:
                complete = False
                try:
                    await self._send(encode_request(request))
                    await self._receive(reply)
                    complete = True
                    return reply.result()
                except (ConnectionError, ValueError):
                    raise self.gone() from None
                finally:
                    if not complete:
                        self.close()

    @property
    def is_served_here(self) -> bool:
        """Whether this process is the server, too."""
        return control_socket.peer_of(self._socket).pid == os.getpid()

    def gone(self) -> OSError:
        """The error to raise when the server does not answer any more."""
        return OSError(errno.ENOTCONN, f"{self._destination}: the mount is gone")

    def close(self) -> None:
        """Close the socket. A second call does nothing."""
        if self._socket.fileno() >= 0 and trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()

    async def _send(self, message: bytes) -> None:
        while True:
            self._check_open()
            try:
                self._socket.send(message)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)

    async def _receive(self, reply: control_socket.Reply) -> None:
        complete = False
        while not complete:
            self._check_open()
            await trio.lowlevel.wait_readable(self._socket)
            with contextlib.suppress(BlockingIOError):
                complete = reply.receive()

    def _check_open(self) -> None:
        if self._socket.fileno() < 0:
            raise self.gone()


async def request(mount: Mount, message: Request) -> dict[str, Any]:
    """Send one request (status, release) on a connection of its own. Raises OSError with one line."""
    connection = await ControlConnection.open(mount)
    try:
        result, _ = await connection.request(message, takes_descriptor=False)
        return result
    finally:
        connection.close()
