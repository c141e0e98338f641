"""`fusehsm run`: a command under it is as it would be without; what it mounts goes, whatever happened."""

import ctypes
import errno
import fcntl
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fusehsm.conform.accessor import Accessor
from tests.conftest import MakeAccessor
from tests.support import harness, leftovers
from tests.support.harness import NOBODY, fuse_device_for_everybody
from tests.support.kernel_and_run import (
    RUN,
    STEP,
    Program,
    RunWorld,
    ended_by,
    mounts_at,
    processes_at,
    standing,
    wait_until,
)
from tests.support.listener_programs.building import listener_words, program
from tests.support.listener_steps import LEFT, PAGE, SERIES, Step, asked, finish, make_files, planned, take
from tests.support.requirements import require_root

pytestmark = [pytest.mark.any_engine, pytest.mark.fuse]

EVERYTHING = (("add|mount", "PRE_ACCESS", ""),)
READ = Step("pread_path", "stub", (10, 0), planned(0, 10), (asked(0, PAGE),))
SHOW_MOUNTS = (
    'while read -r line; do case $line in *" $0 "*fusehsm*) echo mounted;; esac; done < /proc/self/mountinfo'
)


@pytest.fixture
def world(places: Callable[[str], Path], fuse: None) -> Iterator[RunWorld]:
    """A directory of stubs to mount over itself."""
    place = places("run")
    make_files(place)
    with standing("run", place) as world:
        yield world


def run(*words: str | Path, given: str | None = None, **more: object) -> "subprocess.CompletedProcess[str]":
    """`fusehsm run` to its end, with that text to read."""
    if given is not None:
        more["stdin"] = subprocess.PIPE
    with harness.start([*RUN, *map(str, words)], **more) as process:
        try:
            output, complaint = process.communicate(given, timeout=STEP)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, output, complaint)


def complaint_of(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """The one line of a `fusehsm run` that failed with this exit code before anything ran."""
    assert (done.returncode, done.stdout) == (code, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("fusehsm: ")
    return line


def processes_of(executable: str) -> list[int]:
    """Processes of this session that run that file."""
    found = []
    for pid in harness.own_processes():
        try:
            if os.readlink(f"/proc/{pid}/exe") == executable:
                found.append(pid)
        except OSError:
            continue
    return found


# What a command is given, and what becomes of it


@pytest.mark.parametrize("code", [0, 1, 2, 7, 255])
def test_exit_codes(code: int, world: RunWorld) -> None:
    done = run("--mount", world.place, "--", "sh", "-c", f"exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert mounts_at(world.place) == 0


def test_without_a_mount() -> None:
    assert run("--", "sh", "-c", "exit 7").returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGHUP])
def test_killed_by_a_signal(number: signal.Signals, world: RunWorld) -> None:
    done = run("--mount", world.place, "--", "sh", "-c", f"ulimit -c 0; kill -{int(number)} $$")
    assert ended_by(done.returncode, number), done
    assert mounts_at(world.place) == 0


def test_what_it_reads_and_writes() -> None:
    text = "".join(f"line {number}\n" for number in range(100_000))
    done = run("--", "sh", "-c", "cat; echo said >&2", given=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, text, "said\n")


def test_its_descriptors_are_ours(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb+") as output:
        script = "stat -L -c %i /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2"
        done = run("--", "sh", "-c", script, stdin=output, stdout=output, stderr=output)
        assert done.returncode == 0
        output.seek(0)
        assert output.read().split() == [str(os.fstat(output.fileno()).st_ino).encode()] * 3


def test_its_surroundings(tmp_path: Path) -> None:
    script = 'echo "$GREETING"; pwd -P; umask; ulimit -n; ls /proc/self/fd | wc -l'
    words = ("sh", "-c", script)
    more: dict[str, Any] = {"cwd": tmp_path, "env": harness.environment(GREETING="hello"), "umask": 0o027}
    with harness.start(words, **more) as process:
        expected, _ = process.communicate(timeout=STEP)
    assert run("--", *words, **more).stdout == expected


def test_a_command_that_is_not_there(world: RunWorld) -> None:
    line = complaint_of(run("--mount", world.place, "--", "no-such-command"), 127)
    assert "no-such-command" in line
    assert mounts_at(world.place) == 0


def test_a_command_that_cannot_be_run(world: RunWorld, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    line = complaint_of(run("--mount", world.place, "--", script), 126)
    assert str(script) in line
    assert mounts_at(world.place) == 0


def test_bad_usage(world: RunWorld, tmp_path: Path) -> None:
    complaint_of(run(), 2)
    complaint_of(run("--mount", world.place), 2)
    line = complaint_of(run("--mount", world.place, "--abi", "linux-7", "--", "true"), 2)
    assert all(word in line for word in ("linux-7", "linux-6.14", "patch-v2", "patch-v1"))
    missing = run("--mount", tmp_path / "missing", "--", "true")
    assert str(tmp_path / "missing") in complaint_of(missing, missing.returncode)
    assert missing.returncode in (1, 2)
    assert mounts_at(world.place) == 0


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command(number: signal.Signals, world: RunWorld) -> None:
    script = f'trap "echo heard; exit 3" {int(number)}; echo ready; while :; do sleep 0.02; done'
    with Program(world.command("sh", "-c", script)) as running:
        running.wait_ready()
        running.process.send_signal(number)
        assert running.end() == 3
        assert running.lines == ["ready", "heard"]
    assert mounts_at(world.place) == 0


@pytest.fixture
def terminal() -> Iterator[tuple[int, dict[str, object]]]:
    """The user's end of a terminal, and what makes it that of a program that is started."""
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    yield ours, {"stdin": theirs, "preexec_fn": take_terminal}
    os.close(theirs)
    os.close(ours)


def test_ctrl_c(world: RunWorld, terminal: tuple[int, dict[str, object]]) -> None:
    """A terminal signals the whole process group, the command and its parent: the command alone decides, and hears of it once."""
    ours, settings = terminal
    script = 'trap "echo heard; sleep 0.5; exit 3" INT; echo ready; while :; do sleep 0.02; done'
    with Program(world.command("sh", "-c", script), **settings) as running:
        running.wait_ready()
        os.write(ours, b"\x03")
        assert running.end() == 3
        assert running.lines == ["ready", "heard"]
        assert running.complaints.wait_for_end(STEP) == []
    assert mounts_at(world.place) == 0


def test_a_terminal(terminal: tuple[int, dict[str, object]]) -> None:
    """The command may read from the terminal: it is in the foreground as it would be without us."""
    ours, settings = terminal
    script = 'test -t 0 && read -r line && echo "got $line"'
    with Program([*RUN, "--", "sh", "-c", script], **settings) as running:
        os.write(ours, b"hello\n")
        assert running.end() == 0, running.complaints.lines
        assert running.lines == ["got hello"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command(number: signal.Signals, world: RunWorld) -> None:
    # A background process of a shell would have SIGINT ignored, and its children with it.
    with Program(world.command("sh", "-c", "echo ready; exec sleep 1000")) as running:
        running.wait_ready()
        running.process.send_signal(number)
        assert ended_by(running.end(), number)
    assert mounts_at(world.place) == 0


def send_until_it_ends(running: Program, sent: tuple[signal.Signals, ...]) -> int:
    """Those signals in turn, all the time; the exit code."""
    turn = itertools.cycle(sent)
    deadline = time.monotonic() + STEP
    while running.process.poll() is None:
        assert time.monotonic() < deadline, "it has not ended"
        running.process.send_signal(next(turn))
        time.sleep(0.001)
    return running.process.returncode


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
several = pytest.mark.parametrize(
    "sent", [*((number,) for number in ENDING), ENDING], ids=["SIGTERM", "SIGINT", "SIGHUP", "all"]
)


@several
def test_signals_that_keep_coming(
    sent: tuple[signal.Signals, ...], world: RunWorld, accessor: Accessor, tmp_path: Path
) -> None:
    """The command decides when it ends: until then its mount is served, and then unmounted."""
    script = 'trap "" TERM INT HUP; echo ready; until test -e "$0"; do sleep 0.02; done; exit 7'
    with Program(world.command("sh", "-c", script, str(tmp_path / "end"))) as running:
        running.wait_ready()
        for number in (*sent, *sent) * 30:
            running.process.send_signal(number)
        assert accessor.call("pread_path", str(world.place / "stub"), 10, 0, timeout=STEP) == bytes(10)
        assert running.process.poll() is None
        assert mounts_at(world.place) == 1
        (tmp_path / "end").touch()
        assert send_until_it_ends(running, sent) == 7
        assert mounts_at(world.place) == 0
    assert running.complaints.lines == [], "\n".join(running.complaints.lines)


@several
def test_signals_that_keep_coming_from_the_moment_of_mounting(
    sent: tuple[signal.Signals, ...], world: RunWorld
) -> None:
    """Whether or not there is a command already, to which they go: nothing is mounted any more when it has ended."""
    with Program(world.command("sleep", "1000")) as running:
        wait_until(lambda: mounts_at(world.place) == 1 or running.process.poll() is not None)
        code = send_until_it_ends(running, sent)
        assert mounts_at(world.place) == 0
        assert any(ended_by(code, number) for number in sent), code
    assert running.complaints.lines == [], "\n".join(running.complaints.lines)


# Mounts


def test_the_mount_is_there_for_the_command(world: RunWorld) -> None:
    done = run("--mount", world.place, "--", "sh", "-c", SHOW_MOUNTS, world.place)
    assert done.stdout == "mounted\n"


def test_the_mount_stays_if_asked(world: RunWorld, accessor: Accessor) -> None:
    assert run("--mount", world.place, "--keep", "--", "sh", "-c", "exit 7").returncode == 7
    assert mounts_at(world.place) == 1
    assert accessor.call("pread_path", str(world.place / "stub"), 10, 0, timeout=STEP) == bytes(10)
    assert harness.fusehsm("umount", world.place, timeout=STEP).returncode == 0
    assert mounts_at(world.place) == 0
    wait_until(lambda: not processes_at(world.place))


@pytest.mark.parametrize("mode", ["exact", "first-access"])
def test_the_mounts_event_mode(mode: str, world: RunWorld) -> None:
    status = (*harness.COMMAND, "status", "--json", world.place)
    done = run("--mount", world.place, "--events", mode, "--", *status, env=harness.environment())
    assert done.returncode == 0, done.stderr
    assert [mount["events"] for mount in json.loads(done.stdout)] == [mode]
    assert "choose exact" in complaint_of(run("--events", "all", "--", "true"), 2)


def test_one_mount_for_one_directory(world: RunWorld) -> None:
    words = ("--mount", ".", "--mount", "./", "--mount", world.place)
    done = run(*words, "--", "sh", "-c", SHOW_MOUNTS, world.place, cwd=world.place)
    assert (done.returncode, done.stdout) == (0, "mounted\n")
    assert mounts_at(world.place) == 0


def test_a_command_in_the_mounted_directory(
    world: RunWorld, session_directory: Path, accessor: Accessor
) -> None:
    words = listener_words(session_directory, Path(), "poll", marks=EVERYTHING)
    with Program([*RUN, "--mount", ".", "--", *words], cwd=world.place) as running:
        running.wait_ready()
        expected = take(accessor, world.place, (READ,))
        assert finish(world, running, accessor) == expected


def test_two_mounts(
    world: RunWorld, places: Callable[[str], Path], session_directory: Path, accessor: Accessor
) -> None:
    other = places("run")
    make_files(other)
    marks = (*EVERYTHING, ("add|mount", "PRE_ACCESS", str(other)))
    words = listener_words(session_directory, world.place, "poll", marks=marks)
    with standing("run", other):
        command = [*RUN, "--mount", str(world.place), "--mount", str(other), "--", *words]
        with Program(command) as running:
            running.wait_ready()
            expected = take(accessor, world.place, (READ,))
            expected += take(accessor, other, (READ,))
            assert finish(world, running, accessor) == expected
        assert mounts_at(other) == 0


# Deaths


@pytest.fixture
def listening(world: RunWorld, session_directory: Path) -> Iterator[Program]:
    """A listener that is ready, and has stopped: events wait."""
    words = listener_words(session_directory, world.place, "blocking", marks=EVERYTHING)
    with Program(world.command(*words)) as running:
        running.wait_ready()
        (pid,) = processes_of(words[0])
        os.kill(pid, signal.SIGSTOP)
        yield running
        leftovers.kill(pid)


def test_death_of_the_supervisor(listening: Program, world: RunWorld, accessor: Accessor) -> None:
    call = accessor.start("pread_path", str(world.place / "stub"), 10, 0)
    time.sleep(0.2)  # for the event to be queued; nobody tells
    assert not call.done
    os.kill(listening.process.pid, signal.SIGKILL)
    wait_until(lambda: mounts_at(world.place) == 0)
    with suppress(OSError):  # if its mount was gone first
        assert call.result(STEP) == bytes(10)
    assert accessor.call("pread_path", str(world.place / "stub"), 10, 0, timeout=STEP) == bytes(10)


def test_death_of_the_command(
    listening: Program, world: RunWorld, session_directory: Path, accessor: Accessor
) -> None:
    call = accessor.start("pread_path", str(world.place / "stub"), 10, 0)
    time.sleep(0.2)  # for the event to be queued; nobody tells
    assert not call.done
    (pid,) = processes_of(program(session_directory, "dynamic")[0])
    os.kill(pid, signal.SIGKILL)
    assert ended_by(listening.end(), signal.SIGKILL)
    assert call.result(STEP) == bytes(10)
    assert mounts_at(world.place) == 0
    wait_until(lambda: not processes_at(world.place))


def test_no_descriptors_leak(world: RunWorld, session_directory: Path) -> None:
    words = (*program(session_directory, "hostile"), "makes", str(world.place))

    def descriptors() -> int:
        servers = set(processes_at(world.place)) - set(processes_of(words[0]))
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in servers)

    with Program(world.command(*words), stdin=subprocess.PIPE) as running:
        assert running.process.stdin is not None
        running.output.wait_for(lambda line: line == "hostile warm", STEP)
        before = descriptors()
        running.process.stdin.write("\n")
        running.process.stdin.flush()
        running.output.wait_for(lambda line: line == "hostile done", 2 * STEP)
        # The last ones' ends may still be on their way.
        wait_until(lambda: descriptors() <= before + 3)
        running.process.stdin.write("\n")
        running.process.stdin.flush()
        assert running.end() == 0, running.complaints.lines
        running.process.stdin.close()


# Dialects and users


def test_a_mark_of_another_dialect(world: RunWorld, session_directory: Path, accessor: Accessor) -> None:
    """The program is refused as the kernel would refuse it, and the message says which option to give."""
    words = listener_words(session_directory, world.place, "poll", marks=(("add", "0x80000", "stub"),))
    with Program(world.command(*words)) as running:
        running.wait_ready()
        assert running.output.lines[0].endswith(": EINVAL")
        accessor.start("pread_path", str(world.place / "end"), 1, 0)
        assert running.end() == 0
        said = running.complaints.wait_for_end(STEP)
        assert len(said) == 1, said
        line = said[0]
        assert "--abi" in line


@pytest.mark.parametrize("abi", ["patch-v2", "patch-v1"])
def test_a_dialect(abi: str, world: RunWorld, session_directory: Path, accessor: Accessor) -> None:
    """Of patch-v1 the records, too, are others."""
    words = listener_words(session_directory, world.place, "poll", marks=(("add|mount", "0x80000", ""),))
    command = [*RUN, "--mount", str(world.place), "--abi", abi, "--", *words]
    with Program(command) as running:
        running.wait_ready()
        steps = (
            Step(
                "pread_path",
                "stub",
                (100, 10),
                planned(10, 110),
                ("0x80000 0 0 stub ALLOW", "0x80000 10 100 stub ALLOW"),
            ),
        )
        expected = take(accessor, world.place, steps)
        # What ends the listener is PRE_MODIFY there, which opening for writing makes.
        accessor.start("pwrite_path", str(world.place / "end"), b"x", 0)
        assert running.end() == 0, running.complaints.lines
        lines = running.lines
        assert lines[lines.index("ready") + 1 :] == [*expected, "PRE_ACCESS 0 0 end ALLOW"]


def become_dumpable() -> None:
    """A process that was root once hides its mappings from those who are like it now, as no process of an ordinary user does."""
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE


@pytest.fixture
def open_device() -> Iterator[None]:
    """/dev/fuse for every user."""
    require_root()
    with fuse_device_for_everybody():
        yield


@pytest.mark.parametrize("style", ["blocking", "epoll-edge", "workers", "exec"])
def test_an_ordinary_user(
    style: str, open_device: None, world: RunWorld, session_directory: Path, make_accessor: MakeAccessor
) -> None:
    for path in (world.place, *world.place.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    command, environment, who = harness.command_of(NOBODY)
    words = listener_words(session_directory, world.place, style, "--deny", "*.denied=EIO", marks=EVERYTHING)
    assert all(os.stat(words[0]).st_mode & bit for bit in (stat.S_IXOTH, stat.S_IROTH))
    accessor = make_accessor(uid=NOBODY, gid=NOBODY)
    accessor.call(become_dumpable)
    with Program(
        [*command, "run", "--mount", str(world.place), "--", *words],
        env=harness.environment(**environment),
        cwd="/",
        **who,
    ) as running:
        running.wait_ready()
        expected = take(accessor, world.place, SERIES)
        assert finish(world, running, accessor) == expected
    assert {name: (world.place / name).read_bytes() for name in LEFT} == LEFT


def test_a_command_that_may_not_be_looked_at(open_device: None) -> None:
    """No event could be written into its memory: it gets no group, and one line says why."""
    command, environment, who = harness.command_of(NOBODY)
    program = (
        "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True); libc.prctl(4, 0, 0, 0, 0); "  # PR_SET_DUMPABLE
        "print(libc.fanotify_init(8, 0), ctypes.get_errno())"
    )
    with harness.start(
        [*command, "run", "--", command[0], "-S", "-c", program],
        env=harness.environment(**environment),
        cwd="/",
        **who,
    ) as running:
        output, complaint = running.communicate(timeout=harness.PATIENCE)
    assert output == f"-1 {errno.EPERM}\n"
    assert complaint.count("\n") == 1
    assert "gets no fanotify group (EPERM): it is another user's, its program may not be read" in complaint


NO_MESSAGES = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
assert libc.fanotify_init(8, os.O_RDWR) >= 0
one, other = socket.socketpair()
for vector in (0, 1, ctypes.addressof(ctypes.create_string_buffer(64))):
    assert libc.sendmmsg(one.fileno(), ctypes.c_void_p(vector), 0, 0) == 0, ctypes.get_errno()
"""


def test_no_messages_to_send(world: RunWorld) -> None:
    """sendmmsg(2) of none succeeds, wherever its vector lies."""
    done = run("--mount", world.place, "--", sys.executable, "-c", NO_MESSAGES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
