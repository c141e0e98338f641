"""Random sequences: the same on the real kernel and on the emulator.

The suite tries a few, the same in every run. `pytest tests/conform/test_sequences.py --sequences 2000` tries so many new ones; what that finds
becomes a workload (fusehsm/conform/workloads).
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fusehsm.conform.accessor import Zygote
from fusehsm.conform.divergences import applying
from fusehsm.conform.perform import Comparison, Performer, Verdict
from fusehsm.conform.sequences import Step, sequence
from fusehsm.conform.sides import Side, emulated_side, kernel_side
from fusehsm.conform.stream import Did, Stream, ended_early, lines
from fusehsm.conform.workload import Workload
from tests.support.sequence_generator import machine

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]

SAMPLE = 40  # sequences in the suite, for each engine
BATCH = 250  # of those that are asked for: a test that takes minutes is taken for one that hangs
STEPS = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many batches as were asked for."""
    if "batch" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--sequences")
        metafunc.parametrize("batch", range(max(1, -(-wanted // BATCH))))


@pytest.fixture(scope="module")
def sides(kernel_events: Path, session_directory: Path, engine: str) -> Iterator[tuple[Side, Side]]:
    """The real kernel's and the emulator's."""
    place = kernel_events / f"sequences-{engine}"
    (place / "kernel").mkdir(parents=True)
    path = session_directory / f"sequences-{engine}"
    with emulated_side(place / "backing", path, engine, "--events", "exact") as emulated:
        yield kernel_side(place / "kernel"), emulated


@pytest.fixture(scope="module")
def performer() -> Iterator[Performer]:
    """What runs them."""
    zygote = Zygote()
    yield Performer(zygote)
    zygote.close()


def performed(steps: list[Step], sides: tuple[Side, Side], performer: Performer) -> tuple[Stream, Stream]:
    """The streams of both sides."""
    kernel, emulated = (performer.perform(written(steps), side) for side in sides)
    return kernel, emulated


def written(steps: list[Step]) -> Workload:
    """Those steps as a workload."""
    return Workload("sequences", "written", sequence(steps))


def test_a_sequence_goes_on_after_what_fails(sides: tuple[Side, Side], performer: Performer) -> None:
    """Also beyond a mapping that reaches past the file's end, and what Python refuses before any system call."""
    steps: list[Step] = [
        ("open", 0, "one", os.O_RDWR),
        ("map", 0, 16384, 1 << 20),
        ("lseek", 0, 1 << 70),
        ("pread", 0, 100, -1),
        ("pread", 0, 100, 0),
    ]
    for stream in performed(steps, sides, performer):
        assert not ended_early(stream)
        assert [entry.what for entry in stream if isinstance(entry, Did) and entry.who == "accessor"] == [
            "open",
            "map",
            "lseek",
            "pread",
            "pread",
        ]
    kernel, emulated = performed(steps, sides, performer)
    assert lines(kernel) == lines(emulated)


def test_a_sequence_that_cannot_be_is_no_success(sides: tuple[Side, Side], performer: Performer) -> None:
    steps: list[Step] = [("open", 7, "one", os.O_RDWR)]
    kernel, emulated = performed(steps, sides, performer)
    assert ended_early(kernel)
    assert ended_early(emulated)
    comparison = Comparison(written(steps), kernel, emulated, ())
    assert comparison.verdict is Verdict.DIFFERENT
    assert comparison.difference()


def test_sequences(
    sides: tuple[Side, Side], performer: Performer, engine: str, batch: int, pytestconfig: pytest.Config
) -> None:
    kernel, emulated = sides

    def compare(steps: list[Step]) -> list[str]:
        workload = Workload("sequences", "drawn", sequence(steps))
        comparison = performer.compare(workload, performer.perform(workload, kernel), emulated, (), None)
        if comparison.verdict is Verdict.IDENTICAL:
            return []
        return comparison.difference()

    wanted = pytestconfig.getoption("--sequences")
    drawn = machine(
        compare,
        allocates=not applying("fallocate", engine),
        copies=not applying("sent from the cache", engine),
    )
    run_state_machine_as_test(
        drawn,
        settings=settings(
            max_examples=BATCH if wanted else SAMPLE,
            stateful_step_count=STEPS,
            derandomize=not wanted,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )
