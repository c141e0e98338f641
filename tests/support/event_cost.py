"""What one event costs a mount's daemon: system calls, seen by strace, and Python function calls, counted inside the daemon.

Only counts, no times: they are the same on a busy machine. `python -m tests.support.event_cost DIRECTORY` is a listener that allows everything.
"""

import itertools
import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fusehsm.events import Event
from tests.support.harness import PATIENCE, ROOT, kill, start

COUNTS = "FUSEHSM_TESTS_COUNTS"  # environment variable: where a daemon writes its counts
# Python 3.12 and later call no function for these.
_INLINED = frozenset(("<listcomp>", "<dictcomp>", "<setcomp>"))
# What a daemon calls once for each READ, whichever engine it has: by function, and by system call (of /proc/TID/syscall).
_ONCE_A_READ = "Explainer.accessor"
_READS_THE_CALL = re.compile(r'pread64\(\d+, +("[-\d]+ |<unfinished)')
_CALL = re.compile(r"\d+ +(\w+\(.*)")


async def allow(event: Event) -> None:
    """A handler that has nothing to do."""


# In the daemon


def count_calls() -> None:
    """Let SIGUSR2 begin to count this process's calls of Python functions, event by event; the next one writes the counts down."""
    each: list[list[str]] = [[]]

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        if frame.f_code.co_qualname == _ONCE_A_READ:
            each.append([])
        if frame.f_code.co_name not in _INLINED:
            each[-1].append(frame.f_code.co_qualname)

    def toggle(number: int, frame: FrameType | None) -> None:
        if sys.getprofile() is None:
            sys.setprofile(profile)
            return
        sys.setprofile(None)
        written = Path(os.environ[COUNTS])
        # What came before the first event belongs to none, and the last may not be over.
        written.with_suffix(".new").write_text(json.dumps(each[1:-1]))
        written.with_suffix(".new").rename(written)

    signal.signal(signal.SIGUSR2, toggle)


def environment_that_counts(directory: Path) -> dict[str, str]:
    """The environment of a daemon that counts its calls; its files are in that directory."""
    directory.mkdir(exist_ok=True)
    # Python imports it before anything else.
    counter = f"from {__name__} import count_calls\ncount_calls()\n"
    (directory / "sitecustomize.py").write_text(counter)
    return {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}", COUNTS: str(directory / "counts")}


# Around the daemon


@dataclass
class Counts:
    """Once the counting has ended: what was called for each event."""

    each: list[list[str]] = field(default_factory=list)

    @property
    def usual(self) -> int:
        """How many calls an event makes: the median, as the first events of a file make more, and now and then one has to do with another."""
        return statistics.median_low(map(len, self.each))

    def __str__(self) -> str:
        calls = next(calls for calls in self.each if len(calls) == self.usual)
        return "\n".join([f"{self.usual} an event", *calls])


@contextmanager
def python_calls(daemon: int, directory: Path) -> Iterator[Counts]:
    """Count the Python function calls of a daemon with environment_that_counts(directory)."""
    counts, written = Counts(), directory / "counts"
    written.unlink(missing_ok=True)
    os.kill(daemon, signal.SIGUSR2)
    yield counts
    os.kill(daemon, signal.SIGUSR2)
    deadline = time.monotonic() + PATIENCE
    while not written.exists():
        assert time.monotonic() < deadline, "the daemon wrote no counts"
        time.sleep(0.01)
    counts.each = json.loads(written.read_text())


@contextmanager
def system_calls(daemon: int, directory: Path) -> Iterator[Counts]:
    """Count the system calls of a daemon, all of its threads."""
    counts, trace = Counts(), directory / "trace"
    strace = start(["strace", "-f", "-s", "32", "-o", str(trace), "-p", str(daemon)])
    try:
        assert strace.stderr is not None
        line = strace.stderr.readline()
        assert "attached" in line, line
        yield counts
        strace.send_signal(signal.SIGINT)
        strace.communicate(timeout=PATIENCE)
    finally:
        kill(strace.pid)
    calls = [found[1] for line in trace.read_text().splitlines() if (found := _CALL.match(line))]
    begins = [index for index, call in enumerate(calls) if _READS_THE_CALL.match(call)]
    counts.each = [calls[begin:end] for begin, end in itertools.pairwise(begins)]


def listener(directory: Path) -> list[str]:
    """The command of a listener that allows everything; it says `ready` once it listens."""
    return [sys.executable, "-m", __name__, str(directory)]


def main(directory: str) -> None:
    """The listener."""
    import trio

    import fusehsm

    async def listen() -> None:
        async with fusehsm.open_group(directory, mask=("PRE_ACCESS",), backend="fuse") as group:
            print("ready", flush=True)
            await fusehsm.serve(group, allow)

    trio.run(listen)


if __name__ == "__main__":
    main(sys.argv[1])
