"""The fixtures of tests that run listener programs: a world to run them in, and their start.

A module has them with `pytest_plugins = ["tests.support.listener_program_fixtures"]`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.kernel_and_run import Program, RunWorld, Start, standing
from tests.support.listener_programs.building import Marks, listener_words
from tests.support.listener_steps import make_files

#: For programs that are listener and accessor in one.
SHARED_WORLDS = [
    pytest.param("kernel", marks=pytest.mark.kernel),
    pytest.param("run", marks=pytest.mark.fuse),
]
WORLDS = [*SHARED_WORLDS, pytest.param("view", marks=pytest.mark.fuse)]


@pytest.fixture(params=WORLDS)
def run_world(
    request: pytest.FixtureRequest, places: Callable[[str], Path], fuse: None
) -> Iterator[RunWorld]:
    """A directory of stubs, in each world."""
    if request.param == "kernel":
        request.getfixturevalue("kernel_events")
    place = places("listeners")
    make_files(place)
    with standing(request.param, place) as world:
        yield world


@pytest.fixture
def start(run_world: RunWorld, session_directory: Path) -> Iterator[Start]:
    """start(style, *arguments, build=..., marks=..., keep=...) -> a listener that is ready; it goes with the test."""
    started: list[Program] = []

    def start(
        style: str,
        *arguments: str,
        build: str = "dynamic",
        marks: Marks = (("add|mount", "PRE_ACCESS", ""),),
        keep: bool = False,
    ) -> Program:
        words = listener_words(
            session_directory, run_world.place, style, *arguments, build=build, marks=marks
        )
        started.append(Program(run_world.command(*words, keep=keep)))
        started[-1].wait_ready()
        return started[-1]

    yield start
    for listener in started:
        listener.close()
