"""What one 4 KiB read costs the daemon in exact mode, in system calls and in calls of Python functions: no more than when it was last measured.

A bound that is exceeded has a reason, which is found by what the failure lists; one that is far from reached is lowered.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from tests.support import event_cost
from tests.support.harness import Mount, kill, start
from tests.support.requirements import require, require_root

pytestmark = [pytest.mark.fuse, pytest.mark.root]

PAGE = 4096
EVENTS = 120
# Long enough for the daemon to have nothing to do before the next: only then is the number of its calls always the same.
PAUSE = 0.005  # seconds


@dataclass(frozen=True)
class Most:
    """What an event may cost. One call is the price of an event descriptor that never waits for a lease: it is opened with O_NONBLOCK, which is then
    taken away."""

    system_calls: int
    python_calls: int


MOST = {
    ("devfuse", "inside"): Most(10, 144),
    ("devfuse", "socket"): Most(15, 250),
    ("pyfuse3", "inside"): Most(10, 180),
    ("pyfuse3", "socket"): Most(15, 252),
}


@dataclass(frozen=True)
class Watched:
    """A mount with a listener that allows everything, and where to count."""

    mount: Mount
    directory: Path
    most: Most


@pytest.fixture(scope="module", params=["inside", "socket"])
def watched(
    make_shared_mount: Callable[..., Mount],
    session_directory: Path,
    engine: str,
    request: pytest.FixtureRequest,
) -> Iterator[Watched]:
    """The listener is a handler inside the daemon, or a process that the control socket reaches."""
    place: str = request.param
    directory = session_directory / f"event-cost-{engine}-{place}"
    options = ["--events", "exact", "--cache", "private"]
    if place == "inside":
        options += ["--handler", "tests.support.event_cost:allow"]
    mount = make_shared_mount(*options, env=event_cost.environment_that_counts(directory))
    with ExitStack() as stack:
        if place == "socket":
            listener = start(event_cost.listener(mount.path))
            stack.callback(kill, listener.pid)
            assert listener.stdout is not None
            assert listener.stdout.readline() == "ready\n"
        yield Watched(mount, directory, MOST[engine, place])


def read_pages(path: str, number: int, pause: float) -> None:
    """Read so many pages, each in a call of its own."""
    import time

    descriptor = os.open(path, os.O_RDONLY)
    try:
        for page in range(number):
            time.sleep(pause)
            os.pread(descriptor, 4096, page * 4096)
    finally:
        os.close(descriptor)


def file_of(watched: Watched, name: str, size: int = EVENTS * PAGE) -> str:
    (watched.mount.source / name).write_bytes(bytes(size))
    return str(watched.mount.path / name)


def require_strace() -> None:
    require_root()
    require(shutil.which("strace") is not None, "needs strace")


def test_system_calls(watched: Watched, accessor: Accessor) -> None:
    require_strace()
    path = file_of(watched, "system-calls")
    with event_cost.system_calls(watched.mount.pid, watched.directory) as counts:
        accessor.call(read_pages, path, EVENTS, PAUSE)
    assert len(counts.each) >= EVENTS // 2
    assert counts.usual <= watched.most.system_calls, str(counts)


def send_pages(path: str, number: int) -> None:
    """sendfile(2) of so many pages from where the file stands, in a call of its own each."""
    descriptor, nowhere = os.open(path, os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    try:
        for _ in range(number):
            assert os.sendfile(nowhere, descriptor, None, 4096) == 4096
    finally:
        os.close(nowhere)
        os.close(descriptor)


def test_an_open_file_of_the_accessor_is_looked_at_once(watched: Watched, accessor: Accessor) -> None:
    """Which file it is, and where it stands, is read from /proc in one go."""
    require_strace()
    path = file_of(watched, "looks")
    with event_cost.system_calls(watched.mount.pid, watched.directory) as counts:
        accessor.call(send_pages, path, 20)
    looks = [sum(f"/proc/{accessor.pid}/fdinfo/" in call for call in calls) for calls in counts.each]
    assert max(looks) == 1


def test_python_calls(watched: Watched, accessor: Accessor) -> None:
    path = file_of(watched, "python-calls")
    with event_cost.python_calls(watched.mount.pid, watched.directory) as counts:
        accessor.call(read_pages, path, EVENTS, PAUSE)
    assert len(counts.each) >= EVENTS // 2
    assert counts.usual <= watched.most.python_calls, str(counts)
