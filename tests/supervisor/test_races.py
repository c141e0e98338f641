"""What races in a listener: events against poll(2), signals against read(2), copies against closes. Each scenario runs to its end within one
program (listeners/races.c), whose lines are the same on the real kernel and under `fusehsm run`.

Nothing here is held against a clock: what hangs is ended, and its lines are missing.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.kernel_and_run import RUN, STEP, Program, RunWorld, standing
from tests.support.listener_program_fixtures import SHARED_WORLDS
from tests.support.listener_programs.building import program
from tests.support.listener_steps import make_files

# The programs use their files themselves, so they are to hear themselves.
pytestmark = [pytest.mark.any_engine, pytest.mark.parametrize("run_world", SHARED_WORLDS, indirect=True)]
pytest_plugins = ["tests.support.listener_program_fixtures"]

LONGEST = 3 * STEP  # seconds: longer than a scenario waits for itself

Race = Callable[..., list[str]]


@pytest.fixture
def race(run_world: RunWorld, session_directory: Path) -> Race:
    """race(scenario, *other places, before=words) -> the lines of the scenario, which ends in peace."""

    def race(scenario: str, *others: Path, before: tuple[str, ...] = ()) -> list[str]:
        words = [*program(session_directory, "races"), scenario, *map(str, (run_world.place, *others))]
        command = run_world.command(*words)
        if not run_world.is_kernel:
            mounts = [word for other in others for word in ("--mount", str(other))]
            # Quiet: most of these programs fill nothing.
            command[len(RUN) : len(RUN)] = ["--quiet", *mounts]
        with Program([*before, *command]) as running:
            lines = running.output.wait_for_end(LONGEST)
            assert (running.end(), running.complaints.wait_for_end(STEP)) == (0, []), lines
        return lines

    return race


# Whether what waits is told of


def test_two_events_at_the_same_moment(race: Race) -> None:
    assert race("poll-pairs") == ["2000 events, readable for nothing 0 times"]


def test_poll_on_one_cpu(race: Race) -> None:
    cpu = min(os.sched_getaffinity(0))
    expected = ["2000 events, readable for nothing 0 times"]
    assert race("poll-crowd", before=("taskset", "-c", str(cpu))) == expected


def test_an_edge_for_whatever_comes_after_the_last_read(race: Race) -> None:
    assert race("epoll-edges") == ["2000 events"]


def test_fionread_takes_nothing_from_a_read_that_waits(race: Race) -> None:
    assert race("fionread-beside-read") == ["500 events"]


def test_a_flood_on_one_mount_leaves_the_other_its_turn(
    race: Race, run_world: RunWorld, places: Callable[[str], Path]
) -> None:
    other = places("listeners")
    make_files(other)
    with standing(run_world.name, other):
        assert race("two-mounts", other) == ["heard beside a flood"] * 2


# Signals


def test_signals_to_one_thread_that_reads(race: Race) -> None:
    assert race("signals-1") == ["501 events, 0 failed, signals handled", "interrupted 0"]


def test_signals_to_several_threads_that_read(race: Race, run_world: RunWorld) -> None:
    """Under `fusehsm run` one of them may be interrupted now and then; none sees an error that no program should."""
    counts, interrupted = race("signals-4")
    assert counts == "504 events, 0 failed, signals handled"
    if run_world.is_kernel:
        assert interrupted == "interrupted 0"


def test_a_signal_for_a_thread_that_cannot_take_it_yet(race: Race) -> None:
    assert race("signal-while-vfork") == ["1 events, 0 failed, interrupted 0, handled 1"]


def test_a_listener_of_several_threads_is_stopped(race: Race) -> None:
    assert race("stop-and-go-on") == [*["stopped"] * 3, "8 events, 0 failed, interrupted 0"]


# Descriptors and mappings


def test_mappings_in_several_threads(race: Race) -> None:
    assert race("mappings-in-threads") == ["0 mappings failed"]


def test_a_copy_while_the_last_descriptor_is_closed(race: Race) -> None:
    """It is of a group that lives, or there is none."""
    assert race("copies-against-closes") == ["0 copies were dead"]


def test_groups_replace_no_open_files(race: Race) -> None:
    assert race("numbers-in-use") == ["0 files replaced"]


# Rights


def test_groups_of_those_without_rights(race: Race) -> None:
    expected = ["as nobody: EPERM", "without CAP_SYS_ADMIN: EPERM", "as root: OK"]
    assert race("rights-dropped") == expected


def test_marks_of_an_inherited_group(race: Race) -> None:
    """Files that may be read, one by one; root without CAP_SYS_ADMIN may read every file."""
    kinds = ["inode: OK", "mount: EPERM", "filesystem: EPERM"]
    assert race("rights-inherited") == [*kinds, "unreadable: EACCES", "1 events", *kinds, "unreadable: OK"]
