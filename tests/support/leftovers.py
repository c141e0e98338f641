"""What a test session has left on this machine: its processes, and the mounts and loop devices under its directory."""

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusehsm.linux import mountinfo

MARK = "FUSEHSM_TEST_SESSION"  # the environment variable that every process of a session inherits
_PATIENCE = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a session started and did not end; `remove` does."""

    what: str
    remove: Callable[[], object]


def leftovers(session: str, directory: Path) -> list[Leftover]:
    """What is still there of a session: marked processes, mounts and loop devices under its directory."""
    found = [Leftover(f"process {pid}: {command_line(pid)}", _killing(pid)) for pid in processes(session)]
    place = os.path.realpath(directory) + "/"
    for mount in reversed(list(mountinfo.read_mounts())):  # the last mounted first
        if mount.mount_point.startswith(place):
            what = f"mount of {mount.filesystem_type} at {mount.mount_point}"
            found.append(Leftover(what, _running("umount", "-l", mount.mount_point)))
    for device, image in _loop_devices():
        if image.startswith(place):
            found.append(Leftover(f"loop device {device} of {image}", _running("losetup", "-d", device)))
    return found


def remove_tree(directory: Path) -> None:
    """Remove a directory and all below it, if nothing is mounted there any more."""
    place = os.path.realpath(directory) + "/"
    if not any(mount.mount_point.startswith(place) for mount in mountinfo.read_mounts()):
        shutil.rmtree(directory, ignore_errors=True)


def processes(session: str) -> Iterator[int]:
    """The processes that a session has started, this one and zombies left out."""
    mark = f"{MARK}={session}".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with suppress(OSError):
            if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0") and not _is_zombie(name):
                yield int(name)


def command_line(pid: int) -> str:
    """A process's words, for messages."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "gone"


def kill(pid: int) -> None:
    """SIGKILL to a process of this session, and wait for its end."""
    with suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], 10)
        finally:
            os.close(pidfd)


def _is_zombie(pid: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _loop_devices() -> Iterator[tuple[str, str]]:
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            yield f"/dev/{file.parts[3]}", file.read_text().rstrip("\n")


def _killing(pid: int) -> Callable[[], object]:
    return lambda: kill(pid)


def _running(*command: str) -> Callable[[], object]:
    return lambda: subprocess.run(command, check=False, timeout=_PATIENCE)
