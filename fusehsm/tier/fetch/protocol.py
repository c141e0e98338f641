"""What a running `fusehsm fetch` is asked, and what it answers: JSON, one value a packet."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Any, Final

LARGEST_REQUEST: Final = 1 << 16  # bytes
LARGEST_REPLY: Final = 1 << 17
MOST_AT_ONCE: Final = (
    1 << 16
)  # bytes of a list in one packet; one line is less than half of it, whatever is in its path


@dataclass(frozen=True, slots=True)
class Evict:
    """Take the content away of what is at or below `path` (relative to the destination, "": all): of files that have not been used for `older_than`
    seconds if that is given, the least recently used first until `free` bytes have become free if that is given. Answered with a line for each file
    that was wanted and could not be, and the counts."""

    path: str
    older_than: float | None = None
    free: int | None = None


@dataclass(frozen=True, slots=True)
class List:
    """Answered with a line for each regular file at or below `path`."""

    path: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Let what is at or below `path` stay here, or not any more. Answered with the count of files that were changed."""

    path: str
    pinned: bool


Request = Evict | List | Pin
_REQUESTS: Final[dict[str, type[Request]]] = {"evict": Evict, "list": List, "pin": Pin}
_MOST: Final = 1 << 62
_NAMES: Final = {kind: name for name, kind in _REQUESTS.items()}
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "path": (str,),
    "older_than": (float, int, type(None)),
    "free": (int, type(None)),
    "pinned": (bool,),
}


def encode_request(request: Request) -> bytes:
    """A request's packet."""
    return json.dumps({"request": _NAMES[type(request)], **asdict(request)}).encode()


def decode_request(data: bytes) -> Request:
    """The reverse; ValueError, in words for its sender, for anything else."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("the request is not JSON") from None
    name = fields.pop("request", None) if isinstance(fields, dict) else None
    kind = _REQUESTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"unknown request; this fetch knows {', '.join(_REQUESTS)}")
    if fields.keys() != set(kind.__dataclass_fields__):
        raise ValueError(f"{name}: its fields are {', '.join(kind.__dataclass_fields__)}")
    for field, value in fields.items():
        if type(value) not in _TYPES[field] or (isinstance(value, (int, float)) and not 0 <= value <= _MOST):
            raise ValueError(f"{field}: bad value")
    return kind(**fields)


def encode_lines(lines: list[dict[str, Any]]) -> bytes:
    """A packet with a part of a list; another one follows."""
    return json.dumps({"lines": lines}).encode()


def encode_result(result: dict[str, Any]) -> bytes:
    """The last packet."""
    return json.dumps({"result": result}).encode()


def encode_failure(error: OSError) -> bytes:
    """The last packet, if it went wrong."""
    message = error.strerror or str(error)
    if error.filename:
        message = f"{os.fsdecode(error.filename)}: {message}"
    return json.dumps({"errno": error.errno or 5, "message": message}).encode()
