"""The directory whose stubs are served, in place: by the real kernel's events, or through a mount of the emulator over it."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from fusehsm.backends.connection import ControlConnection
from fusehsm.backends.opening import BACKENDS, kernel_can_watch
from fusehsm.held_signals import signals_held
from fusehsm.mount import unmount
from fusehsm.mount_options import MountError
from fusehsm.mountinfo import Mount, MountId, id_at, id_of, mount_of
from fusehsm.own_command import own_command, own_environment
from fusehsm.protocol import Backing
from fusehsm.tier.alone import alone
from fusehsm.tier.store import shown


@dataclass(frozen=True, slots=True)
class Destination:
    """`path`: absolute, without symbolic links, where accessors see it. `root_fd`: its directory, under a mount the backing. `backend`: "kernel",
    where what is done through `root_fd` makes events as anything else, or "fuse". `is_whole`: it is the root of its file system."""

    path: str
    root_fd: int
    backend: str
    is_whole: bool = False


@contextmanager
def destination(path: str, backend: str, mount_arguments: Sequence[str]) -> Iterator[Destination]:
    """Make `path` a place with events, and undo that at the end. `backend` as for open_group(), "auto": the real kernel where it can.

    `mount_arguments`: of `fusehsm mount`, whose daemon is a process of its own: when whoever serves dies without a word, accesses are refused, so
    that no stub is read as zeros, and the next one takes over that mount. Raises OSError with one line, EBUSY where somebody fills or populates
    already.
    """
    if backend not in BACKENDS:
        raise ValueError(f"--backend {backend}: choose one of {', '.join(BACKENDS)}")
    if not path:
        raise ValueError("DST is empty; name the directory with the stubs")
    path = os.path.realpath(path)
    _clear_dead_mount(path)
    if not os.path.isdir(path):
        why = "is no directory" if os.path.exists(path) else "is not there; `fusehsm populate` makes it"
        raise OSError(errno.ENOTDIR, why, path)
    mount = mount_of(path)
    if mount.is_fusehsm and backend != "kernel":
        if mount.mount_point != path:
            raise OSError(
                errno.EINVAL, f"lies on a mount of fusehsm; serve its mount point {mount.mount_point}", path
            )
        taken_over = id_of(mount)
        with _root_below(mount) as root_fd, alone(root_fd, path):
            yield Destination(path, root_fd, "fuse")
            if mount.source == path:
                _unmount(path, taken_over)
        return
    root_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with alone(root_fd, path):
            if backend == "kernel" or (backend == "auto" and _kernel_can(path)):
                kernel_can_watch(path)
                is_whole = mount.mount_point == path and mount.root == "/"
                yield Destination(path, root_fd, "kernel", is_whole=is_whole)
            else:
                mounted: list[MountId] = []
                try:
                    _mount(
                        path, mount_arguments, mounted
                    )  # a signal that came meanwhile is raised at its end
                    yield Destination(path, root_fd, "fuse")
                finally:
                    for ours in mounted:
                        _unmount(path, ours)
    finally:
        os.close(root_fd)


def _clear_dead_mount(path: str) -> None:
    """Take away a mount of which the daemon was killed: it refuses everything, so nobody gets to see less than before."""
    try:
        dead = id_at(path)
        os.statvfs(path)  # asks the server, where attributes may be cached
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            _unmount(path, dead)


def _kernel_can(path: str) -> bool:
    try:
        kernel_can_watch(path)
    except OSError:
        return False
    return True


@contextmanager
def _root_below(mount: Mount) -> Iterator[int]:
    async def ask() -> int | None:
        connection = await ControlConnection.open(mount)
        try:
            return (await connection.request(Backing()))[1]
        finally:
            connection.close()

    root_fd = trio.run(ask)
    if root_fd is None:
        raise OSError(errno.ENOTCONN, "its server does not show its backing", mount.mount_point)
    try:
        yield root_fd
    finally:
        os.close(root_fd)


def _mount(path: str, arguments: Sequence[str], mounted: list[MountId]) -> None:
    """Mount, and add the new mount to `mounted`."""
    with signals_held():
        result = subprocess.run(
            own_command("mount", *arguments, path, path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=own_environment(),
            text=True,
            check=False,
        )
        if result.returncode == 0:
            mounted.append(id_at(path))
    if result.returncode == 2:
        raise ValueError(" ".join(result.stderr.replace("fusehsm: ", "").split()))
    if result.returncode:
        said = result.stderr.replace("fusehsm: ", "").strip() or f"exit code {result.returncode}"
        raise OSError(errno.EIO, f"{shown(path)} cannot be mounted: {' '.join(said.split())}")


def _unmount(path: str, ours: MountId) -> None:
    try:
        unmount(path, ours)
    except MountError as error:
        with contextlib.suppress(OSError):
            if id_at(path) != ours:
                return
        mend = (
            f"what is not here is refused there until it is served again, or `fusehsm umount {shown(path)}`"
        )
        raise OSError(errno.EBUSY, f"left mounted: {' '.join(str(error).split())}; {mend}") from None
