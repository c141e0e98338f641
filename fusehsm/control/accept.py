"""Serves the connections of a control socket: only those of allowed users, a limited number at once, each in a task of its own."""

import logging
import socket
from collections.abc import Awaitable, Callable, Collection
from typing import Final, NoReturn

import trio

from fusehsm.control.socket import Peer, peer_of

_SHORTAGE: Final = 0.1  # seconds to wait after a failed accept(2), as a rule for want of descriptors

_log = logging.getLogger(__name__)


async def serve_connections(
    listener: socket.socket,
    uids: Collection[int],
    most: int,
    serve: Callable[[socket.socket, Peer], Awaitable[None]],
) -> NoReturn:
    """Call `serve(connection, peer)` in a task of its own for each connection from one of these users, at most `most` at once.

    All other connections are closed. The connection is non-blocking and is closed when `serve` returns. An exception of `serve` ends only its own
    connection.
    """
    connections = 0

    async def serve_one(connection: socket.socket, peer: Peer) -> None:
        nonlocal connections
        connections += 1
        try:
            with connection:
                await serve(connection, peer)
        except Exception:
            _log.exception("control socket: the session of process %d failed", peer.pid)
        finally:
            connections -= 1

    async with trio.open_nursery() as nursery:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, ConnectionError):
                continue
            except OSError as error:
                _log.warning("control socket: no connection can be accepted: %s", error.strerror)
                await trio.sleep(_SHORTAGE)
                continue
            peer = peer_of(connection)
            if peer.uid not in uids or connections >= most:
                connection.close()
                continue
            connection.setblocking(False)
            nursery.start_soon(serve_one, connection, peer)
