"""What accessors do to files while a listener program watches, what they get, and what the listener says of it.

Each step is one expectation for both worlds.
"""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusehsm.conform.accessor import Accessor
from tests.support.kernel_and_mount import Failed
from tests.support.kernel_and_run import STEP, Program, RunWorld, mounts_at, processes_at, wait_until

PAGE = 4096
SIZE = 4 * PAGE + 100
SECRET = "secret.denied"  # what listeners are told to deny, with EIO
INNER = "below/inner"
FILES = ("stub", "written", "cut", "mapped", "whole", SECRET, *(f"many-{number}" for number in range(4)))

#: `fusehsm run --listener` says it where mounts are not shared, as on most machines of tests.
NOTE = "fusehsm run: note: what the command mounts is seen by the command alone"


def planned(start: int, end: int) -> bytes:
    """What a listener fills into those bytes of any file."""
    return bytes(place % 251 + place // PAGE % 5 for place in range(start, end))


def make_files(place: Path, names: Iterable[str] = FILES) -> None:
    """Stubs of SIZE bytes, one of them in a directory, and the file that ends a listener."""
    (place / "below").mkdir()
    for name in (*names, INNER, "end"):
        with (place / name).open("xb") as file:
            file.truncate(SIZE)


@dataclass(frozen=True, slots=True)
class Step:
    """`act(path of file, *arguments)` gives `result`, and the listener prints `lines`."""

    act: str | Callable[..., Any]
    file: str
    arguments: tuple[object, ...] = ()
    result: object = None
    lines: tuple[str, ...] = ()


def asked(offset: int, count: int, file: str = "stub", decision: str = "ALLOW", prefix: str = "") -> str:
    """The listener's line of a PRE_ACCESS event."""
    return f"{prefix}PRE_ACCESS {offset} {count} {file} {decision}"


def take(accessor: Accessor, place: Path, steps: Iterable[Step]) -> list[str]:
    """Do the steps, hold what comes back against what should, and return the lines that the listener owes."""
    lines: list[str] = []
    for step in steps:
        path = str(place / step.file)
        result: object
        try:
            result = accessor.call(step.act, path, *step.arguments, timeout=STEP)
        except OSError as error:
            result = Failed(error.errno or 0)
        assert result == step.result, (step, result)
        lines += step.lines
    return lines


def cut_through_descriptor(path: str, size: int) -> None:
    """open(2), ftruncate(2), close(2)."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def map_and_look(path: str, length: int, place: int) -> bytes:
    """One byte of a private mapping."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(descriptor, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
            return mapping[place : place + 1]
    finally:
        os.close(descriptor)


def read_often(path: str, times: int) -> bytes:
    """The first byte, again and again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        (byte,) = {os.pread(descriptor, 1, 0) for _ in range(times)}
        return byte
    finally:
        os.close(descriptor)


def read_in_thread(path: str, size: int) -> bytes:
    """open(2) in the process's first thread, read(2) in another."""
    descriptor = os.open(path, os.O_RDONLY)
    found: list[bytes] = []

    def read(descriptor: int = descriptor, size: int = size, found: list[bytes] = found) -> None:
        found.append(os.pread(descriptor, size, 0))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    os.close(descriptor)
    return found[0]


_EIO = Failed(errno.EIO)

# For listeners with PRE_ACCESS on everything that deny SECRET.
SERIES = (
    Step("pread_path", "stub", (100, 10), planned(10, 110), (asked(0, PAGE),)),
    Step("pread_path", "stub", (5000, 4000), planned(4000, 9000), (asked(0, 3 * PAGE),)),
    Step("pread_path", "stub", (10, 1 << 20), b"", (asked(1 << 20, PAGE),)),
    Step("pwrite_path", "written", (b"x" * 10, 5000), 10, (asked(PAGE, PAGE, "written"),)),
    Step(
        "pread_path",
        "written",
        (20, 4995),
        planned(4995, 5000) + b"x" * 10 + planned(5010, 5015),
        (asked(PAGE, PAGE, "written"),),
    ),
    Step("truncate", "cut", (5000,), None, (asked(PAGE, PAGE, "cut"),)),
    Step("truncate", "cut", (2 * PAGE,), None, (asked(2 * PAGE, 0, "cut"),)),
    Step(cut_through_descriptor, "cut", (100,), None, (asked(0, PAGE, "cut"),)),
    Step("pread_path", "cut", (200, 0), planned(0, 100), (asked(0, PAGE, "cut"),)),
    Step("pread_path", SECRET, (10, 0), _EIO, (asked(0, PAGE, SECRET, "DENY EIO"),)),
    Step("pwrite_path", SECRET, (b"x", 9000), _EIO, (asked(2 * PAGE, PAGE, SECRET, "DENY EIO"),)),
    Step("truncate", SECRET, (0,), _EIO, (asked(0, 0, SECRET, "DENY EIO"),)),
    Step(map_and_look, "mapped", (2 * PAGE, 5000), planned(5000, 5001), (asked(0, 2 * PAGE, "mapped"),)),
    Step(
        "read_file",
        "whole",
        (),
        planned(0, SIZE),
        (asked(0, 1 << 20, "whole"), asked(4 * PAGE, (1 << 20) + PAGE, "whole")),
    ),
)

# The files afterwards: what was asked for is there, what was denied is as it was.
LEFT: dict[str, bytes] = {
    "stub": planned(0, 3 * PAGE) + bytes(SIZE - 3 * PAGE),
    "written": bytes(PAGE)
    + planned(PAGE, 5000)
    + b"x" * 10
    + planned(5010, 2 * PAGE)
    + bytes(SIZE - 2 * PAGE),
    "cut": planned(0, 100),
    SECRET: bytes(SIZE),
    "mapped": planned(0, 2 * PAGE) + bytes(SIZE - 2 * PAGE),
    "whole": planned(0, SIZE),
}


def finish(world: RunWorld, listener: Program, accessor: Accessor) -> list[str]:
    """Let a listener end in peace; what it said since it was ready."""
    ending = accessor.start("pread_path", str(world.place / "end"), 1, 0)
    assert listener.end() == 0, listener.complaints.lines
    complaints = [line for line in listener.complaints.wait_for_end(STEP) if NOTE not in line]
    assert complaints == [], complaints
    lines = listener.lines
    if world.is_kernel:
        assert len(ending.result(STEP)) == 1
    else:  # where it may come too late for its mount
        assert mounts_at(world.place) == 0
    wait_until(lambda: not processes_at(world.place))
    end = next(number for number, line in enumerate(lines) if " end " in line)
    assert end == len(lines) - 1, lines
    return lines[lines.index("ready") + 1 : end]
