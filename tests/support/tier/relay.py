"""A bad line between a client and a real server: answers that are held back, or cut off in the middle. And a meter on it."""

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

    `asked`: the first line of each request, as long as requests have no bodies; `received`: bytes of answers, headers included.
    """

    endpoint: str
    on_answer: Callable[[int], None] = lambda so_far: None
    sockets: list[socket.socket] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    received: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def answers(self, piece: bytes, so_far: int) -> None:
        """A piece of an answer comes by."""
        with self._counting:
            self.received += len(piece)
        self.on_answer(so_far)

    def requests(self) -> Callable[[bytes, int], None]:
        """What takes note of the requests of one connection."""
        rest = b""

        def note(piece: bytes, _: int) -> None:
            nonlocal rest
            *whole, rest = (rest + piece).split(b"\r\n\r\n")
            self.asked += [head.partition(b"\r\n")[0].decode("latin-1") for head in whole]

        return note


@contextmanager
def relay(to: str, listen_at: str = "127.0.0.1") -> Iterator[Relay]:
    """A relay to the server at that URL, itself at that address."""
    there = urlsplit(to)
    with socket.create_server((listen_at, 0), backlog=128) as listening:
        line = Relay(f"http://{listen_at}:{listening.getsockname()[1]}")
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
            threading.Thread(target=_pump, args=(client, server, line.requests())),
            threading.Thread(target=_pump, args=(server, client, line.answers)),
        ]
        for pump in pumps[-2:]:
            pump.start()
    for end in line.sockets:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    for pump in pumps:
        pump.join()


def _pump(source: socket.socket, target: socket.socket, before: Callable[[bytes, int], None]) -> None:
    so_far = 0
    with suppress(OSError):
        while piece := source.recv(_PIECE):
            before(piece, so_far)
            target.sendall(piece)
            so_far += len(piece)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
