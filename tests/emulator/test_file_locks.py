"""Locks on files: one expectation, held against a plain ext4 directory and against mounts over others; and who sees them beside the mount."""

import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MakeMount
from tests.overlay.test_posix import make
from tests.support import harness
from tests.support.engines import diverges
from tests.support.posix_trees import Errno, Tree, in_child, outcome

pytestmark = pytest.mark.fuse

FLOCK = struct.Struct("=hh4xqqi4x")
SHARED, EXCLUSIVE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
WAITS = 0.2  # seconds after which a process that has not gone on waits

Take = Callable[[int, int, bool], object]


def record(fd: int, kind: int, wait: bool = False, start: int = 0, length: int = 0) -> None:
    """fcntl(2), a lock of the process."""
    fcntl.fcntl(fd, fcntl.F_SETLKW if wait else fcntl.F_SETLK, FLOCK.pack(kind, 0, start, length, 0))


def of_file(fd: int, kind: int, wait: bool = False, start: int = 0, length: int = 0) -> None:
    """fcntl(2), a lock of the open file."""
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    fcntl.fcntl(fd, command, FLOCK.pack(kind, 0, start, length, 0))


def whole(fd: int, kind: int, wait: bool = False) -> None:
    """flock(2)."""
    operation = {SHARED: fcntl.LOCK_SH, EXCLUSIVE: fcntl.LOCK_EX, NONE: fcntl.LOCK_UN}[kind]
    fcntl.flock(fd, operation | (0 if wait else fcntl.LOCK_NB))


TAKES: dict[str, Take] = {"flock": whole, "fcntl": record, "open file description": of_file}
BUSY = Errno(errno.EAGAIN)


def tried(name: str | Path, take: Take, kind: int = EXCLUSIVE, *, wait: bool = False) -> object:
    """What another process gets that tries to lock a file."""

    def attempt() -> object:
        fd = os.open(name, os.O_RDWR)
        return outcome(take, fd, kind, wait)

    return in_child(attempt)


@contextmanager
def process(
    body: Callable[[Callable[[], object], Callable[[], object]], object],
) -> Iterator[tuple[int, Callable[[], int]]]:
    """A process that runs body(ready, go_on): `ready` lets this one go on, `go_on` waits for `finish`. Gives its pid and `finish`, which lets it go
    on and returns what it exits with."""
    told, tell = os.pipe()
    asked, ask = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.close(told)
            os.close(ask)
            code = int(body(lambda: os.write(tell, b"x"), lambda: os.read(asked, 1)) or 0)  # type: ignore[call-overload]
        finally:
            os._exit(code)
    os.close(tell)
    os.read(told, 1)
    ended: list[int] = []

    def finish() -> int:
        if not ended:
            os.write(ask, b"x")
            ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return ended[0]

    try:
        yield child, finish
    finally:
        finish()
        for fd in (told, asked, ask):
            os.close(fd)


def holder(name: str | Path, take: Take, kind: int = EXCLUSIVE) -> Callable[..., object]:
    """The body of a process that holds a lock until it is let go."""

    def body(ready: Callable[[], object], go_on: Callable[[], object]) -> None:
        take(os.open(name, os.O_RDWR), kind, False)
        ready()
        go_on()

    return body


@pytest.mark.parametrize("take", TAKES.values(), ids=lambda take: take.__name__)
def test_another_process_is_excluded_until_close(tree: Tree, take: Take) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")
        with process(holder(name, take)) as (_, finish):
            found = [tried(name, take), tried(name, take, SHARED)]
            finish()
        # Each after the other has closed it.
        found += [tried(name, take), tried(name, take)]
        with process(holder(name, take, SHARED)):
            found += [tried(name, take), tried(name, take, SHARED)]
        return found

    assert tree.run(act) == [BUSY, BUSY, None, None, BUSY, None]


def test_ranges(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")

        def body(ready: Callable[[], object], go_on: Callable[[], object]) -> None:
            reading, writing = os.open(name, os.O_RDONLY), os.open(name, os.O_RDWR)
            record(reading, SHARED, start=0, length=100)
            record(writing, EXCLUSIVE, start=200, length=100)
            record(writing, NONE, start=240, length=20)
            record(writing, EXCLUSIVE, start=50, length=10)
            record(writing, EXCLUSIVE, start=1000)
            ready()
            go_on()

        with process(body) as (holder_pid, _):
            fd = os.open(name, os.O_RDWR)
            places = (
                (0, 50),
                (50, 1),
                (60, 40),
                (100, 100),
                (230, 10),
                (240, 20),
                (260, 1),
                (300, 700),
                (5000, 1),
            )
            asked = []
            for start, length in places:
                answer = fcntl.fcntl(fd, fcntl.F_GETLK, FLOCK.pack(SHARED, 0, start, length, 0))
                kind, _, first, count, pid = FLOCK.unpack(answer)
                asked.append("free" if kind == NONE else (first, count, pid == holder_pid))
            tries = [outcome(record, fd, EXCLUSIVE, False, start, length) for start, length in places]
        return asked, tries

    assert tree.run(act) == (
        [
            "free",
            (50, 10, True),
            "free",
            "free",
            (200, 40, True),
            "free",
            (260, 40, True),
            "free",
            (1000, 0, True),
        ],
        [BUSY, BUSY, BUSY, None, BUSY, None, BUSY, None, BUSY],
    )


def test_a_process_and_its_child(tree: Tree) -> None:
    """A child inherits the open file: locks of flock(2) and of the open file go on with it, those of the process do not."""

    def act(path: Path) -> object:
        found = []
        for number, take in enumerate(TAKES.values()):
            name = make(path / f"file {number}")

            def body(
                ready: Callable[[], object], go_on: Callable[[], object], take: Take = take, name: str = name
            ) -> None:
                take(os.open(name, os.O_RDWR), EXCLUSIVE, False)
                parent = os.getpid()
                if os.fork():
                    os._exit(0)
                while os.getppid() == parent:
                    time.sleep(0.001)
                ready()
                go_on()

            with process(body):
                found.append(tried(name, take))
        return found

    assert tree.run(act) == [BUSY, None, BUSY]


def test_a_copy_of_the_descriptor(tree: Tree) -> None:
    def act(path: Path) -> object:
        found = []
        for number, take in enumerate(TAKES.values()):
            name = make(path / f"file {number}")
            fd = os.open(name, os.O_RDWR)
            copy = os.dup(fd)
            take(fd, EXCLUSIVE, False)
            os.close(fd)
            found.append(tried(name, take))
            os.close(copy)
            found.append(tried(name, take))
        return found

    assert tree.run(act) == [BUSY, None, None, None, BUSY, None]


def test_changes_of_a_lock(tree: Tree) -> None:
    def act(path: Path) -> object:
        found = []
        for number, take in enumerate(TAKES.values()):
            name = make(path / f"file {number}")
            fd = os.open(name, os.O_RDWR)
            for kind in (SHARED, EXCLUSIVE, SHARED, NONE):
                take(fd, kind, False)
                found.append((tried(name, take, SHARED), tried(name, take)))
            with process(holder(name, take, SHARED)):
                take(fd, SHARED, False)
                found.append((outcome(take, fd, EXCLUSIVE, False), outcome(take, fd, SHARED, False)))
            os.close(fd)
        return found

    each = [(None, BUSY), (BUSY, BUSY), (None, BUSY), (None, None), (BUSY, None)]
    assert tree.run(act) == each * 3


def test_rights_of_descriptors(tree: Tree) -> None:
    """A lock through a descriptor that may only read lets its program run, and a lock outlives the file's name."""

    def act(path: Path) -> object:
        program = make(path / "program", b"#!/bin/sh\nexit 7\n", 0o755)
        fd = os.open(program, os.O_RDONLY)
        whole(fd, EXCLUSIVE)
        found: list[object] = [outcome(record, fd, EXCLUSIVE), outcome(record, fd, SHARED)]
        found.append(subprocess.run([program], timeout=20).returncode)
        os.unlink(program)
        found.append(outcome(of_file, fd, SHARED))
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        found.append(outcome(whole, again, EXCLUSIVE))
        return found

    assert tree.run(act) == [Errno(errno.EBADF), None, 7, None, BUSY]


# Waiting


@pytest.mark.parametrize("take", TAKES.values(), ids=lambda take: take.__name__)
def test_a_wait_ends_with_the_lock(tree: Tree, take: Take) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")

        def waiter(ready: Callable[[], object], go_on: Callable[[], object]) -> int:
            fd = os.open(name, os.O_RDWR)
            ready()
            take(fd, EXCLUSIVE, True)
            return 5

        with process(holder(name, take)) as (_, finish), process(waiter) as (pid, finish_waiter):
            time.sleep(WAITS)
            waited = os.waitpid(pid, os.WNOHANG) == (0, 0)
            # The file can be used meanwhile.
            used = in_child(lambda: os.pwrite(os.open(name, os.O_WRONLY), b"x", 0))
            finish()
            return waited, used, finish_waiter()

    assert tree.run(act) == (True, 1, 5)


@pytest.mark.parametrize("take", TAKES.values(), ids=lambda take: take.__name__)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=["killed", "signalled"])
def test_a_signal_ends_a_wait(tree: Tree, take: Take, number: signal.Signals) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")

        class Stop(Exception):
            pass

        def stop(got: int, frame: object) -> None:
            raise Stop

        def waiter(ready: Callable[[], object], go_on: Callable[[], object]) -> int:
            signal.signal(signal.SIGUSR1, stop)
            fd = os.open(name, os.O_RDWR)
            ready()
            try:
                take(fd, EXCLUSIVE, True)
            except Stop:
                return 6
            return 5

        with process(holder(name, take)):
            with process(waiter) as (pid, finish):
                time.sleep(WAITS)
                began = time.monotonic()
                os.kill(pid, number)
                code = finish()
            return code, time.monotonic() - began < 1, tried(name, take)

    assert tree.run(act) == (6 if number == signal.SIGUSR1 else -signal.SIGKILL, True, BUSY)


def test_processes_that_wait_for_each_other(tree: Tree) -> None:
    """One of them gets EDEADLK, also where the circle goes through two files."""

    def act(path: Path) -> object:
        names = make(path / "one"), make(path / "two")

        def other(ready: Callable[[], object], go_on: Callable[[], object]) -> int:
            fds = [os.open(name, os.O_RDWR) for name in names]
            record(fds[1], EXCLUSIVE)
            ready()
            record(fds[0], EXCLUSIVE, True)
            return 5

        fds = [os.open(name, os.O_RDWR) for name in names]
        record(fds[0], EXCLUSIVE)
        with process(other) as (_, finish):
            time.sleep(WAITS)
            found = outcome(record, fds[1], EXCLUSIVE, True)
            record(fds[0], NONE)
            return found, finish()

    assert tree.run(act) == (Errno(errno.EDEADLK), 5)


# Beside the mount


def is_shared(tree: Tree) -> bool:
    return not diverges("locks", tree.engine)


@pytest.mark.parametrize("take", TAKES.values(), ids=lambda take: take.__name__)
def test_both_sides(tree: Tree, take: Take) -> None:
    """A lock on a file in SRC, or through an event's descriptor, excludes one through the mount, and the other way round."""

    def act(path: Path) -> object:
        make(path / "file")
        found: list[object] = []
        for here, there in ((path, tree.backing), (tree.backing, path)):
            with process(holder(here / "file", take)):
                found.append(tried(there / "file", take))
            # The mount hears of the end of an open file a moment later.
            found.append(tried(there / "file", take, wait=True))
        return found

    excluded = BUSY if is_shared(tree) else None
    assert tree.run(act) == [excluded, None, excluded, None]


def test_a_wait_for_the_other_side(tree: Tree) -> None:
    if not is_shared(tree):
        tree.run(lambda path: make(path / "file") and None)
        return

    def act(path: Path) -> object:
        name = make(path / "file")

        def waiter(ready: Callable[[], object], go_on: Callable[[], object]) -> int:
            fd = os.open(tree.backing / "file", os.O_RDWR)
            ready()
            record(fd, EXCLUSIVE, True)
            return 5

        def inner(ready: Callable[[], object], go_on: Callable[[], object]) -> int:
            fd = os.open(name, os.O_RDWR)
            ready()
            record(fd, EXCLUSIVE, True)
            return 5

        found: list[object] = []
        # A process whose child keeps the open file: the lock ends with the process.
        fd = os.open(name, os.O_RDWR)
        record(fd, EXCLUSIVE)
        with process(waiter) as (_, finish):
            copy = os.dup(fd)
            os.close(fd)
            found.append(finish())
            os.close(copy)
        with process(holder(tree.backing / "file", record)) as (pid, release):
            fd = os.open(name, os.O_RDWR)
            answer = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, FLOCK.pack(SHARED, 0, 0, 0, 0)))
            found.append((answer[0] == EXCLUSIVE, answer[4] == pid))
            with process(inner) as (_, finish):
                release()
                found.append(finish())
        return found

    assert tree.run(act) == [5, (True, True), 5]


def status_of(path: Path) -> str:
    return subprocess.run(
        [*harness.COMMAND, "status", str(path)], capture_output=True, text=True, check=True, timeout=30
    ).stdout


@pytest.mark.engine("devfuse")
@pytest.mark.parametrize(
    "options", [("--events", "exact"), ("--events", "first-access", "--locks", "shared")], ids=" ".join
)
def test_status_names_the_holder(make_mount: MakeMount, options: tuple[str, ...]) -> None:
    mount = make_mount(*options)
    name = make(mount.path / "file")

    def waiter(ready: Callable[[], object], go_on: Callable[[], object]) -> None:
        fd = os.open(name, os.O_RDWR)
        ready()
        whole(fd, EXCLUSIVE, True)

    with process(holder(name, whole)) as (pid, finish), process(waiter) as (waits, _):
        deadline = time.monotonic() + harness.PATIENCE
        while "exclusive lock" not in status_of(mount.path):
            assert time.monotonic() < deadline
        lines = status_of(mount.path).splitlines()
        assert any(f"process {waits}, flock {name}, held by process {pid}" in line for line in lines), lines
        (lock,) = json.loads(
            subprocess.run(
                [*harness.COMMAND, "status", "--json", str(mount.path)],
                capture_output=True,
                check=True,
                timeout=30,
            ).stdout
        )[0]["locks"]
        assert (lock["pid"], lock["holders"], lock["exclusive"]) == (waits, [pid], True)
        finish()


@pytest.mark.engine("devfuse")
@pytest.mark.parametrize(
    ("options", "shared"),
    [
        (("--events", "exact"), True),
        (("--events", "exact", "--locks", "local"), False),
        (("--events", "first-access", "--cache", "shared"), True),
        (("--events", "first-access", "--cache", "private"), False),
        (("--events", "first-access", "--cache", "private", "--locks", "shared"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("take", TAKES.values(), ids=lambda take: take.__name__)
def test_the_default_of_each_mode(
    make_mount: MakeMount, options: tuple[str, ...], shared: bool, take: Take
) -> None:
    """With `shared`, the kernel tells of each open file and of its end: after a close(2) another process has the lock at once."""
    mount = make_mount(*options)
    name = make(mount.path / "file")
    with process(holder(name, take)) as (_, finish):
        assert tried(name, take) == BUSY
        assert tried(mount.source / "file", take) == (BUSY if shared else None)
        finish()
        assert [tried(name, take), tried(name, take)] == [None, None]
