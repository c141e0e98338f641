"""Who is killed while an access waits for a listener that is silent: nothing waits on, in any mode, with and without a view of the listener's own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import harness
from tests.support.harness import fusehsm
from tests.support.kernel_and_run import RUN, STEP, Program, mounts_at, standing, wait_until
from tests.support.listener_programs.building import listener_words
from tests.support.listener_steps import make_files
from tests.support.requirements import require_root

pytestmark = [
    pytest.mark.any_engine,
    pytest.mark.fuse,
    pytest.mark.parametrize("mode", ["exact", "first-access"]),
    pytest.mark.parametrize("view", [(), ("--listener",)], ids=["plain", "view"]),
]

#: An accessor of the file in argv[1]; each but the last waits with a request of its own.
ACCESSES = {
    "read": "open(sys.argv[1], 'rb', 0).read(10)",
    "mmap": "mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, access=mmap.ACCESS_READ)[0]",
    "sendfile": "os.sendfile(os.memfd_create('x'), os.open(sys.argv[1], os.O_RDONLY), 0, 10)",
    "truncate": "os.truncate(sys.argv[1], 5000)",
}
FILES = {"read": "stub", "mmap": "mapped", "sendfile": "whole", "truncate": "cut"}


@pytest.fixture
def place(places: Callable[[str], Path], fuse: None) -> Iterator[Path]:
    require_root()
    place = places("kills")
    make_files(place)
    with standing("run", place):
        yield place


class Silent:
    """A listener of the place that has marked it and answers nothing, with accessors that wait for it."""

    def __init__(
        self, stack: ExitStack, mode: str, view: tuple[str, ...], place: Path, directory: Path
    ) -> None:
        self._stack, self._place = stack, place
        words = listener_words(directory, place, "blocking", marks=(("add|mount", "PRE_ACCESS", ""),))
        command = [*RUN, *view, "--quiet", "--mount", str(place), "--events", mode, "--", *words]
        self.run = stack.enter_context(Program(command))
        self.run.wait_ready()
        self.pid = self.run.command_pid
        os.kill(self.pid, signal.SIGSTOP)

    def access(self, kind: str) -> "subprocess.Popen[str]":
        """An accessor that waits."""
        code = f"import mmap, os, sys; {ACCESSES[kind]}"
        accessor = self._stack.enter_context(
            harness.start([sys.executable, "-I", "-S", "-c", code, str(self._place / FILES[kind])])
        )
        self._stack.callback(accessor.kill)
        wait_until(lambda: accessor.pid in self.waiting() or accessor.poll() is not None)
        assert accessor.poll() is None, (kind, accessor.communicate())
        return accessor

    def waiting(self) -> list[int]:
        """The processes that wait for the listener, as `fusehsm status` shows them."""
        shown = json.loads(fusehsm("status", "--json", str(self._place)).stdout)
        mounts = shown if isinstance(shown, list) else shown.get("mounts", [shown])
        return [access["pid"] for mount in mounts for access in mount.get("waiting", ())]


@pytest.fixture
def silent(mode: str, view: tuple[str, ...], place: Path, session_directory: Path) -> Iterator[Silent]:
    with ExitStack() as stack:
        yield Silent(stack, mode, view, place, session_directory)


def test_a_killed_accessor_ends(silent: Silent) -> None:
    for kind in ACCESSES:
        accessor = silent.access(kind)
        accessor.kill()
        assert accessor.wait(STEP) == -signal.SIGKILL, kind
        wait_until(lambda pid=accessor.pid: pid not in silent.waiting())  # type: ignore[misc]


@pytest.mark.parametrize("victim", ["listener", "run"])
def test_the_death_of_those_who_serve_ends_all(victim: str, silent: Silent, place: Path) -> None:
    accessors = [silent.access(kind) for kind in ACCESSES]
    os.kill(silent.pid if victim == "listener" else silent.run.process.pid, signal.SIGKILL)
    for accessor in accessors:
        accessor.wait(STEP)
    silent.run.process.wait(STEP)
    wait_until(lambda: mounts_at(place) == 0)
