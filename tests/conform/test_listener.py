"""Listeners of workloads in a process of their own: what becomes of one that fails, and what is left of one that hangs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Zygote
from fusehsm.conform.listener import listener_row
from fusehsm.conform.listener_worker import Listener
from fusehsm.conform.perform import Performer
from fusehsm.conform.sides import Side, kernel_side
from fusehsm.conform.stream import UNFINISHED, Did, Heard, lines
from fusehsm.linux.mountinfo import read_mounts
from tests.support.kernel_and_run import wait_until
from tests.support.leftovers import command_line

pytestmark = [pytest.mark.fuse, pytest.mark.kernel, pytest.mark.any_engine]


@pytest.fixture(scope="module")
def performer() -> Iterator[Performer]:
    zygote = Zygote()
    yield Performer(zygote)
    zygote.close()


@pytest.fixture(params=["kernel", "run"])
def side(request: pytest.FixtureRequest, kernel_events: Path, fuse: None) -> Side:
    """The real kernel's side, and one that needs no daemon because `fusehsm run` makes the mount."""
    place = kernel_events / f"listener-{request.param}"
    place.mkdir(exist_ok=True)
    return kernel_side(place) if request.param == "kernel" else Side(place, place, "devfuse")


# These run in the listener's process.


def deny(listener: Listener) -> None:
    listener.answer(listener.hear(), 5)


def fail(listener: Listener) -> None:
    listener.hear()
    raise LookupError("what is wrong")


def call_what_fails(listener: Listener) -> None:
    listener.do("open", os.open, listener.path("missing"), 0)


def hang(listener: Listener) -> None:
    listener.hear()
    os.read(os.pipe()[0], 1)


def leave_child(listener: Listener) -> None:
    if os.fork() == 0:
        while True:
            listener.hear()
    listener.hear()


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def nothing_is_left(side: Side) -> None:
    assert not [mount for mount in read_mounts() if mount.mount_point.startswith(f"{side.backing}/")]
    wait_until(lambda: not any(str(side.backing) in command_line(pid) for pid in processes()))
    assert not list(side.backing.iterdir())


def test_all_that_it_does_is_in_the_stream(side: Side, performer: Performer) -> None:
    stream = performer.perform(listener_row("denying", deny), side)
    event, answer, result, *_ = stream
    assert isinstance(event, Heard)
    assert (event.group, event.names, event.by, event.path) == (
        "the listener",
        "PRE_ACCESS",
        "accessor",
        "file",
    )
    assert (event.offset, event.count, event.answer) == (0, 4096, "HELD")
    assert answer == Did("the listener", "answer", "'EIO'")
    assert result == Did("accessor", "pread_path", "EIO")
    nothing_is_left(side)


def test_an_error_of_a_call_is_a_result(side: Side, performer: Performer) -> None:
    stream = performer.perform(listener_row("calling", call_what_fails, calls=()), side)
    assert stream[0] == Did("the listener", "open", "ENOENT")


def test_one_that_fails_says_how(side: Side, performer: Performer) -> None:
    *_, end = performer.perform(listener_row("failing", fail), side)
    assert end == Did(UNFINISHED, "ended", "ListenerEnded: LookupError: what is wrong")
    nothing_is_left(side)


@pytest.mark.parametrize("act", [hang, leave_child])
def test_one_that_hangs_is_given_up(
    act: object, side: Side, performer: Performer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performer, "patience", 4)
    stream = performer.perform(listener_row("hanging", act), side)  # type: ignore[arg-type]
    assert stream[-1] == Did(UNFINISHED, "ended", "too late"), lines(stream)
    nothing_is_left(side)
