"""The worlds that listener programs run in: on the real kernel, and under `fusehsm run`, which answers for it: without options, with a view of their
own ("view"), or with groups at any number ("any-descriptor").

A program is started the same way in both, on a directory that is a mount of its own, and does not know which it is.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fusehsm.daemon.options import NOTE
from fusehsm.engines.choice import maps_direct_files_shared
from fusehsm.linux.mountinfo import read_mounts
from fusehsm.linux.syscalls import MNT_DETACH, MS_BIND, mount, umount2
from tests.support import harness, leftovers
from tests.support.harness import LogReader

RUN = (*harness.COMMAND, "run")
# Where `auto` is not exact, so that every kernel has the events of a real one.
EXACT = () if maps_direct_files_shared("auto") else ("--events", "exact")
# Seconds for one step of a program or an accessor. All take milliseconds, but not in an emulated machine.
STEP = max(20.0, harness.PATIENCE / 3)


@dataclass(frozen=True, slots=True)
class RunWorld:
    """`place` is watched; everything in it was made before."""

    name: str
    place: Path

    @property
    def is_kernel(self) -> bool:
        """Whether this is the real thing."""
        return self.name == "kernel"

    def command(self, *program: str, keep: bool = False) -> list[str]:
        """How that program is started here. `keep`: the mount stays when it has ended."""
        if self.is_kernel:
            return list(program)
        option = {"view": ("--listener",), "any-descriptor": ("--any-descriptor",)}.get(self.name, ())
        keeping = ("--keep",) if keep else ()
        return [*RUN, *option, *EXACT, "--mount", str(self.place), *keeping, "--", *program]


@contextmanager
def standing(name: str, place: Path) -> Iterator[RunWorld]:
    """A world on that directory, and its end: nothing of it runs or is mounted afterwards."""
    if name == "kernel":
        # What `fusehsm run` does to it, too: marks of the mount are of this directory only.
        mount(bytes(place), bytes(place), None, MS_BIND)
    try:
        yield RunWorld(name, place)
    finally:
        end_everything_at(place)


def processes_at(place: Path) -> list[int]:
    """Processes of this session that were told of that directory, or of something in it."""
    return [pid for pid in harness.own_processes() if str(place) in leftovers.command_line(pid)]


def mounts_at(place: Path) -> int:
    """How many mounts are at exactly that directory."""
    return sum(found.mount_point == str(place) for found in read_mounts())


def end_everything_at(place: Path) -> None:
    """Kill what was told of that directory, and unmount it lazily as often as it takes."""
    for pid in processes_at(place):
        leftovers.kill(pid)
    for _ in range(mounts_at(place)):
        umount2(bytes(place), MNT_DETACH)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that no event reports."""
    deadline = time.monotonic() + STEP
    while not condition():
        assert time.monotonic() < deadline, "it has not come to be"
        time.sleep(0.01)


class Program:
    """A child whose lines are read as they come; it is killed at the end whatever happened. Its complaints are without notes about the kernel."""

    def __init__(self, command: list[str], **more: object) -> None:
        self.process = harness.start(command, **more)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.output = LogReader(self.process.stdout)
        self.complaints = LogReader(self.process.stderr, without=NOTE)

    def wait_ready(self) -> None:
        """Until it says that its marks stand."""
        try:
            self.output.wait_for(lambda line: line == "ready", STEP)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.complaints.lines)) from None

    @property
    def command_pid(self) -> int:
        """The process of the command of `fusehsm run`. The servers of its mounts lead sessions of their own."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        (found,) = (int(child) for child in children if os.getsid(int(child)) == os.getsid(pid))
        return found

    def end(self) -> int:
        """Wait for its own end; the exit code as subprocess has it (negative: a signal)."""
        try:
            return self.process.wait(STEP)
        except subprocess.TimeoutExpired:
            said = "\n".join(self.output.lines + self.complaints.lines)
            raise AssertionError(f"it has not ended; it said:\n{said}") from None

    @property
    def lines(self) -> list[str]:
        """All that it said on stdout; to be asked when it has ended."""
        return self.output.wait_for_end(STEP)

    def close(self) -> None:
        """Kill it with all that it started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STEP)
        for reader, stream in (
            (self.output, self.process.stdout),
            (self.complaints, self.process.stderr),
        ):
            with suppress(AssertionError):
                reader.wait_for_end(5)
                assert stream is not None
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Start = Callable[..., Program]  # see the fixture `start`


def ended_by(code: int, number: int) -> bool:
    """Whether an exit code tells of that signal: as the process's own end, or as a shell reports it."""
    return code in (-number, 128 + number)
