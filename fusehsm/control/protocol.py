"""Defines the messages of the control socket (SOCK_SEQPACKET) between a mount and other processes.

A connection carries requests and their replies as JSON, one at a time. The reply to a hello brings the event socket. That socket carries only
events one way and feedback (answers and credit) the other way, so it is readable exactly when events wait.

An event travels as fanotify's own bytes, with its file's descriptor beside it (SCM_RIGHTS). The record's fd field holds the server's number of
the event, by which it is answered, until the receiver writes the descriptor's number there. The accessor's path follows the record, unless
it is longer than LARGEST_PATH.

RequestCodec checks and decodes requests, for every server that any process may write to. Each server has its own kinds of requests.
"""

import dataclasses
import errno
import json
import struct
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from fusehsm.control.shape import parsed

RequestT = TypeVar("RequestT")

VERSION: Final = 2
CREDIT: Final = 64  # the number of unread events that a client's event socket may hold

LARGEST_REQUEST: Final = 16 * 1024  # bytes
LARGEST_REPLY_PART: Final = 32 * 1024
LARGEST_PATH: Final = 32 * 1024
LARGEST_ERRNO: Final = 4095  # MAX_ERRNO of the kernel
LARGEST_EVENT_MESSAGE: Final = LARGEST_PATH + 1024

# Of a device number (include/linux/kdev_t.h). os.makedev() raises OverflowError for much larger numbers.
_LARGEST_MAJOR: Final = (1 << 12) - 1
_LARGEST_MINOR: Final = (1 << 20) - 1

_MORE, _LAST = b"+", b"."

_FEEDBACK = struct.Struct("=Ii I")
FEEDBACK_SIZE: Final = _FEEDBACK.size
_EVENT_LENGTH = struct.Struct("=I")


# A client's messages on the event socket: ANSWER (event number, errno or 0), MORE_CREDIT (0, number of events read meanwhile) or SYNC (0, number
# of events received since the beginning, modulo 2**32). They are plain numbers, because every event takes this way.
#
# SYNC asks whether the mount has events that it could not send for want of credit. If it has any, it sends them. If all that it ever sent has been
# received and no event is queued, it sends caught_up(). So a client that waits for the answer gets exactly one of the two.
ANSWER: Final = 1
MORE_CREDIT: Final = 2
SYNC: Final = 3
_COUNT: Final = struct.Struct("=I")
CAUGHT_UP_SIZE: Final = _COUNT.size  # bytes; every event is longer


class RequestCodec(Generic[RequestT]):
    """The kinds of requests of one server: dataclasses, by the names that they have in a message.

    A field is a str, int, bool or float, or one of these or None. Numbers are from 0 to `largest`, or to the field's own limit.
    """

    def __init__(
        self,
        server: str,
        kinds: Mapping[str, type[RequestT]],
        *,
        largest: int,
        limits: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """`server` is the server's name in the errors for a refused request. `limits`: the largest number of a field, by its name."""
        self._server = server
        self._kinds = dict(kinds)
        self._names = {kind: name for name, kind in kinds.items()}
        self._types = {kind: _field_types(kind) for kind in kinds.values()}
        self._largest = largest
        self._limits = dict(limits)

    def encode(self, request: RequestT) -> bytes:
        """The message for a request."""
        fields = {name: getattr(request, name) for name in self._types[type(request)]}
        return json.dumps({"request": self._names[type(request)], **fields}).encode()

    def decode(self, data: bytes) -> RequestT:
        """The request in a message. Raises ValueError, in words for the sender, for all that encode() does not make."""
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError("the request is not JSON") from None
        if not isinstance(fields, dict):
            raise ValueError("the request is not a JSON object")
        name = fields.pop("request", None)
        kind = self._kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            known = ", ".join(self._kinds)
            raise ValueError(f"unknown request {str(name)[:40]!r}; {self._server} knows {known}")
        types = self._types[kind]
        if fields.keys() != types.keys():
            raise ValueError(f"{name}: its fields are {', '.join(types) or 'none'}")
        for field, value in fields.items():
            is_number = isinstance(value, int | float)
            largest = self._limits.get(field, self._largest)
            if type(value) not in types[field] or (is_number and not 0 <= value <= largest):
                raise ValueError(f"{field}: bad value")
        return kind(**fields)


def _field_types(kind: type[Any]) -> dict[str, frozenset[type]]:
    """The types that json.loads() may return for each field."""
    types = {}
    for field in dataclasses.fields(kind):
        accepted = set(typing.get_args(field.type) or (field.type,))
        if float in accepted:
            accepted.add(int)  # JSON does not distinguish them
        types[field.name] = frozenset(accepted)
    return types


def encode_feedback(kind: int, event_number: int, value: int) -> bytes:
    """One message on the event socket, from client to server."""
    return _FEEDBACK.pack(kind, event_number, value)


def decode_feedback(data: bytes) -> tuple[int, int, int]:
    """Decode encode_feedback()'s message into (kind, event number, value). Raises ValueError for other bytes."""
    try:
        kind, event_number, value = _FEEDBACK.unpack(data)
    except struct.error:
        raise ValueError(f"feedback of {len(data)} bytes") from None
    if kind not in (ANSWER, MORE_CREDIT, SYNC):
        raise ValueError(f"feedback of kind {kind}")
    return kind, event_number, value


def count_of(events: int) -> int:
    """A number of events as SYNC and caught_up() carry it."""
    return events & 0xFFFF_FFFF


def caught_up(received: int) -> bytes:
    """The message on the event socket, from server to client, that no event is left after the first `received` (count_of())."""
    return _COUNT.pack(received)


def decode_caught_up(message: bytes | bytearray) -> int:
    """The number in caught_up()'s message."""
    return int(_COUNT.unpack_from(message)[0])


def event_message_split(message: bytearray | bytes) -> int:
    """The offset in a message, in bytes, where the event ends and the path begins."""
    (length,) = _EVENT_LENGTH.unpack_from(message)
    return int(length)


@dataclass(frozen=True, slots=True)
class Hello:
    """Make a group. The answer is Welcome and the event socket.

    A pipe's write end that comes along is a doorbell: the server writes a byte to it after every event that it has sent.
    """

    #: The version of this protocol.
    version: int
    #: fanotify_init(2)'s flags.
    flags: int
    #: fanotify_init(2)'s event_f_flags.
    event_f_flags: int
    #: The name of the group's dialect; None for the mount's.
    dialect: str | None


@dataclass(frozen=True, slots=True)
class Welcome:
    """The reply to Hello."""

    #: The name of the group's dialect.
    dialect: str
    #: The mount point, with which the group's paths begin.
    destination: str


@dataclass(frozen=True, slots=True)
class MarkRequest:
    """fanotify_mark(2) on a node that the client has looked up itself, on the mount, or on the backing through an event descriptor."""

    #: fanotify_mark(2)'s flags.
    flags: int
    #: fanotify_mark(2)'s mask.
    mask: int
    #: The node's st_dev, with `minor`.
    major: int
    minor: int
    #: The node's st_ino; None with FAN_MARK_FLUSH.
    inode: int | None
    #: With FAN_MARK_MOUNT: the number and the unique number of the mount by which the client has found the node; None for the mount that the
    #: daemon made, and for a unique number that is not known.
    mount: int | None = None
    unique_mount: int | None = None


@dataclass(frozen=True, slots=True)
class MarkBacking:
    """fanotify_mark(2) on a file that the client has looked up on the backing, which the kernel need not know through the mount yet."""

    #: fanotify_mark(2)'s flags.
    flags: int
    #: fanotify_mark(2)'s mask.
    mask: int
    #: The file's st_dev on the backing, with `minor`.
    major: int
    minor: int
    #: The file's st_ino on the backing.
    inode: int
    #: The file's path below the backing's root; undecodable bytes are surrogates. None if it has no name any more.
    path: str | None


@dataclass(frozen=True, slots=True)
class Reader:
    """A process reads the events of this connection's group: SEEK_DATA and SEEK_HOLE tell it where the group's files have holes.

    The client's own process needs no such request.
    """

    #: The process.
    pid: int
    #: When it started (linux/proc.py, started()). The server takes no later process of that number for it.
    started: int


@dataclass(frozen=True, slots=True)
class Status:
    """Tell the state of the mount and its listeners. The answer is gate.status()."""


@dataclass(frozen=True, slots=True)
class Release:
    """Let all accesses go on that --unattended hold has parked. The answer is {"released": count}."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Drop the kernel's cached pages of a node that the client has looked up itself."""

    #: The node's st_dev, with `minor`.
    major: int
    minor: int
    #: The node's st_ino.
    inode: int


@dataclass(frozen=True, slots=True)
class Map:
    """mmap(2) of an open file, whose accessor waits meanwhile. The reply comes when the event is answered; a denial is its errno."""

    #: The node's st_dev as the client has looked it up, with `minor`.
    major: int
    minor: int
    #: The node's st_ino.
    inode: int
    #: The call's offset, bytes.
    offset: int
    #: The call's length, bytes.
    length: int
    #: The open file's flags.
    flags: int
    #: The accessor's thread.
    tid: int
    #: The mapping is shared and writable.
    writable: int


@dataclass(frozen=True, slots=True)
class Backing:
    """Send a descriptor of the backing's root directory, which a mount in place covers. It comes with the reply."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Lease a file that the client has looked up itself, as fcntl(2) does with F_SETLEASE and F_WRLCK: no process has it open or mapped.

    A process that opens or truncates it waits. The answer is a descriptor of the file on the backing, sent when none of its pages is cached any
    more. EAGAIN if the file is open, EINVAL if it is no regular file, EBUSY for a second lease on a connection. The lease ends with Unlease or
    with the connection. It is broken when a process has waited for fs.lease-break-time.
    """

    #: The file's st_dev, with `minor`.
    major: int
    minor: int
    #: The file's st_ino.
    inode: int


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """Tell whether a process waits for this connection's lease to end, or has waited until it was broken: {"wanted": bool}.

    EBADF if there is no lease.
    """


@dataclass(frozen=True, slots=True)
class Unlease:
    """Give this connection's lease back. The pages that are cached by then are dropped, and waiting processes go on.

    ETIMEDOUT if the lease was broken, EBADF if there is none.
    """


Request = (
    Hello
    | MarkRequest
    | MarkBacking
    | Reader
    | Status
    | Release
    | Drop
    | Map
    | Lease
    | LeaseStatus
    | Unlease
    | Backing
)
_CODEC: Final[RequestCodec[Request]] = RequestCodec(
    "this server",
    {
        "hello": Hello,
        "mark": MarkRequest,
        "mark-backing": MarkBacking,
        "reader": Reader,
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
    limits={"major": _LARGEST_MAJOR, "minor": _LARGEST_MINOR},
)
encode_request: Final = _CODEC.encode
decode_request: Final = _CODEC.decode


def encode_result(result: dict[str, Any]) -> list[bytes]:
    """The messages of a reply to a request that succeeded."""
    return _parts({"result": result})


def encode_failure(error: OSError) -> list[bytes]:
    """The messages of a reply to a request that failed."""
    return _parts({"errno": error.errno or errno.EIO, "message": error.strerror or str(error)})


def _parts(reply: dict[str, Any]) -> list[bytes]:
    data = json.dumps(reply).encode()
    parts = [data[start : start + LARGEST_REPLY_PART] for start in range(0, len(data), LARGEST_REPLY_PART)]
    return [_MORE + part for part in parts[:-1]] + [_LAST + parts[-1]]


def is_last_part(part: bytes) -> bool:
    """Whether a reply is complete with this message. Raises ValueError for a message that is not part of a reply."""
    if part[:1] not in (_MORE, _LAST):
        raise ValueError("not a part of a reply")
    return part[:1] == _LAST


def decode_reply(parts: list[bytes]) -> dict[str, Any]:
    """A reply's result. Raises the OSError that the reply carries, ValueError for other bytes."""
    reply = parsed(b"".join(part[1:] for part in parts))
    match reply:
        case {"errno": int(number), "message": str(message)} if 0 < number <= LARGEST_ERRNO:
            raise OSError(number, message)
        case {"result": dict(result)}:
            return result
    raise ValueError("a reply without a result")
