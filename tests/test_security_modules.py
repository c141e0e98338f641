"""AppArmor: profiles on accessors, listeners and fusehsm itself, as docs/security-modules.md says.

It needs AppArmor in the kernel, and apparmor_parser. Debian's kernels have it: `make oldkernel ARGS=tests/test_security_modules.py`. A plain run of
all tests does not collect this file (tests/conftest.py).
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import harness
from tests.support.async_listener import listening
from tests.support.harness import NOBODY, PATIENCE, LogReader, start, unmount_lazily
from tests.support.requirements import require

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.any_engine]

CONTENT = b"fetched when you looked\n"  # as in examples/hsmd.c
BIG = 3 << 20
# `confined NAME COMMAND...`: the profile begins with the command's execve(2).
CONFINED = ("bash", "-c", 'echo "exec $0" > /proc/self/attr/exec && exec "$@"')
EVERYTHING_BUT_PTRACE = "file, capability, mount, umount, network, unix, signal,"
LIBRARIES = "/** mr, deny ptrace, signal (receive) peer=unconfined,"
READ_BIG = f"import os, sys; sys.stdout.buffer.write(os.pread(os.open(sys.argv[1], os.O_RDONLY), {BIG}, 0))"


class Profiles:
    """Enforced profiles of one test."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._loaded: list[str] = []

    def __call__(self, rules: str, program: str = "") -> str:
        """Load one with these rules, for all who execute `program` from now on; returns its name."""
        name = f"fusehsm-test-{len(self._loaded)}"
        head = f"profile {name} {program} flags=(attach_disconnected)"
        (self._place / name).write_text(f"{head} {{\n{rules}\n}}\n")
        self._parse("--replace", name)
        self._loaded.append(name)
        return name

    def remove_all(self) -> None:
        """Remove all. Processes that have one are unconfined then."""
        while self._loaded:
            self._parse("--remove", self._loaded.pop())

    def _parse(self, action: str, name: str) -> None:
        command = ["apparmor_parser", "--skip-cache", "--quiet", action, str(self._place / name)]
        subprocess.run(command, check=True, timeout=PATIENCE, stderr=subprocess.DEVNULL)


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Profiles]:
    """load(rules) -> the name of an enforced profile with these rules; all go with the test."""
    require(os.path.isdir("/sys/kernel/security/apparmor"), "needs AppArmor in the kernel")
    require(shutil.which("apparmor_parser") is not None, "needs apparmor_parser")
    profiles = Profiles(tmp_path)
    yield profiles
    profiles.remove_all()


def confined(name: str, *command: str) -> list[str]:
    return [*CONFINED, name, *command]


@contextmanager
def mounted(source: Path, path: Path, name: str = "") -> Iterator[LogReader]:
    """A mount whose daemon has that profile, with exact events; yields its log."""
    command = [*harness.COMMAND, "mount", "--foreground", "--events", "exact", str(source), str(path)]
    with start(confined(name, *command) if name else command, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        log = LogReader(process.stderr)
        try:
            log.wait_for(lambda line: line == "ready")
            yield log
        finally:
            process.terminate()
            process.wait(PATIENCE)
            unmount_lazily(path)


def read_big(name: str, path: Path) -> bytes:
    command = confined(name, "/usr/bin/python3", "-S", "-c", READ_BIG, str(path))
    return subprocess.run(command, check=True, timeout=PATIENCE, stdout=subprocess.PIPE).stdout


def covers(ranges: list[tuple[str, int | None, int | None]], size: int) -> bool:
    end = 0
    for _, offset, count in ranges:
        assert offset is not None
        assert count is not None
        if offset > end:
            return False
        end = max(end, offset + count)
    return end >= size


@pytest.mark.parametrize(
    ("daemon", "exact"), [("", True), ("ptrace,", True), ("deny ptrace,", False)], ids=["free", "may", "not"]
)
async def test_a_confined_accessor(
    load: Profiles, fuse: None, backing: Path, mount_point: Path, daemon: str, exact: bool
) -> None:
    """Its content is right in any case; its range is exact where the daemon may look at it."""
    import trio

    content = os.urandom(BIG)
    (backing / "big").write_bytes(content)
    accessor = load("/** mrix, ptrace (readby, tracedby),")
    daemon = load(EVERYTHING_BUT_PTRACE + daemon) if daemon else ""
    with mounted(backing, mount_point, daemon) as log:
        async with listening(mount_point) as listener:
            found = await trio.to_thread.run_sync(read_big, accessor, mount_point / "big")
            ranges = listener.briefly()
        assert found == content
        assert covers(ranges, BIG)
        assert (ranges == [("PRE_ACCESS", 0, BIG)]) == exact, ranges
        told = [line for line in log.lines if "forbids ptrace between the two" in line]
        assert len(told) == (not exact), log.lines


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("deny mount,", "{mount_point}: Permission denied; "),
        ("deny /dev/fuse rw,", "/dev/fuse: Permission denied; "),
    ],
    ids=["mount", "device"],
)
def test_a_daemon_that_may_not_mount(
    load: Profiles, fuse: None, backing: Path, mount_point: Path, rule: str, said: str
) -> None:
    """One line names the profile."""
    name = load(f"{EVERYTHING_BUT_PTRACE} ptrace, {rule}")
    command = [*harness.COMMAND, "mount", str(backing), str(mount_point)]
    done = subprocess.run(confined(name, *command), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    cause = f"the AppArmor profile {name} (enforce) forbids it; docs/security-modules.md has the rules\n"
    assert done.stderr == f"fusehsm: {said.format(mount_point=mount_point)}{cause}"
    assert not os.path.ismount(mount_point)


def test_the_profile_of_the_page(load: Profiles, fuse: None, backing: Path, mount_point: Path) -> None:
    page = (harness.ROOT / "docs" / "security-modules.md").read_text()
    found = re.search(r"^```\nprofile fusehsm .*? {$(.*?)^}$", page, re.MULTILINE | re.DOTALL)
    assert found
    (backing / "file").write_bytes(CONTENT)
    with mounted(backing, mount_point, load(found[1])) as log:
        assert (mount_point / "file").read_bytes() == CONTENT
    assert not [line for line in log.lines if "forbids" in line]


def test_a_fusermount3_that_may_not_mount_there(
    load: Profiles, fuse: None, backing: Path, mount_point: Path
) -> None:
    """An ordinary user's error names the program that is confined."""
    helper = shutil.which("fusermount3")
    assert helper
    load(
        "/** mr, /dev/fuse rw, capability, signal, unix, mount fstype=fuse.* -> /nowhere/, umount,",
        os.path.realpath(helper),
    )
    command, environment, who = harness.command_of(NOBODY)
    os.chown(mount_point, NOBODY, NOBODY)
    words = [*command, "mount", str(backing), str(mount_point)]
    with (
        harness.fuse_device_for_everybody(),
        harness.start(words, env=harness.environment(**environment), cwd="/", **who) as process,
    ):
        _, complaint = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert complaint == (
        f"fusehsm: {mount_point}: mount failed: Permission denied; a security module forbids it to fusermount3; "
        "docs/security-modules.md has the rules\n"
    )


@contextmanager
def running(words: list[str], place: Path) -> Iterator["tuple[subprocess.Popen[str], LogReader, LogReader]"]:
    """`fusehsm run` with the listener of examples/, and its two streams."""
    with start(words) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process, LogReader(process.stdout), LogReader(process.stderr)
            process.terminate()
            process.wait(PATIENCE)
        finally:
            process.kill()
            unmount_lazily(place)


@pytest.fixture
def stub(places: Callable[[str], Path]) -> Path:
    path = places("tree") / "hello"
    path.touch()
    os.truncate(path, len(CONTENT))
    return path


@pytest.fixture
def hsmd(tmp_path: Path) -> Path:
    program = tmp_path / "hsmd"
    source = harness.ROOT / "examples" / "hsmd.c"
    subprocess.run(["gcc", "-o", program, source], check=True, timeout=PATIENCE)
    return program


@pytest.mark.parametrize("listener", [(), ("--listener",)], ids=["plain", "listener"])
def test_a_confined_listener(
    load: Profiles, fuse: None, stub: Path, hsmd: Path, listener: tuple[str, ...]
) -> None:
    """Its profile needs the files and nothing else."""
    name = load(f"{LIBRARIES} {stub.parent}/{{,**}} rw,")
    command = [*harness.COMMAND, "run", *listener, "--mount", str(stub.parent), "--"]
    with running([*command, *confined(name, str(hsmd), str(stub.parent))], stub.parent) as (_, output, _log):
        output.wait_for(lambda line: line == "listening")
        assert subprocess.run(["cat", stub], stdout=subprocess.PIPE, timeout=PATIENCE).stdout == CONTENT


def test_a_listener_without_a_rule_for_the_file(load: Profiles, fuse: None, stub: Path, hsmd: Path) -> None:
    """AppArmor does not ask for descriptors that an unconfined process opened. On a real kernel the listener itself opens them, and may not."""
    name = load(f"{LIBRARIES} deny {stub.parent}/?** rwm,")
    command = [*harness.COMMAND, "run", "--mount", str(stub.parent), "--"]
    with running([*command, *confined(name, str(hsmd), str(stub.parent))], stub.parent) as (_, output, _log):
        output.wait_for(lambda line: line == "listening")
        done = subprocess.run(["cat", stub], capture_output=True, timeout=PATIENCE)
    assert done.stdout == CONTENT


def test_a_listener_that_gets_no_signals(load: Profiles, fuse: None, stub: Path, hsmd: Path) -> None:
    """One line says so, and listener and mount go on."""
    name = load(f"/** mr, {stub.parent}/{{,**}} rw, deny signal,")
    command = [*harness.COMMAND, "run", "--mount", str(stub.parent), "--"]
    words = [*command, *confined(name, str(hsmd), str(stub.parent))]
    with running(words, stub.parent) as (process, output, log):
        output.wait_for(lambda line: line == "listening")
        process.terminate()
        told = log.wait_for(lambda line: "SIGTERM is not passed on to process" in line)
        assert f"the AppArmor profile {name} (enforce) forbids it" in told
        assert subprocess.run(["cat", stub], stdout=subprocess.PIPE, timeout=PATIENCE).stdout == CONTENT
        load.remove_all()


def test_a_supervisor_that_may_not_look_at_its_command(
    load: Profiles, fuse: None, stub: Path, hsmd: Path
) -> None:
    """The command gets no group, and one line says why."""
    name = load(EVERYTHING_BUT_PTRACE)
    command = [*harness.COMMAND, "run", "--mount", str(stub.parent), "--", str(hsmd), str(stub.parent)]
    with running(confined(name, *command), stub.parent) as (process, _, log):
        told = log.wait_for(lambda line: "gets no fanotify group" in line)
        assert process.wait(PATIENCE) != 0
    assert f"(EPERM): the AppArmor profile {name} (enforce) forbids ptrace between the two" in told
