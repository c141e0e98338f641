"""A user who keeps a file locked in the kernel, for as long as they like, holds up nobody who uses other files, and no command of root's."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import harness
from tests.support.requirements import require_root
from tests.support.tier.fetching import fetching, run
from tests.support.tier.locking import locked
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of

pytestmark = [pytest.mark.any_engine, pytest.mark.kernel]

MIB = 1 << 20
SIZE = 8 * MIB
OPTIONS = ("--backend", "kernel", "--read-ahead", "0", "--on-error", "EAGAIN", "--deadline", "3s")
REFUSED = "Resource temporarily unavailable"
_READING = """
import os, sys, threading
path, number, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def read(offset):
    try:
        os.pread(os.open(path, os.O_RDONLY), 10, offset)
        said = "read"
    except OSError as error:
        said = error.strerror
    os.write(1, said.encode() + b"\\n")
for n in range(number):
    threading.Thread(target=read, args=(n * step,)).start()
"""


@pytest.fixture
def store(places: Callable[[str], Path], target: Path, kernel_events: Path) -> Path:
    """A store of three files, of which `target` has stubs."""
    require_root()
    store = places("store")
    for number, name in enumerate(("locked", "other", "third")):
        (store / name).write_bytes(content_of(SIZE, number))
    plant(store, target)
    return store


def read(path: Path, offset: int) -> str:
    done = run("dd", f"if={path}", "bs=1", f"skip={offset}", "count=1", "status=none")
    return done.stderr.rsplit(": ")[-1].strip()


def expect_others_served(store: Path, target: Path) -> None:
    for name in ("other", "third"):
        compared = run("cmp", store / name, target / name, timeout=20)
        assert (compared.stdout, compared.stderr) == ("", "")
        assert "evicted 1 files" in harness.fusehsm("evict", target / name, timeout=20).stdout
    assert harness.fusehsm("status", target, timeout=20).returncode == 0


def test_changed_while_no_fetch_served_it(store: Path, target: Path) -> None:
    """Whether a range of it has holes, only lseek(2) can tell."""
    with (target / "locked").open("r+b") as file:
        file.write(b"x" * MIB)
    with fetching(store, target, *OPTIONS) as served:
        with locked(target / "locked"):
            assert read(target / "locked", 5 * MIB) == REFUSED
            expect_others_served(store, target)
        assert read(target / "locked", 5 * MIB) == "Input/output error"
        assert read(target / "locked", 100) == ""
        served.end()


def test_many_who_read_it(store: Path, target: Path) -> None:
    """They take neither the threads for files, nor the requests to the store; and root's commands pass it over."""
    with fetching(store, target, *OPTIONS, "--jobs", "4") as served:
        with locked(target / "locked"):
            command = [sys.executable, "-c", _READING, str(target / "locked"), "30", str(MIB // 4)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as readers:
                with (target / "other").open("ab", buffering=0) as file:
                    file.write(b"more")
                with (store / "other").open("ab") as file:
                    file.write(b"more")
                assert run("cmp", "-n", str(SIZE), store / "third", target / "third", timeout=20).stdout == ""
                assert readers.stdout is not None
                answers = readers.stdout.read().splitlines()
            # The first block came before the file was locked.
            assert set(answers) == {"read", REFUSED}
            assert harness.fusehsm("evict", target, timeout=30).returncode == 0
            assert harness.fusehsm("pin", target / "third", timeout=20).returncode == 0
            done = harness.fusehsm("pin", target / "locked", timeout=20)
            assert (done.returncode, "does not answer" in done.stderr) == (1, True)
        assert run("cmp", "-i", str(MIB), store / "locked", target / "locked").stdout == ""
        served.end()


def test_more_who_read_it_than_can_wait(store: Path, target: Path) -> None:
    """A share of those who wait is left to them, long before the deadline."""
    few = ["prlimit", "--nofile=448", *harness.COMMAND]
    with fetching(store, target, *OPTIONS[:-1], "60s", command=few) as served:
        with locked(target / "locked"):
            command = [sys.executable, "-c", _READING, str(target / "locked"), "300", "20000"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as readers:
                try:
                    assert run("cmp", store / "other", target / "other", timeout=20).stdout == ""
                finally:
                    readers.kill()
        served.end()


def test_a_look_at_the_tree_leaves_out_directories_that_do_not_answer(store: Path, target: Path) -> None:
    names = ("first", "second")
    for name in names:
        (store / name).mkdir()
        (store / name / "inner").write_bytes(b"content")
    plant(store, target)
    with fetching(store, target, *OPTIONS, "--max-size", "100M") as served:
        with locked(*(target / name for name in names)):
            for _ in range(2):
                shown = harness.fusehsm("status", "--json", target, timeout=20)
                assert (shown.returncode, "other" in shown.stdout, "inner" in shown.stdout) == (
                    0,
                    True,
                    False,
                )
            expect_others_served(store, target)
            tasks = Path(f"/proc/{served.process.pid}/task")
            threads = len(list(tasks.iterdir()))
            for _ in range(5):
                harness.fusehsm("status", target, timeout=20)
            assert len(list(tasks.iterdir())) <= threads + 2
        assert "inner" in harness.fusehsm("status", "--json", target).stdout
        _, complaints = served.end()
    assert complaints.count("does not answer") == 1


def test_a_start_says_that_a_directory_does_not_answer(store: Path, target: Path) -> None:
    (target / "first").mkdir()
    with locked(target / "first"):
        process = subprocess.Popen(
            [*harness.COMMAND, "fetch", str(store), str(target), *OPTIONS], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        assert "a directory in it does not answer" in process.stderr.readline()
    assert process.wait(harness.PATIENCE) == 1
    process.stderr.close()


def test_its_record_does_not_keep_fetch_from_ending(store: Path, target: Path) -> None:
    with fetching(store, target, *OPTIONS) as served:
        for name in ("locked", "other"):
            assert read(target / name, 100) == ""
        with locked(target / "locked"):
            served.process.terminate()
            assert served.process.stderr is not None
            assert "the record of a file is not closed" in served.process.stderr.readline()
            # It serves no more, and holds nothing: the next one can begin. (What of it waits in the kernel ends with the lock.)
            with fetching(store, target, *OPTIONS) as again:
                assert run("cmp", store / "third", target / "third", timeout=20).stdout == ""
                again.kill()
        assert served.process.wait(harness.PATIENCE) == 0
