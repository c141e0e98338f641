"""Outlives a test session that hangs or is killed, and clears up after it.

A process that listens on the real kernel can come to wait for itself, deep in the kernel, where nothing but SIGKILL from outside ends
it. Told on stdin, line by line, which test begins, or an empty line while no test runs: a process that shares the tests with others may wait
for long. `python -m tests.support.guardian PID SESSION DIRECTORY SECONDS`.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.support.leftovers import leftovers, remove_tree

_COLLECTION = 120.0  # seconds that finding the tests may take
END = "end"  # the line of a session that has cleared up itself
SHOW = signal.SIGUSR2  # the tests' process answers it with where its Python code is


def main(pid: int, session: str, directory: Path, longest: float) -> None:
    """Watch the session in process `pid` until its end; kill it when one test takes longer than that many seconds."""
    pidfd = os.pidfd_open(pid)
    test = "collecting"
    patience: float | None = max(longest, _COLLECTION)
    said = ""
    while True:
        if not select.select([0], [], [], patience)[0]:
            _show(pid, f"{test}: no end after {patience:.0f} s; killing the tests")
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, SHOW)
                time.sleep(1)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], 10)
            break
        piece = os.read(0, 65536)
        *lines, said = (said + piece.decode(errors="replace")).split("\n")
        if END in lines:
            return
        if not piece:
            break
        if lines:
            test = lines[-1]
            patience = longest if test else None
    for leftover in leftovers(session, directory):
        leftover.remove()
    remove_tree(directory)


def _show(pid: int, what: str) -> None:
    print(f"\n{what}", file=sys.stderr)
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        try:
            print(f"thread {thread.name} in {(thread / 'wchan').read_text()}", file=sys.stderr)
            print((thread / "stack").read_text(), file=sys.stderr, flush=True)
        except OSError:
            continue


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
