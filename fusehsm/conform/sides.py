"""The two sides of a comparison: a file system with the real kernel's events, and a mount of the emulator with its daemon."""

import errno
import os
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
from fusehsm.fanotify.abi import FAN_CLASS_PRE_CONTENT, FAN_CLOEXEC, FAN_MARK_ADD, LINUX_6_14
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import mount_of

# The daemon of an emulated side


_ANSWERS_WITHIN: Final = 5.0  # seconds; an idle daemon takes a millisecond
LINES: Final = 20  # last lines of the daemon's output to keep


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
    with foreground_mount(str(backing), str(path), "--engine", engine, *options, hear=said.append) as daemon:
        yield Side(backing, path, engine, Emulator(daemon, path, said))
