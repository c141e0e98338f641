"""The directory whose stubs are served in place: with the real kernel's events, or through a mount of the emulator over it."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from fusehsm.backends.backing import root_of_backing
from fusehsm.backends.opening import BACKENDS, kernel_can_watch
from fusehsm.control.client import ControlConnection
from fusehsm.daemon.child import pass_on_notes
from fusehsm.daemon.options import MountError
from fusehsm.linux.mountinfo import Mount, MountId, id_at, id_of, mount_of, read_mounts
from fusehsm.linux.signals import Interrupted, signals_held
from fusehsm.linux.subprocesses import own_command, own_environment
from fusehsm.mount import unmount
from fusehsm.text import shown
from fusehsm.tier.fetch.failures import in_a_line
from fusehsm.tier.populate.lock import locked
from fusehsm.tier.stubs.tree import expect_visible

_REFUSING: Final = "it refuses content that is not here; start fetch again, which takes the mount over, or run `fusehsm umount {}`"


@dataclass(frozen=True, slots=True)
class Destination:
    """A directory that is ready to be served."""

    # Absolute, without symbolic links, as accessors see it.
    path: str
    # Descriptor of the directory; under a mount, of the backing.
    root_fd: int
    # "kernel": an access through `root_fd` makes events. "fuse": it makes none.
    backend: str
    # The directory is the root of its file system.
    is_whole: bool = False


@contextmanager
def destination(path: str, backend: str, mount_arguments: Sequence[str]) -> Iterator[Destination]:
    """Prepare `path` for events, and undo that at the end. `backend`: as for open_group(); "auto" is the real kernel where it can watch the path.

    `mount_arguments`: options for `fusehsm mount`, whose daemon is a process of its own. If fetch is killed, the mount refuses accesses, so that no
    stub is read as zeros, and the next fetch takes the mount over. An error of the body leaves the mount, too: only the ordered end and Interrupted
    unmount. Raises ValueError for bad usage, OSError with one line; EBUSY if another fetch or populate works on the directory.
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
        with _root_below(mount) as root_fd, locked(root_fd, path):
            expect_visible(root_fd, path)
            with _explained(path):
                yield Destination(path, root_fd, "fuse")
            if mount.source == path:
                _unmount(path, taken_over)
        return
    root_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with locked(root_fd, path):
            expect_visible(root_fd, path)
            if backend == "kernel" or (backend == "auto" and _kernel_can(path)):
                kernel_can_watch(path)
                is_whole = mount.mount_point == path and mount.root == "/"
                with _explained(path):
                    yield Destination(path, root_fd, "kernel", is_whole=is_whole)
            else:
                with _mounted(path, mount_arguments), _explained(path):
                    yield Destination(path, root_fd, "fuse")
    finally:
        os.close(root_fd)


@contextmanager
def _mounted(path: str, arguments: Sequence[str]) -> Iterator[None]:
    """Mount, and unmount at the ordered end only. An unserved mount refuses missing content; the directory below it would show zeros."""
    mounted: list[MountId] = []
    stays = False
    try:
        _mount(path, arguments, mounted)  # a signal that arrives meanwhile is raised at its end
        try:
            yield
        except Interrupted:
            raise
        except BaseException:
            stays = True
            raise
    finally:
        if not stays:
            for ours in mounted:
                _unmount(path, ours)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raise any error of the body as an OSError with one line, which also names the consequence for users of the directory."""
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number or errno.EIO, f"{in_a_line(error)}; {_left_behind(path)}") from error


def _left_behind(path: str) -> str:
    # From the list of mounts: a request to the mount itself may wait for a dead server.
    if any(mount.mount_point == path and mount.is_fusehsm for mount in read_mounts()):
        return f"{shown(path)} stays mounted, and {_REFUSING.format(shown(path))}"
    return (
        f"{shown(path)} is not served any more: content that is not here is read as zeros; start fetch again"
    )


def _clear_dead_mount(path: str) -> None:
    """Unmount a mount whose daemon was killed. It refuses everything, so no user loses access."""
    try:
        dead = id_at(path)
        os.statvfs(path)  # goes to the server; attributes may be cached
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
    async def ask() -> int:
        connection = await ControlConnection.open(mount)
        try:
            return await root_of_backing(connection, mount.mount_point)
        finally:
            connection.close()

    root_fd = trio.run(ask)
    try:
        yield root_fd
    finally:
        os.close(root_fd)


def _mount(path: str, arguments: Sequence[str], mounted: list[MountId]) -> None:
    """Mount `path` over itself, and add the new mount to `mounted`. Raises ValueError for bad usage, OSError EIO with the mount's error."""
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
    said = pass_on_notes(result.stderr).replace("fusehsm: ", "").strip()
    if result.returncode == 2:
        raise ValueError(" ".join(said.split()))
    if result.returncode:
        said = said or f"exit code {result.returncode}"
        raise OSError(errno.EIO, f"{shown(path)} cannot be mounted: {' '.join(said.split())}")


def _unmount(path: str, ours: MountId) -> None:
    try:
        unmount(path, ours)
    except MountError as error:
        with contextlib.suppress(OSError):
            if id_at(path) != ours:
                return
        why = " ".join(str(error).split())
        raise OSError(errno.EBUSY, f"left mounted: {why}; {_REFUSING.format(shown(path))}") from None
