"""Both clients of the control socket, against servers that send more than a reply has: nothing of it stays open."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import trio

from fusehsm.control import protocol
from fusehsm.control import socket as control_socket
from fusehsm.control.blocking_client import BlockingConnection
from fusehsm.control.client import ControlConnection
from fusehsm.control.protocol import Status
from fusehsm.linux.mountinfo import FILESYSTEM_TYPE, Mount

DEVICE = 99, 77  # no mount has it
PLACE = Mount(0, DEVICE, "/", "/somewhere", FILESYSTEM_TYPE, "", os.getuid())

RESULT = {"text": "x" * protocol.LARGEST_REPLY_PART}  # of two parts
FIRST, LAST = protocol.encode_result(RESULT)
(FAILURE,) = protocol.encode_failure(OSError(5, "no"))

Ask = Callable[[], tuple[dict[str, object], int | None]]


def blocking() -> tuple[dict[str, object], int | None]:
    connection = BlockingConnection(PLACE)
    try:
        return connection.request(Status())
    finally:
        connection.close()


def asynchronous() -> tuple[dict[str, object], int | None]:
    async def ask() -> tuple[dict[str, object], int | None]:
        connection = await ControlConnection.open(PLACE)
        try:
            return await connection.request(Status())
        finally:
            connection.close()

    return trio.run(ask)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where the clients connect to."""
    with control_socket.listening(DEVICE) as listening:
        listening.setblocking(True)
        yield listening


@pytest.mark.parametrize("ask", [blocking, asynchronous])
@pytest.mark.parametrize(
    ("parts", "given"),
    # Each part of the reply, and how many descriptors it brings; which of them all the client is given.
    [
        ([(FIRST, 0), (LAST, 1)], 0),
        ([(FIRST, 1), (LAST, 1)], 1),
        ([(FIRST, 0), (LAST, 2)], 1),
        ([(FIRST, 1), (LAST, 0)], 0),
        ([(FAILURE, 1)], None),
        ([(FIRST, 1)], None),
        ([(FIRST, 1), (b"rubbish", 1)], None),
        ([(b".rubbish", 1)], None),
        ([(b".{}", 1)], None),
    ],
    ids=[
        "as usual",
        "one early",
        "two at once",
        "early only",
        "failure",
        "hung up",
        "no part",
        "no JSON",
        "no result",
    ],
)
def test_descriptors_that_nobody_is_given_are_closed(
    listener: socket.socket, ask: Ask, parts: list[tuple[bytes, int]], given: int | None
) -> None:
    pipes = [os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) for _ in range(sum(count for _, count in parts))]
    to_send = [writing for _, writing in pipes]

    async def answer() -> None:
        connection, _ = await trio.to_thread.run_sync(listener.accept)
        with connection:
            await trio.to_thread.run_sync(connection.recv, protocol.LARGEST_REQUEST)
            for part, count in parts:
                socket.send_fds(connection, [part], [to_send.pop(0) for _ in range(count)])

    async def both() -> tuple[dict[str, object], int | None] | None:
        outcome = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with suppress(OSError):
                outcome = await trio.to_thread.run_sync(ask)
        return outcome

    outcome = trio.run(both)
    for _, writing in pipes:
        os.close(writing)
    if given is None:
        assert outcome is None
    else:
        assert outcome is not None
        result, descriptor = outcome
        assert result == RESULT
        assert descriptor is not None
        assert os.write(descriptor, b"!") == 1
        os.close(descriptor)
    # The end of a pipe of which nobody holds the other end; before it what was written there.
    read = [os.read(reading, 2) for reading, _ in pipes]
    assert read == [b"!" if number == given else b"" for number in range(len(pipes))]
    for reading, _ in pipes:
        os.close(reading)
