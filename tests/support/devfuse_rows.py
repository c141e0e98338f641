"""Calls and their events that the devfuse engine alone hears or tells exactly; what both engines do is among the workloads of `fusehsm conform`."""

import errno
import os
from dataclasses import dataclass, replace

from tests.support.devfuse_acts import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, act
from tests.support.kernel_and_mount import (
    CONTENT,
    KNOWN_DIVERGENCES,
    MIB,
    PAGE,
    SIZE,
    A,
    Expected,
    Failed,
    O,
    P,
    Row,
    bytes_at,
)

OTHER = O.of("other")


# fallocate(2)


@dataclass(frozen=True, slots=True)
class Allocation:
    """One fallocate(2) of `length` bytes at `offset`: the event's range, the file's size then, and what of it is zeros then.

    `blocks`: whether the file must have more of them on disk than before, fewer, or (0) that does not matter.
    """

    name: str
    mode: int
    offset: int
    length: int
    asked: tuple[int, int]
    size: int = SIZE
    zeros: tuple[int, int] = (0, 0)
    blocks: int = 0

    @property
    def content(self) -> bytes:
        """What the file holds then."""
        content = bytearray(CONTENT[:SIZE].ljust(self.size, b"\0"))
        start, end = self.zeros
        content[start:end] = bytes(end - start)
        return bytes(content)


ALLOCATIONS = [
    Allocation("within", 0, 5000, 100, (PAGE, PAGE)),
    Allocation("beyond the end", 0, 5000, 95000, (PAGE, 24 * PAGE), size=100000, blocks=1),
    Allocation("far beyond the end", 0, MIB, 100, (MIB, PAGE), size=MIB + 100, blocks=1),
    Allocation("large", 0, 100, 3 * MIB, (0, 3 * MIB + PAGE), size=3 * MIB + 100, blocks=1),
    Allocation("keeping the size", KEEP_SIZE, 5000, 95000, (PAGE, 24 * PAGE), blocks=1),
    Allocation(
        "a hole", PUNCH_HOLE | KEEP_SIZE, PAGE, 2 * PAGE, (PAGE, 2 * PAGE), zeros=(PAGE, 3 * PAGE), blocks=-1
    ),
    Allocation(
        "a hole in odd places", PUNCH_HOLE | KEEP_SIZE, 5000, 9000, (PAGE, 3 * PAGE), zeros=(5000, 14000)
    ),
    Allocation(
        "a hole to beyond the end",
        PUNCH_HOLE | KEEP_SIZE,
        2 * PAGE,
        MIB,
        (2 * PAGE, MIB),
        zeros=(2 * PAGE, SIZE),
        blocks=-1,
    ),
    Allocation("zeros", ZERO_RANGE, 5000, 9000, (PAGE, 3 * PAGE), zeros=(5000, 14000)),
    Allocation(
        "zeros beyond the end",
        ZERO_RANGE,
        19000,
        9000,
        (4 * PAGE, 3 * PAGE),
        size=28000,
        zeros=(19000, 28000),
    ),
    Allocation(
        "zeros, keeping the size",
        ZERO_RANGE | KEEP_SIZE,
        19000,
        9000,
        (4 * PAGE, 3 * PAGE),
        zeros=(19000, SIZE),
    ),
]


def refused(name: str, number: int, *arguments: int) -> Row:
    """A fallocate(2) that fails with that errno."""
    return Row(f"fallocate {name}", act, (O,), Failed(number), ("fallocate", *arguments))


REFUSED_ALLOCATIONS = [
    refused("punching without keeping the size", errno.EOPNOTSUPP, PUNCH_HOLE, 0, PAGE),
    refused("of an unknown mode", errno.EOPNOTSUPP, 0x1000, 0, PAGE),
    refused("of nothing", errno.EINVAL, 0, 0, 0),
    refused("of less than nothing", errno.EINVAL, 0, 0, -1),
    refused("at a negative place", errno.EINVAL, 0, -1, PAGE),
    replace(
        refused("of more than can be", errno.EFBIG, 0, 2**63 - 10, 100),
        events=(O, P(2**63 - PAGE, 2 * PAGE)),
        divergence="calls that fail",
        emulated=(O,),
        emulated_result=Failed(errno.EFBIG),
    ),
    refused("of what is open for reading", errno.EBADF, 0, 0, PAGE, os.O_RDONLY),
]


# copy_file_range(2)


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy_file_range(2) of `count` bytes to the file of that name; None is the position, which is 1000.

    `asked`: the events' ranges of the source and the target, None where there is none. Where the emulator makes no events at all, `divergence`
    says why.
    """

    name: str
    count: int
    source_offset: int | None
    target_offset: int | None
    copied: int
    asked: tuple[tuple[int, int] | None, tuple[int, int] | None]
    target: str = "other"
    size: int = SIZE
    divergence: str = ""

    def __post_init__(self) -> None:
        assert not self.divergence or self.divergence in KNOWN_DIVERGENCES, self.divergence

    def events(self, watched: tuple[str, ...], *, is_kernel: bool) -> list[Expected]:
        """What a listener hears whose marks are on the files of those names."""
        source, target = self.asked
        silent = bool(self.divergence) and not is_kernel
        events = [O, O.of(self.target)]
        if source is not None and not silent:
            events += [P(*source), A]
        if target is not None and not silent:
            events.append(P(*target, self.target))
        return [event for event in events if event.file in watched]

    def content(self, target: bytes) -> bytes:
        """What the target holds then, having held that."""
        start = 1000 if self.source_offset is None else self.source_offset
        data = CONTENT[: self.size][start : start + self.copied]
        place = 1000 if self.target_offset is None else self.target_offset
        return target[:place].ljust(place, b"\0") + data + target[place + len(data) :]


COPIES = [
    Copy("in odd places", 5000, 5000, 100, 5000, ((PAGE, 2 * PAGE), (0, 2 * PAGE))),
    Copy("of whole pages", 2 * PAGE, PAGE, PAGE, 2 * PAGE, ((PAGE, 2 * PAGE), (PAGE, 2 * PAGE))),
    Copy("at the positions", 5000, None, None, 5000, ((0, 2 * PAGE), (0, 2 * PAGE))),
    Copy("from the position", 5000, None, 9000, 5000, ((0, 2 * PAGE), (2 * PAGE, 2 * PAGE))),
    Copy("to the position", 5000, 9000, None, 5000, ((2 * PAGE, 2 * PAGE), (0, 2 * PAGE))),
    Copy("to the end", 5000, 19000, 0, 1000, ((4 * PAGE, PAGE), (0, PAGE))),
    Copy("beyond the target's end", 5000, 0, 50000, 5000, ((0, 2 * PAGE), (12 * PAGE, 2 * PAGE))),
    Copy("large", 3 * MIB, 10, 5, 3 * MIB, ((0, 3 * MIB + PAGE), (0, 3 * MIB + PAGE)), size=5 * MIB),
    Copy("within a file", 100, 9000, 100, 100, ((2 * PAGE, PAGE), (0, PAGE)), "file"),
    Copy(
        "from beyond the end",
        5000,
        SIZE,
        100,
        0,
        ((4 * PAGE, PAGE), (0, PAGE)),
        divergence="empty reads and writes",
    ),
    Copy("of nothing", 0, 0, 0, 0, ((0, 0), (0, 0)), divergence="empty reads and writes"),
]

REFUSED_COPIES = [
    Row("copy over itself", act, (O, O), Failed(errno.EINVAL), ("copy", "file", 5000, 0, 4000)),
    Row(
        "copy to what is open for reading",
        act,
        (O, OTHER),
        Failed(errno.EBADF),
        ("copy", "other", 5000, 0, 0, os.O_RDONLY),
    ),
    Row(
        "copy to what is open to append",
        act,
        (O, OTHER),
        Failed(errno.EBADF),
        ("copy", "other", 5000, 0, 0, os.O_RDWR | os.O_APPEND),
    ),
]

# Copies by way of the page cache, again and again: the same ones, and those that go on where the last one ended.
AGAIN = [
    Row("sendfile again", act, (O, *(P(PAGE, PAGE), A) * 5), CONTENT[5000:5100] * 5, ("send_again", 5)),
    Row("splice again", act, (O, *(P(PAGE, PAGE), A) * 5), CONTENT[5000:5100] * 5, ("splice_again", 5)),
    Row(
        "sendfile on",
        act,
        (O, *(P(0, PAGE), A) * 2, P(0, 2 * PAGE), A, P(PAGE, PAGE), A, P(PAGE, 2 * PAGE), A),
        CONTENT[1000:8500],
        ("send_on", 1000, 1500, 5),
    ),
    Row(
        "sendfile on by whole pages",
        act,
        (O, *(event for page in range(4) for event in (P(page * PAGE, PAGE), A))),
        CONTENT[: 4 * PAGE],
        ("send_on", 0, PAGE, 4),
    ),
    Row(
        "large sendfile again",
        act,
        (O, *(P(PAGE, MIB + PAGE), A) * 3),
        [CONTENT[5000 : 5000 + MIB]] * 3,
        ("send_much_again", MIB, 3),
        size=2 * MIB,
    ),
    Row(
        "large sendfile to the end, again",
        act,
        (O, *(P(PAGE, 2 * MIB + PAGE), A) * 3),
        [CONTENT[5000 : 2 * MIB]] * 3,
        ("send_much_again", 2 * MIB, 3),
        size=2 * MIB,
    ),
]


# Shared mappings


SHARED = [
    Row(
        "map shared, touch all",
        act,
        (O, P(0, 5 * PAGE)),
        bytes_at(0, 5000, 9000, 19999),
        ("share_reading", 0, SIZE, [0, 5000, 9000, 19999]),
    ),
    Row(
        "map shared at an offset",
        act,
        (O, P(PAGE, 2 * PAGE)),
        bytes_at(PAGE, 3 * PAGE - 1),
        ("share_reading", PAGE, 2 * PAGE, [0, 2 * PAGE - 1]),
    ),
    Row(
        "map shared and write",
        act,
        (O, P(PAGE, 2 * PAGE)),
        b"new" + CONTENT[PAGE + 103 : PAGE + 105],
        ("share_writing", 100, b"new"),
    ),
    Row("map shared, write and sync", act, (O, P(0, 2 * PAGE)), None, ("share_writing_blindly", b"new")),
    Row(
        "map shared, read and write",
        act,
        (O, P(0, 2 * PAGE), P(PAGE, PAGE), A, P(PAGE, PAGE)),
        (b"map", b"call"),
        ("share_and_call",),
    ),
    Row(
        "map shared in two processes",
        act,
        (O, P(0, 2 * PAGE), O, P(0, 2 * PAGE)),
        b"HELLO",
        ("share_with_child",),
    ),
]
# What the file of each holds then: (place, bytes).
SHARED_WRITES = {
    "map shared and write": {PAGE + 100: b"new"},
    "map shared, write and sync": {100: b"new"},
    "map shared, read and write": {5000: b"map", 6000: b"call"},
    "map shared in two processes": {0: b"hello", 10: b"HELLO"},
}
