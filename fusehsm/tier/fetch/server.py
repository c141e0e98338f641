"""The server of a running fetch's control socket: evict, list, pin.

A client that behaves wrongly gets an error or is disconnected. No other client waits for it.
"""

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import trio

from fusehsm.control.accept import serve_connections
from fusehsm.control.socket import Peer
from fusehsm.linux.beneath import open_beneath
from fusehsm.tier.fetch.evict import Evictor, Kept
from fusehsm.tier.fetch.failures import in_a_line, passed_over
from fusehsm.tier.fetch.handler import Fetcher
from fusehsm.tier.fetch.inventory import Item
from fusehsm.tier.fetch.protocol import (
    LARGEST_REQUEST,
    MOST_AT_ONCE,
    Evict,
    List,
    Pin,
    Request,
    decode_request,
    encode_failure,
    encode_lines,
    encode_result,
)
from fusehsm.tier.fetch.turns import PATIENCE, opened
from fusehsm.tier.stubs.mark import key_of

_MOST_CONNECTIONS: Final = 64
_AFTER_TROUBLE: Final = 1.0  # seconds

_log = logging.getLogger(__name__)


class FetchServer:
    """Answers requests about the files of a fetcher."""

    def __init__(self, fetcher: Fetcher, evictor: Evictor, root_fd: int) -> None:
        self._fetcher = fetcher
        self._evictor = evictor
        self._root_fd = root_fd
        self._evicting = (
            trio.Lock()
        )  # one eviction at a time: a second would find the files of the first in use

    async def serve(self, listener: socket.socket) -> None:
        """Answer connections from processes of this user and of root. Never returns."""
        while True:
            with passed_over("the control socket", _log):
                await serve_connections(listener, {0, os.getuid()}, _MOST_CONNECTIONS, self._serve)
            await trio.sleep(_AFTER_TROUBLE)

    async def _serve(self, connection: socket.socket, _peer: Peer) -> None:
        with contextlib.suppress(ConnectionError):
            while request := await _receive(connection):
                await self._answer(connection, request)

    async def _answer(self, connection: socket.socket, data: bytes) -> None:
        try:
            await self._perform(connection, decode_request(data))
        except ConnectionError:
            raise
        except ValueError as error:
            await _send(connection, encode_failure(OSError(errno.EPROTO, str(error))))
        except OSError as error:
            await _send(connection, encode_failure(error))
        except Exception as error:  # a bug of ours, which concerns only this client
            _log.error("a request by the control socket has failed: %s", in_a_line(error))
            await _send(connection, encode_failure(OSError(errno.EIO, in_a_line(error))))

    async def _perform(self, connection: socket.socket, request: Request) -> None:
        match request:
            case Evict():
                await self._evict(connection, request)
            case List():
                items = await self._evictor.inventory(request.path)
                await _send_lines(connection, (asdict(item) for item in items))
                await _send(connection, encode_result({}))
            case Pin():
                changed = 0
                for item in await self._evictor.inventory(request.path):
                    if item.stub:
                        changed += await self._pin(item, request.pinned)
                await _send(connection, encode_result({"changed": changed}))

    async def _evict(self, connection: socket.socket, request: Evict) -> None:
        async with self._evicting:  # released before the answer, which may wait for a slow client
            items = await self._evictor.inventory(request.path)
            if request.free is not None:
                items.sort(key=lambda item: item.used_ns)
            outcome = await self._evictor.evict_many(items, older_than=request.older_than, free=request.free)
        await _send_lines(connection, ({"path": path, "why": why} for path, why in outcome.complaints))
        kept = {reason.name.lower(): outcome.kept[reason] for reason in Kept}
        await _send(connection, encode_result({"evicted": outcome.evicted, "freed": outcome.freed, **kept}))

    async def _pin(self, item: Item, pinned: bool) -> bool:
        opening = partial(open_beneath, self._root_fd, item.path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            fd = await opened(opening, item.path)
            try:
                status = os.fstat(fd)
                key = key_of(fd, status)
                served = await self._fetcher.meet(key, status.st_uid, fd, item.path, PATIENCE)
                if served.file is None:
                    return False
                setting = partial(served.file.pin, pinned=pinned)
                served.active += 1  # it must not be forgotten
                try:
                    return await self._fetcher.turns.on_file(
                        key, status.st_uid, fd, item.path, setting, PATIENCE
                    )
                finally:
                    served.active -= 1
            finally:
                os.close(fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, item.path) from None


async def _receive(connection: socket.socket) -> bytes:
    while True:
        await trio.lowlevel.wait_readable(connection)
        try:
            data = connection.recv(LARGEST_REQUEST + 1)
        except BlockingIOError:
            continue
        return b"" if len(data) > LARGEST_REQUEST else data


async def _send(connection: socket.socket, packet: bytes) -> None:
    while True:
        try:
            connection.send(packet)
            return
        except BlockingIOError:
            await trio.lowlevel.wait_writable(connection)


async def _send_lines(connection: socket.socket, lines: Iterator[dict[str, Any]]) -> None:
    batch: list[dict[str, Any]] = []
    size = 0
    for line in lines:
        length = len(json.dumps(line))
        if batch and size + length > MOST_AT_ONCE:
            await _send(connection, encode_lines(batch))
            batch, size = [], 0
        batch.append(line)
        size += length
    if batch:
        await _send(connection, encode_lines(batch))
