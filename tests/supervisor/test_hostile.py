"""A listener that does what none should must not keep another one, of the same run, from answering.

What the kernel does of it, `fusehsm run` has to do without the kernel's help: it reads and writes other processes' memory, and waits for them.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor, PendingCall
from tests.conftest import MakeAccessor
from tests.support import leftovers
from tests.support.kernel_and_mount import Failed, command_line
from tests.support.kernel_and_run import STEP, Program, RunWorld, processes_at
from tests.support.listener_programs.building import listener_words, program
from tests.support.listener_steps import PAGE, SECRET, Step, asked, planned, take

pytestmark = pytest.mark.any_engine
pytest_plugins = ["tests.support.listener_program_fixtures"]

BOTH = '"$0" "$1" "$2" & shift 2; exec "$@"'  # for sh -c: the hostile program beside the innocent listener
INNOCENT = (
    Step("pread_path", "stub", (10, 0), planned(0, 10), (asked(0, PAGE),)),
    Step("pwrite_path", "stub", (b"x", 2 * PAGE), 1, (asked(2 * PAGE, PAGE),)),
    Step("pread_path", SECRET, (10, 0), Failed(errno.EIO), (asked(0, PAGE, SECRET, "DENY EIO"),)),
)

Beside = Callable[[str], Program]


@pytest.fixture
def beside(run_world: RunWorld, session_directory: Path) -> Iterator[Beside]:
    """beside(style) -> an innocent listener of "stub" and SECRET that is ready, and the hostile program in the same run."""
    started: list[Program] = []

    def beside(style: str) -> Program:
        marks = (("add", "PRE_ACCESS", "stub"), ("add", "PRE_ACCESS", SECRET))
        place = run_world.place
        innocent = listener_words(session_directory, place, "poll", "--deny", "*.denied=EIO", marks=marks)
        hostile = [*program(session_directory, "hostile"), style, str(place)]
        started.append(Program(run_world.command("sh", "-c", BOTH, *hostile, *innocent)))
        started[-1].wait_ready()
        started[-1].output.wait_for(lambda line: line == "hostile ready", STEP)
        return started[-1]

    yield beside
    for running in started:
        running.close()


@contextmanager
def answering(world: RunWorld, running: Program, accessor: Accessor) -> Iterator[None]:
    """The innocent listener answers before, after and between what the body does, and ends in peace."""
    expected = take(accessor, world.place, INNOCENT)
    yield
    expected += take(accessor, world.place, (*INNOCENT, *INNOCENT))
    accessor.start("pread_path", str(world.place / "end"), 1, 0)
    assert running.end() == 0, running.complaints.lines
    kill_hostile(world)
    lines = running.lines
    said = [line for line in lines[lines.index("ready") + 1 :] if not line.startswith("hostile ")]
    assert said[:-1] == expected


def kill_hostile(world: RunWorld) -> None:
    """End the hostile program, whatever it is at."""
    for pid in hostile_processes(world):
        leftovers.kill(pid)
    assert not hostile_processes(world), "it cannot be killed"


def hostile_processes(world: RunWorld) -> list[int]:
    """Those that run it."""
    return [pid for pid in processes_at(world.place) if "listeners-hostile" in program_of(pid)]


def program_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:  # it has gone
        return ""


def start_read(world: RunWorld, accessor: Accessor) -> PendingCall:
    """An access that the hostile program is asked about."""
    return accessor.start("pread_path", str(world.place / "many-0"), 10, 0)


def came_back(call: PendingCall) -> object:
    """What an access returned, or the errno of its failure."""
    try:
        return call.result(STEP)
    except OSError as error:
        return error.errno


def test_descriptors_closed_while_others_wait_in_them(
    run_world: RunWorld, beside: Beside, make_accessor: MakeAccessor
) -> None:
    running = beside("closes")
    with answering(run_world, running, make_accessor()):
        # Heard by those who still wait in closed groups, or by nobody: no answer comes.
        call = start_read(run_world, make_accessor())
    assert came_back(call) == bytes(10)


def test_a_buffer_that_comes_and_goes(
    run_world: RunWorld, beside: Beside, make_accessor: MakeAccessor
) -> None:
    running = beside("unmaps")
    accessor = make_accessor()
    with answering(run_world, running, make_accessor()):
        # Written, or not written and denied.
        results = [came_back(start_read(run_world, accessor)) for _ in range(100)]
        assert set(map(repr, results)) <= {repr(bytes(10)), repr(errno.EPERM)}


def test_an_answer_that_only_its_listener_could_bring(
    run_world: RunWorld, beside: Beside, make_accessor: MakeAccessor
) -> None:
    running = beside("maps")
    with answering(run_world, running, make_accessor()):
        call = start_read(run_world, make_accessor())
        if run_world.is_kernel:  # where faults make no events
            running.output.wait_for(lambda line: line == "hostile wrote -1", STEP)
    # Answered after its error, or let go by the death of its listener.
    assert came_back(call) == bytes(10)


def test_a_buffer_that_only_its_listener_could_bring(
    run_world: RunWorld, beside: Beside, make_accessor: MakeAccessor
) -> None:
    """And a thread that needs the lock of the memory which the buffer is in: the process can be looked at (proc(5)), and killed."""
    running = beside("reads-into-mapping")
    looker = make_accessor()
    (hostile,) = hostile_processes(run_world)
    with answering(run_world, running, make_accessor()):
        call = start_read(run_world, make_accessor())
        for _ in range(20):
            assert b"reads-into-mapping" in looker.call(command_line, hostile)
            time.sleep(0.1)
    came_back(call)  # it was let go by the death of its listener, or before


def test_a_thousand_who_wait(run_world: RunWorld, beside: Beside, make_accessor: MakeAccessor) -> None:
    running = beside("crowds")
    accessor = make_accessor()
    with answering(run_world, running, make_accessor()):
        results = [came_back(start_read(run_world, accessor)) for _ in range(20)]
        assert results == [bytes(10)] * 20


def test_pointers_to_nowhere(run_world: RunWorld, beside: Beside, make_accessor: MakeAccessor) -> None:
    running = beside("points-nowhere")
    with answering(run_world, running, make_accessor()):
        running.output.wait_for(lambda _: running.output.lines.count("hostile done") == 4, STEP)
