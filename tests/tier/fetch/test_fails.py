"""A fetch that fails of an error of its own: no accessor reads zeros because of it, where that can be avoided, and one line reports it."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs import record as residency
from fusehsm.tier.stubs.record import Flags
from fusehsm.tier.stubs.tree import Namespace
from tests.support import harness
from tests.support.requirements import require
from tests.support.tier.fetching import Fetching, expect_record_at_rest, fetching, is_mounted, run
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of

pytestmark = pytest.mark.any_engine

MIB = 1 << 20
PREAD64 = {"x86_64": "17", "aarch64": "67"}


def with_fault(fault: str) -> Sequence[str]:
    """The command with a fault in it (failing.py)."""
    return (sys.executable, "-m", "tests.support.tier.failing", fault)


def fail(served: Fetching) -> tuple[int, str]:
    """Set off the fault "end=..."; exit code, and what was said."""
    _, said = served.process.communicate("go", timeout=harness.PATIENCE)
    return served.process.returncode, said


@pytest.fixture
def big(places: Callable[[str], Path], target: Path) -> Path:
    """A store with one file of 3 MiB, of which `target` has a stub."""
    store = places("store")
    (store / "big").write_bytes(content_of(3 * MIB))
    plant(store, target)
    return store


@pytest.mark.fuse
@pytest.mark.parametrize("kind", ["RuntimeError", "OSError", "SystemExit"])
def test_its_mount_stays_and_refuses_and_the_next_takes_it_over(big: Path, target: Path, kind: str) -> None:
    path = target / "big"
    options = ("--backend", "fuse", "--read-ahead", "0")
    command = with_fault(f"end={kind}")
    with fetching(big, target, *options, command=command, stdin=subprocess.PIPE) as served:
        assert run("cmp", "-n", "4096", big / "big", path).stdout == ""
        code, said = fail(served)
        assert (code, said.count("\n")) == (1, 1)
        assert "put in by the test" in said
        assert f"{target} stays mounted" in said
        assert f"`fusehsm umount {target}`" in said
        assert "Input/output error" in run("dd", f"if={path}", "bs=1M", "skip=2", "count=1").stderr
        with fetching(big, target) as again:
            assert run("cmp", big / "big", path).stdout == ""
            again.end()
        assert not is_mounted(target)


def test_its_records_are_closed(big: Path, target: Path, backend: str) -> None:
    """So a change that is made while no fetch runs is not taken for one that was made while fetch served."""
    command = with_fault("end=RuntimeError")
    with fetching(big, target, "--backend", backend, command=command, stdin=subprocess.PIPE) as served:
        assert run("head", "-c1", target / "big").returncode == 0
        fail(served)
    expect_record_at_rest(target / "big")


_READING_AT_ONCE = """
import os, sys, threading
def read(name):
    try:
        said = os.pread(os.open(name, os.O_RDONLY), 10, 0)
    except OSError as error:
        said = error.strerror.encode()
    os.write(1, said + b"\\n")
for name in sys.argv[1:]:
    threading.Thread(target=read, args=(name,)).start()
"""


def wait_for_readers(process: "subprocess.Popen[str]", count: int) -> None:
    """Return once so many threads of it wait in pread(2)."""
    number = PREAD64.get(platform.machine())
    require(number is not None, f"needs the number of pread(2) on {platform.machine()}")
    end = time.monotonic() + harness.PATIENCE
    while time.monotonic() < end:
        calls = [path.read_text().split()[0] for path in Path(f"/proc/{process.pid}/task").glob("*/syscall")]
        if calls.count(str(number)) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("they do not wait")


def test_who_waits_is_refused(target: Path, backend: str, places: Callable[[str], Path]) -> None:
    """Also those whose turn has not come yet. The real kernel would let them go on, and they would read zeros."""
    store = places("store")
    names = [f"{number}" for number in range(300)]
    for name in names:
        (store / name).write_bytes(b"content")
    plant(store, target)
    # Few descriptors: most events are not even read when it fails.
    command = ("prlimit", "--nofile=128", *with_fault("end=RuntimeError"))
    options = ("--backend", backend, "--limit-rate", "1")
    with fetching(store, target, *options, command=command, stdin=subprocess.PIPE) as served:
        reading = [sys.executable, "-c", _READING_AT_ONCE, *(str(target / name) for name in names)]
        with harness.start(reading) as readers:
            wait_for_readers(readers, 250)
            assert fail(served)[0] == 1
            answers = set(readers.communicate(timeout=harness.PATIENCE)[0].splitlines())
    assert "Input/output error" in answers
    assert answers <= {"content", "Input/output error"}


@pytest.mark.fuse
def test_an_ordered_end_takes_the_mount_away_whoever_reads_its_summary(big: Path, target: Path) -> None:
    with fetching(big, target, "--backend", "fuse") as served:
        assert served.process.stdout is not None
        served.process.stdout.close()
        served.process.terminate()
        served.process.wait(timeout=harness.PATIENCE)
        assert not is_mounted(target)


@pytest.mark.fuse
def test_a_list_that_cannot_be_written_is_told_before_it_mounts(
    big: Path, target: Path, tmp_path: Path
) -> None:
    done = harness.fusehsm(
        "fetch", big, target, "--backend", "fuse", "--record", tmp_path / "not there" / "list"
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert not is_mounted(target)


def test_the_list_of_a_run_under_way_is_kept(big: Path, target: Path, tmp_path: Path, backend: str) -> None:
    """Who is refused as another one is at work has not touched it."""
    options = ("--backend", backend, "--record", str(tmp_path / "list"))
    (tmp_path / "list").write_text("of an earlier run\n")
    with fetching(big, target, *options) as served:
        assert run("head", "-c1", target / "big").returncode == 0
        assert harness.fusehsm("fetch", big, target, *options).returncode == 1
        served.end()
    first, *_ = (tmp_path / "list").read_text().splitlines()
    assert first == '0 1048576 "big"'


BESIDE = {
    "syncfs": "fetched content may not be on the disk yet: RuntimeError: put in by the test",
    "inventory": "--max-size: nothing was evicted this time: RuntimeError: put in by the test",
    "share": "those who wait were not looked after this time: RuntimeError: put in by the test",
    "ahead": "2 of 2 ranges of the list could not be fetched ahead",
}


@pytest.mark.parametrize("fault", BESIDE)
def test_what_fails_beside_the_serving_does_not_end_it(
    big: Path, target: Path, backend: str, tmp_path: Path, fault: str
) -> None:
    (tmp_path / "list").write_text('0 1 "big"\n0 1 "big"\n')
    more = {"inventory": ("--max-size", "1M"), "ahead": ("--prefetch", str(tmp_path / "list"))}
    options = ("--backend", backend, "--read-ahead", "0", *more.get(fault, ()))
    with fetching(big, target, *options, command=with_fault(fault)) as served:
        assert run("head", "-c1", target / "big").returncode == 0
        said = served.process.stderr
        assert said is not None
        while BESIDE[fault] not in (line := said.readline()):
            assert line
        assert run("cmp", big / "big", target / "big").stdout == ""
        if fault == "inventory":
            done = harness.fusehsm("evict", target)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        _, complaints = served.end()
        assert served.process.returncode == 0
        assert "Traceback" not in complaints
        assert not is_mounted(target)


def test_a_list_that_says_the_same_more_than_once(
    big: Path, target: Path, backend: str, tmp_path: Path
) -> None:
    (tmp_path / "list").write_text('1048576 1 "big"\n' * 20)
    with fetching(big, target, "--backend", backend, "--prefetch", str(tmp_path / "list")) as served:
        end = time.monotonic() + harness.PATIENCE
        while f'"resident": {MIB}' not in harness.fusehsm("status", "--json", target).stdout:
            assert time.monotonic() < end
        _, complaints = served.end()
        assert (served.process.returncode, complaints) == (0, "")


def test_a_record_that_its_owner_has_made_up(big: Path, target: Path, backend: str) -> None:
    """2^50 blocks of one byte."""
    fd = os.open(target / "big", os.O_RDWR)
    try:
        mark = stub_mark.read(fd, Namespace.at(fd))
        assert mark is not None
        made_up = residency.Record(
            residency.digest_of(mark), bytes(8), Flags.OPEN, 1, 0, 1 << 50, mark.mtime_ns, 0, b""
        )
        made_up.write(fd, Namespace.at(fd))
    finally:
        os.close(fd)
    (big / "other").write_bytes(content_of(3 * MIB, 2))
    plant(big, target)
    with fetching(big, target, "--backend", backend, "--max-size", "2M") as served:
        for name in ("other", "big"):
            assert run("cmp", big / name, target / name).stdout == ""
        assert harness.fusehsm("status", target).returncode == 0
        _, complaints = served.end()
        assert served.process.returncode == 0
        assert "Traceback" not in complaints
    assert harness.fusehsm("status", target).returncode == 0
