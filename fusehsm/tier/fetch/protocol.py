"""The requests to a running `fusehsm fetch` and its answers: JSON, one value a packet."""

import json
import os
from dataclasses import dataclass
from typing import Any, Final

from fusehsm.control.protocol import RequestCodec

LARGEST_REQUEST: Final = 1 << 16  # bytes
LARGEST_REPLY: Final = 1 << 17
MOST_AT_ONCE: Final = (
    1 << 16
)  # bytes of a list in one packet; with any path, one line takes less than half of it


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
