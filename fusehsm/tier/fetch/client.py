"""The client of a running `fusehsm fetch`: finds the one that serves a path, and sends it requests."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from fusehsm.control import socket as control_socket
from fusehsm.text import shown
from fusehsm.tier.fetch.protocol import LARGEST_REPLY, Request, encode_request

_PATIENCE: Final = 600.0  # seconds without an answer


def socket_name(destination: str) -> str:
    """The name of a fetch's control socket: device and inode of its destination, as accessors see them. Raises OSError of stat(2)."""
    status = os.stat(destination)
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}"


@dataclass(frozen=True, slots=True)
class Found:
    """A connection to the fetch that serves a path."""

    # The control socket.
    connection: socket.socket
    # The destination of the fetch, absolute.
    root: str
    # The path below `root`.
    path: str

    def ask(self, request: Request) -> Iterator[dict[str, Any]]:
        """Send a request, and yield the lines of the answer as they arrive; the last one is the result. Raises the OSError in the answer, ENOTCONN
        if the fetch has ended or does not answer."""
        with self.connection as connection:
            connection.settimeout(_PATIENCE)
            try:
                connection.send(encode_request(request))
                while packet := connection.recv(LARGEST_REPLY):
                    answer = json.loads(packet)
                    if "errno" in answer:
                        raise OSError(int(answer["errno"]), str(answer["message"]))
                    if "result" in answer:
                        yield answer["result"]
                        return
                    yield from answer["lines"]
            except (ConnectionError, TimeoutError, ValueError):
                pass
            raise OSError(errno.ENOTCONN, f"{shown(self.root)}: its fetch has ended, or does not answer")


def find(path: str) -> Found | None:
    """The fetch that serves `path`; None if there is none. The last component is not followed. Raises OSError ENOENT if `path` does not exist."""
    absolute = os.path.abspath(path)
    name = os.path.basename(absolute)
    resolved = os.path.join(os.path.realpath(os.path.dirname(absolute)), name) if name else absolute
    os.lstat(resolved)
    if os.path.isdir(resolved) and not os.path.islink(resolved):
        root, below = resolved, ""
    else:
        root, below = os.path.split(resolved)
    while True:
        status = os.stat(root)
        owners = (0, os.getuid(), status.st_uid) if os.getuid() == 0 else (0, os.getuid())
        connection = control_socket.connect_to(socket_name(root), owners)
        if connection is not None:
            return Found(connection, root, below)
        if root == "/":
            return None
        root, last = os.path.split(root)
        below = f"{last}/{below}" if below else last


def found(path: str) -> Found:
    """As find(), but raises OSError ENOTCONN with the fix if there is none."""
    fetch = find(path)
    if fetch is None:
        raise OSError(
            errno.ENOTCONN, "no fusehsm fetch of yours serves it; start one: fusehsm fetch STORE DST", path
        )
    return fetch
