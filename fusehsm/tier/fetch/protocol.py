"""The requests to a running `fusehsm fetch` and its answers (JSON, one value a packet), and the client: finds the fetch that serves a path."""

import errno
import json
import os
import pwd
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from fusehsm.control import socket as control_socket
from fusehsm.control.protocol import LARGEST_ERRNO, RequestCodec
from fusehsm.control.shape import Shape, fields_of, fitting, parsed
from fusehsm.linux.beneath import follow
from fusehsm.text import shown

LARGEST_REQUEST: Final = 1 << 16  # bytes
LARGEST_REPLY: Final = 1 << 17
MOST_AT_ONCE: Final = (
    1 << 16
)  # bytes of a list in one packet; with any path, one line takes less than half of it
MOST_LINES: Final = 1 << 24
"""Lines of an answer."""

_PATIENCE: Final = 600.0  # seconds without an answer
_NO_USER: Final = 0xFFFF_FFFF  # (uid_t)-1

LineT = TypeVar("LineT")


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
class Complaint:
    """A line of the answer to Evict and Pin: a file that an error has kept from it."""

    # Below the destination.
    path: str
    # The cause.
    why: str


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
    return _name_of(os.stat(destination))


def _name_of(status: os.stat_result) -> str:
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}"


class Answer(Generic[LineT]):
    """The answer to a request: its lines as they arrive, and its counts once all lines have come."""

    def __init__(self, fetch: "Found", request: Request, line: type[LineT], counts: Sequence[str]) -> None:
        """`line`: the dataclass of its lines. `counts`: the names of its counts."""
        self._fetch = fetch
        self._request = request
        self._line = line
        self._line_shape = fields_of(line)
        self._result_shape: dict[str, Shape] = dict.fromkeys(counts, int)
        self.counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[LineT]:
        """Send the request and yield the lines. Raises the OSError in the answer, ENOTCONN if the fetch has ended, does not answer, or answers with
        something else."""
        why = "its fetch has ended, or does not answer"
        try:
            yield from self._lines()
            return
        except (ConnectionError, TimeoutError):
            pass
        except ValueError:
            why = "the answer of its fetch makes no sense; it may be of another version"
        raise OSError(errno.ENOTCONN, f"{shown(self._fetch.root)}: {why}")

    def _lines(self) -> Iterator[LineT]:
        left = MOST_LINES
        for packet in self._fetch.packets(self._request):
            match parsed(packet):
                case {"errno": int(number), "message": str(message)} if 0 < number <= LARGEST_ERRNO:
                    raise OSError(number, message)
                case {"result": dict(result)}:
                    self.counts = fitting(result, self._result_shape)
                    return
                case {"lines": list(lines)} if 0 < len(lines) <= left:
                    left -= len(lines)
                    for line in lines:
                        yield self._line(**fitting(line, self._line_shape))
                case _:
                    raise ValueError("makes no sense")
        raise ConnectionResetError


@dataclass(frozen=True, slots=True)
class Found:
    """A connection to the fetch that serves a path."""

    # The control socket.
    connection: socket.socket
    # The destination of the fetch, absolute.
    root: str
    # The path below `root`.
    path: str
    # It is a regular file.
    is_file: bool = False
    # The fetch is another user's: neither its answers nor their end are to be relied on.
    is_foreign: bool = False

    def ask(self, request: Request, line: type[LineT], counts: Sequence[str] = ()) -> Answer[LineT]:
        """The answer to a request; to iterate over it sends the request. `line`: the dataclass of its lines; `counts`: the names of its counts."""
        return Answer(self, request, line, counts)

    def packets(self, request: Request) -> Iterator[bytes]:
        """Send the request; yields the packets of the answer. Raises ConnectionError, and TimeoutError after ten minutes without a packet. The
        whole answer of another user's fetch has only these ten minutes."""
        end = time.monotonic() + _PATIENCE
        with self.connection as connection:
            connection.settimeout(_PATIENCE)
            connection.send(encode_request(request))
            while packet := connection.recv(LARGEST_REPLY):
                yield packet
                if self.is_foreign:
                    connection.settimeout(max(end - time.monotonic(), 1e-3))


def find(path: str, user: int | None = None) -> Found | None:
    """The fetch that serves `path`; None if there is none. The last component is not followed. `user`: the user whose fetch is asked; None: this
    user's or root's, and for root only root's.

    Raises OSError ENOENT if `path` does not exist, EXDEV if it lies on a mount of another user.
    """
    owners = (0, os.getuid()) if user is None else (user,)
    fd, way = follow(path, last=False)
    os.close(fd)
    end = way[-1][0]
    for root, status in reversed(way):
        if not stat.S_ISDIR(status.st_mode):
            continue
        connection = control_socket.connect_to(_name_of(status), owners)
        if connection is not None:
            below = end[len(root) :].lstrip("/")
            is_file = stat.S_ISREG(way[-1][1].st_mode)
            return Found(connection, root, below, is_file, user not in (None, 0, os.getuid()))
    return None


def found(path: str, user: int | None = None) -> Found:
    """As find(), but raises OSError ENOTCONN with the fix if there is none."""
    fetch = find(path, user)
    if fetch is None:
        whose = (
            "your fusehsm fetch processes" if user is None else f"the fusehsm fetch processes of user {user}"
        )
        fix = "start one: fusehsm fetch STORE DST"
        if user is None and os.getuid() == 0:
            fix += "; or ask another user's with --user"
        raise OSError(errno.ENOTCONN, f"none of {whose} serves it; {fix}", path)
    return fetch


def user_number(name: str | None) -> int | None:
    """The number of a user, given by name or number; None for None. Raises ValueError if there is no such user."""
    if name is None:
        return None
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        if name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) < _NO_USER:
            return int(name)
    raise ValueError(f"--user {name}: no such user; give a name or a number")
