"""Whether a thread that asks for a denied page again is still in the page fault that was denied: on a slow machine its repeats come late."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusehsm.emulator.handles import DeniedFill
from fusehsm.emulator.refusals import _is_same_fault
from fusehsm.linux import proc
from tests.support.harness import PATIENCE


class Waiting:
    """A process that does nothing but wait, each time in one call, as an accessor waits for its answers."""

    def __init__(self) -> None:
        program = "import os\nwhile os.read(0, 1): pass"
        self._process = subprocess.Popen([sys.executable, "-S", "-c", program], stdin=subprocess.PIPE)
        self.tid = self._process.pid
        self._settle(0)

    def _settle(self, waits: int) -> None:
        """Return when it waits, and has waited more often than `waits` times."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.waits > waits and "pipe" in Path(f"/proc/{self.tid}/wchan").read_text():
                return
        raise AssertionError("it does not wait")

    @property
    def waits(self) -> int:
        return proc.voluntary_switches(self.tid) or 0

    def go_on(self) -> None:
        """End one wait. It returns in the next."""
        waits = self.waits
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), b"x")
        self._settle(waits)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def thread() -> Iterator[Waiting]:
    made = Waiting()
    yield made
    made.end()


@pytest.fixture
def deny(thread: Waiting) -> Callable[[float, float], DeniedFill]:
    """deny(expires, expires_awake) -> a denial that the waiting thread has just got; both in seconds from now."""

    def deny(expires: float, expires_awake: float) -> DeniedFill:
        now = time.monotonic()
        return DeniedFill(None, 0, 4096, 5, 2, now + expires, thread.waits, now + expires_awake)

    return deny


Deny = Callable[[float, float], DeniedFill]


def test_a_repeat_that_comes_late(thread: Waiting, deny: Deny) -> None:
    denied = deny(-1, PATIENCE)
    thread.go_on()
    assert _is_same_fault(denied, thread.tid)


def test_a_thread_that_has_waited_for_something_else_is_in_another_fault(thread: Waiting, deny: Deny) -> None:
    denied = deny(-1, PATIENCE)
    thread.go_on()
    thread.go_on()
    assert not _is_same_fault(denied, thread.tid)


def test_within_a_moment_that_does_not_matter(thread: Waiting, deny: Deny) -> None:
    denied = deny(PATIENCE, PATIENCE)
    thread.go_on()
    thread.go_on()
    assert _is_same_fault(denied, thread.tid)


def test_after_its_time_no_repeat_is_expected(thread: Waiting, deny: Deny) -> None:
    denied = deny(-1, -1)
    thread.go_on()
    assert not _is_same_fault(denied, thread.tid)


def test_a_thread_that_is_not_known_has_the_moment_only(thread: Waiting, deny: Deny) -> None:
    denied = deny(-1, PATIENCE)
    denied.switches = None
    thread.go_on()
    assert not _is_same_fault(denied, thread.tid)
