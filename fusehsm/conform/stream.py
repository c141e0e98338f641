"""What a workload leaves: the events that its listeners read and what its calls returned, as plain values that can be compared and kept.

What differs from run to run is taken out: descriptors' numbers are 0 (or the error they are), processes are named by their part in it.
"""

import hashlib
import itertools
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusehsm.fanotify.abi import (
    EVENT_FD_OFFSET,
    EVENT_PID_OFFSET,
    EVENT_PIDFD_OFFSET,
    Dialect,
    RawEvent,
    has_pidfd,
    mask_names,
)

_INT = struct.Struct("=i")
UNFINISHED = "the workload"  # who does what is not its script's, but its early end
_LONGEST = 32  # bytes or characters of a result that are shown as they are


@dataclass(frozen=True, slots=True)
class Heard:
    """One event as a listener read it.

    `group`: the listener's name; `names` without FAN_; `path` relative to the workload's directory; `offset` and `count` in bytes, None
    without a range record; `record`: its bytes in hexadecimal, numbers taken out; `answer`: "ALLOW", "DENY", an errno's name, "HELD" or "";
    `pidfd`: whom the event's pidfd refers to, "" without one.
    """

    group: str
    names: str
    by: str
    path: str
    offset: int | None
    count: int | None
    record: str
    answer: str
    pidfd: str = ""

    def line(self) -> str:
        """For people: one line."""
        extent = "" if self.offset is None else f" {self.offset}+{self.count}"
        who = self.by if not self.pidfd else f"{self.by} (pidfd of {self.pidfd})"
        return f"{self.group} hears {self.names}{extent} of {self.path} by {who}: {self.answer or 'no answer wanted'} [{self.record}]"


@dataclass(frozen=True, slots=True)
class Did:
    """What came of a call: `result` is what it returned, or the name of its errno."""

    who: str
    what: str
    result: str

    def line(self) -> str:
        """For people: one line."""
        return f"{self.who}: {self.what} = {self.result}"


Entry = Heard | Did
Stream = list[Entry]


def results(stream: Stream) -> list[str]:
    """What came of the calls alone."""
    return [entry.line() for entry in stream if isinstance(entry, Did)]


def ended_early(stream: Stream) -> bool:
    """Whether something kept the workload from its end."""
    return any(isinstance(entry, Did) and entry.who == UNFINISHED for entry in stream)


def lines(stream: Stream) -> list[str]:
    """A stream for people, and for comparing."""
    return [entry.line() for entry in stream]


def to_json(stream: Stream) -> list[dict[str, Any]]:
    """A stream as JSON has it; None and "" are left out."""
    return [
        {name: value for name, value in asdict(entry).items() if value not in (None, "")} for entry in stream
    ]


def from_json(entries: list[dict[str, Any]]) -> Stream:
    """The stream that to_json() wrote. Raises TypeError for what it did not write."""
    empty = {"offset": None, "count": None, "answer": "", "path": "", "pidfd": ""}
    return [Heard(**{**empty, **entry}) if "names" in entry else Did(**entry) for entry in entries]


def heard(
    group: str, by: str, pidfd: str, path: str, event: RawEvent, data: bytes, dialect: Dialect
) -> Heard:
    """An event of the bytes `data`, decoded as `event`."""
    names = "|".join(mask_names(event.mask, dialect)) or f"{event.mask:#x}"
    return Heard(group, names, by, path, event.offset, event.count, _record(data), "", pidfd)


def _record(data: bytes) -> str:
    plain = bytearray(data)
    _INT.pack_into(plain, EVENT_PID_OFFSET, 0)
    _hide(plain, EVENT_FD_OFFSET)
    if has_pidfd(plain):
        _hide(plain, EVENT_PIDFD_OFFSET)
    return plain.hex()


def _hide(data: bytearray, place: int) -> None:
    """A descriptor's number; what is negative is an error, and stays."""
    if _INT.unpack_from(data, place)[0] >= 0:
        _INT.pack_into(data, place, 0)


def shown(value: object) -> str:
    """What a call returned, the same in every run; long data as its length and hash."""
    if isinstance(value, (bytes, bytearray)):
        data = bytes(value)
        if len(data) <= _LONGEST:
            return repr(data)
        return f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:12]}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{shown(name)}: {shown(each)}" for name, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(shown(each) for each in value)})"
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{len(value)} characters {hashlib.sha256(value.encode()).hexdigest()[:12]}"
    return repr(value)


# An order for what has none: where the real kernel's own is arbitrary, streams of two runs are to be equal all the same.


def arranged(stream: Stream, interchangeable: Sequence[str], *, at_once: bool) -> Stream:
    """The stream with the events of each stretch between results sorted (`at_once`), and where several `interchangeable` groups hear the same
    event one after the other, those in the order of their names. Everything else stays where it is."""
    found: Stream = []
    for is_heard, entries in itertools.groupby(stream, key=lambda entry: isinstance(entry, Heard)):
        stretch = list(entries)
        if is_heard and at_once:
            stretch.sort(key=Heard.line)  # type: ignore[arg-type]
        found += stretch
    if interchangeable:
        found = [
            entry
            for _, entries in itertools.groupby(found, key=_subject)
            for entry in _by_name(list(entries), interchangeable)
        ]
    return found


def _subject(entry: Entry) -> object:
    """What an event says, whoever hears it."""
    if not isinstance(entry, Heard):
        return entry
    return entry.names, entry.by, entry.path, entry.record


def _by_name(entries: Stream, interchangeable: Sequence[str]) -> Stream:
    """Those of the interchangeable groups change places among themselves; the others keep theirs."""
    moving = iter(sorted((e for e in entries if _group(e) in interchangeable), key=_group))
    return [next(moving) if _group(entry) in interchangeable else entry for entry in entries]


def _group(entry: Entry) -> str:
    return entry.group if isinstance(entry, Heard) else ""
