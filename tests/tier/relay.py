"""A bad line between a client and a real server: answers that are held back, or cut off in the middle."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

_PIECE: Final = 65536  # bytes


@dataclass
class Relay:
    """`endpoint`: where to connect to. `on_answer(bytes so far)`: is called before each piece of an answer is handed on (from the beginning of
    each connection); what it does delays that piece, and a ConnectionError that it raises cuts the connection.
    """

    endpoint: str
    on_answer: Callable[[int], None] = lambda so_far: None
    sockets: list[socket.socket] = field(default_factory=list)


@contextmanager
def relay(to: str) -> Iterator[Relay]:
    """A relay to the server at that URL."""
    there = urlsplit(to)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        line = Relay(f"http://127.0.0.1:{listening.getsockname()[1]}")
        address = str(there.hostname), int(there.port or 80)
        accepting = threading.Thread(target=_accept, args=(line, listening, address))
        accepting.start()
        try:
            yield line
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for end in line.sockets:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _accept(line: Relay, listening: socket.socket, address: tuple[str, int]) -> None:
    pumps: list[threading.Thread] = []
    while True:
        try:
            client, _ = listening.accept()
        except OSError:
            break
        line.sockets.append(client)
        try:
            server = socket.create_connection(address)
        except OSError:
            client.close()
            continue
        line.sockets.append(server)
        pumps += [
            threading.Thread(target=_pump, args=(client, server, lambda so_far: None)),
            threading.Thread(target=_pump, args=(server, client, lambda so_far: line.on_answer(so_far))),
        ]
        for pump in pumps[-2:]:
            pump.start()
    for end in line.sockets:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    for pump in pumps:
        pump.join()


def _pump(source: socket.socket, target: socket.socket, before: Callable[[int], None]) -> None:
    so_far = 0
    with suppress(OSError):
        while piece := source.recv(_PIECE):
            before(so_far)
            target.sendall(piece)
            so_far += len(piece)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
