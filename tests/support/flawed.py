"""`fusehsm` with a fault put in, which a fuzzer must find: `python -m tests.support.flawed FLAW ARGUMENT...`

Each flaw is one that a change could bring: a check left out, a descriptor not closed, a socket that blocks.
"""

import socket
import sys
from typing import Any

from fusehsm.cli import main
from fusehsm.control import protocol
from fusehsm.daemon import control_server


def _mount_numbers() -> None:
    """Device numbers have no limits: those that are too large for the system raise an exception that nobody expects."""
    protocol._CODEC._limits.clear()


def _mount_descriptors() -> None:
    """Descriptors that come with a message stay open."""
    real = socket.recv_fds

    def receive(connection: socket.socket, size: int, _: int) -> Any:
        message, _descriptors, flags, address = real(connection, size, 16)
        return message, [], flags, address

    control_server.socket.recv_fds = receive  # type: ignore[attr-defined]


def _mount_blocking() -> None:
    """An answer waits for room in the client's socket, and all others with it."""

    async def reply(self: Any, parts: list[bytes], descriptors: list[int]) -> None:
        self._connection.setblocking(True)
        for part in parts * 200:  # longer answers than there is room for
            self._connection.sendmsg([part], [])

    control_server._Session._reply = reply  # type: ignore[method-assign]


def _mount_dies() -> None:
    """Feedback of a kind that is unknown ends the daemon."""

    def decode(data: bytes) -> tuple[int, int, int]:
        kind, number, value = protocol._FEEDBACK.unpack(
            data.ljust(protocol.FEEDBACK_SIZE)[: protocol.FEEDBACK_SIZE]
        )
        if kind > protocol.SYNC:
            sys.exit(3)
        return kind, number, value

    protocol.decode_feedback = decode


FLAWS = {
    "mount-numbers": _mount_numbers,
    "mount-descriptors": _mount_descriptors,
    "mount-blocking": _mount_blocking,
    "mount-dies": _mount_dies,
}

if __name__ == "__main__":
    FLAWS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
