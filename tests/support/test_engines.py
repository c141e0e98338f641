"""The tests' own engines: who runs for each, and who once."""

import subprocess
import sys

import pytest

from fusehsm.conform.divergences import DIVERGENCES, ENGINES
from fusehsm.engines.choice import ENGINES as CHOICES
from tests.support.engines import diverges
from tests.support.harness import ROOT, environment

EITHER = (
    "tests/overlay/test_posix_caches.py::test_reused_inode_numbers",
    "tests/emulator/test_waiting.py::test_a_killed_thread_takes_its_process_along",
)


def collected(*arguments: str) -> list[str]:
    """The ids of tests, without their module."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_each_engine_has_its_tests() -> None:
    assert {*ENGINES, "auto"} == {*CHOICES}
    ids = [f"test_reused_inode_numbers[{name}]" for name in ENGINES]
    assert collected(*EITHER) == [
        *ids,
        "test_a_killed_thread_takes_its_process_along[kernel]",
        *(f"test_a_killed_thread_takes_its_process_along[{name}]" for name in ENGINES),
    ]


@pytest.mark.parametrize("name", ENGINES)
def test_one_engine_alone(name: str) -> None:
    expected = [
        f"test_reused_inode_numbers[{name}]",
        "test_a_killed_thread_takes_its_process_along[kernel]",
        f"test_a_killed_thread_takes_its_process_along[{name}]",
    ]
    assert collected(*EITHER, "--engine", name) == expected


def test_some_tests_need_no_engine() -> None:
    assert collected("tests/commands/test_status.py::test_all_mounts", "--engine", "devfuse") == [
        "test_all_mounts"
    ]
    assert collected("tests/commands/test_status.py::test_all_mounts") == ["test_all_mounts"]


def test_only_engines_diverge() -> None:
    assert not any(diverges(entry.name, "") for entry in DIVERGENCES)
    assert all({*entry.engines} <= {*ENGINES} for entry in DIVERGENCES)
    assert all(entry.engines or any(entry.until) for entry in DIVERGENCES)  # nobody would have it
    with pytest.raises(KeyError):
        diverges("no such entry", "devfuse")
