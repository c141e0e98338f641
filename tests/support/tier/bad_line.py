"""A line to a server that can be made bad: a proxy of TCP connections."""

import random
import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit


class BadLine:
    """`trouble`: "" for a good line, "refuse" connections, "hang" with every answer, "cut" the connection within it, end it there as if that were all
    ("short"), or cut it now and then at some byte ("random")."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self.trouble = ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._choose = random.Random(5)

    def through(self, url: str) -> str:
        """The URL by this line."""
        return url.replace(self._to.netloc, f"127.0.0.1:{self._listener.getsockname()[1]}")

    def fix(self) -> None:
        """Make it good."""
        self.trouble = ""

    def __enter__(self) -> "BadLine":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in [self._listener, *self._open]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            if self.trouble == "refuse":
                return
            assert self._to.hostname is not None
            with socket.create_connection((self._to.hostname, self._to.port or 80)) as server:
                self._open |= {client, server}
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                try:
                    self._answers(server, client)
                finally:
                    for end in (client, server):  # closing them is no end while the other thread reads
                        with suppress(OSError):
                            end.shutdown(socket.SHUT_RDWR)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        while data := server.recv(65536):
            match self.trouble:
                case "refuse":
                    return
                case "hang":
                    while self.trouble == "hang":
                        threading.Event().wait(0.05)
                case "cut":
                    client.sendall(data[:1000])
                    return
                case "short":
                    client.sendall(data[:1000])
                    client.shutdown(socket.SHUT_WR)
                    return
                case "random" if self._choose.random() < 0.3:
                    client.sendall(data[: self._choose.randrange(len(data))])
                    return
            client.sendall(data)
