"""What a running `fusehsm fetch` is asked, and what it answers: JSON, one value a packet."""

import json
import os
from dataclasses import dataclass
from typing import Any, Final

from fusehsm.control.requests import RequestCodec

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
_CODEC: Final[RequestCodec[Request]] = RequestCodec(
    "this fetch", {"evict": Evict, "list": List, "pin": Pin}, largest=1 << 62
)
encode_request: Final = _CODEC.encode
decode_request: Final = _CODEC.decode


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
