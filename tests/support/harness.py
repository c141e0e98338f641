"""Mounts for tests that cannot hang the tests: each knows its daemon, and goes whatever happened.

Everything that a test session starts is marked by an environment variable and lies under one directory, so that what it left behind
can be told from what others do on this machine.
"""

import errno
import faulthandler
import fcntl
import functools
import os
import resource
import shutil
import site
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from fusehsm.linux import mountinfo
from tests.support import guardian, leftovers
from tests.support.leftovers import command_line as command_line
from tests.support.leftovers import kill as kill
from tests.support.requirements import require, require_fuse

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "fusehsm")
# Seconds that a command may take before it is given up on; no test waits for it to pass.
PATIENCE = float(os.environ.get("FUSEHSM_TESTS_PATIENCE", "60"))
NOBODY = 65534
SESSION = uuid.uuid4().hex
os.environ[leftovers.MARK] = SESSION  # inherited by every process that this session starts, daemons included


def fusehsm(
    *arguments: str | os.PathLike[str],
    timeout: float = PATIENCE,
    env: Mapping[str, str] | None = None,
    uid: int | None = None,
    **more: object,
) -> subprocess.CompletedProcess[str]:
    """Run the command; stdout and stderr are text in the result. `env` is added to ours; `more` goes to Popen."""
    program, more_environment, who = command_of(uid)
    command = [*program, *(os.fspath(argument) for argument in arguments)]
    with start(command, env=environment(**{**more_environment, **(env or {})}), **who, **more) as process:
        try:
            output, complaint = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, complaint)


def start(command: Sequence[str], **more: object) -> "subprocess.Popen[str]":
    """A child in a session of its own, with stdout and stderr as text pipes; run from the checkout, unless `cwd` is given."""
    settings: dict[str, object] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "start_new_session": True,
        "text": True,
        "errors": "surrogateescape",
        "env": environment(),
        **more,
    }
    return subprocess.Popen(command, **settings)  # type: ignore[call-overload, no-any-return]


@functools.cache
def command_of(uid: int | None) -> tuple[tuple[str, ...], Mapping[str, str], Mapping[str, object]]:
    """How to run `fusehsm` as that user (None: as we are): the command, more environment, more arguments of Popen.

    Skips the test where the tests' own Python lies out of that user's reach, and no other of the same version is found.
    """
    if uid is None:
        return COMMAND, {}, {}
    who: dict[str, object] = {"user": uid, "group": uid, "extra_groups": []}
    where_we_are = os.pathsep.join([str(ROOT), *site.getsitepackages()])
    version = f"python3.{sys.version_info.minor}"
    pythons = [
        python for python in (sys.executable, shutil.which(version, path="/usr/bin:/usr/local/bin")) if python
    ]
    # A checkout, or an interpreter, in root's home directory is out of reach: then from copies.
    for copied in (False, True):
        found = copied_packages() if copied else where_we_are
        for python in pythons:
            trial = [python, "-c", "import fusehsm.cli, fusehsm.mount, pyfuse3, trio, typer, rich"]
            with suppress(PermissionError):
                settings: dict[str, object] = {
                    "env": environment(PYTHONPATH=found),
                    "cwd": "/",
                    "timeout": PATIENCE,
                    **who,
                }
                done = subprocess.run(trial, check=False, capture_output=True, **settings)  # type: ignore[call-overload]
                if done.returncode == 0:
                    more = {"PYTHONPATH": found, "XDG_RUNTIME_DIR": _runtime_directory(uid)}
                    return (python, "-m", "fusehsm"), more, who
    require(False, f"needs a {version} that other users may run")
    raise AssertionError


def _runtime_directory(uid: int) -> str:
    """What a login makes for a user, and control sockets need."""
    place = tempfile.mkdtemp(prefix=f"runtime-{uid}-")
    os.chown(place, uid, uid)
    return place


def copied_packages() -> str:
    """A directory with fusehsm and what it needs, that every user may read."""
    place = Path(tempfile.mkdtemp(prefix="packages-"))
    place.chmod(0o755)
    big = shutil.ignore_patterns(
        "mypy*", "ruff*", "hypothesis*", "*pytest*", "pip*", "setuptools*", "__pycache__", "__editable__*"
    )
    for packages in (*filter(os.path.isdir, site.getsitepackages()), str(ROOT / "fusehsm")):
        target = place / "fusehsm" if packages.endswith("/fusehsm") else place
        shutil.copytree(packages, target, ignore=big, dirs_exist_ok=True)
    subprocess.run(["chmod", "-R", "a+rX", str(place)], check=True)
    return str(place)


def environment(**more: str) -> dict[str, str]:
    """The environment for children: fusehsm and tests can be imported from any directory, output is plain."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


class LogReader:
    """Reads a child's output to its end, in a thread, so that the child never waits for us. Lines that start with `without` are left out."""

    def __init__(self, stream: "Iterator[str]", without: str | None = None) -> None:
        self._without = without
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: Iterator[str]) -> None:
        with suppress(ValueError, OSError):  # closed under us
            for line in stream:
                if self._without is not None and line.startswith(self._without):
                    continue
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def lines(self) -> list[str]:
        """What has come so far."""
        with self._changed:
            return list(self._lines)

    def wait_for(self, wanted: Callable[[str], bool], timeout: float = PATIENCE) -> str:
        """The first line, past ones included, that `wanted` accepts; AssertionError at the end of the output or of our patience."""

        def found() -> bool:
            return self._ended or any(map(wanted, self._lines))

        with self._changed:
            self._changed.wait_for(found, timeout)
            for line in self._lines:
                if wanted(line):
                    return line
        raise AssertionError("the line did not come; what did: " + "\n".join(self.lines))

    def wait_for_end(self, timeout: float = PATIENCE) -> list[str]:
        """All lines, once the writer has closed its end."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the output has not ended"
        return self.lines


class Mount:
    """`fusehsm mount --foreground SOURCE DESTINATION` as a child that answers; `arguments` go before SOURCE.

    `path` is where the tree is used, `source` the backing, `log` what the daemon says. close() takes everything down, whatever happened.
    """

    def __init__(
        self,
        source: Path,
        path: Path,
        *arguments: str,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        uid: int | None = None,
        descriptors: int | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        """`descriptors`: how many the daemon may hold (RLIMIT_NOFILE, soft and hard); None: as many as we. `program`: another than fusehsm."""
        require_fuse()
        self.source = source
        self.path = path
        fusehsm, more_environment, who = command_of(uid)
        program = program or fusehsm
        self.process = start(
            [*program, "mount", "--foreground", *arguments, str(source), str(path)],
            cwd=cwd,
            env=environment(**{**more_environment, **(env or {})}),
            stdout=subprocess.DEVNULL,
            preexec_fn=functools.partial(_limit_descriptors, descriptors) if descriptors else None,
            **who,
        )
        assert self.process.stderr is not None
        self.log = LogReader(self.process.stderr)
        _STANDING.append(self)
        try:
            self.log.wait_for(lambda line: line == "ready")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The daemon's."""
        return self.process.pid

    @property
    def device(self) -> tuple[int, int]:
        """(major, minor) of the mount."""
        point = os.path.realpath(self.path.parent) + "/" + self.path.name
        return next(m.device for m in mountinfo.read_mounts() if m.is_fusehsm and m.mount_point == point)

    def stop(self) -> int:
        """SIGTERM, as a service manager does; the daemon's exit code."""
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def kill_daemon(self) -> None:
        """SIGKILL: every waiting accessor gets an error, the mount point stays behind, dead."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self) -> None:
        """Kill the daemon and unmount lazily; does nothing the second time."""
        if self not in _STANDING:
            return
        try:
            self.kill_daemon()
        finally:
            unmount_lazily(self.path)
            with suppress(AssertionError):
                self.log.wait_for_end(5)
            if self.process.stderr is not None:
                self.process.stderr.close()
            _STANDING.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _limit_descriptors(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


_STANDING: list[Mount] = []


def unmount_lazily(path: Path | str) -> None:
    """Unmount whatever fusehsm mounts are at exactly that path, however dead; nothing there is fine."""
    point = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    for _ in [m for m in mountinfo.read_mounts() if m.mount_point == point and m.is_fusehsm]:
        tool = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*tool, point], check=False, stderr=subprocess.DEVNULL, timeout=PATIENCE)


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """If the body takes longer, show where it stands and kill every daemon, which ends whatever waits for one."""

    def bite() -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        for mount in list(_STANDING):
            mount.process.kill()

    timer = threading.Timer(seconds, bite)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def own_processes() -> Iterator[int]:
    """Processes that this session has started, zombies left out."""
    return leftovers.processes(SESSION)


class Guardian:
    """A process that kills this one if a test hangs for `longest` seconds, and clears up after it if it is killed."""

    def __init__(self, directory: Path, longest: float) -> None:
        env = {name: value for name, value in environment().items() if name != leftovers.MARK}
        command = [
            sys.executable,
            "-m",
            "tests.support.guardian",
            str(os.getpid()),
            SESSION,
            str(directory),
            str(longest),
        ]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, start_new_session=True
        )

    def say(self, line: str) -> None:
        """Which test begins, or guardian.END when there is nothing to clear up any more."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def end(self) -> None:
        """Everything has been cleared up."""
        self.say(guardian.END)
        self._process.wait(PATIENCE)


@contextmanager
def fuse_device_for_everybody() -> Iterator[None]:
    """/dev/fuse as udev makes it; some test machines keep it for root. Needs root. One session at a time: none finds it closed by another."""
    require(
        os.geteuid() == 0, "needs root"
    )  # not require_root(): some tests take it where they are root, and can do without
    device = os.open("/dev/fuse", os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(device, fcntl.LOCK_EX)
    mode = os.stat("/dev/fuse").st_mode & 0o777
    os.chmod("/dev/fuse", 0o666)
    try:
        yield
    finally:
        os.chmod("/dev/fuse", mode)
        fcntl.flock(device, fcntl.LOCK_UN)  # children that were forked meanwhile hold copies
        os.close(device)


def is_dead(path: Path) -> bool:
    """Whether a FUSE mount whose server has gone is at that path."""
    try:
        os.statvfs(path)  # stat(2) may be answered from the kernel's caches
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False
