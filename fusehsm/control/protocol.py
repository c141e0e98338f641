"""The language of the control socket (SOCK_SEQPACKET): what other processes and a mount say to each other.

A connection carries requests and their replies, as JSON, one at a time. The reply to a hello brings the event socket along, which carries
nothing but events one way and feedback (answers and credit) the other, so that it is readable exactly when events wait.

An event travels as fanotify's own bytes, its file's descriptor beside it as SCM_RIGHTS; the record's fd field holds the server's number of
the event, by which it is answered, until the receiver puts the descriptor's number there. The accessor's path follows the record, unless
it is longer than LARGEST_PATH.
"""

import errno
import json
import struct
from dataclasses import dataclass
from typing import Any, Final

from fusehsm.control.requests import RequestCodec

VERSION: Final = 1
CREDIT: Final = 64  # events that may lie unread in a client's event socket

LARGEST_REQUEST: Final = 16 * 1024  # bytes
LARGEST_REPLY_PART: Final = 32 * 1024
LARGEST_PATH: Final = 32 * 1024
LARGEST_EVENT_MESSAGE: Final = LARGEST_PATH + 1024

_MORE, _LAST = b"+", b"."

_FEEDBACK = struct.Struct("=Ii I")
FEEDBACK_SIZE: Final = _FEEDBACK.size
_EVENT_LENGTH = struct.Struct("=I")


# What a client says on the event socket: ANSWER (event number, errno or 0) or MORE_CREDIT (0, number of events read meanwhile). Plain
# numbers, because every event comes by here.
ANSWER: Final = 1
MORE_CREDIT: Final = 2


def encode_feedback(kind: int, event_number: int, value: int) -> bytes:
    """One message on the event socket, client to server."""
    return _FEEDBACK.pack(kind, event_number, value)


def decode_feedback(data: bytes) -> tuple[int, int, int]:
    """The reverse; ValueError for what is no feedback."""
    try:
        kind, event_number, value = _FEEDBACK.unpack(data)
    except struct.error:
        raise ValueError(f"feedback of {len(data)} bytes") from None
    if kind not in (ANSWER, MORE_CREDIT):
        raise ValueError(f"feedback of kind {kind}")
    return kind, event_number, value


def event_message_split(message: bytearray | bytes) -> int:
    """Where in a message the event ends and the path begins."""
    (length,) = _EVENT_LENGTH.unpack_from(message)
    return int(length)


@dataclass(frozen=True, slots=True)
class Hello:
    """Make a group: fanotify_init(2)'s flags, and a dialect's name or None for the mount's. Answered with Welcome and the event socket.

    A pipe's writing end that comes along is a doorbell: after every event that has been sent a byte is written there.
    """

    version: int
    flags: int
    event_f_flags: int
    dialect: str | None


@dataclass(frozen=True, slots=True)
class Welcome:
    """The reply to Hello: the group's dialect, and the mount point that its paths begin with."""

    dialect: str
    destination: str


@dataclass(frozen=True, slots=True)
class MarkRequest:
    """fanotify_mark(2) on a node that the client has looked up itself (st_dev, st_ino), on the mount or, as through an event's descriptor, on
    the backing; inode None with FAN_MARK_FLUSH."""

    flags: int
    mask: int
    major: int
    minor: int
    inode: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """What the mount and its listeners are doing; answered with gate.status()."""


@dataclass(frozen=True, slots=True)
class Release:
    """Let go what --unattended hold has parked; answered with {"released": count}."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Drop what the kernel has cached of a node that the client has looked up itself (st_dev, st_ino)."""

    major: int
    minor: int
    inode: int


@dataclass(frozen=True, slots=True)
class Map:
    """mmap(2) of an open file whose accessor (thread `tid`) waits meanwhile; answered when its event is, with the denial's errno.

    The node as the client has looked it up (st_dev, st_ino); `offset` and `length` in bytes as in the call, `flags` of the open file,
    `writable`: a shared and writable mapping.
    """

    major: int
    minor: int
    inode: int
    offset: int
    length: int
    flags: int
    tid: int
    writable: int


@dataclass(frozen=True, slots=True)
class Backing:
    """A descriptor of the backing's root directory, which a mount in place has covered; it comes with the reply."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Lease a file that the client has looked up itself (st_dev, st_ino), as fcntl(2) does with F_SETLEASE and F_WRLCK: nobody has it open
    or mapped, and who opens or truncates it waits. Answered with a descriptor of its content on the backing, once nothing of it is cached.

    EAGAIN while somebody has it open, EINVAL where it is no regular file, EBUSY for a second one on a connection. It ends with Unlease or with
    the connection, and is broken when somebody has waited for fs.lease-break-time.
    """

    major: int
    minor: int
    inode: int


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """Whether somebody waits for this connection's lease to end, or has until it was broken: {"wanted": bool}. EBADF where there is none."""


@dataclass(frozen=True, slots=True)
class Unlease:
    """Give this connection's lease back: what is cached by then is dropped, and who waits goes on. ETIMEDOUT when it was broken, EBADF
    where there is none."""


Request = Hello | MarkRequest | Status | Release | Drop | Map | Lease | LeaseStatus | Unlease | Backing
_CODEC: Final[RequestCodec[Request]] = RequestCodec(
    "this server",
    {
        "hello": Hello,
        "mark": MarkRequest,
        "status": Status,
        "release": Release,
        "drop": Drop,
        "map": Map,
        "backing": Backing,
        "lease": Lease,
        "lease-status": LeaseStatus,
        "unlease": Unlease,
    },
    largest=(1 << 64) - 1,
)
encode_request: Final = _CODEC.encode
decode_request: Final = _CODEC.decode


def encode_result(result: dict[str, Any]) -> list[bytes]:
    """The messages that make up a reply to a request that succeeded."""
    return _parts({"result": result})


def encode_failure(error: OSError) -> list[bytes]:
    """The messages that make up a reply to a request that failed."""
    return _parts({"errno": error.errno or errno.EIO, "message": error.strerror or str(error)})


def _parts(reply: dict[str, Any]) -> list[bytes]:
    data = json.dumps(reply).encode()
    parts = [data[start : start + LARGEST_REPLY_PART] for start in range(0, len(data), LARGEST_REPLY_PART)]
    return [_MORE + part for part in parts[:-1]] + [_LAST + parts[-1]]


def is_last_part(part: bytes) -> bool:
    """Whether a reply is complete with this message. ValueError for what is no part of a reply."""
    if part[:1] not in (_MORE, _LAST):
        raise ValueError("not a part of a reply")
    return part[:1] == _LAST


def decode_reply(parts: list[bytes]) -> dict[str, Any]:
    """A reply's result; raises the OSError that it tells of, ValueError for rubbish."""
    reply = json.loads(b"".join(part[1:] for part in parts))
    match reply:
        case {"errno": int(number), "message": str(message)}:
            raise OSError(number, message)
        case {"result": dict(result)}:
            return result
    raise ValueError("a reply without a result")
