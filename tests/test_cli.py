"""The command: what it returns, what it says of bad input in one line, and that nothing is left when it fails."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.linux.mountinfo import read_mounts
from fusehsm.version import VERSION
from tests.conftest import MakeMount
from tests.support import harness, leftovers
from tests.support.harness import NOBODY, PATIENCE, fusehsm, is_dead, unmount_lazily

pytestmark = pytest.mark.any_engine

COMMANDS = {"mount", "umount", "populate", "trace", "status", "doctor"}


def complaint_of(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """The one line on stderr of a command that failed with this exit code and said nothing else."""
    assert (done.returncode, done.stdout) == (code, ""), done
    (line,) = done.stderr.splitlines()
    prefix, _, text = line.partition(": ")
    assert prefix == "fusehsm"
    return text


def mounted_at(path: Path) -> int:
    return sum(mount.mount_point == str(path) for mount in read_mounts())


@pytest.fixture
def destination(fuse: None, mount_point: Path) -> Iterator[Path]:
    """A directory whose mounts go with the test, whatever happened, after their daemons."""
    yield mount_point
    for pid in daemons_of(mount_point):
        leftovers.kill(pid)
    unmount_lazily(mount_point)


def daemons_of(path: Path) -> list[int]:
    """Processes of this session that were told to mount there."""
    return [pid for pid in harness.own_processes() if str(path) in leftovers.command_line(pid).split()]


# The command itself


def test_version_and_help() -> None:
    assert fusehsm("--version").stdout == f"fusehsm {VERSION}\n"
    done = fusehsm("--help")
    assert done.returncode == 0
    assert {name for name in re.findall(r"\w+", done.stdout) if name in COMMANDS} == COMMANDS
    assert all(fusehsm(command, "--help").returncode == 0 for command in COMMANDS)


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    code = "import sys, fusehsm.cli; print(*sorted({'trio', 'pyfuse3', 'rich', 'json'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=harness.environment(),
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() in ([], ["json"])


@pytest.mark.parametrize(
    "arguments", [["unmount"], ["mount"], ["mount", "/srv"], ["mount", "--fast", "/a", "/b"], ["umount"]]
)
def test_bad_usage(arguments: list[str]) -> None:
    assert "--help" in complaint_of(fusehsm(*arguments), 2)


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        (["--abi", "linux-7"], ["linux-7", "linux-6.14", "patch-v2", "patch-v1"]),
        (["--events", "some"], ["some", "exact", "first-access", "auto"]),
        (["--engine", "fuse-t"], ["fuse-t", "pyfuse3", "auto"]),
        (["--cache", "off"], ["off", "private", "shared"]),
        (["--unattended", "wait"], ["wait", "allow", "deny", "hold"]),
        (["--unattended", "deny=ENOSUCH"], ["ENOSUCH", "EIO"]),
        (["--unattended", "hold=EIO"], ["hold=EIO", "deny"]),
        (["--event-timeout", "soon"], ["soon", "SECONDS"]),
        (["--event-timeout", "-1"], ["-1"]),
        (["--event-timeout", "5=ENOSUCH"], ["ENOSUCH"]),
        (["--handler", "module"], ["module", "MODULE:CALLABLE"]),
    ],
    ids=" ".join,
)
def test_unknown_words_list_the_choices(
    backing: Path, destination: Path, options: list[str], choices: list[str]
) -> None:
    line = complaint_of(fusehsm("mount", *options, backing, destination), 2)
    assert all(choice in line for choice in choices), line
    assert mounted_at(destination) == 0


# mount and umount


def test_mount_returns_when_it_answers_and_umount_when_the_daemon_has_ended(
    backing: Path, destination: Path, accessor: Accessor
) -> None:
    (backing / "file").write_bytes(b"content")
    done = fusehsm("mount", backing, destination)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert accessor.call("read_file", str(destination / "file")) == b"content"
    (daemon,) = daemons_of(destination)
    assert os.getsid(daemon) == daemon
    done = fusehsm("umount", destination)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert daemons_of(destination) == []
    assert mounted_at(destination) == 0
    assert os.listdir(destination) == []


def test_mount_on_itself(fuse: None, backing: Path, accessor: Accessor) -> None:
    (backing / "file").write_bytes(b"content")
    assert fusehsm("mount", backing, backing).returncode == 0
    try:
        assert mounted_at(backing) == 1
        assert accessor.call("read_file", str(backing / "file")) == b"content"
        accessor.call("pwrite_path", str(backing / "file"), b"C", 0)
        assert fusehsm("umount", backing).returncode == 0
        assert (backing / "file").read_bytes() == b"Content"
    finally:
        for pid in daemons_of(backing):
            leftovers.kill(pid)
        unmount_lazily(backing)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_foreground_says_ready_and_unmounts_when_told_to_end(make_mount: MakeMount, number: int) -> None:
    mount = make_mount()
    mount.process.send_signal(number)
    assert mount.process.wait(PATIENCE) == 0
    assert "ready" in mount.log.wait_for_end()
    assert mounted_at(mount.path) == 0


def test_umount_of_what_is_in_use(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount()
    (mount.source / "file").write_bytes(b"content")
    descriptor = accessor.call("open", str(mount.path / "file"), os.O_RDONLY)
    assert str(mount.path) in complaint_of(fusehsm("umount", mount.path), 1)
    assert accessor.call("pread", descriptor, 7, 0) == b"content"
    accessor.call("close", descriptor)
    assert fusehsm("umount", mount.path).returncode == 0
    assert mount.process.wait(PATIENCE) == 0


def test_a_killed_daemon(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount()
    (mount.source / "file").write_bytes(b"content")
    descriptor = accessor.call("open", str(mount.path / "file"), os.O_RDONLY)
    mount.kill_daemon()
    with pytest.raises(OSError) as caught:
        accessor.call("pread", descriptor, 7, 0)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert is_dead(mount.path)
    line = complaint_of(fusehsm("mount", mount.source, mount.path), 1)
    assert "fusehsm umount" in line
    assert fusehsm("umount", mount.path).returncode == 0
    assert mounted_at(mount.path) == 0
    assert (mount.source / "file").read_bytes() == b"content"
    assert fusehsm("mount", mount.source, mount.path).returncode == 0
    assert fusehsm("umount", mount.path).returncode == 0


def test_what_cannot_be_mounted(backing: Path, destination: Path, make_mount: MakeMount) -> None:
    file = backing / "file"
    file.touch()
    inside = backing / "inside"
    inside.mkdir()
    busy = make_mount()
    for source, target, words in (
        (backing / "missing", destination, ["missing", "mkdir"]),
        (file, destination, [str(file), "not a directory"]),
        (backing, destination / "missing", ["missing", "mkdir"]),
        (backing, file, [str(file), "not a directory"]),
        (backing, inside, [str(inside), "inside", str(backing)]),
        (inside, backing, [str(inside), "inside", str(backing)]),
        (backing, busy.path, [str(busy.path), "already", "fusehsm umount"]),
    ):
        line = complaint_of(fusehsm("mount", source, target), 1)
        assert all(word in line for word in words), line
        assert mounted_at(target) == (1 if target == busy.path else 0)


def test_a_link_to_the_source_is_the_source(
    fuse: None, backing: Path, session_directory: Path, numbers: Iterator[int]
) -> None:
    link = session_directory / f"link-{next(numbers)}"
    link.symlink_to(backing)
    inside = backing / "inside"
    inside.mkdir()
    assert "inside" in complaint_of(fusehsm("mount", link, inside), 1)


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ("no_such_module:handler", ["no_such_module", "--handler-path"]),
        ("broken_handler:handler", ["broken_handler", "RuntimeError", "on purpose"]),
        ("good_handler:missing", ["good_handler:missing", "missing"]),
        ("good_handler:NUMBER", ["good_handler:NUMBER", "not callable"]),
    ],
)
def test_handlers_that_cannot_be_had(
    backing: Path, destination: Path, tmp_path: Path, handler: str, words: list[str]
) -> None:
    (tmp_path / "broken_handler.py").write_text("raise RuntimeError('on purpose')\n")
    (tmp_path / "good_handler.py").write_text("NUMBER = 1\n")
    words_of_it = ("mount", "--handler", handler, "--handler-path", ".", backing, destination)
    line = complaint_of(fusehsm(*words_of_it, cwd=tmp_path), 1)
    assert all(word in line for word in words), line
    assert mounted_at(destination) == 0


def test_a_handler_of_the_working_directory(backing: Path, destination: Path, tmp_path: Path) -> None:
    """Nothing there is imported unless it is asked for; and then no file there is taken for one of Python's or of a library."""
    (tmp_path / "there.py").write_text("def handler(event): ...\n")
    for name in ("trio", "inspect", "difflib"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n")

    def mount(*words: str) -> subprocess.CompletedProcess[str]:
        # As the installed program: `python -m` puts the working directory first itself.
        program = (sys.executable, "-P", "-m", "fusehsm", "mount", "--handler", "there:handler")
        return subprocess.run(
            [*program, *words, str(backing), str(destination)],
            cwd=tmp_path,
            env=harness.environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    assert complaint_of(mount(), 1).endswith("name its directory with --handler-path DIR")
    done = mount("--handler-path", ".")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    assert fusehsm("umount", destination).returncode == 0


def test_umount_of_what_is_no_mount(backing: Path) -> None:
    for path in (backing, backing / "missing", Path("/proc")):
        assert str(path) in complaint_of(fusehsm("umount", path), 1)


# What a distribution's /dev/fuse is like (mode 666), in a mount namespace of the command's own, where it then runs as the user nobody.
AS_NOBODY = """
set -e
mount -t tmpfs none "$1"
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
shift
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""

VISIT = """
import json, subprocess, sys
source, target, *fusehsm = sys.argv[1:]

def run(*words):
    done = subprocess.run([*fusehsm, *words], capture_output=True, text=True)
    return [done.returncode, done.stdout, done.stderr]

results = [run("mount", source, target)]
with open(target + "/file") as file:
    results.append(file.read())
results += [run("status", "--json", target), run("umount", target), run("mount", source, "/srv"), run("mount", "--allow-other", source, target)]
run("umount", target)
print(json.dumps(results))
"""


@pytest.mark.root
def test_an_ordinary_user(
    fuse: None, session_directory: Path, mount_point: Path, numbers: Iterator[int]
) -> None:
    home = session_directory / f"home-{next(numbers)}"
    source, target, runtime = home / "source", home / "target", home / "runtime"
    for place in (home, source, target, runtime):
        place.mkdir(mode=0o700)
        os.chown(place, NOBODY, NOBODY)
    (source / "file").write_bytes(b"content")
    (source / "file").chmod(0o644)
    program, environment, _ = harness.command_of(NOBODY)
    command = ["unshare", "--mount", "sh", "-c", AS_NOBODY, "sh", str(mount_point)]
    command += [program[0], "-c", VISIT, str(source), str(target), *program]
    environment = {**environment, "XDG_RUNTIME_DIR": str(runtime), "HOME": str(home)}
    with harness.start(command, env=harness.environment(**environment)) as process:
        output, complaint = process.communicate(timeout=PATIENCE)
    assert complaint == ""
    mounted, content, status, unmounted, refused, not_for_others = json.loads(output)
    assert mounted == [0, "", ""]
    assert content == "content"
    assert json.loads(status[1])[0]["owner_uid"] == NOBODY
    assert unmounted == [0, "", ""]
    assert (refused[0], refused[2].count("\n")) == (1, 1)
    assert refused[2].startswith("fusehsm: /srv: ")
    assert not_for_others[0] == (
        0 if "user_allow_other" in Path("/etc/fuse.conf").read_text().splitlines() else 1
    )


@pytest.mark.root
def test_without_the_fuse_device(backing: Path, mount_point: Path) -> None:
    line = complaint_of(without_fuse("mount", str(backing), str(mount_point)), 1)
    assert line.startswith("/dev/fuse: ")


def without_fuse(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run fusehsm where /dev/fuse is something that cannot be opened: a directory's mount namespace of its own, an empty /dev above it."""
    script = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *harness.COMMAND, *arguments]
    with harness.start(command) as process:
        output, complaint = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(command, process.returncode, output, complaint)
