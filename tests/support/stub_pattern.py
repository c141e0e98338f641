"""Stubs whose true content is known, and a listener's answer that fills exactly what it is asked for."""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from fusehsm.events import Event

PAGE = 4096


def content(seed: int, size: int) -> bytes:
    """Bytes that differ from file to file and from place to place, none of them zero."""
    return random.Random(seed).randbytes(size).replace(b"\0", b"\1")


@dataclass(frozen=True, slots=True)
class Stub:
    """A file without content: `path` for accessors, `backing` for its keeper, `content` the bytes that every accessor must see."""

    path: str
    backing: Path
    content: bytes
    seed: int = 0

    @property
    def size(self) -> int:
        return len(self.content)


@dataclass(slots=True)
class Filler:
    """Fills what each event names, never a byte more, and then allows it; `error` denies instead. Counts its events."""

    contents: dict[int, bytes] = field(default_factory=dict)  # by inode number of the backing
    events: int = 0
    error: int = 0

    def knows(self, stub: Stub) -> None:
        self.contents[stub.backing.stat().st_ino] = stub.content

    def fill(self, event: Event) -> None:
        if event.offset is None or event.count is None:
            return
        status = os.fstat(event.fd)
        true = self.contents.get(status.st_ino, b"")
        end = min(event.offset + event.count, status.st_size, len(true))
        if event.offset < end:
            os.pwrite(event.fd, true[event.offset : end], event.offset)

    def __call__(self, event: Event) -> int:
        self.events += 1
        if self.error:
            return self.error
        self.fill(event)
        return 0


def make_stub(directory: Path, path: Path, name: str, seed: int, size: int) -> Stub:
    """A new file of `size` zeros that takes no room."""
    stub = Stub(str(path / name), directory / name, content(seed, size), seed)
    with stub.backing.open("xb") as file:
        file.truncate(size)
    return stub


def evict(stub: Stub) -> None:
    """Take the content away again, behind the mount's back; the size stays."""
    os.truncate(stub.backing, 0)
    os.truncate(stub.backing, stub.size)
