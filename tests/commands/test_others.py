"""root's `status`, `umount` and `doctor` at a mount of another user, who has written its server: nothing is believed, waited for, or shown raw."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import fusehsm
from tests.support.requirements import require_fuse, require_root
from tests.support.tier.others import MALLORY, answering, listening_for, silent_mount

pytestmark = pytest.mark.any_engine

_ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e\n\x7f"
_STATUS: dict[str, Any] = {
    "events": "exact",
    "abi": "linux-6.14",
    "nodes": 1,
    "open_files": 0,
    "groups": [],
    "waiting": [],
    "locks": [],
    "leases": [],
    "requests": {},
}
_WAITER = {
    "pid": 1, "path": _ESCAPES, "event": [_ESCAPES], "offset": None, "count": None, "seconds": 1.0, "group": None,
}  # fmt: skip


def _reply(**fields: Any) -> list[bytes]:
    return [b"." + json.dumps({"result": {**_STATUS, **fields}}).encode()]


def _without_end() -> Iterator[bytes]:
    while True:
        yield b"+" + b"x" * 30_000


SENSELESS: dict[str, Callable[[], Any]] = {
    "no part of a reply": lambda: [b"x"],
    "no JSON": lambda: [b".x"],
    "no fields": lambda: [b'.{"result": {}}'],
    "nested too deep": lambda: [b"." + b"[" * 30_000],
    "words as numbers": lambda: _reply(nodes="x"),
    "a list as text": lambda: _reply(events=[]),
    "groups of numbers": lambda: _reply(groups=[1]),
    "a number of 65 bits": lambda: _reply(nodes=1 << 64),
    "a time without end": lambda: [b"." + _reply(waiting=[_WAITER])[0][1:].replace(b"1.0", b"1e999")],
    "an errno of words": lambda: [b'.{"errno": "x", "message": 1}'],
    "without end": _without_end,
    "empty parts without end": lambda: iter(lambda: b"+", None),
}


@pytest.fixture
def point(places: Callable[[str], Path]) -> Path:
    require_root()
    require_fuse()
    return places("point")


@pytest.fixture
def listener(point: Path) -> Iterator[socket.socket]:
    """Where root looks for the server of the mount at `point`, which is Mallory's and never answers the kernel."""
    with silent_mount(MALLORY, point, b"fuse.fusehsm"), ExitStack() as stack:
        (device,) = [
            words[2] for line in Path("/proc/self/mountinfo").read_text().splitlines() if (words := line.split())[4] == str(point)
        ]  # fmt: skip
        yield stack.enter_context(listening_for(MALLORY, device))


@pytest.mark.parametrize("answer", SENSELESS)
def test_what_makes_no_sense_is_one_line(point: Path, listener: socket.socket, answer: str) -> None:
    with answering(listener, lambda request: SENSELESS[answer]()) as asked:
        done = fusehsm("status", point)
    assert len(asked) in (1, 2)
    assert done.returncode == 1
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{point} (from ")
    assert second.startswith(f"  {point}: ")


def test_what_it_says_is_escaped_and_says_nothing_of_other_mounts(
    point: Path, listener: socket.socket
) -> None:
    told = _reply(waiting=[_WAITER], events=_ESCAPES, destination="/etc", owner_uid=0, device=_ESCAPES)
    with answering(listener, lambda request: told):
        text, as_json = fusehsm("status", point), fusehsm("status", "--json", point)
    assert (text.returncode, text.stderr) == (0, "")
    for said in (text.stdout, as_json.stdout):
        assert "owned" in said
        assert not {letter for letter in said if not letter.isprintable()} - {"\n"}
    (found,) = json.loads(as_json.stdout)
    assert (found["destination"], found["owner_uid"]) == (str(point), MALLORY)


def test_a_server_that_accepts_nobody_is_not_waited_for(point: Path, listener: socket.socket) -> None:
    with ExitStack() as stack:
        while True:  # until its backlog is full
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            waiting.setblocking(False)
            try:
                waiting.connect(listener.getsockname())
            except BlockingIOError:
                break
        done = fusehsm("status", point)
        assert done.returncode == 1
        assert "its daemon does not answer" in done.stdout
        assert fusehsm("umount", point).returncode == 0
        assert not os.path.ismount(point)


def test_a_server_that_does_not_end_is_not_waited_for(point: Path, listener: socket.socket) -> None:
    # This process has the socket, and goes on.
    done = fusehsm("umount", point)
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.ismount(point)


def test_doctor_does_not_wait_for_it(point: Path, listener: socket.socket) -> None:
    done = fusehsm("doctor", point)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fusehsm: {point}: ")
