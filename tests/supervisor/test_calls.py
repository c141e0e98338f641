"""Wrong and unusual calls on groups, made by a C program on the real kernel and under `fusehsm run`: every line is the same."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.kernel_and_run import STEP, Program, standing
from tests.support.listener_programs.building import program
from tests.support.requirements import require

pytestmark = pytest.mark.any_engine

TMPFS = "/dev/shm"

# What every Linux since 6.14 says; the rest of the lines has no other expectation than to be the same.
KNOWN = {
    "init-plain": "descriptor",
    "init-two-classes": "-1 EINVAL",
    "mark-null-and-cwd": "-1 EBADF",
    "mark-relative-to-file": "-1 ENOTDIR",
    "mark-tmpfs": "-1 EOPNOTSUPP",
    "read-empty": "-1 EAGAIN",
    "read-one-byte-short": "-1 EINVAL",
    "read-just-enough": "48",
    "read-bad-pointer-reader": "-1 EPERM",
    "fionread-three": "72",
    "readv-until-interrupted": "48",
    "readv-was-interrupted": "1",
    "probe-errno": "24",
    "write-deny-eio": "8",
    "write-reader": "-1 EIO",
    "pread": "-1 ESPIPE",
    "poll-unanswered": "0",
    "copy-reader": "-1 ENOSPC",
    "closed-read": "-1 EBADF",
}

Lines = dict[str, list[str]]


@pytest.fixture(scope="module")
def lines_of(
    places: Callable[[str], Path], session_directory: Path, kernel_events: Path, fuse: None
) -> Callable[[str], Lines]:
    """What each call returned in that world, in the order of the calls of that name; asked once."""
    require(os.path.ismount(TMPFS), f"needs a tmpfs at {TMPFS}")
    found: dict[str, Lines] = {}

    def lines_of(name: str) -> Lines:
        if name not in found:
            found[name] = _run(name, places("calls"), program(session_directory, "calls"))
        return found[name]

    return lines_of


def _run(name: str, place: Path, calls: tuple[str, ...]) -> Lines:
    for file in ("file", "other", "third"):
        (place / file).write_bytes(b"content")
    (place / "folder").mkdir()
    (place / "folder" / "mine").write_bytes(b"content")
    (place / "link").symlink_to("file")
    (place / "nowhere").symlink_to("missing")
    os.mkfifo(place / "fifo")
    with standing(name, place) as world, Program(world.command(*calls, str(place), TMPFS)) as running:
        code = running.process.wait(4 * STEP)
        lines: Lines = {}
        for line in running.lines:
            call, _, result = line.partition(" = ")
            lines.setdefault(call, []).append(result)
        assert code == 0, (running.complaints.lines, running.lines[-1:])
        return lines


@pytest.mark.kernel
def test_the_kernels_calls(lines_of: Callable[[str], Lines]) -> None:
    lines = lines_of("kernel")
    assert len(lines) > 200
    assert {call: lines[call] for call in KNOWN} == {call: [result] for call, result in KNOWN.items()}


@pytest.mark.kernel
@pytest.mark.fuse
def test_the_same_calls_under_run(lines_of: Callable[[str], Lines]) -> None:
    ours, kernels = lines_of("run"), lines_of("kernel")
    assert ours.keys() == kernels.keys()
    # Only at reserved numbers can a group's calls be told from others: at 310 it cannot be used.
    used = {"placed-read", "placed-fionread", "placed-mark", "placed-read-event", "placed-answered"}
    assert {result for call in used for result in ours[call]} == {"-1 EINVAL"}
    assert _without_placed(ours, used) == _without_placed(kernels, used)


@pytest.mark.kernel
@pytest.mark.fuse
def test_the_same_calls_with_any_descriptor(lines_of: Callable[[str], Lines]) -> None:
    assert lines_of("any-descriptor") == lines_of("kernel")


def _without_placed(lines: Lines, placed: set[str]) -> Lines:
    # Its last descriptor was closed without an answer, so its reader was let go.
    return {call: result for call, result in lines.items() if call not in {*placed, "placed-reader"}}
