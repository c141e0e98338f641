"""Changes settings of a FUSE mount under /sys, which no request carries: the limit of waiting READs, and the read-ahead."""

import logging
import os
from contextlib import suppress
from typing import Final

from fusehsm.linux import syscalls

log = logging.getLogger(__name__)

CONNECTIONS = "/sys/fs/fuse/connections"
MOST_BACKGROUND = 65535  # the largest value that the kernel stores
_KIB: Final = 128  # the kernel's default for FUSE, in KiB


def raise_background_limit(device: tuple[int, int]) -> None:
    """Raise the number of page-cache READs that may wait at once to 65,535.

    The kernel's default is 12 (docs/facts.md, section 14): twelve READs that wait for a listener would stop all others. Needs root, or a
    mounted control filesystem that this user may write. A failure is logged, not raised.
    """
    connection = device[0] << 20 | device[1]
    for directory in _control_directories():
        try:
            for name in ("max_background", "congestion_threshold"):
                path = f"{connection}/{name}"
                descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
                try:
                    os.write(descriptor, str(MOST_BACKGROUND).encode())
                finally:
                    os.close(descriptor)
            return
        except OSError:
            continue
        finally:
            os.close(directory)
    log.info("at most 12 page-cache fills can wait at once: the FUSE control filesystem is closed to us")


def _control_directories() -> "list[int]":
    """Descriptors of the control filesystem's root: of the mounted one, then of a private instance without a mount point."""
    found = []
    with suppress(OSError):
        found.append(os.open(CONNECTIONS, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    with suppress(OSError):
        found.append(syscalls.new_filesystem(b"fusectl"))
    return found


class ReadAhead:
    """The read-ahead of the mount with that (major, minor): how much of a file a page fault brings in (docs/facts.md, section 13).

    Only root may change it; otherwise switch() has no effect.
    """

    def __init__(self, device: tuple[int, int]) -> None:
        self._setting = f"/sys/class/bdi/{device[0]}:{device[1]}/read_ahead_kb"
        self._off = False

    def switch(self, *, off: bool) -> None:
        """Turn read-ahead off, so that a fault brings in one page, or on again."""
        if off is self._off:
            return
        self._off = off
        with suppress(OSError), open(self._setting, "w", encoding="ascii") as setting:
            setting.write("0" if off else str(_KIB))
