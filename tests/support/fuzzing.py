"""What all fuzzers share: how many cases they try, where each case's random numbers begin, and how a case that fails is tried again.

A fuzzer is a test with the mark `fuzz` and the fixture `fuzz_plan`. `pytest -m fuzz` tries the same cases each time. These options change that:

    --fuzz-seed N       other cases
    --fuzz-cases N      so many
    --fuzz-seconds S    as many as there is time for (`make soak`)
    --fuzz-only N       that case alone

A failure names its case, its seed and the command that repeats it.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

SEED = 1
PATIENCE = 30.0  # seconds for one answer, on a busy machine


@dataclass(frozen=True, slots=True)
class Case:
    """One case: its number, and random numbers that depend on the seed and this number only."""

    number: int
    random: random.Random


@dataclass(frozen=True, slots=True)
class Plan:
    """Which cases a fuzzer tries."""

    #: The test, as pytest is told it.
    test: str
    #: Where the random numbers begin.
    seed: int
    #: How many cases; None for the fuzzer's own number.
    cases: int | None = None
    #: Seconds, instead of a number of cases.
    seconds: float | None = None
    #: The number of the only case.
    only: int | None = None
    #: Seconds for one answer.
    patience: float = PATIENCE

    def run(self, cases: int, attempt: Callable[[Case], None]) -> int:
        """Call `attempt` for each case; returns how many there were. `cases`: how many where nothing else is asked for.

        An exception of `attempt` ends the run. It gets a note with the case and the command that repeats it.
        """
        tried = 0
        for number in self._numbers(cases):
            try:
                attempt(Case(number, random.Random(f"{self.seed} {number}")))
            except BaseException as error:
                error.add_note(self._story(number))
                raise
            tried += 1
        return tried

    def _numbers(self, cases: int) -> Iterator[int]:
        if self.only is not None:
            yield self.only
            return
        end = None if self.seconds is None else time.monotonic() + self.seconds
        number = 0
        while number < (self.cases or cases) if end is None else time.monotonic() < end:
            yield number
            number += 1

    def _story(self, number: int) -> str:
        again = f"pytest {self.test!r} --fuzz-seed {self.seed}"
        return (
            f"case {number} of seed {self.seed}; to repeat it: {again} --fuzz-only {number}\n"
            f"or, if it needs those before it: {again} --fuzz-cases {number + 1}"
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process holds, from /proc."""

    #: Open descriptors.
    descriptors: int
    #: Threads.
    threads: int
    #: The most memory that it had resident, bytes.
    peak: int


def usage(pid: int) -> Usage:
    """What a process holds now. Raises FileNotFoundError or ProcessLookupError if it has gone."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    )
    return Usage(
        len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]), int(fields["VmHWM"].split()[0]) * 1024
    )


def comes_down_to(pid: int, most: int, seconds: float) -> bool:
    """Whether a process holds at most so many descriptors, now or soon: what a client has held goes after the client."""
    end = time.monotonic() + seconds
    while usage(pid).descriptors > most:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


Description = dict[str, tuple[object, ...]]


def described(root: Path) -> Description:
    """Every path below `root` with all of it that an intruder could change: what nobody may touch is the same before and after."""
    found: Description = {}
    for place, directories, files in os.walk(root):
        for path in (Path(place), *(Path(place, name) for name in [*directories, *files])):
            status = path.lstat()
            attributes: dict[str, bytes] = {}
            with suppress(OSError):
                attributes = {
                    name: os.getxattr(path, name, follow_symlinks=False)
                    for name in os.listxattr(path, follow_symlinks=False)
                }
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found[str(path)] = (
                status.st_ino,
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_nlink,
                status.st_size,
                status.st_blocks,
                status.st_mtime_ns,
                attributes,
                content,
            )
    return found


# What conftest.py hands to pytest


def add_options(parser: pytest.Parser) -> None:
    """--fuzz-seed and its like."""
    group = parser.getgroup("fuzzing")
    group.addoption(
        "--fuzz-seed", type=int, default=SEED, metavar="N", help=f"of the fuzzers' cases (default: {SEED})"
    )
    group.addoption("--fuzz-cases", type=int, metavar="N", help="how many cases each fuzzer tries")
    group.addoption(
        "--fuzz-seconds", type=float, metavar="S", help="how long each fuzzer tries cases, however many"
    )
    group.addoption("--fuzz-only", type=int, metavar="N", help="the only case that a fuzzer tries")


def flaw_plan() -> Plan:
    """The plan for a server with a fault in it: the fixed cases, and less patience, because there waiting is what finds the fault."""
    return Plan("the same test", SEED, patience=5.0)


def plan_of(request: pytest.FixtureRequest) -> Plan:
    """The plan of a test."""
    option = request.config.getoption
    return Plan(
        request.node.nodeid,
        option("--fuzz-seed"),
        option("--fuzz-cases"),
        option("--fuzz-seconds"),
        option("--fuzz-only"),
    )
