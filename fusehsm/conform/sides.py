"""The two sides of a comparison: a filesystem with the real kernel's events, and a mount of the emulator."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fusehsm import syscalls
from fusehsm.abi import FAN_CLASS_PRE_CONTENT, FAN_CLOEXEC, FAN_MARK_ADD, LINUX_6_14
from fusehsm.backends.base import Group
from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.kernel import KernelGroup
from fusehsm.engines.fuse_mount import unmount
from fusehsm.mountinfo import mount_of

_PATIENCE = 30.0  # seconds for a daemon to come up or to go


class NoKernelEvents(OSError):
    """This kernel, or this user, cannot have pre-content events; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Side:
    """Where workloads run: files are made under `backing`, used and watched under `path` (on the real kernel the same).

    `engine`: of the emulator; "" on the real kernel.
    """

    backing: Path
    path: Path
    engine: str = ""

    @property
    def is_kernel(self) -> bool:
        """Whether this is the real thing."""
        return not self.engine

    async def open_group(self, flags: int, event_f_flags: int) -> Group:
        """fanotify_init(2), FAN_NONBLOCK added. Raises OSError as that does."""
        if self.is_kernel:
            return KernelGroup(flags, event_f_flags)
        return await EmulatedGroup.connect(mount_of(str(self.path)), flags, event_f_flags)


def kernel_side(directory: Path) -> Side:
    """The real kernel's side, in a directory of a filesystem that has its events. Raises NoKernelEvents where it does not."""
    try:
        group = syscalls.fanotify_init(FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        why = "only root may listen" if error.errno == errno.EPERM else error.strerror
        raise NoKernelEvents(f"no pre-content group of the real kernel: {why}") from None
    try:
        syscalls.fanotify_mark(group, FAN_MARK_ADD, LINUX_6_14.pre_access, path=os.fsencode(directory))
    except OSError as error:
        release = os.uname().release
        raise NoKernelEvents(
            f"Linux {release} makes no pre-content events here ({error.strerror}); they need 6.14 or later"
        ) from None
    finally:
        os.close(group)
    return Side(directory, directory)


@contextmanager
def emulated_side(backing: Path, path: Path, engine: str, *options: str) -> Iterator[Side]:
    """`fusehsm mount` of the directory `backing` at the directory `path`, both made if need be; unmounted at the end whatever happened.

    Raises OSError with what the command said if it does not come up.
    """
    for place in (backing, path):
        place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fusehsm", "mount", "--foreground", "--engine", engine, *options]
    allow_other = ["--allow-other"] if os.geteuid() == 0 else []
    daemon = subprocess.Popen(
        [*command, *allow_other, str(backing), str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        _wait_until_ready(daemon)
        yield Side(backing, path, engine)
    finally:
        _end(daemon, path)


def _wait_until_ready(daemon: "subprocess.Popen[str]") -> None:
    assert daemon.stderr is not None
    said = []
    for line in daemon.stderr:
        if line == "ready\n":
            return
        said.append(line.strip())
    raise OSError(f"the mount did not come up: {' '.join(said) or f'exit code {daemon.wait()}'}")


def _end(daemon: "subprocess.Popen[str]", path: Path) -> None:
    """Unmount as a service manager would; if that takes too long, kill the daemon, which ends the connection, and unmount lazily."""
    daemon.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        daemon.wait(_PATIENCE)
    if daemon.poll() is None:
        daemon.kill()
        daemon.wait()
    with suppress(OSError):  # it is gone already, as a daemon that ends leaves it
        unmount(os.path.join(os.path.realpath(path.parent), path.name), lazily=True)
    if daemon.stderr is not None:
        daemon.stderr.close()
