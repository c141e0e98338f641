"""What must be in a file: the user's operations applied to the store's content, in memory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

Change = Callable[[bytearray], None]


@dataclass
class Content:
    """One file. `versions`: what it may be by now, byte by byte any of them; more than one only after an operation of which it is not known
    whether it came about. `store`: the store's content. `doubtful`: names that it may have lost or got. `touched`: a user has changed it."""

    versions: list[bytearray]
    names: list[str] = field(default_factory=list)
    store: bytes = b""
    doubtful: set[str] = field(default_factory=set)
    touched: bool = False
    history: list[str] = field(default_factory=list)

    def begin(self, change: Change) -> list[bytearray]:
        """An operation begins, and may come about or not: the versions afterwards, if it does."""
        after = [bytearray(version) for version in self.versions]
        for version in after:
            change(version)
        self.versions = _distinct([*self.versions, *after])
        self.touched = True
        return after

    def grow_unheard(self, before: list[bytearray], after: list[bytearray]) -> None:
        """It became longer in the moment of a kill, when nobody took note of a truncation before: that is forgotten, and the store's content is there
        again. The known limit of what records can tell."""
        for old, new in product(before, after):
            if len(old) < len(new):
                again = bytearray(new)
                for index in range(len(old), min(len(new), len(self.store))):
                    again[index] = again[index] or self.store[index]
                self.versions.append(again)
        self.versions = _distinct(self.versions)

    @property
    def size(self) -> int:
        """The smallest that it may have."""
        return min(map(len, self.versions))

    def wrong(self, offset: int, data: bytes) -> int | None:
        """The offset of the first byte of what was read at `offset` that it cannot be; None if all is right."""
        end = offset + len(data)
        if any(version[offset:end] == data for version in self.versions):
            return None
        for index, byte in enumerate(data, offset):
            if not any(byte == (version[index] if index < len(version) else 0) for version in self.versions):
                return index
        return None

    def may_have_size(self, size: int) -> bool:
        """Whether it can be so long."""
        return min(map(len, self.versions)) <= size <= max(map(len, self.versions))


def write(offset: int, data: bytes) -> Change:
    def change(content: bytearray) -> None:
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data

    return change


def append(data: bytes) -> Change:
    def change(content: bytearray) -> None:
        content.extend(data)

    return change


def truncate(size: int) -> Change:
    def change(content: bytearray) -> None:
        content.extend(bytes(max(size - len(content), 0)))
        del content[size:]

    return change


def punch(offset: int, end: int) -> Change:
    def change(content: bytearray) -> None:
        stop = min(end, len(content))
        if offset < stop:
            content[offset:stop] = bytes(stop - offset)

    return change


def _distinct(versions: list[bytearray]) -> list[bytearray]:
    found: list[bytearray] = []
    for version in versions:
        if version not in found:
            found.append(version)
    return found
