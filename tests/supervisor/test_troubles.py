"""Listeners under `fusehsm run` that are stopped at their terminal, lose a mount's server, run out of processes, or lie beside a module of
somebody else's."""

import errno
import fcntl
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.linux.subprocesses import own_command
from tests.conftest import MakeAccessor
from tests.support import harness, leftovers
from tests.support.harness import NOBODY, fuse_device_for_everybody
from tests.support.kernel_and_run import (
    RUN,
    STEP,
    Program,
    RunWorld,
    mounts_at,
    processes_at,
    standing,
    wait_until,
)
from tests.support.listener_programs.building import listener_words, program
from tests.support.listener_steps import PAGE, Step, asked, finish, make_files, planned, take
from tests.support.requirements import require_root

pytestmark = pytest.mark.any_engine
pytest_plugins = ["tests.support.listener_program_fixtures"]

EVERYTHING = (("add|mount", "PRE_ACCESS", ""),)
READ = Step("pread_path", "stub", (10, 0), planned(0, 10), (asked(0, PAGE),))
WAYS = ("blocking", "poll", "select", "threads")

only_run = pytest.mark.parametrize("run_world", [pytest.param("run", marks=pytest.mark.fuse)], indirect=True)


# Ctrl-Z


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The side of whoever types, and the command's."""
    typing, screen = pty.openpty()
    yield typing, screen
    os.close(screen)
    os.close(typing)


def has_stopped(running: Program, times: int) -> bool:
    """Whether the shell has said so."""
    return running.output.lines.count("stopped") == times


@pytest.mark.parametrize("style", WAYS)
def test_stopped_at_a_terminal(
    style: str,
    run_world: RunWorld,
    session_directory: Path,
    terminal: tuple[int, int],
    accessor: Accessor,
) -> None:
    typing, screen = terminal
    words = listener_words(session_directory, run_world.place, style, marks=EVERYTHING)
    shell = [sys.executable, str(harness.ROOT / "tests" / "support" / "job_control.py")]
    with Program(
        [*shell, *run_world.command(*words)],
        stdin=screen,
        preexec_fn=partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0),
    ) as running:
        running.wait_ready()
        expected = take(accessor, run_world.place, (READ,))
        for times in (1, 2):
            os.write(typing, b"\x1a")
            wait_until(partial(has_stopped, running, times))
            call = accessor.start(READ.act, str(run_world.place / READ.file), *READ.arguments)
            time.sleep(0.2)  # for an answer that should not come
            assert not call.done
            os.write(typing, b"fg\n")
            assert call.result(STEP) == READ.result
            expected += ["stopped", *READ.lines]
            # fusehsm run passes SIGCONT on, too, which undoes a Ctrl-Z that comes before that.
            time.sleep(0.5)
        assert finish(run_world, running, accessor) == expected


# A server's death


def server_of(place: Path) -> int:
    """The process that serves the mount at that directory."""
    (pid,) = [
        pid
        for pid in processes_at(place)
        if " mount --foreground " in leftovers.command_line(pid)
        and leftovers.command_line(pid).endswith(f" {place}")
    ]
    return pid


def seconds_used_by(pids: list[int]) -> float:
    """Of CPU time, all in all."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@only_run
@pytest.mark.parametrize("style", WAYS)
def test_death_of_one_mounts_server(
    style: str,
    run_world: RunWorld,
    places: Callable[[str], Path],
    session_directory: Path,
    make_accessor: MakeAccessor,
) -> None:
    """What is on the other mount goes on being answered, and nobody turns in circles."""
    accessor, unlucky = make_accessor(), make_accessor()
    other = places("listeners")
    make_files(other)
    marks = (*EVERYTHING, ("add|mount", "PRE_ACCESS", str(other)))
    words = listener_words(session_directory, run_world.place, style, marks=marks)
    command = [*RUN, "--mount", str(run_world.place), "--mount", str(other), "--", *words]
    with standing("run", other), Program(command) as running:
        running.wait_ready()
        expected = take(accessor, run_world.place, (READ,))
        expected += take(accessor, other, (READ,))
        (listener,) = [pid for pid in processes_at(other) if leftovers.command_line(pid).startswith(words[0])]
        os.kill(listener, signal.SIGSTOP)
        call = unlucky.start(READ.act, str(other / READ.file), *READ.arguments)
        time.sleep(0.2)  # for the event to be queued; nobody tells
        leftovers.kill(server_of(other))
        with pytest.raises(OSError):
            call.result(STEP)
        os.kill(listener, signal.SIGCONT)
        # The event of the mount that is gone is read and answered, too, by a listener that knows nothing.
        expected += (*READ.lines, *take(accessor, run_world.place, (READ, READ)))
        alive = [running.process.pid, listener, server_of(run_world.place)]
        before = seconds_used_by(alive)
        time.sleep(1)  # in which whoever turns in circles uses a CPU
        assert seconds_used_by(alive) - before < 0.5
        assert finish(run_world, running, accessor) == expected
        assert mounts_at(other) == 0


# Few processes


@pytest.fixture
def open_device() -> Iterator[None]:
    """/dev/fuse for every user."""
    require_root()
    with fuse_device_for_everybody():
        yield


def processes_of_nobody() -> int:
    """Threads count, too."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == NOBODY:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


@only_run
def test_a_user_with_few_processes_left(
    run_world: RunWorld, session_directory: Path, make_accessor: MakeAccessor, open_device: None
) -> None:
    """Calls for which no thread can be started fail, and do not wait."""
    for path in (run_world.place, *run_world.place.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    command, environment, who = harness.command_of(NOBODY)
    words = [*program(session_directory, "races"), "processes-run-out", str(run_world.place)]
    accessor = make_accessor(uid=NOBODY, gid=NOBODY)
    most = processes_of_nobody() + 60
    with Program(
        [*command, "run", "--mount", str(run_world.place), "--", *words],
        env=harness.environment(**environment),
        cwd="/",
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NPROC, (most, most)),
        **who,
    ) as running:
        running.wait_ready()
        assert running.output.lines == ["no more processes", "mapped", "ready"]
        stub = str(run_world.place / "stub")
        assert [accessor.call("pread_path", stub, 10, 0, timeout=STEP) for _ in range(3)] == [bytes(10)] * 3


# Strange surroundings


@only_run
@pytest.mark.parametrize("inside", ["", "below"])
def test_a_module_in_the_working_directory(
    inside: str, run_world: RunWorld, session_directory: Path, accessor: Accessor
) -> None:
    """It is anybody's, and nothing of it is run."""
    directory = run_world.place / inside
    for name in ("trio", "fusehsm", "signal"):
        (directory / f"{name}.py").write_text("raise SystemExit('the module of somebody else')\n")
    words = listener_words(session_directory, run_world.place, "poll", marks=EVERYTHING)
    mount = str(run_world.place) if inside else "."
    with Program([*own_command("run", "--mount", mount, "--"), *words], cwd=directory) as running:
        running.wait_ready()
        expected = take(accessor, run_world.place, (READ,))
        assert finish(run_world, running, accessor) == expected


# Groups that report file ids

MARKS_BY_FILE_ID = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
group = libc.fanotify_init(0x200, 0)  # FAN_REPORT_FID
for how in (0x10, 0x100, 0):  # FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM, an inode
    failed = libc.fanotify_mark(group, 1 | how, ctypes.c_uint64(8), -100, sys.argv[1].encode())  # FAN_CLOSE_WRITE
    print(ctypes.get_errno() if failed else 0)
"""


@pytest.mark.fuse
@pytest.mark.root
def test_marks_that_need_a_file_system_id(tmp_path: Path) -> None:
    """The kernel's own group refuses two of them, which a line on stderr says."""
    ended = subprocess.run(
        own_command(
            "run", "--mount", str(tmp_path), "--", sys.executable, "-c", MARKS_BY_FILE_ID, str(tmp_path)
        ),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout.split() == [str(errno.ENODEV), str(errno.ENODEV), "0"], ended
    assert ended.stderr.count("FAN_REPORT_FID") == 1
