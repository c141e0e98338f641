"""Hostile clients of a control socket: odd and damaged requests, descriptors beside them, unread answers, connections that come and go.

The mount's socket and fetch's have the same kind of requests (RequestCodec of fusehsm/control/protocol.py), so both fuzzers stand on this.
"""

import dataclasses
import errno
import json
import os
import random
import select
import socket
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

MOST_CLIENTS = 12
_ROOM = 1 << 18  # bytes: no answer's packet is larger

_NUMBERS = (
    0,
    1,
    2,
    3,
    64,
    4096,
    (1 << 16) - 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 52,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
_ODD_TEXT = (
    "",
    ".",
    "..",
    "/",
    "a\0b",
    "\ud800",
    "\udcff",
    "\n\x1b[31m",
    "n" * 300,
    "x/" * 3000,
    "-",
    "\u202e",
)
# As text of JSON, which json.dumps() would not make of any value.
_ODD_JSON = (
    "null",
    "true",
    "-1",
    "1e999",
    "-0.0",
    "NaN",
    "1.5",
    "18446744073709551616",
    "1" * 400,
    "1" * 5000,
    '"\\ud800"',
    '"\\u0000"',
    "[]",
    "{}",
    "[" * 900 + "]" * 900,
    '"' + "y" * 9000 + '"',
)


@dataclass
class Client:
    """One connection, and what is known of it."""

    connection: socket.socket
    #: The event socket that an answer has brought.
    events: socket.socket | None = None
    #: A request was sent that may wait for something, so the next answer may never come.
    busy: bool = False
    #: Numbers of events that came and were not answered.
    numbers: deque[int] = field(default_factory=lambda: deque(maxlen=64))

    def close(self) -> None:
        """Hang up."""
        self.connection.close()
        if self.events is not None:
            self.events.close()


class Server(Protocol):
    """One server to attack."""

    #: The kinds of its requests, by the names that they have in a message.
    kinds: Mapping[str, type[Any]]
    #: Those that are answered at once, whatever their fields say.
    quick: Sequence[str]
    #: Values that mean something, by the name of their field.
    known: Mapping[str, Sequence[Any]]

    def connect(self) -> socket.socket:
        """A new connection. Raises OSError."""

    def check_answer(self, packet: bytes, descriptors: Sequence[int]) -> bool:
        """Whether an answer ends with this packet. Raises AssertionError for one that no answer may be."""

    def use_events(self, client: Client, choose: random.Random) -> None:
        """An act on the event socket of a client that has one."""

    def probe(self) -> None:
        """Another client is answered in time. Raises AssertionError."""


class Attack:
    """Clients of one server, and what they have done."""

    def __init__(self, server: Server, story: Callable[[], str], patience: float) -> None:
        """`story`: what the server has said, for a message. `patience`: seconds for an answer."""
        self._server = server
        self._patience = patience
        self._story = story
        self._clients: list[Client] = []
        self._history: deque[str] = deque(maxlen=12)

    def act(self, choose: random.Random) -> None:
        """One act of one client, after which others are served as before."""
        try:
            self._act(choose)
            self._server.probe()
        except AssertionError as error:
            error.add_note(
                "the last acts:\n" + "\n".join(self._history) + f"\nthe server says: {self._story()}"
            )
            raise

    def hang_up(self) -> None:
        """Close everything."""
        while self._clients:
            self._clients.pop().close()

    # One act

    def _act(self, choose: random.Random) -> None:
        draw = choose.random()
        if not self._clients or (draw < 0.06 and len(self._clients) < MOST_CLIENTS):
            self._clients.append(Client(self._server.connect()))
            self._note("connects")
        client = choose.choice(self._clients)
        if draw < 0.10 or len(self._clients) == MOST_CLIENTS:
            self._note("hangs up")
            self._clients.remove(client)
            client.close()
        elif draw < 0.14:
            self._note("hangs up for writing")
            with suppress(OSError):
                client.connection.shutdown(choose.choice((socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR)))
            client.busy = True
        elif draw < 0.40 and client.events is not None:
            self._note("uses its event socket")
            self._server.use_events(client, choose)
        else:
            self._ask(client, choose)

    def _ask(self, client: Client, choose: random.Random) -> None:
        message, quick = self._message(choose)
        descriptors = self._descriptors(choose)
        self._note(f"{len(descriptors)} descriptors, {message[:300]!r}{'...' if len(message) > 300 else ''}")
        try:
            client.connection.setblocking(False)
            socket.send_fds(client.connection, [message], descriptors)
        except OSError as error:
            # Gone, or its buffer is full, or there are too many descriptors under way.
            assert error.errno in (
                errno.EPIPE,
                errno.ECONNRESET,
                errno.EAGAIN,
                errno.EMSGSIZE,
                errno.ETOOMANYREFS,
                errno.ENOTCONN,
            )
            client.busy = True
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        client.busy |= not quick
        if choose.random() < 0.8:
            self._take_answer(client, 0.0 if client.busy else self._patience)
        else:
            client.busy = True  # its next answer is this one

    def _take_answer(self, client: Client, seconds: float) -> None:
        """The answer, if it comes in time. A server may hang up instead."""
        connection = client.connection
        while True:
            if not select.select([connection], [], [], seconds)[0]:
                assert client.busy, f"no answer within {self._patience:.0f} s"
                return
            try:
                packet, descriptors, _, _ = socket.recv_fds(connection, _ROOM, 8)
            except OSError:
                packet, descriptors = b"", []
            try:
                if not packet:
                    self._clients.remove(client)
                    client.close()
                    return
                if self._server.check_answer(packet, descriptors):
                    self._take_events(client, descriptors)
                    return
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    @staticmethod
    def _take_events(client: Client, descriptors: list[int]) -> None:
        for descriptor in list(descriptors):
            if client.events is None and os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                descriptors.remove(descriptor)
                client.events = socket.socket(fileno=descriptor)
                client.events.setblocking(False)

    def _note(self, act: str) -> None:
        self._history.append(f"  {act}")

    # What is sent

    def _message(self, choose: random.Random) -> tuple[bytes, bool]:
        """A message, and whether it is answered at once."""
        draw = choose.random()
        if draw < 0.05:
            return choose.randbytes(choose.choice((1, 2, 7, 100, 16384, 16385, 65536, 65537, 100_000))), True
        name = choose.choice(list(self._server.kinds))
        fields = {
            item.name: self._value(item, choose) for item in dataclasses.fields(self._server.kinds[name])
        }
        texts = {"request": json.dumps(name), **{key: json.dumps(value) for key, value in fields.items()}}
        quick = name in self._server.quick
        if draw < 0.25:
            quick = self._damage(texts, choose) and quick
        message = "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in texts.items()) + "}"
        data = message.encode("utf-8", "surrogatepass")
        if 0.25 <= draw < 0.30:
            return data[: choose.randrange(1, len(data))], True
        if 0.30 <= draw < 0.34:
            damaged = bytearray(data)
            for _ in range(choose.randrange(1, 4)):
                damaged[choose.randrange(len(damaged))] = choose.randrange(256)
            return bytes(damaged), False
        if 0.34 <= draw < 0.36:
            return data + b" " * choose.choice((1, 16000, 65536)), quick
        return data, quick

    @staticmethod
    def _damage(texts: dict[str, str], choose: random.Random) -> bool:
        """Change the fields of a request; whether it is answered as soon as the request that it was."""
        name = choose.choice(list(texts))
        match choose.randrange(3):
            case 0:
                del texts[name]
            case 1:
                texts[choose.choice(("more", "", "\0", "flags", "pid"))] = choose.choice(_ODD_JSON)
            case 2:
                texts[name] = choose.choice(_ODD_JSON)
        return True

    def _value(self, item: "dataclasses.Field[Any]", choose: random.Random) -> Any:
        known = self._server.known.get(item.name, ())
        if known and choose.random() < 0.8:
            return choose.choice(known)
        kinds = set(typing.get_args(item.type) or (item.type,))
        kind = choose.choice(sorted(kinds, key=str))
        if kind is bool:
            return choose.random() < 0.5
        if kind is int:
            return choose.choice(_NUMBERS) if choose.random() < 0.6 else 1 << choose.randrange(64)
        if kind is float:
            return choose.choice((0.0, 0.5, 1e9, 1e18, 5e-324, 1e300))
        if kind is str:
            return choose.choice(_ODD_TEXT)
        return None

    @staticmethod
    def _descriptors(choose: random.Random) -> list[int]:
        """Descriptors that go with a message; the caller closes them."""
        if choose.random() < 0.85:
            return []
        made: list[int] = []
        for _ in range(choose.choice((1, 1, 2, 5, 60))):
            match choose.randrange(4):
                case 0:
                    made += os.pipe()
                case 1:
                    made += [end.detach() for end in socket.socketpair()]
                case 2:
                    made.append(os.open("/", os.O_PATH))
                case 3:
                    made.append(os.memfd_create("fuzz"))
        return made
