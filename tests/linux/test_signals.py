"""Handlers of signals that ask for the end wait for the end of what must not be cut in two."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest

from fusehsm.linux.signals import signals_held


class Ended(BaseException):
    pass


def raise_it(*_: object) -> None:
    raise Ended


@pytest.fixture
def ending_by_exception() -> Iterator[None]:
    kept = signal.signal(signal.SIGTERM, raise_it)
    yield
    signal.signal(signal.SIGTERM, kept)


@pytest.mark.usefixtures("ending_by_exception")
def test_a_handler_runs_after_the_body_and_then_again_at_once() -> None:
    done = []
    with pytest.raises(Ended), signals_held():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(subprocess.run(["true"], check=False).returncode)
    assert done == [0]
    with pytest.raises(Ended):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 1)


@pytest.mark.usefixtures("ending_by_exception")
def test_a_child_that_was_started_meanwhile_can_be_ended() -> None:
    with signals_held():
        child = subprocess.Popen(["sleep", "60"])
    child.terminate()
    assert child.wait(10) == -signal.SIGTERM


def test_what_is_ignored_stays_ignored_for_children_too() -> None:
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_held():
            child = subprocess.Popen(["sh", "-c", "kill -HUP $$; echo alive"], stdout=subprocess.PIPE)
            os.kill(os.getpid(), signal.SIGHUP)
        assert child.communicate()[0] == b"alive\n"
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_in_another_thread_it_does_nothing_and_fails_nothing() -> None:
    seen = []

    def hold() -> None:
        with signals_held():
            seen.append(True)

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert seen == [True]
