"""The two sides of a comparison: a file system with the real kernel's events, and a mount of the emulator with its daemon.

The real kernel makes pre-content events on a small ext4 file system in a sparse file.
"""

import contextlib
import errno
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fusehsm.backends.base import Group
from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.kernel import KernelGroup
from fusehsm.conform.accessor import Accessor, AccessorTimeout, Zygote
from fusehsm.daemon.child import ForegroundMount, foreground_mount
from fusehsm.fanotify.abi import (
    CONTENT_PERM_EVENTS,
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_MARK_ADD,
    LINUX_6_14,
)
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import mount_of, mount_of_descriptor, mounts_on
from fusehsm.linux.signals import signals_held

_ANSWERS_WITHIN: Final = 5.0  # seconds; an idle daemon takes a millisecond
LINES: Final = 20  # last lines of the daemon's output to keep
_PATIENCE = 60.0  # seconds for one command


class Emulator:
    """A mount that is ready, with its daemon. `said` has the last lines of the daemon's output."""

    def __init__(self, mount: ForegroundMount, path: Path, said: deque[str]) -> None:
        self._mount = mount
        self._daemon = mount.daemon
        self._path = path
        self._said = said

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._daemon.pid

    @property
    def has_ended(self) -> bool:
        """Whether the daemon has ended."""
        return self._daemon.poll() is not None

    def trouble(self, zygote: Zygote) -> str:
        """The cause, in one line, if the daemon does not serve any more; "" if it serves. A daemon that hangs is killed."""
        if not self.has_ended and self._answers(zygote):
            return ""
        what = "the emulator does not answer"
        if self.has_ended:
            what = f"the emulator has ended with exit code {self._daemon.returncode}"
        self._daemon.kill()
        self._daemon.wait()
        self._mount.reader.join(_ANSWERS_WITHIN)
        return "; it said: ".join(filter(None, (what, " / ".join(self._said))))

    def _answers(self, zygote: Zygote) -> bool:
        # Another process makes the request: if the daemon is stopped, that process waits for ever.
        with Accessor(zygote) as accessor:
            try:
                accessor.call("statvfs", str(self._path), timeout=_ANSWERS_WITHIN)
            except (AccessorTimeout, OSError):
                return False
        return True


class NoKernelEvents(OSError):
    """This kernel or this user cannot have pre-content events. The message is one line with the cause."""


@dataclass(frozen=True, slots=True)
class Side:
    """A place where workloads run: the real kernel's or the emulator's."""

    #: The directory in which files are made.
    backing: Path
    #: The directory in which they are used and watched; on the real kernel the same.
    path: Path
    #: The emulator's engine; "" on the real kernel.
    engine: str = ""
    #: The emulator's daemon; None on the real kernel.
    emulator: Emulator | None = None
    #: The event bits that a mark on this side may not have: those that first-access mode does not make.
    without: int = 0

    @property
    def is_kernel(self) -> bool:
        """Whether this is the real kernel's side."""
        return not self.engine

    async def open_group(self, flags: int, event_f_flags: int) -> Group:
        """fanotify_init(2) with FAN_NONBLOCK added. Raises the same OSError."""
        if self.is_kernel:
            return KernelGroup(flags, event_f_flags)
        return await EmulatedGroup.connect(mount_of(str(self.path)), flags, event_f_flags)


def kernel_side(directory: Path) -> Side:
    """The real kernel's side, in a directory. Raises NoKernelEvents if there are no pre-content events on its file system."""
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
    """Run `fusehsm mount backing path`; unmount in all cases at the end. The two directories are made if they do not exist.

    Raises OSError with the command's output if it does not become ready.
    """
    for place in (backing, path):
        place.mkdir(parents=True, exist_ok=True)
    said: deque[str] = deque(maxlen=LINES)
    without = CONTENT_PERM_EVENTS if "first-access" in options else 0
    with foreground_mount(str(backing), str(path), "--engine", engine, *options, hear=said.append) as daemon:
        yield Side(backing, path, engine, Emulator(daemon, path, said), without)


def _tool(name: str) -> str:
    # The tools that make and mount file systems are often not in the PATH of an ordinary process.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise FileNotFoundError(f"{name}: not found; install it (Debian: e2fsprogs, mount)")
    return found


def _run(*command: str) -> None:
    # In a session of its own, so that Ctrl-C reaches fusehsm and not the tool.
    with signals_held():
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, start_new_session=True
        )
    if result.returncode:
        raise OSError(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")


@contextlib.contextmanager
def ext4_image(path: Path | str, size_mb: int = 64) -> Iterator[Path]:
    """Make a new ext4 of `size_mb` MiB in the sparse file `path`.img and mount it at `path`, a directory that is created. Needs root.

    Unmounts it at the end whatever happened, also where something still uses it, but nothing that others have mounted; the loop device goes with
    its last user. Raises OSError in one line when a tool is missing or fails.
    """
    make_filesystem, mount = _tool("mkfs.ext4"), _tool("mount")
    mount_point = Path(path)
    image = mount_point.with_name(mount_point.name + ".img")
    mount_point.mkdir(parents=True, exist_ok=True)
    with image.open("xb") as file:
        file.truncate(size_mb << 20)
    try:
        _run(make_filesystem, "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", str(image))
        _run(mount, "-t", "ext4", "-o", "loop", str(image), str(mount_point))
        yield mount_point
    finally:
        _unmount(mount_point, image)
        image.unlink(missing_ok=True)


def _unmount(mount_point: Path, image: Path) -> None:
    """Unmount the image, if it is what is mounted there: mount(8) may have failed, or have run out of time at its very end."""
    try:
        descriptor = os.open(mount_point, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        mount = mount_of_descriptor(descriptor)
        if mount.mount_point != str(mount_point.resolve()) or _image_of(mount.source) != image.resolve():
            return
        for above in mounts_on(mount.mount_id):
            raise OSError(f"{mount_point}: left mounted: {above.mount_point} is mounted on it; unmount both")
        # By descriptor: the path may lead to another mount meanwhile.
        syscalls.umount2(b"/proc/self/fd/%d" % descriptor, syscalls.MNT_DETACH)
    finally:
        os.close(descriptor)


def _image_of(source: str) -> Path | None:
    """The file that a loop device has its content in."""
    try:
        return Path(Path("/sys/block", Path(source).name, "loop/backing_file").read_text().rstrip("\n"))
    except OSError:
        return None
