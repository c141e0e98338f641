"""The stream of a workload: the events that its listeners read and the results of its calls, as plain values to compare and to save.

Values that differ from run to run are replaced: a descriptor's number by 0 (an error stays), a process by its name in the workload.

A recording keeps streams in a file: of a real kernel, for machines without one, and of the emulator for workloads with a divergence.
"""

import datetime
import hashlib
import itertools
import json
import os
import platform
import struct
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
UNFINISHED = "the workload"  # the `who` of the entry that tells of an early end
_LONGEST = 32  # bytes or characters of a result that are shown as they are
SHIPPED = Path(__file__).with_name("recorded") / "kernel.json"


@dataclass(frozen=True, slots=True)
class Heard:
    """One event as a listener read it."""

    #: The listener's name.
    group: str
    #: The names of the event's bits without FAN_, separated by |.
    names: str
    #: The accessor's name in the workload.
    by: str
    #: The path relative to the workload's directory.
    path: str
    #: The start of the range in bytes; None without a range record.
    offset: int | None
    #: The length of the range in bytes; None without a range record.
    count: int | None
    #: The event's bytes in hexadecimal, with the numbers of descriptors and processes replaced.
    record: str
    #: "ALLOW", "DENY", an errno's name, "HELD", or "" for an event that needs no answer.
    answer: str
    #: The name of the process of the event's pidfd; "" without a pidfd.
    pidfd: str = ""

    def line(self) -> str:
        """For people: one line."""
        extent = "" if self.offset is None else f" {self.offset}+{self.count}"
        who = self.by if not self.pidfd else f"{self.by} (pidfd of {self.pidfd})"
        return f"{self.group} hears {self.names}{extent} of {self.path} by {who}: {self.answer or 'no answer wanted'} [{self.record}]"


@dataclass(frozen=True, slots=True)
class Did:
    """The result of a call."""

    #: The name of the process in the workload.
    who: str
    #: The call.
    what: str
    #: The returned value, or the name of the errno.
    result: str

    def line(self) -> str:
        """For people: one line."""
        return f"{self.who}: {self.what} = {self.result}"


Entry = Heard | Did
Stream = list[Entry]


def results(stream: Stream) -> list[str]:
    """The results of the calls, without the events."""
    return [entry.line() for entry in stream if isinstance(entry, Did)]


def ended_early(stream: Stream) -> bool:
    """Whether the workload stopped before its end."""
    return any(isinstance(entry, Did) and entry.who == UNFINISHED for entry in stream)


def lines(stream: Stream) -> list[str]:
    """The lines of a stream, to read and to compare."""
    return [entry.line() for entry in stream]


def to_json(stream: Stream) -> list[dict[str, Any]]:
    """A stream as values for JSON; None and "" are left out."""
    return [
        {name: value for name, value in asdict(entry).items() if value not in (None, "")} for entry in stream
    ]


def from_json(entries: list[dict[str, Any]]) -> Stream:
    """The stream that to_json() wrote. Raises TypeError for values that it does not write."""
    empty = {"offset": None, "count": None, "answer": "", "path": "", "pidfd": ""}
    return [Heard(**{**empty, **entry}) if "names" in entry else Did(**entry) for entry in entries]


def heard(
    group: str, by: str, pidfd: str, path: str, event: RawEvent, data: bytes, dialect: Dialect
) -> Heard:
    """The entry for an event with the bytes `data`, decoded as `event`."""
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
    """Replace a descriptor's number by 0. A negative number is an error and stays."""
    if _INT.unpack_from(data, place)[0] >= 0:
        _INT.pack_into(data, place, 0)


def shown(value: object) -> str:
    """The text for a call's return value, the same in every run. Long data is given as its length and hash."""
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


# A fixed order for events whose order is arbitrary on the real kernel, so that the streams of two runs are equal.


def arranged(stream: Stream, interchangeable: Sequence[str], *, at_once: bool) -> Stream:
    """The stream in a fixed order.

    `at_once`: the events between one result and the next are sorted. If several `interchangeable` groups hear the same event one after
    the other, they are in the order of their names. All other entries keep their places.
    """
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
    """The part of an event that does not depend on the group that hears it."""
    if not isinstance(entry, Heard):
        return entry
    return entry.names, entry.by, entry.path, entry.record


def _by_name(entries: Stream, interchangeable: Sequence[str]) -> Stream:
    """Sort the entries of interchangeable groups among their places. All other entries keep their places."""
    moving = iter(sorted((e for e in entries if _group(e) in interchangeable), key=_group))
    return [next(moving) if _group(entry) in interchangeable else entry for entry in entries]


def _group(entry: Entry) -> str:
    return entry.group if isinstance(entry, Heard) else ""


def recorded_name(engine: str, key: str, before: tuple[int, int] | None = None) -> str:
    """The name of an emulator's stream in a recording: "ENGINE: KEY", or "ENGINE before MAJOR.MINOR: KEY" for kernels older than that."""
    older = "" if before is None else f" before {before[0]}.{before[1]}"
    return f"{engine}{older}: {key}"


@dataclass(slots=True)
class Recording:
    """All recorded streams."""

    #: The kernel's release, as `uname -r` prints it.
    release: str = ""
    #: The machine's architecture.
    machine: str = ""
    #: The day of the last recording, YYYY-MM-DD.
    date: str = ""
    #: The real kernel's streams, by the workload's key.
    kernel: dict[str, Stream] = field(default_factory=dict)
    #: The emulator's streams of workloads with a divergence, by recorded_name().
    emulated: dict[str, Stream] = field(default_factory=dict)
    #: The versions of the programs (Workload.programs) of a workload whose events they decide, by the workload's key.
    programs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path = SHIPPED) -> "Recording":
        """Read a recording. Raises OSError if the file cannot be read, and ValueError if it is not a recording."""
        try:
            found = json.loads(path.read_text())
            return cls(
                found["release"],
                found["machine"],
                found["date"],
                {key: from_json(entries) for key, entries in found["kernel"].items()},
                {key: from_json(entries) for key, entries in found["emulated"].items()},
                {key: tuple(versions) for key, versions in found["programs"].items()},
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a recording ({error}); make it anew with --record") from None

    def of_emulator(self, engine: str, key: str, limits: Iterable[tuple[int, int]]) -> Stream | None:
        """The emulator's recorded stream of a workload; None if there is none.

        `limits`: the kernels (major, minor) before which a divergence of the workload holds, as far as the running kernel is older. The stream
        recorded for the lowest of them counts; without one, that of new kernels.
        """
        names = [recorded_name(engine, key, limit) for limit in sorted(limits)]
        names.append(recorded_name(engine, key))
        return next((self.emulated[name] for name in names if name in self.emulated), None)

    def of_this_kernel(self) -> None:
        """Set release, machine and date to those of the running kernel and of today."""
        self.release, self.machine = os.uname().release, platform.machine()
        self.date = datetime.date.today().isoformat()

    def keep_only(self, keys: Collection[str]) -> None:
        """Remove the streams of workloads that do not exist any more."""
        self.kernel = {key: stream for key, stream in self.kernel.items() if key in keys}
        self.programs = {key: versions for key, versions in self.programs.items() if key in keys}
        self.emulated = {
            name: stream for name, stream in self.emulated.items() if name.partition(": ")[2] in keys
        }

    def save(self, path: Path = SHIPPED) -> None:
        """Write the file, one event a line, so that a diff is readable. The file is replaced as a whole or not at all."""
        path.parent.mkdir(exist_ok=True)
        head = {"release": self.release, "machine": self.machine, "date": self.date}
        parts = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        programs = [
            f"    {json.dumps(key)}: {json.dumps(each)}" for key, each in sorted(self.programs.items())
        ]
        parts += ['  "programs": {\n' + ",\n".join(programs) + "\n  }"]
        parts += [_streams("kernel", self.kernel), _streams("emulated", self.emulated)]
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write("{\n" + ",\n".join(parts) + "\n}\n")
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def _streams(name: str, streams: dict[str, Stream]) -> str:
    each = [f"    {json.dumps(key)}: {_entries(to_json(stream))}" for key, stream in sorted(streams.items())]
    return f'  "{name}": {{\n' + ",\n".join(each) + "\n  }"


def _entries(entries: list[dict[str, Any]]) -> str:
    return "[" + ",".join(f"\n      {json.dumps(entry)}" for entry in entries) + "\n    ]"
