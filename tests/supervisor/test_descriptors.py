"""A group at all kinds of descriptor numbers, with `--any-descriptor` and without.

With it every number works as on the real kernel. Without it a group works at reserved numbers, and at others every call fails and a line on stderr
names the option.
"""

from contextlib import suppress

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.supervisor.options import RunOptions, check
from fusehsm.supervisor.placing import BLOCK, LOW_WINDOWS, descriptors_in, is_reserved, reserved_numbers
from tests.support.kernel_and_run import STEP, Program, RunWorld, Start
from tests.support.listener_steps import SERIES, finish, planned, take

pytestmark = pytest.mark.any_engine
pytest_plugins = ["tests.support.listener_program_fixtures"]

KERNEL = pytest.param("kernel", marks=pytest.mark.kernel)
RUN = pytest.param("run", marks=pytest.mark.fuse)
ANY = pytest.param("any-descriptor", marks=pytest.mark.fuse)
OPTION = "--any-descriptor"
EVERYWHERE = pytest.mark.parametrize("run_world", [KERNEL, RUN, ANY], indirect=True)
WITH_OPTION = pytest.mark.parametrize("run_world", [KERNEL, ANY], indirect=True)
WITHOUT_OPTION = pytest.mark.parametrize("run_world", [RUN], indirect=True)


# Numbers


@pytest.mark.pure
def test_the_first_number_suits_the_limit() -> None:
    for limit, first in (
        (64, 63),
        (100, 63),
        (256, 255),
        (300, 255),
        (1000, 999),
        (1024, 1023),
        (1 << 20, 1023),
    ):
        assert next(reserved_numbers(limit)) == first
    assert list(reserved_numbers(56)) == []


@pytest.mark.pure
def test_the_numbers_are_those_that_the_filter_stops() -> None:
    numbers = list(reserved_numbers(5 * BLOCK))
    assert sorted(numbers) == [number for number in range(5 * BLOCK) if is_reserved(number)]
    assert len(numbers) == sum(map(len, LOW_WINDOWS)) + 4 * 32
    assert not any(map(is_reserved, (-1, 0, 3, 1 << 20, (1 << 20) + 1000)))


@pytest.mark.pure
def test_descriptors_in_a_message() -> None:
    rights, credentials = (
        b"\x18\0\0\0\0\0\0\0\1\0\0\0\1\0\0\0\5\0\0\0\7\0\0\0",
        b"\x1c\0\0\0\0\0\0\0\1\0\0\0\2\0\0\0" + bytes(16),
    )
    assert descriptors_in(credentials + rights) == [5, 7]
    assert descriptors_in(rights[:20]) == [5]
    assert descriptors_in(bytes(64)) == descriptors_in(b"") == []


@pytest.mark.pure
def test_an_accessor_has_no_groups() -> None:
    with pytest.raises(ValueError, match="--any-descriptor, --accessor: "):
        check(RunOptions(command=("true",), accessor=True, any_descriptor=True))


# What works without the option, too


@EVERYWHERE
@pytest.mark.parametrize("style", ["few-allowed", "many-open", "from-3"])
def test_programs_with_numbers_of_their_own(
    style: str, run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start(style, "--deny", "*.denied=EIO")
    expected = take(accessor, run_world.place, SERIES)
    assert finish(run_world, listener, accessor) == expected
    assert listener.complaints.wait_for_end(STEP) == []


@EVERYWHERE
def test_a_group_that_nobody_receives(run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    """It lives as long as the message, and its end lets go who waits."""
    listener = start("dropped")
    read = accessor.start("pread_path", str(run_world.place / "stub"), 10, 0)
    listener.output.wait_for(lambda line: line == "on its way", STEP)
    assert read.result(STEP) == bytes(10)


# What works with it


@WITH_OPTION
@pytest.mark.parametrize("style", ["copy-to", "handed", "taken", "exec-placed"])
def test_groups_at_any_number(style: str, run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    listener = start(style, "--deny", "*.denied=EIO")
    expected = take(accessor, run_world.place, SERIES)
    assert finish(run_world, listener, accessor) == expected
    assert listener.complaints.wait_for_end(STEP) == []


STYLES = ("blocking", "epoll-edge-one", "readv", "writev", "fionread", "workers", "exec", "alarm-restart")
BUILDS = (*(("dynamic", style) for style in STYLES), ("go", "netpoll"), ("python", "poll"))


@pytest.mark.parametrize("run_world", [ANY], indirect=True)
@pytest.mark.parametrize(("build", "style"), BUILDS)
def test_ways_to_wait_with_all_calls_stopped(
    build: str, style: str, run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start(style, "--deny", "*.denied=EIO", build=build)
    expected = take(accessor, run_world.place, SERIES)
    assert finish(run_world, listener, accessor) == expected


@pytest.mark.parametrize("run_world", [ANY], indirect=True)
@pytest.mark.parametrize("style", ["death", "exec-away"])
def test_the_last_close_with_all_calls_stopped(
    style: str, run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start(style, keep=True)
    if style == "death":
        assert accessor.call("pread_path", str(run_world.place / "stub"), 10, 0, timeout=STEP) == planned(
            0, 10
        )
    read = accessor.start("pread_path", str(run_world.place / "whole"), 10, 0)
    listener.output.wait_for(lambda line: line.endswith("HELD"), STEP)
    listener.close()
    assert read.result(STEP) == bytes(10)


# What fails without it


def complaint_of(listener: Program) -> str:
    """The only line on stderr that is not the program's own."""
    lines = [line for line in listener.complaints.lines if line.startswith("fusehsm run: ")]
    assert len(lines) == 1, listener.complaints.lines
    return lines[0]


@WITHOUT_OPTION
@pytest.mark.parametrize("style", ["copy-to", "handed", "taken", "exec-placed"])
def test_a_group_at_another_number_cannot_be_read(
    style: str, run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start(style)
    # It goes with the listener, and may come too late for its mount.
    with suppress(ConnectionAbortedError):
        assert accessor.call("pread_path", str(run_world.place / "stub"), 10, 0, timeout=STEP) == bytes(10)
    assert listener.end() == 1
    listener.complaints.wait_for_end(STEP)
    assert "listener: read: Invalid argument" in listener.complaints.lines
    assert OPTION in complaint_of(listener)


@WITHOUT_OPTION
def test_no_call_on_another_number_gets_anything(
    run_world: RunWorld, start: Start, accessor: Accessor
) -> None:
    listener = start("elsewhere", "--deny", "*.denied=EIO")
    expected = take(accessor, run_world.place, SERIES)
    calls = (
        "read",
        "readv",
        "preadv2",
        "splice",
        "write",
        "fanotify_mark",
        "io_uring",
        "io_uring at the first",
    )
    refusals = [f"{call}: EINVAL" for call in calls]
    accessor.start("pread_path", str(run_world.place / "end"), 1, 0)
    assert listener.end() == 0
    said = listener.lines[listener.lines.index("ready") + 1 :]
    assert [line for line in said if line != "ready"][:-1] == [*refusals, *expected]
    listener.complaints.wait_for_end(STEP)
    assert OPTION in complaint_of(listener)


@WITHOUT_OPTION
def test_no_number_is_free(run_world: RunWorld, start: Start) -> None:
    with pytest.raises(
        AssertionError, match=f"(?s)limit of 50 .* {OPTION}.*fanotify_init: Too many open files"
    ):
        start("too-few-allowed")


@pytest.mark.parametrize("run_world", [ANY], indirect=True)
def test_few_numbers_with_the_option(run_world: RunWorld, start: Start, accessor: Accessor) -> None:
    listener = start("too-few-allowed", "--deny", "*.denied=EIO")
    expected = take(accessor, run_world.place, SERIES)
    assert finish(run_world, listener, accessor) == expected
