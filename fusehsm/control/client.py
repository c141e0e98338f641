"""A client's end of the control socket: requests and their replies."""

import contextlib
import errno
import socket
from typing import Any

import trio

from fusehsm.control import socket as control_socket
from fusehsm.control.protocol import Request, encode_request
from fusehsm.linux.mountinfo import Mount


class ControlConnection:
    """A connection to the server of a mount. Requests go one after the other, whoever makes them."""

    def __init__(self, connection: socket.socket, destination: str) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._destination = destination
        self._turn = trio.Lock()

    @classmethod
    async def open(cls, mount: Mount) -> "ControlConnection":
        """Connect to the mount's server. Raises OSError with one line, ENOTCONN where there is none."""
        # In a thread: connect(2) waits while the server's backlog is full, and that server may live in this event loop.
        return cls(await trio.to_thread.run_sync(control_socket.connect, mount), mount.mount_point)

    async def request(self, request: Request) -> tuple[dict[str, Any], int | None]:
        """The result of a request and the descriptor that came with it, if any. Raises the OSError that the server answers with, and
        ENOTCONN when the mount is gone. When it is cancelled the connection is closed: nobody could tell whose reply comes next."""
        async with self._turn:
            with control_socket.Reply(self._socket) as reply:
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

    def gone(self) -> OSError:
        """What to raise when the server does not answer any more."""
        return OSError(errno.ENOTCONN, f"{self._destination}: the mount is gone")

    def close(self) -> None:
        """Close; closing twice does nothing."""
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
    """One request on a connection of its own (status, release). Raises OSError with one line."""
    connection = await ControlConnection.open(mount)
    try:
        result, _ = await connection.request(message)
        return result
    finally:
        connection.close()
