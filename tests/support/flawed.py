"""`fusehsm` with a fault put in, which a fuzzer must find: `python -m tests.support.flawed FLAW ARGUMENT...`

Each flaw is one that a change could bring: a check left out, a descriptor not closed, a socket that blocks.
"""

import errno
import os
import socket
import sys
from contextlib import nullcontext
from typing import Any

from fusehsm.cli import main
from fusehsm.control import protocol
from fusehsm.daemon import control_server
from fusehsm.linux.beneath import open_beneath
from fusehsm.overlay import attributes, credentials
from fusehsm.overlay.credentials import Impersonation
from fusehsm.tier.fetch import evict, inventory
from fusehsm.tier.fetch import protocol as fetch_protocol
from fusehsm.tier.fetch import server as fetch_server
from fusehsm.tier.stores import archive, http


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


def _fetch_outside() -> None:
    """A path is not checked before it is opened, and links in it are followed."""

    def open_anywhere(root_fd: int, path: str, flags: int) -> int:
        root = os.readlink(f"/proc/self/fd/{root_fd}")
        if not os.path.realpath(os.path.join(root, path)).startswith(os.path.dirname(root) + "/"):
            raise FileNotFoundError(errno.ENOENT, "the flaw keeps to the test's own directories", path)
        return os.open(path, flags & ~os.O_NOFOLLOW, dir_fd=root_fd)

    for module in (evict, inventory, fetch_server):
        vars(module)["open_beneath"] = open_anywhere
    vars(inventory)["components"] = lambda path: path.split("/")


def _fetch_blocking() -> None:
    """An answer waits for room in the client's socket, and all others with it."""

    async def send(connection: socket.socket, packet: bytes) -> None:
        connection.setblocking(True)
        connection.send(packet)
        connection.setblocking(False)

    vars(fetch_server)["_send"] = send


def _fetch_unexpected() -> None:
    """A path that cannot be one is noticed too late."""
    vars(inventory)["components"] = lambda path: path.split("/")

    def open_unchecked(root_fd: int, path: str, flags: int) -> int:
        assert ".." not in path
        return open_beneath(root_fd, path, flags)

    vars(inventory)["open_beneath"] = open_unchecked


def _fetch_grows() -> None:
    """Every request is kept."""
    kept: list[bytes] = []
    real = fetch_protocol.decode_request

    def decode(data: bytes) -> Any:
        kept.append(data * 1000)
        return real(data)

    vars(fetch_server)["decode_request"] = decode


def _rights_roots_rights() -> None:
    """What is made belongs to the server's user, and is changed with that user's rights."""
    Impersonation.rights_of = lambda self, caller, about=None: nullcontext()  # type: ignore[method-assign]


def _rights_keeps_set_ids() -> None:
    """A write leaves set-user-id, and set-group-id to one who is not in the group."""
    attributes.clear_privileges = lambda fd, is_member: False


def _rights_umask() -> None:
    """The daemon's umask counts, too."""
    credentials._NoUmask.__enter__ = lambda self: setattr(self, "_before", os.umask(0o027))  # type: ignore[method-assign]


def _archive_strange_names() -> None:
    """A name that is none ends everything."""
    real = archive.ArchiveStore._index

    def index(self: Any, entries: dict[str, Any]) -> None:
        assert not any("//" in path or ".." in path for path in entries)
        real(self, entries)

    archive.ArchiveStore._index = index  # type: ignore[method-assign]


def _archive_any_content() -> None:
    """Content is not what the archive has at that place."""
    real = archive.ArchiveStore.read

    def read(self: Any, path: str, offset: int, length: int, version: str) -> bytes:
        data = real(self, path, offset, length, version)
        return data[::-1]

    archive.ArchiveStore.read = read  # type: ignore[method-assign]


def _http_lengths() -> None:
    """An answer that is too short is taken for whole."""

    def body(self: Any, path: str, answer: Any, skip: int, expected: int) -> bytes:
        data: bytes = answer.read(decode_content=False)[skip : skip + expected]
        return data.ljust(expected, b"\0")

    http.HttpStore._body = body  # type: ignore[method-assign]


FLAWS = {
    "http-lengths": _http_lengths,
    "archive-strange-names": _archive_strange_names,
    "archive-any-content": _archive_any_content,
    "rights-roots-rights": _rights_roots_rights,
    "rights-keeps-set-ids": _rights_keeps_set_ids,
    "rights-umask": _rights_umask,
    "fetch-outside": _fetch_outside,
    "fetch-blocking": _fetch_blocking,
    "fetch-unexpected": _fetch_unexpected,
    "fetch-grows": _fetch_grows,
    "mount-numbers": _mount_numbers,
    "mount-descriptors": _mount_descriptors,
    "mount-blocking": _mount_blocking,
    "mount-dies": _mount_dies,
}

if __name__ == "__main__":
    FLAWS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
