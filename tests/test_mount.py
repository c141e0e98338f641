"""A mount's life: what cannot be mounted says so in one line, and what is mounted goes without loss, however it ends."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fusehsm.cli import main
from fusehsm.conform.accessor import Accessor
from fusehsm.control import socket as control_socket
from fusehsm.daemon.options import MountError, directories
from fusehsm.linux.mountinfo import read_mounts
from tests.conftest import MakeAccessor, MakeMount
from tests.support.harness import (
    NOBODY,
    PATIENCE,
    command_line,
    command_of,
    environment,
    fuse_device_for_everybody,
    fusehsm,
    is_dead,
    kill,
    own_processes,
    start,
    unmount_lazily,
)

pytestmark = pytest.mark.fuse


@pytest.fixture
def daemons(fuse: None, engine: str) -> Iterator[Callable[..., "subprocess.CompletedProcess[str]"]]:
    """daemons(*arguments of mount, ending in DST) -> what the command said; what it mounted goes with the test."""
    with ExitStack() as stack:

        def mount(*arguments: Any, **how: Any) -> "subprocess.CompletedProcess[str]":
            stack.callback(_end, Path(arguments[-1]))
            return fusehsm("mount", "--engine", engine, *arguments, **how)

        yield mount


def _end(path: Path) -> None:
    for pid in own_processes():
        if str(path) in command_line(pid) and " mount " in command_line(pid):
            kill(pid)
    unmount_lazily(path)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The exit code of a command that fails, and its one line."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert said.out == ""
    assert lines[0].startswith("fusehsm: ")
    return code, lines[0]


def is_mounted(path: Path) -> bool:
    return any(m.mount_point == str(path) and m.is_fusehsm for m in read_mounts())


# Bad input


def test_the_root_directory_is_never_overlaid(backing: Path) -> None:
    """Asked of the check alone: were it to fail, unmounting would unmount everything."""
    for source in (str(backing), "/"):
        with pytest.raises(MountError, match=r"^/: DST must not be the root directory; "):
            directories(source, "/")


def test_source_and_destination(
    backing: Path, mount_point: Path, capsys: pytest.CaptureFixture[str], fuse: None
) -> None:
    (backing / "file").write_text("x")
    (backing / "inside").mkdir()
    (backing / "loop").symlink_to("loop")
    missing = backing / "missing"
    rows: tuple[tuple[Path, Path, Path, str], ...] = (
        (missing, mount_point, missing, "SRC does not exist"),
        (backing / "file", mount_point, backing / "file", "SRC is not a directory"),
        (backing / "loop", mount_point, backing / "loop", os.strerror(errno.ELOOP)),
        (backing / "file" / "below", mount_point, backing / "file" / "below", os.strerror(errno.ENOTDIR)),
        (backing, missing, missing, "DST does not exist"),
        (backing, backing / "file", backing / "file", "DST is not a directory"),
        (backing, backing / "inside", backing / "inside", "DST lies inside SRC"),
        (backing / "inside", backing, backing / "inside", "SRC lies inside DST"),
    )
    for source, destination, named, cause in rows:
        code, line = complaint(capsys, "mount", source, destination)
        assert code == 1, line
        assert str(named) in line
        assert cause in line
    (mount_point / "link").symlink_to(backing)
    code, line = complaint(capsys, "mount", mount_point / "link", backing / "inside")
    assert (code, "DST lies inside SRC" in line) == (1, True)
    assert sorted(os.listdir(backing)) == ["file", "inside", "loop"]


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (("--abi", "linux-7"), ("linux-6.14", "patch-v2", "patch-v1")),
        (("--events", "some"), ("exact", "first-access", "auto")),
        (("--engine", "kernel"), ("pyfuse3", "devfuse", "auto")),
        (("--cache", "none"), ("private", "shared")),
        (("--unattended", "ignore"), ("allow", "deny", "hold")),
        (("--unattended", "hold=EIO"), ("deny=ERRNO",)),
        (("--unattended", "deny=EWRONG"), ("EIO", "EAGAIN")),
        (("--unattended", "deny="), ("EIO", "EAGAIN")),
        (("--event-timeout", "soon"), ("SECONDS=ERRNO",)),
        (("--event-timeout", "-1"), ("more than 0",)),
        (("--event-timeout", "nan"), ("more than 0",)),
        (("--event-timeout", "1=NO"), ("EIO", "EAGAIN")),
        (("--handler", "module"), ("MODULE:CALLABLE",)),
        (("--handler", ":"), ("MODULE:CALLABLE",)),
    ],
)
def test_unknown_words(
    arguments: tuple[str, str],
    choices: tuple[str, ...],
    backing: Path,
    mount_point: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, line = complaint(capsys, "mount", *arguments, backing, mount_point)
    assert code == 2
    assert arguments[1].partition("=")[0] in line
    for choice in choices:
        assert choice in line
    assert not is_mounted(mount_point)


def test_handlers_that_cannot_be_had(
    backing: Path,
    mount_point: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "handler_broken.py").write_text("def\n")
    (tmp_path / "handler_exits.py").write_text("raise SystemExit('no')\n")
    (tmp_path / "handler_fine.py").write_text("number = 7\ndef handler(event): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, cause in (
        ("no_such_module:handler", "No module named"),
        ("handler_broken:handler", "SyntaxError"),
        ("handler_exits:handler", "SystemExit"),
        ("handler_fine:missing", "missing"),
        ("handler_fine:number", "not callable"),
    ):
        code, line = complaint(capsys, "mount", "--handler", name, backing, mount_point)
        assert (code, name in line, cause in line) == (1, True, True), line


def test_a_busy_destination(make_mount: MakeMount, backing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mount = make_mount()
    code, line = complaint(capsys, "mount", backing, mount.path)
    assert code == 1
    assert "already a fusehsm mount" in line
    assert f"fusehsm umount {mount.path}" in line
    mount.kill_daemon()
    code, line = complaint(capsys, "mount", backing, mount.path)
    assert code == 1
    assert f"fusehsm umount {mount.path}" in line
    code, line = complaint(capsys, "mount", mount.path, backing)
    assert (code, f"fusehsm umount {mount.path}" in line) == (1, True)


def unshared(script: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a shell script in a mount namespace of its own."""
    with start(["unshare", "-m", "sh", "-c", script, "sh", *map(str, arguments)]) as process:
        output, said = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(script, process.returncode, output, said)


@pytest.mark.root
def test_no_device(backing: Path, mount_point: Path) -> None:
    run = f'exec {sys.executable} -m fusehsm mount "$1" "$2"'
    hidden = unshared(f"mount -t tmpfs none /dev && {run}", backing, mount_point)
    assert hidden.returncode == 1
    assert hidden.stderr == "fusehsm: /dev/fuse: No such file or directory; run modprobe fuse as root\n"
    other = unshared(f"mount --bind /dev/null /dev/fuse && {run}", backing, mount_point)
    assert other.returncode == 1
    assert len(other.stderr.splitlines()) == 1, other.stderr
    assert "/dev/fuse" in other.stderr or str(mount_point) in other.stderr


@pytest.fixture
def open_device() -> Iterator[None]:
    """/dev/fuse as udev makes it: open to all users."""
    with fuse_device_for_everybody():
        yield


def test_a_device_for_root_alone(backing: Path, mount_point: Path, open_device: None) -> None:
    os.chown(mount_point, NOBODY, NOBODY)
    os.chmod("/dev/fuse", 0o600)
    done = fusehsm("mount", backing, mount_point, uid=NOBODY)
    assert done.returncode == 1
    assert done.stderr == "fusehsm: /dev/fuse: Permission denied; run chmod 666 /dev/fuse as root\n"


def test_what_an_ordinary_user_may_not(open_device: None, backing: Path, mount_point: Path) -> None:
    denied = fusehsm("mount", backing, mount_point, uid=NOBODY)
    assert denied.returncode == 1
    assert denied.stderr == (
        f"fusehsm: {mount_point}: you may not write to it; an ordinary user mounts only on directories that they own\n"
    )
    os.chown(mount_point, NOBODY, NOBODY)
    backing.chmod(0o700)
    unreadable = fusehsm("mount", backing, mount_point, uid=NOBODY)
    assert unreadable.returncode == 1
    assert len(unreadable.stderr.splitlines()) == 1, unreadable.stderr
    assert str(backing) in unreadable.stderr
    assert os.strerror(errno.EACCES) in unreadable.stderr
    assert not is_mounted(mount_point)


@pytest.mark.engine("devfuse")
def test_a_context_of_selinux(backing: Path, mount_point: Path) -> None:
    """Its commas are in double quotes, as for mount(8)."""
    quoted = 'context="system_u:object_r:tmp_t:s0:c1,c2"'
    whole = fusehsm("mount", "-o", f"nosuid,{quoted},noatime", backing, mount_point)
    # The kernel of the tests has no SELinux.
    assert whole.stderr == (
        f"fusehsm: {mount_point}: Invalid argument; leave out the context: SELinux is off, or does not accept it here\n"
    )
    cut = fusehsm("mount", "-o", quoted.replace('"', ""), backing, mount_point)
    assert cut.returncode == 2
    assert cut.stderr == (
        "fusehsm: -o c2: looks like a part of context=system_u:object_r:tmp_t:s0:c1; put a context that has commas into double quotes, "
        "and all into single ones: -o 'context=\"system_u:object_r:tmp_t:s0:c1,c2\"'\n"
    )
    split = fusehsm("mount", "--engine", "pyfuse3", "-o", quoted, backing, mount_point)
    assert split.returncode == 2
    assert split.stderr == f"fusehsm: -o {quoted}: libfuse splits it at its commas; use --engine devfuse\n"
    assert not is_mounted(mount_point)


def test_bad_fuse_options(backing: Path, mount_point: Path, engine: str) -> None:
    done = fusehsm("mount", "--engine", engine, "-o", "no_such_option", backing, mount_point)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "no_such_option" in done.stderr
    # devfuse refuses it before it looks at the mount point.
    assert str(mount_point) in done.stderr or engine == "devfuse"
    assert not is_mounted(mount_point)


# Lives


def test_mount_use_unmount(daemons: Any, backing: Path, mount_point: Path, accessor: Accessor) -> None:
    (backing / "file").write_bytes(b"content")
    done = daemons("--events", "first-access", backing, mount_point)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # It answers at once.
    assert accessor.call("read_file", str(mount_point / "file")) == b"content"
    (found,) = json.loads(fusehsm("status", "--json", str(mount_point)).stdout)
    assert (found["destination"], found["events"], found["groups"]) == (str(mount_point), "first-access", [])
    assert fusehsm("doctor").returncode == 0
    daemon = control_socket.peer_of(control_socket.connect(next(
        m for m in read_mounts() if m.mount_point == str(mount_point)
    ))).pid  # fmt: skip
    assert fusehsm("umount", mount_point).returncode == 0
    assert not is_mounted(mount_point)
    assert daemon not in own_processes()
    assert (backing / "file").read_bytes() == b"content"
    again = fusehsm("umount", mount_point)
    assert again.returncode == 1
    assert again.stderr == f"fusehsm: {mount_point}: not a fusehsm mount; fusehsm status lists them\n"


def test_a_mount_on_itself(daemons: Any, backing: Path, accessor: Accessor) -> None:
    (backing / "file").write_bytes(b"content")
    assert daemons(backing, backing).returncode == 0
    assert accessor.call("read_file", str(backing / "file")) == b"content"
    accessor.call("pwrite_path", str(backing / "file"), b"C", 0)
    assert fusehsm("umount", backing).returncode == 0
    assert (backing / "file").read_bytes() == b"Content"


@pytest.mark.parametrize(
    "name", ["with,comma", "mit Ümläut", "back\\slash", "new\nline", b"not-\xff-utf8", "-dash"]
)
def test_names_of_directories(
    daemons: Any, backing: Path, mount_point: Path, accessor: Accessor, name: str | bytes
) -> None:
    name = os.fsdecode(name)
    source, destination = backing / name, mount_point / name
    source.mkdir()
    destination.mkdir()
    (source / "file").write_bytes(b"content")
    done = daemons("--", source, destination)
    assert (done.returncode, done.stderr) == (0, "")
    assert accessor.call("read_file", str(destination / "file")) == b"content"
    assert "error" not in json.loads(fusehsm("status", "--json", "--", destination).stdout)[0]
    assert fusehsm("umount", "--", destination).returncode == 0
    assert not any(m.mount_point.startswith(str(mount_point)) for m in read_mounts())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(make_mount: MakeMount, accessor: Accessor, number: signal.Signals) -> None:
    mount = make_mount()
    accessor.call("stat", str(mount.path))
    mount.process.send_signal(number)
    assert mount.process.wait(PATIENCE) == 0
    assert not is_mounted(mount.path)


def test_signals_that_keep_coming(make_mount: MakeMount, accessor: Accessor) -> None:
    """Neither ends the server before it has unmounted: timeout(1) sends two, an impatient user more."""
    mount = make_mount()
    accessor.call("stat", str(mount.path))
    deadline = time.monotonic() + PATIENCE
    while mount.process.poll() is None and time.monotonic() < deadline:
        mount.process.send_signal(signal.SIGTERM)
        time.sleep(0.003)
        if not is_mounted(mount.path):
            break
    assert mount.process.wait(PATIENCE) == 0
    assert not is_mounted(mount.path)


def test_a_signal_as_soon_as_it_is_mounted(backing: Path, mount_point: Path, engine: str) -> None:
    """Whatever the server is doing then: it ends, and the mount with it."""
    program, _, _ = command_of(None)
    command = [*program, "mount", "--foreground", "--engine", engine, str(backing), str(mount_point)]
    server = start(command)
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_mounted(mount_point) and server.poll() is None and time.monotonic() < deadline:
            pass
        server.terminate()
        _, said = server.communicate(timeout=PATIENCE)
        assert (server.returncode, is_mounted(mount_point)) == (0, False), said
    finally:
        server.kill()
        server.wait(PATIENCE)
        unmount_lazily(mount_point)


def test_the_daemon_is_killed(make_mount: MakeMount, make_accessor: MakeAccessor, tmp_path: Path) -> None:
    mount = make_mount("--unattended", "hold")
    (mount.source / "file").write_bytes(b"content")
    reader, holder = make_accessor(), make_accessor()
    path = str(mount.path / "file")
    descriptor = holder.call("open", path, os.O_RDWR)
    waiting = reader.start("read_file", path)
    while not json.loads(fusehsm("status", "--json", mount.path).stdout)[0]["waiting"]:
        pass
    name = ":".join(map(str, mount.device))
    sockets = [
        entry for place in control_socket.directories(os.getuid()) if (entry := Path(place, name)).is_socket()
    ]
    assert len(sockets) == 1
    mount.kill_daemon()
    with pytest.raises(OSError) as caught:
        waiting.result()
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    with pytest.raises(OSError):
        holder.call("pread", descriptor, 10, 0)
    assert is_dead(mount.path)
    status = fusehsm("status", mount.path)
    assert status.returncode == 1
    # A file is still open there, and nobody serves it: it must not keep the mount.
    assert fusehsm("umount", mount.path).returncode == 0
    assert not is_mounted(mount.path)
    assert not sockets[0].exists()
    assert (mount.source / "file").read_bytes() == b"content"
    assert fusehsm("mount", mount.source, mount.path).returncode == 0
    assert fusehsm("umount", mount.path).returncode == 0


def test_unmounting_what_is_in_use(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount()
    (mount.source / "file").write_bytes(b"content")
    descriptor = accessor.call("open", str(mount.path / "file"), os.O_RDONLY)
    busy = fusehsm("umount", mount.path)
    assert busy.returncode == 1
    assert busy.stderr == (
        f"fusehsm: {mount.path}: Device or resource busy; close the files that are open there (fuser -vm shows them) and try again\n"
    )
    assert accessor.call("pread", descriptor, 10, 0) == b"content", "it goes on"
    accessor.call("close", descriptor)
    assert fusehsm("umount", mount.path).returncode == 0


@pytest.mark.root
def test_an_ordinary_user(
    open_device: None,
    session_directory: Path,
    make_mount: MakeMount,
    make_accessor: MakeAccessor,
    engine: str,
) -> None:
    """He mounts his own directory, traces it and unmounts it; others cannot get in."""
    home = session_directory / f"home-{engine}"
    for name in ("source", "mount", "run"):
        (home / name).mkdir(parents=True)
        os.chown(home / name, NOBODY, NOBODY)
    (home / "run").chmod(0o700)
    (home / "source" / "file").write_bytes(b"content")
    (home / "source" / "file").chmod(0o644)
    env = {"XDG_RUNTIME_DIR": str(home / "run")}
    mount = make_mount("--events", "exact", source=home / "source", path=home / "mount", uid=NOBODY, env=env)
    path = str(mount.path / "file")
    program, more, who = command_of(NOBODY)
    trace = start(
        [*program, "trace", "--json", "--count", "1", str(mount.path)],
        env=environment(**{**more, **env}),
        **who,
    )
    try:
        assert trace.stderr is not None
        assert trace.stderr.readline() == "ready\n"
        user = make_accessor(uid=NOBODY, gid=NOBODY)
        assert user.call("read_file", path) == b"content"
        output, _ = trace.communicate(timeout=PATIENCE)
        assert json.loads(output)["path"] == path
    finally:
        trace.kill()
        trace.communicate()
    with pytest.raises(PermissionError):
        make_accessor().call("read_file", path)  # root is another user here
    done = fusehsm("umount", mount.path, uid=NOBODY, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert mount.process.wait(PATIENCE) == 0


def read_until(path: str, wanted: bytes) -> None:
    """Names and sizes are believed for a second."""
    data = b""
    while data != wanted:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        data = os.read(descriptor, 100_000)
        os.close(descriptor)


def test_the_source_changes_behind_a_shared_mount(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--cache", "shared")
    file = mount.source / "file"
    file.write_bytes(b"a" * 10_000)
    path = str(mount.path / "file")
    assert accessor.call("read_file", path) == b"a" * 10_000
    file.write_bytes(b"b" * 5000)
    accessor.call(read_until, path, b"b" * 5000)
    os.truncate(file, 20_000)
    accessor.call(read_until, path, b"b" * 5000 + bytes(15_000))
    file.unlink()
    file.write_bytes(b"new")
    accessor.call(read_until, path, b"new")
