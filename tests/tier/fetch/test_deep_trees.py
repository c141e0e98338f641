"""Trees deeper than a path, than the descriptors of a process and than Python's stack: every command goes through them or says where it stops."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.linux.beneath import LONGEST_PATH
from tests.support import harness
from tests.support.tier.deep import LEVELS, innermost, nested
from tests.support.tier.fetching import expect_record_at_rest, fetching, run
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of

pytestmark = pytest.mark.any_engine

LIMITED = ("prlimit", "--nofile=128", *harness.COMMAND)

# From directory to directory, as programs get there; then what is left of the command line.
_DOWN = """
import os, sys
os.chdir(sys.argv[1])
while os.path.isdir("d"):
    os.chdir("d")
os.execvp(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def store(places: Callable[[str], Path], target: Path) -> Path:
    """A store with two files, of which `target` has stubs."""
    root = places("store")
    for seed, name in enumerate(("a", "b"), 1):
        (root / name).write_bytes(content_of(600_000, seed))
    plant(root, target)
    return root


def test_a_fetch_serves_and_the_commands_answer(store: Path, target: Path, backend: str) -> None:
    """With a stub at the bottom; on the real kernel no path leads there. (A mount takes too long for a test to look up names so far down.)"""
    with nested(target, LEVELS if backend == "kernel" else LEVELS // 3) as bottom:
        os.rename(target / "b", "b", dst_dir_fd=bottom)
        with fetching(store, target, "--backend", backend, "--max-size", "9M", command=LIMITED) as served:
            assert run("cmp", store / "a", target / "a").stdout == ""
            there = run(sys.executable, "-c", _DOWN, target, "cmp", store / "b", "b")
            assert (there.returncode, there.stdout, there.stderr) == (0, "", "")
            for words in (("status",), ("pin",), ("unpin",), ("evict", "--older-than", "1d")):
                done = harness.fusehsm(*words, target)
                assert (done.returncode, done.stderr) == (0, "")
            _, said = served.end()
            assert (served.process.returncode, said) == (0, "")
        done = harness.fusehsm("status", target)
        assert (done.returncode, "2 files of 1.2 MB, 1.2 MB here" in done.stdout) == (0, True)
        expect_record_at_rest("b", dir_fd=bottom)


def test_what_lies_too_deep_is_left_out_with_a_line(store: Path, target: Path, backend: str) -> None:
    with nested(target, LONGEST_PATH // 200 + 10, "d" * 199):
        with fetching(store, target, "--backend", backend, "--max-size", "1M") as served:
            for name in ("a", "b"):
                assert run("cmp", store / name, target / name).stdout == ""
            assert harness.fusehsm("status", target).returncode == 0
            _, said = served.end()
            assert served.process.returncode == 0
            assert "lies too deep" in "".join([*served.said, said])
        done = harness.fusehsm("status", target)
        assert (done.returncode, done.stderr.count("lies too deep"), done.stderr.count("\n")) == (0, 1, 1)


def test_populate_and_validate(store: Path, target: Path) -> None:
    with nested(store) as bottom:
        os.close(os.open("empty", os.O_CREAT | os.O_WRONLY, dir_fd=bottom))
        os.utime(bottom, ns=(1, 2))
        try:
            for outcome in (f"{LEVELS + 1:,} new", f"{LEVELS + 3:,} right"):
                done = run(*LIMITED, "populate", store, target)
                assert (done.returncode, done.stderr) == (0, "")
                assert outcome in done.stdout
            fd = innermost(target)
            try:
                assert os.fstat(fd).st_mtime_ns == 2
                assert os.listdir(fd) == ["empty"]
            finally:
                os.close(fd)
            for name in ("a", "b"):
                (target / name).write_bytes((store / name).read_bytes())
            done = run(*LIMITED, "validate", store, target, "--reads", "1")
            assert (done.returncode, done.stderr) == (0, "")
        finally:
            run("rm", "-rf", target / "d")
