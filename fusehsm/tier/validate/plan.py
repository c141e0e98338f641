"""Which ranges of a file validate reads, in which way, and which parts of the store it needs for that. No I/O.

A file's reads follow from the seed, its path and its size alone, so that they are the same again whatever else the tree holds, and however
many files are read at a time.
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
SMALL: Final = 64 << 10  # bytes of a file that is read as a whole, too
WINDOW: Final = 4 << 20  # bytes of the store that are fetched at once, and kept
_GAP: Final = 1 << 20  # bytes that nobody asked for which cost less than a request of their own


@dataclass(frozen=True, slots=True)
class Read:
    """One range, in bytes, which may reach beyond the end of the file. `steps`: "pread" and "mmap" in the order in which they are done."""

    steps: tuple[str, ...]
    offset: int
    length: int

    @property
    def by(self) -> str:
        """One of BY."""
        return self.steps[0] if len(self.steps) == 1 else "both"

    def step_name(self, step: int) -> str:
        """What a report calls one of the steps."""
        if len(self.steps) == 1:
            return self.steps[0]
        return f"{self.steps[step]} {'after' if step else 'before'} {self.steps[1 - step]}"


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the file, in bytes, not beyond its end, that holds all bytes of the file that its reads want."""

    offset: int
    length: int
    reads: tuple[Read, ...]


def plan(path: str, size: int, *, seed: int, reads: int, by: Sequence[str]) -> list[Read]:
    """What to read of a file of `size` bytes, in random order: which way comes to a page first is left to chance, too.

    In each way: the first byte, the last byte, across the end, all of a small file, and up to `reads` random ranges, but no more than it has pages.
    An empty file cannot be mapped, so it is only read.
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
    """The reads in groups that are near each other, each with the part of the store that it needs, of at most WINDOW bytes."""
    groups: list[tuple[int, int, list[int]]] = []  # first byte, last byte + 1, numbers of the reads
    for number in sorted(range(len(reads)), key=lambda number: reads[number].offset):
        read = reads[number]
        start, end = min(read.offset, size), min(read.offset + read.length, size)
        if groups:
            first, last, members = groups[-1]
            if start - last <= _GAP and max(last, end) - first <= WINDOW:
                groups[-1] = (first, max(last, end), [*members, number])
                continue
        groups.append((start, end, [number]))
    # In the plan's order, windows by their first read: it is the order that decides which way sees a page first.
    groups.sort(key=lambda group: min(group[2]))
    return [
        Window(first, last - first, tuple(reads[number] for number in sorted(members)))
        for first, last, members in groups
    ]


def _across_the_end(chance: Random, size: int) -> tuple[int, int]:
    before = min(size, chance.randint(1, PAGE_SIZE))
    return size - before, before + chance.randint(1, PAGE_SIZE)


def _anywhere(chance: Random, size: int) -> tuple[int, int]:
    """Short ranges are as likely as long ones; one in four is of whole pages."""
    length = round(2 ** chance.uniform(0, math.log2(min(max(size, 2), LONGEST))))
    offset = chance.randrange(size)
    if chance.random() < 0.25:
        offset -= offset % PAGE_SIZE
        length = -(-length // PAGE_SIZE) * PAGE_SIZE
    return offset, min(length, size - offset + PAGE_SIZE)
