"""The requests to a running `fusehsm fetch` and its answers (JSON, one value a packet), and the client: finds the fetch that serves a path."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from fusehsm.control import socket as control_socket
from fusehsm.control.protocol import RequestCodec
from fusehsm.text import shown

LARGEST_REQUEST: Final = 1 << 16  # bytes
LARGEST_REPLY: Final = 1 << 17
MOST_AT_ONCE: Final = (
    1 << 16
)  # bytes of a list in one packet; with any path, one line takes less than half of it
_PATIENCE: Final = 600.0  # seconds without an answer


@dataclass(frozen=True, slots=True)
class Evict:
    """Evict the files at or below `path`. The answer has a line for each file that could not be evicted because of an error, and the counts."""

    # Relative to the destination; "": all.
    path: str
    # Seconds: only files that were not used for that long. None: all.
    older_than: float | None = None
    # Bytes: the least recently used first, until that much has become free. None: all.
    free: int | None = None


@dataclass(frozen=True, slots=True)
class List:
    """List the regular files at or below `path`. The answer has a line for each."""

    # Relative to the destination; "": all.
    path: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Pin or unpin the stubs at or below `path`. The answer is the count of files whose state has changed."""

    # Relative to the destination; "": all.
    path: str
    # False: unpin.
    pinned: bool


Request = Evict | List | Pin
_CODEC: Final[RequestCodec[Request]] = RequestCodec(
    "this fetch", {"evict": Evict, "list": List, "pin": Pin}, largest=1 << 62
)
encode_request: Final = _CODEC.encode
decode_request: Final = _CODEC.decode


def encode_lines(lines: list[dict[str, Any]]) -> bytes:
    """A packet with a part of a list; another packet follows."""
    return json.dumps({"lines": lines}).encode()


def encode_result(result: dict[str, Any]) -> bytes:
    """The last packet of an answer."""
    return json.dumps({"result": result}).encode()


def encode_failure(error: OSError) -> bytes:
    """The last packet of a failed request."""
    message = error.strerror or str(error)
    if error.filename:
        message = f"{os.fsdecode(error.filename)}: {message}"
    return json.dumps({"errno": error.errno or 5, "message": message}).encode()


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
            errno.ENOTCONN,
            "none of your fusehsm fetch processes serves it; start one: fusehsm fetch STORE DST",
            path,
        )
    return fetch
