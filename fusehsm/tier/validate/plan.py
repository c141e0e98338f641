"""The plan of validate: the ranges of a file to read, the way to read each, and the parts of the store to fetch. No I/O.

Only the seed, the path and the size of a file determine its reads. So they are the same in the next run, with any other files in the tree and any
number of files at a time.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from fusehsm.linux.syscalls import PAGE_SIZE

BY: Final = ("pread", "mmap", "both")
"""What --by chooses among. "both": the same range mapped and read, one after the other, the mapping still in place."""

LONGEST: Final = 256 << 10  # bytes of one random read
SMALL: Final = 64 << 10  # bytes; a file up to this size is also read as a whole
WINDOW: Final = 4 << 20  # bytes of the store that are fetched at once and kept in memory
_GAP: Final = 1 << 20  # bytes; to fetch a gap of this size costs less than another request


@dataclass(frozen=True, slots=True)
class Read:
    """One range, which may extend beyond the end of the file."""

    # "pread" and "mmap", in their order.
    steps: tuple[str, ...]
    # Bytes.
    offset: int
    # Bytes.
    length: int

    @property
    def by(self) -> str:
        """The way to read, one of BY."""
        return self.steps[0] if len(self.steps) == 1 else "both"

    def step_name(self, step: int) -> str:
        """The name of a step in a report."""
        if len(self.steps) == 1:
            return self.steps[0]
        return f"{self.steps[step]} {'after' if step else 'before'} {self.steps[1 - step]}"


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the file, not beyond its end, with all bytes that its reads need."""

    # Bytes.
    offset: int
    # Bytes.
    length: int
    # In the order of the plan.
    reads: tuple[Read, ...]


def plan(path: str, size: int, *, seed: int, reads: int, by: Sequence[str]) -> list[Read]:
    """The reads of a file of `size` bytes, in random order, so that chance decides which way reaches a page first.

    For each way: the first byte, the last byte, a range across the end, all of a small file, and up to `reads` random ranges, at most one for each
    page. An empty file cannot be mapped, so it is only read.
    """
    chance = Random(b"%d %s" % (seed, os.fsencode(path)))
    if not size:
        return [Read(("pread",), 0, PAGE_SIZE)] if any(way != "mmap" for way in by) else []
    found = []
    for way in by:
        ranges = [(0, 1), (size - 1, 1), _across_the_end(chance, size)]
        if size <= SMALL:
            ranges.append((0, size))
        ranges += [_anywhere(chance, size) for _ in range(min(reads, -(-size // PAGE_SIZE)))]
        for offset, length in dict.fromkeys(ranges):
            steps = [way] if way != "both" else chance.sample(("mmap", "pread"), 2)
            found.append(Read(tuple(steps), offset, length))
    chance.shuffle(found)
    return found


def windows(reads: Sequence[Read], size: int) -> list[Window]:
    """The reads in groups of neighbours, each with the part of the store that it needs, at most WINDOW bytes."""
    groups: list[tuple[int, int, list[int]]] = []  # first byte, last byte + 1, indexes of the reads
    for number in sorted(range(len(reads)), key=lambda number: reads[number].offset):
        read = reads[number]
        start, end = min(read.offset, size), min(read.offset + read.length, size)
        if groups:
            first, last, members = groups[-1]
            if start - last <= _GAP and max(last, end) - first <= WINDOW:
                groups[-1] = (first, max(last, end), [*members, number])
                continue
        groups.append((start, end, [number]))
    # Keep the plan's order, windows by their first read: it decides which way reaches a page first.
    groups.sort(key=lambda group: min(group[2]))
    return [
        Window(first, last - first, tuple(reads[number] for number in sorted(members)))
        for first, last, members in groups
    ]


def _across_the_end(chance: Random, size: int) -> tuple[int, int]:
    before = min(size, chance.randint(1, PAGE_SIZE))
    return size - before, before + chance.randint(1, PAGE_SIZE)


def _anywhere(chance: Random, size: int) -> tuple[int, int]:
    """A random range; short ones are as likely as long ones, and one in four is of whole pages."""
    length = round(2 ** chance.uniform(0, math.log2(min(max(size, 2), LONGEST))))
    offset = chance.randrange(size)
    if chance.random() < 0.25:
        offset -= offset % PAGE_SIZE
        length = -(-length // PAGE_SIZE) * PAGE_SIZE
    return offset, min(length, size - offset + PAGE_SIZE)
