"""`fusehsm doctor`: show what this machine can do, what is missing, and the command that fixes it. Most answers come from a trial."""

import errno
import json
import os
import resource
import select
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from fusehsm.fanotify.abi import FAN_CLASS_PRE_CONTENT
from fusehsm.linux import security_modules
from fusehsm.linux.beneath import follow
from fusehsm.linux.mountinfo import mount_of, read_mounts
from fusehsm.linux.subprocesses import own_command, own_environment

# Seconds for the trial mount: several times the time of a slow machine.
_TRIAL_PATIENCE = 60.0
_OLDEST_PYTHON = (3, 11)
_FEW_FILES = 4096


class Verdict(Enum):
    """The result of a check."""

    #: Everything works.
    GOOD = "good"
    #: Mounting works, but a part of the features is missing.
    LIMITED = "limited"
    #: Nothing can be mounted.
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result. The fields are the keys of --json."""

    #: The thing that was checked.
    name: str
    verdict: Verdict
    #: One line with what was found.
    found: str
    #: The fix, a command or an edit; None if the verdict is GOOD.
    fix: str | None = None


def doctor(path: str | None, *, as_json: bool) -> int:
    """Run all checks, print them, and return the exit code: 0 if mounting is possible, else 1.

    The check of the kernel's own pre-content events is made on the file system of the directory `path`; None: of the temporary
    directory. Raises OSError if the directory does not exist, EXDEV if it lies on a mount of another user: its server may never answer.
    """
    place = os.path.abspath(tempfile.gettempdir() if path is None else path)
    os.close(follow(place)[0])
    checks = [check() for check in _CHECKS] + [_kernel_events(place)]
    possible = all(check.verdict is not Verdict.BAD for check in checks)
    if as_json:
        listed = [asdict(check) | {"verdict": check.verdict.value} for check in checks]
        print(json.dumps({"can_mount": possible, "checks": listed}, indent=2))
    else:
        _print(checks, possible=possible)
    return 0 if possible else 1


def _print(checks: list[Check], *, possible: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    colours = {Verdict.GOOD: "green", Verdict.LIMITED: "yellow", Verdict.BAD: "red"}
    width = max(len(check.name) for check in checks)
    for check in checks:
        word = Text(f"{check.verdict.value:8}", colours[check.verdict])
        console.print(Text.assemble(word, f"{check.name:{width}}  {check.found}"))
        if check.fix is not None:
            console.print(Text.assemble(" " * 8, " " * width, "  fix: ", (check.fix, "bold")))
    console.print(
        "fusehsm can mount here" if possible else "fusehsm cannot mount here: fix the checks marked bad"
    )


# The checks


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if (
        sys.version_info < _OLDEST_PYTHON
    ):  # pip did not check the version: fusehsm was not installed for this interpreter
        return Check("Python", Verdict.BAD, version, "run fusehsm with Python 3.11 or later")
    return Check("Python", Verdict.GOOD, version)


def _pyfuse3() -> Check:
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        fix = "pip install pyfuse3 (to build it: apt-get install gcc pkg-config libfuse3-dev python3-dev)"
        return Check("pyfuse3", Verdict.BAD, f"cannot be imported: {error}", fix)
    return Check("pyfuse3", Verdict.GOOD, metadata.version("pyfuse3"))


def _device() -> Check:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        fix = "modprobe fuse (in a container: start it with --device /dev/fuse --cap-add SYS_ADMIN)"
        if security_modules.may_explain(error):
            fix = security_modules.refusal()
        elif error.errno in (errno.EACCES, errno.EPERM):
            fix = "chmod 666 /dev/fuse (in a container: start it with --device /dev/fuse)"
        return Check("/dev/fuse", Verdict.BAD, error.strerror or str(error), fix)
    return Check("/dev/fuse", Verdict.GOOD, "can be opened")


def _fusermount() -> Check:
    needed = Verdict.BAD if os.geteuid() else Verdict.LIMITED
    found = shutil.which("fusermount3")
    if found is None:
        return Check("fusermount3", needed, "not found; ordinary users cannot mount", "apt-get install fuse3")
    status = os.stat(found)
    if not (status.st_mode & stat.S_ISUID and status.st_uid == 0):
        return Check(
            "fusermount3",
            needed,
            f"{found} is not set-uid root; ordinary users cannot mount",
            f"chmod u+s {found}",
        )
    if not os.path.exists("/etc/mtab"):  # without it fusermount3 refuses to unmount
        fix = "ln -s ../proc/self/mounts /etc/mtab, as root"
        return Check(
            "fusermount3", Verdict.LIMITED, "/etc/mtab is missing; ordinary users cannot unmount", fix
        )
    return Check("fusermount3", Verdict.GOOD, f"{found}, set-uid root")


def _allow_other() -> Check:
    name = "--allow-other"
    if os.geteuid() == 0:
        return Check(name, Verdict.GOOD, "you are root")
    with suppress(OSError):
        if any(
            line.strip() == "user_allow_other" for line in Path("/etc/fuse.conf").read_text().splitlines()
        ):
            return Check(name, Verdict.GOOD, "/etc/fuse.conf has user_allow_other")
    return Check(
        name, Verdict.LIMITED, "refused to ordinary users", "echo user_allow_other >> /etc/fuse.conf, as root"
    )


def _trial() -> Check:
    """Mount an empty directory. Containers and security modules can forbid a mount although all other checks are good."""
    name = "trial mount"
    with tempfile.TemporaryDirectory(prefix="fusehsm-doctor-", ignore_cleanup_errors=True) as place:
        source, destination = os.path.join(place, "source"), os.path.join(place, "destination")
        os.mkdir(source)
        os.mkdir(destination)
        command = own_command("mount", "--foreground", source, destination)
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as server:
            try:
                complaint = _complaint_of(server)
                server.terminate()
                server.wait(_TRIAL_PATIENCE)
            except subprocess.TimeoutExpired:
                complaint = f"no answer within {_TRIAL_PATIENCE:.0f} s"
            finally:
                server.kill()
        if complaint is not None:
            return Check(name, Verdict.BAD, complaint, _trial_fix())
        if any(mount.mount_point == destination for mount in read_mounts()):
            return Check(
                name,
                Verdict.LIMITED,
                "mounted and answered, but cannot be unmounted",
                f"umount -l {destination}, as root",
            )
    return Check(name, Verdict.GOOD, "mounted, answered, unmounted")


def _complaint_of(server: "subprocess.Popen[bytes]") -> str | None:
    """None when a mount in the foreground answers; the last line of its stderr if it ends instead. Raises TimeoutExpired."""
    assert server.stderr is not None
    said = b""
    while select.select([server.stderr], [], [], _TRIAL_PATIENCE)[0]:
        piece = os.read(server.stderr.fileno(), 65536)
        said += piece
        lines = said.decode(errors="replace").splitlines()
        if "ready" in lines:
            return None
        if not piece:
            return (
                lines[-1].removeprefix("fusehsm: ") if lines else f"ended with {server.wait(_TRIAL_PATIENCE)}"
            )
    raise subprocess.TimeoutExpired(server.args, _TRIAL_PATIENCE)


def _trial_fix() -> str:
    return "in a container, start it with --device /dev/fuse --cap-add SYS_ADMIN; else try fusehsm mount --foreground"


def _supervision() -> Check:
    """Check that `fusehsm run` answers the fanotify_init(2) of a program."""
    name = "unmodified listeners"
    program = (
        f"import ctypes; raise SystemExit(ctypes.CDLL(None).fanotify_init({FAN_CLASS_PRE_CONTENT}, 0) < 0)"
    )
    command = own_command("run", "--", sys.executable, "-S", "-c", program)
    try:
        done = subprocess.run(
            command,
            env=own_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TRIAL_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return Check(name, Verdict.LIMITED, "fusehsm run did not end", "report it as a fault of fusehsm")
    if done.returncode == 0:
        return Check(name, Verdict.GOOD, "fusehsm run answers their system calls")
    complaint = done.stderr.strip().removeprefix("fusehsm: ").removeprefix("fusehsm run: ")
    found, _, fix = complaint.partition("; ")
    return Check(
        name,
        Verdict.LIMITED,
        found or f"fusehsm run: exit code {done.returncode}",
        fix or "in a container allow seccomp(2): --security-opt seccomp=unconfined",
    )


def _kernel_events(place: str) -> Check:
    from fusehsm.backends.opening import kernel_can_watch

    name = "kernel's own events"
    release = f"Linux {os.uname().release}"
    with _directory_in(place) as directory:
        try:
            kernel_can_watch(directory)
        except OSError as error:
            cause = (error.strerror or "").removeprefix(f"{directory}: ").partition(";")[0]
            return Check(
                name, Verdict.LIMITED, f"{release}: not on {place}: {cause}", f"fusehsm mount {place} {place}"
            )
        return Check(
            name,
            Verdict.GOOD,
            f"{release}: pre-content events work on {place} ({mount_of(directory).filesystem_type})",
        )


@contextmanager
def _directory_in(place: str) -> Iterator[str]:
    """A new directory for trial marks, so that no other process makes their events. It is the place itself if no directory can be made there."""
    try:
        directory = tempfile.mkdtemp(prefix=".fusehsm-doctor-", dir=place)
    except OSError:
        yield place
        return
    try:
        yield directory
    finally:
        os.rmdir(directory)


def _system_calls() -> Check:
    """Check that the exact range of an access can be read from /proc/<tid>/syscall (ptrace(2), PTRACE_MODE_ATTACH_FSCREDS).

    A child process reads that file of its parent: Yama's scope 1 allows it for descendants only.
    """
    name = "accessors' system calls"
    found = "can be read: events have the exact ranges of their calls"
    code = f"open('/proc/{os.getpid()}/syscall').read()"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode == 0:
        if os.geteuid():
            found += " (of your own processes only)"
        return Check(name, Verdict.GOOD, found)
    scope = ""
    with suppress(OSError):
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip()
    module = security_modules.confinement()
    if module is not None and scope in ("", "0"):
        found = (
            f"closed ({module} forbids ptrace): a split or appending call's event has the request's own range"
        )
        return Check(name, Verdict.LIMITED, found, f"allow it; {security_modules.RULES}")
    cause = f"Yama's ptrace_scope is {scope}" if scope not in ("", "0") else "the kernel refuses"
    fix = "sysctl kernel.yama.ptrace_scope=0, as root, or mount as root"
    if scope == "3":
        fix = "remove ptrace_scope=3 from /etc/sysctl.d and reboot"
    return Check(
        name,
        Verdict.LIMITED,
        f"closed ({cause}): a split or appending call's event has the request's own range",
        fix,
    )


def _read_ahead() -> Check:
    name = "read-ahead setting"
    folder = "/sys/class/bdi"
    if os.geteuid():
        found = "root's: page-fault events may be as wide as read-ahead (128 KiB)"
        return Check(name, Verdict.LIMITED, found, "mount as root")
    try:
        read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError as error:
        return Check(name, Verdict.LIMITED, f"{folder}: {error.strerror}", "mount -t sysfs sysfs /sys")
    if read_only:
        return Check(name, Verdict.LIMITED, f"{folder} is read-only here", "mount -o remount,rw /sys")
    return Check(name, Verdict.GOOD, f"{folder}/*/read_ahead_kb can be written")


def _waiting_fills() -> Check:
    name = "waiting page-cache fills"
    if os.geteuid() == 0 and "fusectl" in Path("/proc/filesystems").read_text().split():
        return Check(name, Verdict.GOOD, "any number at once (fusectl)")
    with suppress(OSError):
        if os.path.ismount("/sys/fs/fuse/connections"):
            return Check(
                name,
                Verdict.GOOD,
                "fusectl is mounted: up to the limit in /sys/module/fuse/parameters/max_user_bgreq",
            )
    return Check(
        name,
        Verdict.LIMITED,
        "12 at once (fusectl is not mounted): more accessors of mappings that wait for a listener stop others",
        "mount -t fusectl fusectl /sys/fs/fuse/connections, as root",
    )


def _request_size() -> Check:
    name = "largest request"
    try:
        pages = int(Path("/proc/sys/fs/fuse/max_pages_limit").read_text())
    except (OSError, ValueError):
        return Check(
            name,
            Verdict.GOOD,
            "1 MiB (this kernel has no fs.fuse.max_pages_limit); larger reads are split, and joined again",
        )
    size = pages * resource.getpagesize()
    return Check(
        name,
        Verdict.GOOD,
        f"fs.fuse.max_pages_limit {pages} ({size // 1024} KiB); larger reads are split, and joined again",
    )


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    found = f"{soft}, may be raised to {shown}"
    if hard != resource.RLIM_INFINITY and hard < _FEW_FILES:
        return Check(
            "open files",
            Verdict.LIMITED,
            f"{found}: few for many waiting accessors",
            "ulimit -Hn 65536, as root",
        )
    return Check("open files", Verdict.GOOD, found)


_CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    _pyfuse3,
    _device,
    _fusermount,
    _allow_other,
    _trial,
    _supervision,
    _system_calls,
    _read_ahead,
    _waiting_fills,
    _request_size,
    _open_files,
)
